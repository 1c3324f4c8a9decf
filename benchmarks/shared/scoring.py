"""What the tables of qa.py compare: the metrics of answers, and paired tests of every two systems.

The results depend on questions, passages, and models only. Left out: times (bench.py), scores with intervals and their
tables (cozyrag/evaluation/scoring.py).
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from cozyrag.evaluation.metrics import computable, paired_bootstrap, rouge_l
from cozyrag.evaluation.scoring import NAMES

ANSWERS = ("em", "f1", "rouge_l", "bleu", "answer_in_context")
TESTED = ("em", "f1")


def answer_metrics() -> tuple[str, ...]:
    """ANSWERS, without ROUGE-L and BLEU where their packages (the extra `benchmarks`) are not installed."""
    return computable(ANSWERS)


def with_rouge_l(rows: Sequence[dict]) -> list[dict]:
    """Evaluated rows with ROUGE-L, if its package is installed."""
    if "rouge_l" not in answer_metrics():
        return list(rows)
    return [row | {"rouge_l": rouge_l(row["prediction"], row["answers"])} for row in rows]


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
