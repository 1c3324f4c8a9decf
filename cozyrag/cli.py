"""The command line: `cozyrag passages`, `questions`, `index`, `train`, `plan`, `ask`, `demo`, `space`, `report`, `compare`, `audit`, `doctor`,
`merge`, `push`.

Each command is a few lines around a function of the package. A user's mistake ends with one sentence and exit code 2.
"""

import argparse
import os
import sys
from collections.abc import Callable

from cozyrag import __version__
from cozyrag.errors import InputError, PushError
from cozyrag.runtime.signals import Interrupted

DOCTOR = """\
Check before or after training that things are as they should be. Nothing is trained and nothing is written.

  cozyrag doctor [--machine]  Before anything. Is this machine fit: Python, torch, FAISS and OpenMP, threads, memory, disk, optional
                              packages, the Hub, and a tiny model that must learn within seconds; each finding with its remedy.
  cozyrag doctor SETTINGS     Before training. Takes the settings of `cozyrag train` (--config FILE.yaml too), loads the tables
                              and the models as a run would, and takes the gradient of each active loss term on one small
                              batch: it must move weights of its own model, no others, and consist of numbers.
                              Every run does so by itself before its first round.
  cozyrag doctor OUTPUT       After training. OUTPUT is the folder of a finished run: the index must be the retriever's, which
                              is also seen by encoding some passages anew, and the generator must answer.
"""
DOCTOR_EXAMPLES = """\
examples:
  cozyrag doctor
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
AUDIT = """\
How much of what a pair is examined with is known from training: questions nearly the same, answers heard before, gold passages
seen before; and the scores on the questions of which nothing was seen. Every run does so by itself and writes audit.json.

  cozyrag audit OUTPUT       a run's output folder: its tables are read again from where its settings say, and the scores of its last
                             examination are split; audit.json is written anew
  cozyrag audit [SETTINGS]   settings of `cozyrag train`, before training: nothing is written

examples:
  cozyrag audit my-rag
  cozyrag audit --questions train.tsv --eval_questions test.tsv --passages wiki.jsonl
"""


DATA_COMMANDS = {
    "passages": "cut texts (files, folders, a wiki, a Hub dataset) into passages to search",
    "questions": "make a file of questions, or check one against the passages",
    "index": "encode passages on all processes and make their index",
}

PUSH = """\
Upload what a run left: the retriever to USER/NAME-retriever, passages and vectors to the dataset USER/NAME-index, and last
the generator to USER/NAME, whose cozyrag.json names the exact revisions of the other two. Until that last commit what was
there before stays what loads. Log in once with `hf auth login`, or set HF_TOKEN.

