"""Upload the pair of a run: the retriever to USER/NAME-retriever, passages and vectors to the dataset
USER/NAME-index, and last the generator to USER/NAME, with a cozyrag.json that names the exact
revisions of the other two. Until that last commit the previous pair loads. Log in once with
`hf auth login`, or set HF_TOKEN.

Without --private the repositories are public: anyone can read the passages. Only files of the pair
are uploaded; others in its folder are named, and a link is refused.

The same command completes an interrupted upload; uploaded files are not sent again. Rounds of a run
with --hub_strategy every_round that still wait are uploaded first. If the upload fails, the exit
code is 3 and nothing on disk has changed.

examples:
  cozyrag push my-rag user/my-rag
  cozyrag push my-rag user/my-rag --private --tag v1

Left out: the upload itself (hub/push.py).
"""

import argparse
from collections.abc import Sequence

from cozyrag.runtime.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("model", metavar="OUTPUT", help="output folder of a run")
    add("repo", metavar="USER/NAME", help="repository of the generator; the others add -retriever and -index")
    add("--private", action="store_true", help="create private repositories")
    add("--tag", help="tag of this state, such as v1, for CozyRAG.from_pretrained(USER/NAME, revision=TAG)")


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Upload, and print the addresses."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    from cozyrag.hub.background_push import push_run  # torch: only once the options are correct

    say(f"Pushed to {push_run(options.model, options.repo, private=options.private, tag=options.tag)}")
