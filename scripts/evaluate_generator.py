"""Evaluate a generator on its own: its answers from the gold passage, filtered by the package.

    python scripts/evaluate_generator.py GENERATOR --questions squad_dev.jsonl.gz --context_tokens 128

There is no retrieval, so the scores are the upper bound for a pair with perfect retrieval. Prints EM and F1 with 95 %
intervals (percentile bootstrap over the questions), and the share of the questions whose answer is in the filtered
context. Left out: the whole pair (train.py, benchmarks/quality/qa.py).
"""

import argparse
import json
import time

import numpy as np
import torch
from tqdm.auto import tqdm

from cozyrag.cli import entry_point
from cozyrag.data.matching import contains_answer, matching_form
from cozyrag.data.questions import read_questions, take
from cozyrag.errors import InputError
from cozyrag.evaluation.metrics import bootstrap_interval, exact_match, f1
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.bm25 import SentenceWords
from cozyrag.retrieval.contexts import ContextBuilder
from cozyrag.retrieval.passage_index import Passages


def gold_contexts(questions: dict, passages: Passages, generator: Generator, budget: int) -> list[str]:
    """The filtered gold passage of each question, by the hybrid context filter."""
    row_of = {key: row for row, key in enumerate(passages.ids)}
    rows = [[row_of[gold]] for gold in questions["passage_id"]]
    golds = sorted({row for (row,) in rows})
    retriever = Retriever.load_embedded(max_tokens=512)  # enough for a long paragraph
    _, made = retriever.encode_passages(passages.select(golds), passages.spans(golds), batch_size=64)
    vectors = dict(zip(golds, made.of(range(len(golds))), strict=True))
    builder = ContextBuilder(
        passages,
        generator.count_tokens,
        top_k=1,
        budget=budget,
        score_by="hybrid",
        sentence_vectors=lambda wanted: [vectors[row] for row in wanted],
        words=SentenceWords(passages.titles, passages.sentences(), stemmer="english"),
    )
    asked = retriever.encode(questions["question"], kind="query", batch_size=64, progress=True)
    return builder.contexts(questions["question"], rows, asked)


def evaluate(options: argparse.Namespace) -> dict:
    """EM, F1, and answers in the context, in percent, over the questions with a gold passage."""
    read = read_questions(options.questions)
    if read.passages is None:
        raise InputError(
            f"{options.questions}: expected questions with their gold passage (column 'context'), found none."
        )
    questions = take(read.table, options.max_questions, 0)[:]
    generator = Generator.load(options.generator)
    generator.model.to("cuda" if torch.cuda.is_available() else "cpu")
    contexts = gold_contexts(questions, Passages.of(read.passages), generator, options.context_tokens)
    began = time.perf_counter()
    predictions = generator.answer(
        questions["question"],
        contexts,
        context_tokens=options.context_tokens,
        max_new_tokens=24,
        batch_size=options.batch_size,
        extractive=options.extractive,
        progress=lambda batches: tqdm(batches, desc="answering", unit="batch"),
    )
    seconds = time.perf_counter() - began
    answers = questions["answers"]
    scores = {
        "em": [exact_match(text, each) for text, each in zip(predictions, answers, strict=True)],
        "f1": [f1(text, each) for text, each in zip(predictions, answers, strict=True)],
        "answer_in_context": [
            contains_answer(matching_form(text), each) for text, each in zip(contexts, answers, strict=True)
        ],
    }
    report = {
        "questions": len(predictions),
        "context_tokens": options.context_tokens,
        "extractive": options.extractive,
        "questions_per_second": round(len(predictions) / seconds, 1),
    }
    for name, each in scores.items():
        values = np.array(each, dtype=float)
        report[name] = round(100 * float(values.mean()), 2)
        report[f"{name}_interval"] = [round(100 * float(end), 2) for end in bootstrap_interval(values)]
    return report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("generator", help="checkpoint folder or Hub id")
    add("--questions", required=True, help="questions with their gold passage: SQuAD layout or a context column")
    add("--context_tokens", type=int, default=128, help="budget of the filtered passage, in tokens (default: 128)")
    add("--max_questions", type=int, help="size of the sample of questions (default: all)")
    add("--batch_size", type=int, default=64, help="questions answered at once (default: 64)")
    add("--extractive", action="store_true", help="write only spans of the context (constrained decoding)")
    options = parser.parse_args()
    entry_point(lambda: print(json.dumps(evaluate(options), indent=2)))


if __name__ == "__main__":
    main()
