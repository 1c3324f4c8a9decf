"""The output of qa.py: one dictionary of numbers, its Markdown tables, and a line of JSON for each question.

None of them contains times, paths, or the number of processes. Left out: computing the scores (scoring.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.shared.pairs import UNTUNED, ReadingSettings
from benchmarks.shared.scoring import ANSWERS, TESTED, answer_metrics, paired_tests, test_table
from benchmarks.shared.suites import Task
from cozyrag.evaluation.overlap_audit import PARTS, audit, base_notes, brief, examples_alike, part_of
from cozyrag.evaluation.scoring import NAMES, score_table, scores_of, verdict_counts, verdict_table
from cozyrag.pair_evaluation import CLOSED, GOLD, MODEL, SEARCHED

BM25 = "BM25 + generator"
PART_METRICS = ("em", "f1", "recall@5")
KEPT = ("prediction", "em", "f1", "rouge_l", "recall@5", "mrr@10", "answer_in_context", "verdict")


def summarise(
    task: Task,
    systems: Mapping[str, Sequence[Mapping]],
    *,
    model: str,
    bases: tuple[str | None, str | None],
    reading: ReadingSettings,
    weights: Mapping[str, dict | str],
) -> dict:
    """All results. They are the same for the same models and questions."""
    audited = audit_of(task, bases)
    return {
        "benchmark": "qa",
        "model": model,
        "trained_from": {"retriever": _name(bases[0]), "generator": _name(bases[1])},
        "task": task.name,
        "questions": len(task.questions),
        "gold_known": sum(key is not None for key in task.questions["passage_id"][:]),
        "passages": len(task.passages),
        "reading": asdict(reading),
        "weights": dict(weights),
        "scores": {name: scores_of(rows, metrics_of(name)) for name, rows in systems.items()},
        "tests": paired_tests(systems),
        "verdicts": {name: verdict_counts(rows) for name, rows in systems.items() if name != CLOSED},
        "audit": audited
        and {name: value for name, value in audited.items() if name != "overlaps"}
        | {"parts": {name: parts_of(audited, rows, name) for name, rows in systems.items()}},
        "published": list(task.published),
        "notes": task.notes,
    }


def metrics_of(system: str) -> tuple[str, ...]:
    """The metrics that have a meaning for a system: one without search is not scored by what it found."""
    answers = answer_metrics()
    return {CLOSED: answers[:-1], GOLD: answers}.get(system, (*answers, *SEARCHED))


def _name(base: str | None) -> str | None:
    return base and (Path(base).name if Path(base).exists() else base)


def audit_of(task: Task, bases: tuple[str | None, str | None]) -> dict | None:
    """The leak audit, if the training questions are known."""
    if task.train is None:
        return None
    texts = dict(zip(task.passages["id"][:], task.passages["text"][:], strict=True))
    notes = base_notes(bases[0] or "", bases[1] or "")
    return audit(task.train[:], task.questions[:], texts, bases=notes)


def parts_of(audited: Mapping, rows: Sequence[Mapping], system: str) -> dict[str, dict]:
    """Scores of one system for each part of the questions, by their overlap with training."""
    names = TESTED if system in (CLOSED, GOLD) else PART_METRICS
    parts: dict[str, list] = {part: [] for part in PARTS[1:]}
    for row in rows:
        parts[part_of(audited["overlaps"].get(row["id"], ()))].append(row)
    return {part: {"questions": len(own)} | scores_of(own, names) for part, own in parts.items() if own}


def write_questions(path: Path, task: Task, systems: Mapping[str, Sequence[Mapping]]) -> None:
    """Write a line for each question: its references, gold passage, and the prediction and scores of each system."""
    columns = task.questions[:]
    with path.open("w", encoding="utf-8") as file:
        for number, key in enumerate(columns["id"]):
            line = {name: columns[name][number] for name in ("id", "question", "answers", "passage_id")}
            line["context"] = systems[MODEL][number]["context"]
            line["verdict"] = systems[MODEL][number]["verdict"]
            line["systems"] = {
                name: {each: rows[number][each] for each in KEPT if each in rows[number]}
                for name, rows in systems.items()
            }
            assert systems[MODEL][number]["id"] == key
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def tables_of(results: Mapping) -> str:
    """The results as Markdown tables."""
    scores = results["scores"]
    found = {name: own for name, own in scores.items() if name not in (CLOSED, GOLD)}
    parts = [
        f"# {results['model']} on {results['task']}",
        f"{results['questions']} questions, {results['passages']} passages. Percent, with 95 % bootstrap intervals "
        "over the questions.",
        "Answers:\n\n" + score_table(scores, answer_metrics(), results["published"]) + _without(),
        "Retrieval:\n\n" + score_table(found, SEARCHED),
        f"Difference in points, its 95 % interval, and the share p of the resamples in which {MODEL} is not better "
        f"(paired bootstrap):\n\n{test_table(results['tests'], MODEL)}",
        "Verdicts, in percent of the questions:\n\n" + verdict_table(results["verdicts"]),
    ]
    if results["audit"]:
        parts.append(brief(results["audit"]) + _parts_table(results["audit"]["parts"]))
        alike = examples_alike(results["audit"])
        parts.append(f"Most similar questions:\n\n```\n{alike}\n```" if alike else "")
    reason = results["weights"].get(UNTUNED)
    parts.append(f"Not in the tables: {UNTUNED}, because {reason}." if isinstance(reason, str) else "")
    return "\n\n".join(part for part in [*parts, *results["notes"]] if part) + "\n"


def _without() -> str:
    missing = [name for name in ANSWERS if name not in answer_metrics()]
    needs = 'their packages are not installed (pip install "cozyrag[benchmarks]")'
    return f"\n\nWithout {' and '.join(NAMES[name] for name in missing)}: {needs}." if missing else ""


def _parts_table(parts: Mapping[str, Mapping]) -> str:
    lines = []
    for part in PARTS[1:]:
        own = {name: each[part] for name, each in parts.items() if part in each}
        if own:
            count = next(iter(own.values()))["questions"]
            lines.append(f"\n\n{part.capitalize()} in training, {count} questions:\n\n{score_table(own, PART_METRICS)}")
    return "".join(lines)
