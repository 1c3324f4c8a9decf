"""Cards of the repositories of a pair: facts of a run, filled into the templates of model_cards/.

A card states what its own model does by itself, on what it was measured, and with which settings; what only the pair
does is called the pair's. It is written for the output folder and names its pieces FOLDER/...; a push replaces these
names with those on the Hub and keeps the edits of the card's owner. Left out: judging the facts.
"""

import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from cozyrag.evaluation.evaluation import DENSE_INDEXED, RETRIEVAL, few_questions
from cozyrag.evaluation.overlap_audit import audit_list, audit_table
from cozyrag.hub.card_plot import draw_curves
from cozyrag.models.smollm2 import BASE as SMOLLM2
from cozyrag.models.smollm2 import hub_name
from cozyrag.pair_file import MODELS
from cozyrag.retrieval.hybrid import RESULT_OF
from cozyrag.retrieval.index_file import LANCEDB, made_by, precision_of, read_facts
from cozyrag.runtime.assets import shipped_folder
from cozyrag.runtime.atomic_files import write_text
from cozyrag.runtime.contents import read_object
from cozyrag.runtime.hardware import energy_sentence, machine_sentence
from cozyrag.runtime.precision import MEASURED, display_name

CARD = "README.md"
ADAPTER_NOTE = ", a LoRA adapter of its base (needs `peft`; `cozyrag merge` makes one model of the two)"
PICTURE = "training.png"
FOLDER_NOTE = "FOLDER is the output folder of the run.\n"
EMBEDDED = "embedded"  # as a base: the small generator; the embedded retriever has the name MINILM
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
# of base models; a model from another base gets no licence unless one is given
LICENCES = {
    ("retriever", MINILM): "apache-2.0",
    ("reranker", MINILM): "apache-2.0",
    ("reranker", "cross-encoder/ms-marco-MiniLM-L6-v2"): "apache-2.0",
    ("generator", EMBEDDED): "cc-by-sa-4.0",
    ("generator", SMOLLM2): "apache-2.0",
    ("generator", "distilgpt2"): "apache-2.0",
    ("generator", "distilbert/distilgpt2"): "apache-2.0",
    ("generator", "gpt2"): "mit",
    ("generator", "openai-community/gpt2"): "mit",
}
QUICKSTART_LICENCE = "apache-2.0"
TABLE_FILES = {".tsv", ".csv", ".txt", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".gz", ".bz2"}
# the scores of each model by itself: of the generator from the contexts it is given, of the retriever by its vectors
COLUMNS = {
    "generator": ("em", "f1", "answer_in_context"),
    "retriever": tuple(f"dense_{name}" for name in RETRIEVAL),
    "reranker": ("reranked_recall@1", "reranked_recall@5", "reranked_mrr@10"),
}
TASKS = {"generator": "text-generation", "retriever": "sentence-similarity", "reranker": "text-ranking"}
# metric -> its name in the model index
INDEXED = {
    "generator": {"em": "exact_match", "f1": "f1"},
    "retriever": {name: name.removeprefix("dense_") for name in DENSE_INDEXED},
    "reranker": {},  # it only orders what the pair's search finds
}
MEASURED_WITH = {
    "generator": "contexts found by the pair's {} search",
    "retriever": "dense search, vectors alone",
    "reranker": "",  # it has no entry
}
PARTS_SHOWN = {"generator": ("em", "f1"), "retriever": DENSE_INDEXED[:2], "reranker": ()}  # in the leak audit
PAIR_SEARCHES = {
    "dense": "dense search, by the retriever's vectors alone,",
    "bm25": "sparse search, by words (BM25) alone,",
    "hybrid": "hybrid search, by the retriever's vectors and BM25 together,",
}
NAMELESS = "CoZyRAG {}"  # a model before it has a repository
SHARE_ALIKE = (
    "- Its base, the small generator of CoZyRAG, is under CC BY-SA 4.0, because it was trained on Wikipedia and SQuAD "
    "1.1. Weights made from it must name this source and stay under the same licence."
)
UNSTATED = "not stated by who trained this; ask before you use"
QUOTED = 600  # characters of a passage that a card quotes
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10**7, "1M<n<10M"))


