"""Output folders of runs, as far as reports read them: settings, metrics.jsonl and evaluations, without models."""

import json
from pathlib import Path

import tiny

CORRECT, WRONG = "correct", "reader error"


def row(number: int, *, em: float, f1: float | None = None, **others) -> dict:
    """One evaluated question; its verdict follows from `em` unless it is given."""
    return {
        "id": f"q{number}",
        "question": f"Question {number}?",
        "answers": [f"answer {number}"],
        "prediction": f"answer {number}" if em else f"guess {number}",
        "em": float(em),
        "f1": float(em if f1 is None else f1),
        "recall@1": 0.0,
        "recall@5": 1.0,
        "recall@20": 1.0,
        "mrr@10": 0.5,
        "answer_in_context": 1.0,
        "context": f"Context of {number}.",
        "verdict": CORRECT if em else WRONG,
    } | others


METRICS = [
    {"kind": "time", "round": 0, "part": "index", "seconds": 30.0},
    {"kind": "step", "round": 1, "phase": "generator", "step": 1, "loss": 3.0, "steps_so_far": 1},
    {"kind": "step", "round": 1, "phase": "generator", "step": 2, "loss": 2.0, "steps_so_far": 2},
    {"kind": "step", "round": 1, "phase": "retriever", "step": 1, "loss": 0.5, "steps_so_far": 3},
    {"kind": "time", "round": 1, "part": "generator phase", "seconds": 60.0},
    {
        "kind": "rollback",
        "round": 1,
        "model": "generator",
        "metric": "f1",
        "kept": False,
        "before": 20.0,
        "after": 10.0,
        "interval": [-15.0, -5.0],
        "worse": 0.99,
    },
]


def write_run(folder: Path, rounds: list[list[dict]], *, metrics=METRICS, **settings) -> Path:
    """A folder with these evaluations; the first one is that of the untuned baseline."""
    (folder / "evaluations").mkdir(parents=True)
    for number, rows in enumerate(rounds):
        tiny.write_jsonl(folder / "evaluations" / f"round-{number:03d}.jsonl", rows)
    tiny.write_jsonl(folder / "metrics.jsonl", metrics)
    settings = {"questions": "qa.tsv", "generator": "gpt2", "retriever": "embedded", "seed": 1} | settings
    (folder / "settings.json").write_text(json.dumps(settings | {"output_dir": str(folder), "hub_model_id": None}))
    return folder
