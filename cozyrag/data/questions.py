"""Read questions with their answers, and the passages they come with, into tables; choose rows of them.

It exists so that training and examining see one shape whatever the file looked like: a `datasets.Dataset` with the
columns id, question, answers (a list) and passage_id (the gold passage, or null). It leaves out answer offsets,
several gold passages for a question, plausible wrong answers, and everything done to the texts later.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value

from cozyrag.data.passages import passage_id, passages_from_contexts
from cozyrag.data.readers import read_rows
from cozyrag.data.rows import BadRows, BadValue, Row, finish_columns, no_rows, text_of
from cozyrag.errors import InputError

FEATURES = Features(
    {
        "id": Value("string"),
        "question": Value("string"),
        "answers": List(Value("string")),
        "passage_id": Value("string"),
    }
)
_OTHER_NUMBER = {"answers": "answer", "answer": "answers"}


@dataclass(frozen=True)
class Questions:
    """What a source of questions held.

    table: one row per question (id: string, question: string, answers: list of strings, passage_id: string or null).
    passages: the deduplicated contexts as a passages table (id, title, text), None if no row carried one.
    report: words about the rows skipped, None without any.
    """

    table: Dataset
    passages: Dataset | None
    report: str | None


@dataclass(frozen=True, slots=True)
class _Columns:
    question: str
    answers: str
    context: str
    title: str
    id: str
    passage_id: str

    def known(self) -> tuple[str, ...]:
        other = _OTHER_NUMBER.get(self.answers)
        named = (self.question, self.answers, self.context, self.title, self.id, self.passage_id)
        return named if other is None else (*named, other)


@dataclass(frozen=True, slots=True)
class Question:
    """A row as it was read; `id` and `title` may be empty, `context` is what a row carries itself, "" for most."""

    id: str
    question: str
    answers: list[str]
    passage_id: str | None
    title: str
    context: str


def read_questions(
    source: str,
    *,
    split: str = "train",
    question_column: str = "question",
    answer_column: str = "answers",
    context_column: str = "context",
    title_column: str = "title",
    id_column: str = "id",
    passage_id_column: str = "passage_id",
    needs_answer: bool = True,
    skip_bad_rows: bool = False,
) -> Questions:
    """Read questions from a file or Hub dataset (see `tables.read_rows`); a TSV without header is question, answer.

    Answers may be a string, a list of strings or of {"text": ...}, {"text": [...]}, or null; a TSV or CSV cell is one
    answer. The columns "answer" and "answers" stand in for each other. A row with a context gets the gold passage
    `passage_id(context)`, otherwise the one in `passage_id_column`, if any. A missing id is made from question, first
    answer and gold passage. A row is bad without question, with cells of other types, and, if `needs_answer`, without
    answer.

    Raises InputError for whatever `read_rows` raises it, without question column, without answer column if
    `needs_answer`, for an id given twice, without any usable row, and for bad rows unless `skip_bad_rows`.
    """
    columns = {"question_column": question_column, "answer_column": answer_column, "context_column": context_column}
    columns |= {"title_column": title_column, "id_column": id_column, "passage_id_column": passage_id_column}
    bad, kept = BadRows(), _Kept()
    for row, question in stream_questions(source, split=split, **columns, needs_answer=needs_answer, bad=bad):
        kept.add(row.where, question)
    report = bad.finish(source, skip_bad_rows)
    if not kept.places:
        raise no_rows(source, "a question and an answer" if needs_answer else "a question")
    return Questions(kept.table(), kept.passages(), report)


def stream_questions(
    source: str,
    *,
    split: str,
    question_column: str,
    answer_column: str,
    context_column: str,
    title_column: str,
    id_column: str,
    passage_id_column: str,
    needs_answer: bool,
    bad: BadRows,
) -> Iterator[tuple[Row, Question]]:
    """The rows of a source and the questions in them, one at a time; see `read_questions`, which keeps them."""
    columns = _Columns(question_column, answer_column, context_column, title_column, id_column, passage_id_column)
    found: dict[str, None] = {}
    headerless = (question_column, answer_column)
    for row in read_rows(source, split=split, known=columns.known(), headerless=headerless, bad=bad):
        found.update(dict.fromkeys(row.values))
        try:
            yield row, _parsed(row, columns, needs_answer)
        except BadValue as problem:
            bad.add(row.where, str(problem))
    finish_columns(source, found, question_column, "--question_column")
    if needs_answer and _OTHER_NUMBER.get(answer_column) not in found:
        finish_columns(source, found, answer_column, "--answer_column")


@dataclass
class _Kept:
    """The usable rows as columns (lists go into Arrow much faster than rows), their places and their contexts."""

    places: dict[str, str] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    rows: list[Question] = field(default_factory=list)
    contexts: dict[str, str] = field(default_factory=dict)

    def add(self, where: str, row: Question) -> None:
        key = row.id or self._made_id(row)
        if key in self.places:
            raise InputError(
                f'{where}: expected a new id, found "{key}", which {self.places[key]} has already, so results could '
                "not be told apart. Correct the ids, or leave that column out to have them made."
            )
        self.places[key] = where
        self.rows.append(row)
        if row.context:
            self.contexts.setdefault(row.context, row.title)

    def _made_id(self, row: Question) -> str:
        parts = (row.question, row.answers[0] if row.answers else "", row.passage_id or "")
        key = hashlib.sha1("\n".join(parts).encode("utf-8"), usedforsecurity=False).hexdigest()[:16]
        self.repeats[key] = self.repeats.get(key, 0) + 1
        return key if self.repeats[key] == 1 else f"{key}-{self.repeats[key]}"

    def table(self) -> Dataset:
        columns = {
            "id": list(self.places),
            "question": [row.question for row in self.rows],
            "answers": [row.answers for row in self.rows],
            "passage_id": [row.passage_id for row in self.rows],
        }
        # Dataset.from_dict looks at every value once more, which takes longer than all the reading.
        return Dataset(pa.Table.from_pydict(columns, schema=FEATURES.arrow_schema))

    def passages(self) -> Dataset | None:
        if not self.contexts:
            return None
        return passages_from_contexts((title, context) for context, title in self.contexts.items())


def _parsed(row: Row, columns: _Columns, needs_answer: bool) -> Question:
    values = row.values
    question = _one_line(values, columns.question)
    if not question:
        raise BadValue("empty question")
    answers = _answers(values, columns.answers)
    if needs_answer and not answers:
        raise BadValue("empty answer")
    context = text_of(values.get(columns.context), columns.context)
    context = context if context.strip() else ""
    gold = passage_id(context) if context else _one_line(values, columns.passage_id) or None
    title = _one_line(values, columns.title) if context else ""
    return Question(_one_line(values, columns.id), question, answers, gold, title, context)


def _one_line(values: Mapping[str, Any], column: str) -> str:
    return " ".join(text_of(values.get(column), column).split())


def _answers(values: Mapping[str, Any], column: str) -> list[str]:
    """The answers of a row, stripped, without empty ones and repeats, in order."""
    if column not in values:
        column = _OTHER_NUMBER.get(column, column)
    try:
        flat = _flat(values.get(column))
    except RecursionError as problem:
        raise BadValue(f"{column} is nested too deeply") from problem
    stripped = (text_of(text, column).strip() for text in flat)
    return list(dict.fromkeys(text for text in stripped if text))


def _flat(answers: object) -> list[object]:
    """The texts in any of the accepted layouts; what is in none of them is left for `text_of` to refuse."""
    if isinstance(answers, Mapping) and "text" in answers:
        return _flat(answers["text"])
    if isinstance(answers, list):
        return [text for item in answers for text in _flat(item)]
    return [answers]


def hold_out(table: Dataset, *, share: float, limit: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split a questions table into (train, held out), both in the table's order, the same for the same seed.

    Rows with one gold passage, or without any but with one question, stay together, so no gold passage is on both
    sides. The held-out side gets min(limit, round(share * rows)) rows, at least 1; fewer if the groups do not add up to
    that number, more only if every group is larger.

    Raises InputError if share is not between 0 and 1, limit is below 1, or all rows form one group.
    """
    if not 0 < share < 1 or limit < 1:
        raise InputError(f"Expected 0 < share < 1 and limit >= 1 to hold rows out, found share {share}, limit {limit}.")
    groups = _groups(table)
    if len(groups) < 2:
        raise InputError(
            "To hold rows out, expected questions on at least two passages (or two questions without passage), found "
            f"{len(groups)} in {len(table)} rows. Add questions, or give a file of its own to examine on."
        )
    target = min(limit, max(1, round(share * len(table))), len(table) - 1)
    held = _filled(groups, target, random.Random(seed))
    return table.select([i for i in range(len(table)) if i not in held]), table.select(sorted(held))


def take(table: Dataset, limit: int | None, seed: int) -> Dataset:
    """A random sample of `limit` rows in the table's order, the same for the same seed; all rows if None or too few.

    Raises InputError if limit is below 1.
    """
    if limit is None:
        return table
    if limit < 1:
        raise InputError(f"Expected a limit of at least 1 row, found {limit}, which would leave nothing. Raise it.")
    if limit >= len(table):
        return table
    return table.select(sorted(random.Random(seed).sample(range(len(table)), limit)))


def _groups(table: Dataset) -> list[list[int]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for i, (question, gold) in enumerate(zip(table["question"][:], table["passage_id"][:], strict=True)):
        key = ("question", question) if gold is None else ("passage", gold)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _filled(groups: list[list[int]], target: int, chance: random.Random) -> set[int]:
    """Rows of whole groups in random order, as many as fit into `target`; the smallest group if none fits."""
    chance.shuffle(groups)
    held: set[int] = set()
    for group in groups:
        if len(held) + len(group) <= target:
            held.update(group)
    return held or set(min(groups, key=len))
