"""Options that several commands share: ranges, names of columns, and a choice between settings and an output folder.

Left out: what the commands do with them.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from cozyrag.config_checks import column_names
from cozyrag.data.delimited import delimiter_of
from cozyrag.data.rows import Columns
from cozyrag.errors import InputError


def at_least(least: int) -> Callable[[str], int]:
    """A type of argparse: whole numbers from `least` on."""

    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, found {text!r}")
        return int(text)

    return number


def share(text: str) -> float:
    """A type of argparse: numbers from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")
    return value


def add_columns(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add --columns, and the options of earlier versions that name one column each."""
    help = f"columns with other names, such as {names[0]}=x; known: {' '.join(names)}"
    parser.add_argument("--columns", nargs="+", action="extend", default=[], metavar="NAME=COLUMN", help=help)
    for name in names:
        option = f"--{name}_column"
        parser.add_argument(option, dest="columns", action="append", type=f"{name}={{}}".format, help=argparse.SUPPRESS)


def add_delimiter(parser: argparse.ArgumentParser) -> None:
    """Add --delimiter; None, the default, finds it out."""
    help = "character between the cells of .csv and .tsv files, or tab (default: found out)"
    parser.add_argument("--delimiter", type=delimiter_of, metavar="CHARACTER", help=help)


def columns_of(options: argparse.Namespace) -> Columns:
    """The names given with --columns. Raises InputError for a malformed pair."""
    return Columns(**column_names(options.columns))


def settings_or_folder(arguments: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], Path | None]:
    """(settings of `cozyrag train`, None) or ([], output folder of a run).

    The parser only prints the help: it would take the value of a setting for the folder. Raises InputError for anything
    after a folder.
    """
    words = list(arguments)
    if {"-h", "--help"} & set(words):
        parser.parse_args(["--help"])
    if not words or words[0].startswith("-"):
        return words, None
    if len(words) > 1:
        raise InputError(
            f"{parser.prog}: expected settings or one folder, found {words[0]!r} and {words[1]!r}. "
            f"See {parser.prog} --help."
        )
    return [], Path(words[0])
