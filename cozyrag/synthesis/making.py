"""Questions made from passages: written and read again, then checked and divided into training and validation.

Passages are taken in batches, and what was written and read of each is a file beside the output, so a run that was
stopped resumes with the next batch and ends with the same pairs. Checks ask no model: the same drafts can be checked
again in another way. Left out: writing and reading (writers.py, endpoint.py), the files (results.py).
"""

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cozyrag.runtime.atomic_files import write_jsonl
from cozyrag.runtime.fingerprints import tables_fingerprint
from cozyrag.runtime.json_lines import read_json_lines
from cozyrag.synthesis.checks import agreement, fault_of, ranks, repeated, score_of
from cozyrag.synthesis.drafts import Draft, Passage, Reader, Reading, Writer
from cozyrag.synthesis.request import Making

VERSION = 3  # of the content of a part: parts of another version are not used
LONG = 60  # seconds above which the expected time is told


@dataclass(frozen=True)
class Pair:
    """A draft with its passage's row and all that was found out. fault: a reason of checks.py; None: it is kept."""

    row: int
    draft: Draft
    reading: Reading | None = None
    fault: str | None = None
    score: float = 0.0

    @property
    def asked(self) -> bool:
        """Whether a writer was asked for the question; an answer that repeats the title is dropped before."""
        return bool(self.draft.question) or self.fault != "repeats_title"


@dataclass(frozen=True)
class Made:
    """All pairs, kept and rejected, in the order of the passages, and the rows of the passages for validation."""

    passages: Sequence[Passage]
    pairs: list[Pair]
    validation: frozenset[int]

    @property
    def kept(self) -> list[Pair]:
        """The pairs that passed every check."""
        return [pair for pair in self.pairs if pair.fault is None]

    @property
    def written(self) -> int:
        """How many pairs were written."""
        return sum(pair.asked for pair in self.pairs)

    @property
    def rejected(self) -> Counter[str]:
        """How many pairs that were written were rejected, by reason."""
        return Counter(pair.fault for pair in self.pairs if pair.fault and pair.asked)

    @property
    def not_asked(self) -> Counter[str]:
        """For how many answers no question was written, by reason."""
        return Counter(pair.fault for pair in self.pairs if pair.fault and not pair.asked)


def chosen(passages: Sequence[Passage], limit: int | None, seed: int) -> list[Passage]:
    """The passages, or a random sample of `limit` in their order, the same for the same seed."""
    if limit is None or limit >= len(passages):
        return list(passages)
    return [passages[row] for row in sorted(random.Random(seed).sample(range(len(passages)), limit))]


def write(
    asked: Sequence[Passage],
    writer: Writer,
    reader: Reader | None,
    how: Making,
    *,
    parts: Path,
    progress: Callable[[int], object] = lambda count: None,
    info: Callable[[str], None] = lambda text: None,
) -> list[Pair]:
    """Pairs about the passages, with what the reader answers to those that no passage speaks against; none is judged.

    Args:
        reader: None: nothing is read again. how: of it, the number of pairs, the size of batches and the seed.
        parts: folder for finished batches. progress: called with passages done. info: takes a line for the user.
    """
    pairs = list[Pair]()
    files = list(_parts(asked, writer, reader, how, parts))
    if finished := sum(path.is_file() for _, path in files):
        info(f"Resuming: {finished} of {len(files)} batches are finished already.")
    begun, questions = time.monotonic(), 0
    for start, path in files:
        own = asked[start : start + how.batch_size]
        if path.is_file():
            rows = read_json_lines(path)
        else:
            rows = [_row(pair) for pair in _drafted(own, writer, reader, how)]
            write_jsonl(path, rows)
            if not questions and (told := _expected(time.monotonic() - begun, len(own), len(asked) - start)):
                info(told)
            questions += sum(bool(row["draft"]["question"]) for row in rows)
        pairs += [_read_back(row, start) for row in rows]
        progress(len(own))
    if questions:
        info(_rate(questions, time.monotonic() - begun))
    return pairs


def check(drafted: Sequence[Pair], asked: Sequence[Passage], passages: Sequence[Passage], how: Making) -> Made:
    """Judge what `write` gave, and divide what is kept; with `least_f1` 0 as if nothing had been read.

    passages: all that are searched.
    """
    pairs = [_judged(pair, asked[pair.row], how) for pair in drafted]
    pairs = _searched(_without_repeats(pairs, asked), asked, passages, how)
    return Made(asked, pairs, _for_validation([pair.row for pair in pairs if pair.fault is None], how))


