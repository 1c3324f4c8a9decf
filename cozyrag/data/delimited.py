"""Rows of text files whose cells are separated by a character: which one, with quoting or not, with a header or not.

A header with known column names decides first, then the extension, then the shape of the first lines. Left out: which
columns a question or a passage needs (questions.py, passages.py), other formats (readers.py).
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice

from cozyrag.data.rows import BadRows, Row, quoted
from cozyrag.data.streams import InputFile, read_lines
from cozyrag.errors import InputError

NAMES = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "pipe"}
OWN = {".tsv": "\t", ".csv": ",", ".txt": "\t"}
SAMPLE = 50  # lines that show the delimiter, and records that show whether there is a header
# The default limit of csv, 131,072 characters, is shorter than a long article.
_LONGEST_CELL = 2**31 - 1
_EXCEL = re.compile(r'"?sep=(.)"?\r?\n?')
_OPENING = re.compile(r'(?:^|\t)"')
_QUOTED_CELL = re.compile(r'(?:^|\t)"((?:[^"\t\r\n]++|"")*+)"(?=[\t\r\n]|$)')
# Names of the columns of a file without header, from its first records; none if it needs a header.
Headerless = Callable[[Sequence[Sequence[str]]], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Table:
    """How to read a table. `known`: column names that get this spelling in a header; `delimiter`: None to find it."""

    known: Collection[str] = ()
    headerless: Headerless | None = None
    delimiter: str | None = None


def delimiter_of(text: str) -> str:
    """The character that a user names: itself, "tab", "\\t", ... Raises InputError for anything longer."""
    known = {name: character for character, name in NAMES.items()} | {"\\t": "\t"}
    found = known.get(text.lower(), text)
    if len(found) != 1 or found in '"\r\n':
        raise InputError(
            f"--delimiter: expected one character or {', '.join(NAMES.values())}, found {text!r}. Give that character."
        )
    return found


def delimited_rows(file: InputFile, kind: str, table: Table, bad: BadRows) -> Iterator[Row]:
    """The rows of a file of that kind (.tsv, .csv or .txt); those with another number of cells go to `bad`.

    Rows and unnamed last columns without text are padding and left out. Raises InputError if the file is no table.
    """
    csv.field_size_limit(_LONGEST_CELL)
    sample, lines = _peek(read_lines(file))
    excel = _EXCEL.fullmatch(sample[0])
    if excel:
        sample, _ = sample[1:], next(lines)
    delimiter = table.delimiter or (excel[1] if excel else find_delimiter(sample, kind, table.known))
    if kind == ".txt" and not table.delimiter and not excel:
        _check_text(file, sample, delimiter, table)
    records = _records(file, lines, delimiter, int(bool(excel)))
    yield from _rows(file.source, (pair for pair in records if any(map(str.strip, pair[1]))), delimiter, table, bad)


def _rows(
    source: str, records: Iterator[tuple[int, list[str]]], delimiter: str, table: Table, bad: BadRows
) -> Iterator[Row]:
    header, records = _header(source, records, delimiter, table)
    named = max((place for place, name in enumerate(header, start=1) if name), default=0)
    told = False
    for line, cells in records:
        while len(cells) > named and not cells[-1].strip():
            cells.pop()
        if named <= len(cells) <= len(header):
            yield Row(f"{source}, line {line}", dict(zip(header, cells, strict=False)), written=True)
            continue
        why = f"expected {named} cells, found {len(cells)}"
        if len(cells) == 1 and not told:
            told = True
            why += f" (the delimiter is a {NAMES.get(delimiter, delimiter)}; --delimiter names another)"
        bad.add(f"{source}, line {line}", why)


def _header(
    source: str, records: Iterator[tuple[int, list[str]]], delimiter: str, table: Table
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The names of the columns, and the records below them."""
    spelling = {name.lower(): name for name in table.known}
    line, first = next(records, (1, []))
    if first and delimiter == "\t" and table.headerless and not has_names(first, table.known):
        ahead = [(line, first), *islice(records, SAMPLE - 1)]
        names = table.headerless([cells for _, cells in ahead])
        if names:
            _refuse_unknown_header(f"{source}, line {line}", [cells for _, cells in ahead], names)
            return list(names), chain(ahead, records)
        records = chain(ahead[1:], records)
    cells = [cell.strip() for cell in first]
    header = [spelling.get(cell.lower(), cell) for cell in cells]
    refuse_repeats(f"{source}, line {line}", [name for name in header if name])
    return header, records


