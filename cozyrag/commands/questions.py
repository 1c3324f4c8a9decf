"""Merge one or several files of questions, in any layout that train.py reads, into one, and check them.

Without questions, `cozyrag questions --from PASSAGES --output FILE` makes them from passages;
`cozyrag questions --from --help` explains how. Otherwise:

IN is a .tsv (question, tab, answer), .csv, .jsonl, .json (rows, or the layout of a known data set),
.parquet or .arrow file, a pattern of such names in quotes, a folder of save_to_disk or in the BEIR
layout, or a Hub dataset. With --passages, answers are looked up there: a question whose answer is in no
passage cannot be learned from them.

Rows that cannot be used stop the command. An answer occurs in a text if its words do, without case,
punctuation, articles and differences of typing (quote marks, dashes, composed accents); the
characters of scripts without spaces count as words.

problems:
  repeated      same question and answers as an earlier one; left out
  disagreeing   same question as an earlier one, with other answers
  no_words      no answer has a letter or a digit, so it cannot be looked up in a text
  no_passage    no answer occurs in any passage (--passages)
  not_in_gold   no answer occurs in the passage that the row names or carries
  unknown_gold  the passage that the row names is not among the passages (--passages)
  length        a question or an answer that is much longer or shorter than the others

examples:
  cozyrag questions qa.tsv --check_only --passages passages.jsonl
  cozyrag questions train-v1.1.json extra.csv --output questions.jsonl
  cozyrag questions qa.jsonl --passages passages.jsonl --drop no_passage length --output clean.jsonl
  cozyrag questions --from passages.jsonl --output qa.jsonl

Left out: judging whether an answer is correct, making questions (commands/question_making.py).
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cozyrag.commands import question_making
from cozyrag.commands.options import add_columns, add_delimiter, columns_of
from cozyrag.data.chunking import count_words
from cozyrag.data.ingest_assemble import check_destination, summary_path
from cozyrag.data.matching import fold, word_forms, words
from cozyrag.data.passages import stream_passages
from cozyrag.data.questions import Question, stream_questions
from cozyrag.data.readers import Sources, size_of
from cozyrag.data.rows import COLUMNS, BadRows, Columns, no_rows, printable
from cozyrag.runtime.atomic_files import replacing_file, write_text
from cozyrag.runtime.json_lines import json_line, open_for_lines
from cozyrag.runtime.terminal import one_line, say

MAKING = "--from"  # makes questions instead, with options of its own
OUTPUTS = (".jsonl", ".jsonl.gz")
KINDS = ("repeated", "disagreeing", "no_words", "no_passage", "not_in_gold", "unknown_gold", "length")
FAR = 5.0  # an outlier in length is this many robust standard deviations (of logarithms) from the median
FEWEST = 20  # questions needed to compare lengths


@dataclass
class Checked:
    """A question, its place, and its problems: kind to message."""

    where: str
    question: Question
    problems: dict[str, str] = field(default_factory=dict)

    def row(self) -> dict:
        """The row of the output without empty columns; a gold passage that the row carries replaces its id."""
        found = asdict(self.question)
        names = ("title", "context") if self.question.context else ("passage_id",)
        kept = {name: found[name] for name in ("id", "question", "answers", *names)}
        for name, passages in {"ctxs": self.question.others, "hard_negative_ctxs": self.question.negatives}.items():
            kept[name] = [{"title": title, "text": text} for title, text in passages]
        if not self.question.negatives:
            kept["negative_ids"] = list(self.question.negative_ids)
        return {name: value for name, value in kept.items() if value or name in ("question", "answers")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IN", help="file, folder or Hub dataset")
    add("--output", metavar="FILE", help=".jsonl or .jsonl.gz; an existing one is replaced")
    add("--check_only", action="store_true", help="report problems, write nothing")
    add("--passages", nargs="+", metavar="FILE", help="passages that should contain the answers, as for train.py")
    help = "leave out questions with these problems too: %(choices)s"
    add("--drop", nargs="+", choices=KINDS, default=[], metavar="KIND", help=help)
    add("--examples", type=int, default=3, metavar="N", help="examples of each problem to show")
    add("--split", default="train", help="split of Hub datasets")
    add("--no_answer", action="store_true", help="accept questions without an answer")
    add_columns(parser, *asdict(COLUMNS))
    add_delimiter(parser)
    add("--skip_bad_rows", action="store_true", help="count, list and skip unusable rows instead of stopping")


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Check the questions, print the problems, and write the rest. Raises InputError for unusable inputs."""
    if any(word == MAKING or word.startswith(f"{MAKING}=") for word in arguments):
        parser.description = (question_making.__doc__ or "").partition("\nLeft out:")[0]
        return question_making.main(arguments, parser)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if not options.output and not options.check_only:
        parser.error("give --output FILE, or --check_only")
    if options.output:
        check_destination(options.output, options.inputs, OUTPUTS)
    bad, columns, sources = BadRows(), columns_of(options), ", ".join(options.inputs)
    checked = list(_read(options, columns, bad))
    report = bad.finish(sources, options.skip_bad_rows or options.check_only)
    if not checked:
        raise no_rows(sources, "a question and an answer")
    check(checked, passages=options.passages, columns=columns, split=options.split, delimiter=options.delimiter)
    drop = {"repeated", *options.drop}
    kept = [each for each in checked if not drop & each.problems.keys()]
    say(_report(checked, kept, options, report))
    if not options.check_only:
        _write(options.output, kept)
        _write_summary(options, checked, len(kept), bad)


