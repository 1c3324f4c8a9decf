"""Turn a file or a Hub dataset into rows that know where they come from.

It exists so that every later complaint can name a file and a line, whatever the format. It knows formats only: what
a question or a passage is, and which columns are needed, is decided in `questions` and `passages`. Left out: bytes and
lines (streams.py), what becomes of bad rows (rows.py), remote files other than Hub datasets.
"""

import csv
import difflib
import io
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cozyrag.data.rows import BadRows, Row, quoted
from cozyrag.data.streams import PACKED, Reading, empty_source, open_file, read_lines
from cozyrag.errors import InputError

EXTENSIONS = (".tsv", ".csv", ".jsonl", ".ndjson", ".json", ".parquet")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
# The module's own limit of 131,072 characters is shorter than a long article.
_LONGEST_CELL = 2**31 - 1
# What Arrow raises for a cell that Python has no value for: a time beyond the year 9999, an unknown time zone, bytes that
# are no UTF-8.
_NO_VALUE = (pa.ArrowException, ValueError, OverflowError, LookupError)


def read_rows(
    source: str,
    *,
    split: str = "train",
    known: Collection[str] = (),
    headerless: tuple[str, ...] = (),
    bad: BadRows | None = None,
    kind: str | None = None,
    streaming: bool = False,
    told: Callable[[int], None] | None = None,
) -> Iterator[Row]:
    """Read the rows of a file or, where no such path exists, of a Hub dataset, in order.

    source: path to a .tsv .csv .jsonl .ndjson .json or .parquet file, each also with .gz or .bz2; or "user/name" or
        "user/name:config" on the Hub. A .json file is a list of objects, the SQuAD layout, or JSON lines.
    split: split of the Hub dataset; a file has none and ignores it.
    known: column names a header may hold. CSV and TSV headers are compared lowercased and stripped, and a header cell
        that matches gets the spelling given here.
    headerless: names of the columns, by position, of a TSV file without header; empty if a header is required.
    bad: receives the rows that cannot be read as a row (wrong number of cells, not an object). Without it they raise
        InputError at the end.
    kind: one of EXTENSIONS, for a file whose name does not tell it.
    streaming: rows of a Hub dataset as they arrive, nothing stored on this machine.
    told: receives the bytes read from the disk, as they are read.

    Raises InputError, at the first step of the iteration or at the fault, for a source that is missing, a directory,
    empty, of unknown extension, not UTF-8, holding NUL bytes, or broken (gzip, CSV, JSON, Parquet, Hub).
    """
    collected = BadRows() if bad is None else bad
    path = os.path.expanduser(source)
    kind = kind or kind_of(path)
    if is_hub_id(source):
        yield from _hub_rows(source, split, streaming)
    else:
        _check_file(source, path, kind)
        yield from _file_rows(Reading(source, path, told), kind, known, headerless, collected)
    if bad is None:
        collected.finish(source, skip=False)


# ---------------------------------------------------------------------------------------------- which source it is


def kind_of(path: str) -> str:
    """The extension that decides the format, lowercased, without a closing .gz or .bz2."""
    name, last = os.path.splitext(path.lower())
    return os.path.splitext(name)[1] if last in PACKED else last


def is_hub_id(source: str) -> bool:
    """Whether `read_rows` would look for this source on the Hub: no such path, no known extension, and the form of an id."""
    path = os.path.expanduser(source)
    # "csv" or "json" alone would make load_dataset read every such file below the current folder.
    named = _HUB_ID.fullmatch(source) is not None and f".{source}" not in EXTENSIONS
    return named and not os.path.exists(path) and kind_of(path) not in EXTENSIONS


def _check_file(source: str, path: str, kind: str) -> None:
    supported = f"{' '.join(EXTENSIONS)} (each also with .gz)"
    if os.path.isdir(path):
        raise InputError(f"Expected a file, but {source} is a directory. Name one file in it: {supported}.")
    if not os.path.exists(path):
        raise InputError(f"Expected a file at {os.path.abspath(path)}, but there is none. {_near_miss(path)}")
    if kind not in EXTENSIONS:
        raise InputError(
            f"{source}: the extension {kind or '(none)'} does not tell the format, so it was not read. "
            f"Supported: {supported}; rename or convert the file."
        )
    if os.path.getsize(path) == 0:
        raise empty_source(source)


