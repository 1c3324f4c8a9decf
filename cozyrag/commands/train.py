"""Fine-tune a retriever and a generator together on your own questions and passages. Without settings
it trains on the bundled quickstart set.

  cozyrag train --questions qa.tsv --passages wiki.jsonl --output_dir my-rag
  cozyrag train --config examples/distilgpt2.yaml

Left out: the run itself (run.py).
"""

import argparse
from collections.abc import Sequence

from cozyrag.run import train


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Train; config.py parses the settings."""
    train(list(arguments), description=parser.description)
