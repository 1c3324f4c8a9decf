"""Turn a file or a Hub dataset into rows that know their place, so that every later error can name a file and a line.

Left out: what a question or a passage is (questions.py, passages.py), bytes and lines (streams.py), bad rows (rows.py),
remote files other than Hub datasets.
"""

import difflib
import glob
import io
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from cozyrag.data import layouts
from cozyrag.data.delimited import Headerless, Table, delimited_rows, refuse_repeats
from cozyrag.data.rows import BadRows, Row
from cozyrag.data.streams import (
    LONGEST_ROW,
    PACKED,
    TOO_LONG,
    InputFile,
    Progress,
    empty_source,
    open_file,
    read_lines,
)
from cozyrag.errors import InputError

EXTENSIONS = (".tsv", ".csv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
Sources = str | Sequence[str]  # one source of rows or several: files, patterns of files, folders, ids on the Hub

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
_ARROW_FILE = b"ARROW1"
_SAVED = ("dataset_info.json", "dataset_dict.json")  # one of them is in each folder of save_to_disk
# What Arrow raises for a cell without a Python value: a time after the year 9999, an unknown time zone, bytes that are
# not UTF-8.
_NO_VALUE = (pa.ArrowException, ValueError, OverflowError, LookupError)


def read_rows(
    source: str,
    *,
    split: str = "train",
    known: Collection[str] = (),
    headerless: Headerless | None = None,
    delimiter: str | None = None,
    bad: BadRows | None = None,
    kind: str | None = None,
    streaming: bool = False,
    progress: Progress | None = None,
) -> Iterator[Row]:
    """Read the rows of a file, of a folder of `save_to_disk` or, if no such path exists, of a Hub dataset, in order.

    source: path to a file with one of EXTENSIONS, also with .gz or .bz2; or "user/name" or "user/name:config" on the
        Hub. A .json file is a list of objects, one object with a list in it (SQuAD, CoQA, TriviaQA), or JSON lines.
    split: of a Hub dataset or of a folder with splits.
    known: column names that get this spelling in a CSV or TSV header, which may differ in case and outer spaces.
    headerless: names the columns of a table with tabs and without header, from its first records; None: a header is
        required.
    delimiter: of a table; None: it is found out.
    bad: receives the rows that cannot be parsed (wrong number of cells, not an object) or are longer than LONGEST_ROW;
        None: they raise InputError.
    kind: one of EXTENSIONS, for a file whose name does not show it.
    streaming: rows of a Hub dataset as they arrive, nothing stored on this machine.

    Raises InputError, during the iteration, for a source that is missing, a directory, empty, of unknown extension or
    encoding, holding NUL bytes, or broken (gzip, CSV, JSON, Parquet, Hub).
    """
    collected = BadRows() if bad is None else bad
    if is_hub_id(source):
        rows = _hub_rows(source, split, streaming)
    elif is_saved(source):
        rows = _saved_rows(source, split)
    else:
        file = InputFile(source, os.path.expanduser(source), progress, collected.note)
        kind = kind or kind_of(file.path)
        _check_file(file, kind)
        rows = _file_rows(file, kind, Table(known, headerless, delimiter), collected)
    for row in rows:
        if _characters(row.values) > LONGEST_ROW:
            collected.add(row.where, TOO_LONG)
        else:
            yield row
    if bad is None:
        collected.finish(source, skip=False)


def _characters(value: object) -> int:
    """The number of characters in all texts of a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _file_rows(file: InputFile, kind: str, table: Table, bad: BadRows) -> Iterator[Row]:
    if kind == ".parquet":
        return _batch_rows(file, _parquet_batches(file), bad)
    if kind == ".arrow":
        return _batch_rows(file, _arrow_batches(file), bad)
    if kind == ".json":
        return _json_rows(file, bad)
    if kind in (".jsonl", ".ndjson"):
        return _json_lines(file.source, read_lines(replace(file, refuse=bad.add)), bad)
    return delimited_rows(file, kind, table, bad)


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


def is_saved(source: str) -> bool:
    """Whether this is a folder that `save_to_disk` of the library `datasets` wrote."""
    return any(os.path.isfile(os.path.join(os.path.expanduser(source), name)) for name in _SAVED)


def sources_of(given: Sources) -> list[str]:
    """The single sources of a setting: each pattern of file names becomes the files that fit, in order.

    What exists is a path, never a pattern, so names may hold brackets. Raises InputError if no file fits.
    """
    found: dict[str, None] = {}
    for source in [given] if isinstance(given, str) else given:
        path = os.path.expanduser(source)
        if os.path.exists(path) or not glob.has_magic(path):
            found[source] = None
            continue
        folder, name = os.path.split(path)
        pattern = os.path.join(glob.escape(folder), name) if os.path.isdir(folder) else path
        files = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
        if not files:
            raise InputError(
                f"Expected files that fit {source} in {os.path.abspath(folder)}, found none. Check the pattern and the "
                "working folder."
            )
        found.update(dict.fromkeys(files))
    return list(found)


def described(given: Sources) -> str:
    """The sources of a setting in words."""
    names = [given] if isinstance(given, str) else list(given)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def size_of(given: Sources) -> int | None:
    """Bytes of all the files, None if one of the sources is not a file."""
    paths = [os.path.expanduser(source) for source in sources_of(given)]
    return sum(map(os.path.getsize, paths)) if all(map(os.path.isfile, paths)) else None


def _check_file(file: InputFile, kind: str) -> None:
    supported = f"{' '.join(EXTENSIONS)} (each also with .gz)"
    if os.path.isdir(file.path):
        raise _unknown_folder(file, supported)
    if not os.path.exists(file.path):
        raise InputError(f"Expected a file at {os.path.abspath(file.path)}, found none. {_near_miss(file.path)}")
    if kind not in (*EXTENSIONS, ".txt"):
        raise InputError(
            f"{file.source}: the extension {kind or '(none)'} does not show the format, so the file was not read. "
            f"Supported: {supported}; rename or convert the file."
        )
    if os.path.getsize(file.path) == 0:
        raise empty_source(file.source)


def _unknown_folder(file: InputFile, supported: str) -> InputError:
    """The InputError for a folder that is no data set, with the pattern for the tables in it."""
    kinds = Counter(kind for name in sorted(os.listdir(file.path)) if (kind := kind_of(name)) in EXTENSIONS)
    named = (
        "Name one file in it"
        if not kinds
        else f'Name a file, or "{os.path.join(file.source, "*")}{kinds.most_common(1)[0][0]}"'
    )
    return InputError(
        f"Expected a file, a folder of save_to_disk or a BEIR folder (corpus.jsonl, queries.jsonl, qrels), but "
        f"{file.source} is a directory of another kind. {named}: {supported}."
    )


def _near_miss(path: str) -> str:
    folder, name = os.path.split(os.path.abspath(path))
    if not os.path.isdir(folder):
        return f"The folder {folder} does not exist either: check the path."
    similar = difflib.get_close_matches(name, sorted(os.listdir(folder)), n=1)
    return f"Did you mean {os.path.join(folder, similar[0])}?" if similar else "Check the path and the working folder."


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
    """Rows of a .json file: a list of objects, one object with rows in it, or JSON lines under the wrong name."""
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
    elif isinstance(value, dict):
        for place, item in layouts.objects_in(source, value):
            yield from _object_row(f"{source}, {place}", item, bad)
    elif isinstance(value, list) and not more:
        for number, item in enumerate(value, start=1):
            yield from _object_row(f"{source}, row {number}", item, bad)
    else:
        line = text.count("\n", 0, end) + 1
        raise _broken_json(f"{source}, line {line}", ValueError("neither one list of objects nor one object per line"))


# ---- Parquet, Arrow and Hub


def _batch_rows(file: InputFile, batches: Iterable[pa.RecordBatch], bad: BadRows) -> Iterator[Row]:
    number = 0
    for batch in batches:
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
    with _table_bytes(file, "Parquet") as whole:
        table = pq.ParquetFile(whole)
        refuse_repeats(file.source, table.schema_arrow.names)
        yield from table.iter_batches(batch_size=4096)


def _arrow_batches(file: InputFile) -> Iterator[pa.RecordBatch]:
    """The batches of a stream, which `datasets` writes, or of a file, which other programs write."""
    with _table_bytes(file, "Arrow") as whole:
        is_file = whole.read(len(_ARROW_FILE)) == _ARROW_FILE
        whole.seek(0)
        if is_file:
            table = pa.ipc.open_file(whole)
            batches: Iterable[pa.RecordBatch] = map(table.get_batch, range(table.num_record_batches))
        else:
            table = batches = pa.ipc.open_stream(whole)
        refuse_repeats(file.source, table.schema.names)
        yield from batches


@contextmanager
def _table_bytes(file: InputFile, kind: str) -> Iterator[BinaryIO]:
    with open_file(file) as opened:
        # These formats are not read from front to end, which gzip reaches only by unpacking everything.
        whole = io.BytesIO(opened.read()) if file.path.lower().endswith(PACKED) else opened
        try:
            yield cast(BinaryIO, whole)
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:  # UnicodeDecodeError: broken column names
            raise InputError(
                f"{file.source}: expected {'an' if kind == 'Arrow' else 'a'} {kind} file, found a broken one "
                f"({' '.join(str(error).split())}). Copy or write it again."
            ) from error


def _saved_rows(source: str, split: str) -> Iterator[Row]:
    """Rows of a folder that `save_to_disk` of the library `datasets` wrote."""
    import datasets

    folder = os.path.expanduser(source)
    try:
        table = datasets.load_from_disk(folder)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{source}: expected a data set of save_to_disk, found a broken one ({' '.join(str(error).split())}). Copy "
            "or write it again."
        ) from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise InputError(
                f"{source}: expected the split {split}, found {', '.join(table)}. Name one with --questions_split, "
                "--eval_split, --passages_split, or --split of the commands."
            )
        source, table = f"{source} ({split})", table[split]
    for number, values in enumerate(table, start=1):
        yield Row(f"{source}, row {number}", values)


def _hub_rows(source: str, split: str, streaming: bool) -> Iterator[Row]:
    import datasets  # imported here: it takes a second and 100 MB, which readers of files do not need
    from datasets.exceptions import DatasetsError

    name, _, config = source.partition(":")
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    try:
        table = datasets.load_dataset(name, config or None, split=split, **options)
    # datasets reports a missing script, split, configuration, page or network by these four families of errors.
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{source}: expected a file at {os.path.abspath(source)} or a Hub dataset of that name with the split "
            f"{split}, found neither ({reason.rstrip('.')}). Give a local file ({' '.join(EXTENSIONS)}), or check the "
            "name, the split, the network and HF_HUB_OFFLINE."
        ) from error
    for number, values in enumerate(table, start=1):
        yield Row(f"{source} ({split}), row {number}", values)
