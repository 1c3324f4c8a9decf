"""The cards of a run: whole, readable by huggingface_hub, true to the numbers, and runnable where they show code."""

import functools
import json
import re
from pathlib import Path

import datasets
import pytest
import tiny
import torch
import yaml
from huggingface_hub import DatasetCard, ModelCard
from huggingface_hub.utils import validate_repo_id

from cozyrag.config import DEFAULTS, parse_settings
from cozyrag.data.passages import read_passages
from cozyrag.evaluation.evaluation import RETRIEVAL, summarize
from cozyrag.evaluation.overlap_audit import audit
from cozyrag.hub import card_plot, model_cards
from cozyrag.hub.card_plot import draw_curves
from cozyrag.hub.model_cards import Example, card_for_hub, write_cards
from cozyrag.models.prompts import ANSWER_CUE, QUESTION_CUE
from cozyrag.models.retriever import Retriever
from cozyrag.pair_file import describe_pair
from cozyrag.retrieval.passage_index import PassageIndex, passage_text
from cozyrag.runtime.hardware import energy_sentence, machine_facts, machine_sentence

ROLES = ("generator", "retriever")
PIECES = (*ROLES, "index")
FINGERPRINT = "f" * 16
MACHINE = {
    "system": "Linux x86_64, Python 3.11.0",
    "processor": "Some CPU",
    "cores": 8,
    "busy_cores": 2,
    "memory_gb": 32,
    "gpus": [],
    "versions": {"cozyrag": "0.1.0", "torch": "2.13.0"},
}
PRECISION = {
    "name": "bf16",
    "float32_gflops": 197.0,
    "bf16_gflops": 846.0,
    "ratio": 4.29,
    "reason": "a product of matrices is 4.3 times as fast as in float32 (846 against 197 GFLOP/s)",
}
TIMES = "| seconds | index | evaluation |\n|---|---:|---:|\n| untuned baseline | 1.5 | 2.5 |\n\nPeak memory: 0.50 GiB."
PROMPT = f"Some context.{QUESTION_CUE}Your question?{ANSWER_CUE}"
EXAMPLE = Example("How old is the `fox`?", "Fox: It is 7.\nOwl: It is old.", "7", 0.875, ("Fox", "It is 7. " * 100))
AUDIT = audit(
    {"id": ["t"], "question": ["How old is it?"], "answers": [["7"]], "passage_id": ["p"]},
    {"id": ["a", "b"], "question": ["How old is it?", "Why?"], "answers": [["x"], ["7"]], "passage_id": [None, None]},
    {},
    bases={"retriever": {"model": "base", "trained_on": "books", "source": "a page"}},
)
FRONT = re.compile(r"\A---\n(.*?)\n---\n", flags=re.DOTALL)


def apart(found):
    """The scores of each search alone on one question: the vectors and BM25 find less than both together."""
    return {f"{search}_{name}": float(found) for search in ("dense", "sparse") for name in RETRIEVAL}


def evaluated(hits, number=1):
    """A row of metrics.jsonl for an evaluation on 8 questions, `hits` of which the pair answers and finds.

    The vectors alone find one less.
    """
    row = dict.fromkeys(("em", "f1", *RETRIEVAL, "answer_in_context"), 1.0)
    missed = dict.fromkeys(row, 0.0) | {"f1": 0.5, "mrr@10": 0.25}
    rows = [row if number < hits else missed for number in range(8)]
    rows = [row | apart(number < hits - 1) for number, row in enumerate(rows)]
    return {"kind": "evaluation", "round": number} | summarize(rows)


BEFORE, AFTER = evaluated(2, number=0), evaluated(5)


@pytest.fixture(autouse=True)
def drawing(request, monkeypatch):
    """A plot takes a second, so only the tests of plots draw them."""
    if "plot" not in request.node.name:
        monkeypatch.setattr(model_cards, "draw_curves", lambda rows, path, role: not path.write_bytes(b""))


def rows(*evaluations):
    """metrics.jsonl of a run of one round."""
    run = {
        "kind": "run",
        "questions": 64,
        "eval_questions": 8,
        "passages": 40,
        "machine": MACHINE,
        "precision": PRECISION,
    }
    steps = [
        {"kind": "step", "round": 1, "phase": phase, "step": step, "loss": 2.0 - step / 10}
        for phase in ROLES
        for step in (5, 10)
    ]
    times = [{"kind": "time", "round": number, "part": "evaluation", "seconds": 1800.0} for number in (0, 1)]
    return [run, *times, *steps, *evaluations]


