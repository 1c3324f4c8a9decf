"""Split texts into passages to search: whole sentences, about 100 words each, with the title of their
article.

IN is a file, a folder or a Hub dataset; several are allowed:
  WikiExtractor output (<doc ...> or --json)     .txt .md .html .pdf .docx .epub ... files, folders of them
  .jsonl .csv .tsv .json .parquet, also .gz and .bz2, with the columns title and text (--columns)
  user/name or user/name:config on the Hub, which is streamed

A passage keeps where it comes from: `source`, the file as named in the command or the Hub dataset, the
`url` of its article, if there is one, and the `page` of a PDF on which it begins. An index keeps them,
and answers name and link them.

Repeated texts are left out; the first one stays, with its source. The id of a passage is a hash of its
text, so every run gives the same ids. To resume a stopped run, give the same command again. A summary
of what was read, made and left out is printed and written beside the output (NAME.summary.json).

examples:
  cozyrag passages notes/ --output passages.jsonl
  cozyrag passages extracted/ --output wiki.parquet --near_duplicates
  cozyrag passages wikimedia/wikipedia:20231101.de --output wiki-de.parquet --workers 8

Left out: reading and splitting (data/ingest.py), joining the parts (data/ingest_assemble.py).
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cozyrag.commands.options import add_columns, add_delimiter, at_least, columns_of
from cozyrag.data.documents import FORMATS, find_sources
from cozyrag.data.ingest import gather
from cozyrag.data.ingest_assemble import Summary, assemble, check_destination, summary_path
from cozyrag.data.ingest_worker import Cutting, read_counts
from cozyrag.data.rows import SHOWN, BadRows, printable
from cozyrag.runtime.atomic_files import write_text, writing
from cozyrag.runtime.folder_lock import LOCK, held
from cozyrag.runtime.terminal import one_line, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    add("inputs", nargs="+", metavar="IN", help="file, folder or Hub dataset")
    add("--output", required=True, metavar="FILE", help=".parquet, .jsonl or .jsonl.gz; an existing one is replaced")
    add("--format", choices=FORMATS, help="format of all inputs, if names and first bytes do not show it")
    add("--words", type=at_least(10), default=100, metavar="N", help="desired words per passage")
    add("--overlap", type=at_least(0), default=0, metavar="N", help="sentences of the previous passage to repeat")
    add("--min_characters", type=at_least(1), default=30, metavar="N", help="shorter passages are left out")
    help = "leave out passages that share this much of their character 8-grams with an earlier one; alone: 0.8"
    add("--near_duplicates", type=_share, nargs="?", const=0.8, metavar="SHARE", help=help)
    add("--keep_duplicates", action="store_true", help="keep repeated texts; later ones get numbered ids")
    add("--split", default="train", help="split of Hub datasets")
    add_columns(parser, "title", "text")
    add_delimiter(parser)
    add("--skip_bad_rows", action="store_true", help="count, list and skip unusable rows instead of stopping")
    add("--workers", type=at_least(1), default=cores, metavar="N", help="processes")


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Write the passages and the summary. Raises InputError; finished parts are kept for a later run."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    check_destination(options.output, options.inputs)
    folder = Path(f"{options.output}.parts")
    with held(Path(f"{options.output}{LOCK}"), f"--output: another `cozyrag passages` is writing {options.output}"):
        with writing(Path(options.output)):
            _passages(options, folder, started)


def _passages(options: argparse.Namespace, folder: Path, started: float) -> None:
    """Everything between the lock and its release."""
    ignored = [
        options.output,
        str(summary_path(options.output)),
        f"{options.output}{LOCK}",
        *map(str, folder.glob("*")),
    ]
    sources, unknown = find_sources(options.inputs, format=options.format, ignore=ignored)
    signed, columns = options.near_duplicates is not None, columns_of(options)
    cutting = Cutting(
        options.words, options.overlap, options.min_characters, signed, options.split, columns, options.delimiter
    )
    bad = BadRows()
    parts = gather(sources, folder, cutting, workers=options.workers, bad=bad)
    for counts in map(read_counts, parts):
        bad.first += (counts.bad_first or [])[: SHOWN - len(bad.first)]
        bad.count += counts.bad
        bad.notes += counts.notes
    report = bad.finish("These inputs", options.skip_bad_rows)
    summary = Summary(files=len(sources), bad_rows=bad.count, bad_rows_first=bad.first, settings=vars(options))
    summary.notes = bad.notes
    summary.unknown_files, summary.unknown_files_first = len(unknown), unknown[:SHOWN]
    assemble(parts, options.output, near=options.near_duplicates, keep_repeats=options.keep_duplicates, summary=summary)
    summary.seconds = round(time.perf_counter() - started, 2)
    summary.cpu_seconds = round(sum(os.times()[:4]), 2)  # of this process and its workers, which have ended
    facts = json.dumps(vars(summary), indent=2, ensure_ascii=False) + "\n"
    write_text(summary_path(options.output), printable(facts))
    shutil.rmtree(folder)
    say(summary.lines(one_line(options.output)) + (f"\n{report}" if report else ""))


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, found {text!r}")
    return value
