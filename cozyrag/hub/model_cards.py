"""Cards of the three repositories: facts gathered by a run, put into the templates of model_cards/.

A card says what was measured, on what, with which settings, and nothing else. It is written for the output folder and
names its pieces FOLDER/...; a push puts the names on the Hub there, in whatever the card's owner has made of it since.
Left out: judging the facts.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from cozyrag.hub.card_plot import draw_curves
from cozyrag.models.prompts import ANSWER_CUE, QUESTION_CUE
from cozyrag.models.smollm2 import BASE as SMOLLM2
from cozyrag.models.smollm2 import hub_name
from cozyrag.retrieval.passage_index import made_by
from cozyrag.runtime.assets import shipped_folder
from cozyrag.runtime.hardware import energy_sentence, machine_sentence
from cozyrag.runtime.precision import MEASURED, told

CARD = "README.md"
ADAPTER_NOTE = ", a LoRA adapter of its base (needs `peft`; `cozyrag merge` makes one model of the two)"
PICTURE = "training.png"
FOLDER_NOTE = "FOLDER is the output folder of the run.\n"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
# of base models; what is made from others carries no licence unless one is given
LICENCES = {
    ("retriever", MINILM): "apache-2.0",
    ("generator", "embedded"): "cc-by-sa-4.0",
    ("generator", SMOLLM2): "apache-2.0",
    ("generator", "distilgpt2"): "apache-2.0",
    ("generator", "distilbert/distilgpt2"): "apache-2.0",
    ("generator", "gpt2"): "mit",
    ("generator", "openai-community/gpt2"): "mit",
}
QUICKSTART_LICENCE = "apache-2.0"
TABLE_FILES = {".tsv", ".csv", ".jsonl", ".json", ".parquet", ".gz"}
COLUMNS = ("em", "f1", "recall@1", "recall@5", "recall@20", "mrr@10", "answer_in_context")
INDEXED = {"generator": {"em": "exact_match", "f1": "f1"}} | {
    "retriever": {name: name for name in ("recall@1", "recall@5", "mrr@10")}
}
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10**7, "1M<n<10M"))


def write_cards(
    folder: Path,
    *,
    settings: Mapping,
    rows: Sequence[Mapping],
    times: str,
    leaks: Sequence[str] = (),
    prompt: str = f"Some context.{QUESTION_CUE}Your question?{ANSWER_CUE}",
    references: Sequence[tuple[str, Mapping]] = (),
) -> None:
    """Write README.md into generator/, retriever/ and index/ of an output folder, and the picture of the curves.

    Args:
        settings: the run's settings, flat. rows: those of metrics.jsonl, a row of kind "run" and an examination among them.
        prompt: what the generator reads, with "Some context." and "Your question?".
        times: Markdown table of seconds. leaks: paragraphs of a leak audit; none, no section. references: (name, summary)
        of what the pair is to be compared with, such as BM25 alone or the gold context.
    """
    evaluated = [row for row in rows if row["kind"] == "evaluation"]
    run = [row for row in rows if row["kind"] == "run"][-1]
    seconds = sum(row["seconds"] for row in rows if row["kind"] == "time")
    facts = {
        "questions": _public(settings["questions"]),
        "data": _data_lines(settings, run),
        "results": results_table([*references, *((_round_name(row), row) for row in evaluated)]),
        "leaks": "\n\n".join(leaks),
        "prompt": json.dumps(prompt, ensure_ascii=False),
        "adapter": ADAPTER_NOTE if settings["lora_rank"] else "",
        "times": times,
        "machine": machine_sentence(run["machine"]),
        "precision": f"{told(run['precision']['name'])}, {run['precision']['reason']}" if "precision" in run else "",
        "energy": energy_sentence(run["machine"], seconds),
        "versions": ", ".join(f"{name} {version}" for name, version in run["machine"]["versions"].items()),
        "settings": _settings_rows(settings),
    }
    drawn = draw_curves(rows, folder / "generator" / PICTURE)
    if drawn:
        shutil.copyfile(folder / "generator" / PICTURE, folder / "retriever" / PICTURE)
    for role in ("generator", "retriever"):
        base = _base(role, settings)
        data = _model_data(role, settings, base, evaluated[-1])
        own = facts | {"picture": PICTURE if drawn else "", "base": _public(base)}
        template = shipped_folder("model_cards") / f"{role}.md"
        ModelCard.from_template(data, template_path=str(template), **own).save(folder / role / CARD)
    template = shipped_folder("model_cards") / "index.md"
    own = facts | {"passages": run["passages"], "fingerprint": made_by(folder / "index")}
    DatasetCard.from_template(_index_data(settings, run), template_path=str(template), **own).save(
        folder / "index" / CARD
    )


# ---- what stands at the head of a card


def _base(role: str, settings: Mapping) -> str:
    if role == "generator":
        return hub_name(settings[role])
    return MINILM if settings[role] == "embedded" else settings[role]


def _model_data(role: str, settings: Mapping, base: str, summary: Mapping) -> ModelCardData:
    on_hub = base.count("/") <= 1 and not Path(base).exists() and base not in ("embedded", "scratch")
    return ModelCardData(
        language=_language(settings),
        license=settings["model_license"] or LICENCES.get((role, base)),
        library_name="transformers" if role == "generator" else "sentence-transformers",
        pipeline_tag="text-generation" if role == "generator" else "sentence-similarity",
        tags=["cozyrag", "rag", "retrieval-augmented-generation", "generated_from_trainer"],
        datasets=_hub_datasets(settings) or None,
        metrics=list(INDEXED[role].values()) if role == "generator" else None,
        base_model=base if on_hub else None,
        base_model_relation=("adapter" if role == "generator" and settings["lora_rank"] else "finetune")
        if on_hub
        else None,
        model_name=f"CoZyRAG {role}",
        eval_results=_eval_results(role, settings, summary),
    )


def _index_data(settings: Mapping, run: Mapping) -> DatasetCardData:
    return DatasetCardData(
        language=_language(settings),
        license=_data_licence(settings),
        pretty_name="CoZyRAG passages and vectors",
        tags=["cozyrag", "rag", "faiss", "embeddings"],
        task_categories=["question-answering"],
        size_categories=next((name for limit, name in SIZES if run["passages"] < limit), "10M<n<100M"),
        configs=[{"config_name": "default", "data_files": "passages.parquet"}],
    )


def _language(settings: Mapping) -> str | None:
    return "en" if settings["questions"] == "quickstart" else None


def _data_licence(settings: Mapping) -> str | None:
    return settings["data_license"] or (QUICKSTART_LICENCE if settings["questions"] == "quickstart" else None)


def _hub_datasets(settings: Mapping) -> list[str]:
    """Those of the data that are on the Hub, by their ids."""
    given = dict.fromkeys(settings[name] for name in ("questions", "eval_questions", "passages"))
    return [name for name in given if name and _is_hub_dataset(name)]


def _is_hub_dataset(name: str) -> bool:
    return (
        bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name))
        and Path(name).suffix not in TABLE_FILES
        and not Path(name).exists()
    )


def _eval_results(role: str, settings: Mapping, summary: Mapping) -> list[EvalResult]:
    """The model-index entries of one role, with the 95 % intervals where there are any."""
    source = settings["eval_questions"] or settings["questions"]
    known = {name: summary[f"{name}_interval"] for name in INDEXED[role] if f"{name}_interval" in summary}
    return [
        EvalResult(
            task_type="question-answering" if role == "generator" else "sentence-similarity",
            dataset_type=source if _is_hub_dataset(source) else "custom",
            dataset_name=f"{summary['questions']} questions of {_public(source)}",
            metric_type=kind,
            metric_value=summary[name],
            metric_args={"interval_95": known[name]} if name in known else None,
        )
        for name, kind in INDEXED[role].items()
    ]


# ---- what stands in it


def results_table(summaries: Sequence[tuple[str, Mapping]]) -> str:
    """A Markdown table, a line for each (name, summary) in percent, with the 95 % intervals that the summaries carry."""
    shown = [name for name in COLUMNS if all(name in summary for _, summary in summaries)]
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in shown) + " |", "|---|" + "---:|" * len(shown)]
    for name, summary in summaries:
        lines.append(f"| {name} | " + " | ".join(_cell(summary, metric) for metric in shown) + " |")
    return (
        "\n".join(lines)
        + f"\n\nPercent of {summaries[-1][1]['questions']} questions; in brackets 95 % intervals (bootstrap)."
    )


def _cell(summary: Mapping, metric: str) -> str:
    ends = summary.get(f"{metric}_interval")
    return f"{summary[metric]:.1f}" + (f" ({ends[0]:.1f} to {ends[1]:.1f})" if ends else "")


def _round_name(row: Mapping) -> str:
    return "before" if row["round"] == 0 else f"after round {row['round']}"


def _data_lines(settings: Mapping, run: Mapping) -> str:
    """What was trained on, examined with and searched, and under which licence it comes."""
    asked = settings["eval_questions"]
    held = (
        f"of `{_public(asked)}`"
        if asked and asked != "quickstart"
        else f"held out from `{_public(settings['questions'])}`"
    )
    if settings["questions"] == "quickstart":
        held = "of the set's own validation part"
    source = settings["passages"]
    found = f"of `{_public(source)}`" if source and source != "quickstart" else "that come with the questions"
    licence = _data_licence(settings)
    return (
        f"- Trained on {run['questions']} questions of `{_public(settings['questions'])}`.\n"
        f"- Examined with {run['eval_questions']} questions {held}.\n"
        f"- Answers come from {run['passages']} passages {found}.\n"
        f"- Licence of questions and passages: {licence or 'not stated by who trained this; ask before you use them'}."
    )


def public_settings(settings: Mapping) -> dict:
    """Settings to be shown: those that are set, without where the run lay and went to, and what was measured for them."""
    return {
        name: _public(value)
        for name, value in settings.items()
        if value is not None and not name.startswith("hub_") and name not in ("output_dir", MEASURED)
    }


def _settings_rows(settings: Mapping) -> str:
    """Lines of the settings table."""
    return "\n".join(f"| {name} | {value} |" for name, value in public_settings(settings).items())


def _public(value: object) -> object:
    """Names of local files without the folders they lie in, which are nobody's business."""
    is_file = isinstance(value, str) and value and (Path(value).exists() or Path(value).suffix in TABLE_FILES)
    return Path(value).name if is_file else value


