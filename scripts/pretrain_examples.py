"""Training examples of pretrain_generator.py: packed batches of cloze questions (stage 1) and real questions (stage 2).

A batch depends on the seed and the number of its step only, so a resumed run sees the batches that it would have seen.
Left out: writing the token arrays (pretrain_prepare.py), packing (packed_readings.py), training
(pretrain_generator.py).
"""

from pathlib import Path

import numpy as np
import torch
from packed_readings import Reading, collate_readings
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from cozyrag.models.prompts import ANSWER_CUE, QUESTION_CUE

# Contexts of stage 2: the filtered gold passage, the gold sentence alone, the best sentences of the retrieved passages,
# and those of the retrieved passages without the gold one.
VARIANTS = ("gold", "sentence", "found", "without")
VARIANT_SHARES = (0.35, 0.15, 0.35, 0.15)
PARAGRAPH_SHARE = 0.5  # of the readings of stage 2: a whole paragraph with all its questions
MAX_READING = 384  # tokens of a reading: context, questions, and answers
MAX_QUESTIONS = 8  # of a reading
QUESTION_WORDS = {
    "digit": ["when", "how many", "which year", "what year", "how much"],
    "capital": ["who", "what", "which", "where", "who", "what"],
    "other": ["what", "what", "which", "how"],
}

Branches = list[tuple[list[int], list[int]]]  # the rest of a prompt after the context, and the answer with EOS


class Cloze:
    """Stage 1: questions made from sentences of plain text, on token arrays, without decoding them.

    Args:
        lm_share: share of the contexts of which every token is a target.
        ask_share: share of the contexts of whose questions every token is a target.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, *, lm_share: float, ask_share: float = 0.0):
        arrays = np.load(folder / "text.npz")
        self.arrays = {name: arrays[name] for name in arrays.files}
        self.lm_share, self.ask_share = lm_share, ask_share
        vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.starts_word = np.array([token.startswith("Ġ") for token in vocabulary])
        self.capital = np.array([token[1:2].isupper() and token.startswith("Ġ") for token in vocabulary])
        self.digit = np.array([token[1:2].isdigit() and token.startswith("Ġ") for token in vocabulary])
        self.punctuation = np.array(
            [
                not any(character.isalnum() for character in token.lstrip("Ġ")) and token.isascii() or token in "Ġ"
                for token in vocabulary
            ]
        )

        def encode(text: str) -> np.ndarray:
            return np.array(tokenizer(text)["input_ids"], dtype=np.uint16)

        self.question_words = {
            kind: [(encode(f" {word}"), encode(f" {word.capitalize()}")) for word in words]
            for kind, words in QUESTION_WORDS.items()
        }
        self.cue, self.answer_cue = encode(QUESTION_CUE.rstrip()), encode(f"?{ANSWER_CUE}")
        self.eos = tokenizer.eos_token_id

    def reading(self, random: np.random.Generator) -> Reading | None:
        """A context with up to MAX_QUESTIONS questions; None if the chosen text yields none."""
        sentence = int(random.integers(len(self.arrays["sentence_ends"])))
        article = int(np.searchsorted(self.arrays["article_ends"], sentence, side="right"))
        context, sentences = self._context(sentence, article, random)
        branches: Branches = []
        for number in random.choice(sentences, size=MAX_QUESTIONS):
            asked = self._ask(self._sentence(int(number)), random)
            if asked is None:
                continue
            question, answer = asked
            branch = np.concatenate([self.cue, question, self.answer_cue]).tolist(), [*answer.tolist(), self.eos]
            if len(Reading(context, [*branches, branch])) <= MAX_READING:
                branches.append(branch)
        if not branches:
            return None
        return Reading(context, branches, plain=random.random() < self.lm_share, asked=random.random() < self.ask_share)

    def _sentence(self, number: int) -> np.ndarray:
        ends = self.arrays["sentence_ends"]
        return self.arrays["tokens"][ends[number - 1] if number else 0 : ends[number]]

    def _context(self, sentence: int, article: int, random: np.random.Generator) -> tuple[list[int], list[int]]:
        """The title and the sentences around the chosen one up to a random budget, and the numbers of the sentences."""
        low = int(self.arrays["article_ends"][article - 1]) if article else 0
        high = int(self.arrays["article_ends"][article])
        room = int(random.integers(40, 150)) - len(self._sentence(sentence))
        kept, left, right = [sentence], sentence - 1, sentence + 1
        while room > 0 and (left >= low or right < high):
            take_left = left >= low and (right >= high or random.random() < 0.5)
            near = left if take_left else right
            left, right = (left - 1, right) if take_left else (left, right + 1)
            if len(self._sentence(near)) > room:
                break
            kept.append(near)
            room -= len(self._sentence(near))
        ends = self.arrays["title_ends"]
        title = self.arrays["titles"][ends[article - 1] if article else 0 : ends[article]]
        parts = [title, *(self._sentence(number) for number in sorted(kept))]
        return np.concatenate(parts).tolist()[:MAX_READING], kept

    def _ask(self, tokens: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
        """A question and its answer, which is a span of the sentence; None if the sentence yields none.

        A question word replaces the span or comes first. Some of the other words are dropped.
        """
        starts = np.flatnonzero(self.starts_word[tokens])
        if len(starts) < 6:
            return None
        ends = np.append(starts[1:], len(tokens))
        first, last = self._span(tokens, starts, random)
        answer = self._stripped(tokens[starts[first] : ends[last]])
        if not len(answer) or len(answer) > 20:
            return None
        kind = "digit" if self.digit[answer[0]] else "capital" if self.capital[answer[0]] else "other"
        choices = self.question_words[kind]
        in_place, in_front = choices[int(random.integers(len(choices)))]
        reach, dropped = int(random.integers(5, 14)), random.random() * 0.5

        def kept(words: range) -> list[np.ndarray]:
            return [tokens[starts[word] : ends[word]] for word in words if random.random() >= dropped]

        before = kept(range(max(0, first - reach), first))
        after = kept(range(last + 1, min(len(starts), last + 1 + reach)))
        if not before and not after:
            return None
        if random.random() < 0.4:
            order = [*before, in_place, *after]
        elif random.random() < 0.4:
            order = [in_front, *after, *before]
        else:
            order = [in_front, *before, *after]
        question = self._stripped(np.concatenate(order))
        return (question, answer) if len(question) else None

    def _span(self, tokens: np.ndarray, starts: np.ndarray, random: np.random.Generator) -> tuple[int, int]:
        """The first and the last word of a span; most spans start with a capital or a digit."""
        notable = np.flatnonzero((self.capital | self.digit)[tokens[starts]])
        notable = notable[notable > 0]
        if len(notable) and random.random() < 0.85:
            first = int(random.choice(notable))
        else:
            first = int(random.integers(len(starts)))
        return first, min(first + min(int(random.geometric(0.45)), 6), len(starts)) - 1

    def _stripped(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens without punctuation at the end."""
        while len(tokens) and self.punctuation[tokens[-1]]:
            tokens = tokens[:-1]
        return tokens


