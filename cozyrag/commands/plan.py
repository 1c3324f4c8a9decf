"""`cozyrag plan`: what a run with these settings would take in hours, memory and disk. Nothing is trained or written.

Left out: the estimate itself (preflight/plan.py).
"""

import argparse
from collections.abc import Sequence

from cozyrag.config import parse_settings
from cozyrag.run import show_plan

DESCRIPTION = (
    "Probe for half a minute what a run with these settings would take. Takes the settings of `cozyrag train`."
)


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Print the plan; the settings parse themselves (config.py)."""
    show_plan(parse_settings(list(arguments), description=DESCRIPTION))
