"""The speed benchmark with tiny models: its rows, its arithmetic, and equal data for both loops."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import corpus, write_jsonl

from benchmarks.shared import foreign_sides, measuring, reference_loop, speed_data
from benchmarks.shared.retrieval_sides import OURS_INT8, ST_ENCODE, index_sides
from benchmarks.shared.round_benchmark import PARTS, ROUNDS, Benchmark, parse
from benchmarks.shared.training_sides import (
    HF_TRAINER,
    IN_BF16,
    OURS,
    PENALIZED,
    REFERENCE,
    SFT,
    SFT_KEEPING,
    ST_LOOP,
    ST_TRAINER,
    generator_sides,
    has_trl,
)
from benchmarks.speed import checks, round
from benchmarks.speed.precision import share_of_peak
from cozyrag.errors import InputError
from cozyrag.models.batching import collate
from cozyrag.models.generator import Generator
from cozyrag.models.prompts import encode_examples
from cozyrag.models.token_losses import TokenLosses

ROOT = Path(__file__).parents[1]
TINY = {
    "repeats": 2, "pairs": 8, "reference_pairs": 4, "learn_pairs": 8, "held_out": 4, "retriever_pairs": 8,
    "index_passages": 8, "searched_passages": 80, "retrieval_questions": 4, "reference_questions": 2,
    "product_size": 16, "products": 2, "generator_batch": 4, "retriever_batch": 4, "pad_to": 64,
    "context_tokens": 24, "passage_tokens": 32,
}  # fmt: skip
SHAPE = ("--layers", "1", "--width", "16", "--heads", "2", "--vocabulary", "1000")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(questions, passages)."""
    folder = tmp_path_factory.mktemp("speed")
    passages, questions = corpus(80)
    return write_jsonl(folder / "questions.jsonl", questions), write_jsonl(folder / "passages.jsonl", passages)


def arguments(files, retriever_path, *more):
    sizes = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    return [
        *("--questions", str(files[0]), "--passages", str(files[1]), "--retriever", str(retriever_path)),
        *("--device", "cpu", *sizes, *more),
    ]


