"""RAG fine-tuning, plainly written: the baseline of the speed benchmark.

Every choice is the obvious one: one question and one sentence encoded at a time, batches of 4 padded to a fixed length,
the LM head at every position with labels of -100 outside of answers, dropout as in the config, default AdamW, penalties
counted in Python from the argmax tokens. Nothing is slow on purpose: prompts are tokenized beforehand, and the index is
from FAISS. Left out: learning-rate schedule, clipping, evaluation, saving.
"""

from collections.abc import Sequence

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.shared import stub_modules  # noqa: F401  first: allows the next imports without datasets and faiss
from cozyrag.data.sentences import split_sentences
from cozyrag.models.prompts import Example
from cozyrag.retrieval.passage_index import Passages

IGNORED = -100


def padded(examples: Sequence[Example], *, pad_id: int, pad_to: int) -> dict[str, torch.Tensor]:
    """Right-padded input_ids, attention_mask and labels (batch, length); only answer tokens have labels."""
    length = max(pad_to, *(len(example.input_ids) for example in examples))
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for example in examples:
        spare = length - len(example.input_ids)
        answer = example.input_ids[example.prompt_length :]
        batch["input_ids"].append(example.input_ids + [pad_id] * spare)
        batch["attention_mask"].append([1] * len(example.input_ids) + [0] * spare)
        batch["labels"].append([IGNORED] * example.prompt_length + answer + [IGNORED] * spare)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def repeated_ngrams(tokens: Sequence[int], n: int = 3) -> int:
    """Number of pairs of equal n-grams."""
    count = 0
    for first in range(len(tokens) - n + 1):
        for second in range(first + 1, len(tokens) - n + 1):
            if tokens[first : first + n] == tokens[second : second + n]:
                count += 1
    return count


def keyword_overlap(text: str, question: str) -> float:
    """Share of the words of a text that are in the question."""
    words = text.lower().split()
    asked = set(question.lower().split())
    return sum(1 for word in words if word in asked) / max(1, len(words))


def penalty(
    logits: torch.Tensor,
    labels: torch.Tensor,
    questions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    min_tokens: int = 3,
) -> float:
    """Mean over the batch of the repeats, overlap with the question, and shortness of the argmax answers."""
    total = 0.0
    predicted = logits[:, :-1].argmax(-1)
    for row, question in enumerate(questions):
        wanted = labels[row, 1:] != IGNORED
        tokens = predicted[row][wanted].tolist()
        if tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
        total += repeated_ngrams(tokens)
        total += keyword_overlap(tokenizer.decode(tokens), question)
        total += max(0, min_tokens - len(tokens))
    return total / len(questions)


def train_generator(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    questions: Sequence[str],
    *,
    device: torch.device,
    autocast: bool,
    learning_rate: float,
    batch_size: int = 4,
    pad_to: int = 256,
    penalty_weight: float = 0.1,
) -> list[float]:
    """One pass over the examples in random order. Returns the cross-entropy of each batch."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    order = torch.randperm(len(examples)).tolist()
    losses = []
    for start in tqdm(range(0, len(order), batch_size), desc="reference loop", unit="step", leave=False):
        rows = order[start : start + batch_size]
        batch = padded([examples[row] for row in rows], pad_id=tokenizer.pad_token_id, pad_to=pad_to)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            output = model(**batch)
        asked = [questions[row] for row in rows]
        loss = output.loss + penalty_weight * penalty(output.logits, batch["labels"], asked, tokenizer)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    return losses


def columns_of(model: SentenceTransformer, triplets: Sequence[tuple[str, str, str]]) -> list[dict]:
    """The model's input for all questions, all positives, and all negatives."""
    return [
        {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in model.preprocess(list(texts)).items()
        }
        for texts in zip(*triplets, strict=True)
    ]


def train_retriever(
    model: SentenceTransformer,
    triplets: Sequence[tuple[str, str, str]],
    *,
    autocast: bool,
    learning_rate: float,
    batch_size: int,
) -> list[float]:
    """One pass over (question, positive, negative) in random order. Returns the loss of each batch."""
    model.train()
    objective = MultipleNegativesRankingLoss(model, scale=20.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    order = torch.randperm(len(triplets)).tolist()
    losses = []
    for start in tqdm(range(0, len(order), batch_size), desc="plain retriever loop", unit="step", leave=False):
        features = columns_of(model, [triplets[row] for row in order[start : start + batch_size]])
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = objective(features, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def make_context(
    question: str,
    *,
    model: SentenceTransformer,
    index,
    passages: Passages,
    tokenizer: PreTrainedTokenizerBase,
    top_k: int,
    budget: int,
) -> str:
    """The sentences of the retrieved passages that are nearest to the question, within the budget.

    Args:
        index: a FAISS index of the passages' vectors, inner product.
    """
    vector = model.encode(question, show_progress_bar=False)
    _, rows = index.search(vector[np.newaxis], top_k)
    scored = []
    for row in rows[0].tolist():
        for sentence in split_sentences(passages.texts[row]):
            scored.append((float(model.encode(sentence, show_progress_bar=False) @ vector), sentence))
    kept, room = [], budget
    for _, sentence in sorted(scored, reverse=True):
        length = len(tokenizer(sentence)["input_ids"])
        if length <= room:
            kept.append(sentence)
            room -= length
    return " ".join(kept)