def _near_miss(path: str) -> str:
    folder, name = os.path.split(os.path.abspath(path))
    if not os.path.isdir(folder):
        return f"The folder {folder} does not exist either: check the path."
    similar = difflib.get_close_matches(name, sorted(os.listdir(folder)), n=1)
    return f"Did you mean {os.path.join(folder, similar[0])}?" if similar else "Check the path and the working folder."


def _file_rows(
    file: "Reading", kind: str, known: Collection[str], headerless: tuple[str, ...], bad: BadRows
) -> Iterator[Row]:
    if kind == ".parquet":
        yield from _parquet_rows(file, bad)
    elif kind == ".json":
        yield from _json_rows(file, bad)
    elif kind in (".jsonl", ".ndjson"):
        yield from _json_lines(file.source, read_lines(file), bad)
    else:
        yield from _delimited_rows(file, kind, known, headerless, bad)


# ------------------------------------------------------------------------------------------------------ TSV and CSV


def _delimited_rows(
    file: Reading, kind: str, known: Collection[str], headerless: tuple[str, ...], bad: BadRows
) -> Iterator[Row]:
    source, records = file.source, _records(file, kind)
    line, first = next(records)
    if kind == ".tsv" and headerless and not _is_header(first, known):
        header = list(headerless)
        records = _chained((line, first), records)
    else:
        header = _header(f"{source}, line {line}", first, known)
    for line, cells in records:
        if len(cells) == len(header):
            yield Row(f"{source}, line {line}", dict(zip(header, cells, strict=True)))
        else:
            bad.add(f"{source}, line {line}", f"expected {len(header)} cells, found {len(cells)}")