def _read(options: argparse.Namespace, columns: Columns, bad: BadRows) -> Iterator[Checked]:
    seen: dict[str, str] = {}
    rows = stream_questions(
        options.inputs,
        split=options.split,
        columns=columns,
        needs_answer=not options.no_answer,
        delimiter=options.delimiter,
        bad=bad,
    )
    for row, question in rows:
        if question.id and seen.setdefault(question.id, row.where) is not row.where:
            bad.add(row.where, f'the id "{question.id}" was given at {seen[question.id]} already')
        else:
            yield Checked(row.where, question)


# ---- the checks


def check(
    checked: Sequence[Checked],
    *,
    passages: Sources | None,
    columns: Columns,
    split: str,
    delimiter: str | None = None,
) -> None:
    """Add the problems of each question to it; `columns`, `split` and `delimiter` are those of the passage files."""
    _check_repeats(checked)
    _check_lengths(checked)
    for each in checked:
        context, answers = each.question.context, each.question.answers
        if answers and not any(map(words, answers)):
            each.problems["no_words"] = f"no letter or digit in the answer ({_short(each)})"
        elif context and answers and not AnswerSearch([answers]).found_in(context):
            each.problems["not_in_gold"] = f"no answer ({_short(each)}) in the text that the row carries"
    if passages is not None:
        _check_passages(checked, passages, columns, split, delimiter)


def _check_repeats(checked: Iterable[Checked]) -> None:
    first: dict[str, Checked] = {}
    for each in checked:
        question = each.question
        earlier = first.setdefault(" ".join(fold(question.question).split()), each)
        if earlier is each:
            continue
        same = set(earlier.question.answers) == set(question.answers)
        same = same and earlier.question.passage_id == question.passage_id
        message = f'"{question.question[:60]}" was asked at {earlier.where}'
        if same:
            each.problems["repeated"] = message
        else:
            each.problems["disagreeing"] = f"{message}, with another answer or passage"


def _check_lengths(checked: Sequence[Checked]) -> None:
    """Outliers by logarithms of words against median and median absolute deviation, which outliers do not move."""
    texts = {
        "question": [(each, each.question.question) for each in checked],
        "answer": [(each, text) for each in checked for text in each.question.answers[:1]],
    }
    for name, pairs in texts.items():
        if len(pairs) < FEWEST:
            continue
        logs = np.log([max(count_words(text), 0.5) for _, text in pairs])
        middle = np.median(logs)
        spread = max(1.4826 * np.median(np.abs(logs - middle)), 0.3)
        for place in np.flatnonzero(np.abs(logs - middle) > FAR * spread):
            each, text = pairs[place]
            usual = f"most have about {np.exp(middle):.0f}"
            each.problems["length"] = f'{name} of {count_words(text):.0f} words, {usual}: "{text[:60]}"'