def has_names(cells: Sequence[str], known: Collection[str]) -> bool:
    """Whether a record is a header: one known name alone, not in the first cell, may well be an answer."""
    return _count_names(cells, known) > 0


def _count_names(cells: Sequence[str], known: Collection[str]) -> int:
    names = {name.lower() for name in known}
    matches = [cell.strip().lower() in names for cell in cells]
    return sum(matches) if sum(matches) > 1 or matches[:1] == [True] else 0


def _refuse_unknown_header(where: str, records: Sequence[Sequence[str]], names: Sequence[str]) -> None:
    """Raise InputError if the first record is short words above sentences: a header in another language."""
    first, *rest = records
    lengths = [[len(cell.split()) for cell in cells] for cells in rest]
    titles = all(0 < len(cell.split()) <= 3 and not cell.rstrip().endswith((".", "?", "!")) for cell in first)
    above = any(
        len(first[at].split()) <= 2 and all(len(each) > at and each[at] >= 4 for each in lengths)
        for at in range(len(first))
    )
    if titles and above and len(rest) >= 3:
        raise InputError(
            f"{where}: expected a known column name or data, found {quoted(first)}, which looks like a header. Name "
            f"your columns with --columns {names[0]}={first[0]} ..., or remove that line."
        )


def refuse_repeats(where: str, header: Sequence[str]) -> None:
    """Raise InputError if a column name occurs twice."""
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise InputError(
            f"{where}: expected every column once, found {quoted(repeated)} more than once, so it is unclear which to "
            "read. Rename or drop the repeated columns."
        )


# ---- the delimiter


def _peek(lines: Iterator[str]) -> tuple[list[str], Iterator[str]]:
    """The first lines, and all lines; a fault in the first ones is raised only where it is."""
    sample: list[str] = []
    fault: list[InputError] = []
    try:
        sample.extend(islice(lines, 1))
        for line in islice(lines, SAMPLE - 1):
            sample.append(line)
    except InputError as error:
        if not sample:
            raise
        fault.append(error)

    def again() -> Iterator[str]:
        yield from sample
        if fault:
            raise fault[0]
        yield from lines

    return sample, again()


def find_delimiter(lines: Sequence[str], kind: str, known: Collection[str]) -> str:
    """The delimiter of a table that begins with these lines: that of its kind, unless header or shape show another.

    Without known names in the header, a tab must give all records as many cells. A .csv, which needs a header, then
    only gets a better message: semicolons and pipes must do so while a comma is not even in the first record.
    """
    own = OWN[kind]
    records = {each: _sample_records(lines, each) for each in dict.fromkeys((own, *NAMES))}
    named = {each: _count_names(found[0], known) if found else 0 for each, found in records.items()}
    best = max(named, key=lambda each: named[each])
    if named[best]:
        return best
    if _steady(records["\t"]):
        return "\t"
    absent = kind == ".csv" and (not records[own] or len(records[own][0]) == 1)
    other = [each for each in ";|" if absent and _steady(records[each]) and len(records[each]) > 1]
    return other[0] if other and not _steady(records[own]) else own


def _sample_records(lines: Sequence[str], delimiter: str) -> list[list[str]]:
    """The records of the sample that are not blank, without the last one of a longer file, which may be incomplete."""
    try:
        records = [cells for cells in csv.reader(lines, delimiter=delimiter) if any(map(str.strip, cells))]
    except csv.Error:
        return []
    return records[:-1] if len(lines) == SAMPLE and len(records) > 1 else records


def _steady(records: Sequence[Sequence[str]]) -> bool:
    """Whether all records have the same number of cells, at least two."""
    return len({len(cells) for cells in records}) == 1 and len(records[0]) > 1


def _check_text(file: InputFile, sample: Sequence[str], delimiter: str, table: Table) -> None:
    records = _sample_records(sample, delimiter)
    if not (_steady(records) or (records and has_names(records[0], table.known))):
        raise InputError(
            f"{file.source}: the extension .txt does not show the format, and line 1 does not look like a row of a "
            "table. Supported: .tsv .csv .jsonl .json .parquet (each also with .gz); name the delimiter with "
            "--delimiter, or make passages of a text with `cozyrag passages`."
        )


