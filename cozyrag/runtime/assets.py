"""Paths of the files in the package: quickstart set, small generator, page templates, launch configs, metric modules.

Left out: reading them, which the ordinary readers do.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
QUICKSTART_FOLDER = _PACKAGE / "assets" / "quickstart"
QUICKSTART = {
    "questions": str(QUICKSTART_FOLDER / "train.jsonl"),
    "eval_questions": str(QUICKSTART_FOLDER / "validation.jsonl"),
    "passages": str(QUICKSTART_FOLDER / "passages.jsonl"),
}
GENERATOR_FOLDER = _PACKAGE / "assets" / "generator"
QUICKSTART_SETTINGS = QUICKSTART_FOLDER / "settings.yaml"
QUICKSTART_EMBEDDED = QUICKSTART_FOLDER / "settings-embedded.yaml"  # overrides the former, for the small generator
PAGES_FOLDER = _PACKAGE / "assets" / "pages"


def shipped_folder(name: str) -> Path:
    """`model_cards`, `accelerate_configs` or `metric_modules`: in the installed package, or beside it in a checkout."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def metric_module(name: str) -> str:
    """The path of `cozyrag_qa` or `cozyrag_retrieval` for `evaluate.load`."""
    return str(shipped_folder("metric_modules") / name)