@dataclass(frozen=True)
class Example:
    """A validation question of the run with the answer that the pair gave, which is correct.

    passage: title and text of its gold passage, if the vectors alone place it first.
    """

    question: str
    context: str
    answer: str
    certainty: float
    passage: tuple[str, str] | None = None

    @classmethod
    def of(cls, rows: Sequence[Mapping], gold: Callable[[str], tuple[str, str] | None]) -> "Example | None":
        """The most certain correct answer among evaluated rows; preferred are those whose passage the vectors find.

        Args:
            gold: the id of a question -> title and text of its gold passage, if it is known.
        """
        correct = [
            row for row in rows if row["verdict"] == "correct" and row["prediction"] and row["answer_in_context"]
        ]
        best = max(correct, key=lambda row: (row.get("dense_recall@1", 0), row.get("score", 0)), default=None)
        if best is None:
            return None
        passage = gold(best["id"]) if best.get("dense_recall@1") else None
        return cls(best["question"], best["context"], best["prediction"], best.get("score", 0.0), passage)

    def quoted(self, role: str) -> str:
        """The example as a fenced block of text: what a reader may type in, and what comes of it."""
        lines = [f"question  {self.question}"]
        if role == "generator":
            lines += [f"context   {line}" for line in self.context.split("\n")]
            lines += [f"answer    {self.answer}", f"certainty {self.certainty:.2f}"]
        elif self.passage:
            title, text = self.passage
            lines += [f"passage   {title}", " " * 10 + textwrap.shorten(text, QUOTED, placeholder=" ...")]
        text = "\n".join(textwrap.fill(line, 96, subsequent_indent=" " * 10) for line in lines)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        return f"{fence}text\n{text}\n{fence}"


def write_cards(
    folder: Path,
    *,
    settings: Mapping,
    defaults: Mapping,
    rows: Sequence[Mapping],
    times: str,
    prompt: str,
    audit: Mapping | None = None,
    example: Example | None = None,
) -> None:
    """Write README.md into the folder of each piece of an output folder, and the plots of the training.

    Args:
        settings: the run's settings, flat. defaults: their default values. rows: metrics.jsonl, with a row of kind
            "run" and an evaluation. times: Markdown table of seconds. prompt: the generator's input for "Some
            context." and "Your question?". audit: of overlap_audit.py; without it, the cards have no such section.
    """
    run = [row for row in rows if row["kind"] == "run"][-1]
    facts = _facts(settings, defaults, rows, run) | {"prompt": json.dumps(prompt, ensure_ascii=False), "times": times}
    templates, prompts = shipped_folder("model_cards"), _retriever_prompts(folder / "retriever")
    for role in (each for each in MODELS if settings.get(each)):
        base = _base(role, settings)
        evaluated = [row for row in rows if row["kind"] == "evaluation" and COLUMNS[role][0] in row]
        own: dict[str, Any] = facts | {
            "base": "embedded, the small GPT-2 of CoZyRAG" if base == EMBEDDED else _public(base),
            "prompts": prompts,
            "picture": PICTURE if draw_curves(rows, folder / role / PICTURE, role) else "",
            "results": results_table([(_round_name(row["round"]), row) for row in evaluated], COLUMNS[role]),
            "vectors": _vectors(folder / "index"),
            "leaks": _leaks(audit, role),
            "example": example.quoted(role) if example and (role == "generator" or example.passage) else "",
            "depth": settings["rerank_passages"],
            "before": _search_before(rows, settings["retrieval"]),
            "question": json.dumps(example.question if example else "Your question?", ensure_ascii=False),
            "licences": _licences(role, settings, base),
        }
        data = _model_data(role, settings, base, evaluated[-1:])
        card = ModelCard.from_template(data, template_path=str(templates / f"{role}.md"), **own)
        write_text(folder / role / CARD, str(card))
    _write_index_card(folder / "index", templates, settings, run, facts)


