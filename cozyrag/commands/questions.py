"""`cozyrag questions`: questions of any supported layout in, one file out, and what is odd about them by file and line.

What cannot be used at all stops it, as it would stop a run; what is only odd is counted and shown, and left out on request.
Left out: judging whether an answer is right. Whether one occurs is seen by normalised words, as in training; the characters of
scripts without spaces count as words.
"""

import argparse
import gzip
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cozyrag.data.chunking import count_words, spaced
from cozyrag.data.passages import stream_passages
from cozyrag.data.questions import Question, stream_questions
from cozyrag.data.readers import kind_of
from cozyrag.data.rows import COLUMNS, BadRows, Columns, no_rows
from cozyrag.errors import InputError
from cozyrag.evaluation.metrics import normalize_answer

DESCRIPTION = """\
Make a file of questions from one or several of any layout that train.py reads, and check them.

IN is a .tsv (question, tab, answer), .csv, .jsonl, .json (rows, or the layout of SQuAD) or .parquet file, or a Hub dataset.
With --passages it is seen whether the answers occur there at all: a question whose answer no passage holds teaches nothing.

what is looked for:
  repeated      the same question with the same answers as an earlier one; left out
  disagreeing   the same question as an earlier one, with other answers
  no_passage    no answer occurs in any passage (--passages)
  not_in_gold   no answer occurs in the passage that the row names or carries
  unknown_gold  the passage that the row names is not among the passages (--passages)
  length        a question or an answer that is much longer or shorter than the others
"""
EXAMPLES = """\
examples:
  cozyrag questions qa.tsv --check_only --passages passages.jsonl
  cozyrag questions train-v1.1.json extra.csv --output questions.jsonl
  cozyrag questions qa.jsonl --passages passages.jsonl --drop no_passage length --output clean.jsonl
"""
KINDS = ("repeated", "disagreeing", "no_passage", "not_in_gold", "unknown_gold", "length")
FAR = 5.0  # times the usual spread (of logarithms) from the middle: an outlier
FEWEST = 20  # questions from which lengths can be compared


@dataclass
class Asked:
    """A question, its place, and what is odd about it: kind to words."""

    where: str
    question: Question
    odd: dict[str, str] = field(default_factory=dict)

    def row(self) -> dict:
        """The row of the output; what it does not have is left out."""
        facts = vars_of(self.question)
        return {name: value for name, value in facts.items() if value or name in ("question", "answers")}


