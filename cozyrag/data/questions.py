"""Read questions with their answers, and the passages they carry, into tables; select rows of them.

Training and evaluation see one shape whatever the file looks like: a `datasets.Dataset` with the columns id, question,
answers (a list) and passage_id (the gold passage, or null). Left out: answer offsets, several gold passages for a
question, plausible wrong answers, and later changes to the texts.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value

from cozyrag.data.passages import passage_id, passages_from_contexts
from cozyrag.data.readers import read_rows
from cozyrag.data.rows import COLUMNS, BadRows, BadValue, Columns, Row, line_of, no_rows, require_column, text_of
from cozyrag.errors import InputError

_STRING = Value("string")
FEATURES = Features({"id": _STRING, "question": _STRING, "answers": List(_STRING), "passage_id": _STRING})
_OTHER_NUMBER = {"answers": "answer", "answer": "answers"}


@dataclass(frozen=True)
class Questions:
    """The content of a source of questions."""

    table: Dataset  # one row per question, with FEATURES; passage_id is null if unknown
    passages: Dataset | None  # the deduplicated contexts (id, title, text), None if no row carries one
    report: str | None  # text about skipped rows, None if there are none


@dataclass(frozen=True, slots=True)
class Question:
    """A parsed row; `id` and `title` may be empty, `context` is the passage that the row itself carries, usually ""."""

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
    columns: Columns = COLUMNS,
    needs_answer: bool = True,
    skip_bad_rows: bool = False,
) -> Questions:
    """Read questions from a file or Hub dataset (see `read_rows`); a TSV without header is question, answer.

    Answers may be a string, a list of strings or of {"text": ...}, {"text": [...]}, or null; a TSV or CSV cell is one
    answer. The columns "answer" and "answers" stand in for each other. A row with a context gets the gold passage
    `passage_id(context)`, otherwise the one in `columns.passage_id`, if any. A missing id is the hash of question,
    first answer and gold passage. A row is bad without question, with cells of other types, and, if `needs_answer`,
    without answer.

    Raises InputError as `read_rows`, without question column, without answer column if `needs_answer`, for an id that
    occurs twice, without any usable row, and for bad rows unless `skip_bad_rows`.
    """
    bad, places, repeats, kept = BadRows(), dict[str, str](), Counter[str](), list[Question]()
    for row, question in stream_questions(source, split=split, columns=columns, needs_answer=needs_answer, bad=bad):
        key = question.id or _generated_id(question, repeats)
        if key in places:
            raise InputError(
                f'{row.where}: expected a new id, found "{key}", which {places[key]} has already, so results could '
                "not be told apart. Correct the ids, or leave that column out to generate them."
            )
        places[key] = row.where
        kept.append(question)
    report = bad.finish(source, skip_bad_rows)
    if not kept:
        raise no_rows(source, "a question and an answer" if needs_answer else "a question")
    cells = {
        "id": list(places),
        "question": [each.question for each in kept],
        "answers": [each.answers for each in kept],
        "passage_id": [each.passage_id for each in kept],
    }
    # Dataset.from_dict checks every value once more, which takes longer than reading the file.
    table = Dataset(pa.Table.from_pydict(cells, schema=FEATURES.arrow_schema))
    contexts = [(each.title, each.context) for each in kept if each.context]
    return Questions(table, passages_from_contexts(contexts) if contexts else None, report)


def stream_questions(
    source: str, *, split: str, columns: Columns, needs_answer: bool, bad: BadRows
) -> Iterator[tuple[Row, Question]]:
    """The rows of a source and the questions in them, one at a time; see `read_questions`."""
    found: dict[str, None] = {}
    named = (columns.question, columns.answer, columns.context, columns.title, columns.id, columns.passage_id)
    other = _OTHER_NUMBER.get(columns.answer)
    known = (*named, other) if other else named
    for row in read_rows(source, split=split, known=known, headerless=named[:2], bad=bad):
        found.update(dict.fromkeys(row.values))
        try:
            yield row, _parsed(row.values, columns, needs_answer)
        except BadValue as error:
            bad.add(row.where, str(error))
    require_column(source, found, columns.question, "question")
    if needs_answer and other not in found:
        require_column(source, found, columns.answer, "answer")


def _generated_id(row: Question, repeats: Counter[str]) -> str:
    parts = (row.question, row.answers[0] if row.answers else "", row.passage_id or "")
    key = hashlib.sha1("\n".join(parts).encode("utf-8"), usedforsecurity=False).hexdigest()[:16]
    repeats[key] += 1
    return key if repeats[key] == 1 else f"{key}-{repeats[key]}"


def _parsed(values: Mapping[str, Any], columns: Columns, needs_answer: bool) -> Question:
    question = line_of(values, columns.question)
    if not question:
        raise BadValue("empty question")
    answers = _answers(values, columns.answer)
    if needs_answer and not answers:
        raise BadValue("empty answer")
    context = text_of(values.get(columns.context), columns.context)
    context = context if context.strip() else ""
    gold = passage_id(context) if context else line_of(values, columns.passage_id) or None
    title = line_of(values, columns.title) if context else ""
    return Question(line_of(values, columns.id), question, answers, gold, title, context)


def _answers(values: Mapping[str, Any], column: str) -> list[str]:
    """The answers of a row in order, stripped, without empty ones and repeats."""
    if column not in values:
        column = _OTHER_NUMBER.get(column, column)
    try:
        flat = _flat(values.get(column))
    except RecursionError as error:
        raise BadValue(f"{column} is nested too deeply") from error
    stripped = (text_of(text, column).strip() for text in flat)
    return list(dict.fromkeys(text for text in stripped if text))


def _flat(answers: object) -> list[object]:
    """The texts in any of the accepted layouts; `text_of` refuses what is in none of them."""
    if isinstance(answers, Mapping) and "text" in answers:
        return _flat(answers["text"])
    if isinstance(answers, list):
        return [text for item in answers for text in _flat(item)]
    return [answers]


def hold_out(table: Dataset, *, share: float, limit: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split a questions table into (train, held out), both in the table's order; the same seed gives the same split.

    Rows with the same gold passage (or question, if it is unknown) stay together. The held-out side gets
    min(limit, round(share * rows)) rows, at least 1; fewer if the groups do not add up, more only if all are larger.

    Raises InputError if share is not between 0 and 1, limit is below 1, or all rows form one group.
    """
    if not 0 < share < 1 or limit < 1:
        raise InputError(f"Expected 0 < share < 1 and limit >= 1 to hold rows out, found share {share}, limit {limit}.")
    groups: dict[tuple[str, str], list[int]] = {}
    for i, (question, gold) in enumerate(zip(table["question"][:], table["passage_id"][:], strict=True)):
        groups.setdefault(("question", question) if gold is None else ("passage", gold), []).append(i)
    if len(groups) < 2:
        raise InputError(
            "To hold rows out, expected questions on at least two passages (or two questions without passage), found "
            f"{len(groups)} in {len(table)} rows. Add questions, or give a separate file of validation questions."
        )
    target = min(limit, max(1, round(share * len(table))), len(table) - 1)
    held = _held_out(list(groups.values()), target, random.Random(seed))
    return table.select([i for i in range(len(table)) if i not in held]), table.select(sorted(held))


def _held_out(groups: list[list[int]], target: int, chance: random.Random) -> set[int]:
    """Rows of whole groups in random order, as many as fit into `target`; the smallest group if none fits."""
    chance.shuffle(groups)
    held: set[int] = set()
    for group in groups:
        if len(held) + len(group) <= target:
            held.update(group)
    smallest = min(groups, key=len)
    return held or set(smallest)


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
