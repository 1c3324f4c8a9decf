"""The cards of a run: whole, readable by huggingface_hub, true to the numbers, and runnable where they show code."""

import re
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from cozyrag.cards import write_card
from cozyrag.config import parse_settings
from cozyrag.evaluation import summarize, table
from cozyrag.index import PassageIndex, passage_text
from cozyrag.passages import read_passages
from cozyrag.pipeline import CozyRAG
from cozyrag.prompts import ANSWER_CUE, QUESTION_CUE
from cozyrag.retriever import Retriever

ROLES = ("generator", "retriever")
TIMES = "| seconds | index | examine |\n|---|---:|---:|\n| before | 1.5 | 2.5 |\n\nPeak memory: 0.50 GiB."
FRONT = re.compile(r"\A---\n(.*?)\n---\n", flags=re.DOTALL)


def examined(hits):
    """A summary as a run records it, of 8 questions of which `hits` are answered and found."""
    row = {
        "em": 1.0,
        "f1": 1.0,
        "recall@1": 1.0,
        "recall@5": 1.0,
        "recall@20": 1.0,
        "mrr@10": 1.0,
        "answer_in_context": 1.0,
    }
    rows = [row if number < hits else dict.fromkeys(row, 0.0) | {"f1": 0.5, "mrr@10": 0.25} for number in range(8)]
    return {"kind": "examined", "round": 1} | summarize(rows)


BEFORE, AFTER = examined(2), examined(5)
RESULTS = table([("before", BEFORE), ("after round 1", AFTER)])


def card(folder, role, *arguments):
    """The card of a run with these arguments, as ModelCard reads it back."""
    settings = parse_settings(["--questions", "data/my.tsv", *arguments]).to_dict()
    target = folder / role
    target.mkdir(exist_ok=True)
    write_card(target, role=role, settings=settings, results=RESULTS, summary=AFTER, times=TIMES)
    return ModelCard.load(target / "README.md")


@pytest.mark.parametrize("role", ROLES)
def test_a_card_is_whole(role, tmp_path):
    loaded = card(tmp_path, role, "--generator", "distilgpt2")
    text = str(loaded)
    assert loaded.text.strip().startswith(f"# CoZyRAG {role}\n")
    for heading in ("How to use", "Results", "Limits", "Training"):
        body = re.search(rf"\n## {heading}\n(.*?)(?=\n## |\Z)", text, flags=re.DOTALL).group(1)
        assert len(body.split()) > 10, heading
    assert RESULTS in text and TIMES in text
    assert all(f"| {name} |" in text for name in ("questions", "rounds", "seed", "generator", "report_to"))
    assert "`my.tsv`" in text and f"torch {torch.__version__}" in text


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "arguments",
    [(), ("--generator", "scratch"), ("--generator", "distilgpt2", "--report_to", "mlflow", "--run_name", "r")],
)
def test_no_placeholder_is_left(role, arguments, tmp_path):
    text = str(card(tmp_path, role, *arguments))
    for leftover in ("None", "{{", "}}", "{%", "More Information Needed", "TODO", "<"):
        assert leftover not in text, leftover
    assert not re.search(r"\bnan\b", text)
    assert "FOLDER is the output folder of the run" in text or "FOLDER" not in text


@pytest.mark.parametrize("role", ROLES)
def test_the_metadata_is_what_the_hub_expects(role, tmp_path):
    loaded = card(tmp_path, role)
    data = yaml.safe_load(FRONT.match(str(loaded)).group(1))
    allowed = {
        "library_name",
        "pipeline_tag",
        "tags",
        "base_model",
        "model-index",
        "language",
        "license",
        "datasets",
        "metrics",
    }
    assert set(data) <= allowed and None not in data.values()
    assert data["library_name"] == {"generator": "transformers", "retriever": "sentence-transformers"}[role]
    assert data["pipeline_tag"] == {"generator": "text-generation", "retriever": "sentence-similarity"}[role]
    assert (
        "cozyrag" in data["tags"]
        and len(set(data["tags"])) == len(data["tags"])
        and all(re.fullmatch(r"[a-z0-9_-]+", tag) for tag in data["tags"])
    )
    [model] = data["model-index"]
    for result in model["results"]:
        assert result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
        assert all(metric["type"] and isinstance(metric["value"], float) for metric in result["metrics"])


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("generator", {"exact_match": "em", "f1": "f1"}),
        ("retriever", {"recall@1": "recall@1", "recall@5": "recall@5", "mrr@10": "mrr@10"}),
    ],
)
def test_the_metrics_are_those_of_the_last_examination(role, names, tmp_path):
    loaded = card(tmp_path, role)
    assert {result.metric_type: result.metric_value for result in loaded.data.eval_results} == {
        kind: AFTER[name] for kind, name in names.items()
    }
    assert loaded.data.model_name == f"CoZyRAG {role}"
    assert {result.dataset_name for result in loaded.data.eval_results} == {"8 questions of my.tsv"}


