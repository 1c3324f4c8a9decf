"""How good a pair is on questions with known answers: `cozyrag evaluate`, `CozyRAG.evaluate`, and the benchmarks.

Batches and blocks of questions are the same for any number of processes, so the results are too. Left out: answers and
verdicts (evaluation.py), scores and tables (scoring.py), the untuned baseline and tests of differences (benchmarks).
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, tqdm
from datasets import Dataset

from cozyrag.data.corpus import gold_ids
from cozyrag.data.given import lines_of, sources_given
from cozyrag.data.matching import contains_answer, matching_form
from cozyrag.data.questions import Questions, read_questions, take
from cozyrag.errors import InputError
from cozyrag.evaluation.calibration import Calibration, certainties, certainty_of, coverage_table, error_of
from cozyrag.evaluation.evaluation import evaluate_pair
from cozyrag.evaluation.scoring import FOUND, score_table, scores_of, verdict_counts, verdict_table
from cozyrag.models.generator import Decoding, Generator
from cozyrag.retrieval.contexts import CONTEXT_FEATURES, SEARCH_DEPTH, ContextBuilder, attach_contexts
from cozyrag.retrieval.hybrid import Searcher

BLOCK = 256  # questions searched at once
MODEL, CLOSED, GOLD = "this model", "closed book", "gold context"
ANSWERED = ("em", "f1", "answer_in_context")
SEARCHED = FOUND[:-1]


@dataclass(frozen=True)
class Evaluation:
    """The scores of a pair; print it for its tables.

    Args:
        scores: by metric, {"mean": ..., "interval": [low, high]} in percent. recall@k, MRR and nDCG are of the gold
            passage or, if unknown, the best-ranked passage with an answer.
        baselines: the same for contexts of other kinds, by name.
        calibration_error: of the certainty of the answers, and `raw`, that of the generator's confidence, 0 to 1.
        rows: every question with prediction, certainty, scores, context and verdict.
    """

    questions: int
    passages: int
    scores: dict[str, dict]
    baselines: dict[str, dict[str, dict]]
    verdicts: dict[str, int]
    calibration_error: dict[str, float]
    rows: list[dict] = field(repr=False)

    def summary(self) -> dict:
        """Everything but the rows, for a JSON file."""
        return {name: value for name, value in vars(self).items() if name != "rows"}

    def __str__(self) -> str:
        systems = {MODEL: self.scores} | self.baselines
        answered = [row for row in self.rows if row["prediction"]]
        certainty = np.array([row["certainty"] for row in answered])
        parts = [
            f"{self.questions} questions, {self.passages} passages. Percent, with 95 % bootstrap intervals.",
            score_table(systems, ANSWERED),
            score_table({MODEL: self.scores}, SEARCHED),
            verdict_table({MODEL: self.verdicts}),
        ]
        if answered:
            after, raw = (f"{self.calibration_error[name]:.3f}" for name in ("certainty", "raw"))
            told = f"{after} (uncalibrated: {raw})" if after != raw else f"{raw} (the pair is not calibrated)"
            parts += [
                f"Expected calibration error of the certainty: {told}. What a least certainty does, in percent:",
                coverage_table(certainty, np.array([row["em"] for row in answered])),
            ]
        return "\n\n".join(parts)

    __repr__ = __str__


@dataclass(frozen=True)
class Evaluated:
    """A pair as it is evaluated: how it searches, reads and abstains."""

    generator: Generator
    searcher: Searcher
    builder: ContextBuilder
    decoding: Decoding
    threshold: float | None
    calibration: Calibration | None

    def on(
        self, questions: Dataset, accelerator: Accelerator | PartialState, *, batch_size: int, baselines: bool
    ) -> Evaluation:
        """The scores on a table of questions whose gold ids are those of the index."""
        own = contexts_of(accelerator, questions, self.searcher, self.builder, f"retrieving: {MODEL}")
        others = self._baselines(own) if baselines else {}
        answered = {
            name: self._answered(accelerator, table, name, batch_size)
            for name, table in ({MODEL: own} | others).items()
        }
        rows = self._with_certainty(answered.pop(MODEL))
        return Evaluation(
            questions=len(rows),
            passages=len(self.builder.passages.ids),
            scores=scores_of(rows, (*ANSWERED, *SEARCHED)),
            baselines={
                name: scores_of(each, ANSWERED[: 2 if name == CLOSED else 3]) for name, each in answered.items()
            },
            verdicts=verdict_counts(rows),
            calibration_error=_errors(rows),
            rows=rows,
        )

    def _baselines(self, own: Dataset) -> dict[str, Dataset]:
        best = [[row] if row >= 0 else [] for row in own[:]["positive"]]
        return {
            CLOSED: with_passages(own, self.builder, self.searcher.encode, [[] for _ in best]),
            GOLD: with_passages(own, self.builder, self.searcher.encode, best),
        }

    def _answered(
        self, accelerator: Accelerator | PartialState, contexts: Dataset, name: str, batch_size: int
    ) -> list[dict]:
        return evaluate_pair(
            accelerator,
            self.generator,
            contexts,
            top_k=self.builder.top_k,
            decoding=self.decoding,
            no_answer_threshold=None if name == CLOSED else self.threshold,
            batch_size=batch_size,
            desc=f"answering: {name}",
        )[1]

    def _with_certainty(self, rows: list[dict]) -> list[dict]:
        texts, scores = ([row[name] for row in rows] for name in ("prediction", "score"))
        found = certainty_of(self.calibration, texts, scores)
        return [row | {"certainty": each} for row, each in zip(rows, found, strict=True)]


def _errors(rows: Sequence[Mapping]) -> dict[str, float]:
    answered = [row for row in rows if row["prediction"]]
    if not answered:
        return {}
    scores, correct = certainties(answered)
    return {
        "certainty": error_of(np.array([row["certainty"] for row in answered]), correct),
        "raw": error_of(scores, correct),
    }


def questions_for(given: Any, builder: ContextBuilder, *, limit: int | None, **how: Any) -> Dataset:
    """The questions given (see `cozyrag.train`), with the ids of their gold passages in the pair's index.

    Raises InputError if they cannot be read, or have no answers.
    """
    read = _read(given, how)
    passages = builder.passages
    table = gold_ids(read.table, read.passages, passages.ids, passages.texts)
    return take(table, limit, 0)


def check_counts(*, limit: int | None, batch_size: int) -> None:
    """Raise InputError for anything but whole numbers of at least 1, or None as limit."""
    for name, value in {"limit": 1 if limit is None else limit, "batch_size": batch_size}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name}: expected a whole number of at least 1, found {value!r:.80}.")


def _read(given: Any, how: Mapping[str, Any]) -> Questions:
    sources = sources_given("questions", given)
    if sources is not None:
        return read_questions(sources, **how)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "questions.jsonl"
        path.write_text(lines_of("questions", given), encoding="utf-8")
        try:
            return read_questions(str(path), **how)
        except InputError as error:
            raise InputError(str(error).replace(str(path), "questions")) from error


def contexts_of(
    accelerator: Accelerator | PartialState, questions: Dataset, searcher: Searcher, builder: ContextBuilder, desc: str
) -> Dataset:
    """The contexts table of all questions. Every process makes some blocks of it, and all get the whole table."""
    starts = range(0, len(questions), BLOCK)[accelerator.process_index :: accelerator.num_processes]
    mine = [row for start in starts for row in range(start, min(start + BLOCK, len(questions)))]
    with tqdm(total=len(mine), desc=desc, unit="question") as bar:
        made = attach_contexts(
            questions.select(mine),
            search=lambda texts: searcher.search(texts, SEARCH_DEPTH),
            builder=builder,
            fingerprint=f"evaluation-{accelerator.process_index}",
            batch_size=BLOCK,
            progress=bar.update,
        )
        parts = gather_object([(mine, made[:])])
    table: dict[str, list] = {column: [None] * len(questions) for column in CONTEXT_FEATURES}
    for rows, columns in parts:
        for column, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                table[column][row] = value
    return Dataset.from_dict(table, features=CONTEXT_FEATURES)


def with_passages(
    contexts: Dataset,
    builder: ContextBuilder,
    encode: Callable[[Sequence[str]], np.ndarray] | None,
    rows: list[list[int]],
) -> Dataset:
    """The contexts table with contexts built from the passages `rows` of each question instead of those found.

    `encode`: questions to vectors; a sparse builder does not need it.
    """
    columns = contexts[:]
    questions = columns["question"]
    made: list[str] = []
    for start in range(0, len(rows), BLOCK):
        block = slice(start, start + BLOCK)
        made += builder.contexts(questions[block], rows[block], encode(questions[block]) if encode else None)
    held = [
        contains_answer(matching_form(text), answers) for text, answers in zip(made, columns["answers"], strict=True)
    ]
    return Dataset.from_dict(
        columns | {"rows": rows, "context": made, "answer_in_context": held}, features=CONTEXT_FEATURES
    )
