"""Questions to contexts: what the generator reads, and what the retriever is to learn from.

For each question the passages found, the sentences of the best ones that fit the token budget, and the positive and
hard negatives. Left out: encoding and searching themselves (retriever.py, index.py), tokens of the prompt (prompts.py).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from datasets import Dataset, Features, List, Value

from cozyrag.index import Passages
from cozyrag.metrics import contains_answer, normalize_answer
from cozyrag.search import Found

SEARCH_DEPTH = 60
NEGATIVE_RANKS = slice(3, SEARCH_DEPTH)  # ranks 4 to 60: nearer ones are too often right without being marked so
_STOP, _CLOSING = "[.!?。！？]", "[\"')\\]”’]"
SENTENCE_END = re.compile(  # closing marks are looked back at, not matched: what is matched is lost
    rf"(?:(?<={_STOP})|(?<={_STOP}{_CLOSING})|(?<={_STOP}{_CLOSING}{{2}}))\s+(?=[\"'(\[“‘]*[^\Wa-z_])|\n+"
)
WORD = re.compile(r"\w+")
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
        "gold_row": Value("int64"),
        "positive": Value("int64"),
        "negatives": List(Value("int64")),
    }
)


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, by closing punctuation before a new start; rough on abbreviations, which costs little here."""
    return [sentence for sentence in SENTENCE_END.split(text) if sentence.strip()]


@lru_cache(maxsize=200_000)
def _words(text: str) -> frozenset[str]:
    return frozenset(WORD.findall(text.lower()))


@dataclass
class ContextMaker:
    """Chooses from the passages found: sentences for the context, a positive and hard negatives for the retriever.

    Args:
        passages: the columns of the passages table.
        count_tokens: lengths in generator tokens of a list of texts.
        top_k: passages whose sentences compete for the context.
        budget: tokens of the context.
    """

    passages: Passages
    count_tokens: Callable[[list[str]], list[int]]
    top_k: int
    budget: int
    hard_negatives: int = 0
    _normalized: dict[int, str] = field(default_factory=dict)
    _sentences: dict[int, tuple[list[str], list[int]]] = field(default_factory=dict)

    def __post_init__(self):
        self.row_of = {passage_id: row for row, passage_id in enumerate(self.passages.ids)}
        counts = Counter(word for text in self.passages.to_read() for word in set(WORD.findall(text.lower())))
        self._rarity = {word: math.log(1 + len(self.passages.ids) / count) for word, count in counts.items()}

    def holds_answer(self, row: int, answers: Sequence[str]) -> bool:
        """Whether the passage of that row contains one of the answers as whole words."""
        if row not in self._normalized:
            self._normalized[row] = normalize_answer(self.passages.texts[row])
        return contains_answer(self._normalized[row], answers)

    def context(self, question: str, rows: Sequence[int]) -> str:
        """The sentences of the top-k passages that share most with the question, in original order, within the budget.

        Sentences are scored by the summed rarity (inverse document frequency) of the words they share with the
        question; earlier passages win ties. Each passage brings its title along.
        """
        asked = _words(question)
        choices = []  # (score, passage rank, sentence number, text, tokens)
        for rank, row in enumerate(rows[: self.top_k]):
            sentences, tokens = self._sentences_of(row)
            for number, (sentence, length) in enumerate(zip(sentences, tokens, strict=True)):
                shared = (self._rarity.get(word, 0.0) for word in asked & _words(sentence))
                score = math.fsum(shared)  # exact: sets have another order in each process, ties must stay ties
                choices.append((-score, rank, number, sentence, length))
        kept, room, titled = [], self.budget, set()
        for _, rank, number, sentence, length in sorted(choices):
            cost = length + (0 if rank in titled else self._title_tokens(rows[rank]))
            if cost <= room or not kept:
                kept.append((rank, number, sentence))
                titled.add(rank)
                room -= cost
        return self._write(sorted(kept), rows)

    def _write(self, kept: list[tuple[int, int, str]], rows: Sequence[int]) -> str:
        parts = []
        for rank in dict.fromkeys(rank for rank, _, _ in kept):
            title = self.passages.titles[rows[rank]].replace("_", " ")
            text = " ".join(sentence for at, _, sentence in kept if at == rank)
            parts.append(f"{title}: {text}" if title else text)
        return "\n".join(parts)

    def _sentences_of(self, row: int) -> tuple[list[str], list[int]]:
        if row not in self._sentences:
            sentences = split_sentences(self.passages.texts[row])
            self._sentences[row] = (sentences, self.count_tokens([f" {sentence}" for sentence in sentences]))
        return self._sentences[row]

    def _title_tokens(self, row: int) -> int:
        title = self.passages.titles[row]
        return len(title) // 3 + 2 if title else 0  # an estimate; prompts.py cuts what is over

    def positive(self, gold_row: int, rows: Sequence[int], answers: Sequence[str]) -> int:
        """The gold passage if known, else the best-ranked one that contains an answer, else -1 (never a bare top hit)."""
        if gold_row >= 0:
            return gold_row
        return next((int(row) for row in rows if self.holds_answer(row, answers)), -1)

    def negatives(self, positive: int, rankings: Sequence[Sequence[int]], answers: Sequence[str]) -> list[int]:
        """The best-ranked passages of ranks 4 to 60 that hold no answer, taken from the rankings in turn."""
        found: dict[int, None] = {}
        for row in (
            row for rank in zip(*(ranking[NEGATIVE_RANKS] for ranking in rankings), strict=True) for row in rank
        ):
            if len(found) == self.hard_negatives:
                break
            if row != positive and not self.holds_answer(row, answers):
                found[int(row)] = None
        return list(found)


def attach_contexts(
    questions: Dataset,
    *,
    search: Callable[[list[str]], Found],
    maker: ContextMaker,
    fingerprint: str,
    batch_size: int = 512,
    progress: Callable[[int], object] = lambda rows: None,
) -> Dataset:
    """The contexts table: questions with the passages found, their context, positive and hard negatives.

    Args:
        search: questions to what is found for them, SEARCH_DEPTH deep or as deep as there are passages.
        fingerprint: at most 64 characters that name this result; hashing the models instead would never hit a cache.
        progress: told after each batch how many questions it had.
    """

    def retrieve(batch: dict) -> dict:
        result = search(batch["question"])
        rankings = [ranking.tolist() for ranking in result.rankings]
        columns: dict[str, list] = {name: [] for name in CONTEXT_FEATURES if name not in questions.column_names}
        for i, (question, answers, passage_id) in enumerate(
            zip(batch["question"], batch["answers"], batch["passage_id"], strict=True)
        ):
            found = result.rows[i].tolist()
            gold = maker.row_of.get(passage_id, -1)
            context = maker.context(question, found)
            positive = maker.positive(gold, found, answers)
            columns["rows"].append(found)
            columns["scores"].append(result.scores[i].tolist())
            columns["context"].append(context)
            columns["answer_in_context"].append(contains_answer(normalize_answer(context), answers))
            columns["gold_row"].append(gold)
            columns["positive"].append(positive)
            columns["negatives"].append(
                maker.negatives(positive, [ranking[i] for ranking in rankings], answers) if positive >= 0 else []
            )
        progress(len(batch["question"]))
        return columns

    if not len(questions):  # map would hand an empty table back without the new columns
        return Dataset.from_dict({name: [] for name in CONTEXT_FEATURES}, features=CONTEXT_FEATURES)
    return questions.map(
        retrieve,
        batched=True,
        batch_size=batch_size,
        features=CONTEXT_FEATURES,
        new_fingerprint=fingerprint,
        keep_in_memory=True,
    )
