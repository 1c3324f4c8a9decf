"""How contexts are best filtered: which share of the answers survives, what it costs, what the reader makes of it.

    python benchmarks/filter.py --questions squad_dev.jsonl.gz --also_passages squad_train.jsonl.gz --index squad-index

Questions are searched for in all passages of the question files. Of the answers that stand in one of the top-k passages
found, the share that is still in the context is printed for several budgets and ways to choose sentences: by vectors of
sentences encoded one by one, by vectors from one pass over the passage (late chunking), by shared words, by late chunking
and words together, and by cutting the passages off. Left out: training; the retriever is as it comes unless one is named.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
from searching import add_arguments, corpus_of, open_index, retriever_of

from cozyrag.cli import entry_point
from cozyrag.data.sentences import split_sentences
from cozyrag.evaluation.metrics import bootstrap_interval, contains_answer, exact_match, f1, normalize_answer
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.contexts import ContextBuilder, sentence_source
from cozyrag.retrieval.hybrid import Searcher
from cozyrag.retrieval.passage_index import Passages

WAYS = ("truncation", "one encode per sentence", "late chunking", "word overlap", "late chunking + overlap")


def one_by_one(passages: Passages, retriever: Retriever) -> Callable[[Sequence[int]], list[np.ndarray]]:
    """Sentence vectors as they are made plainly: every sentence a text of its own. Kept, since every budget asks for the same."""
    known: dict[int, np.ndarray] = {}

    def encode(rows: Sequence[int]) -> list[np.ndarray]:
        new = [row for row in rows if row not in known]
        sentences = [split_sentences(passages.texts[row]) for row in new]
        flat = [sentence for each in sentences for sentence in each]
        if flat:
            vectors = retriever.encode(flat, kind="document", batch_size=64)
            known.update(zip(new, np.split(vectors, np.cumsum([len(each) for each in sentences])[:-1]), strict=True))
        return [known[row] for row in rows]

    return encode


def truncated(builder: ContextBuilder, rows: Sequence[int], tokenizer) -> str:
    """The passages one after another, cut off at the budget."""
    ids = tokenizer("\n".join(builder.passages.select(rows[: builder.top_k])), verbose=False)["input_ids"]
    return tokenizer.decode(ids[: builder.budget])


def contexts_of(
    way: str, builder: ContextBuilder, sources: dict, questions: Sequence[str], found, tokenizer
) -> tuple[list[str], float]:
    """Contexts of all questions in one of WAYS, and the seconds it took."""
    began = time.perf_counter()
    if way == "truncation":
        contexts = [truncated(builder, rows, tokenizer) for rows in found.rows.tolist()]
    else:
        builder.score_by = {"word overlap": "sparse", "late chunking + overlap": "hybrid"}.get(way, "dense")
        builder.sentence_vectors = sources["plain" if way == "one encode per sentence" else "late"]
        contexts = builder.contexts(questions, found.rows.tolist(), found.vectors)
    return contexts, time.perf_counter() - began


def compare(options: argparse.Namespace) -> None:
    """Print the tables."""
    questions, passages = corpus_of(options)
    retriever = retriever_of(options)
    generator = Generator.load(options.generator)
    index = open_index(options, passages, retriever)
    words = SentenceWords(index.passages.titles, index.passages.sentences(), stemmer=options.stemmer)
    searcher = Searcher(
        index,
        LexicalIndex(index.passages.to_read(), stemmer=options.stemmer),
        encode=lambda texts: retriever.encode(texts, kind="query", batch_size=64),
        mode="hybrid",
        words=words,
    )
    found = searcher.search(questions["question"], options.top_k)
    builder = ContextBuilder(index.passages, generator.count_tokens, top_k=options.top_k, budget=1, words=words)
    present = np.array(
        [
            any(builder.holds_answer(r, a) for r in rows)
            for rows, a in zip(found.rows, questions["answers"], strict=True)
        ]
    )
    print(
        f"{len(present)} questions, {len(index)} passages; an answer stands in the top {options.top_k} of {present.mean():.1%}.\n"
    )
    sources = {"late": sentence_source(index, retriever), "plain": one_by_one(index.passages, retriever)}
    print("| way | " + " | ".join(f"{budget} tokens" for budget in options.budgets) + " | ms per question |")
    print("|---|" + "---:|" * (len(options.budgets) + 1))
    answered = {}
    for way in options.ways:
        cells, spent = [], 0.0
        for budget in options.budgets:
            builder.budget = budget
            contexts, seconds = contexts_of(way, builder, sources, questions["question"], found, generator.tokenizer)
            spent = spent or seconds  # of the first budget, for which sentences were encoded
            kept = np.array(
                [contains_answer(normalize_answer(c), a) for c, a in zip(contexts, questions["answers"], strict=True)],
                dtype=float,
            )[present]
            low, high = bootstrap_interval(kept)
            cells.append(f"{kept.mean():.3f} ({low:.3f} to {high:.3f})")
            if budget == options.answer_at:
                answered[way] = contexts
        print(f"| {way} | " + " | ".join(cells) + f" | {1000 * spent / len(present):.1f} |", flush=True)
    if answered:
        print_answers(generator, questions, answered, options.answer_at)


def print_answers(generator: Generator, questions: dict, answered: dict[str, list[str]], budget: int) -> None:
    """EM and F1 of the generator from each way's contexts."""
    print(f"\n| way, {budget} tokens | EM | F1 |\n|---|---:|---:|")
    for way, contexts in answered.items():
        texts = generator.answer(
            questions["question"], contexts, context_tokens=budget, max_new_tokens=24, batch_size=64
        )
        cells = []
        for metric in (exact_match, f1):
            values = np.array([metric(text, a) for text, a in zip(texts, questions["answers"], strict=True)])
            low, high = bootstrap_interval(values)
            cells.append(f"{100 * values.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})")
        print(f"| {way} | {cells[0]} | {cells[1]} |", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, max_questions=1500)
    parser.add_argument("--generator", required=True, help="generator whose tokens the budgets count: folder or Hub id")
    parser.add_argument("--top_k", type=int, default=4, help="passages whose sentences compete (default: 4)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 96, 128, 192], help="tokens of a context")
    parser.add_argument(
        "--ways", nargs="+", default=WAYS, choices=WAYS, metavar="WAY", help="only these (default: all)"
    )
    parser.add_argument("--answer_at", type=int, help="one of the budgets at which the generator answers too")
    options = parser.parse_args()
    entry_point(lambda: compare(options))


if __name__ == "__main__":
    main()