def _check_passages(
    checked: Sequence[Checked], passages: Sources, columns: Columns, split: str, delimiter: str | None
) -> None:
    search, known = AnswerSearch(each.question.answers for each in checked), set()
    named: dict[str, list[Checked]] = {}
    for each in checked:
        if each.question.passage_id and not each.question.context:
            named.setdefault(each.question.passage_id, []).append(each)
    bad = BadRows()  # train.py refuses them; here they hold no answer
    size = size_of(passages)
    reading: dict[str, Any] = {"split": split, "columns": columns, "delimiter": delimiter, "bad": bad}
    with tqdm(total=size, desc="searching for answers", unit="B", unit_scale=True) as bar:
        for _, key, _, text in stream_passages(passages, **reading, progress=bar.update if size else None):
            search.add_text(text)
            for each in named.get(key, ()):
                known.add(key)
                if _can_be_found(each) and not AnswerSearch([each.question.answers]).found_in(text):
                    each.problems["not_in_gold"] = f"no answer ({_short(each)}) in its passage {key}"
    for each in checked:
        if _can_be_found(each) and not search.has_found(each.question.answers):
            each.problems["no_passage"] = f"no answer ({_short(each)}) in any passage"
        if each.question.passage_id in named and each.question.passage_id not in known:
            each.problems["unknown_gold"] = f"its passage {each.question.passage_id} is not among the passages"


def _can_be_found(each: Checked) -> bool:
    return bool(each.question.answers) and "no_words" not in each.problems


def _short(each: Checked) -> str:
    return "; ".join(f'"{answer[:40]}"' for answer in each.question.answers[:2])


class AnswerSearch:
    """Searches texts for many answers at once: by their first words, then by the word sequences that start there."""

    def __init__(self, answers: Iterable[Sequence[str]]):
        self._left = {form for each in answers for text in each for form in word_forms(text) if form}
        self._found: set[tuple[str, ...]] = set()
        self._lengths: dict[str, set[int]] = {}
        for form in self._left:
            self._lengths.setdefault(form[0], set()).add(len(form))

    def add_text(self, text: str) -> None:
        """Record which answers this text contains."""
        for form in word_forms(text):
            for place, word in enumerate(form):
                for length in self._lengths.get(word, ()):
                    run = form[place : place + length]
                    if run in self._left:
                        self._left.discard(run)
                        self._found.add(run)

    def has_found(self, answers: Sequence[str]) -> bool:
        """Whether one of these answers was in some text."""
        return any(form in self._found for answer in answers for form in word_forms(answer))

    def found_in(self, text: str) -> bool:
        """Whether an answer is in this text or an earlier one."""
        self.add_text(text)
        return bool(self._found)


# ---- the report


def _report(checked: Sequence[Checked], kept: Sequence[Checked], options: argparse.Namespace, bad: str | None) -> str:
    lines = [bad] if bad else []
    for kind in KINDS:
        found = [each for each in checked if kind in each.problems]
        if found:
            lines.append(f"{kind}: {len(found):,} of {len(checked):,}")
            lines += [f"  {one_line(f'{each.where}: {each.problems[kind]}')}" for each in found[: options.examples]]
    if not any(each.problems for each in checked):
        lines.append("No problems." if options.passages else "No problems; answers were not looked up (no --passages).")
    where = "would be kept" if options.check_only else f"written to {one_line(options.output)}"
    return "\n".join([*lines, f"{len(checked):,} questions read, {len(kept):,} {where}."])


def _write(output: str, kept: Sequence[Checked]) -> None:
    with replacing_file(Path(output)) as beside, open_for_lines(beside, packed=output.lower().endswith(".gz")) as file:
        file.writelines(json_line(each.row()) for each in kept)


def _write_summary(options: argparse.Namespace, checked: Sequence[Checked], kept: int, bad: BadRows) -> None:
    odd = dict(Counter(kind for each in checked for kind in each.problems))
    facts = {"read": len(checked), "kept": kept, "bad_rows": bad.count, "bad_rows_first": bad.first, "odd": odd}
    facts["settings"] = vars(options)
    write_text(summary_path(options.output), printable(json.dumps(facts, indent=2, ensure_ascii=False) + "\n"))