def test_the_numbers_of_the_test_are_hand_worked():
    assert (AFTER["em"], AFTER["f1"], AFTER["mrr@10"]) == (62.5, 81.25, 71.88)  # 5/8, (5 + 3/2)/8, (5 + 3/4)/8


def test_the_file_examined_with_is_named_in_the_results(tmp_path):
    loaded = card(tmp_path, "generator", "--eval_questions", "elsewhere/held.jsonl")
    assert {result.dataset_name for result in loaded.data.eval_results} == {"8 questions of held.jsonl"}


@pytest.mark.parametrize(
    ("role", "given", "base_model"),
    [
        ("generator", "distilgpt2", "distilgpt2"),
        ("generator", "openai-community/gpt2", "openai-community/gpt2"),
        ("generator", "embedded", None),
        ("generator", "scratch", None),
        ("retriever", "embedded", "sentence-transformers/all-MiniLM-L6-v2"),
        ("retriever", "BAAI/bge-small-en-v1.5", "BAAI/bge-small-en-v1.5"),
    ],
)
def test_base_model_is_named_if_and_only_if_it_is_on_the_hub(role, given, base_model, tmp_path):
    loaded = card(tmp_path, role, f"--{role}", given)
    assert loaded.data.base_model == base_model
    if base_model:
        validate_repo_id(base_model)
    assert ("base_model" in FRONT.match(str(loaded)).group(1)) == (base_model is not None)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("form", ["absolute", "relative", "two/levels", "./dot"])
def test_a_local_folder_is_no_base_model(role, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = {"absolute": str(tmp_path / "model"), "relative": "model", "two/levels": "my/model", "./dot": "./model"}[
        form
    ]
    Path(name).mkdir(parents=True)
    assert card(tmp_path, role, f"--{role}", name).data.base_model is None


@pytest.mark.parametrize("role", ROLES)
def test_only_the_quickstart_set_is_known_to_be_english(role, tmp_path):
    assert card(tmp_path, role).data.language is None
    assert card(tmp_path, role, "--questions", "quickstart").data.language == "en"


@pytest.mark.parametrize("role", ROLES)
def test_where_the_run_lay_and_where_it_was_pushed_to_is_nobodys_business(role, tmp_path):
    text = str(card(tmp_path, role, "--output_dir", "/home/me/secret-place", "--hub_model_id", "me/private-name"))
    assert "secret-place" not in text and "private-name" not in text


# ---- the code shown


def code(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_code_of_both_cards_runs_on_a_pair(
    generator_path, retriever_path, corpus_files, tmp_path, monkeypatch, capsys
):
    blocks = [block for role in ROLES for block in code(str(card(tmp_path, role)))]
    assert len(blocks) == 3
    retriever = Retriever.load(str(retriever_path))
    passages = read_passages(str(corpus_files["passages"]))[0].select(range(10))
    vectors = retriever.encode(
        [passage_text(row["title"], row["text"]) for row in passages], kind="document", batch_size=10
    )
    index = PassageIndex(passages, vectors, fingerprint=retriever.fingerprint())
    tiny_pair = CozyRAG(
        tiny.Generator.load(str(generator_path)),
        retriever,
        index,
        mode="dense",
        weight=15.0,
        top_k=2,
        context_tokens=40,
        answer_tokens=4,
    )
    monkeypatch.setattr(CozyRAG, "from_pretrained", classmethod(lambda cls, name: tiny_pair))
    for block in blocks:
        block = block.replace("FOLDER/generator", str(generator_path)).replace("FOLDER/retriever", str(retriever_path))
        exec(compile(block, "card", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_the_prompt_and_the_passage_shown_are_laid_out_as_in_training(tmp_path):
    shown = str(card(tmp_path, "generator"))
    assert repr(f"Some context.{QUESTION_CUE}Your question?{ANSWER_CUE}").strip("'") in shown
    shown = str(card(tmp_path, "retriever"))
    assert repr(passage_text("Title", "Text of a passage.")).strip("'") in shown
