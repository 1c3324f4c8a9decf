"""`cozyrag passages`: texts in any form in, one file of passages out.

Left out: reading and cutting (data/ingest.py), joining the parts (data/ingest_assemble.py).
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cozyrag.data.documents import FORMATS, find_sources
from cozyrag.data.ingest import gather
from cozyrag.data.ingest_assemble import Summary, assemble, check_output, summary_path
from cozyrag.data.ingest_worker import Cutting, read_counts
from cozyrag.data.rows import SHOWN, BadRows, Columns
from cozyrag.errors import InputError

DESCRIPTION = """\
Cut texts into passages that can be searched: whole sentences, about 100 words each, with the title of their article.

IN is a file, a folder or a Hub dataset, and there may be several:
  WikiExtractor output (<doc ...> or --json)       .txt .md .html .pdf files, and folders of them
  .jsonl .csv .tsv .json .parquet with the columns title and text (--title_column, --text_column); also .gz, .bz2
  user/name or user/name:config on the Hub, read as it arrives

Texts that repeat an earlier one are left out. A passage's id is made from its text: a second run gives the same ids. A run
that was stopped goes on where it was when it is started again with the same words. What was read, made and left out, and
why, is printed and written beside the output (NAME.summary.json).
"""
EXAMPLES = """\
examples:
  cozyrag passages notes/ --output passages.jsonl
  cozyrag passages extracted/ --output wiki.parquet --near_duplicates
  cozyrag passages wikimedia/wikipedia:20231101.de --output wiki-de.parquet --workers 8
"""


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """The command. Raises InputError for what the user can put right; what has been made until then is kept for a later run."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    check_output(options.output, options.inputs)
    folder = Path(f"{options.output}.parts")
    ignored = [options.output, str(summary_path(options.output)), *_below(folder)]
    sources, unknown = find_sources(options.inputs, format=options.format, ignore=ignored)
    cutting = Cutting(options.words, options.overlap, options.min_characters, options.near_duplicates is not None)
    bad = BadRows()
    columns = Columns.of(vars(options))
    parts = gather(sources, folder, cutting, columns, split=options.split, workers=options.workers, bad=bad)
    for part in parts:
        _add_bad(bad, part)
    report = bad.finish("These inputs", options.skip_bad_rows)
    summary = Summary(files=len(sources), unknown_files=len(unknown), unknown_files_first=unknown[:SHOWN], settings=vars(options))  # fmt: skip
    summary.bad_rows, summary.bad_rows_first = bad.count, bad.first
    assemble(parts, options.output, near=options.near_duplicates, keep_repeats=options.keep_duplicates, summary=summary)
    if not summary.passages:
        os.remove(options.output)
        raise InputError(f"Expected texts of at least {cutting.min_characters} characters in these inputs, found none. Check them, or lower --min_characters.")  # fmt: skip
    summary.seconds, summary.cpu_seconds = round(time.perf_counter() - started, 2), _cpu_seconds()
    summary_path(options.output).write_text(json.dumps(vars(summary), indent=2, ensure_ascii=False) + "\n", "utf-8")
    shutil.rmtree(folder)
    print(summary.lines(options.output) + (f"\n{report}" if report else ""))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IN", help="file, folder or Hub dataset")
    add("--output", required=True, metavar="FILE", help=".parquet, .jsonl or .jsonl.gz; an older one is replaced")
    add("--format", choices=FORMATS, help="what all inputs are, where names and first bytes do not tell")
    add("--words", type=_at_least(10), default=100, help="wanted words of a passage (default: 100)")
    add("--overlap", type=_at_least(0), default=0, metavar="SENTENCES", help="sentences that a passage repeats from the one before it in its section (default: 0)")  # fmt: skip
    add("--min_characters", type=_at_least(1), default=30, help="shorter passages are left out (default: 30)")
    add("--near_duplicates", type=_share, nargs="?", const=0.8, metavar="SHARE", help="leave out passages that share this much of their runs of 8 characters with an earlier one (default without it: only equal ones; with it: 0.8)")  # fmt: skip
    add("--keep_duplicates", action="store_true", help="leave nothing out that repeats; later ones get numbered ids")
    add("--split", default="train", help="split of Hub datasets (default: train)")
    add("--title_column", default="title", help="default: title")
    add("--text_column", default="text", help="default: text")
    add("--skip_bad_rows", action="store_true", help="count, list and skip what cannot be read instead of stopping")
    add(
        "--workers", type=_at_least(1), default=_cores(), help="processes that cut (default: the cores of this machine)"
    )


def _at_least(least: int):
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, found {text!r}")
        return int(text)

    return number


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, found {text!r}")
    return value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _below(folder: Path) -> list[str]:
    return [str(path) for path in folder.glob("*")]


def _cpu_seconds() -> float:
    """Of this process and of the workers that have ended."""
    return round(sum(os.times()[:4]), 2)


def _add_bad(bad: BadRows, part: Path) -> None:
    counts = read_counts(part)
    bad.first += (counts.bad_first or [])[: SHOWN - len(bad.first)]
    bad.count += counts.bad