def _write_index_card(folder: Path, templates: Path, settings: Mapping, run: Mapping, facts: Mapping) -> None:
    database = read_facts(folder).get("database")
    own = {**facts, "fingerprint": str(made_by(folder)), "licences": _licences("index", settings, "")}
    card = DatasetCard.from_template(
        _index_data(settings, run, in_files=database is None),
        template_path=str(templates / ("index.md" if database is None else "database.md")),
        **own | {"database": database},
    )
    write_text(folder / CARD, str(card))


def write_writer_card(
    folder: Path, *, settings: Mapping, shown: Sequence[str], rows: Sequence[Mapping], taught: Mapping
) -> None:
    """Write README.md into the folder of a question writer.

    Args:
        settings: of its training, flat. shown: those that the card lists. rows: metrics.jsonl, with a row of kind
            "run". taught: number of `rows`, of `held` rows and of `steps`, and the losses `before` and `after`, by the
            kind of row.
    """
    run, base = [row for row in rows if row["kind"] == "run"][-1], _base("generator", settings)
    lines = [f"| {kind} | {before:.3f} | {taught['after'][kind]:.3f} |" for kind, before in taught["before"].items()]
    own: dict[str, Any] = _machine_facts(rows, run) | {
        "base": "embedded, the small GPT-2 of CoZyRAG" if base == EMBEDDED else _public(base),
        "questions": _public_names(settings["questions"]),
        "licences": _licences("generator", settings, base),
        "losses": "\n".join(["| rows | before | after |", "|---|---:|---:|", *lines]),
        "settings": "\n".join(
            f"| {name} | {value} |" for name, value in public_settings(settings).items() if name in shown
        ),
        **{name: f"{taught[name]:,}" for name in ("rows", "held", "steps")},
    }
    template = shipped_folder("model_cards") / "question_writer.md"
    data = _model_data("generator", settings, base, [])
    data.tags, data.metrics = ["cozyrag", "question-generation", "generated_from_trainer"], None
    write_text(folder / CARD, str(ModelCard.from_template(data, template_path=str(template), **own)))


def _machine_facts(rows: Sequence[Mapping], run: Mapping) -> dict[str, str]:
    """On what, how precisely and with which versions a model was trained."""
    machine, precision = run["machine"], run.get("precision")
    return {
        "machine": machine_sentence(machine),
        "precision": f"{display_name(precision['name'])}, {precision['reason']}" if precision else "",
        "energy": energy_sentence(machine, sum(row["seconds"] for row in rows if row["kind"] == "time")),
        "versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
    }


def _facts(settings: Mapping, defaults: Mapping, rows: Sequence[Mapping], run: Mapping) -> dict[str, str]:
    """What the cards of the models say."""
    last = [row for row in rows if row["kind"] == "evaluation"][-1]
    shown = public_settings(settings)
    changed = {name: value for name, value in shown.items() if settings[name] != defaults.get(name)}
    kept = {name: value for name, value in shown.items() if name not in changed}
    return {
        "questions": _public_names(settings["questions"]),
        "passages": f"{run['passages']:,}",
        "data": _data_lines(settings, run),
        "pair": pair_sentence(last, settings["retrieval"], reranked=bool(settings.get("reranker"))),
        "reranked": "yes" if settings.get("reranker") else "",
        "mode": settings["retrieval"],
        "few": few_questions(last["questions"]),
        "adapter": ADAPTER_NOTE if settings["lora_rank"] else "",
        "changed": "\n".join(f"| {name} | {value} |" for name, value in changed.items()),
        "kept": "\n".join(f"| {name} | {value} |" for name, value in kept.items()),
    } | _machine_facts(rows, run)


# ---- the metadata of a card


def _base(role: str, settings: Mapping) -> str:
    """The base model, by its name on the Hub if it has one."""
    if role == "generator":
        return hub_name(settings[role])
    return MINILM if settings[role] == EMBEDDED else settings[role]


