"""A request from its passages to its files: models are loaded, pairs are made, results are written.

Left out: each of these, which is in a module of its own.
"""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from cozyrag.errors import InputError
from cozyrag.runtime.terminal import say_above_bars
from cozyrag.synthesis.drafts import Passage, Reader, Writer
from cozyrag.synthesis.endpoint import EndpointWriter
from cozyrag.synthesis.making import Made, chosen, make
from cozyrag.synthesis.request import Places, Request
from cozyrag.synthesis.results import facts_of, write_results
from cozyrag.synthesis.writers import default_generator, load_reader, load_writer


def passages_of(columns: Mapping[str, Sequence[str]]) -> list[Passage]:
    """The passages of a table, given by its columns id, title and text."""
    return [Passage(*each) for each in zip(columns["id"], columns["title"], columns["text"], strict=True)]


def fulfil(request: Request, passages: Sequence[Passage], places: Places, settings: Mapping) -> dict:
    """Make the questions, write all files, and return the numbers of the summary.

    settings: what the summary shows of how it was asked for. Raises InputError if a model cannot be used, or if no pair
    is left; finished batches are kept then.
    """
    writer = _writer(request)
    reader = _reader(request, writer)
    asked = chosen(passages, request.limit, request.how.seed)
    made = _made(request, asked, passages, writer, reader, places)
    read = reader.name if request.how.least_f1 else "nobody"
    facts = facts_of(made, writer=writer.name, reader=read, settings=dict(settings))
    write_results(made, places, facts)
    _check_kept(made, places)
    shutil.rmtree(places.parts)
    return facts


def _made(
    request: Request,
    asked: Sequence[Passage],
    passages: Sequence[Passage],
    writer: Writer,
    reader: Reader,
    places: Places,
) -> Made:
    tell: Callable[[str], None] = lambda text: say_above_bars(text, file=sys.stderr)  # noqa: E731
    with tqdm(total=len(asked), desc="writing questions", unit="passage") as bar:
        return make(asked, passages, writer, reader, request.how, parts=places.parts, progress=bar.update, info=tell)


def _writer(request: Request) -> Writer:
    how = request.how
    if request.endpoint:
        return EndpointWriter(request.endpoint, request.model, at_once=min(8, how.batch_size))
    name = request.generator or default_generator()
    return load_writer(name, request.way, batch_size=how.batch_size, seed=how.seed)


def _reader(request: Request, writer: Writer) -> Reader:
    """The reader of the request; the writer, if there is none or nothing is read again."""
    if request.reader and request.how.least_f1:
        return load_reader(request.reader, batch_size=request.how.batch_size)
    return writer


def _check_kept(made: Made, places: Places) -> None:
    if made.kept:
        return
    counts = ", ".join(f"{count:,} {reason}" for reason, count in made.rejected.most_common())
    raise InputError(
        f"Expected questions to train on; of {made.written:,} pairs that were written none is kept "
        f"({counts or 'nothing was written'}). See {places.page}; then give another --generator or a lower --least_f1."
    )
