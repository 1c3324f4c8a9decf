"""`cozyrag report`: the numbers of a run as a page with plots.

Left out: the page and its plots (html_report.py, plots.py).
"""

import argparse
from collections.abc import Sequence

from transformers.utils import logging

from cozyrag.errors import InputError
from cozyrag.reporting.html_report import report

DESCRIPTION = (
    "Write OUTPUT/report.html, one file that needs no other, and its plots as PNG into OUTPUT/plots/. Loads the pair "
    'to measure how long an answer takes. Needs: pip install "cozyrag[plots]".'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.description = DESCRIPTION
    parser.add_argument("run", metavar="OUTPUT", help="output folder of a run")
    parser.add_argument(
        "--latency",
        type=int,
        default=20,
        metavar="N",
        help="evaluated questions to time one by one (default: %(default)s; 0: none)",
    )


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Measure what the run did not, and write the report."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.latency < 0:
        raise InputError(f"--latency: expected 0 or more questions, found {options.latency}.")
    logging.disable_progress_bar()
    print(f"Written to {report(options.run, latency=options.latency)}")
