"""Read questions with their answers, and the passages they carry, into tables; select rows of them.

Training and evaluation see one shape whatever the file looks like: a `datasets.Dataset` with the columns id, question,
answers (a list), passage_id (the gold passage, or null) and negative_ids (passages that do not answer it).
Left out: layouts of known data sets (layouts.py), answer offsets, several gold passages for a question, plausible wrong
answers, and later changes to the texts.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cozyrag.data import beir
from cozyrag.data.layouts import known_names, passages_in, present, question_rows
from cozyrag.data.literals import literal
from cozyrag.data.passages import passage_id, passages_from_contexts
from cozyrag.data.readers import Sources, described, read_rows, sources_of
from cozyrag.data.rows import COLUMNS, BadRows, BadValue, Columns, Row, line_of, no_rows, require_column, text_of
from cozyrag.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, Features

DEEPEST = 32  # lists within lists of answers


def features() -> "Features":
    """The columns of a table of questions."""
    from datasets import Features, List, Value  # here: it takes a second, which commands that only stream do not need

    texts = dict.fromkeys(("id", "question", "answers", "passage_id", "negative_ids"), Value("string"))
    return Features(texts | {name: List(Value("string")) for name in ("answers", "negative_ids")})


@dataclass(frozen=True)
class Questions:
    """The content of a source of questions."""

    table: "Dataset"  # one row per question, with `features`; passage_id is null if unknown
    passages: "Dataset | None"  # the deduplicated contexts (id, title, text), None if no row carries one
    report: str | None  # text about skipped rows, None if there are none


@dataclass(frozen=True, slots=True)
class Question:
    """A parsed row; `id` and `title` may be empty, `context` is the gold passage that it carries itself, usually "".

    negative_ids: of passages that do not answer it. others: (title, text) of the other passages that the row carries.
    negatives: those of them that do not answer it.
    """

    id: str
    question: str
    answers: list[str]
    passage_id: str | None
    title: str
    context: str
    negative_ids: Sequence[str] = ()
    others: Sequence[tuple[str, str]] = ()
    negatives: Sequence[tuple[str, str]] = ()

    def carried(self) -> Iterator[tuple[str, str]]:
        """(title, text) of all passages in the row, the gold one first."""
        if self.context:
            yield self.title, self.context
        yield from self.negatives
        yield from self.others


def read_questions(
    source: Sources,
    *,
    split: str = "train",
    columns: Columns = COLUMNS,
    needs_answer: bool = True,
    skip_bad_rows: bool = False,
    delimiter: str | None = None,
) -> Questions:
    """Read questions from one or several files, folders or Hub datasets (see `read_rows`, `sources_of`).

    A table with tabs and without header is question, answer. Answers may be a string, a list of strings or of
    {"text": ...}, {"text": [...]}, or null; True and False are "yes" and "no". The columns "answer" and "answers" stand
    in for each other. A row with a context gets the gold passage `passage_id(context)`, otherwise the one in
    `columns.passage_id`, if any. A missing id is the hash of question, first answer and gold passage. A row is bad
    without question, with cells of other types, and, if `needs_answer`, without answer.

    Raises InputError as `read_rows`, without question column, without answer column if `needs_answer`, for an id that
    occurs twice, without any usable row, and for bad rows unless `skip_bad_rows`.
    """
    from datasets import Dataset

    bad, places, repeats, kept = BadRows(), dict[str, str](), Counter[str](), list[Question]()
    rows = stream_questions(
        source, split=split, columns=columns, needs_answer=needs_answer, delimiter=delimiter, bad=bad
    )
    for row, question in rows:
        key = question.id or _generated_id(question, repeats)
        if key in places:
            raise InputError(
                f'{row.where}: expected a new id, found "{key}", which {places[key]} has already, so results could '
                "not be told apart. Correct the ids, or leave that column out to generate them."
            )
        places[key] = row.where
        kept.append(question)
    report = bad.finish(described(source), skip_bad_rows)
    if not kept:
        raise no_rows(described(source), "a question and an answer" if needs_answer else "a question")
    cells = {
        "id": list(places),
        "question": [each.question for each in kept],
        "answers": [each.answers for each in kept],
        "passage_id": [each.passage_id for each in kept],
        "negative_ids": [list(each.negative_ids) for each in kept],
    }
    # Dataset.from_dict checks every value once more, which takes longer than reading the file.
    table = Dataset(pa.Table.from_pydict(cells, schema=features().arrow_schema))
    contexts = [passage for each in kept for passage in each.carried()]
    return Questions(table, passages_from_contexts(contexts) if contexts else None, report)


def stream_questions(
    source: Sources,
    *,
    split: str,
    columns: Columns,
    needs_answer: bool,
    bad: BadRows,
    delimiter: str | None = None,
) -> Iterator[tuple[Row, Question]]:
    """The rows of the sources and the questions in them, one at a time; see `read_questions`."""
    for each in sources_of(source):
        yield from _from_one(each, split, columns, needs_answer, bad, delimiter)


def _from_one(
    source: str, split: str, columns: Columns, needs_answer: bool, bad: BadRows, delimiter: str | None
) -> Iterator[tuple[Row, Question]]:
    found: dict[str, object] = {}
    answered = told = False  # the first unanswerable question of a file says what can be done
    for row in _rows(source, split, columns, needs_answer, bad, delimiter):
        try:
            for place, values in question_rows(row.values, columns):
                here = Row(row.where + place, values, row.written)
                own = present(tuple(values), columns)
                found |= values
                answered = answered or own.answer in values
                try:
                    question = _parsed(here, own)
                    if needs_answer and not question.answers:
                        told, why = True, _without_answer(values, own, told)
                        raise BadValue(why)
                    yield here, question
                except BadValue as error:
                    bad.add(here.where, str(error))
        except BadValue as error:
            found |= row.values
            bad.add(row.where, str(error))
    require_column(source, found, columns.question, "question")
    if needs_answer and not answered:
        require_column(source, found, columns.answer, "answer")


def _rows(
    source: str, split: str, columns: Columns, needs_answer: bool, bad: BadRows, delimiter: str | None
) -> Iterator[Row]:
    if queries := beir.part_of(source, "queries"):
        return beir.query_rows(source, queries, split, columns, needs_answer, bad)
    named = (columns.question, columns.answer)
    known = known_names(columns)
    return read_rows(source, split=split, known=known, headerless=lambda _: named, delimiter=delimiter, bad=bad)


def _without_answer(values: Mapping[str, Any], columns: Columns, told: bool) -> str:
    """Why a row without answer is bad; the first row that is meant to have none says how such rows are used."""
    cell = values.get(columns.answer)
    texts = cell.get("text") if isinstance(cell, Mapping) else cell
    if told or not (values.get("is_impossible") is True or texts == []):
        return "empty answer"
    return (
        "empty answer, as questions have that cannot be answered; --no_answer reads them, and the pair learns to "
        "abstain above a threshold that it chooses (--context_noise adds such examples); --skip_bad_rows leaves "
        "them out"
    )


def _generated_id(row: Question, repeats: Counter[str]) -> str:
    parts = (row.question, row.answers[0] if row.answers else "", row.passage_id or "")
    key = hashlib.sha1("\n".join(parts).encode("utf-8"), usedforsecurity=False).hexdigest()[:16]
    repeats[key] += 1
    return key if repeats[key] == 1 else f"{key}-{repeats[key]}"


def _parsed(row: Row, columns: Columns) -> Question:
    values = row.values
    question = line_of(values, columns.question)
    if not question:
        raise BadValue("empty question")
    answers = _answers(values.get(columns.answer), columns.answer, row.written)
    context = text_of(values.get(columns.context), columns.context)
    context = context if context.strip() else ""
    gold = passage_id(context) if context else line_of(values, columns.passage_id) or None
    title = line_of(values, columns.title) if context else ""
    negatives, others = _carried(values, "hard_negative_ctxs"), _carried(values, "ctxs")
    ids = [*_named_negatives(values.get("negative_ids")), *(passage_id(text) for _, text in negatives)]
    return Question(line_of(values, columns.id), question, answers, gold, title, context, ids, others, negatives)


def _carried(values: Mapping[str, Any], column: str) -> list[tuple[str, str]]:
    """(title, text) of the passages in a cell."""
    cell = values.get(column)
    return (
        [(line_of(each, "title"), text_of(each["text"], column)) for each in passages_in(cell, column)] if cell else []
    )


def _named_negatives(cell: object) -> list[str]:
    if cell is None:
        return []
    if not isinstance(cell, list):
        raise BadValue(f"negative_ids is a {type(cell).__name__}, expected a list of ids of passages")
    return [key for each in cell if (key := text_of(each, "negative_ids").strip())]


def _answers(value: object, column: str, written: bool) -> list[str]:
    """The answers in a cell in order, stripped, without empty ones and repeats."""
    try:
        if isinstance(value, str):
            value = literal(value, column, numbers=written)
        flat = _flat(value)
    except RecursionError as error:
        raise BadValue(f"{column} is nested too deeply") from error
    stripped = (text_of(text, column).strip() for text in flat)
    return list(dict.fromkeys(text for text in stripped if text))


def _flat(answers: object, depth: int = 0) -> list[object]:
    """The texts in any of the accepted layouts; `text_of` refuses what is in none of them.

    Raises RecursionError beyond a depth of its own: that of Python depends on its version.
    """
    if depth > DEEPEST:
        raise RecursionError
    if isinstance(answers, Mapping) and "text" in answers:
        return _flat(answers["text"], depth + 1)
    if isinstance(answers, list):
        return [text for item in answers for text in _flat(item, depth + 1)]
    if isinstance(answers, bool):
        return ["yes" if answers else "no"]
    return [answers]


def hold_out(table: "Dataset", *, share: float, limit: int, seed: int) -> tuple["Dataset", "Dataset"]:
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


def take(table: "Dataset", limit: int | None, seed: int) -> "Dataset":
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
