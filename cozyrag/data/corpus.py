"""The three tables of a run: training questions, validation questions, passages.

Passages come from a file of their own or from the contexts that questions carry; without a file of validation questions
a share of the training questions is held out. Left out: the file formats (readers.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from datasets import Dataset

from cozyrag.data.passages import merge_passages, read_column, read_passages, rows_of
from cozyrag.data.questions import Questions, hold_out, read_questions, take
from cozyrag.data.readers import Sources, described
from cozyrag.data.rows import Columns
from cozyrag.errors import InputError


@dataclass(frozen=True)
class Corpus:
    """Tables with the columns of questions.py and passages.py."""

    questions: Dataset
    eval_questions: Dataset
    passages: Dataset


def load_corpus(
    *,
    questions: Sources,
    eval_questions: Sources | None,
    passages: Sources | None,
    indexed: Callable[[], Dataset] | None = None,
    questions_split: str,
    eval_split: str,
    passages_split: str,
    columns: Columns,
    max_questions: int | None,
    max_eval_questions: int | None,
    eval_share: float,
    skip_bad_rows: bool,
    needs_answer: bool = True,
    delimiter: str | None = None,
    seed: int,
    info: Callable[[str], None],
) -> Corpus:
    """Read the tables; `info` receives one line for each setting with skipped rows or notes.

    `indexed` gives the passages of an index, which are searched if `passages` is None.

    See `read_questions` for columns, bad rows, `needs_answer` and `delimiter`.

    Raises:
        InputError: a file that cannot be used; no passages in any file; a gold id that no passage has.
    """
    reading: dict[str, Any] = {"columns": columns, "skip_bad_rows": skip_bad_rows, "delimiter": delimiter}
    train = read_questions(questions, split=questions_split, needs_answer=needs_answer, **reading)
    validation = train
    if eval_questions is not None:
        validation = read_questions(eval_questions, split=eval_split, needs_answer=needs_answer, **reading)
    for report in filter(None, dict.fromkeys((train.report, validation.report))):
        info(report)
    if passages is not None:
        pool, skipped = read_passages(passages, split=passages_split, **reading)
        if skipped:
            info(skipped)
    elif indexed is not None:
        pool = indexed()
    elif carried := [table for table in (train.passages, validation.passages) if table is not None]:
        pool = merge_passages(carried)
    else:
        raise InputError(
            f"Expected passages to search: {described(questions)} carries no contexts (column {columns.context!r}) and "
            "--passages was not given. Give --passages FILE, or a question file with contexts."
        )
    train_table = _with_known(train, pool, described(questions), info)
    if eval_questions is None:
        limit = max_eval_questions or len(train_table)
        train_table, validation_table = hold_out(train_table, share=eval_share, limit=limit, seed=seed)
    else:
        validation_table = _with_known(validation, pool, described(eval_questions), info)
    return Corpus(take(train_table, max_questions, seed), take(validation_table, max_eval_questions, seed), pool)


def _with_known(questions: Questions, passages: Dataset, source: str, info: Callable[[str], None]) -> Dataset:
    """The questions table with ids of gold passages and hard negatives that are among the passages.

    A gold id that the question file names and no passage has is an error: it would silently become "unknown". A passage
    in the question file is looked up among the passages by its text; one that is missing there is unknown, and counted,
    as is a hard negative.
    """
    columns, place = questions.table[:], dict[str, str | None]()
    known = _known_ids(passages, columns)
    if questions.passages is not None:
        place = _by_text(passages, questions.passages)
        known |= set(filter(None, place.values()))
        named = sum(gold is not None for gold in columns["passage_id"])
        columns["passage_id"] = [gold if gold in known else place.get(gold, gold) for gold in columns["passage_id"]]
        if unknown := named - sum(gold is not None for gold in columns["passage_id"]):
            info(
                f"{source}: the contexts of {unknown} of {len(questions.table)} questions are not among the passages, "
                "so their gold passage is unknown."
            )
    for row_id, gold in zip(columns["id"], columns["passage_id"], strict=True):
        if gold is not None and gold not in known:
            raise InputError(
                f"{source}, question {row_id!r}: its gold passage {gold!r} is not among the {len(passages)} passages. "
                "Give the passage file that belongs to the questions, or remove the passage_id column."
            )
    negatives = [[key if key in known else place.get(key) for key in keys] for keys in columns["negative_ids"]]
    columns["negative_ids"] = [list(dict.fromkeys(filter(None, keys))) for keys in negatives]
    if lost := sum(key is None for keys in negatives for key in keys):
        info(f"{source}: {lost} hard negatives are not among the passages and are not used.")
    return Dataset.from_dict(columns, features=questions.table.features)


def _known_ids(passages: Dataset, columns: dict[str, list]) -> set[str]:
    """The gold passages and hard negatives of questions that are among the passages."""
    return set(rows_of(read_column(passages, "id"), chain(columns["passage_id"], *columns["negative_ids"])))


def _by_text(passages: Dataset, carried: Dataset) -> dict[str, str | None]:
    """The id among the passages of each passage of a question file, by its own id; None if no passage has its text."""
    own = dict(zip(carried["id"][:], carried["text"][:], strict=True))
    row_of = rows_of(read_column(passages, "text"), own.values())
    ids = dict(zip(row_of.values(), passages.select(list(row_of.values()))["id"][:], strict=True))
    return {key: ids[row_of[text]] if text in row_of else None for key, text in own.items()}


def gold_ids(questions: Dataset, own: Dataset | None, ids: Sequence[str], texts: Sequence[str]) -> Dataset:
    """The questions with the ids of their gold passages among others: matched by id, else by text, else None.

    Unlike in a run, gold passages that are not there are no error: the questions may be of another corpus.

    Args:
        own: the passages that the question file contains, if any. ids, texts: of the passages searched.
    """
    columns = questions[:]
    carried = own[:] if own is not None else {"id": [], "text": []}
    known, by_text = rows_of(ids, columns["passage_id"]), rows_of(texts, carried["text"])
    place = {
        key: ids[by_text[text]] if text in by_text else None
        for key, text in zip(carried["id"], carried["text"], strict=True)
    }
    columns["passage_id"] = [key if key in known else place.get(key) for key in columns["passage_id"]]
    return Dataset.from_dict(columns, features=questions.features)
