"""The modules for the `evaluate` library, loaded as by users: scores, refused inputs, several processes, Spaces."""

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from huggingface_hub import metadata_load

evaluate = pytest.importorskip("evaluate")

from cozyrag.evaluation.metrics import exact_match, f1, ndcg_at, ranks_of, recall_at, rouge_l  # noqa: E402
from cozyrag.runtime.assets import metric_module  # noqa: E402

ROOT = Path(__file__).parents[1]
NAMES = ("cozyrag_qa", "cozyrag_retrieval")
PREDICTIONS = ["October", "the red fox!", "", "blue", ""]
REFERENCES = [["October 1973", "1973"], ["Red Fox"], ["stone"], [], []]
WORKER = """
import evaluate, json, sys
path, number, cache = sys.argv[1], int(sys.argv[2]), sys.argv[3]
metric = evaluate.load(path, num_process=2, process_id=number, experiment_id="both", cache_dir=cache)
rows = json.loads(sys.argv[4])[number::2]
print(json.dumps(metric.compute(predictions=[row[0] for row in rows], references=[row[1] for row in rows])))
"""


@pytest.fixture(scope="module")
def qa():
    return evaluate.load(metric_module("cozyrag_qa"))


@pytest.fixture(scope="module")
def retrieval():
    return evaluate.load(metric_module("cozyrag_retrieval"))


def test_qa_returns_the_means_of_the_metrics_of_training(qa):
    scores = qa.compute(predictions=PREDICTIONS, references=REFERENCES, intervals=True)
    pairs = list(zip(PREDICTIONS, REFERENCES, strict=True))
    for name, function in (("exact_match", exact_match), ("f1", f1), ("rouge_l", rouge_l)):
        assert scores[name] == pytest.approx(100 * sum(function(*pair) for pair in pairs) / 5)
        assert scores[f"{name}_interval"][0] <= scores[name] <= scores[f"{name}_interval"][1]
    assert scores["exact_match"] == 40.0 and scores["questions"] == 5 and 0 <= scores["bleu"] <= 100
    assert "answer_in_context" not in scores


def test_scores_that_need_no_package_are_computed_without_those_of_the_others(qa, monkeypatch):
    """The install of the README has neither rouge-score nor sacrebleu."""
    for name in ("rouge_score", "sacrebleu"):
        monkeypatch.setitem(sys.modules, name, None)
    scores = qa.compute(predictions=PREDICTIONS, references=REFERENCES, intervals=True)
    assert scores["exact_match"] == 40.0 and "f1_interval" in scores
    assert not [name for name in scores if name.startswith(("rouge_l", "bleu"))]


def test_qa_with_contexts():
    metric = evaluate.load(metric_module("cozyrag_qa"), "contexts")
    for prediction, reference, context in (
        ("1973", ["1973"], "It was 1973."),
        ("x", ["1815"], "the 1815s"),
        ("", [], ""),
    ):
        metric.add(prediction=prediction, reference=reference, contexts=context)
    assert metric.compute()["answer_in_context"] == pytest.approx(100 / 3)


def test_retrieval_by_hand(retrieval):
    found = [["b", "a", "c"], [], ["a"], ["x"]]
    wanted = [["a", "z", "a"], ["q"], ["a"], []]
    scores = retrieval.compute(predictions=found, references=wanted, ks=[1, 100], mrr_at=2)
    assert scores["recall@1"] == pytest.approx(100 / 3) and scores["recall@100"] == pytest.approx(
        100 * (0.5 + 0 + 1) / 3
    )
    assert scores["hit_rate@100"] == pytest.approx(200 / 3) and scores["mrr@2"] == pytest.approx(
        100 * (0.5 + 0 + 1) / 3
    )
    first = ranks_of(found[0], set(wanted[0]))
    assert scores["ndcg@100"] == pytest.approx(100 * (ndcg_at(first, 100, 2) + 1) / 3)
    assert recall_at(first, 100, 2) == 0.5
    assert (scores["questions"], scores["unjudged"]) == (3, 1)


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("cozyrag_retrieval", {"predictions": [["a", "b", "a"]], "references": [["b"]]}, "question 0.*'a' twice"),
        ("cozyrag_retrieval", {"predictions": [["a"]], "references": [[]]}, "with a relevant item"),
        ("cozyrag_retrieval", {"predictions": [["a"]], "references": [["a"]], "ks": [0]}, "depths of at least 1"),
        ("cozyrag_qa", {"predictions": [None], "references": [["b"]]}, "match the expected format"),
        ("cozyrag_qa", {"predictions": ["a", "b"], "references": [["b"]]}, "Mismatch"),
    ],
)
def test_invalid_inputs_are_refused(name, inputs, message):
    with pytest.raises(ValueError, match=message):
        evaluate.load(metric_module(name)).compute(**inputs)


def test_no_question_and_unknown_configurations_are_refused(qa):
    with pytest.raises(ValueError, match="at least one question"):
        qa._compute([], [])
    with pytest.raises(ValueError, match="configuration"):
        evaluate.load(metric_module("cozyrag_qa"), "nonsense")


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_the_docstring_hold(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    metric = evaluate.load(metric_module(name))
    case = doctest.DocTestParser().get_doctest(metric.info.inputs_description, {"evaluate": evaluate}, name, None, 0)
    assert len(case.examples) >= 3
    assert doctest.DocTestRunner().run(case).failed == 0
    assert metric.info.citation.count("@") >= 2 and len(metric.info.description) > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_scores_of_one(name, tmp_path):
    rows = {
        "cozyrag_qa": list(zip(PREDICTIONS, REFERENCES, strict=True)),
        "cozyrag_retrieval": [[["a", "b"], ["b"]], [["c"], ["c"]], [[], ["d"]], [["e", "f", "g"], ["g", "h"]]],
    }[name]
    command = [sys.executable, "-c", WORKER, metric_module(name)]
    started = [
        subprocess.Popen([*command, str(n), str(tmp_path), json.dumps(rows)], stdout=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=tiny.PATIENCE)[0].splitlines()[-1]) for process in started)
    alone = evaluate.load(metric_module(name)).compute(
        predictions=[row[0] for row in rows], references=[row[1] for row in rows]
    )
    assert second is None and first == pytest.approx(alone)


@pytest.mark.parametrize("name", NAMES)
def test_a_space_works_without_this_package(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    space = tmp_path / name
    importlib.import_module("metric_space").assemble(name, space)
    assert (
        "cozyrag.evaluation.metrics"
        not in (space / f"{name}.py").read_text(encoding="utf-8").split("import datasets")[1]
    )
    assert {path.name for path in space.iterdir()} == {
        "README.md", "app.py", "requirements.txt", f"{name}.py", "cozyrag_metrics.py",
    }  # fmt: skip
    facts = metadata_load(space / "README.md")
    assert (facts["sdk"], facts["app_file"], facts["title"]) == ("gradio", "app.py", name) and "metric" in facts["tags"]
    inputs = (
        {"predictions": [["a"]], "references": [["a"]]}
        if "retrieval" in name
        else {"predictions": ["a b"], "references": [["b"]]}
    )
    monkeypatch.setitem(sys.modules, "cozyrag.evaluation.metrics", None)  # importing it now raises ImportError
    theirs = evaluate.load(str(space)).compute(**inputs)
    monkeypatch.undo()
    assert theirs == evaluate.load(metric_module(name)).compute(**inputs)