An upload that broke off is finished by the same command: files that arrived are not sent again. Rounds of a run with
--hub_strategy every_round that still wait to be uploaded go first. Exit code 3 if it fails: nothing on disk is touched.
"""


def door(act: Callable[[], None]) -> None:
    """Run an act; turn an InputError into its sentence on stderr, once over all processes, and exit code 2; 3 for an upload.

    A run that Ctrl-C or SIGTERM ended leaves with 128 and the number of the signal, as shells do.
    """
    try:
        act()
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(3 if isinstance(error, PushError) else 2)
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
    for name, told in DATA_COMMANDS.items():
        commands.add_parser(name, help=told, add_help=False)
    _add_ask(commands)
    _add_pages(commands)
    _add_reports(commands)
    _add_doctor(commands)
    _add_audit(commands)
    _add_merge(commands)
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
    elif arguments.command in DATA_COMMANDS:
        _prepare(arguments.command, rest)
    elif arguments.command == "doctor":
        _doctor(rest)
    elif arguments.command == "audit":
        _audit(rest)
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


def _add_pages(commands: argparse._SubParsersAction) -> None:
    """`demo` and `space`."""
    demo = commands.add_parser(
        "demo",
        help="a page in the browser to try a trained pair on",
        description="Show a page on this machine: ask, see the answer, the passages it comes from with the sentences that were read "
        'marked, and what more or fewer passages change. Nothing outside is asked for. Needs: pip install "cozyrag[demo]".',
    )
    demo.add_argument("model", metavar="OUTPUT", help="output folder of a run, or user/name on the Hub")
    demo.add_argument("--port", type=int, help="port on 127.0.0.1 (default: the first free one from 7860)")
    demo.add_argument("--open", action="store_true", help="open the page in the browser")
    demo.set_defaults(act=_demo)
    space = commands.add_parser(
        "space",
        help="write that page as a folder for Hugging Face Spaces",
        description="Write a folder with demo_app.py, requirements.txt and README.md that can be uploaded as a Space as it is. A pair in a "
        "folder is copied along; one on the Hub is loaded by its name.",
    )
    space.add_argument("model", metavar="OUTPUT", help="output folder of a run, or user/name on the Hub")
    space.add_argument("folder", metavar="FOLDER", help="new folder to write")
    space.add_argument("--title", help="title of the page (default: the pair's name)")
    space.set_defaults(act=_space)


def _add_reports(commands: argparse._SubParsersAction) -> None:
    """`report` and `compare`."""
    report = commands.add_parser(
        "report",
        help="the numbers of a run as a page with plots",
        description="Write OUTPUT/report.html, one file that needs no other, and its plots as PNG into OUTPUT/plots/. Loads the pair "
        'to see how far its certainty can be trusted and how long an answer takes. Needs: pip install "cozyrag[plots]".',
    )
    report.add_argument("run", metavar="OUTPUT", help="output folder of a run")
    report.add_argument(
        "--latency",
        type=int,
        default=20,
        metavar="N",
        help="examined questions to ask one at a time with a clock running (default: %(default)s; 0: none)",
    )
    report.set_defaults(act=_report)
    compare = commands.add_parser(
        "compare",
        help="two runs side by side, and whether they differ by more than noise",
        description="Which settings differ, the scores of the last rounds with 95 % intervals of their differences on the questions "
        "that both examined, and which questions went from right to wrong or from wrong to right.",
    )
    compare.add_argument("run_a", metavar="RUN_A", help="output folder of a run")
    compare.add_argument("run_b", metavar="RUN_B", help="output folder of another run")
    compare.add_argument("--html", metavar="FILE", help="write it as a page too, with every flipped question")
    compare.set_defaults(act=_compare)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    """Its arguments are read by `_doctor`: argparse would take the value of a setting it does not know for OUTPUT."""
    commands.add_parser(
        "doctor",
        help="check this machine, settings before training, or what a run left",
        usage="cozyrag doctor [--machine | SETTINGS | OUTPUT]",
        description=DOCTOR,
        epilog=DOCTOR_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_audit(commands: argparse._SubParsersAction) -> None:
    """Its arguments are read by `_audit`, as those of the doctor are."""
    commands.add_parser(
        "audit",
        help="what of the held-out questions is known from training, and the scores without it",
        usage="cozyrag audit [SETTINGS | OUTPUT]",
        description=AUDIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_merge(commands: argparse._SubParsersAction) -> None:
    merge = commands.add_parser(
        "merge",
        help="make one model of a generator that was trained with --lora_rank",
        description="Copy a pair whose generator is a LoRA adapter, adding the adapter to the weights of its base: the copy's generator is an "
        'ordinary checkpoint and needs neither PEFT nor the base. Needs: pip install "cozyrag[lora]".',
    )
    merge.add_argument("model", metavar="OUTPUT", help="output folder of a run with --lora_rank")
    merge.add_argument("folder", metavar="FOLDER", help="new folder to write; checkpoints are not copied")
    merge.set_defaults(act=_merge)


def _add_push(commands: argparse._SubParsersAction) -> None:
    push = commands.add_parser(
        "push",
        help="upload a trained pair and its index to the Hugging Face Hub",
        description=PUSH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    push.add_argument("model", metavar="OUTPUT", help="output folder of a run")
    push.add_argument(
        "repo", metavar="USER/NAME", help="repository of the generator; -retriever and -index are added for the others"
    )
    push.add_argument("--private", action="store_true", help="make the repositories private")
    push.add_argument(
        "--tag",
        help="a name for this state, such as v1: CozyRAG.from_pretrained(USER/NAME, revision=TAG) finds it again",
    )
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


def _demo(arguments: argparse.Namespace) -> None:
    """Show the page until Ctrl+C."""
    from transformers.utils import logging

    from cozyrag.reporting.demo_app import serve

    logging.disable_progress_bar()
    serve(arguments.model, port=arguments.port, open_browser=arguments.open)


def _space(arguments: argparse.Namespace) -> None:
    """Write the folder and say what is next."""
    from cozyrag.reporting.hf_space import write_space

    write_space(arguments.model, arguments.folder, title=arguments.title)
    print(f"{arguments.folder}/ is ready; its README.md says how to try and to upload it.")


def _report(arguments: argparse.Namespace) -> None:
    """Measure what the run did not, and write the report."""
    from transformers.utils import logging

    from cozyrag.reporting.html_report import report

    logging.disable_progress_bar()
    if arguments.latency < 0:
        raise InputError(f"--latency: expected 0 or more questions, found {arguments.latency}.")
    print(f"Written to {report(arguments.run, latency=arguments.latency)}")


def _compare(arguments: argparse.Namespace) -> None:
    """Print the comparison; write the page if asked."""
    from cozyrag.reporting.compare import as_text, compare, write_page

    comparison = compare(arguments.run_a, arguments.run_b)
    print(as_text(comparison))
    if arguments.html:
        write_page(comparison, arguments.html)
        print(f"\nWritten to {arguments.html}")


def _prepare(command: str, rest: list[str]) -> None:
    """One of DATA_COMMANDS; each reads its own arguments."""
    if command == "passages":
        from cozyrag.data.ingest import passages as act
    elif command == "questions":
        from cozyrag.commands.check_questions import questions as act
    else:
        from cozyrag.commands.build_index import index as act
    act(rest)


def _doctor(rest: list[str]) -> None:
    """Check this machine if nothing else is named, a folder if one is, or the settings."""
    if not rest or "--machine" in rest:
        return _machine([word for word in rest if word != "--machine"])
    if rest[0].startswith("-"):
        from cozyrag.run import doctor

        return doctor(rest)
    if len(rest) > 1:
        raise InputError(
            f"cozyrag doctor: expected settings or one folder, found {rest[0]!r} and {rest[1]!r}. See cozyrag doctor --help."
        )
    from pathlib import Path

    from transformers.utils import logging

    from cozyrag.preflight.pair_check import check_pair

    logging.disable_progress_bar()
    for told in check_pair(Path(rest[0])):
        print(f"ok: {told}")
    print(f"Nothing wrong with {rest[0]}.")


def _machine(rest: list[str]) -> None:
    """Look at the machine and print each finding."""
    if rest:
        raise InputError(f"cozyrag doctor --machine: expected nothing else, found {rest[0]!r} after --machine. Give one at a time.")  # fmt: skip
    from transformers.utils import logging

    from cozyrag.preflight.environment import examine_machine

    logging.disable_progress_bar()
    for told in examine_machine():
        print(told, flush=True)


def _audit(rest: list[str]) -> None:
    """Audit a folder if one is named, else what the settings say."""
    from cozyrag.commands.audit import audit_output, audit_settings

    if not rest or rest[0].startswith("-"):
        return audit_settings(rest)
    if len(rest) > 1:
        raise InputError(
            f"cozyrag audit: expected settings or one folder, found {rest[0]!r} and {rest[1]!r}. See cozyrag audit --help."
        )
    from pathlib import Path

    audit_output(Path(rest[0]))


def _merge(arguments: argparse.Namespace) -> None:
    from transformers.utils import logging

    from cozyrag.commands.merge_adapter import merge

    logging.disable_progress_bar()
    print(f"{merge(arguments.model, arguments.folder)} holds the pair with one whole generator.")


def _push(arguments: argparse.Namespace) -> None:
    from cozyrag.hub.background_push import push_run

    options = {"private": arguments.private, "tag": arguments.tag}
    print(f"Pushed to {push_run(arguments.model, arguments.repo, **options)}")


if __name__ == "__main__":
    main()
