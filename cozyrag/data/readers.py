"""Turn a file or a Hub dataset into rows that know their place, so that every later error can name a file and a line.

Left out: what a question or a passage is (questions.py, passages.py), bytes and lines (streams.py), bad rows (rows.py),
remote files other than Hub datasets.
"""

import csv
import difflib
import io
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cozyrag.data.rows import BadRows, Row, quoted
from cozyrag.data.streams import PACKED, InputFile, Progress, empty_source, open_file, read_lines
from cozyrag.errors import InputError

EXTENSIONS = (".tsv", ".csv", ".jsonl", ".ndjson", ".json", ".parquet")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
# The default limit of csv, 131,072 characters, is shorter than a long article.
_LONGEST_CELL = 2**31 - 1
# What Arrow raises for a cell without a Python value: a time after the year 9999, an unknown time zone, bytes that are
# not UTF-8.
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
    progress: Progress | None = None,
) -> Iterator[Row]:
    """Read the rows of a file or, if no such path exists, of a Hub dataset, in order.

    source: path to a .tsv .csv .jsonl .ndjson .json or .parquet file, each also with .gz or .bz2; or "user/name" or
        "user/name:config" on the Hub. A .json file is a list of objects, the SQuAD layout, or JSON lines.
    known: column names that get this spelling in a CSV or TSV header, which may differ in case and outer spaces.
    headerless: names of the columns, by position, of a TSV file without header; empty if a header is required.
    bad: receives the rows that cannot be parsed (wrong number of cells, not an object); None: they raise InputError.
    kind: one of EXTENSIONS, for a file whose name does not show it.
    streaming: rows of a Hub dataset as they arrive, nothing stored on this machine.

    Raises InputError, during the iteration, for a source that is missing, a directory, empty, of unknown extension or
    encoding, holding NUL bytes, or broken (gzip, CSV, JSON, Parquet, Hub).
    """
    collected = BadRows() if bad is None else bad
    if is_hub_id(source):
        yield from _hub_rows(source, split, streaming)
    else:
        file = InputFile(source, os.path.expanduser(source), progress, collected.note)
        kind = kind or kind_of(file.path)
        _check_file(file, kind)
        if kind == ".parquet":
            yield from _parquet_rows(file, collected)
        elif kind == ".json":
            yield from _json_rows(file, collected)
        elif kind in (".jsonl", ".ndjson"):
            yield from _json_lines(source, read_lines(file), collected)
        else:
            yield from _delimited_rows(file, kind, known, headerless, collected)
    if bad is None:
        collected.finish(source, skip=False)


# ---- which source it is


def kind_of(path: str) -> str:
    """The extension that decides the format, lowercased, without a final .gz or .bz2."""
    name, last = os.path.splitext(path.lower())
    return os.path.splitext(name)[1] if last in PACKED else last


def is_hub_id(source: str) -> bool:
    """Whether `read_rows` looks for this source on the Hub: no such path, no known extension, and the form of an id."""
    path = os.path.expanduser(source)
    # "csv" or "json" alone would make load_dataset read every such file below the current folder.
    named = _HUB_ID.fullmatch(source) is not None and f".{source}" not in EXTENSIONS
    return named and not os.path.exists(path) and kind_of(path) not in EXTENSIONS


def _check_file(file: InputFile, kind: str) -> None:
    supported = f"{' '.join(EXTENSIONS)} (each also with .gz)"
    if os.path.isdir(file.path):
        raise InputError(f"Expected a file, but {file.source} is a directory. Name one file in it: {supported}.")
    if not os.path.exists(file.path):
        raise InputError(f"Expected a file at {os.path.abspath(file.path)}, found none. {_near_miss(file.path)}")
    if kind not in EXTENSIONS:
        raise InputError(
            f"{file.source}: the extension {kind or '(none)'} does not show the format, so the file was not read. "
            f"Supported: {supported}; rename or convert the file."
        )
    if os.path.getsize(file.path) == 0:
        raise empty_source(file.source)


def _near_miss(path: str) -> str:
    folder, name = os.path.split(os.path.abspath(path))
    if not os.path.isdir(folder):
        return f"The folder {folder} does not exist either: check the path."
    similar = difflib.get_close_matches(name, sorted(os.listdir(folder)), n=1)
    return f"Did you mean {os.path.join(folder, similar[0])}?" if similar else "Check the path and the working folder."


# ---- TSV and CSV


def _delimited_rows(
    file: InputFile, kind: str, known: Collection[str], headerless: tuple[str, ...], bad: BadRows
) -> Iterator[Row]:
    source, records = file.source, _records(file, kind)
    spelling = {name.lower(): name for name in known}
    line, first = next(records)
    cells = [cell.strip() for cell in first]
    matches = [cell.lower() in spelling for cell in cells]
    # One known name alone, not in the first cell, may well be an answer.
    if kind == ".tsv" and headerless and not (matches[0] or sum(matches) > 1):
        header, records = list(headerless), chain([(line, first)], records)
    else:
        header = [spelling.get(cell.lower(), cell) for cell in cells]
        _refuse_repeats(f"{source}, line {line}", header)
    for line, cells in records:
        if len(cells) == len(header):
            yield Row(f"{source}, line {line}", dict(zip(header, cells, strict=True)))
        else:
            bad.add(f"{source}, line {line}", f"expected {len(header)} cells, found {len(cells)}")


