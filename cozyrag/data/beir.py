"""Folders in the layout of BEIR (Thakur et al. 2021): corpus.jsonl, queries.jsonl, and judgements in qrels/SPLIT.tsv.

Left out: several relevant passages of a query (the best judged one is its gold passage), grades of relevance.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cozyrag.data.readers import read_rows
from cozyrag.data.rows import BadRows, BadValue, Columns, Row, text_of
from cozyrag.errors import InputError

_QRELS = ("query-id", "corpus-id", "score")
_SPLITS = {"validation": "dev", "dev": "validation"}  # Hub datasets and BEIR name it differently


def part_of(source: str, name: str) -> str | None:
    """The path of "corpus" or "queries" in a BEIR folder; None if the source is no such folder."""
    for extension in (".jsonl", ".jsonl.gz"):
        path = os.path.join(source, name + extension)
        if os.path.isfile(os.path.expanduser(path)):
            return path
    return None


def query_rows(source: str, path: str, split: str, columns: Columns, needs_answer: bool, bad: BadRows) -> Iterator[Row]:
    """The judged queries of a folder, as rows with these columns; `path` is its file of queries.

    Raises InputError without judgements of the split, and without any answer if there must be some.
    """
    judged = _judgements(source, split, bad)
    answered = unjudged = 0
    seen: set[str] = set()
    for row in read_rows(path, bad=bad):
        try:
            key = text_of(row.values.get("_id", row.values.get("id")), "_id")
        except BadValue as error:
            bad.add(row.where, str(error))
            continue
        seen.add(key)
        if judged is not None and key not in judged:
            unjudged += 1
            continue
        answers = _answers(row.values, columns.answer)
        answered += answers is not None
        gold = judged[key] if judged else None
        made = {columns.id: key, columns.question: row.values.get("text"), columns.answer: answers}
        yield Row(row.where, made | {columns.passage_id: gold})
    if unjudged:
        bad.note(f"{path}: {unjudged:,} queries without a relevant passage in the split {split} are left out.")
    for key in [key for key in judged or () if key not in seen]:
        bad.add(source, f'the judged query "{key}" is not in {os.path.basename(path)}')
    if needs_answer and not answered:
        raise InputError(
            f"{path}: expected answers, found none: most BEIR sets only judge passages, and a generator learns from "
            'answers. Add a column "answer" or "metadata": {"answer": ...} to the queries.'
        )


def _answers(values: Mapping[str, Any], column: str) -> object:
    metadata = values.get("metadata")
    for place in (values, metadata if isinstance(metadata, Mapping) else {}):
        for name in (column, "answer", "answers"):
            if place.get(name) is not None:
                return place[name]
    return None


def _judgements(source: str, split: str, bad: BadRows) -> dict[str, str] | None:
    """Query to the passage with its highest score above 0; None without a folder of judgements."""
    folder = os.path.join(os.path.expanduser(source), "qrels")
    if not os.path.isdir(folder):
        bad.note(f"{source}: no qrels, so the gold passages of its queries are unknown.")
        return None
    files = {name.split(".")[0]: name for name in sorted(os.listdir(folder)) if ".tsv" in name}
    name = files.get(split) or files.get(_SPLITS.get(split, ""))
    if name is None:
        raise InputError(
            f"{source}: expected qrels/{split}.tsv, found {', '.join(files.values()) or 'no file'} there. Name a split "
            "with --questions_split, --eval_split, or --split of the commands."
        )
    best: dict[str, tuple[float, str]] = {}
    several: set[str] = set()
    for row in read_rows(os.path.join(source, "qrels", name), known=_QRELS, headerless=_names, bad=bad):
        try:
            query, passage, score = row.values["query-id"], row.values["corpus-id"], float(row.values["score"])
        except (KeyError, ValueError):
            bad.add(row.where, f"expected {', '.join(_QRELS)}, found {', '.join(row.values.values())}")
            continue
        if score > 0:
            several |= {query} & best.keys()
            best[query] = max(best.get(query, (0.0, "")), (score, passage), key=lambda pair: pair[0])
    if several:
        bad.note(
            f"{source}: {len(several):,} queries have several relevant passages; the best judged one is their gold."
        )
    return {query: passage for query, (_, passage) in best.items()}


def _names(records: Sequence[Sequence[str]]) -> Sequence[str]:
    return _QRELS if len(records[0]) == len(_QRELS) else ("query-id", "iteration", "corpus-id", "score")
