"""How well passages are found: by words, by vectors, by both as ranks, and by both added up, of passages or of sentences.

    python benchmarks/retrieval.py --questions squad_dev.jsonl.gz --also_passages squad_train.jsonl.gz --index squad-index \\
        --weigh_on squad_train.jsonl.gz

Prints recall@1/5/20 and MRR@10 in percent with 95 % intervals (percentile bootstrap over the questions). The weights of
the sums are fitted on other questions (`--weigh_on`), as a run fits them on its training questions. Left out: training.
"""

import argparse

import numpy as np
from searching import add_arguments, corpus_of, open_index, retriever_of

from cozyrag.cli import door
from cozyrag.index import Passages
from cozyrag.lexical import LexicalIndex, SentenceWords
from cozyrag.metrics import bootstrap_interval, recall_at, reciprocal_rank
from cozyrag.questions import read_questions, take
from cozyrag.search import CANDIDATES, Searcher

RANK_CONSTANT = 60  # Cormack et al. 2009, "Reciprocal rank fusion outperforms Condorcet"


def reciprocal_rank_fusion(rankings: tuple[np.ndarray, ...], k: int) -> np.ndarray:
    """(n, k) rows, best first, by the sum over the rankings (n, depth) of 1 / (60 + rank)."""
    fused = []
    for lists in zip(*rankings, strict=True):
        scores: dict[int, float] = {}
        for ranking in lists:
            for rank, row in enumerate(ranking.tolist(), 1):
                scores[row] = scores.get(row, 0.0) + 1 / (RANK_CONSTANT + rank)
        fused.append(sorted(scores, key=lambda row: (-scores[row], row))[:k])
    return np.array(fused)


def scores_of(rows: np.ndarray, gold: np.ndarray) -> str:
    """The cells of a table line."""
    hits = rows == gold[:, None]
    ranks = [int(hit.argmax()) + 1 if hit.any() else None for hit in hits]
    cells = []
    for measure in (*(lambda rank, k=k: recall_at(rank, k) for k in (1, 5, 20)), reciprocal_rank):
        values = np.array([measure(rank) for rank in ranks])
        low, high = bootstrap_interval(values)
        cells.append(f"{100 * values.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})")
    return " | ".join(cells)


def compare(options: argparse.Namespace) -> None:
    """Print the table."""
    questions, passages = corpus_of(options)
    retriever = retriever_of(options)
    index = open_index(options, passages, retriever)
    columns = Passages.of(passages)
    row_of, by_text = ({key: row for row, key in enumerate(keys)} for keys in (columns.ids, columns.texts))
    gold = np.array([row_of[passage_id] for passage_id in questions["passage_id"]])
    lexical = LexicalIndex(columns.to_read(), stemmer=options.stemmer)

    words = SentenceWords(columns.titles, columns.sentences(), stemmer=options.stemmer)

    def searcher(mode: str, words: SentenceWords | None = None) -> Searcher:
        encode = lambda texts: retriever.encode(texts, kind="query", batch_size=64)  # noqa: E731
        return Searcher(index, lexical, encode=encode, mode=mode, words=words)

    print(
        f"{len(gold)} questions, {len(index)} passages, retriever {options.retriever or 'all-MiniLM-L6-v2 as it comes'}.\n"
    )
    print("| | recall@1 | recall@5 | recall@20 | MRR@10 |\n|---|---:|---:|---:|---:|")
    for mode, name in (("bm25", "BM25"), ("dense", "vectors")):
        print(f"| {name} | {scores_of(searcher(mode).search(questions['question'], 20).rows, gold)} |", flush=True)
    for name, hybrid in (("passages", searcher("hybrid")), ("best sentences", searcher("hybrid", words))):
        if options.weigh_on:
            read = read_questions(options.weigh_on)
            texts = dict(zip(read.passages["id"], read.passages["text"], strict=True))
            sample = take(read.table, options.weigh_with, 1)[:]
            hybrid.choose_weights(sample["question"], [by_text[texts[key]] for key in sample["passage_id"]])
        found = hybrid.search(questions["question"], CANDIDATES)
        if hybrid.words is None:
            fused = scores_of(reciprocal_rank_fusion(found.rankings, 20), gold)
            print(f"| both, reciprocal ranks | {fused} |", flush=True)
        weights = f"{hybrid.weights.vectors:g}, {hybrid.weights.sentence_words:g}"
        print(f"| both, {name}, weights {weights} | {scores_of(found.rows[:, :20], gold)} |", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, max_questions=4000)
    parser.add_argument("--weigh_on", help="questions with gold passages on which the weights of the sums are fitted")
    parser.add_argument("--weigh_with", type=int, default=1000, help="how many of them (default: 1000)")
    options = parser.parse_args()
    door(lambda: compare(options))


if __name__ == "__main__":
    main()