def _parts(
    asked: Sequence[Passage], writer: Writer, reader: Reader | None, how: Making, folder: Path
) -> Iterator[tuple[int, Path]]:
    """The first row of each batch, and its file, whose name changes with anything that its content depends on."""
    folder.mkdir(parents=True, exist_ok=True)
    read = reader.fingerprint if reader else None
    facts = (VERSION, writer.fingerprint, read, how.pairs, how.batch_size, how.seed)
    for start in range(0, len(asked), how.batch_size):
        own = asked[start : start + how.batch_size]
        table = {name: [getattr(passage, name) for passage in own] for name in ("id", "title", "text")}
        key = hashlib.sha256(repr((facts, tables_fingerprint(table))).encode()).hexdigest()[:20]
        yield start, folder / f"{start:08d}-{key}.jsonl"


def _drafted(passages: Sequence[Passage], writer: Writer, reader: Reader | None, how: Making) -> list[Pair]:
    """The pairs of a batch; those without fault so far are read again."""
    drafts = writer.draft(passages, how.pairs)
    pairs = [Pair(row, draft) for row, own in enumerate(drafts) for draft in own]
    if reader is None:
        return pairs
    left = [place for place, pair in enumerate(pairs) if fault_of(pair.draft, passages[pair.row]) is None]
    readings = reader.read(
        [pairs[place].draft.question for place in left], [passages[pairs[place].row] for place in left]
    )
    for place, reading in zip(left, readings, strict=True):
        pairs[place] = replace(pairs[place], reading=reading)
    return pairs


def _row(pair: Pair) -> dict:
    return {name: value for name, value in asdict(pair).items() if name in ("row", "draft", "reading")}


def _read_back(row: dict, start: int) -> Pair:
    return Pair(row["row"] + start, Draft(**row["draft"]), row["reading"] and Reading(**row["reading"]))


def _judged(pair: Pair, passage: Passage, how: Making) -> Pair:
    """The pair with the first fault that needs no other pair."""
    reading = pair.reading if how.least_f1 else None
    fault = fault_of(pair.draft, passage)
    if fault is None and reading and agreement(pair.draft, reading) < how.least_f1:
        fault = "read_differently"
    return replace(pair, reading=reading, fault=fault)


def _without_repeats(pairs: Sequence[Pair], asked: Sequence[Passage]) -> list[Pair]:
    """The pairs; one that repeats an earlier one that is kept so far has that fault."""
    left = [place for place, pair in enumerate(pairs) if pair.fault is None]
    again = repeated([pairs[place].draft.question for place in left], [asked[pairs[place].row].id for place in left])
    faulty = {place for place, found in zip(left, again, strict=True) if found}
    return [replace(pair, fault="repeated") if place in faulty else pair for place, pair in enumerate(pairs)]


def _searched(pairs: list[Pair], asked: Sequence[Passage], passages: Sequence[Passage], how: Making) -> list[Pair]:
    """The pairs; one whose passage the search does not find has that fault, and those kept have a score."""
    left = [place for place, pair in enumerate(pairs) if pair.fault is None]
    places = {passage.id: row for row, passage in enumerate(passages)}
    rows = [places[asked[pairs[place].row].id] for place in left]
    questions = [pairs[place].draft.question for place in left]
    found = ranks(questions, rows, passages, how.top_k) if how.top_k else [1] * len(left)
    for place, rank in zip(left, found, strict=True):
        pair = pairs[place]
        pairs[place] = (
            replace(pair, fault="not_found")
            if rank is None
            else replace(pair, score=score_of(pair.draft, pair.reading, rank))
        )
    return pairs


def _for_validation(rows: Sequence[int], how: Making) -> frozenset[int]:
    """The passages, by row, whose pairs are for validation: at least one, and never all of several."""
    different = sorted(set(rows))
    count = min(max(1, round(how.eval_share * len(different))), len(different) - 1) if how.eval_share else 0
    return frozenset(random.Random(how.seed).sample(different, max(0, count)))


def _rate(questions: int, seconds: float) -> str:
    told = f"{seconds / 60:.1f} minutes" if seconds >= LONG else f"{seconds:.1f} seconds"
    return f"{questions:,} questions written and read in {told}: {60 * questions / max(seconds, 1e-9):,.1f} a minute."


def _expected(seconds: float, done: int, left: int) -> str:
    """What the first batch says of the rest."""
    rest = seconds / done * (left - done)
    if rest < LONG:
        return ""
    told = f"{rest / 60:.1f} minutes" if rest < 5400 else f"{rest / 3600:.1f} hours"
    return (
        f"The first {done} passages took {seconds:.0f} seconds, so the other {left - done:,} take about {told}. "
        "Ctrl-C keeps what is finished; the same command resumes."
    )
