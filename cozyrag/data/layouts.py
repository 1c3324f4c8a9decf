"""Rows of known data sets, recognised by their keys, as rows with the columns of this package.

Each layout is one function in LAYOUTS, so that JSON files, Parquet files and Hub datasets share it. Besides the columns
in `Columns`, a row may carry "ctxs" and "hard_negative_ctxs": more passages, the latter of them hard negatives.
Left out: reading files (readers.py), BEIR folders (beir.py), offsets of answers, earlier turns of a conversation.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from cozyrag.data.matching import contains_answer, matching_form
from cozyrag.data.rows import BadValue, Columns
from cozyrag.errors import InputError

Values = Mapping[str, Any]
Found = list[tuple[str, dict[str, Any]]]  # (place within the row, columns)
# Column names that are read if the usual one is missing and no other was given.
ALIASES = {
    "id": ("_id",),
    "answers": ("answer", "possible_answers", "golden_answers", "gold_answers", "ground_truth", "ground_truths"),
    "answer": ("answers",),
    "text": ("passage", "content", "contents"),
}
_USUAL = Columns()
_ANSWERS = ("answer", "answers")
NO_ANSWER = ("<unk>",)  # the answer of TriviaQA's test questions


def question_rows(values: dict[str, Any], columns: Columns) -> Found:
    """The questions in a row, each with its place in it ("" for the row itself).

    Layouts are looked for unless the user has named the columns of question, answer or context. Raises BadValue for a
    row that has the keys of a layout and not its form.
    """
    for layout in _candidates(tuple(values), columns):
        if (rows := layout(values)) is not None:
            named = {_USUAL.title: columns.title, _USUAL.id: columns.id, _USUAL.answer: columns.answer}
            return [
                (place, {**values, **{named.get(key, key): made for key, made in row.items()}}) for place, row in rows
            ]
    return [("", values)]


@lru_cache(1024)
def _candidates(names: tuple[str, ...], columns: Columns) -> list[Callable[[Values], Found | None]]:
    """The layouts whose keys are all among these."""
    if columns.question != _USUAL.question or columns.context != _USUAL.context or columns.answer not in _ANSWERS:
        return []
    return [layout for keys, layout in LAYOUTS if all(key in names for key in keys)]


@lru_cache(1024)
def present(names: tuple[str, ...], columns: Columns) -> Columns:
    """The columns of a row with these names: an alias stands for a usual name that is missing."""
    aliases = {
        name: alias
        for name in ("id", "answer", "text")
        if (usual := getattr(columns, name)) not in names
        if (alias := next((each for each in ALIASES.get(usual, ()) if each in names), None))
    }
    return dataclasses.replace(columns, **aliases)


def known_names(columns: Columns) -> tuple[str, ...]:
    """The names of all columns with their aliases: any of them shows a header, also in a file given for another."""
    names = dataclasses.astuple(columns)
    return tuple(dict.fromkeys([*names, *(alias for name in names for alias in ALIASES.get(name, ()))]))


# ---- layouts of rows


def _kilt(values: Values) -> Found | None:
    """KILT (Petroni et al. 2021). The provenance names articles, not passages, so it is only a column."""
    outputs = _records(values["output"])
    if outputs is None:
        return None
    places = [place for each in outputs for place in _records(each.get("provenance")) or []]
    article = next((place.get("wikipedia_id") for place in places if place.get("wikipedia_id")), None)
    answers = [each.get("answer") for each in outputs]
    return [("", {"question": values["input"], "answers": answers, "wikipedia_id": article})]


def _paragraphs(values: Values) -> Found | None:
    """HotpotQA (Yang et al. 2018) and 2WikiMultihopQA: paragraphs as context, of which facts name the supporting ones.

    The gold passage is the first supporting paragraph with the answer in it, or the first one.
    """
    context = values["context"]
    if isinstance(context, list) and context and all(isinstance(each, str) for each in context):
        return _gold_first([("", text) for text in context], {""} if len(context) == 1 else set(), "")
    pairs = _pairs(context, "title", "sentences")
    if pairs is None:
        return None
    facts = {title for title, _ in _pairs(values.get("supporting_facts"), "title", "sent_id") or []}
    texts = [(title, _joined(sentences)) for title, sentences in pairs]
    return _gold_first(texts, facts, values.get("answer"))


def _gold_first(texts: list[tuple[str, str]], gold: set, answer: object) -> Found:
    usable = [(title, text) for title, text in texts if text.strip()]
    supporting = [pair for pair in usable if pair[0] in gold]
    answers = [answer] if isinstance(answer, str) else []
    answering = (pair for pair in supporting if contains_answer(matching_form(pair[1]), answers))
    first = next(answering, (supporting or [("", "")])[0])
    others = [{"title": title, "text": text} for title, text in usable if (title, text) != first]
    return [("", {"title": first[0], "context": first[1], "ctxs": others})]


def _trivia(values: Values) -> Found | None:
    """TriviaQA (Joshi et al. 2017) as published ("Question", "Answer") and on the Hub."""
    question, answer = (values.get(name, values.get(name.lower())) for name in ("Question", "Answer"))
    if isinstance(answer, Mapping):
        small = {key.lower(): value for key, value in answer.items() if isinstance(key, str)}
        if not {"value", "aliases"} <= small.keys():
            return None
        answer = [each for each in (small["value"], *_listed(small["aliases"])) if each not in NO_ANSWER]
    elif "Question" not in values:
        return None
    made = {"question": question, "answers": answer}
    key = values.get("QuestionId", values.get("question_id"))
    return [("", made if key is None or "id" in values else made | {"id": key})]


def _coqa(values: Values) -> Found | None:
    """CoQA (Reddy et al. 2019): a story with questions and answers, paired by turn; on the Hub by position."""
    story = values["story"]
    questions, answers = _turns(values["questions"]), _turns(values["answers"])
    if not isinstance(story, str) or not questions or answers is None:
        raise BadValue("story, questions and answers are not those of CoQA: expected a text and two lists of turns")
    more = values.get("additional_answers")
    others = [_turns(each) or {} for each in more.values()] if isinstance(more, Mapping) else []
    return [
        (
            f", turn {turn}",
            {
                "question": question,
                "answers": [each[turn] for each in (answers, *others) if turn in each],
                "context": story,
                **({"id": f"{values['id']}-{turn}"} if values.get("id") is not None else {}),
            },
        )
        for turn, question in questions.items()
    ]


def _turns(value: object) -> dict[Any, Any] | None:
    """Turn to text: {"input_text", "turn_id"} for each, or texts in order."""
    if isinstance(value, Mapping) and isinstance(value.get("input_text"), list):
        value = value["input_text"]
    if not isinstance(value, list):
        return None
    if not all(isinstance(each, Mapping) for each in value):
        return dict(enumerate(value, start=1))
    turns = [each.get("turn_id", number) for number, each in enumerate(value, start=1)]
    if not all(isinstance(turn, int | str) for turn in turns) or len(set(turns)) < len(turns):
        return None
    return dict(zip(turns, (each.get("input_text") for each in value), strict=True))


def _boolq(values: Values) -> Found | None:
    """BoolQ (Clark et al. 2019): the passage is the context, unless it is a mere name of one."""
    passage = values["passage"]
    if not isinstance(passage, str) or len(passage.split()) < 2 or "context" in values:
        return None
    return [("", {"context": passage})]


def _dpr(values: Values) -> Found | None:
    """DPR (Karpukhin et al. 2020): the first positive context is the gold passage; FiD has only "ctxs"."""
    positives, negatives, hard, plain = (
        passages_in(values.get(key), key) for key in ("positive_ctxs", "negative_ctxs", "hard_negative_ctxs", "ctxs")
    )
    made: dict[str, Any] = {"ctxs": [*positives[1:], *negatives, *plain], "hard_negative_ctxs": hard}
    if positives:
        made |= {"title": positives[0]["title"], "context": positives[0]["text"]}
    return [("", made)]


def _rated(values: Values) -> Found | None:
    """A rating of the demo page: right is the answer that was shown, or the correction of a wrong one."""
    rating, correction = values["rating"], values.get("correction")
    if rating not in ("up", "down"):
        return None
    if rating == "down" and not correction:
        raise BadValue('its answer was rated "down" and no right one was given; add it as "correction"')
    right = values["shown"] if rating == "up" else correction
    return [("", {"question": values["question"], "answers": [right] if right else []})]


# A row with all of these keys may be in this layout; a function that gives None knows that it is not.
LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[Values], Found | None]], ...] = (
    (("input", "output"), _kilt),
    (("question", "rating", "shown"), _rated),
    (("positive_ctxs",), _dpr),
    (("hard_negative_ctxs",), _dpr),
    (("ctxs",), _dpr),
    (("question", "context"), _paragraphs),
    (("story", "questions", "answers"), _coqa),
    (("question", "passage"), _boolq),
    (("Question", "Answer"), _trivia),
    (("question", "answer"), _trivia),
)


# ---- parts of rows


def _records(value: object) -> list[Mapping] | None:
    """A list of objects; Hub datasets may store it as an object of lists. None for anything else."""
    if isinstance(value, Mapping) and value and all(isinstance(each, list) for each in value.values()):
        if len({len(each) for each in value.values()}) > 1:
            return None
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        return value
    return None


def _pairs(value: object, first: str, second: str) -> list[tuple[str, Any]] | None:
    """Pairs of a title and more, from a list of pairs or from objects with these two keys."""
    records = _records(value)
    if records and all(first in each and second in each for each in records):
        value = [(each[first], each[second]) for each in records]
    if not isinstance(value, list) or not all(isinstance(each, list | tuple) and len(each) == 2 for each in value):
        return None
    return [(title if isinstance(title, str) else "", rest) for title, rest in value]


def passages_in(value: object, name: str) -> list[dict[str, str]]:
    """The passages in the cell `name`, each with title and text. Raises BadValue for anything else."""
    records = [] if value is None else _records(value)
    if records is None or any(not isinstance(each.get("text"), str) for each in records):
        raise BadValue(f'{name} is not a list of objects with "title" and "text"')
    titles = [each.get("title") for each in records]
    pairs = zip(titles, (each["text"] for each in records), strict=True)
    return [{"title": title if isinstance(title, str) else "", "text": text} for title, text in pairs if text.strip()]


def _joined(sentences: object) -> str:
    """Sentences as one text; those of HotpotQA begin with a space, others do not."""
    if not isinstance(sentences, list) or not all(isinstance(each, str) for each in sentences):
        raise BadValue("context has a paragraph that is not a list of sentences")
    text = ""
    for each in sentences:
        text += ("" if not text or text[-1].isspace() or each[:1].isspace() else " ") + each
    return text.strip()


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [value]


# ---- layouts of whole JSON files


def objects_in(source: str, value: Mapping) -> Iterator[tuple[str, object]]:
    """The rows in the one object of a JSON file, each with its place. Raises InputError if it is unclear which."""
    if isinstance(value.get("Data"), list):
        yield from _items(value["Data"], "Data")
    elif isinstance(value.get("data"), list):
        rows = value["data"]
        flat = rows and all(isinstance(each, dict) and "paragraphs" not in each for each in rows)
        yield from _items(rows, "data") if flat else _squad(source, rows)
    elif isinstance(value.get("data"), Mapping) and not {"question", "text"} & value.keys():
        raise InputError(
            f'{source}: expected "data" to be a list of rows, found an object ({", ".join(list(value["data"])[:5])}). '
            "Write one object per row as .jsonl."
        )
    elif columns := _columns(value):
        yield from columns
    else:
        yield "row 1", value


def _items(rows: list, name: str) -> Iterator[tuple[str, object]]:
    return ((f"{name}[{number}]", row) for number, row in enumerate(rows))


def _columns(value: Mapping) -> list[tuple[str, object]] | None:
    """Rows of {column: {row: cell}}, which pandas writes by default; None if it is something else."""
    columns = list(value.values())
    if not columns or not all(isinstance(each, Mapping) and each for each in columns):
        return None
    keys = list(columns[0])
    if not all(key.isdigit() for key in keys) or any(list(each) != keys for each in columns):
        return None
    return [(f"row {key}", {name: cells[key] for name, cells in value.items()}) for key in keys]


def _squad(source: str, data: list[Any]) -> Iterator[tuple[str, object]]:
    """SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018)."""
    for a, article in enumerate(data):
        place = f"data[{a}]"
        for p, paragraph in enumerate(_part(source, place, article, "paragraphs", list)):
            here = f"{place}.paragraphs[{p}]"
            shared = {"title": article.get("title"), "context": _part(source, here, paragraph, "context", str)}
            for q, item in enumerate(_part(source, here, paragraph, "qas", list)):
                yield f"{here}.qas[{q}]", _squad_question(item) | shared if isinstance(item, dict) else item


def _squad_question(item: Mapping) -> dict[str, Any]:
    marked = {"is_impossible": True} if item.get("is_impossible") is True else {}
    return {key: item.get(key) for key in ("id", "question", "answers")} | marked


def _part(source: str, place: str, value: object, key: str, kind: type) -> Any:
    if isinstance(value, dict) and isinstance(value.get(key), kind):
        return value[key]
    raise InputError(
        f'{source}, {place}: expected the SQuAD layout, found no "{key}" of type {kind.__name__} there. '
        "Follow that layout, or write one object per row as .jsonl."
    )