def _model_data(role: str, settings: Mapping, base: str, measured: Sequence[Mapping]) -> ModelCardData:
    """The metadata of a model; `measured`: the last evaluation that measured it, if any did."""
    generator = role == "generator"
    on_hub = base.count("/") <= 1 and not Path(base).exists() and base not in ("embedded", "scratch")
    relation = "adapter" if generator and settings["lora_rank"] else "finetune"
    return ModelCardData(
        language=_language(settings),
        license=_model_licence(role, settings, base),
        library_name="transformers" if generator else "sentence-transformers",
        pipeline_tag=TASKS[role],
        tags=["cozyrag", "rag", "retrieval-augmented-generation", "generated_from_trainer"],
        datasets=_hub_datasets(settings) or None,
        metrics=list(INDEXED[role].values()) if generator else None,
        base_model=base if on_hub else None,
        base_model_relation=relation if on_hub else None,
        model_name=NAMELESS.format(role) if measured else None,
        eval_results=[each for summary in measured for each in _eval_results(role, settings, summary)] or None,
    )


def _index_data(settings: Mapping, run: Mapping, *, in_files: bool) -> DatasetCardData:
    """`in_files`: whether the repository has the passages."""
    return DatasetCardData(
        language=_language(settings),
        license=_data_licence(settings),
        pretty_name="CoZyRAG passages and vectors",
        tags=["cozyrag", "rag", "faiss" if in_files else "lancedb", "embeddings"],
        task_categories=["question-answering"],
        size_categories=next((name for limit, name in SIZES if run["passages"] < limit), "10M<n<100M"),
        configs=[{"config_name": "default", "data_files": "passages.parquet"}] if in_files else None,
    )


def _language(settings: Mapping) -> str | None:
    return "en" if settings["questions"] == "quickstart" else None


def _model_licence(role: str, settings: Mapping, base: str) -> str | None:
    return settings["model_license"] or LICENCES.get((role, base))


def _data_licence(settings: Mapping) -> str | None:
    return settings["data_license"] or (QUICKSTART_LICENCE if settings["questions"] == "quickstart" else None)


def _hub_datasets(settings: Mapping) -> list[str]:
    """The ids of the data that come from the Hub."""
    given = dict.fromkeys(
        each for name in ("questions", "eval_questions", "passages") for each in _each(settings[name])
    )
    return [name for name in given if _is_hub_dataset(name)]


def _each(given: str | Sequence[str] | None) -> Sequence[str]:
    """The files or ids of a setting that takes one or several."""
    return [given] if isinstance(given, str) else given or []


def _is_hub_dataset(name: str) -> bool:
    path = Path(name)
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and path.suffix not in TABLE_FILES and not path.exists()


def _eval_results(role: str, settings: Mapping, summary: Mapping) -> list[EvalResult]:
    """The entries of the model index, with the 95 % intervals that the summary carries."""
    source = settings["eval_questions"] or settings["questions"]
    ends = {name: summary.get(f"{name}_interval") for name in INDEXED[role]}
    how = MEASURED_WITH[role].format(settings["retrieval"])
    return [
        EvalResult(
            task_type="question-answering" if role == "generator" else "information-retrieval",
            dataset_type=source if isinstance(source, str) and _is_hub_dataset(source) else "custom",
            dataset_name=f"{summary['questions']} questions of {_public_names(source)}",
            metric_type=kind,
            metric_name=f"{kind.replace('_', ' ')} ({how})",
            metric_value=summary[name],
            metric_args={"interval_95": ends[name]} if ends[name] else None,
        )
        for name, kind in INDEXED[role].items()
    ]


# ---- the text of a card