def lines_of(table):
    """The cells of each table line, by the first two."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "]
    return {(row[0], row[1]): row[2:] for row in rows}


def test_every_side_has_its_row(files, retriever_path, tmp_path, monkeypatch, capsys):
    path = tmp_path / "speed.json"
    monkeypatch.setattr(sys, "argv", ["round", *arguments(files, retriever_path, *SHAPE, "--json", str(path))])
    round.main()
    out = capsys.readouterr().out
    sides = {part: [side for first, side in lines_of(out) if first.startswith(f"{part},")] for part in PARTS}
    assert sides == {
        "generator": [OURS, PENALIZED, REFERENCE, HF_TRAINER, *([SFT, SFT_KEEPING] if has_trl() else [])],
        "retriever": [OURS, ST_TRAINER, ST_LOOP],
        "index": [OURS, "CoZyRAG, int8", ST_ENCODE, "SentenceTransformer.encode, our length limit"],
        "retrieval": [OURS, REFERENCE],
    }
    numbers = json.loads(path.read_text())
    assert set(numbers["round_seconds"]) == set(ROUNDS) and all(f"| {name} |" in out for name in ROUNDS)
    trained = [side for side in sides["generator"] if side != PENALIZED]
    learned = numbers["learned"]
    assert list(learned["generator"]) == ["before", *trained, "CoZyRAG, batches of 4"]
    assert list(learned["retriever"]) == ["before", *sides["retriever"]]
    for part in learned.values():
        assert all(each["loss"] < part["before"]["loss"] for name, each in part.items() if name != "before")
    assert numbers["utilisation"]["share"] > 0 and "Padding does not count" in out
    for part in numbers["parts"].values():
        assert all(len(side["rates"]) == 2 and min(side["rates"]) > 0 for side in part.values())
        assert all(side["memory"] >= 0 for side in part.values())


def test_trainers_of_libraries_run_as_they_come_and_in_bf16_beside_ours_in_float32(files, retriever_path):
    made = Benchmark(parse(None, arguments(files, retriever_path, *SHAPE, "--bf16_sides")))
    places = made.place.of_libraries(made.options)
    assert {name: place.bf16 for name, place in places.items()} == {"": False, IN_BF16: True}
    sides = generator_sides(made.models, made.prompts(made.asked.first(4)), made.place, made.options)
    side = {each.name: each for each in sides}
    assert HF_TRAINER + IN_BF16 in side and (SFT + IN_BF16 in side) == has_trl()
    side[HF_TRAINER + IN_BF16].build(4)()
    assert made.place.accelerator().mixed_precision == "no"


def test_trl_trains_on_our_tokens_with_the_loss_of_the_answers(files, retriever_path, monkeypatch):
    trl = pytest.importorskip("trl", reason="an optional neighbour: pip install trl")
    made = Benchmark(parse(None, arguments(files, retriever_path, *SHAPE)))
    prompts, seen = made.prompts(made.asked.first(4)), []
    monkeypatch.setattr(trl.SFTTrainer, "train", lambda self: seen.extend(self.train_dataset))
    side = next(each for each in generator_sides(made.models, prompts, made.place, made.options) if each.name == SFT)
    side.build(4)()
    expected = reference_loop.padded(prompts.examples, pad_id=0, pad_to=0)["labels"].tolist()
    for row, example, labels in zip(seen, prompts.examples, expected, strict=True):
        assert row["input_ids"] == example.input_ids and row["labels"] == labels[: len(example.input_ids)]


def test_fed_rag_gets_our_prompt_as_its_template(generator_path):
    generator = Generator.load(str(generator_path))
    found = foreign_sides.template(generator).format(context="A fox.", query="What?", response="a fox")
    example = encode_examples(
        generator.tokenizer, questions=["What?"], contexts=["A fox."], answers=["a fox"], context_tokens=60,
        max_length=160, layout=generator.layout,
    )[0]  # fmt: skip
    assert generator.tokenizer(found)["input_ids"] == example.input_ids


def test_an_interpreter_without_fed_rag_is_refused_with_the_remedy(files, retriever_path):
    options = parse(None, arguments(files, retriever_path, *SHAPE, "--fed_rag_python", sys.executable))
    made = Benchmark(options)
    side = made.generator_sides(made.prompts(made.asked.first(4)))[-1]
    with pytest.raises(InputError, match=r"No module named 'fed_rag'.*pip install"):
        side.build(4)


PROGRAM = """import json, pathlib, sys
job = json.loads(pathlib.Path(sys.argv[1]).read_text())
print(json.dumps({"ready": True}), flush=True)
assert sys.stdin.readline()
print(json.dumps({"loss": 1.0, "memory": 7}), flush=True)
pathlib.Path(job["output"]).mkdir()
"""


def test_another_process_trains_when_called_and_reports_its_own_memory(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(foreign_sides, "PROGRAM", tmp_path / "program.py")
    made = []

    def build(rows):
        made.append(foreign_sides.FedRAG(sys.executable, {"rows": rows}))
        return made[0]

    seconds, memory = measuring.timed(measuring.Side("foreign", 4, 2, build), 4, torch.device("cpu"))
    assert memory == 7 and seconds > 0 and made[0].folder.is_dir()


def test_one_part_alone_gives_no_round(files, retriever_path, generator_path, capsys):
    round.compare(parse(None, arguments(files, retriever_path, "--only", "index", "--generator", str(generator_path))))
    out = capsys.readouterr().out
    assert "| index, passages | CoZyRAG |" in out and "generator, QA" not in out and "Unknown: a round" in out


def test_the_default_shape_is_that_of_distilgpt2():
    options = parse(None, [])
    assert (options.layers, options.width, options.heads, options.vocabulary) == (6, 768, 12, 50257)
    assert (options.round_pairs, options.round_passages, options.repeats) == (20_000, 21_000, 3)


# ---- arithmetic


def test_training_flops_by_hand():
    # d = 4, m = 16: a layer has 4 * 16 + 2 * 64 = 192 matrix parameters. First layer, 5 tokens: 6 * 192 * 5 = 5760;
    # its attention: 6 * 4 * (3^2 + 2^2) = 312. Last layer: 6 * 48 * 5 = 1440 for all tokens, 6 * 144 * 3 = 2592 for 3
    # answer tokens, 12 * 4 * (3 * 2 + 2 * 1) = 384 for their attention. Head: 6 * 4 * 10 * 3 = 720.
    found = measuring.training_flops(layers=2, width=4, inner=16, vocabulary=10, lengths=[3, 2], targets=[2, 1])
    assert found == 5760 + 312 + 1440 + 2592 + 384 + 720


def test_the_formula_counts_the_matrices_of_the_model_that_is_trained(generator_path):
    generator = Generator.load(str(generator_path))
    config = generator.model.config
    matrices = sum(p.numel() for p in generator.model.transformer.h.parameters() if p.ndim == 2)
    found = measuring.training_flops(
        layers=config.n_layer, width=config.n_embd, inner=4 * config.n_embd, vocabulary=0, lengths=[1], targets=[1]
    )
    assert found == 6 * matrices + 6 * (config.n_layer - 1) * config.n_embd + 12 * config.n_embd


def test_the_round_by_hand():
    rates = {"generator": 2.0, "retriever": 4.0, "index": 10.0, "retrieval": 50.0}
    # 200 pairs: 100 s + 50 s + 4 s; 30 passages: 3 s
    assert measuring.round_seconds(rates, pairs=200, passages=30) == 157.0


def test_ratios_are_taken_within_a_repetition():
    ours, theirs = measuring.Measured("a", [4.0, 2.0, 9.0], 0), measuring.Measured("b", [2.0, 2.0, 3.0], 0)
    assert measuring.ratios(ours, theirs) == [2.0, 1.0, 3.0] and ours.rate == 4.0


def test_sides_alternate_and_the_warm_up_does_not_count():
    order = []

    def side(name):
        return measuring.Side(name, 5, 2, lambda rows: lambda: order.append((name, rows)))

    found = measuring.measure("part", [side("a"), side("b")], repeats=2, device=torch.device("cpu"))
    assert order == [("a", 2), ("b", 2), ("a", 5), ("b", 5), ("a", 5), ("b", 5)]
    assert [len(each.rates) for each in found] == [2, 2]


def test_peak_memory_includes_freed_memory():
    memory = measuring.PeakMemory(torch.device("cpu"))
    with memory:
        block = torch.ones(64 * 2**20)
        del block
    assert memory.used > 128 * 2**20


# ---- data and models


def test_both_readers_give_the_same_data(files):
    asked, passages = (str(path) for path in files)
    assert speed_data._read_lines(asked, passages) == speed_data._read_tables(asked, passages)


def test_passages_come_from_the_question_file_if_it_contains_them(tmp_path):
    rows = [{"question": f"{n}?", "answers": [str(n)], "title": "T", "context": f"text {n // 2}"} for n in range(6)]
    path = str(write_jsonl(tmp_path / "questions.jsonl", rows))
    for read in (speed_data._read_lines, speed_data._read_tables):
        found, passages = read(path, None)
        texts = dict(zip(passages.ids, passages.texts, strict=True))
        assert passages.texts == ["text 0", "text 1", "text 2"] and passages.titles == ["T"] * 3
        assert [texts[key] for _, _, key in found] == [row["context"] for row in rows]


def test_held_out_questions_are_not_trained_on():
    asked = speed_data.Asked(list("abcdef"), list("ABCDEF"), list(range(6)))
    train, held_out = asked.split(5, 2)
    assert train.questions == list("abcda") and held_out.questions == ["e", "f"] and held_out.gold == [4, 5]


def test_a_random_retriever_has_the_shape_of_the_real_one():
    models = speed_data.Models(["a red fox", "a blue river"], shape=None, retriever="random")
    retriever = models.load_retriever("cpu", 32)
    matrices = [p.numel() for name, p in retriever.model.named_parameters() if ".layer." in name and p.ndim == 2]
    assert sum(matrices) == 6 * 12 * 384**2 and retriever.reads_sentences
    assert retriever.encode(["a fox"], kind="query", batch_size=1).shape == (1, 384)


# ---- the reference loop


@pytest.fixture
def same(generator_path):
    """A generator and examples of uneven length."""
    generator = Generator.load(str(generator_path))
    passages, questions = corpus(4)
    asked = questions[:3]
    examples = encode_examples(
        generator.tokenizer,
        questions=[each["question"] for each in asked],
        contexts=[passages[0]["text"], "", passages[1]["text"][:30]],
        answers=["red", "in the year 1500", "it is white"],
        context_tokens=60,
        max_length=160,
    )
    return generator, examples, [each["question"] for each in asked]


def test_the_reference_loop_has_our_loss_on_the_same_batch(same):
    generator, examples, questions = same
    ours = TokenLosses(generator.model)(**collate(examples, pad_id=generator.tokenizer.pad_token_id)).mean().item()
    assert generator.model.config.resid_pdrop == 0
    losses = reference_loop.train_generator(
        generator.model, generator.tokenizer, examples, questions, device=torch.device("cpu"), autocast=False,
        learning_rate=1e-3, batch_size=3, pad_to=120,
    )  # fmt: skip
    assert losses == [pytest.approx(ours, abs=1e-4)]
    after = TokenLosses(generator.model)(**collate(examples, pad_id=generator.tokenizer.pad_token_id)).mean().item()
    assert after < ours


def test_the_batches_of_the_reference_loop_are_padded_and_only_answers_have_labels(same):
    _, examples, _ = same
    batch = reference_loop.padded(examples, pad_id=7, pad_to=120)
    assert all(tensor.shape == (3, 120) for tensor in batch.values())
    for row, example in enumerate(examples):
        wanted = batch["labels"][row] != -100
        assert batch["labels"][row][wanted].tolist() == example.input_ids[example.prompt_length :]
        assert batch["attention_mask"][row].sum() == len(example.input_ids)


def test_the_penalties_of_the_reference_loop_by_hand():
    assert (
        reference_loop.repeated_ngrams([1, 2, 3, 1, 2, 3, 1, 2, 3]) == 3 + 1 + 1
    )  # 123 three times, 231 twice, 312 twice
    assert reference_loop.keyword_overlap("the red fox", "Where is THE fox") == pytest.approx(2 / 3)


def test_the_contexts_of_the_reference_loop_keep_the_nearest_sentences(retriever_path, generator_path):
    import faiss

    from cozyrag.models.retriever import Retriever
    from cozyrag.retrieval.passage_index import Passages

    rows = corpus(3)[0]
    passages = Passages(*([row[name] for row in rows] for name in ("id", "title", "text")))
    retriever = Retriever.load(str(retriever_path))
    index = faiss.IndexFlatIP(32)
    index.add(retriever.encode(passages.texts, kind="document", batch_size=4))
    question = "The fox 0 is red."
    context = reference_loop.make_context(
        question, model=retriever.model, index=index, passages=passages,
        tokenizer=Generator.load(str(generator_path)).tokenizer, top_k=3, budget=20,
    )  # fmt: skip
    assert context.startswith(question)


# ---- without datasets and faiss


@pytest.fixture
def bare_packages(tmp_path):
    """A folder of links to all installed packages except datasets and faiss."""
    installed, folder = Path(torch.__file__).parents[1], tmp_path / "packages"
    folder.mkdir()
    for path in installed.iterdir():
        if not path.name.startswith(("datasets", "faiss")):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.slow
def test_three_parts_run_without_datasets_and_faiss(bare_packages, files, retriever_path):
    done = subprocess.run(
        [sys.executable, "-S", "-m", "benchmarks.speed.round", *arguments(files, retriever_path, *SHAPE)],
        cwd=ROOT,
        env={"PYTHONPATH": str(bare_packages), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "datasets and faiss cannot be imported: retrieval" in done.stderr
    parts = {first.partition(",")[0] for first, _ in lines_of(done.stdout)}
    assert {"generator", "retriever", "index"} <= parts and "retrieval" not in parts
    assert "SentenceTransformerTrainer" not in done.stdout


def test_the_8_bit_side_encodes_with_8_bits_while_it_is_timed(files, retriever_path):
    pytest.importorskip("onnxruntime")
    made = Benchmark(parse(None, arguments(files, retriever_path, "--only", "index")))
    plain, eight = index_sides(made.models, made.passages, made.place, made.options)[:2]
    assert eight.name == OURS_INT8
    (whole, _), (coarse, _) = plain.build(8)(), eight.build(8)()
    near = (whole * coarse).sum(axis=1)
    assert 0.97 < near.min() < near.max() < 1 - 1e-7


def test_the_cost_of_the_checks_is_that_of_loading_and_finishing_without_them(pair_folder, tmp_path, capsys):
    checks.table(argparse.Namespace(pair=str(pair_folder), repeats=1))
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.split("\n") if line.startswith("| ")]
    assert rows == ["", "loading the pair", "finishing the index"]
    broken = shutil.copytree(pair_folder, tmp_path / "pair")
    path = broken / "index" / "vectors.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\xc0\x7f")  # NaN
    with pytest.raises(InputError, match="other contents"):
        checks.CozyRAG.from_pretrained(broken)
    with checks.unchecked():
        checks.CozyRAG.from_pretrained(broken)


def test_the_share_of_a_product_counts_the_weights_of_the_layers():
    """SmolLM2: 30 layers of 3,538,944 weights, 6 FLOPs each, 150 tokens: 95.55 GFLOP a row."""
    line = share_of_peak([{"smollm2": rate, "plain smollm2": 1.0} for rate in (2.0, 3.0, 9.0)], 573.3)
    assert "SmolLM2 287, the same, layers of transformers 96: 50 % and 17 % of the 573 of a square product" in line
