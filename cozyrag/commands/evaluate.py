"""Score a pair on questions with known answers: EM, F1, recall@k, answer in context, with 95 % intervals; the verdicts;
and whether its certainty can be trusted. Passages are those of the pair's own index.

examples:
  cozyrag evaluate my-rag --questions test.tsv
  cozyrag evaluate user/my-rag --questions test.jsonl --limit 500 --output scores.json
  accelerate launch --config_file accelerate_configs/cpu_ddp.yaml -m cozyrag evaluate my-rag --questions test.tsv

--output writes the scores as JSON, and every question with its prediction, certainty and verdict beside it, as
NAME.questions.jsonl. --baselines also answers without context and with the gold passage. For the untuned baseline and
tests of differences see docs/benchmarks.md.

Left out: how it is done (pair_evaluation.py).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cozyrag.commands.options import add_columns, at_least, columns_of
from cozyrag.config import parse_settings
from cozyrag.runtime.atomic_files import write_json, write_jsonl
from cozyrag.runtime.terminal import one_line, say

if TYPE_CHECKING:
    from cozyrag.pair_evaluation import Evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("model", metavar="PAIR", help="output folder of a run, or user/name on the Hub")
    add("--questions", nargs="+", required=True, metavar="FILE", help="questions with answers, any format of train.py")
    add_columns(parser, "question", "answer", "context", "id", "passage_id")
    add("--limit", type=at_least(1), metavar="N", help="a fixed sample of N questions")
    add("--batch_size", type=at_least(1), default=32, metavar="N", help="questions answered at once")
    add("--baselines", action="store_true", help="also closed book and gold context; takes three times as long")
    add("--output", type=Path, metavar="FILE", help="JSON file for the scores")


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Answer, print the tables, and write the file."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    from cozyrag.pair_evaluation import questions_for  # torch: only once the options are correct
    from cozyrag.pipeline import CozyRAG
    from cozyrag.training.setup import make_accelerator

    accelerator = make_accelerator(parse_settings([]))
    pair = CozyRAG.from_pretrained(options.model, device=str(accelerator.device)).evaluated()
    answerless = pair.threshold is not None
    how = {"columns": columns_of(options), "needs_answer": not answerless}
    table = questions_for(options.questions, pair.builder, limit=options.limit, **how)
    found = pair.on(table, accelerator, batch_size=options.batch_size, baselines=options.baselines)
    if accelerator.is_main_process:
        say(f"\n{found}")
        if options.output:
            write(options.output, found)


def write(path: Path, found: "Evaluation") -> None:
    """Write the scores, and the questions beside them."""
    write_json(path, found.summary())
    write_jsonl(path.with_suffix(".questions.jsonl"), found.rows)
    say(f"\nWritten: {one_line(path)} and {one_line(path.with_suffix('.questions.jsonl').name)}.")
