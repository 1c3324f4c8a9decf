"""Print which settings of two runs differ, the scores of their last rounds with 95 % intervals of the
differences (paired bootstrap over the questions that both evaluated), and which questions went from
correct to wrong or from wrong to correct. The last line says whether the difference exceeds noise.

examples:
  cozyrag compare baseline-run my-rag
  cozyrag compare baseline-run my-rag --html comparison.html

Left out: the comparison itself (reporting/compare.py).
"""

import argparse
from collections.abc import Sequence

from cozyrag.runtime.terminal import one_line, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("run_a", metavar="RUN_A", help="output folder of a run")
    parser.add_argument("run_b", metavar="RUN_B", help="output folder of another run")
    parser.add_argument("--html", metavar="FILE", help="write a page too, with every changed question")


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Print the comparison; write the page on request."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    from cozyrag.reporting.compare import as_text, compare, write_page  # torch: only once the options are correct

    comparison = compare(options.run_a, options.run_b)
    say(as_text(comparison))
    if options.html:
        write_page(comparison, options.html)
        say(f"\nWritten to {one_line(options.html)}")
