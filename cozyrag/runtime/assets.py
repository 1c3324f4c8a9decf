"""Where the things that come with the package lie: quickstart set, small generator, templates, launch settings, metrics.

The set makes the first run independent of the network. Left out: reading them, which the ordinary readers do.
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
QUICKSTART_EMBEDDED = QUICKSTART_FOLDER / "settings-embedded.yaml"  # over the former, for the small generator
PAGES_FOLDER = _PACKAGE / "assets" / "pages"


def shipped_folder(name: str) -> Path:
    """`model_cards`, `accelerate_configs` or `metric_modules`: inside an installed package, or beside it in a checkout."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def metric_module(name: str) -> str:
    """The path that `evaluate.load` takes for `cozyrag_qa` or `cozyrag_retrieval`."""
    return str(shipped_folder("metric_modules") / name)
