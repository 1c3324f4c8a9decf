"""The command line: one module of `commands/` for each command.

A mistake of the user ends with one sentence and exit code 2. Left out: what a command does.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable

from cozyrag import __version__
from cozyrag.errors import InputError, PushError
from cozyrag.runtime.signals import Interrupted

COMMANDS = {
    "train": "train a pair, as train.py does",
    "plan": "what a run with these settings would take: hours, memory, disk; trains nothing",
    "passages": "cut texts (files, folders, a wiki, a Hub dataset) into passages to search",
    "questions": "make a file of questions, or check one against the passages",
    "index": "encode passages on all processes and make their index",
    "ask": "ask a trained pair a question and see its sources",
    "demo": "a page in the browser to try a trained pair on",
    "space": "write that page as a folder for Hugging Face Spaces",
    "report": "the numbers of a run as a page with plots",
    "compare": "two runs side by side, and whether they differ by more than noise",
    "audit": "what of the held-out questions is known from training, and the scores without it",
    "doctor": "check this machine, settings before training, or the output of a run",
    "merge": "make one model of a generator that was trained with --lora_rank",
    "push": "upload a trained pair and its index to the Hugging Face Hub",
}


def entry_point(command: Callable[[], None]) -> None:
    """Run a command. An InputError becomes its sentence on stderr, once over all processes, and exit code 2; 3 for an upload.

    A run that Ctrl-C or SIGTERM ended exits with 128 and the number of the signal, as shells do.
    """
    try:
        command()
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(3 if isinstance(error, PushError) else 2)
    except Interrupted as interrupted:
        if os.environ.get("RANK", "0") == "0":
            print(interrupted.message, file=sys.stderr, flush=True)
        sys.exit(128 + interrupted.number)


def main() -> None:
    """Entry point of the `cozyrag` command."""
    entry_point(_main)


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="cozyrag", description="Fine-tune a retriever and a generator together, and ask them."
    )
    parser.add_argument("--version", action="version", version=f"cozyrag {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, line in COMMANDS.items():
        commands.add_parser(name, help=line, add_help=False)
    command = parser.parse_known_args()[0].command
    module = importlib.import_module(f"cozyrag.commands.{command}")  # only this one: most of them load torch
    own = argparse.ArgumentParser(
        prog=f"cozyrag {command}",
        description=COMMANDS[command],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.main(sys.argv[sys.argv.index(command) + 1 :], own)


if __name__ == "__main__":
    main()
