"""Questions to contexts: the input of the generator, and the positives and hard negatives of the retriever.

A context consists of sentences of the best passages, within a token budget. Their scores are sparse (shared words),
dense (vectors) or hybrid. Left out: encoding (retriever.py), search (hybrid.py), and prompts (prompts.py).
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import TypeVar

import numpy as np
from datasets import Dataset, Features, List, Value

from cozyrag.data.matching import contains_answer, matching_form
from cozyrag.data.sentences import split_sentences
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.bm25 import SentenceWords
from cozyrag.retrieval.hybrid import SEARCHES, Found
from cozyrag.retrieval.opening import Index
from cozyrag.retrieval.passage_index import Passages
from cozyrag.retrieval.words_of_texts import WordsOfTexts

FILTERS = ("sparse", "dense", "hybrid")
SentenceSource = Callable[[Sequence[int]], list[np.ndarray]]  # rows of passages to (n_sentences, dim) each
SEARCH_DEPTH = 60
RANKS = 3  # passages from this rank on (from 0) cost the same: the search is most reliable for the first ones
# In standard deviations. The best passage is right four times out of five: with this cost, two percentage points more
# answers are kept at 128 tokens.
RANK_COST = 0.6
NEGATIVE_RANKS = slice(3, SEARCH_DEPTH)  # ranks 4 to 60: nearer passages are too often unmarked positives
REMEMBERED = 50_000  # passages whose sentences stay in memory, some 3 KB each
Chosen = tuple[int, int, str]  # rank of the passage, number of the sentence in it, both from 0, and the sentence
Split = tuple[list[str], list[int]]  # the sentences of a passage, and their lengths in tokens
Kept = TypeVar("Kept")
CONTEXT_FEATURES = Features(
    {
        "id": Value("string"),
        "question": Value("string"),
        "answers": List(Value("string")),
        "passage_id": Value("string"),
        "rows": List(Value("int64")),
        "scores": List(Value("float32")),
        "context": Value("string"),
        "answer_in_context": Value("bool"),
        "noised": Value("bool"),
        "gold_row": Value("int64"),
        "positive": Value("int64"),
        "negatives": List(Value("int64")),
    }
)
# Of each search the rank of the positive, 0 if it is not in the list; None for a search that was not made.
MEASURED_FEATURES = Features(CONTEXT_FEATURES | {"ranks": dict.fromkeys(SEARCHES, Value("int64"))})


def sentence_source(index: Index, retriever: Retriever) -> SentenceSource:
    """Vectors of the sentences of passages, by row: kept with the index, or computed when needed."""
    if index.sentences is not None:
        return index.sentences.of
    passages = index.passages

    def encode(rows: Sequence[int]) -> list[np.ndarray]:
        made = retriever.encode_passages(passages.select(rows), passages.spans(rows), batch_size=64)[1]
        return made.of(range(len(rows)))

    return encode


def _remember(kept: dict[int, Kept], new: dict[int, Kept]) -> dict[int, Kept]:
    """Put these among those that are kept, which are forgotten when they are too many; returns the new ones."""
    if len(kept) > REMEMBERED:
        kept.clear()
    kept.update(new)
    return new


def _share_of(name: str) -> float:
    """A number from 0 to 1 that depends on the name alone, so that processes and resumed runs draw the same."""
    return zlib.crc32(name.encode()) / 2**32


def _cosines(sentences: np.ndarray, question: np.ndarray) -> np.ndarray:
    """(n_sentences,) cosines; NaN for a sentence beyond the retriever's maximum length."""
    return np.where(sentences.any(axis=1), sentences.astype(np.float32) @ question, np.nan)


def _standardized(values: np.ndarray) -> np.ndarray:
    """Z-scores; unknown values count as the mean."""
    known = values[~np.isnan(values)]
    if not len(known) or known.std() == 0:
        return np.zeros_like(values)
    return np.nan_to_num((values - known.mean()) / known.std(), nan=0.0)


