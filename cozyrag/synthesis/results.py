"""What is written of made questions: the files to train on, the rejected ones, a summary, and a page to look at.

Left out: making them (making.py), the texts of the page (assets/pages/questions.html).
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cozyrag import __version__
from cozyrag.data.rows import printable
from cozyrag.reporting.templates import render, stylesheet
from cozyrag.runtime.atomic_files import replacing_file, write_text
from cozyrag.runtime.json_lines import json_line, open_for_lines
from cozyrag.synthesis.checks import REASONS
from cozyrag.synthesis.making import Made, Pair
from cozyrag.synthesis.request import Places

SHOWN = 20  # pairs of each kind on the page


def facts_of(made: Made, *, writer: str, reader: str, settings: dict) -> dict:
    """The numbers of the summary, which the model card quotes."""
    held = [pair for pair in made.kept if pair.row in made.validation]
    return {
        "writer": writer,
        "reader": reader,
        "passages": len(made.passages),
        "written": made.written,
        "kept": len(made.kept),
        "training": len(made.kept) - len(held),
        "validation": len(held),
        "rejected": _in_order(made.rejected),
        "not_asked": _in_order(made.not_asked),
        "settings": settings,
    }


def _in_order(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: counts[reason] for reason in REASONS if counts[reason]}


def write_results(made: Made, places: Places, facts: dict) -> None:
    """Write all files; the training file comes last, so that it stands for the whole."""
    kept = made.kept
    rejected = [pair for pair in made.pairs if pair.fault]
    _write_lines(places.rejected, (_row(made, pair) | {"reason": pair.fault} for pair in rejected))
    write_text(places.page, page(made, facts))
    write_text(places.summary, printable(json.dumps(facts, indent=2, ensure_ascii=False) + "\n"))
    _write_lines(places.validation, (_row(made, pair) for pair in kept if pair.row in made.validation))
    _write_lines(places.training, (_row(made, pair) for pair in kept if pair.row not in made.validation))


def _row(made: Made, pair: Pair) -> dict:
    """A row as train.py reads it, which ignores what else stands in it."""
    passage = made.passages[pair.row]
    row = {
        "question": pair.draft.question,
        "answers": [pair.draft.answer],
        "passage_id": passage.id,
        "title": passage.title,
        "context": passage.text,
        "score": pair.score,
    }
    return row | ({"read": pair.reading.answer} if pair.reading else {})


def _write_lines(path: Path, rows: Iterable[dict]) -> None:
    with replacing_file(path) as beside, open_for_lines(beside, packed=path.name.lower().endswith(".gz")) as file:
        file.writelines(json_line(row) for row in rows)


def page(made: Made, facts: dict) -> str:
    """A page with kept and rejected pairs, some of each, drawn so that every page shows the same of the same."""
    rejected = [pair for pair in made.pairs if pair.fault]
    samples = {"kept": _drawn(made.kept), "rejected": _drawn([pair for pair in rejected if pair.asked])}
    rows = {kind: [(pair, made.passages[pair.row]) for pair in pairs] for kind, pairs in samples.items()}
    return render(
        "questions.html", facts=facts, rows=rows, reasons=REASONS, style=stylesheet("report.css"), version=__version__
    )


def _drawn(pairs: Sequence[Pair]) -> list[Pair]:
    places = random.Random(0).sample(range(len(pairs)), min(SHOWN, len(pairs)))
    return [pairs[place] for place in sorted(places)]


def lines_of(facts: dict) -> list[str]:
    """The summary for the terminal."""
    lines = [f"{facts['written']:,} pairs written about {facts['passages']:,} passages by {facts['writer']}."]
    lines += [f"  rejected {count:,}: {REASONS[reason]} ({reason})" for reason, count in facts["rejected"].items()]
    lines += [
        f"  not asked for {count:,} answers: {REASONS[reason]} ({reason})"
        for reason, count in facts["not_asked"].items()
    ]
    return [
        *lines,
        f"{facts['kept']:,} kept: {facts['training']:,} for training, {facts['validation']:,} for validation.",
    ]
