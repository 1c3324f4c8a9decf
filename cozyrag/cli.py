"""The command line: a table of commands, each in its module of `commands/`.

A mistake of the user ends with one sentence and exit code 2. Left out: what the commands do.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from cozyrag import __version__
from cozyrag.errors import InputError, PushError
from cozyrag.runtime.machine_faults import fault_sentence
from cozyrag.runtime.signals import Interrupted
from cozyrag.runtime.terminal import check_printed, escaped_warnings, lasting_streams, one_line, say

COMMANDS = {
    "train": "train a pair, as train.py does",
    "plan": "estimate time, memory and disk space of a run",
    "passages": "split texts (files, folders, a wiki, a Hub dataset) into passages",
    "questions": "merge files of questions, and check them against the passages",
    "index": "encode passages on all processes and build their index",
    "ask": "ask a trained pair questions and see its sources",
    "evaluate": "score a trained pair on questions with known answers",
    "demo": "try a trained pair in the browser",
    "serve": "serve a trained pair to programs: OpenAI's protocol, plain HTTP, MCP",
    "space": "write the demo page as a folder for Hugging Face Spaces",
    "report": "show the numbers of a run as a page with plots",
    "compare": "compare two runs, and test whether they differ by more than noise",
    "audit": "find validation questions that overlap with training, and the scores without them",
    "doctor": "check this machine, settings before training, or the output of a run",
    "merge": "merge a generator that was trained with --lora_rank into one model",
    "push": "upload a trained pair and its index to the Hugging Face Hub",
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions and shows defaults, except of switches and of options without one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=100)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        no_default = action.default is None or action.default is False or action.default == []
        return action.help if no_default else super()._get_help_string(action)


def entry_point(command: Callable[[], None], *, prints: bool = True) -> None:
    """Run a command and end the process with its exit code.

    After an InputError, or a fault of the machine, its sentence is on stderr, once for all processes, and the code is
    2, or 3 for a failed upload.
    After Ctrl-C, SIGTERM or SIGHUP the code is 128 plus the number of the signal, as in shells.
    `prints`: whether what it prints is its result; a run is not worth less if its log is lost.
    """
    with lasting_streams(), escaped_warnings():
        try:
            command()
            if prints:
                check_printed()
        except InputError as error:
            _end(f"error: {one_line(error)}", 3 if isinstance(error, PushError) else 2)
        except (OSError, MemoryError) as error:  # no permission, a full disk, ...: a traceback would explain nothing
            sentence = fault_sentence(error)
            if sentence is None:
                raise
            _end(f"error: {one_line(sentence)}", 2)
        except Interrupted as interrupted:
            _end(interrupted.message, 128 + interrupted.number)


def _end(message: str, code: int) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        say(message, file=sys.stderr)
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    """Names what it was given without control characters that would steer the terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


def run(command: str, arguments: Sequence[str]) -> None:
    """Run one of COMMANDS with its arguments; the docstring of its module is its help.

    Raises InputError for mistakes of the user.
    """
    module = importlib.import_module(f"cozyrag.commands.{command}")  # only this one: most of them load torch
    description = (module.__doc__ or "").partition("\nLeft out:")[0]
    parser = _Parser(
        prog=f"cozyrag {command}", description=description, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    module.main(arguments, parser)


def main() -> None:
    """Entry point of the `cozyrag` command."""
    entry_point(_main, prints=sys.argv[1:2] != ["train"])


def _main() -> None:
    parser = _Parser(
        prog="cozyrag",
        usage="cozyrag [-h] [--version] COMMAND ...",
        description="Fine-tune a retriever and a generator together, and ask them.",
        epilog="commands, each explained by `cozyrag COMMAND --help`:\n"
        + "\n".join(f"  {name:<10} {line}" for name, line in COMMANDS.items()),
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cozyrag {__version__}")
    # PARSER takes the command and everything after it, also options
    parser.add_argument("words", nargs=argparse.PARSER, choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    command, *arguments = parser.parse_args().words
    run(command, arguments)


if __name__ == "__main__":
    main()
