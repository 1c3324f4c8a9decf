"""The pretraining script on a few articles: what is left out, the form of cloze questions, resuming, two processes."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file
from tiny import corpus, write_jsonl
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast, GPT2LMHeadModel

from cozyrag.models.generator import Generator
from cozyrag.models.prompts import ANSWER_CUE, QUESTION_CUE
from cozyrag.models.token_losses import TokenLosses

pytest.importorskip("bm25s")
SCRIPT = Path(__file__).parents[1] / "scripts" / "pretrain_generator.py"
sys.path.insert(0, str(SCRIPT.parent))

import pretrain_generator  # noqa: E402
import warm_start  # noqa: E402
from packed_readings import reading_mask  # noqa: E402
from pretrain_examples import Cloze, Questions, Steps, target_weights  # noqa: E402


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pretrain_generator.py", *map(str, arguments)])
    pretrain_generator.main()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Token arrays of 40 articles and 120 questions; three titles are left out."""
    folder = tmp_path_factory.mktemp("pretrain")
    passages, questions = corpus(40)
    text = " ".join(
        f"In the year {1200 + i}, Count Robert of Burgundy gave {i} silver coins to the old monastery near Dijon."
        for i in range(5)
    )
    articles = [{"id": p["id"], "title": p["title"], "text": f"{p['text']} {text}"} for p in passages]
    rows = [
        {
            "id": q["id"],
            "question": q["question"],
            "answers": q["answers"],
            "title": passages[n // 2]["title"],
            "context": passages[n // 2]["text"],
        }
        for n, q in enumerate(questions)
    ]
    left_out = [{"title": passages[n]["title"].replace(" ", "_").upper()} for n in (3, 4, 5)]
    files = [
        write_jsonl(folder / f"{name}.jsonl", data)
        for name, data in (("text", articles), ("questions", rows), ("left_out", left_out))
    ]
    with pytest.MonkeyPatch.context() as patch:
        run(
            patch,
            "prepare",
            "--text",
            files[0],
            "--questions",
            files[1],
            "--leave_out",
            files[2],
            "--folder",
            folder / "prepared",
            "--vocab_size",
            600,
            "--warm_start",
            "none",
        )
    return folder / "prepared", [passages[n] for n in (3, 4, 5)]


def test_titles_left_out_are_nowhere_in_the_arrays(prepared):
    folder, left_out = prepared
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text, questions = np.load(folder / "text.npz"), np.load(folder / "questions.npz")
    everything = [
        tokenizer.decode(array.tolist())
        for array in (
            text["tokens"],
            text["titles"],
            *(questions[n] for n in ("question", "gold", "found", "without", "sentence")),
        )
    ]
    assert "Fox 0:" in everything[1]
    for passage in left_out:
        assert not any(
            passage["title"].lower() + end in part.lower() for part in everything for end in (":", " is", "?")
        )


def readings_of(source, count):
    made = [source.reading(np.random.default_rng([1, i])) for i in range(count)]
    return [reading for reading in made if reading is not None]


def test_a_cloze_question_has_its_answer_in_its_context(prepared):
    folder, _ = prepared
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    readings = readings_of(Cloze(folder, tokenizer, lm_share=0.0), 100)
    assert len(readings) > 80
    assert max(len(reading.branches) for reading in readings) > 3
    for reading in readings:
        context = tokenizer.decode(reading.context)
        for asked, answered in reading.branches:
            question, answer = tokenizer.decode(asked), tokenizer.decode(answered)
            assert question.startswith(QUESTION_CUE) and question.endswith(f"?{ANSWER_CUE}")
            assert answer.endswith(tokenizer.eos_token) and answer.startswith(" ")
            assert answer.removesuffix(tokenizer.eos_token).strip() in context


def test_tokens_are_those_of_the_package(prepared):
    folder, _ = prepared
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for source in (Cloze(folder, tokenizer, lm_share=0.0), Questions(folder, tokenizer, mixed=True)):
        for reading in readings_of(source, 50):
            assert tokenizer(tokenizer.decode(reading.context))["input_ids"] == reading.context
            for asked, answer in reading.branches:
                assert tokenizer(tokenizer.decode(asked))["input_ids"] == asked
                assert tokenizer(tokenizer.decode(answer[:-1]))["input_ids"] == answer[:-1]


def test_a_paragraph_has_its_own_questions(prepared):
    folder, _ = prepared
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    source = Questions(folder, tokenizer, mixed=True)
    several = [reading for reading in readings_of(source, 100) if len(reading.branches) > 1]
    assert several
    for reading in several:
        context = tokenizer.decode(reading.context)
        for asked, answer in reading.branches:
            name = re.search(r"(Fox|Village|Owl|\w+) (\d+)", tokenizer.decode(asked)).group(2)
            assert f" {name}" in context
            assert tokenizer.decode(answer[:-1]).strip() in context


def test_gold_only_leaves_out_the_other_contexts(prepared):
    folder, _ = prepared
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for reading in readings_of(Questions(folder, tokenizer, mixed=False), 100):
        for _, answer in reading.branches:
            assert tokenizer.decode(answer[:-1]).strip() in tokenizer.decode(reading.context)


def test_weights_of_targets_sum_to_one_for_answers_and_one_for_plain_text():
    plain = torch.tensor([True] * 9 + [False] * 5)
    weights = target_weights(plain)
    torch.testing.assert_close(weights[:9].sum(), torch.tensor(1.0))
    torch.testing.assert_close(weights[9:].sum(), torch.tensor(1.0))
    torch.testing.assert_close(target_weights(~torch.zeros(4, dtype=torch.bool)).sum(), torch.tensor(1.0))


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory, prepared):
    """A BERT of two layers with its own WordPiece vocabulary, and with norms and biases that are not initial values."""
    folder = tmp_path_factory.mktemp("bert")
    letters = [chr(c) for c in range(33, 127)]
    words = ["fox", "red", "village", "monastery", "the", "of", "is", "in", "coins", "count"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *words]
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(pieces), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.2 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter)
    model.save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_a_warm_start_computes_what_bert_computes(prepared, small_bert):
    """R2 of every norm, against the hidden states of transformers' own BERT as a decoder."""
    tokenizer = AutoTokenizer.from_pretrained(prepared[0] / "tokenizer")
    sample = torch.from_numpy(np.load(prepared[0] / "text.npz")["tokens"][:640].astype(np.int64)).view(8, 80)
    config = warm_start.gpt2_config(tokenizer, width=48, layers=2, heads=4)
    model, quality = warm_start.from_encoder(str(small_bert), tokenizer, sample, config=config)
    assert len(quality) == 4 and min(quality) > 0.8
    cold, _ = GPT2LMHeadModel(config), None
    bert = BertModel.from_pretrained(small_bert, is_decoder=True).eval()
    words = bert.embeddings.word_embeddings.weight
    vectors = torch.stack(
        [words[ids].mean(0) for ids in warm_start._pieces(AutoTokenizer.from_pretrained(small_bert), tokenizer)]
    )
    with torch.no_grad():
        wanted = bert(inputs_embeds=vectors[sample], attention_mask=torch.ones_like(sample)).last_hidden_state
        shares = []
        for each in (model, cold):
            got = each.transformer(sample, output_hidden_states=True).hidden_states
            stream = each.transformer.h[-1](got[-2])
            stream = stream[0] if isinstance(stream, tuple) else stream
            normed = torch.nn.functional.layer_norm(stream, stream.shape[-1:]).flatten(0, 1)
            x, y = normed - normed.mean(0), wanted.flatten(0, 1) - wanted.flatten(0, 1).mean(0)
            slope = (x * y).mean(0) / x.pow(2).mean(0)
            shares.append(1 - ((x * slope - y).pow(2).sum() / y.pow(2).sum()).item())
    assert shares[0] > 0.75 > 0.3 > shares[1]


