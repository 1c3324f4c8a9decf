"""Make questions with answers from passages alone, check them, and write files to train on.

PASSAGES is what train.py takes as --passages: .jsonl, .csv, .tsv, .parquet, a folder, a Hub dataset, as
`cozyrag passages` makes them from notes. A language model writes pairs of question and answer, and each
pair must pass every check before it is kept:

  repeats_title          the answer is more than words of the title
  answer_not_in_passage  the answer stands in the passage
  no_question, unfinished, several_questions, length
                         it is one whole question, neither too short nor too long
  whole_sentence         the answer is no sentence of the passage
  names_the_passage      it does not speak of "the passage"
  gives_the_answer_away  it does not contain its answer
  read_differently       a reader who has the passage answers it in the same way (--least_f1)
  repeated               no earlier question is nearly the same
  not_found              the search (BM25) finds the passage among the first --top_k

Beside qa.jsonl, which train.py takes as --questions, are written: qa.validation.jsonl for
--eval_questions, of other passages; qa.rejected.jsonl with the reason of each; qa.summary.json; and
qa.html, a page with twenty kept and twenty rejected pairs. Look at it before you train: checks cannot
tell whether a question is a good one.

The model runs here (--generator), or behind any server of OpenAI's protocol (--endpoint), on this machine
unless --send_passages is given. A key is read from OPENAI_API_KEY. To resume a stopped run, give the same
command again.

examples:
  cozyrag questions --from passages.jsonl --output qa.jsonl
  cozyrag questions --from passages.jsonl --output qa.jsonl --generator Qwen/Qwen2.5-1.5B-Instruct
  cozyrag questions --from passages.jsonl --output qa.jsonl --endpoint http://127.0.0.1:8000/v1
  cozyrag train --passages passages.jsonl --questions qa.jsonl \\
      --eval_questions qa.validation.jsonl --output_dir my-rag

Left out: writing and checking (synthesis/), checking questions that people wrote (commands/questions.py).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from cozyrag.commands.options import add_columns, add_delimiter, at_least, columns_of, share
from cozyrag.data.ingest_assemble import check_destination
from cozyrag.runtime.folder_lock import LOCK, held
from cozyrag.runtime.signals import Interrupted, Interrupts
from cozyrag.runtime.terminal import one_line, say
from cozyrag.synthesis.request import OUTPUTS, WAYS, Making, Places, Request

FEW_KEPT = 0.2  # share of the pairs below which another writer is recommended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("--from", dest="passages", nargs="+", required=True, metavar="PASSAGES", help="passages to ask about")
    add("--output", required=True, metavar="FILE", help=".jsonl or .jsonl.gz; an existing one is replaced")
    help = "causal LM that writes: a folder, a Hub id, or smollm2 (default: smollm2, if it is installed)"
    add("--generator", metavar="MODEL", help=help)
    help = "how it is asked: shown examples, told as a chat model, or as scripts/train_question_writer.py taught it"
    add("--prompt", choices=WAYS, default="auto", help=help)
    add(
        "--reader", metavar="MODEL", help="who reads again: folder of a trained pair or generator (default: the writer)"
    )
    add("--endpoint", metavar="URL", help="server that writes instead, such as http://127.0.0.1:8000/v1")
    add("--endpoint_model", metavar="NAME", help="its model (default: the first that it lists)")
    add("--send_passages", action="store_true", help="allow an --endpoint on another machine")
    add("--pairs", type=at_least(1), default=3, metavar="N", help="pairs to write for each passage, at most")
    add("--max_passages", type=at_least(1), metavar="N", help="ask about so many, drawn with --seed (default: all)")
    add("--least_f1", type=share, default=0.6, metavar="F1", help="agreement of reader and answer; 0: do not read")
    add("--top_k", type=at_least(0), default=20, metavar="N", help="the search must find it among these; 0: no search")
    add("--eval_share", type=share, default=0.1, metavar="SHARE", help="share of the passages for validation")
    add("--batch_size", type=at_least(1), default=8, metavar="N", help="passages at once; a stopped run loses these")
    add("--seed", type=int, default=42, metavar="N", help="seed of every random choice")
    add("--split", default="train", help="split of Hub datasets")
    add_columns(parser, "title", "text", "id")
    add_delimiter(parser)
    add("--skip_bad_rows", action="store_true", help="count, list and skip unusable rows instead of stopping")


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Make the questions. Raises InputError; finished batches are kept for a later run."""
    add_arguments(parser)
    options = parser.parse_args(["--help"] if {"-h", "--help"} & set(arguments) else arguments)
    if options.endpoint and options.generator:
        parser.error("give --generator or --endpoint, not both")
    check_destination(options.output, options.passages, OUTPUTS)
    if options.endpoint:
        from cozyrag.synthesis.endpoint import check_endpoint

        check_endpoint(options.endpoint, sending=options.send_passages)
    lock = Path(f"{options.output}{LOCK}")
    try:
        with held(lock, f"--output: another process is writing {options.output}"), Interrupts().watched():
            _make(options)
    except Interrupted as interrupted:
        kept = "Interrupted; what is finished is kept. Give the same command again to resume."
        raise Interrupted(interrupted.number, kept) from None


def _make(options: argparse.Namespace) -> None:
    """Everything between the lock and its release."""
    from cozyrag.data.passages import read_passages  # torch and datasets: only once the options are correct
    from cozyrag.synthesis.results import lines_of
    from cozyrag.synthesis.running import fulfil, passages_of

    reading = {"split": options.split, "columns": columns_of(options), "delimiter": options.delimiter}
    table, report = read_passages(options.passages, skip_bad_rows=options.skip_bad_rows, **reading)
    if report:
        say(report)
    places = Places.of(options.output)
    facts = fulfil(_request(options), passages_of(table[:]), places, vars(options))
    say("\n".join([*map(one_line, lines_of(facts)), *_next_steps(options, places, facts)]))


def _request(options: argparse.Namespace) -> Request:
    how = Making(
        pairs=options.pairs,
        batch_size=options.batch_size,
        least_f1=options.least_f1,
        top_k=options.top_k,
        eval_share=options.eval_share,
        seed=options.seed,
    )
    return Request(
        generator=options.generator,
        way=options.prompt,
        endpoint=options.endpoint,
        model=options.endpoint_model,
        reader=options.reader,
        limit=options.max_passages,
        how=how,
    )


def _next_steps(options: argparse.Namespace, places: Places, facts: dict) -> list[str]:
    given = {"passages": options.passages, "questions": [places.training]}
    if facts["validation"]:
        given["eval_questions"] = [places.validation]
    words = [f"--{name} {' '.join(quote(str(each)) for each in files)}" for name, files in given.items()]
    lines = [
        f"Look at {one_line(places.page)} before you train on them:",
        one_line(f"  cozyrag train {' '.join(words)} --output_dir my-rag"),
    ]
    if facts["kept"] < FEW_KEPT * facts["written"]:
        lines[:0] = [
            "Few pairs passed. A larger --generator, an --endpoint, or a writer that "
            "scripts/train_question_writer.py has taught writes better ones."
        ]
    return lines
