"""How well a generator reads: its answers when it is given the gold passage, cut down by the package's own filter.

No retrieval takes part, so this is the reader alone: the ceiling of what the pair can do with perfect retrieval.

    python scripts/evaluate_generator.py GENERATOR --questions squad_dev.jsonl.gz --context_tokens 128

Prints EM and F1 with 95 % intervals (percentile bootstrap over the questions) and how many questions still have their
answer in the filtered context. Left out: the whole pair, which train.py examines.
"""

import argparse
import json
import time

import numpy as np
import torch
from tqdm.auto import tqdm

from cozyrag.cli import entry_point
from cozyrag.data.questions import read_questions, take
from cozyrag.errors import InputError
from cozyrag.evaluation.metrics import bootstrap_interval, contains_answer, exact_match, f1, normalize_answer
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.bm25 import SentenceWords
from cozyrag.retrieval.contexts import ContextBuilder
from cozyrag.retrieval.passage_index import Passages


def evaluate(options: argparse.Namespace) -> dict:
    """EM, F1 and answer survival in percent, over the questions that know their gold passage."""
    read = read_questions(options.questions)
    if read.passages is None:
        raise InputError(
            f"{options.questions}: expected questions that carry their gold passage (column 'context'), found none."
        )
    questions = take(read.table, options.max_questions, 0)[:]
    generator = Generator.load(options.generator)
    generator.model.to("cuda" if torch.cuda.is_available() else "cpu")
    passages = Passages.of(read.passages)
    words = SentenceWords(passages.titles, passages.sentences(), stemmer="english")
    builder = ContextBuilder(
        passages, generator.count_tokens, top_k=1, budget=options.context_tokens, score_by="hybrid", words=words
    )
    retriever = Retriever.load_embedded(max_tokens=512)  # a long paragraph is read to its end
    rows = [[builder.row_of[gold]] for gold in questions["passage_id"]]
    golds = sorted({row for (row,) in rows})
    _, made = retriever.encode_passages(builder.passages.select(golds), builder.passages.spans(golds), batch_size=64)
    vectors = dict(zip(golds, made.of(range(len(golds))), strict=True))
    builder.sentence_vectors = lambda wanted: [vectors[row] for row in wanted]
    asked = retriever.encode(questions["question"], kind="query", batch_size=64, progress=True)
    contexts = builder.contexts(questions["question"], rows, asked)
    began = time.perf_counter()
    predictions = generator.answer(
        questions["question"], contexts, context_tokens=options.context_tokens, max_new_tokens=24, batch_size=options.batch_size,
        extractive=options.extractive,
        progress=lambda batches: tqdm(batches, desc="answering", unit="batch"),
    )  # fmt: skip
    seconds = time.perf_counter() - began
    scores = {
        "em": np.array([exact_match(p, a) for p, a in zip(predictions, questions["answers"], strict=True)]),
        "f1": np.array([f1(p, a) for p, a in zip(predictions, questions["answers"], strict=True)]),
        "answer_in_context": np.array(
            [contains_answer(normalize_answer(c), a) for c, a in zip(contexts, questions["answers"], strict=True)],
            dtype=float,
        ),
    }
    report = {
        "questions": len(predictions),
        "context_tokens": options.context_tokens,
        "extractive": options.extractive,
        "questions_per_second": round(len(predictions) / seconds, 1),
    }
    for name, values in scores.items():
        report[name] = round(100 * float(values.mean()), 2)
        report[f"{name}_interval"] = [round(100 * float(end), 2) for end in bootstrap_interval(values)]
    return report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator", help="checkpoint folder or Hub id")
    parser.add_argument(
        "--questions", required=True, help="questions that carry their gold passage: SQuAD layout or a context column"
    )
    parser.add_argument(
        "--context_tokens", type=int, default=128, help="budget of the filtered passage, in tokens (default: 128)"
    )
    parser.add_argument("--max_questions", type=int, help="a sample of so many questions (default: all)")
    parser.add_argument("--batch_size", type=int, default=64, help="questions answered at once (default: 64)")
    parser.add_argument(
        "--extractive", action="store_true", help="write only word sequences of the context (constrained decoding)"
    )
    options = parser.parse_args()
    entry_point(lambda: print(json.dumps(evaluate(options), indent=2)))


if __name__ == "__main__":
    main()