@dataclass(frozen=True)
class ContextBuilder:
    """Chooses from the passages found: sentences for the context, a positive and hard negatives for the retriever.

    Threads can share it: its settings never change, and what its caches lose is made again.

    Args:
        passages: the columns of the passages table.
        count_tokens: lengths in generator tokens of a list of texts.
        top_k: passages whose sentences compete for the context, unless a call names another number.
        budget: tokens of the context.
        score_by: one of FILTERS. "sparse": the summed rarity (inverse document frequency) of the words that a sentence
            shares with the question; "dense": the cosine of sentence and question; "hybrid": their sum, each z-scored
            over the sentences that compete.
        sentence_vectors: see `sentence_source`; not needed for "sparse".
        words: words of the sentences; not needed for "dense". None: computed on first use, without stemming.
    """

    passages: Passages
    count_tokens: Callable[[list[str]], list[int]]
    top_k: int
    budget: int
    hard_negatives: int = 0
    score_by: str = "sparse"
    sentence_vectors: SentenceSource | None = None
    words: SentenceWords | WordsOfTexts | None = None
    _forms: dict[int, str] = field(default_factory=dict)
    _sentences: dict[int, Split] = field(default_factory=dict)

    def __post_init__(self):
        if self.score_by not in FILTERS:
            raise ValueError(f"expected a filter among {', '.join(FILTERS)}, found {self.score_by!r}")
        if self.score_by != "sparse" and self.sentence_vectors is None:
            raise ValueError(f"expected sentence vectors for the {self.score_by} filter, found none")

    @cached_property
    def _sentence_words(self) -> SentenceWords | WordsOfTexts:
        return self.words or SentenceWords(self.passages.titles, self.passages.sentences())

    def holds_answer(self, row: int, answers: Sequence[str]) -> bool:
        """Whether the passage of that row contains one of the answers as whole words."""
        form = self._forms.get(row)
        if form is None:
            form = _remember(self._forms, {row: matching_form(self.passages.texts[row])})[row]
        return contains_answer(form, answers)

    def contexts(
        self, questions: Sequence[str], found: Sequence[Sequence[int]], vectors: np.ndarray | None = None
    ) -> list[str]:
        """The context of each question; see `chosen`."""
        chosen = self.chosen(questions, found, vectors)
        return [self.write(kept, rows) for kept, rows in zip(chosen, found, strict=True)]

    def chosen(
        self,
        questions: Sequence[str],
        found: Sequence[Sequence[int]],
        vectors: np.ndarray | None = None,
        *,
        top_k: int | None = None,
    ) -> list[list[Chosen]]:
        """The sentences that make up the context of each question.

        Args:
            found: for each question the rows of the passages found, best first.
            vectors: (n_questions, dim) of the questions; not needed for "sparse".
            top_k: passages whose sentences compete; None: the builder's own number.
        """
        competing = [rows[: self.top_k if top_k is None else top_k] for rows in found]
        rows = sorted({row for each in competing for row in each})
        read = self._read(rows)
        if self.score_by == "sparse":
            return [self._choose(question, each, read) for question, each in zip(questions, competing, strict=True)]
        if self.sentence_vectors is None or vectors is None:
            raise ValueError(f"expected vectors of sentences and questions for the {self.score_by} filter, found none")
        sentences = dict(zip(rows, self.sentence_vectors(rows) if rows else [], strict=True))
        return [
            self._choose(question, each, read, [_cosines(sentences[row], vector) for row in each])
            for question, each, vector in zip(questions, competing, vectors, strict=True)
        ]

    def _choose(
        self, question: str, rows: Sequence[int], read: dict[int, Split], cosines: Sequence[np.ndarray] = ()
    ) -> list[Chosen]:
        """The best-scored sentences of these passages, in original order, within the budget.

        Earlier passages win ties. Each passage brings its title along.

        Args:
            read: the sentences of these passages. cosines: of the sentences of each passage with the question; NaN
                beyond the retriever's maximum length.
        """
        choices = [
            (rank, number, sentence, tokens)
            for rank, row in enumerate(rows)
            for number, (sentence, tokens) in enumerate(zip(*read[row], strict=True))
        ]
        scores = self._scores(question, rows, [read[row][0] for row in rows], cosines)
        kept: list[Chosen] = []
        room, titled = self.budget, set()
        for _, (rank, number, sentence, length) in sorted(zip((-scores).tolist(), choices, strict=True)):
            cost = length + (0 if rank in titled else self._title_tokens(rows[rank]))
            if cost <= room or not kept:
                kept.append((rank, number, sentence))
                titled.add(rank)
                room -= cost
        return sorted(kept)

    def _scores(
        self, question: str, rows: Sequence[int], sentences: Sequence[list[str]], cosines: Sequence[np.ndarray]
    ) -> np.ndarray:
        """The score of each sentence in standard deviations, less `RANK_COST` per rank of its passage up to `RANKS`.

        `sentences`: of each passage.
        """
        if not rows:
            return np.zeros(0)
        counts = [len(own) for own in sentences]
        scores = -RANK_COST * np.repeat(np.minimum(np.arange(len(rows)), RANKS), counts)
        if self.score_by != "sparse":
            scores = scores + _standardized(np.concatenate(cosines))
        if self.score_by != "dense":
            scores = scores + _standardized(np.concatenate(self._sentence_words.overlaps(question, rows)))
        return scores

    def write(self, kept: Sequence[Chosen], rows: Sequence[int]) -> str:
        """The context that these sentences make: a line for each passage, under its title."""
        parts = []
        for rank in dict.fromkeys(rank for rank, _, _ in kept):
            title = self.passages.titles[rows[rank]].replace("_", " ")
            text = " ".join(sentence for at, _, sentence in kept if at == rank)
            parts.append(f"{title}: {text}" if title else text)
        return "\n".join(parts)

    def _read(self, rows: Sequence[int]) -> dict[int, Split]:
        """Split passages into sentences and count their tokens, all at once: one call of a tokenizer is slow."""
        held = {row: kept for row in rows if (kept := self._sentences.get(row)) is not None}
        new = [row for row in rows if row not in held]
        split = [split_sentences(self.passages.texts[row]) for row in new]
        texts = [f" {sentence}" for sentences in split for sentence in sentences]
        counts = iter(self.count_tokens(texts) if texts else [])
        made = ((sentences, list(islice(counts, len(sentences)))) for sentences in split)
        return held | _remember(self._sentences, dict(zip(new, made, strict=True)))

    def _title_tokens(self, row: int) -> int:
        title = self.passages.titles[row]
        return len(title) // 3 + 2 if title else 0  # an estimate; prompts.py truncates the excess

    def without_answer(self, rows: Sequence[int], gold_row: int, answers: Sequence[str]) -> list[int]:
        """The first top-k of the rows that are not the gold passage and hold no answer."""
        answerless = (row for row in rows if row != gold_row and not self.holds_answer(row, answers))
        return list(islice(answerless, self.top_k))

    def positive(self, gold_row: int, rows: Sequence[int], answers: Sequence[str]) -> int:
        """The gold passage if known, else the best-ranked one that holds an answer, else -1 (never a mere top hit)."""
        if gold_row >= 0:
            return gold_row
        return next((int(row) for row in rows if self.holds_answer(row, answers)), -1)

    def rank(self, gold_row: int, rows: Sequence[int], answers: Sequence[str]) -> int:
        """The rank, from 1, of the positive in a list of rows; 0 if it is not there.

        Without a known gold passage each list has a positive of its own: its first passage that holds an answer.
        """
        positive = self.positive(gold_row, rows, answers)
        return next((rank for rank, row in enumerate(rows, 1) if row == positive), 0)

    def negatives(
        self, positive: int, rankings: Sequence[Sequence[int]], answers: Sequence[str], given: Sequence[int] = ()
    ) -> list[int]:
        """The given passages, then the best-ranked ones of ranks 4 to 60, from the rankings in turn; none with an
        answer."""
        found: dict[int, None] = {}
        mined = chain.from_iterable(zip(*(ranking[NEGATIVE_RANKS] for ranking in rankings), strict=True))
        for row in chain(given, mined):
            if len(found) == self.hard_negatives:
                break
            if row != positive and not self.holds_answer(row, answers):
                found[int(row)] = None
        return list(found)


