"""Scores with intervals, paired tests, and their tables, from evaluated questions.

The results depend on questions, passages, and models only. Left out: times (bench.py), the arithmetic of the metrics
(cozyrag/evaluation/metrics.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from cozyrag.errors import InputError
from cozyrag.evaluation.evaluation import VERDICTS
from cozyrag.evaluation.metrics import (
    bleu,
    bleu_interval,
    bleu_statistics,
    bootstrap_interval,
    paired_bootstrap,
    rouge_l,
)

ANSWERS = ("em", "f1", "rouge_l", "bleu", "answer_in_context")
FOUND = ("recall@1", "recall@5", "recall@20", "mrr@10", "ndcg@10", "hit@10")
TESTED = ("em", "f1")
NAMES = {
    "em": "EM", "f1": "F1", "rouge_l": "ROUGE-L", "bleu": "BLEU", "answer_in_context": "answer in context",
    "mrr@10": "MRR@10", "ndcg@10": "nDCG@10", "hit@10": "hit rate@10",
}  # fmt: skip


def check_packages() -> None:
    """Raise InputError if a package of the extra `benchmarks` is missing, before hours of work."""
    try:
        rouge_l("a", ["a"])
        bleu_statistics("a", ["a"])
    except ImportError as error:
        raise InputError(
            f'Expected the package {error.name}, which is not installed. Run `pip install "cozyrag[benchmarks]"`.'
        ) from error


def with_rouge_l(rows: Sequence[dict]) -> list[dict]:
    """Evaluated rows with ROUGE-L."""
    return [row | {"rouge_l": rouge_l(row["prediction"], row["answers"])} for row in rows]


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


def paired_tests(systems: Mapping[str, Sequence[Mapping]], metrics: Sequence[str] = TESTED) -> list[dict]:
    """A paired bootstrap test of every two systems.

    Returns:
        for each pair and metric: the mean of first - second in points, its 95 % interval, and the share of the
        resamples in which the first is not better.
    """
    tests = []
    for first, second in combinations(systems, 2):
        for metric in metrics:
            values = [np.array([row[metric] for row in systems[name]]) for name in (second, first)]
            mean, low, high, p = paired_bootstrap(*values)
            tests.append(
                {
                    "metric": metric, "first": first, "second": second, "difference": round(100 * mean, 2),
                    "interval": [round(100 * low, 2), round(100 * high, 2)], "p_not_better": round(p, 4),
                }
            )  # fmt: skip
    return tests


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


def test_table(tests: Sequence[Mapping], first: str) -> str:
    """A Markdown table of the tests of one system against the others; "" if there are none."""
    own = [test for test in tests if test["first"] == first]
    metrics = list(dict.fromkeys(test["metric"] for test in own))
    lines = [
        f"| {first} against | " + " | ".join(NAMES.get(m, m) for m in metrics) + " |",
        "|---|" + "---:|" * len(metrics),
    ]
    for other in dict.fromkeys(test["second"] for test in own):
        cells = [
            f"{test['difference']:+.1f} ({test['interval'][0]:+.1f} to {test['interval'][1]:+.1f}), "
            f"p {p_value(test['p_not_better'])}"
            for test in own
            if test["second"] == other
        ]
        lines.append(f"| {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if own else ""


def p_value(p: float) -> str:
    """A share of 2,000 resamples as text; 0 is "< 0.0005"."""
    return f"{p:.4f}" if p else "< 0.0005"


def verdict_table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Verdicts in percent as a Markdown table. Verdicts of no question are left out."""
    shown = [verdict for verdict in VERDICTS if any(own[verdict] for own in counts.values())]
    lines = ["| | " + " | ".join(shown) + " |", "|---|" + "---:|" * len(shown)]
    for system, own in counts.items():
        total = sum(own.values())
        lines.append(f"| {system} | " + " | ".join(f"{100 * own[verdict] / total:.1f}" for verdict in shown) + " |")
    return "\n".join(lines)