def cards(folder, *arguments, metrics=None, index=None, **options):
    """Write the cards of a run with these arguments; returns its settings."""
    settings = parse_settings(["--questions", "data/my.tsv", *arguments]).to_dict()
    for piece in PIECES:
        (folder / piece).mkdir(exist_ok=True)
    (folder / "index" / "index.json").write_text(json.dumps({"retriever_fingerprint": FINGERPRINT} | (index or {})))
    facts = {"settings": settings, "defaults": DEFAULTS, "rows": metrics or rows(BEFORE, AFTER), "times": TIMES}
    write_cards(folder, **facts, prompt=PROMPT, **options)
    return settings


def card(folder, role, *arguments, **options):
    """One card of a run, as huggingface_hub reads it back."""
    cards(folder, *arguments, **options)
    return (DatasetCard if role == "index" else ModelCard).load(folder / role / "README.md")


@pytest.mark.parametrize("role", ROLES)
def test_a_card_is_complete(role, tmp_path):
    """Every line, from the settings, the rows and the machine above."""
    settings = cards(tmp_path, "--rounds", "1", audit=AUDIT, example=EXAMPLE)
    expected = (Path(__file__).parent / "cards" / f"{role}.md").read_text(encoding="utf-8")
    unchanged = [(name, value) for name, value in listed(settings) if name not in ("questions", "rounds")]
    expected = expected.replace("SETTINGS", "\n".join(f"| {name} | {value} |" for name, value in unchanged))
    assert (tmp_path / role / "README.md").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("role", ROLES)
def test_a_run_of_an_older_version_has_no_precision(role, tmp_path):
    run, *rest = rows(BEFORE, AFTER)
    del run["precision"]
    text = str(card(tmp_path, role, metrics=[run, *rest]))
    assert "Precision" not in text and "Python 3.11.0.\n\nEnergy" in text


def listed(settings):
    """The settings that a card lists, with local files by name only."""
    hidden = {"output_dir", *(name for name in settings if name.startswith("hub_"))}
    for name, value in settings.items():
        if name not in hidden and value is not None:
            yield name, "my.tsv" if name == "questions" else value


def test_the_card_of_the_index_is_complete(tmp_path):
    cards(tmp_path)
    expected = (Path(__file__).parent / "cards" / "index.md").read_text(encoding="utf-8")
    assert (tmp_path / "index" / "README.md").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("role", PIECES)
@pytest.mark.parametrize(
    "arguments",
    [(), ("--generator", "scratch"), ("--generator", "distilgpt2", "--report_to", "mlflow", "--run_name", "r")],
)
def test_no_placeholder_is_left(role, arguments, tmp_path):
    text = str(card(tmp_path, role, *arguments))
    folded = ("n<1K", "<details>", "</details>", "<summary>", "</summary>")
    bare = functools.reduce(lambda left, tag: left.replace(tag, ""), folded, text)
    for leftover in ("None", "{{", "}}", "{%", "More Information Needed", "TODO", "<"):
        assert leftover not in bare, leftover
    assert "\n\n\n" not in text
    assert not re.search(r"\bnan\b", text)
    assert "FOLDER is the output folder of the run" in text


@pytest.mark.parametrize("role", ROLES)
def test_without_an_audit_there_is_no_section_and_without_matplotlib_no_image(role, tmp_path, monkeypatch):
    assert "## Leak audit\n\nOf the 2 questions" in str(card(tmp_path, role, audit=AUDIT))
    assert f"![Loss of the {role} by step" in str(card(tmp_path, role))
    assert "Leak audit" not in str(card(tmp_path, role))
    monkeypatch.setattr(model_cards, "draw_curves", draw_curves)
    monkeypatch.setattr(card_plot.importlib.util, "find_spec", lambda _: None)
    text = str(card(tmp_path, role))
    assert "training.png" not in text and "\n\n\n" not in text