class Questions:
    """Stage 2: real questions, with contexts of varying quality (`mixed`) or with gold passages only."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, *, mixed: bool, ask_share: float = 0.0):
        arrays = np.load(folder / "questions.npz")
        self.arrays = {name: arrays[name] for name in arrays.files}
        self.shares = VARIANT_SHARES if mixed else (1.0, 0.0, 0.0, 0.0)
        self.eos, self.ask_share = tokenizer.eos_token_id, ask_share
        self._rows = np.argsort(self.arrays["passage_of"], kind="stable")  # questions of one passage side by side
        self._passages = self.arrays["passage_of"][self._rows]

    def __len__(self) -> int:
        return len(self.arrays["answer_ends"])

    def reading(self, random: np.random.Generator) -> Reading | None:
        """A paragraph with its questions, or one question with one of its contexts; None if neither fits."""
        row = int(random.integers(len(self)))
        if random.random() < PARAGRAPH_SHARE:
            context, rows = self._text("passage", int(self.arrays["passage_of"][row])), self._same_passage(row)
        else:
            context, rows = self._text(str(random.choice(VARIANTS, p=self.shares)), row)[:144], np.array([row])
        branches: Branches = []
        for number in random.permutation(rows)[:MAX_QUESTIONS]:
            branch = self._text("question", number), [*self._text("answer", number), self.eos]
            if len(Reading(context, [*branches, branch])) <= MAX_READING:
                branches.append(branch)
        return Reading(context, branches, asked=random.random() < self.ask_share) if branches else None

    def _same_passage(self, row: int) -> np.ndarray:
        passage = self.arrays["passage_of"][row]
        return self._rows[slice(*np.searchsorted(self._passages, [passage, passage + 1]))]

    def _text(self, name: str, row: int) -> list[int]:
        ends = self.arrays[f"{name}_ends"]
        return self.arrays[name][ends[row - 1] if row else 0 : ends[row]].tolist()


class Steps(Dataset):
    """The packed batches of one process, by the number of the step."""

    def __init__(
        self,
        source: Cloze | Questions,
        *,
        steps: int,
        rows: int,
        row_tokens: int,
        seed: int,
        pad_id: int,
        process: int = 0,
    ):
        self.source, self.steps, self.rows, self.row_tokens, self.pad_id = source, steps, rows, row_tokens, pad_id
        self.seed, self.process = seed, [process] if process else []

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        random = np.random.default_rng([self.seed, step, *self.process])
        readings, tokens = [], 0
        while tokens < self.rows * self.row_tokens:
            reading = self.source.reading(random)
            if reading is not None:
                readings.append(reading)
                tokens += len(reading)
        batch, _ = collate_readings(readings, row_tokens=self.row_tokens, rows=self.rows, pad_id=self.pad_id)
        return batch | {"weights": target_weights(batch.pop("plain"))}


def target_weights(plain: torch.Tensor) -> torch.Tensor:
    """(n_targets,) weights that make one mean of the answers, which are few tokens, and one of the other targets."""
    return torch.where(plain, 1.0 / plain.sum().clamp(min=1), 1.0 / (~plain).sum().clamp(min=1))
