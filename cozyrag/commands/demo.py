"""Serve a page on this machine: an answer, the passages it comes from with the sentences that the
generator read marked, and the answers with fewer and more passages. It loads nothing from the
network. Needs: pip install "cozyrag[demo]"

examples:
  cozyrag demo my-rag --open
  cozyrag demo user/my-rag --port 8080
  cozyrag demo my-rag --feedback rated.jsonl     then: cozyrag questions rated.jsonl --output more.jsonl

Left out: the page itself (demo_app.py).
"""

import argparse
from collections.abc import Sequence

from cozyrag.reporting.extras import check_gradio


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("model", metavar="OUTPUT", help="output folder of a run, or user/name on the Hub")
    parser.add_argument(
        "--port", type=int, metavar="N", help="port on 127.0.0.1 (default: the first free one from 7860)"
    )
    help = "add two buttons that append ratings of answers to this .jsonl file, which `cozyrag questions` reads"
    parser.add_argument("--feedback", metavar="FILE", help=help)
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Serve the page until Ctrl-C."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    check_gradio()
    from transformers.utils import logging  # torch: only once the options are correct

    from cozyrag.reporting.demo_app import serve

    logging.disable_progress_bar()
    serve(options.model, port=options.port, open_browser=options.open, feedback=options.feedback)