@pytest.mark.parametrize("role", ROLES)
def test_the_table_has_a_row_for_each_round(role, tmp_path):
    lines = [line for line in str(card(tmp_path, role)).splitlines() if re.match(r"\| (untuned|after).*\(", line)]
    assert [line.split(" | ")[0] for line in lines] == ["| untuned baseline", "| after round 1"]
    value, metric = {"generator": ("62.5", "em"), "retriever": ("50.0", "dense_recall@1")}[role]
    assert lines[1].split(" | ")[1] == f"{value} ({{:.1f}} to {{:.1f}})".format(*AFTER[f"{metric}_interval"])


def test_the_energy_is_the_result_of_its_formula():
    machine = MACHINE | {"busy_cores": 4, "memory_gb": 16, "gpus": ["NVIDIA A100-SXM4-80GB", "Own GPU"]}
    sentence = energy_sentence(machine, 1800)
    assert sentence.startswith(
        "about 0.37 kWh = 0.5 h × (4 busy cores × 10 W + 16 GB of memory × 0.375 W + "
    )  # 0.5 × 746 W
    assert "1 NVIDIA A100-SXM4-80GB × 400 W + 1 Own GPU × 300 W" in sentence and "assumed, not measured" in sentence


def test_this_machine_can_be_described():
    machine = machine_facts(processes=1, threads=1, device="cpu")
    assert json.loads(json.dumps(machine)) == machine and machine["busy_cores"] == 1 and machine["memory_gb"] > 0
    assert machine["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "1 of " in machine_sentence(machine)


def test_the_plot_of_a_card_is_of_its_own_model_and_the_same_png_each_time(tmp_path):
    cards(tmp_path)
    drawn = [(tmp_path / role / "training.png").read_bytes() for role in ROLES]
    assert drawn[0] != drawn[1] and all(each.startswith(b"\x89PNG") and len(each) > 5_000 for each in drawn)
    assert draw_curves(rows(BEFORE, AFTER), tmp_path / "again.png", "retriever")
    assert (tmp_path / "again.png").read_bytes() == drawn[1]


@pytest.mark.parametrize("role", ROLES)
def test_a_model_that_was_not_trained_or_not_measured_alone_has_no_plot(role, tmp_path):
    assert not draw_curves([BEFORE], tmp_path / "x.png", role)
    others = [row for row in rows(BEFORE, AFTER) if row.get("phase") != role]
    assert not draw_curves(others, tmp_path / "x.png", role)
    older = [{name: value for name, value in row.items() if "dense" not in name} for row in rows(BEFORE, AFTER)]
    assert draw_curves(older, tmp_path / "y.png", role) is (role == "generator")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "licence", "data"),
    [
        (("--generator", "distilgpt2"), "apache-2.0", "not stated by who trained this"),
        (("--generator", "gpt2"), "mit", "not stated"),
        (("--generator", "some/model"), None, "not stated"),
        (
            ("--generator", "some/model", "--model_license", "mit", "--data_license", "cc-by-4.0"),
            "mit",
            "passages: cc-by-4.0.",
        ),
        (("--questions", "quickstart", "--generator", "embedded"), "cc-by-sa-4.0", "passages: apache-2.0."),
    ],
)
def test_licences_are_those_given_or_known_and_never_guessed(arguments, licence, data, tmp_path):
    loaded = card(tmp_path, "generator", *arguments)
    assert loaded.data.license == licence and data in str(loaded)


def test_data_of_the_hub_are_named_by_their_ids(tmp_path):
    loaded = card(tmp_path, "generator", "--questions", "rajpurkar/squad", "--passages", "me/passages")
    assert loaded.data.datasets == ["rajpurkar/squad", "me/passages"]
    assert {result.dataset_type for result in loaded.data.eval_results} == {"rajpurkar/squad"}
    assert card(tmp_path, "generator").data.datasets is None


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
        "base_model_relation",
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
        ("retriever", {"recall@1": "dense_recall@1", "recall@5": "dense_recall@5", "mrr@10": "dense_mrr@10"}),
    ],
)
def test_the_metrics_are_those_of_the_last_evaluation(role, names, tmp_path):
    loaded = card(tmp_path, role)
    assert {result.metric_type: result.metric_value for result in loaded.data.eval_results} == {
        kind: AFTER[name] for kind, name in names.items()
    }
    assert loaded.data.model_name == f"CoZyRAG {role}"
    assert {result.dataset_name for result in loaded.data.eval_results} == {"8 questions of my.tsv"}