# ---- on the Hub


def card_for_hub(source: Path | None, role: str, repo_id: str) -> str:
    """The card of a piece as it goes up: names on the Hub instead of FOLDER, and the tag that marks it as of a pair.

    Args:
        source: the card in the output folder, perhaps edited since; None: there is none, and a short one is made.
    """
    text = (
        source.read_text(encoding="utf-8") if source else f"---\n{{}}\n---\n# CoZyRAG {role}\n\nA piece of `FOLDER`.\n"
    )
    for old, new in _names_on_hub(repo_id):
        text = text.replace(old, new)
    card = (DatasetCard if role == "index" else ModelCard)(text)
    added = {"tags": "cozyrag"} | ({"datasets": f"{repo_id}-index"} if role == "generator" else {})
    for name, value in added.items():
        card.data[name] = list(dict.fromkeys([*(card.data.get(name) or []), value]))
    return str(card)


def _names_on_hub(repo_id: str) -> list[tuple[str, str]]:
    """What stands in a card for the output folder, and what stands there on the Hub; longer ones first."""
    whole, retriever, index = repo_id, f"{repo_id}-retriever", f"{repo_id}-index"
    fetched = f'from huggingface_hub import snapshot_download\n\nfolder = Path(snapshot_download("{index}", repo_type="dataset"))'
    return [
        (FOLDER_NOTE, ""),
        ('folder = Path("FOLDER/index")', fetched),
        ("`FOLDER/generator`", _link(whole)),
        ("`FOLDER/retriever`", _link(retriever)),
        ("`FOLDER/index`", _link(f"datasets/{index}")),
        ("`FOLDER`", _link(whole)),
        ('"FOLDER/generator"', f'"{whole}"'),
        ('"FOLDER/retriever"', f'"{retriever}"'),
        ('"FOLDER/index"', f'"{index}"'),
        ('"FOLDER"', f'"{whole}"'),
    ]


def _link(name: str) -> str:
    return f"[{name.removeprefix('datasets/')}](https://huggingface.co/{name})"
