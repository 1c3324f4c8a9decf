"""A request from its passages to its files: models are loaded, pairs are made, results are written.

Left out: each of these, which is in a module of its own.
"""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from cozyrag.errors import InputError
from cozyrag.runtime.terminal import say_above_bars
from cozyrag.synthesis.drafts import Passage, Reader, Writer
from cozyrag.synthesis.endpoint import EndpointWriter
from cozyrag.synthesis.making import Made, Pair, check, chosen, write
from cozyrag.synthesis.request import Places, Request
from cozyrag.synthesis.results import facts_of, write_results
from cozyrag.synthesis.writers import default_generator, load_reader, load_writer


def passages_of(columns: Mapping[str, Sequence[str]]) -> list[Passage]:
    """The passages of a table, given by its columns id, title and text."""
    return [Passage(*each) for each in zip(columns["id"], columns["title"], columns["text"], strict=True)]


class Drafted(NamedTuple):
    """Pairs that nobody has judged, the passages `asked` about, and the names of who wrote and who read."""

    asked: Sequence[Passage]
    pairs: list[Pair]
    writer: str
    reader: str


def fulfil(request: Request, passages: Sequence[Passage], places: Places, settings: Mapping) -> dict:
    """Make the questions, write all files, and return the numbers of the summary.

    settings: what the summary shows of how it was asked for. Raises InputError if a model cannot be used, or if no pair
    is left; finished batches are kept then.
    """
    drafts = drafted(request, passages, places.parts)
    made = check(drafts.pairs, drafts.asked, passages, request.how)
    facts = facts_of(made, writer=drafts.writer, reader=drafts.reader, settings=dict(settings))
    write_results(made, places, facts)
    _check_kept(made, places)
    shutil.rmtree(places.parts)
    return facts


def drafted(request: Request, passages: Sequence[Passage], parts: Path) -> Drafted:
    """Write the pairs of a request, and read them again; what is finished in the folder `parts` is not done again.

    Raises InputError if a model cannot be used.
    """
    how = request.how
    writer = _writer(request)
    reader = _reader(request, writer)
    asked = chosen(passages, request.limit, how.seed)
    tell: Callable[[str], None] = lambda text: say_above_bars(text, file=sys.stderr)  # noqa: E731
    with tqdm(total=len(asked), desc="writing questions", unit="passage") as bar:
        pairs = write(asked, writer, reader, how, parts=parts, progress=bar.update, info=tell)
    return Drafted(asked, pairs, writer.name, reader.name if reader else "nobody")


def _writer(request: Request) -> Writer:
    how = request.how
    if request.endpoint:
        return EndpointWriter(request.endpoint, request.model, at_once=min(8, how.batch_size))
    name = request.generator or default_generator()
    return load_writer(name, request.way, batch_size=how.batch_size, seed=how.seed)


def _reader(request: Request, writer: Writer) -> Reader | None:
    """The reader of the request, which is the writer if it names none; None: nothing is read again."""
    if not request.how.least_f1:
        return None
    return load_reader(request.reader, batch_size=request.how.batch_size) if request.reader else writer


def _check_kept(made: Made, places: Places) -> None:
    if made.kept:
        return
    counts = ", ".join(f"{count:,} {reason}" for reason, count in made.rejected.most_common())
    raise InputError(
        f"Expected questions to train on; of {made.written:,} pairs that were written none is kept "
        f"({counts or 'nothing was written'}). See {places.page}; then give another --generator or a lower --least_f1."
    )