def test_the_numbers_of_the_test_are_hand_worked():
    assert (AFTER["em"], AFTER["f1"], AFTER["mrr@10"]) == (62.5, 81.25, 71.88)  # 5/8, (5 + 3/2)/8, (5 + 3/4)/8
    assert (AFTER["recall@1"], AFTER["dense_recall@1"]) == (62.5, 50.0)  # 5/8, 4/8


def test_the_file_of_the_evaluation_is_named_in_the_results(tmp_path):
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
def test_the_folder_of_the_run_and_its_repository_are_private(role, tmp_path):
    text = str(card(tmp_path, role, "--output_dir", "/home/me/secret-place", "--hub_model_id", "me/private-name"))
    assert "secret-place" not in text and "private-name" not in text


# ---- each model by itself, the example and the licences


def test_no_number_of_the_pair_stands_on_the_retrievers_card_except_in_the_sentence_that_names_the_pair(tmp_path):
    loaded = card(tmp_path, "retriever", audit=AUDIT, example=EXAMPLE)
    [sentence] = [line for line in str(loaded).splitlines() if "62.5 %" in line]
    assert sentence.startswith("The pair's hybrid search") and sentence.endswith("of the pair, not of this model.")
    others = str(loaded).replace(sentence, "")
    assert "| em |" not in others and not re.search(r"value: 62\.5|\| 62\.5", others)
    assert {result.metric_value for result in loaded.data.eval_results} == {50.0}


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("hybrid", "The pair's hybrid search, by the retriever's vectors and BM25 together, finds"),
        ("bm25", "The pair's sparse search, by words (BM25) alone, finds"),
        ("dense", "The pair searches by these vectors alone, so its search has the same scores."),
    ],
)
def test_the_pairs_search_is_named(mode, said, tmp_path):
    assert said in str(card(tmp_path, "retriever", "--retrieval", mode))
    answers = card(tmp_path, "generator", "--retrieval", mode)
    assert {result.metric_name for result in answers.data.eval_results} == {
        f"{name} (contexts found by the pair's {mode} search)" for name in ("exact match", "f1")
    }


def test_a_retriever_that_was_never_measured_alone_claims_nothing(tmp_path):
    """A run of an older version that resumed after its last evaluation."""
    older = [{name: value for name, value in row.items() if "dense" not in name} for row in rows(BEFORE, AFTER)]
    loaded = card(tmp_path, "retriever", metrics=older)
    assert loaded.data.eval_results is None and "The run did not measure this model by itself." in str(loaded)
    assert card(tmp_path, "generator", metrics=older).data.eval_results


def test_rounds_of_an_older_version_are_left_out_of_the_retrievers_table(tmp_path):
    before = {name: value for name, value in BEFORE.items() if "dense" not in name}
    text = str(card(tmp_path, "retriever", metrics=rows(before, AFTER)))
    assert "| after round 1 | 50.0" in text and "| untuned baseline | 12.5" not in text


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, "vectors computed in float32 and compared exactly"),
        ({"factory": "SQ8", "precision": "int8"}, "vectors computed in int8 and searched approximately (SQ8)"),
    ],
)
def test_the_retrievers_card_says_what_the_vectors_went_through(facts, said, tmp_path):
    assert said in str(card(tmp_path, "retriever", index=facts))


def test_the_example_is_the_most_certain_correct_answer_whose_passage_the_vectors_find():
    row = {"question": "?", "context": "c", "prediction": "x", "verdict": "correct", "answer_in_context": 1.0}
    candidates = [
        row | {"id": "wrong", "verdict": "reader error", "score": 1.0, "dense_recall@1": 1.0},
        row | {"id": "lucky", "answer_in_context": 0.0, "score": 1.0, "dense_recall@1": 1.0},
        row | {"id": "sparse", "score": 0.9, "dense_recall@1": 0.0},
        row | {"id": "dense", "score": 0.5, "dense_recall@1": 1.0, "prediction": "y"},
    ]
    passages = {"dense": ("Title", "Text."), "sparse": ("Other", "Text.")}
    assert Example.of(candidates, passages.get) == Example("?", "c", "y", 0.5, ("Title", "Text."))
    assert Example.of(candidates[:3], passages.get).passage is None  # another passage is first by the vectors
    assert Example.of(candidates[:2], passages.get) is None and Example.of([], passages.get) is None


