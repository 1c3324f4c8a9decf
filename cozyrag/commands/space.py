"""Write a folder with app.py, requirements.txt and README.md that can be uploaded as a Space. A pair in
a folder is copied; one on the Hub is loaded by its name. Needs: pip install "cozyrag[demo]"

examples:
  cozyrag space my-rag my-space
  cozyrag space user/my-rag my-space --title "Ask my notes"

Left out: the content of the folder (hf_space.py).
"""

import argparse
import shlex
from collections.abc import Sequence

from cozyrag.reporting.extras import check_gradio
from cozyrag.runtime.terminal import one_line, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("model", metavar="OUTPUT", help="output folder of a run, or user/name on the Hub")
    parser.add_argument("folder", metavar="FOLDER", help="new folder to write")
    parser.add_argument("--title", help="title of the page (default: the pair's name)")


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Write the folder and print the next step."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    check_gradio()
    from huggingface_hub import HfApi

    from cozyrag.reporting.hf_space import write_space  # torch: only once the options are correct

    write_space(options.model, options.folder, title=options.title)
    upload = shlex.join(["hf", "upload", "USER/NAME", options.folder, ".", "--repo-type", "space"])
    say(
        f"{one_line(options.folder)}/ is ready; its README.md explains how to try it and upload it. "
        "With your own name:\n"
        f"  hf repos create USER/NAME --type space --sdk gradio\n  {one_line(upload)}\n"
        f"Then the page is at {HfApi().endpoint}/spaces/USER/NAME, open to anyone unless the Space is private."
    )
