"""The quality benchmarks on a tiny corpus: rows, the cache of vectors, equal numbers in one process and two."""

import gzip
import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from accelerate import PartialState
from datasets import Dataset
from tiny import corpus, write_jsonl

from cozyrag.data.corpus import gold_ids
from cozyrag.data.matching import contains_answer, matching_form
from cozyrag.data.passages import read_passages
from cozyrag.data.questions import read_questions
from cozyrag.errors import InputError
from cozyrag.evaluation import scoring
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.pair_file import describe_pair
from cozyrag.retrieval.bm25 import LexicalIndex
from cozyrag.retrieval.passage_index import PassageIndex, Passages
from cozyrag.runtime.assets import metric_module

ROOT = Path(__file__).parents[1]
WEIGHTS = {"vectors": 10.0, "sentence_words": 0.5}
READING = {"top_k": 3, "context_tokens": 60, "answer_tokens": 7, "context_filter": "hybrid"}


def benchmark(name):
    """A module of benchmarks/."""
    return importlib.import_module(f"benchmarks.{name}")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(validation questions, questions whose passages are searched too)."""
    folder = tmp_path_factory.mktemp("benchmark")
    passages, questions = corpus(24)
    rows = [
        {"id": q["id"], "question": q["question"], "answers": q["answers"], "title": p["title"], "context": p["text"]}
        for q, p in ((q, passages[n // 2]) for n, q in enumerate(questions))
    ]
    return write_jsonl(folder / "asked.jsonl", rows[:24]), write_jsonl(folder / "others.jsonl", rows[24:])


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    module.main()


def lines_of(table):
    return {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in table.splitlines() if line.startswith("| ")
    }


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Files of more questions than one block of search: {"train": ..., "asked": ..., "passages": ...}."""
    folder = tmp_path_factory.mktemp("many")
    passages, questions = corpus(150)
    return {
        "train": write_jsonl(folder / "train.jsonl", questions[:40]),
        "asked": write_jsonl(folder / "asked.jsonl", questions),
        "passages": write_jsonl(folder / "passages.jsonl", passages),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, generator_path, retriever_path, many):
    """The output folder of a run that started from the tiny models, with other weights."""
    folder = tmp_path_factory.mktemp("trained")
    made = tiny.make_retriever(folder / "made", seed=1)
    retriever = Retriever.load(str(made), max_tokens=48)
    passages = read_passages(str(many["passages"]))[0]
    columns = Passages.of(passages)
    rows = range(len(passages))
    vectors, sentences = retriever.encode_passages(columns.select(rows), columns.spans(rows), batch_size=64)
    run = folder / "run"
    run.mkdir()
    PassageIndex(passages, vectors, fingerprint=retriever.fingerprint(), sentences=sentences).save(run / "index")
    Generator.load(str(tiny.make_generator(folder / "generator", seed=1))).save(run / "generator")
    retriever.save(run / "retriever")
    retrieval = {"mode": "hybrid", "stemmer": "english", "weights": WEIGHTS}
    pair = describe_pair(fingerprint=retriever.fingerprint(), retrieval=retrieval, **READING)
    (run / "cozyrag.json").write_text(json.dumps(pair), encoding="utf-8")
    noted = {"questions": str(many["train"]), "retriever": str(retriever_path), "generator": str(generator_path)}
    (run / "settings.json").write_text(json.dumps(noted), encoding="utf-8")
    return run


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def launch(name, *arguments, processes=1):
    """Run a benchmark as users do, and return what it prints."""
    config = ROOT / "accelerate_configs" / ("cpu.yaml" if processes == 1 else "cpu_ddp.yaml")
    port = ["--main_process_port", "0"] if processes > 1 else []
    start = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        *port,
        "-m",
        f"benchmarks.quality.{name}",
    ]
    clean = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "RANK", "WORLD_SIZE")}
    machine = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*start, *map(str, arguments)], cwd=ROOT, env=clean | machine, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---- qa.py and retrieval.py ----


