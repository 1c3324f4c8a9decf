"""`cozyrag push`: upload a trained pair and its index to the Hugging Face Hub.

Left out: the upload itself (hub/push.py).
"""

import argparse
from collections.abc import Sequence

from cozyrag.hub.background_push import push_run

DESCRIPTION = """\
Upload what a run left: the retriever to USER/NAME-retriever, passages and vectors to the dataset USER/NAME-index, and last
the generator to USER/NAME, whose cozyrag.json names the exact revisions of the other two. Until that last commit what was
there before stays what loads. Log in once with `hf auth login`, or set HF_TOKEN.

An upload that broke off is finished by the same command: files that arrived are not sent again. Rounds of a run with
--hub_strategy every_round that still wait to be uploaded go first. Exit code 3 if it fails: nothing on disk is touched.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.description = DESCRIPTION
    parser.add_argument("model", metavar="OUTPUT", help="output folder of a run")
    parser.add_argument(
        "repo", metavar="USER/NAME", help="repository of the generator; -retriever and -index are added for the others"
    )
    parser.add_argument("--private", action="store_true", help="make the repositories private")
    parser.add_argument(
        "--tag",
        help="a name for this state, such as v1: CozyRAG.from_pretrained(USER/NAME, revision=TAG) finds it again",
    )


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Upload, and print where to."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    print(f"Pushed to {push_run(options.model, options.repo, private=options.private, tag=options.tag)}")