def _chained(first: tuple[int, list[str]], rest: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    yield first
    yield from rest


def _records(file: Reading, kind: str) -> Iterator[tuple[int, list[str]]]:
    """Pairs of a record's first line (1-based) and its cells; blank lines are no records."""
    csv.field_size_limit(_LONGEST_CELL)
    source, lines = file.source, read_lines(file)
    if kind == ".tsv":
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as problem:
            raise InputError(
                f"{source}, line {line}: expected a {kind[1:].upper()} record, found a broken one ({problem}); the "
                "file cannot be read past it. Correct the quotes or line ends there, or export the table as .jsonl."
            ) from problem
        if cells is None:
            return
        if cells:
            yield line, cells


def _is_header(cells: list[str], known: Collection[str]) -> bool:
    """A first cell that is a known name, or two known names anywhere: one alone may well be somebody's answer."""
    names = {name.lower() for name in known}
    hits = [cell.strip().lower() in names for cell in cells]
    return hits[0] or sum(hits) > 1


def _header(where: str, cells: list[str], known: Collection[str]) -> list[str]:
    spelling = {name.lower(): name for name in known}
    header = [spelling.get(cell.strip().lower(), cell.strip()) for cell in cells]
    _refuse_repeats(where, header)
    return header


def _refuse_repeats(where: str, header: list[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(
            f"{where}: expected every column once, found {quoted(twice)} more than once, so it is open which to "
            "read. Rename or drop the repeated columns."
        )


# ------------------------------------------------------------------------------------------------------------- JSON


def _json_lines(source: str, lines: Iterator[str], bad: BadRows) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise _broken_json(where, problem) from problem
        yield from _object_row(where, value, bad)


def _object_row(where: str, value: object, bad: BadRows) -> Iterator[Row]:
    if isinstance(value, dict):
        yield Row(where, value)
    else:
        bad.add(where, f"expected a JSON object, found a {type(value).__name__}")


def _broken_json(where: str, problem: Exception) -> InputError:
    # The decoder's own words count lines from the start of what it was given, which for JSON lines is always line 1.
    fault = f"{problem.msg}, column {problem.colno}" if isinstance(problem, json.JSONDecodeError) else problem
    return InputError(
        f"{where}: expected JSON, found a fault ({fault}); the file cannot be read past it. "
        "Correct that line, or write the file again with a JSON library."
    )


def _json_rows(file: Reading, bad: BadRows) -> Iterator[Row]:
    """Rows of a .json file: a list of objects, the SQuAD layout, or JSON lines under the wrong name."""
    source, lines = file.source, list(read_lines(file))
    text = "".join(lines)
    start = len(text) - len(text.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as problem:
        raise _broken_json(f"{source}, line {problem.lineno}", problem) from problem
    except (ValueError, RecursionError) as problem:
        raise _broken_json(source, problem) from problem
    rest = text[end:].strip()
    if isinstance(value, dict) and isinstance(value.get("data"), list) and not rest:
        yield from _squad_rows(source, value["data"], bad)
    elif isinstance(value, dict) and rest:
        yield from _json_lines(source, iter(lines), bad)
    elif isinstance(value, dict):
        yield Row(f"{source}, row 1", value)
    elif isinstance(value, list) and not rest:
        for number, item in enumerate(value, start=1):
            yield from _object_row(f"{source}, row {number}", item, bad)
    else:
        line = text.count("\n", 0, end) + 1
        raise _broken_json(f"{source}, line {line}", ValueError("neither one list of objects nor one object per line"))


def _squad_rows(source: str, data: list[Any], bad: BadRows) -> Iterator[Row]:
    """Flatten the layout of SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018): id, question, answers, title, context."""
    for a, article in enumerate(data):
        place = f"{source}, data[{a}]"
        paragraphs = _part(place, article, "paragraphs", list)
        for p, paragraph in enumerate(paragraphs):
            here = f"{place}.paragraphs[{p}]"
            about = {"title": article.get("title"), "context": _part(here, paragraph, "context", str)}
            for q, item in enumerate(_part(here, paragraph, "qas", list)):
                for row in _object_row(f"{here}.qas[{q}]", item, bad):
                    asked = {key: row.values.get(key) for key in ("id", "question", "answers")}
                    yield Row(row.where, asked | about)


def _part(where: str, value: object, key: str, kind: type) -> Any:
    if isinstance(value, dict) and isinstance(value.get(key), kind):
        return value[key]
    raise InputError(
        f'{where}: expected the SQuAD layout, found no "{key}" of type {kind.__name__} there. '
        "Follow that layout, or write one object per row as .jsonl."
    )


# ------------------------------------------------------------------------------------------------- Parquet and Hub


def _parquet_rows(file: Reading, bad: BadRows) -> Iterator[Row]:
    number = 0
    for batch in _parquet_batches(file):
        try:
            whole = batch.to_pylist()
        except _NO_VALUE:
            whole = None  # one cell spoils a batch: its rows are taken one at a time
        for place in range(batch.num_rows):
            number += 1
            where = f"{file.source}, row {number}"
            try:
                yield Row(where, batch.slice(place, 1).to_pylist()[0] if whole is None else whole[place])
            except _NO_VALUE as problem:
                bad.add(where, f"cannot be read ({' '.join(str(problem).split())})")


def _parquet_batches(file: Reading) -> Iterator[pa.RecordBatch]:
    source = file.source
    with open_file(file) as opened:
        # Parquet is read from its end, which gzip can only reach by unpacking everything.
        whole = io.BytesIO(opened.read()) if file.path.lower().endswith(PACKED) else opened
        try:
            table = pq.ParquetFile(whole)
            _refuse_repeats(source, table.schema_arrow.names)
            yield from table.iter_batches(batch_size=4096)
        except (pa.ArrowException, UnicodeDecodeError, OSError) as problem:  # the second: broken column names
            words = " ".join(str(problem).split())  # Arrow's come on several lines
            raise InputError(
                f"{source}: expected a Parquet file, found a broken one ({words}). Copy or write it again."
            ) from problem


def _hub_rows(source: str, split: str, streaming: bool) -> Iterator[Row]:
    import datasets  # here, since it takes a second and a hundred megabytes that the readers of files need not spend
    from datasets.exceptions import DatasetsError

    name, _, config = source.partition(":")
    options = {"streaming": True} if streaming else {}
    try:
        table = datasets.load_dataset(name, config or None, split=split, **options)
    # datasets reports a missing script, split, configuration, page or network by these four families.
    except (DatasetsError, OSError, ValueError, RuntimeError) as problem:
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise InputError(
            f"{source}: there is no such file at {os.path.abspath(source)}, and the Hub gave no dataset of that name "
            f"with the split {split} ({reason.rstrip('.')}). Give a local file ({' '.join(EXTENSIONS)}), or check the "
            "name, the split, the network and HF_HUB_OFFLINE."
        ) from problem
    for number, values in enumerate(table, start=1):
        yield Row(f"{source} ({split}), row {number}", values)