def test_an_example_cannot_break_out_of_its_block(tmp_path):
    evil = '```\n# <b>big</b> {{ 7 * 7 }} "FOLDER"'
    text = str(card(tmp_path, "generator", example=Example(evil, evil, evil, 0.5)))
    assert text.count("\n````text\n") == text.count("\n````\n") == 1 and "49" not in text
    for block in code(text):
        compile(block, "card", "exec")


@pytest.mark.parametrize(
    ("arguments", "model", "alike"),
    [
        (("--questions", "quickstart", "--generator", "embedded"), "cc-by-sa-4.0", True),
        (("--generator", "embedded", "--model_license", "mit"), "mit", True),
        (("--questions", "quickstart"), "apache-2.0", False),
        (("--generator", "some/model"), "not stated by who trained this; ask before you use it", False),
    ],
)
def test_the_licence_section_says_what_the_weights_are_under(arguments, model, alike, tmp_path):
    text = str(card(tmp_path, "generator", *arguments))
    section = text.split("## Licence\n")[1].split("\n## ")[0]
    assert f"- This model: {model}.\n" in section and ("under CC BY-SA 4.0" in section) is alike
    assert "CC BY-SA" not in str(card(tmp_path, "retriever", *arguments))


def test_only_changed_settings_stand_open(tmp_path):
    text = str(card(tmp_path, "retriever", "--rounds", "7", "--top_k", "4"))
    shown, folded = text.split("<details>")
    assert "| rounds | 7 |" in shown and "| questions | my.tsv |" in shown and "| top_k |" not in shown
    assert "| top_k | 4 |" in folded and "| rounds |" not in folded


def test_few_questions_are_called_few(tmp_path):
    said = "8 validation questions are few: the scores are uncertain by up to 35 points to each side, and one question "
    assert f"\n\n{said}moves them by 12.5.\n\n" in str(card(tmp_path, "generator"))
    many = [row | ({"questions": 50} if row["kind"] == "evaluation" else {}) for row in rows(BEFORE, AFTER)]
    assert " are few" not in str(card(tmp_path, "generator", metrics=many))


# ---- the code shown


def code(text):
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def test_the_code_of_the_cards_runs_on_an_output_folder(
    generator_path, retriever_path, corpus_files, tmp_path, monkeypatch, capsys
):
    cards(tmp_path)
    blocks = [block for piece in PIECES for block in code((tmp_path / piece / "README.md").read_text(encoding="utf-8"))]
    assert len(blocks) == 5
    tiny.Generator.load(str(generator_path)).save(tmp_path / "generator")
    retriever = Retriever.load(str(retriever_path))
    retriever.save(tmp_path / "retriever")
    passages = read_passages(str(corpus_files["passages"]))[0].select(range(10))
    vectors = retriever.encode(
        [passage_text(row["title"], row["text"]) for row in passages], kind="document", batch_size=10
    )
    PassageIndex(passages, vectors, fingerprint=retriever.fingerprint()).save(tmp_path / "index")
    search = {"mode": "dense", "stemmer": "none", "weights": {"vectors": 15.0, "sentence_words": 0.0}}
    how = {"retrieval": search, "top_k": 2, "context_tokens": 40, "answer_tokens": 4}
    (tmp_path / "cozyrag.json").write_text(json.dumps(describe_pair(fingerprint=retriever.fingerprint(), **how)))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for block in blocks:
        exec(compile(block.replace("FOLDER", str(tmp_path)), "card", "exec"), {})
    titles = capsys.readouterr().out.splitlines()[-3:]
    assert set(titles) <= set(passages["title"])


def test_the_prompt_and_the_passage_shown_are_laid_out_as_in_training(tmp_path):
    shown = str(card(tmp_path, "generator"))
    assert repr(PROMPT).strip("'") in shown
    shown = str(card(tmp_path, "retriever"))
    assert repr(passage_text("Title", "Text of a passage.")).strip("'") in shown


# ---- on the Hub