def _records(file: InputFile, kind: str) -> Iterator[tuple[int, list[str]]]:
    """Pairs of the first line of a record (1-based) and its cells; blank lines are not records."""
    csv.field_size_limit(_LONGEST_CELL)
    lines, line = read_lines(file), 1
    tab_separated = kind == ".tsv"
    reader = (
        csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tab_separated else csv.reader(lines, strict=True)
    )
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{file.source}, line {line}: expected a {kind[1:].upper()} record, found a broken one ({error}); the "
            "file cannot be read past it. Correct the quotes or line ends there, or export the table as .jsonl."
        ) from error


def _refuse_repeats(where: str, header: list[str]) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise InputError(
            f"{where}: expected every column once, found {quoted(repeated)} more than once, so it is unclear which to "
            "read. Rename or drop the repeated columns."
        )


# ---- JSON


def _json_lines(source: str, lines: Iterable[str], bad: BadRows) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _broken_json(where, error) from error
        yield from _object_row(where, value, bad)


def _object_row(where: str, value: object, bad: BadRows) -> Iterator[Row]:
    if isinstance(value, dict):
        yield Row(where, value)
    else:
        bad.add(where, f"expected a JSON object, found a {type(value).__name__}")


def _broken_json(where: str, error: Exception) -> InputError:
    # The text of a JSONDecodeError counts lines within the parsed string, which for JSON lines is always line 1.
    fault = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
    return InputError(
        f"{where}: expected JSON, found a fault ({fault}); the file cannot be read past it. "
        "Correct that line, or write the file again with a JSON library."
    )


def _json_rows(file: InputFile, bad: BadRows) -> Iterator[Row]:
    """Rows of a .json file: a list of objects, the SQuAD layout, or JSON lines under the wrong name."""
    source, lines = file.source, list(read_lines(file))
    text = "".join(lines)
    try:
        value, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
    except (ValueError, RecursionError) as error:
        place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise _broken_json(f"{source}{place}", error) from error
    more = bool(text[end:].strip())
    if isinstance(value, dict) and more:
        yield from _json_lines(source, lines, bad)
    elif isinstance(value, dict) and isinstance(value.get("data"), list):
        yield from _squad_rows(source, value["data"], bad)
    elif isinstance(value, dict):
        yield Row(f"{source}, row 1", value)
    elif isinstance(value, list) and not more:
        for number, item in enumerate(value, start=1):
            yield from _object_row(f"{source}, row {number}", item, bad)
    else:
        line = text.count("\n", 0, end) + 1
        raise _broken_json(f"{source}, line {line}", ValueError("neither one list of objects nor one object per line"))


def _squad_rows(source: str, data: list[Any], bad: BadRows) -> Iterator[Row]:
    """Flatten the layout of SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018): id, question, answers, title, context."""
    for a, article in enumerate(data):
        place = f"{source}, data[{a}]"
        for p, paragraph in enumerate(_part(place, article, "paragraphs", list)):
            here = f"{place}.paragraphs[{p}]"
            shared = {"title": article.get("title"), "context": _part(here, paragraph, "context", str)}
            for q, item in enumerate(_part(here, paragraph, "qas", list)):
                for row in _object_row(f"{here}.qas[{q}]", item, bad):
                    yield Row(row.where, {key: row.values.get(key) for key in ("id", "question", "answers")} | shared)


def _part(where: str, value: object, key: str, kind: type) -> Any:
    if isinstance(value, dict) and isinstance(value.get(key), kind):
        return value[key]
    raise InputError(
        f'{where}: expected the SQuAD layout, found no "{key}" of type {kind.__name__} there. '
        "Follow that layout, or write one object per row as .jsonl."
    )


# ---- Parquet and Hub


def _parquet_rows(file: InputFile, bad: BadRows) -> Iterator[Row]:
    number = 0
    for batch in _parquet_batches(file):
        try:
            whole = batch.to_pylist()
        except _NO_VALUE:
            whole = None  # one cell spoils a batch: its rows are converted one at a time
        for i in range(batch.num_rows):
            number += 1
            where = f"{file.source}, row {number}"
            try:
                yield Row(where, batch.slice(i, 1).to_pylist()[0] if whole is None else whole[i])
            except _NO_VALUE as error:
                bad.add(where, f"cannot be read ({' '.join(str(error).split())})")


def _parquet_batches(file: InputFile) -> Iterator[pa.RecordBatch]:
    with open_file(file) as opened:
        # Parquet is read from its end, which gzip reaches only by unpacking everything.
        whole = io.BytesIO(opened.read()) if file.path.lower().endswith(PACKED) else opened
        try:
            table = pq.ParquetFile(whole)
            _refuse_repeats(file.source, table.schema_arrow.names)
            yield from table.iter_batches(batch_size=4096)
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:  # UnicodeDecodeError: broken column names
            raise InputError(
                f"{file.source}: expected a Parquet file, found a broken one ({' '.join(str(error).split())}). "
                "Copy or write it again."
            ) from error


def _hub_rows(source: str, split: str, streaming: bool) -> Iterator[Row]:
    import datasets  # imported here: it takes a second and 100 MB, which readers of files do not need
    from datasets.exceptions import DatasetsError

    name, _, config = source.partition(":")
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    try:
        table = datasets.load_dataset(name, config or None, split=split, **options)
    # datasets reports a missing script, split, configuration, page or network by these four families of errors.
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{source}: expected a file at {os.path.abspath(source)} or a Hub dataset of that name with the split "
            f"{split}, found neither ({reason.rstrip('.')}). Give a local file ({' '.join(EXTENSIONS)}), or check the "
            "name, the split, the network and HF_HUB_OFFLINE."
        ) from error
    for number, values in enumerate(table, start=1):
        yield Row(f"{source} ({split}), row {number}", values)