def results_table(summaries: Sequence[tuple[str, Mapping]], columns: Sequence[str]) -> str:
    """A Markdown table with a row for each (name, summary), in percent, with the 95 % intervals that they carry.

    "" without a summary.
    """
    if not summaries:
        return ""
    shown = [name for name in columns if all(name in summary for _, summary in summaries)]
    heads = [name.removeprefix("dense_").removeprefix("reranked_").replace("_", " ") for name in shown]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(shown)]
    lines += [
        f"| {name} | " + " | ".join(_cell(summary, metric) for metric in shown) + " |" for name, summary in summaries
    ]
    count = summaries[-1][1]["questions"]
    return "\n".join(lines) + f"\n\nPercent of {count} questions; in brackets 95 % intervals (bootstrap)."


def _cell(summary: Mapping, metric: str) -> str:
    ends = summary.get(f"{metric}_interval")
    return f"{summary[metric]:.1f}" + (f" ({ends[0]:.1f} to {ends[1]:.1f})" if ends else "")


def pair_sentence(summary: Mapping, mode: str, *, reranked: bool = False) -> str:
    """What the pair finds with its own search, named as the pair's."""
    search = f"{PAIR_SEARCHES[mode]}{' ordered again by its reranker,' if reranked else ''}"
    return (
        f"The pair's {search} finds the passage with the answer first for {summary['recall@1']:.1f} % of "
        f"the questions, and among the first five for {summary['recall@5']:.1f} %."
    )


def _search_before(rows: Sequence[Mapping], mode: str) -> str:
    """Where the pair's search places the right passage before the reranker, in a phrase; "" if not measured."""
    last = [row for row in rows if row["kind"] == "evaluation"][-1]
    search = RESULT_OF[mode]
    if f"{search}_recall@1" not in last:
        return ""
    first, five = (last[f"{search}_recall@{depth}"] for depth in (1, 5))
    return f"first for {first:.1f} % of the questions and among the first five for {five:.1f} %"


def _vectors(index: Path) -> str:
    """How the vectors of the passages were computed and searched, since that may change the scores of the retriever."""
    factory = read_facts(index).get("factory", "Flat")
    how = "compared exactly" if factory in ("Flat", "Mapped") else f"searched approximately ({factory})"
    how = "searched in LanceDB" if factory == LANCEDB else how
    return f"vectors computed in {precision_of(index)} and {how}"


def _leaks(audit: Mapping | None, role: str) -> str:
    """The leak audit, with the scores of this model on each part of the questions."""
    if audit is None:
        return ""
    shown = [name for name in PARTS_SHOWN[role] if all(name in each for each in audit.get("parts", {}).values())]
    parts = [audit_list(audit, role)] + ([audit_table(audit["parts"], shown)] if "parts" in audit and shown else [])
    return "\n\n".join(parts)


def _licences(role: str, settings: Mapping, base: str) -> str:
    """The licences of what a repository holds."""
    data = f"- Questions and passages: {_data_licence(settings) or f'{UNSTATED} them'}."
    if role == "index":
        return data
    model = f"- This model: {_model_licence(role, settings, base) or f'{UNSTATED} it'}."
    alike = [SHARE_ALIKE] if base == EMBEDDED else []
    return "\n".join([model, *alike, data, "- The program CoZyRAG: apache-2.0."])


def _retriever_prompts(folder: Path) -> dict[str, str]:
    """The prompts that were saved with a retriever, as JSON strings; empty if it has none."""
    path = folder / "config_sentence_transformers.json"
    saved = read_object(path, "Copy the pair's folder again.").get("prompts", {}) if path.exists() else {}
    kinds = {kind: saved.get(kind) or "" for kind in ("query", "document")}
    return {kind: json.dumps(text, ensure_ascii=False) for kind, text in kinds.items()} if any(kinds.values()) else {}


def _round_name(number: int) -> str:
    return f"after round {number}" if number else "untuned baseline"