def vars_of(question: Question) -> dict:
    """The columns of a question; its gold passage goes by text where it carries it."""
    carried = {"title": question.title, "context": question.context}
    named = {"passage_id": question.passage_id} if not question.context else carried
    return {"id": question.id, "question": question.question, "answers": question.answers, **named}


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """The command. Raises InputError for what the user can put right."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if not options.output and not options.check_only:
        parser.error("give --output FILE, or --check_only")
    if options.output and kind_of(options.output) != ".jsonl":
        raise InputError(f"--output {options.output}: expected a name that ends in .jsonl or .jsonl.gz. Choose one.")
    if options.output and any(os.path.abspath(options.output) == os.path.abspath(each) for each in options.inputs):
        raise InputError(
            f"--output {options.output} is an input as well and would be overwritten. Choose another name."
        )
    bad = BadRows()
    asked = list(_read(options, bad))
    report = bad.finish(", ".join(options.inputs), options.skip_bad_rows or options.check_only)
    if not asked:
        raise no_rows(", ".join(options.inputs), "a question and an answer")
    check(asked, passages=options.passages, columns=Columns.of(vars(options)), split=options.split)
    drop = {"repeated", *options.drop}
    kept = [each for each in asked if not drop & each.odd.keys()]
    print(_formatted(asked, kept, options, report))
    if not options.check_only:
        _write(options.output, kept)
        _write_summary(options, asked, kept, bad)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IN", help="file or Hub dataset")
    add("--output", metavar="FILE", help=".jsonl or .jsonl.gz; an older one is replaced")
    add("--check_only", action="store_true", help="say what was found, write nothing")
    add("--passages", metavar="FILE", help="passages that should hold the answers, as train.py takes them")
    add("--drop", nargs="+", choices=KINDS, default=[], metavar="KIND", help=f"leave out what is odd in this way too: {', '.join(KINDS)}")  # fmt: skip
    add("--examples", type=int, default=3, metavar="N", help="of each kind to show (default: 3)")
    add("--split", default="train", help="split of Hub datasets (default: train)")
    add("--no_answer", action="store_true", help="questions without an answer are meant so")
    for name, column in asdict(COLUMNS).items():
        add(f"--{name}_column", default=column, help=f"default: {column}")
    add("--skip_bad_rows", action="store_true", help="count, list and skip unusable rows instead of stopping")


def _read(options: argparse.Namespace, bad: BadRows) -> Iterator[Asked]:
    columns = Columns.of(vars(options))
    seen: dict[str, str] = {}
    for source in options.inputs:
        needs_answer = not options.no_answer
        rows = stream_questions(source, split=options.split, columns=columns, needs_answer=needs_answer, bad=bad)
        for row, question in rows:
            if question.id and question.id in seen:
                bad.add(row.where, f'the id "{question.id}" was given at {seen[question.id]} already')
                continue
            if question.id:
                seen[question.id] = row.where
            yield Asked(row.where, question)


# -------------------------------------------------------------------------------------------------------- the checks


def check(asked: Sequence[Asked], *, passages: str | None, columns: Columns, split: str) -> None:
    """Note in each question what is odd about it; `columns` and `split` are those of the passage file."""
    _check_repeats(asked)
    _check_lengths(asked)
    for each in asked:
        context = each.question.context
        if context and each.question.answers and not Wanted([each.question.answers]).found_in(context):
            each.odd["not_in_gold"] = f"no answer ({_short(each)}) in the text that the row carries"
    if passages is not None:
        _check_passages(asked, passages, columns, split)


def _check_repeats(asked: Iterable[Asked]) -> None:
    first: dict[str, Asked] = {}
    for each in asked:
        key = " ".join(each.question.question.lower().split())
        earlier = first.setdefault(key, each)
        if earlier is each:
            continue
        same = set(earlier.question.answers) == set(each.question.answers)
        same = same and earlier.question.passage_id == each.question.passage_id
        kind = "repeated" if same else "disagreeing"
        each.odd[kind] = f'"{each.question.question[:60]}" was asked at {earlier.where}{"" if same else ", with another answer or passage"}'  # fmt: skip


def _check_lengths(asked: Sequence[Asked]) -> None:
    """Outliers by logarithms of words against median and median absolute deviation, which outliers themselves do not move."""
    texts = {
        "question": [(each, each.question.question) for each in asked],
        "answer": [(each, text) for each in asked for text in each.question.answers[:1]],
    }
    for name, pairs in texts.items():
        if len(pairs) < FEWEST:
            continue
        logs = np.log([max(count_words(text), 0.5) for _, text in pairs])
        middle = np.median(logs)
        spread = max(1.4826 * np.median(np.abs(logs - middle)), 0.3)
        for place in np.flatnonzero(np.abs(logs - middle) > FAR * spread):
            each, text = pairs[place]
            each.odd["length"] = (
                f'{name} of {count_words(text):.0f} words, most have about {np.exp(middle):.0f}: "{text[:60]}"'
            )


def _check_passages(asked: Sequence[Asked], passages: str, columns: Columns, split: str) -> None:
    wanted, known = Wanted(each.question.answers for each in asked), set()
    named: dict[str, list[Asked]] = {}
    for each in asked:
        if each.question.passage_id and not each.question.context:
            named.setdefault(each.question.passage_id, []).append(each)
    bad = BadRows()
    size = os.path.getsize(passages) if os.path.exists(passages) else None
    with tqdm(total=size, desc="looking for answers", unit="B", unit_scale=True) as bar:
        progress = bar.update if size else None
        for _, key, _, text in stream_passages(passages, split=split, columns=columns, bad=bad, progress=progress):
            wanted.look_in(text)
            for each in named.get(key, ()):
                known.add(key)
                if each.question.answers and not Wanted([each.question.answers]).found_in(text):
                    each.odd["not_in_gold"] = f"no answer ({_short(each)}) in its passage {key}"
    for each in asked:
        if each.question.answers and not wanted.seen(each.question.answers):
            each.odd["no_passage"] = f"no answer ({_short(each)}) in any passage"
        if each.question.passage_id in named and each.question.passage_id not in known:
            each.odd["unknown_gold"] = f"its passage {each.question.passage_id} is not among the passages"


def _short(each: Asked) -> str:
    return "; ".join(f'"{answer[:40]}"' for answer in each.question.answers[:2])


class Wanted:
    """Answers, to be looked for in one text after another: by first word, then by the runs of words that begin with it."""

    def __init__(self, answers: Iterable[Sequence[str]]):
        self._left = {words for each in answers for text in each if (words := _words(text))}
        self._found: set[tuple[str, ...]] = set()
        self._lengths: dict[str, set[int]] = {}
        for words in self._left:
            self._lengths.setdefault(words[0], set()).add(len(words))

    def look_in(self, text: str) -> None:
        """Note which answers this text holds."""
        words = _words(text)
        for place, word in enumerate(words):
            for length in self._lengths.get(word, ()):
                run = words[place : place + length]
                if run in self._left:
                    self._left.discard(run)
                    self._found.add(run)

    def seen(self, answers: Sequence[str]) -> bool:
        """Whether one of them was in some text."""
        return any(_words(answer) in self._found for answer in answers)

    def found_in(self, text: str) -> bool:
        """Whether this text holds one of the answers."""
        self.look_in(text)
        return bool(self._found)


def _words(text: str) -> tuple[str, ...]:
    return tuple(spaced(normalize_answer(text)).split())


# --------------------------------------------------------------------------------------------------------- the report


def _formatted(asked: Sequence[Asked], kept: Sequence[Asked], options: argparse.Namespace, report: str | None) -> str:
    lines = [report] if report else []
    for kind in KINDS:
        odd = [each for each in asked if kind in each.odd]
        if odd:
            lines.append(f"{kind}: {len(odd):,} of {len(asked):,}")
            lines += [f"  {each.where}: {each.odd[kind]}" for each in odd[: options.examples]]
    unchecked = "" if options.passages else " (not whether passages hold the answers: no --passages)"
    lines += [] if any(each.odd for each in asked) else [f"Nothing odd{unchecked}."]
    where = "would be kept" if options.check_only else f"written to {options.output}"
    return "\n".join([*lines, f"{len(asked):,} questions read, {len(kept):,} {where}."])


def _write(output: str, kept: Sequence[Asked]) -> None:
    beside = f"{output}.{os.getpid()}"
    packed = output.lower().endswith(".gz")
    with gzip.open(beside, "wt", 6, "utf-8") if packed else open(beside, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(each.row(), ensure_ascii=False) + "\n" for each in kept)
    os.replace(beside, output)


def _write_summary(options: argparse.Namespace, asked: Sequence[Asked], kept: Sequence[Asked], bad: BadRows) -> None:
    odd = Counter(kind for each in asked for kind in each.odd)
    facts = {
        "read": len(asked),
        "kept": len(kept),
        "bad_rows": bad.count,
        "bad_rows_first": bad.first,
        "odd": dict(odd),
    }
    path = Path(f"{os.path.splitext(options.output.removesuffix('.gz'))[0]}.summary.json")
    path.write_text(json.dumps(facts | {"settings": vars(options)}, indent=2, ensure_ascii=False) + "\n", "utf-8")