@pytest.mark.parametrize("role", PIECES)
def test_a_card_names_the_hub_on_the_hub_and_nothing_else_changes(role, tmp_path):
    cards(tmp_path, "--questions", "rajpurkar/squad", "--generator", "distilgpt2")
    path = tmp_path / role / "README.md"
    text = card_for_hub(path, role, "me/rag")
    assert "FOLDER" not in text and '"me/rag' in text
    assert "[me/rag-retriever](https://huggingface.co/me/rag-retriever)" in text or role == "retriever"
    assert "[me/rag-index](https://huggingface.co/datasets/me/rag-index)" in text or role == "index"
    for block in code(text):
        compile(block, "card", "exec")
    before, after = (yaml.safe_load(FRONT.match(each).group(1)) for each in (path.read_text(encoding="utf-8"), text))
    if role == "generator":
        assert after.pop("datasets") == ["rajpurkar/squad", "me/rag-index"]
        before.pop("datasets")
    if role != "index":
        assert after["model-index"][0].pop("name") == {"generator": "rag", "retriever": "rag-retriever"}[role]
        assert before["model-index"][0].pop("name") == f"CoZyRAG {role}"
    assert before == after
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if "FOLDER" not in line]
    start = kept.index("## Data" if role == "index" else "## Results")
    assert [line for line in kept[start:] if line not in text.splitlines()] == []


def test_edits_of_a_card_are_uploaded(tmp_path):
    cards(tmp_path)
    path = tmp_path / "generator" / "README.md"
    text = path.read_text(encoding="utf-8").replace(
        "## Limits", "## A word from me\n\nAsk it about cheese.\n\n## Limits"
    )
    path.write_text(text.replace("library_name", "inference: false\nlibrary_name"), encoding="utf-8")
    path.write_text(path.read_text(encoding="utf-8").replace("- name: CoZyRAG generator", "- name: Mine"))
    pushed = card_for_hub(path, "generator", "me/rag")
    assert "- name: Mine\n" in pushed and "Ask it about cheese." in pushed and "inference: false" in pushed


@pytest.mark.parametrize("role", PIECES)
def test_without_a_card_a_short_one_is_uploaded(role):
    text = card_for_hub(None, role, "me/rag")
    assert "- cozyrag\n" in text and "[me/rag](https://huggingface.co/me/rag)" in text


@pytest.mark.parametrize(
    ("arguments", "shown", "on_hub"),
    [
        (["data/a.tsv", "/home/me/b.tsv"], "a.tsv, b.tsv", None),
        (["/home/me/secret/q*"], "q*", None),
        (["user/name", "/home/me/b.arrow"], "user/name, b.arrow", ["user/name"]),
        (["user/name", "user/other"], "user/name, user/other", ["user/name", "user/other"]),
        (["/home/me/[ab].tsv"], "[ab].tsv", None),
    ],
)
def test_several_files_are_named_without_their_folders(tmp_path, arguments, shown, on_hub):
    found = card(tmp_path, "generator", "--questions", *arguments)
    assert f"Trained on 64 questions of `{shown}`." in str(found) and "/home/me" not in str(found)
    assert found.data.datasets == on_hub
    dataset = found.data.eval_results[0]
    assert dataset.dataset_name.endswith(shown) and dataset.dataset_type == "custom"


def test_the_card_of_a_reranker_gives_the_scores_of_the_search_with_it(tmp_path):
    (tmp_path / "reranker").mkdir()
    measured = {"reranked_recall@1": 75.0, "reranked_recall@5": 87.5, "reranked_mrr@10": 80.0}
    found = measured | {"hybrid_recall@1": 62.5, "hybrid_recall@5": 86.0}
    cards(tmp_path, "--reranker", "embedded", "--rerank_passages", "12", metrics=rows(BEFORE | found, AFTER | found))
    made = ModelCard.load(tmp_path / "reranker" / "README.md")
    assert made.data.pipeline_tag == "text-ranking" and made.data.license == "apache-2.0"
    assert made.data.base_model == "sentence-transformers/all-MiniLM-L6-v2" and made.data.eval_results is None
    assert "| after round 1 | 75.0 | 87.5 | 80.0 |" in made.text and "first 12\npassages" in made.text
    assert "the right passage first for 62.5 % of the questions and among the first five for 86.0 %." in made.text
    retriever = ModelCard.load(tmp_path / "retriever" / "README.md").text.replace("\n", " ")
    assert "BM25 together, ordered again by its reranker, finds the passage" in retriever
    text = card_for_hub(tmp_path / "reranker" / "README.md", "reranker", "me/rag")
    assert 'CrossEncoder("me/rag-reranker")' in text and "FOLDER" not in text
