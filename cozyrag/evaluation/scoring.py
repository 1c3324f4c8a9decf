"""Scores with intervals and their tables, from evaluated questions: for `cozyrag evaluate` and the benchmarks.

Left out: the arithmetic of the metrics (metrics.py), answering (evaluation.py), comparisons (benchmarks).
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from cozyrag.evaluation.evaluation import VERDICTS
from cozyrag.evaluation.metrics import bleu, bleu_interval, bleu_statistics, bootstrap_interval

FOUND = ("recall@1", "recall@5", "recall@20", "mrr@10", "ndcg@10", "hit@10")
NAMES = {
    "em": "EM", "f1": "F1", "rouge_l": "ROUGE-L", "bleu": "BLEU", "answer_in_context": "answer in context",
    "mrr@10": "MRR@10", "ndcg@10": "nDCG@10", "hit@10": "hit rate@10",
}  # fmt: skip


def estimate(values: Sequence[float]) -> dict:
    """Mean and 95 % bootstrap interval, in percent, of values from 0 to 1."""
    array = np.asarray(values, dtype=np.float64)
    return {
        "mean": round(100 * float(array.mean()), 2),
        "interval": [round(100 * end, 2) for end in bootstrap_interval(array)],
    }


def scores_of(rows: Sequence[Mapping], names: Sequence[str]) -> dict[str, dict]:
    """Mean and interval of each metric of the rows. BLEU is computed over the corpus."""
    scores = {name: estimate([row[name] for row in rows]) for name in names if name != "bleu"}
    if "bleu" in names:
        statistics = np.stack([bleu_statistics(row["prediction"], row["answers"]) for row in rows])
        scores["bleu"] = {
            "mean": round(bleu(statistics.sum(axis=0)), 2),
            "interval": [round(end, 2) for end in bleu_interval(statistics)],
        }
    return {name: scores[name] for name in names}


def verdict_counts(rows: Sequence[Mapping]) -> dict[str, int]:
    """The number of questions with each verdict, in the order of VERDICTS."""
    counts = Counter(row["verdict"] for row in rows)
    return {verdict: counts[verdict] for verdict in VERDICTS}


# ---- tables ----


def cell(score: Mapping | None) -> str:
    """ "12.3 (10.1 to 14.5)", or a dash if there is no score."""
    return "-" if score is None else f"{score['mean']:.1f} ({score['interval'][0]:.1f} to {score['interval'][1]:.1f})"


def score_table(scores: Mapping[str, Mapping], names: Sequence[str], published: Sequence[Mapping] = ()) -> str:
    """A Markdown table with a row for each system and each published result."""
    lines = ["| | " + " | ".join(NAMES.get(name, name) for name in names) + " |", "|---|" + "---:|" * len(names)]
    lines += [
        f"| {system} | " + " | ".join(cell(own.get(name)) for name in names) + " |" for system, own in scores.items()
    ]
    for row in published:
        cells = [f"{row[name]:.2f}" if name in row else "-" for name in names]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict_table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Verdicts in percent as a Markdown table. Verdicts of no question are left out."""
    shown = [verdict for verdict in VERDICTS if any(own[verdict] for own in counts.values())]
    lines = ["| | " + " | ".join(shown) + " |", "|---|" + "---:|" * len(shown)]
    for system, own in counts.items():
        total = sum(own.values())
        lines.append(f"| {system} | " + " | ".join(f"{100 * own[verdict] / total:.1f}" for verdict in shown) + " |")
    return "\n".join(lines)
