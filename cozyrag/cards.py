"""Model cards: facts gathered by a run, put into the templates of model_cards/.

Left out: judging the facts. A card says what was measured, on what, with which settings, and nothing else.
"""

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from cozyrag.embedded import shipped_folder

PACKAGES = ("torch", "transformers", "sentence-transformers", "datasets", "accelerate", "faiss-cpu")
BASE_MODELS = {"retriever": {"embedded": "sentence-transformers/all-MiniLM-L6-v2"}, "generator": {}}


def write_card(folder: Path, *, role: str, settings: Mapping, results: str, summary: Mapping, times: str) -> None:
    """Write README.md for the checkpoint in `folder`; `role` is "generator" or "retriever".

    Args:
        settings: the run's settings, flat. results, times: Markdown tables of the run. summary: the last examination.
    """
    base = BASE_MODELS[role].get(settings[role], settings[role])
    is_hub_id = base.count("/") <= 1 and not Path(base).exists() and base not in ("embedded", "scratch")
    data = ModelCardData(
        language="en" if settings["questions"] == "quickstart" else None,
        license=None,
        library_name="transformers" if role == "generator" else "sentence-transformers",
        pipeline_tag="text-generation" if role == "generator" else "sentence-similarity",
        tags=["cozyrag", "rag", "retrieval-augmented-generation", "generated_from_trainer"],
        base_model=base if is_hub_id else None,
        model_name=f"CoZyRAG {role}",
        eval_results=_eval_results(role, settings, summary),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(shipped_folder("model_cards") / f"{role}.md"),
        base=_public(base),
        questions=Path(settings["questions"]).name,
        settings=_settings_rows(settings),
        results=results,
        times=times,
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
    )
    card.save(folder / "README.md")


def public_settings(settings: Mapping) -> dict:
    """Settings to be shown: those that are set, without where the run lay and went to."""
    return {
        name: _public(value)
        for name, value in settings.items()
        if value is not None and not name.startswith("hub_") and name != "output_dir"
    }


def _settings_rows(settings: Mapping) -> str:
    """Lines of the settings table."""
    return "\n".join(f"| {name} | {value} |" for name, value in public_settings(settings).items())


def _public(value: object) -> object:
    """Names of local files without the folders they lie in, which are nobody's business."""
    return Path(value).name if isinstance(value, str) and value and Path(value).exists() else value


def _eval_results(role: str, settings: Mapping, summary: Mapping) -> list[EvalResult]:
    """The model-index entries of one role."""
    names = (
        {"em": "exact_match", "f1": "f1"}
        if role == "generator"
        else {"recall@1": "recall@1", "recall@5": "recall@5", "mrr@10": "mrr@10"}
    )
    task = "question-answering" if role == "generator" else "sentence-similarity"
    asked = Path(settings["eval_questions"] or settings["questions"]).name
    return [
        EvalResult(
            task_type=task,
            dataset_type="custom",
            dataset_name=f"{summary['questions']} questions of {asked}",
            metric_type=kind,
            metric_value=summary[name],
        )
        for name, kind in names.items()
    ]
