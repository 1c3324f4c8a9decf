"""Write OUTPUT/report.html, one file with scores, verdicts, losses, calibration and latency, and its
plots as PNG into OUTPUT/plots/. Loads the pair to measure the latency.
Needs: pip install "cozyrag[plots]"

examples:
  cozyrag report my-rag
  cozyrag report my-rag --latency 0

Left out: the page and its plots (html_report.py, plots.py).
"""

import argparse
from collections.abc import Sequence

from cozyrag.commands.options import at_least
from cozyrag.reporting.extras import check_plots
from cozyrag.runtime.terminal import one_line, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("run", metavar="OUTPUT", help="output folder of a run")
    add("--latency", type=at_least(0), default=20, metavar="N", help="questions to time one by one; 0: none")


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Measure the latency, and write the report."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    check_plots()
    from transformers.utils import logging  # torch: only once the options are correct

    from cozyrag.reporting.html_report import report

    logging.disable_progress_bar()
    say(f"Written to {one_line(report(options.run, latency=options.latency))}")
