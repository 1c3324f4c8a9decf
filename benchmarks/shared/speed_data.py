"""Data of the speed benchmarks: questions with passages, prompts, and the checkpoints that all sides start from.

The training parts need no search. A context is a gold passage and the passages after it in the file, cut at the budget,
so a prompt is as long as a real one. Left out: what each side does with the data.
"""

import gzip
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
)

from benchmarks.shared import stub_modules
from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.models.prompts import Example, encode_examples
from cozyrag.models.retriever import Retriever, embedded_path
from cozyrag.retrieval.passage_index import Passages
from cozyrag.runtime.assets import QUICKSTART

NEIGHBOURS = 4  # passages that a context is cut from: the default top_k
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Asked:
    """Questions, one answer of each, and the row of the gold passage of each."""

    questions: list[str]
    answers: list[str]
    gold: list[int]

    def first(self, count: int, start: int = 0) -> "Asked":
        """`count` questions from `start` on, wrapping around at the end."""
        rows = [(start + at) % len(self.questions) for at in range(count)]
        return Asked(
            [self.questions[row] for row in rows], [self.answers[row] for row in rows], [self.gold[row] for row in rows]
        )

    def split(self, train: int, held_out: int) -> tuple["Asked", "Asked"]:
        """`train` questions to train on, and others that are held out, at most half of all."""
        start = len(self.questions) - min(held_out, len(self.questions) // 2)
        return self.first(start).first(train), self.first(len(self.questions) - start, start)


def read_corpus(questions: str | None, passages: str | None, *, seed: int) -> tuple[Asked, Passages]:
    """Questions in random order, and all passages.

    Args:
        questions, passages: files in any format of train.py, or .jsonl without datasets; both None: the quickstart set.

    Raises:
        InputError: no question has a known gold passage, or a file is unusable.
    """
    if questions is None:
        questions, passages = QUICKSTART["questions"], passages or QUICKSTART["passages"]
    read = _read_lines if "datasets" in stub_modules.MISSING else _read_tables
    rows, columns = read(questions, passages)
    row_of = {key: row for row, key in enumerate(columns.ids)}
    usable = [(question, answer, row_of[key]) for question, answer, key in rows if key in row_of]
    if not usable:
        raise InputError(f"Expected questions with a known gold passage, found none in {questions}. Give --passages.")
    random.Random(seed).shuffle(usable)
    return Asked(*(list(column) for column in zip(*usable, strict=True))), columns


def _read_tables(questions: str, passages: str | None) -> tuple[list[tuple[str, str, str]], Passages]:
    """(question, answer, passage id) and the passages, with the readers of the package."""
    from cozyrag.data.passages import read_passages
    from cozyrag.data.questions import read_questions

    read = read_questions(questions)
    table = read_passages(passages)[0] if passages else read.passages
    if table is None:
        raise InputError(f"Expected passages to search, found none in {questions}. Give --passages.")
    columns = read.table[:]
    answers = [each[0] for each in columns["answers"]]
    return list(zip(columns["question"], answers, columns["passage_id"], strict=True)), Passages.of(table)


def _read_lines(questions: str, passages: str | None) -> tuple[list[tuple[str, str, str]], Passages]:
    """The same from JSON lines with question, answers, and passage_id or context, without datasets."""
    asked = _lines(questions)
    held = _lines(passages) if passages else [row | {"id": row["context"], "text": row["context"]} for row in asked]
    unique = {row["id"]: row for row in held}
    columns = Passages(
        list(unique), [row.get("title") or "" for row in unique.values()], [row["text"] for row in unique.values()]
    )
    return [
        (row["question"], row["answers"][0], row.get("passage_id") or row.get("context", "")) for row in asked
    ], columns


def _lines(path: str) -> list[dict]:
    if not path.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(
            f"Expected a .jsonl or .jsonl.gz file, found {path}. Other formats need the package datasets: install it."
        )
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, mode="rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


@dataclass(frozen=True)
class Prompts:
    """Training data of the generators: the same texts and tokens for all sides."""

    questions: list[str]
    contexts: list[str]
    answers: list[str]
    examples: list[Example]


def make_prompts(asked: Asked, passages: Passages, generator: Generator, *, context_tokens: int) -> Prompts:
    """Prompts in the generator's layout whose contexts fill the budget."""
    contexts, tokenizer = [], generator.tokenizer
    for gold in asked.gold:
        near = [(gold + step) % len(passages.ids) for step in range(NEIGHBOURS)]
        ids = tokenizer("\n".join(passages.select(near)), add_special_tokens=False, verbose=False)["input_ids"]
        contexts.append(tokenizer.decode(ids[:context_tokens]))
    examples = encode_examples(
        tokenizer,
        questions=asked.questions,
        contexts=contexts,
        answers=asked.answers,
        context_tokens=context_tokens,
        max_length=generator.max_length,
        layout=generator.layout,
    )
    return Prompts(asked.questions, contexts, asked.answers, examples)


@dataclass
class Models:
    """Checkpoints that every side loads again before each run, so that all start from equal weights.

    Args:
        generator: a checkpoint; None: random weights of `shape`.
        tokenizer: folder of a tokenizer for random weights; None: one trained on `texts`.
        retriever: "embedded", "random" (the shape of all-MiniLM-L6-v2, for machines without its weights), or a folder.
    """

    texts: Sequence[str]
    shape: GPT2Config
    generator: str | None = None
    tokenizer: str | None = None
    retriever: str = "embedded"
    _folder: tempfile.TemporaryDirectory = field(default_factory=tempfile.TemporaryDirectory)

    @cached_property
    def generator_folder(self) -> str:
        """The folder of the generator."""
        if self.generator:
            return self.generator
        folder = Path(self._folder.name) / "generator"
        if self.tokenizer:
            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer, trust_remote_code=False)
        else:
            tokenizer = GPT2Tokenizer().train_new_from_iterator(
                self.texts, vocab_size=self.shape.vocab_size, show_progress=False
            )
        if len(tokenizer) > self.shape.vocab_size:
            raise InputError(
                f"--vocabulary: expected at least the {len(tokenizer)} tokens of the tokenizer, found "
                f"{self.shape.vocab_size}. Raise it."
            )
        tokenizer.save_pretrained(folder)
        self.shape.bos_token_id = self.shape.eos_token_id = tokenizer.eos_token_id
        GPT2LMHeadModel(self.shape).save_pretrained(folder)
        return str(folder)

    def load_retriever(self, device: str, max_tokens: int | None = None) -> Retriever:
        """The retriever, reading at most `max_tokens` of a passage; None: its own limit."""
        return Retriever.load(self.retriever_folder, max_tokens=max_tokens, device=device)

    @property
    def retriever_folder(self) -> str:
        """The retriever as a folder as it was published: older libraries cannot load what this one saves."""
        if self.retriever == "embedded":
            return str(embedded_path())
        return self.random_retriever if self.retriever == "random" else self.retriever

    @cached_property
    def random_retriever(self) -> str:
        """An untrained SentenceTransformer of the shape of all-MiniLM-L6-v2, with a vocabulary from `texts`."""
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

        bert, folder = (str(Path(self._folder.name) / name) for name in ("bert", "retriever"))
        _word_pieces(self.texts).save_pretrained(bert)
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        BertModel(config).save_pretrained(bert)
        modules = [Transformer(bert, max_seq_length=256), Pooling(384), Normalize()]
        SentenceTransformer(modules=modules, device="cpu").save_pretrained(folder, create_model_card=False)
        return folder


def _word_pieces(texts: Sequence[str]) -> BertTokenizerFast:
    """A WordPiece tokenizer like BERT's, trained on the texts."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=30522, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    return BertTokenizerFast(tokenizer_object=tokenizer)