SMALL = ["--rows", 2, "--row_tokens", 384, "--width", 64, "--layers", 1, "--logging_steps", 1, "--threads", 1]


def test_both_stages_train_and_a_resumed_run_ends_bit_equal(prepared, tmp_path, monkeypatch):
    folder, _ = prepared
    steps = ["--stage1_steps", 6, "--stage2_steps", 4]
    run(monkeypatch, "train", "--folder", folder, "--output_dir", tmp_path / "whole", *steps, *SMALL)
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row and row["stage"] == 1]
    assert losses[-1] < losses[0]
    assert all(0 <= row["validation_f1"] <= 100 for row in log if "validation_f1" in row)

    # A run that stops in stage 2 leaves the state that was saved after step 2 of 4.
    save = pretrain_generator.save_state

    def save_then_stop(output, generator, optimizer, stage, step):
        save(output, generator, optimizer, stage, step)
        if (stage, step) == (2, 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrain_generator, "save_state", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        run(
            monkeypatch,
            "train",
            "--folder",
            folder,
            "--output_dir",
            tmp_path / "halves",
            *steps,
            *SMALL,
            "--validate_minutes",
            0,
        )
    monkeypatch.setattr(pretrain_generator, "save_state", save)
    run(
        monkeypatch,
        "train",
        "--folder",
        folder,
        "--output_dir",
        tmp_path / "halves",
        *steps,
        *SMALL,
        "--resume",
    )
    whole, halves = (load_file(tmp_path / name / "generator" / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def launch_two(*task) -> str:
    """Run the script under accelerate launch with two processes, and return what it prints."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "RANK", "WORLD_SIZE")
    }
    config = SCRIPT.parents[1] / "accelerate_configs" / "cpu_ddp.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    done = subprocess.run(
        list(map(str, [*launcher, SCRIPT, *task])),
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def log_of(output) -> list[dict]:
    """The rows of a run's log.jsonl."""
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_take_the_mean_step_of_their_rows(prepared, tmp_path):
    """A whole run and a resumed run of two processes equal steps made by hand on the batches of both."""
    folder, _ = prepared
    length = ["--stage1_steps", 3, "--stage2_steps", 2]
    printed = launch_two("train", "--folder", folder, "--output_dir", tmp_path / "whole", *length, *SMALL)
    assert "of 2 processes" in printed and printed.count('"step": 3') == 2  # a loss and a validation, each once

    options = argparse.Namespace(cold_start=False, width=64, layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    set_seed(42)
    generator = Generator(pretrain_generator.make_model(folder, tokenizer, options), tokenizer)
    model = generator.model
    losses = []
    for source, seed, steps in (
        (Cloze(folder, tokenizer, lm_share=0.3, ask_share=0.3), 42, 3),
        (Questions(folder, tokenizer, mixed=True, ask_share=0.3), 43, 2),
    ):
        peak = 1e-3 if seed == 42 else 5e-4
        optimizer = pretrain_generator.make_optimizer(model, peak, 0.4)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = peak * group["share"] * pretrain_generator.shape_of_rate(step, steps)
            mean = 0
            for process in (0, 1):
                batch = Steps(
                    source,
                    steps=steps,
                    rows=1,
                    row_tokens=384,
                    seed=seed,
                    pad_id=tokenizer.pad_token_id,
                    process=process,
                )[step]
                weights = batch.pop("weights")
                batch["attention_mask"] = reading_mask(batch.pop("documents"), batch.pop("branches"))
                mean = mean + (TokenLosses(model)(**batch) * weights).sum() / 2
            mean.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(mean.detach()))
            if (seed, step) == (43, 0):
                (tmp_path / "halves").mkdir()
                pretrain_generator.save_state(tmp_path / "halves", generator, optimizer, 2, 1)
    launch_two("train", "--folder", folder, "--output_dir", tmp_path / "halves", *length, *SMALL, "--resume")
    logged = {name: [row["loss"] for row in log_of(tmp_path / name) if "loss" in row] for name in ("whole", "halves")}
    assert logged["whole"] == pytest.approx(losses, abs=2e-4)
    assert logged["halves"] == pytest.approx(losses[-1:], abs=2e-4)
    for name in ("whole", "halves"):
        made = load_file(tmp_path / name / "state" / "model.safetensors")
        assert made.keys() == {name for name in model.state_dict() if name != "lm_head.weight"}
        for key, weight in made.items():
            torch.testing.assert_close(weight, model.state_dict()[key], rtol=1e-4, atol=1e-5)


def test_rows_that_processes_cannot_share_are_refused(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_generator.Accelerator, "num_processes", property(lambda self: 3))
    with pytest.raises(SystemExit, match="--rows: expected a multiple of the 3 processes, found 4"):
        run(monkeypatch, "train", "--folder", prepared[0], "--output_dir", tmp_path, *SMALL, "--rows", 4)


def test_the_result_is_an_ordinary_checkpoint_in_half_precision(prepared, tmp_path, monkeypatch):
    folder, _ = prepared
    run(
        monkeypatch,
        "train",
        "--folder",
        folder,
        "--output_dir",
        tmp_path,
        "--stage1_steps",
        1,
        "--stage2_steps",
        1,
        *SMALL,
    )
    assert {tensor.dtype for tensor in load_file(tmp_path / "generator" / "model.safetensors").values()} == {
        torch.float16
    }
    generator = Generator.load(str(tmp_path / "generator"))
    assert generator.model.dtype == torch.float32
    assert isinstance(generator.answer(["What is it?"], ["A fox."], context_tokens=32, max_new_tokens=3)[0], str)
