"""Estimate the time, memory and disk space of each part of a run in about half a minute: loads the
tables and models of these settings and times the code of the run on a sample. Nothing is trained
and nothing is written.

  cozyrag plan --questions qa.tsv --passages wiki.jsonl --generator distilgpt2

Left out: the estimate itself (preflight/plan.py).
"""

import argparse
from collections.abc import Sequence

from cozyrag.config import parse_settings


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Print the plan; config.py parses the settings."""
    settings = parse_settings(list(arguments), description=parser.description)
    from cozyrag.run import show_plan  # torch: only once the settings are correct

    show_plan(settings)