def attach_contexts(
    questions: Dataset,
    *,
    search: Callable[[list[str]], Found],
    builder: ContextBuilder,
    fingerprint: str,
    noise: float = 0.0,
    noise_seed: str = "",
    batch_size: int = 512,
    progress: Callable[[int], object] = lambda rows: None,
    measured: bool = False,
) -> Dataset:
    """The contexts table: questions with the passages found, their context, positive and hard negatives.

    Args:
        search: questions to the SEARCH_DEPTH best passages, or to all if there are fewer.
        fingerprint: at most 64 characters that identify this result; hashing the models would never hit a cache.
        noise: share of the questions, drawn by id and `noise_seed`, whose context is made of passages found that are
            not gold and hold no answer, so that the generator learns not to trust blindly; `noised` marks them.
        progress: called after each batch with its number of questions.
        measured: add the column `ranks`, which tells how well each search did; see `Searcher.each_search`.
    """
    features = MEASURED_FEATURES if measured else CONTEXT_FEATURES

    def retrieve(batch: dict) -> dict:
        result = search(batch["question"])
        rankings = [ranking.tolist() for ranking in result.rankings]
        columns: dict[str, list] = {name: [] for name in features if name not in questions.column_names}
        rows = result.rows.tolist()
        named = batch.get("negative_ids") or [()] * len(rows)
        row_of = builder.passages.rows_of(chain(batch["passage_id"], *named))
        golds = [row_of.get(passage_id, -1) for passage_id in batch["passage_id"]]
        noised = [_share_of(f"{noise_seed}|{row_id}") < noise for row_id in batch["id"]]
        read = [
            builder.without_answer(found, gold, answers) if noisy else found
            for found, gold, answers, noisy in zip(rows, golds, batch["answers"], noised, strict=True)
        ]
        contexts = builder.contexts(batch["question"], read, result.vectors)
        for i, (context, answers, found, gold) in enumerate(zip(contexts, batch["answers"], rows, golds, strict=True)):
            positive = builder.positive(gold, found, answers)
            columns["noised"].append(noised[i])
            columns["rows"].append(found)
            columns["scores"].append(result.scores[i].tolist())
            columns["context"].append(context)
            columns["answer_in_context"].append(contains_answer(matching_form(context), answers))
            columns["gold_row"].append(gold)
            columns["positive"].append(positive)
            given = [row_of[key] for key in named[i] if key in row_of]
            mined_from = [ranking[i] for ranking in rankings]
            columns["negatives"].append(
                builder.negatives(positive, mined_from, answers, given) if positive >= 0 else []
            )
            if measured:
                ranks = {name: builder.rank(gold, rows[i].tolist(), answers) for name, rows in result.lists.items()}
                columns["ranks"].append(dict.fromkeys(SEARCHES) | ranks)
        progress(len(batch["question"]))
        return columns

    if not len(questions):  # map would return an empty table without the new columns
        return Dataset.from_dict({name: [] for name in features}, features=features)
    return questions.map(
        retrieve,
        batched=True,
        batch_size=batch_size,
        features=features,
        remove_columns=[name for name in questions.column_names if name not in features],
        new_fingerprint=fingerprint,
        keep_in_memory=True,
    )
