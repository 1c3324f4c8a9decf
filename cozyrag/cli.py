"""The command line: `cozyrag train`, `cozyrag plan`, `cozyrag ask`, `cozyrag doctor`, `cozyrag push`.

Each command is a few lines around a function of the package. A user's mistake ends with one sentence and exit code 2.
"""

import argparse
import os
import sys
from collections.abc import Callable

from cozyrag import __version__
from cozyrag.errors import InputError
from cozyrag.interrupts import Interrupted

DOCTOR = """\
Check before or after training that things are as they should be. Nothing is trained and nothing is written.

  cozyrag doctor [SETTINGS]   Before training. Takes the settings of `cozyrag train` (--config FILE.yaml too), loads the tables
                              and the models as a run would, and takes the gradient of each active loss term on one small
                              batch: it must move weights of its own model, no others, and consist of numbers.
                              Every run does so by itself before its first round.
  cozyrag doctor OUTPUT       After training. OUTPUT is the folder of a finished run: the index must be the retriever's, which
                              is also seen by encoding some passages anew, and the generator must answer.
"""
DOCTOR_EXAMPLES = """\
examples:
  cozyrag doctor --questions qa.tsv --passages wiki.jsonl --repeat_penalty 0.1
  cozyrag doctor --config examples/distilgpt2.yaml
  cozyrag doctor my-rag

columns of the table:
  value            the loss term on the batch, before its weight
  gradient norm    length of its gradient over the weights of the model that it moves
  tensors moved    how many weight tensors of that model get a gradient, of those that may be trained
  step lowers it   whether one small step down that gradient lowers the term, on the same batch
  verdict          ok, FAULT, or "no occasion on this batch": nothing there for the term to do, such as no repeats in short answers

Exit code 0 if nothing is wrong, 2 with a sentence on what is and what to do. `cozyrag train --help` shows every setting.
"""


def door(act: Callable[[], None]) -> None:
    """Run an act; turn an InputError into its sentence on stderr and exit code 2, once over all processes.

    A run that Ctrl-C or SIGTERM ended leaves with 128 and the number of the signal, as shells do.
    """
    try:
        act()
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Interrupted as interrupted:
        if os.environ.get("RANK", "0") == "0":
            print(interrupted.told, file=sys.stderr, flush=True)
        sys.exit(128 + interrupted.number)


def main() -> None:
    """Entry point of the `cozyrag` command."""
    door(_main)


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="cozyrag", description="Fine-tune a retriever and a generator together, and ask them."
    )
    parser.add_argument("--version", action="version", version=f"cozyrag {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "train", help="train a pair, as train.py does; `cozyrag train --help` shows every setting", add_help=False
    )
    commands.add_parser(
        "plan", help="what a run with these settings would take: hours, memory, disk; trains nothing", add_help=False
    )
    _add_ask(commands)
    _add_doctor(commands)
    _add_push(commands)
    arguments, rest = parser.parse_known_args()
    if arguments.command == "train":
        from cozyrag.run import train

        train(rest, description="Fine-tune a retriever and a generator together on your own questions and passages.")
    elif arguments.command == "plan":
        from cozyrag.run import plan

        plan(
            rest,
            description="Probe for half a minute what a run with these settings would take. Settings as of `cozyrag train`.",
        )
    elif arguments.command == "doctor":
        _doctor(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        arguments.act(arguments)


def _add_ask(commands: argparse._SubParsersAction) -> None:
    ask = commands.add_parser("ask", help="ask a trained pair a question and see its sources")
    ask.add_argument("model", metavar="OUTPUT", help="output folder of a run, or user/name on the Hub")
    ask.add_argument(
        "questions", nargs="*", metavar="QUESTION", help="questions in quotes; none: one a line from standard input"
    )
    ask.add_argument("--top_k", type=int, help="passages to read (default: as trained)")
    ask.set_defaults(act=_ask)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    """Its arguments are read by `_doctor`: argparse would take the value of a setting it does not know for OUTPUT."""
    commands.add_parser(
        "doctor",
        help="check settings before training, or what a run left",
        usage="cozyrag doctor [SETTINGS | OUTPUT]",
        description=DOCTOR,
        epilog=DOCTOR_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_push(commands: argparse._SubParsersAction) -> None:
    push = commands.add_parser("push", help="upload a trained pair and its index to the Hugging Face Hub")
    push.add_argument("model", metavar="OUTPUT", help="output folder of a run")
    push.add_argument(
        "repo", metavar="USER/NAME", help="repository of the generator; -retriever and -index are added for the others"
    )
    push.add_argument("--private", action="store_true", help="make the repositories private")
    push.set_defaults(act=_push)


def _ask(arguments: argparse.Namespace) -> None:
    """Print each answer with the passages it came from."""
    from transformers.utils import logging

    from cozyrag.pipeline import CozyRAG

    logging.disable_progress_bar()  # "Loading weights" says nothing that the answer does not
    if arguments.top_k is not None and arguments.top_k < 1:
        raise InputError(f"--top_k: expected at least 1, found {arguments.top_k}.")
    pair = CozyRAG.from_pretrained(arguments.model)
    for question in arguments.questions or (line.strip() for line in sys.stdin if line.strip()):
        answer = pair.answer(question, top_k=arguments.top_k)
        print(f"{answer.text or '(no answer in these passages)'}   (certainty {answer.score:.2f})")
        for number, source in enumerate(answer.passages, 1):
            text = source.text if len(source.text) <= 160 else f"{source.text[:157]}..."
            print(f"  [{number}] {source.score:.3f} {source.title or source.id}: {text}")


def _doctor(rest: list[str]) -> None:
    """Check a folder if one is named, else the settings."""
    if not rest or rest[0].startswith("-"):
        from cozyrag.run import doctor

        return doctor(rest)
    if len(rest) > 1:
        raise InputError(
            f"cozyrag doctor: expected settings or one folder, found {rest[0]!r} and {rest[1]!r}. See cozyrag doctor --help."
        )
    from pathlib import Path

    from transformers.utils import logging

    from cozyrag.doctor import check_pair

    logging.disable_progress_bar()
    for told in check_pair(Path(rest[0])):
        print(f"ok: {told}")
    print(f"Nothing wrong with {rest[0]}.")


def _push(arguments: argparse.Namespace) -> None:
    from cozyrag.hub import push_pair

    print(f"Pushed to {push_pair(arguments.model, arguments.repo, private=arguments.private)}")
