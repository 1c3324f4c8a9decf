"""Names in the files of earlier versions, and their current names.

No other module knows an old name. Left out: reading the files (run_reader.py, checkpointing.py, config.py, ...).
"""

from pathlib import Path

EVALUATIONS = "evaluations"
OLD_EVALUATIONS = "examined"
SETTINGS = {
    "gate": "rollback",
    "query_side_only": "freeze_document_encoder",
    "resume_anyway": "allow_changed_settings",
    "max_bad_steps": "max_skipped_steps",
}
# Settings that named one column each; now all are in --columns.
COLUMNS = {f"{name}_column": name for name in ("question", "answer", "context", "title", "text", "id", "passage_id")}
DEFAULT_COLUMNS = {*(f"{name}={name}" for name in COLUMNS.values()), "answer=answers"}
VALUES = {"context_filter": {"both": "hybrid", "vectors": "dense", "overlap": "sparse"}}
PHASES = {"examine": "evaluation"}
_KINDS = {"examined": "evaluation", "gate": "rollback", "bad step": "skipped step"}
_PARTS = {"examine": "evaluation", "weigh searches": "fit fusion weights"}
_VERDICTS = {
    "right": "correct",
    "formatting only": "format mismatch",
    "kept silent": "abstained",
    "reader missed": "reader error",
    "filter dropped it": "context miss",
    "retrieval missed": "retrieval miss",
    "answered the unanswerable": "answered an unanswerable question",
}
_PROGRESS = {"bad_steps": "skipped_steps", "pieces": "micro_batches"}


def current_settings(settings: dict) -> dict:
    """Flat settings under the names and values of this version."""
    renamed = {SETTINGS.get(name, name): value for name, value in settings.items() if name not in COLUMNS}
    columns = [f"{COLUMNS[name]}={value}" for name, value in settings.items() if name in COLUMNS]
    if columns:
        renamed["columns"] = [each for each in columns if each not in DEFAULT_COLUMNS]
    return {name: current_value(name, value) for name, value in renamed.items()}


def current_value(name: str, value: object) -> object:
    """The value of a setting as this version calls it."""
    return VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value


def current_metrics(row: dict) -> dict:
    """A row of metrics.jsonl with the kinds and parts of this version."""
    renamed = {"kind": _KINDS.get(row["kind"], row["kind"])}
    if "part" in row:
        renamed["part"] = _PARTS.get(row["part"], row["part"])
    return row | renamed


def current_evaluation(row: dict) -> dict:
    """A row of an evaluation file with the verdicts of this version."""
    return row | {"verdict": _VERDICTS.get(row["verdict"], row["verdict"])} if "verdict" in row else row


def current_progress(saved: dict) -> dict:
    """progress.json of a checkpoint with the fields of this version."""
    saved = {_PROGRESS.get(name, name): value for name, value in saved.items()}
    for entry in saved.get("cuts", {}).values():
        if "pieces" in entry:
            entry["micro_batches"] = entry.pop("pieces")
    saved["phase"] = PHASES.get(saved["phase"], saved["phase"])
    saved["metrics"] = [current_metrics(row) for row in saved["metrics"]]
    saved["spent"] = {_PARTS.get(part, part): seconds for part, seconds in saved["spent"].items()}
    return saved


def evaluation_files(folder: Path) -> dict[int, Path]:
    """The file of each round's evaluation in an output folder, by round; empty if there is none."""
    found = [path for name in (OLD_EVALUATIONS, EVALUATIONS) for path in (folder / name).glob("round-*.jsonl")]
    return dict(sorted((int(path.stem.removeprefix("round-")), path) for path in found))