# ---- records and quoting


def _records(file: InputFile, lines: Iterator[str], delimiter: str, before: int) -> Iterator[tuple[int, list[str]]]:
    """Pairs of the first line of a record (1-based) and its cells; `before`: lines left out.

    Up to the first cell that begins with a quote mark, quoted and plain tables are the same, and so most files with
    tabs are read once.
    """
    if delimiter != "\t":
        yield from _parsed(file.source, lines, delimiter, csv.QUOTE_MINIMAL, before)
        return
    opening: list[str] = []
    passed = before

    def plain() -> Iterator[str]:
        nonlocal passed
        for line in lines:
            if _OPENING.search(line):
                opening.append(line)
                return
            passed += 1
            yield line

    yield from _parsed(file.source, plain(), delimiter, csv.QUOTE_NONE, before)
    if opening:
        quoting = csv.QUOTE_MINIMAL if is_quoted(file) else csv.QUOTE_NONE
        yield from _parsed(file.source, chain(opening, lines), delimiter, quoting, passed)


def _parsed(
    source: str, lines: Iterable[str], delimiter: str, quoting: int, before: int
) -> Iterator[tuple[int, list[str]]]:
    line = before + 1
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = before + reader.line_num + 1
    except csv.Error as error:
        kind = "TSV" if delimiter == "\t" else "CSV"
        raise InputError(
            f"{source}, line {line}: expected a {kind} record, found a broken one ({error}); the file cannot be read "
            "past it. Correct the quotes or line ends there, or export the table as .jsonl."
        ) from error


@dataclass
class _Quoting:
    """What the single lines of a table with tabs show of its quoting."""

    lines: int = 0
    widths: Counter[int] = field(default_factory=Counter)  # number of cells: lines
    doubled: int = 0  # first line with a closed cell that holds a doubled quote mark
    enclosed: Counter[int] = field(default_factory=Counter)  # column: lines where its cell is between quote marks

    def look(self, line: str) -> str:
        """Count a line; returns it."""
        cells = line.rstrip("\r\n").split("\t")
        if cells == [""]:
            return line
        self.lines += 1
        self.widths[len(cells)] += 1
        if '"' in line:
            if not self.doubled and any('""' in cell for cell in _QUOTED_CELL.findall(line)):
                self.doubled = self.lines
            if self.lines > 1:
                self.enclosed.update(
                    at for at, cell in enumerate(cells) if len(cell) > 1 and cell[0] == cell[-1] == '"'
                )
        return line

    @property
    def shown(self) -> bool:
        """Whether quote marks enclose cells: one holds a doubled mark, or all cells of a column are enclosed."""
        return bool(self.doubled) or (self.lines > 2 and self.lines - 1 in self.enclosed.values())


def is_quoted(file: InputFile) -> bool:
    """Whether quote marks around the cells of a table with tabs enclose them, or are text.

    They enclose if every cell that begins with one ends with one, and some cell needs them (a doubled mark, a tab or a
    newline in it) or all cells of a column have them.

    Raises InputError if some cells need them and another cell is not closed: it would swallow the rows below.
    """
    found = _Quoting()
    lines = map(found.look, read_lines(replace(file, progress=None)))
    reader = csv.reader(lines, delimiter="\t", strict=True)
    widths, width, line = Counter[int](), 0, 0
    swallowed = False
    try:
        for cells in reader:
            line, width = reader.line_num, width or len(cells)
            widths[len(cells)] += bool(cells)
            swallowed = swallowed or any("\n" in cell and "\t" in cell for cell in cells)
    except csv.Error as error:
        for _ in lines:  # the lines below may show that cells are quoted
            pass
        if found.shown:
            raise InputError(
                f"{file.source}, line {line + 1}: expected a cell that is closed by a quote mark, as others of this "
                f"file are, found one that is not ({error}), so it would swallow the lines below. Close it and double "
                "the quote marks in it, or export the table as .jsonl."
            ) from error
        return False
    odd = widths.total() - widths[width], found.widths.total() - found.widths[width]
    return found.shown or (not swallowed and odd[0] < odd[1])
