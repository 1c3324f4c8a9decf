"""Fine-tune a retriever and a generator together on your own questions and passages. Without settings
it trains on the bundled quickstart set.

  cozyrag train --questions qa.tsv --passages wiki.jsonl --output_dir my-rag
  cozyrag train --config examples/distilgpt2.yaml

Left out: the run itself (run.py).
"""

import argparse
from collections.abc import Sequence

from cozyrag.config import parse_settings


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Train; config.py parses the settings."""
    train(list(arguments), description=parser.description)


def train(arguments: list[str] | None = None, *, description: str | None = None) -> None:
    """Train a pair as the command line says. Raises as `run`."""
    settings = parse_settings(arguments, description=description)
    from cozyrag.run import start  # torch: only once the settings are correct

    start(settings)
