"""Which mapping of the generator's confidence to the probability that its answer is right is best on new questions?

    cozyrag evaluate my-rag --questions test.jsonl --output test.json
    python -m benchmarks.quality.calibration --fit my-rag/evaluations/round-001.jsonl --test test.questions.jsonl

Rows: the confidence itself; temperature scaling (one number, Guo et al. 2017); Platt scaling (two numbers, Platt 1999),
which is what a run uses; isotonic regression (Zadrozny and Elkan 2002). Each is fitted on --fit, evaluated validation
questions of a run, and measured on --test. Printed: expected calibration error in groups of equal size and Brier score,
with 95 % bootstrap intervals over the questions, and what thresholds of the certainty do. Left out: answering.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar

from cozyrag.cli import entry_point
from cozyrag.evaluation.calibration import brier, calibration_error, certainties, coverage_table, fit, logit
from cozyrag.reporting.run_reader import read_evaluation

RESAMPLES = 1000
Map = Callable[[np.ndarray], np.ndarray]


def temperature(scores: np.ndarray, correct: np.ndarray) -> Map:
    """sigmoid(logit / T), where T has the greatest likelihood."""

    def loss(log_t: float) -> float:
        z = logit(scores) / np.exp(log_t)
        return float(np.mean(np.logaddexp(0, z) - correct * z))

    t = np.exp(minimize_scalar(loss, bounds=(-4, 6), method="bounded").x)
    return lambda new: 1 / (1 + np.exp(-logit(new) / t))


def isotonic(scores: np.ndarray, correct: np.ndarray) -> Map:
    """The best monotonic step function."""
    from sklearn.isotonic import IsotonicRegression

    return IsotonicRegression(out_of_bounds="clip", y_min=0, y_max=1).fit(scores, correct).predict


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], Map]] = {
    "confidence of the generator": lambda scores, correct: lambda new: new,
    "temperature scaling": temperature,
    "Platt scaling (used)": fit,
    "isotonic regression": isotonic,
}


def cell(measure: Callable[[np.ndarray, np.ndarray], float], certainty: np.ndarray, correct: np.ndarray) -> str:
    """The measure with its interval."""
    draws = np.random.default_rng(0).integers(0, len(correct), (RESAMPLES, len(correct)))
    low, high = np.quantile([measure(certainty[rows], correct[rows]) for rows in draws], [0.025, 0.975])
    return f"{measure(certainty, correct):.3f} ({low:.3f} to {high:.3f})"


def compare(options: argparse.Namespace) -> None:
    """Print the tables."""
    fitted, (scores, correct) = (
        certainties([row for row in read_evaluation(path) if row["prediction"]]) for path in (options.fit, options.test)
    )
    print(
        f"{len(fitted[0])} answers to fit on, {len(scores)} to measure on, {100 * correct.mean():.1f} % of them right."
    )
    print("\n| certainty | calibration error | Brier score | mean |\n|---|---:|---:|---:|")
    for name, method in METHODS.items():
        made = method(*fitted)(scores)
        print(
            f"| {name} | {cell(calibration_error, made, correct)} | {cell(brier, made, correct)} | {made.mean():.3f} |"
        )
    print(f"\n{coverage_table(fit(*fitted)(scores), correct)}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, required=True, help="evaluated validation questions of a run")
    parser.add_argument("--test", type=Path, required=True, help="evaluated other questions, of `cozyrag evaluate`")
    options = parser.parse_args()
    entry_point(lambda: compare(options))


if __name__ == "__main__":
    main()