def _data_lines(settings: Mapping, run: Mapping) -> str:
    """What the pair was trained and evaluated on, and what it searches."""
    questions, held, source = (settings[name] for name in ("questions", "eval_questions", "passages"))
    if held and held != "quickstart":
        evaluated = f"of `{_public_names(held)}`"
    elif questions == "quickstart":
        evaluated = "of the set's own validation part"
    else:
        evaluated = f"held out from `{_public_names(questions)}`"
    found = f"of `{_public_names(source)}`" if source and source != "quickstart" else "that come with the questions"
    made = synthetic_sentence(run)
    return (
        f"- Trained on {run['questions']} questions of `{_public_names(questions)}`.\n"
        + (f"- {made}\n" if made else "")
        + f"- Evaluated on {run['eval_questions']} questions {evaluated}.\n"
        f"- Answers come from {run['passages']} passages {found}."
    )


def synthetic_sentence(run: Mapping) -> str:
    """Who made the questions of a run, and how many were rejected; "" if they were not made."""
    made = run.get("synthetic")
    if not made:
        return ""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in made["rejected"].items())
    return (
        f"These questions are synthetic: a language model (`{_public(made['writer'])}`) wrote {made['written']:,} from "
        f"{made['passages']:,} passages, and {made['written'] - made['kept']:,} were rejected by automatic checks "
        f"({reasons or 'none'}). No person has read them, and scores on them are not scores on people's questions."
    )


def public_settings(settings: Mapping) -> dict:
    """The settings that are set, without names of folders, of the repository, and what was measured for them."""
    return {
        name: _public(value)
        for name, value in settings.items()
        if value is not None and not name.startswith("hub_") and name not in ("output_dir", MEASURED)
    }


def _public(value):
    """A setting, with local files by their names only: their folders are private."""
    if isinstance(value, list):
        return [_public(each) for each in value]
    if isinstance(value, str) and value:
        pattern = "/" in value and has_magic(value)
        if pattern or Path(value).exists() or Path(value).suffix in TABLE_FILES:
            return Path(value).name
    return value


def _public_names(given: str | Sequence[str]) -> str:
    """The files or ids of a setting that takes one or several, in words."""
    return ", ".join(_public(each) for each in _each(given))


# ---- on the Hub


def card_for_hub(source: Path | None, role: str, repo_id: str) -> str:
    """The card of a piece for the Hub: with names on the Hub instead of FOLDER, and the tag of a pair.

    Args:
        source: the card in the output folder, perhaps edited since; None: a short one is made.
    """
    text = source.read_text(encoding="utf-8") if source else f"---\n{{}}\n---\n# CoZyRAG {role}\n\nPart of `FOLDER`.\n"
    for old, new in _names_on_hub(repo_id):
        text = text.replace(old, new)
    card = (DatasetCard if role == "index" else ModelCard)(text)
    if role != "index" and card.data.get("model_name") == NAMELESS.format(role):
        card.data["model_name"] = repo_id.split("/")[-1] + ("" if role == "generator" else f"-{role}")
    added = {"tags": "cozyrag"} | ({"datasets": f"{repo_id}-index"} if role == "generator" else {})
    for name, value in added.items():
        card.data[name] = list(dict.fromkeys([*(card.data.get(name) or []), value]))
    return str(card)


def _names_on_hub(repo_id: str) -> list[tuple[str, str]]:
    """(text in a card of the output folder, text on the Hub); longer ones first."""
    retriever, reranker, index = (f"{repo_id}-{role}" for role in ("retriever", "reranker", "index"))
    fetched = f'folder = Path(snapshot_download("{index}", repo_type="dataset"))'
    names = {"/generator": repo_id, "/retriever": retriever, "/reranker": reranker, "/index": index, "": repo_id}
    return [
        (FOLDER_NOTE, ""),
        ('folder = Path("FOLDER/index")', f"from huggingface_hub import snapshot_download\n\n{fetched}"),
        *((f"`FOLDER{end}`", _link(name, dataset=end == "/index")) for end, name in names.items()),
        *((f'"FOLDER{end}"', f'"{name}"') for end, name in names.items()),
    ]


def _link(name: str, *, dataset: bool) -> str:
    return f"[{name}](https://huggingface.co/{'datasets/' if dataset else ''}{name})"
