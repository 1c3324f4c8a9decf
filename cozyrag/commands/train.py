"""`cozyrag train`: train a pair, as train.py does.

Left out: the run itself (run.py).
"""

import argparse
from collections.abc import Sequence

from cozyrag.run import train

DESCRIPTION = "Fine-tune a retriever and a generator together on your own questions and passages."


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Train; the settings parse themselves (config.py)."""
    train(list(arguments), description=DESCRIPTION)