@pytest.mark.slow
def test_two_processes_write_what_one_writes(trained, many, tmp_path):
    for name, more in (("qa", ["--batch_size", 16, "--latency", 3]), ("retrieval", [])):
        written = {}
        for processes in (1, 2):
            folder = tmp_path / f"{name}-{processes}"
            screen = launch(
                name, trained, "--questions", many["asked"], "--threads", 1, "--json", folder / "out.json", *more,
                processes=processes,
            )  # fmt: skip
            assert screen.count("questions of asked.jsonl, 150 passages") == 1
            written[processes] = {
                path.name: path.read_bytes() for path in folder.glob("out*") if "timings" not in path.name
            }
            times = json.loads((folder / "out.timings.json").read_text())
            assert times["machine"]["processes"] == processes and times["seconds"]
        assert written[1] == written[2]
        assert set(written[1]) >= {"out.json", "out.md"}


def answered_arguments(trained, many, folder):
    return [
        trained, "--questions", many["asked"], "--limit", 20, "--threads", 1, "--json", folder / "qa.json",
        "--index", folder / "vectors", "--latency", 4,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def answered(tmp_path_factory, trained, many):
    """The output folder of qa.py, with the printed text in `screen`."""
    folder = tmp_path_factory.mktemp("answered")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as screen:
        run(benchmark("quality.qa"), patch, *answered_arguments(trained, many, folder))
    (folder / "screen").write_text(screen.getvalue(), encoding="utf-8")
    return folder


def test_qa_repeats_its_numbers_and_every_row_is_correct(answered, trained, many, monkeypatch):
    tmp_path = answered
    screen, first = (tmp_path / "screen").read_text(), (tmp_path / "qa.json").read_bytes()
    results, rows = json.loads(first), lines(tmp_path / "qa.questions.jsonl")
    names = ["this model", "untuned baseline", "BM25 + generator", "closed book", "gold context"]
    assert list(results["scores"]) == names and results["questions"] == results["gold_known"] == len(rows) == 20
    assert results["passages"] == 150 and results["model"] == "run" and str(tmp_path) not in first.decode()
    assert results["weights"]["this model"] == WEIGHTS and results["weights"]["untuned baseline"] != WEIGHTS
    for name in names:
        assert results["scores"][name]["em"]["mean"] == round(
            100 * np.mean([row["systems"][name]["em"] for row in rows]), 2
        )
        low, high = results["scores"][name]["f1"]["interval"]
        assert low <= results["scores"][name]["f1"]["mean"] <= high
        assert all(set(row["systems"]) == set(names) for row in rows)
    assert results["scores"]["gold context"]["answer_in_context"]["mean"] == 100.0  # there is room for a whole passage
    assert set(results["scores"]["closed book"]) == {"em", "f1", "rouge_l", "bleu"}
    assert (
        results["scores"]["BM25 + generator"]["recall@1"]["mean"] == 100.0
    )  # every question names its thing and number
    assert sum(results["verdicts"]["this model"].values()) == 20
    assert len(results["tests"]) == 10 * 2 and results["tests"][0]["first"] == "this model"
    assert results["audit"]["train_questions"] == 40
    assert sum(part["questions"] for part in results["audit"]["parts"]["this model"].values()) == 20
    times = json.loads((tmp_path / "qa.timings.json").read_text())
    assert times["one_at_a_time"]["questions"] == 4
    assert 0 < times["one_at_a_time"]["p50_ms"] <= times["one_at_a_time"]["p95_ms"]
    assert "| this model | " in screen and (tmp_path / "qa.md").read_text() in screen
    [kept] = (tmp_path / "vectors").iterdir()  # of the untuned baseline: this model's own index is of these passages
    made = (kept / "vectors.npy").stat().st_mtime_ns
    run(benchmark("quality.qa"), monkeypatch, *answered_arguments(trained, many, tmp_path))
    assert (tmp_path / "qa.json").read_bytes() == first
    assert (kept / "vectors.npy").stat().st_mtime_ns == made


def test_retrieval_compares_before_and_after_and_repeats_its_numbers(trained, many, tmp_path, monkeypatch, capsys):
    arguments = [trained, "--questions", many["asked"], "--limit", 40, "--threads", 1, "--json", tmp_path / "out.json"]
    run(benchmark("quality.retrieval"), monkeypatch, *arguments)
    first = (tmp_path / "out.json").read_bytes()
    results = json.loads(first)
    sides = [
        f"{mode}, {when}"
        for when in ("before", "after")
        for mode in ("dense", "hybrid as ranks", "hybrid, of passages", "hybrid")
    ]
    assert list(results["scores"]) == ["sparse (BM25)", *sides]
    assert results["scores"]["sparse (BM25)"]["recall@1"]["mean"] == 100.0
    assert results["weights"]["after"] == WEIGHTS
    assert {test["first"] for test in results["tests"][:16]} == {"hybrid, after"}
    for scores in results["scores"].values():  # one gold passage each: the hit rate is recall
        assert (
            scores["recall@1"]["mean"]
            <= scores["mrr@10"]["mean"]
            <= scores["hit@10"]["mean"]
            <= scores["recall@20"]["mean"]
        )
    assert (tmp_path / "out.md").read_text() in capsys.readouterr().out
    run(benchmark("quality.retrieval"), monkeypatch, *arguments)
    assert (tmp_path / "out.json").read_bytes() == first


def test_the_metric_modules_give_the_numbers_of_the_benchmark(answered):
    evaluate = pytest.importorskip("evaluate")
    results, rows = json.loads((answered / "qa.json").read_text()), lines(answered / "qa.questions.jsonl")
    scores = evaluate.load(metric_module("cozyrag_qa")).compute(
        predictions=[row["systems"]["this model"]["prediction"] for row in rows],
        references=[row["answers"] for row in rows],
        intervals=True,
    )
    for theirs, ours in (("exact_match", "em"), ("f1", "f1"), ("rouge_l", "rouge_l"), ("bleu", "bleu")):
        own = results["scores"]["this model"][ours]
        assert round(scores[theirs], 2) == own["mean"]
        assert [round(end, 2) for end in scores[f"{theirs}_interval"]] == own["interval"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --suite NAME or --questions"),
        (["--suite", "quickstart", "--questions", "x.jsonl"], "either --suite NAME or --questions"),
        (["--suite", "squad"], "expected --data FOLDER"),
        (["--suite", "quickstart", "--limit", "0"], "--limit: expected at least 1"),
        (["--suite", "quickstart", "--limit", "9", "--max_passages", "1"], "--max_passages: expected at least"),
    ],
)
def test_wrong_options_are_refused_with_a_message(trained, tmp_path, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        run(benchmark("quality.qa"), monkeypatch, trained, *arguments, "--json", tmp_path / "x.json")
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_baseline_has_a_reason(trained, tmp_path):
    pairs = benchmark("shared.pairs")
    assert pairs.load_base("embedded", None, (None, None), "cpu") == "this model is the untuned baseline"
    assert "--base_retriever" in pairs.load_base(
        str(tmp_path), None, pairs.base_names(str(tmp_path), None, None), "cpu"
    )
    assert "from scratch" in pairs.load_base(str(trained), None, ("embedded", "scratch"), "cpu")
    assert pairs.base_names(str(trained), "mine", None)[0] == "mine"


# ---- search and vectors ----


def test_reciprocal_rank_fusion_by_hand_ties_by_row():
    rankings = np.array([[4, 7, 9]]), np.array([[7, 5, 4]])
    # 7: 1/62 + 1/61; 4: 1/61 + 1/63; 5: 1/62; 9: 1/63
    assert benchmark("quality.retrieval").reciprocal_rank_fusion(rankings, 3).tolist() == [[7, 4, 5]]
    assert benchmark("quality.retrieval").reciprocal_rank_fusion((np.array([[8]]), np.array([[3]])), 9).tolist() == [
        [3, 8]
    ]


def test_scores_of_a_question_by_hand():
    row = benchmark("quality.retrieval").found_row(np.array([5, 1, 2, 3, 4, 6]), 6)
    assert row == {
        "recall@1": 0,
        "recall@5": 0,
        "recall@20": 1,
        "mrr@10": 1 / 6,
        "ndcg@10": pytest.approx(1 / np.log2(7)),
        "hit@10": 1,
    }
    assert set(benchmark("quality.retrieval").found_row(np.array([5]), 6).values()) == {0}


class Process:
    """One of several processes, with the attributes that encoding needs."""

    def __init__(self, index, count):
        self.process_index, self.num_processes, self.is_main_process = index, count, index == 0

    def wait_for_everyone(self):
        pass


def test_vectors_are_encoded_in_parts_resumed_and_equal_for_any_processes(retriever_path, tmp_path, monkeypatch):
    corpus_module = benchmark("shared.corpus")
    PartialState(cpu=True)  # for the progress bars of accelerate
    monkeypatch.setattr(corpus_module, "PART", 8)
    monkeypatch.setattr(corpus_module, "BATCH", 4)
    retriever = Retriever.load(str(retriever_path), max_tokens=40)
    table = Dataset.from_list([{name: each[name] for name in ("id", "title", "text")} for each in corpus(30)[0]])
    whole = corpus_module.stored_index(Process(0, 1), tmp_path / "whole", table, retriever)
    assert np.allclose(
        whole.vectors, retriever.encode(whole.passages.to_read(), kind="document", batch_size=4), atol=1e-6
    )
    made, encode = [], retriever.encode_passages

    def broken(texts, spans, *, batch_size):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(len(texts))
        return encode(texts, spans, batch_size=batch_size)

    monkeypatch.setattr(retriever, "encode_passages", broken)
    with pytest.raises(KeyboardInterrupt):
        corpus_module.stored_index(Process(0, 1), tmp_path / "cut", table, retriever)
    [home] = (tmp_path / "cut").iterdir()
    assert len(list((home / "parts").glob("*.safetensors"))) == 1
    monkeypatch.setattr(retriever, "encode_passages", encode)
    corpus_module._encode_parts(Process(1, 2), home / "parts", whole.passages, retriever)  # parts 2 and 4 of 4
    assert len(list((home / "parts").glob("*.safetensors"))) == 3
    again = corpus_module.stored_index(Process(0, 2), tmp_path / "cut", table, retriever)
    assert np.array_equal(again.vectors, whole.vectors) and np.array_equal(
        again.sentences.vectors, whole.sentences.vectors
    )
    assert np.array_equal(again.sentences.ends, whole.sentences.ends) and not (home / "parts").exists()


def test_gold_passages_are_found_by_id_and_by_text_else_unknown(files):
    asked = read_questions(str(files[0]))
    renamed = asked.passages.select(range(6)).map(lambda row: {"id": "new-" + row["id"]}, load_from_cache_file=False)
    found = gold_ids(asked.table, asked.passages, renamed["id"][:], renamed["text"][:])["passage_id"][:]
    wanted = {old: new for old, new in zip(asked.passages["id"][:], renamed["id"][:], strict=False)}
    assert found == [wanted.get(key) for key in asked.table["passage_id"][:]] and None in found
    assert gold_ids(asked.table, None, asked.passages["id"][:], asked.passages["text"][:])[:] == asked.table[:]


# ---- suites ----


def squad_rows():
    passages, questions = corpus(12)
    return [
        {"id": q["id"], "question": q["question"], "answers": q["answers"], "title": p["title"], "context": p["text"]}
        for q, p in ((q, passages[n // 2]) for n, q in enumerate(questions))
    ]


def zipped(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def data(tmp_path):
    """A folder for the suites: six passages of train, six of dev, and articles that contain five of these."""
    rows = squad_rows()
    zipped(tmp_path / "squad11_train.jsonl.gz", rows[:12])
    zipped(tmp_path / "squad11_dev.jsonl.gz", rows[12:])
    texts = list(dict.fromkeys(row["context"] for row in rows))
    filler = "Nothing of that kind was ever said here about anything at all. " * 12
    articles = [
        {"id": str(n), "title": f"A {n}", "text": f"{filler}\n{text}\n{filler}"} for n, text in enumerate(texts[:11])
    ]
    zipped(tmp_path / "wiki2015_small.jsonl.gz", articles)
    places = [
        {"context_sha1": hashlib.sha1(text.encode()).hexdigest(), "corpus_id": str(n), "coverage": 0.9}
        for n, text in enumerate(texts)
    ]
    zipped(tmp_path / "squad11_in_wiki2015.jsonl.gz", places)
    return tmp_path


def options(suite, folder, **more):
    return Namespace(
        **({"suite": suite, "data": str(folder), "questions": None, "limit": None, "max_passages": None} | more)
    )


def test_squad_suite(data):
    suites = benchmark("shared.suites")
    task = suites.load_task(options("squad", data), None)
    assert (len(task.questions), len(task.passages), len(task.train)) == (12, 12, 12)
    assert set(task.questions["passage_id"][:]) < set(task.passages["id"][:])
    assert [row["em"] for row in task.published] == [28.12, 40.02] and "arXiv:2106.11517" in task.notes[0]
    small = suites.load_task(options("squad", data, limit=2, max_passages=5), None)
    assert (len(small.questions), len(small.passages)) == (2, 5)
    assert set(small.questions["passage_id"][:]) <= set(small.passages["id"][:])
    with pytest.raises(InputError, match="squad11_dev.jsonl.gz or dev-v1.1.json"):
        suites.load_task(options("squad", data.parent), None)


def test_squad_wiki_suite_finds_the_passages_that_contain_the_paragraphs(data):
    task = benchmark("shared.suites").load_task(options("squad-wiki", data), None)
    assert len(task.questions) == 10  # one of the six dev paragraphs is in an article that is not in the file
    texts = dict(zip(task.passages["id"][:], task.passages["text"][:], strict=True))
    for question in task.questions:
        assert question["answers"][0] in texts[question["passage_id"]]
    assert "10 of the 12 dev questions" in task.notes[0] and "10 of the 10" in task.notes[0]
    assert len(task.train) == 12 and len(task.fusion) == 12 and None not in task.fusion["passage_id"][:]


def test_articles_are_split_into_passages_of_whole_sentences():
    cut = benchmark("shared.wiki").cut
    sentence = "One two three four five six seven eight nine ten."
    assert cut(" ".join([sentence] * 25)) == [" ".join([sentence] * 10), " ".join([sentence] * 15)][:1] + [
        " ".join([sentence] * 10),
        " ".join([sentence] * 5),
    ]
    assert [len(text.split()) for text in cut(" ".join([sentence] * 22))] == [100, 120]  # the rest is too short alone
    assert cut("") == [] and cut(sentence) == [sentence]


# ---- numbers ----


def test_paired_tests_report_first_minus_second():
    good, bad = ([{"em": value, "f1": value} for value in values] for values in ([1.0] * 8 + [0.0] * 2, [0.0] * 10))
    [em, _] = benchmark("shared.scoring").paired_tests({"good": good, "bad": bad})
    assert (em["first"], em["second"], em["difference"], em["p_not_better"]) == ("good", "bad", 80.0, 0.0)
    assert 0 < em["interval"][0] < 80 < em["interval"][1] <= 100
    table = benchmark("shared.scoring").test_table([em], "good")
    assert (
        "| bad | +80.0 (" in table
        and "p < 0.0005" in table
        and benchmark("shared.scoring").test_table([em], "bad") == ""
    )


def test_empty_predictions_and_questions_without_answer_have_their_scores():
    rows = benchmark("shared.scoring").with_rouge_l(
        [{"prediction": "", "answers": ["fox"], "em": 0.0}, {"prediction": "", "answers": [], "em": 1.0}]
    )
    scores = scoring.scores_of(rows, ("em", "rouge_l", "bleu"))
    assert (scores["em"]["mean"], scores["rouge_l"]["mean"], scores["bleu"]["mean"]) == (50.0, 50.0, 0.0)


def test_without_their_packages_rouge_l_and_bleu_are_left_out_and_named(monkeypatch):
    for name in ("rouge_score", "sacrebleu"):
        monkeypatch.setitem(sys.modules, name, None)
    assert benchmark("shared.scoring").answer_metrics() == ("em", "f1", "answer_in_context")
    rows = [{"prediction": "a", "answers": ["a"]}]
    assert benchmark("shared.scoring").with_rouge_l(rows) == rows
    report = benchmark("shared.qa_report")
    assert report.metrics_of("closed book") == ("em", "f1") and "Without ROUGE-L and BLEU" in report._without()


def test_tables_by_hand():
    scores = {"one": {"em": {"mean": 12.345, "interval": [10.0, 14.06]}}}
    assert scoring.score_table(scores, ("em", "f1"), [{"name": "theirs", "em": 28.12}]).splitlines() == [
        "| | EM | F1 |", "|---|---:|---:|", "| one | 12.3 (10.0 to 14.1) | - |", "| theirs | 28.12 | - |",
    ]  # fmt: skip
    counts = scoring.verdict_counts([{"verdict": "correct"}, {"verdict": "reader error"}, {"verdict": "correct"}])
    assert scoring.verdict_table({"one": counts}).splitlines()[::2] == [
        "| | correct | reader error |",
        "| one | 66.7 | 33.3 |",
    ]


def test_latency_counts_each_question_alone(monkeypatch):
    bench = benchmark("shared.bench")
    clock = iter([value for n in range(20) for value in (n, n + 0.001 * (n + 1))])
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    asked = []
    results = bench.latencies(asked.append, [f"q{n}" for n in range(20)])
    assert asked == [[f"q{n}"] for n in (*range(3), *range(20))]
    assert results == {
        "questions": 20,
        "p50_ms": pytest.approx(10.5),
        "p95_ms": pytest.approx(19.05, abs=0.051),
    }  # of 1 to 20 ms


# ---- filter.py ----


def test_filter_prints_every_way_and_what_survives(
    files, retriever_path, generator_path, tmp_path, monkeypatch, capsys
):
    module = benchmark("quality.filter")
    run(
        module, monkeypatch, "--questions", files[0], "--also_passages", files[1], "--index", tmp_path / "index",
        "--retriever", retriever_path, "--generator", generator_path, "--budgets", 8, 400, "--answer_at", 400,
    )  # fmt: skip
    out = capsys.readouterr().out
    survival, answers = out.split("| EM | F1 |")
    rows = lines_of(survival)
    for way in module.WAYS:
        assert float(rows[way][1].split()[0]) == 1.0, way  # room for everything: nothing is lost
        assert float(rows[way][0].split()[0]) < 1.0, way
        assert way in answers


def test_answers_match_and_bm25_finds_the_passages_of_eight_languages():
    for name, language in benchmark("quality.texts").LANGUAGES.items():
        texts, questions, answers = zip(*language.rows(), strict=True)
        assert all(contains_answer(matching_form(text), [each]) for text, each in zip(texts, answers, strict=True)), (
            name
        )
        rows = LexicalIndex(texts).search(questions, 5)[1].tolist()
        assert all(gold in found for gold, found in enumerate(rows)), name
