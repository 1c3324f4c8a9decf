"""`cozyrag compare`: two runs side by side, and whether they differ by more than noise.

Left out: the comparison itself (reporting/compare.py).
"""

import argparse
from collections.abc import Sequence

from cozyrag.reporting.compare import as_text, compare, write_page

DESCRIPTION = (
    "Print which settings differ, the scores of the last rounds with 95 % intervals of their differences on the questions "
    "that both runs evaluated, and which questions went from right to wrong or from wrong to right."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.description = DESCRIPTION
    parser.add_argument("run_a", metavar="RUN_A", help="output folder of a run")
    parser.add_argument("run_b", metavar="RUN_B", help="output folder of another run")
    parser.add_argument("--html", metavar="FILE", help="write it as a page too, with every changed question")


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Print the comparison; write the page if asked."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    comparison = compare(options.run_a, options.run_b)
    print(as_text(comparison))
    if options.html:
        write_page(comparison, options.html)
        print(f"\nWritten to {options.html}")
