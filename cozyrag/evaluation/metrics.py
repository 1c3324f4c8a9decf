"""The metrics, as pure functions of strings, ranks and arrays.

Training, benchmarks and the modules for the `evaluate` library (metric_modules/) all call them, so that every number is
computed in one place, easy to check against its source. The module imports nothing of the package, so wrong arguments
raise ValueError. Left out: reading, searching, generating, printing, and whether a text contains an answer
(data/matching.py).
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PACKAGES = {"rouge_l": "rouge_score", "bleu": "sacrebleu"}  # those of the extra `benchmarks`; others need none
_DRAWS = 4_000_000  # row numbers drawn at once: limits the memory of a bootstrap to about 50 MB


def normalize_answer(text: str) -> str:
    """The form in which answers are compared: lowercase, no ASCII punctuation, no articles, single spaces.

    Source: official SQuAD v1.1 evaluation script (Rajpurkar et al. 2016, arXiv:1606.05250).
    """
    bare = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction equals some reference after `normalize_answer`, else 0.0 (SQuAD v1.1).

    Without references the question has no answer, and only an empty prediction is correct (SQuAD 2.0, Rajpurkar et al.
    2018, arXiv:1806.03822).
    """
    wanted = {normalize_answer(reference) for reference in references} or {""}
    return float(normalize_answer(prediction) in wanted)


def f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of token precision and recall against the best reference, 0 to 1 (SQuAD v1.1).

    Tokens are the words of `normalize_answer`, counted with repeats. As in the official script, every prediction scores
    0.0 against a reference that is only articles or punctuation. Without references as in `exact_match`.
    """
    if not references:
        return exact_match(prediction, references)
    predicted = normalize_answer(prediction).split()
    return max(_token_f1(predicted, normalize_answer(reference).split()) for reference in references)


def _token_f1(predicted: list[str], wanted: list[str]) -> float:
    shared = (Counter(predicted) & Counter(wanted)).total()
    if shared == 0:
        return 0.0
    # The official order of operations: 2 * shared / total would differ in the last bit.
    precision, recall = shared / len(predicted), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def same_letters(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction differs from some reference only in case, articles, punctuation of any script, symbols,
    accents, spaces or Unicode variants: "U. S." and "US", "co-operation" and "co operation", "Zürich" and "Zurich".
    """
    wanted = {_letters(reference) for reference in references} - {""}
    return _letters(prediction) in wanted


def _letters(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", _ARTICLES.sub(" ", text.casefold()))
    return "".join(char for char in decomposed if unicodedata.category(char)[0] in "LN")


def computable(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the metrics whose packages are installed: all but "rouge_l" and "bleu" need none."""
    return tuple(name for name in names if name not in _PACKAGES or find_spec(_PACKAGES[name]) is not None)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words against the best reference, 0 to 1 (Lin 2004).

    Computed by the package rouge-score, without stemming. Without references as in `exact_match`. Raises ImportError if
    rouge-score is not installed.
    """
    if not references:
        return exact_match(prediction, references)
    return float(_rouge_scorer().score_multi(list(references), prediction)["rougeL"].fmeasure)


@cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer  # takes seconds to import

    return RougeScorer(["rougeL"], use_stemmer=False)


def bleu_statistics(prediction: str, references: Sequence[str]) -> np.ndarray:
    """Counts of one question, shape (10,): matching n-grams (n = 1 to 4), all n-grams, length, reference length.

    Counted by the package sacrebleu (Post 2018, arXiv:1804.08771); `bleu` takes their sums over questions. Zeros
    without references. Raises ImportError if sacrebleu is not installed.
    """
    if not references:
        return np.zeros(10)
    found = _bleu().sentence_score(prediction, list(references))
    return np.array([*found.counts, *found.totals, found.sys_len, found.ref_len], dtype=np.float64)


@cache
def _bleu():
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)  # avoids a warning; affects the score of a sentence, not its counts


def bleu(statistics: np.ndarray) -> float:
    """Corpus BLEU, 0 to 100, from summed `bleu_statistics`, shape (10,); sacrebleu's smoothing ("exp").

    Source: Papineni et al. 2002. 0.0 if there are no n-grams.
    """
    counts = [int(count) for count in statistics]
    if not counts[4]:
        return 0.0
    return float(_bleu().compute_bleu(counts[:4], counts[4:8], sys_len=counts[8], ref_len=counts[9]).score)


def ranks_of(ranked_ids: Sequence[str], relevant: Collection[str]) -> list[int]:
    """The ranks, from 1, of all `ranked_ids` (best first) that are in `relevant`, ascending.

    The order of the list is the ranking; the caller breaks ties. Of a repeated id only the first occurrence counts, but
    the others occupy their ranks.
    """
    wanted, ranks = set(relevant), []
    for rank, key in enumerate(ranked_ids, start=1):
        if key in wanted:
            wanted.remove(key)
            ranks.append(rank)
    return ranks


def recall_at(ranks: Sequence[int], k: int, relevant: int = 1) -> float:
    """The share of the `relevant` items among the first `k`; its mean over questions is recall@k.

    `ranks` are those of `ranks_of`, whose list may be shorter than `k`.
    """
    return sum(rank <= k for rank in ranks) / relevant


def hit_at(ranks: Sequence[int], k: int) -> float:
    """1.0 if any relevant item is among the first `k`, else 0.0; its mean is the hit rate (success@k)."""
    return float(any(rank <= k for rank in ranks))


def reciprocal_rank(ranks: Sequence[int], cutoff: int = 10) -> float:
    """1/rank of the first relevant item, 0.0 without one up to `cutoff`; its mean is MRR@cutoff (Voorhees 1999)."""
    return 1.0 / ranks[0] if ranks and ranks[0] <= cutoff else 0.0


def ndcg_at(ranks: Sequence[int], k: int, relevant: int = 1) -> float:
    """Normalised discounted cumulative gain of the first `k`, gains 0 or 1, discount log2(rank + 1); 0 to 1.

    The ideal ranking begins with min(k, relevant) relevant items. Source: Jarvelin and Kekalainen 2002.
    """
    ideal = math.fsum(1 / math.log2(rank + 1) for rank in range(1, min(k, relevant) + 1))
    return math.fsum(1 / math.log2(rank + 1) for rank in ranks if rank <= k) / ideal


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `values`, shape (n,), as (low, high) in their unit.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife". Raises ValueError for values that are empty
    or not of shape (n,), a level outside 0..1 or less than one resample.
    """
    low, high = np.quantile(_resampled_means(values, resamples, seed), _tails(level))
    return float(low), float(high)


def bleu_interval(statistics: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of corpus BLEU, from `bleu_statistics` of each question, shape (n, 10).

    Raises ValueError as `bootstrap_interval`.
    """
    # An equal seed draws the same questions for every column.
    columns = [_resampled_means(column, resamples, seed) for column in statistics.T]
    scores = [bleu(np.rint(sums)) for sums in np.stack(columns, axis=1) * len(statistics)]
    low, high = np.quantile(scores, _tails(0.95))
    return float(low), float(high)


def paired_bootstrap(
    before: np.ndarray, after: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float, float]:
    """Compare two results on the same rows, shape (n,) each: (mean of after - before, low, high, p_not_better).

    low and high bound 95 % of the resampled mean differences; p_not_better is the share of resamples in which `after`
    is not above `before` (0.0 means below 1 / resamples). Source: Efron and Tibshirani 1993; Koehn 2004, "Statistical
    significance tests for machine translation evaluation". Raises ValueError as `bootstrap_interval`, also for
    different shapes.
    """
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before.shape != after.shape:
        raise ValueError(f"expected pairs, found shapes {before.shape} and {after.shape}")
    difference = after - before
    means = _resampled_means(difference, resamples, seed)
    low, high = np.quantile(means, _tails(0.95))
    return float(difference.mean()), float(low), float(high), float(np.mean(means <= 0))


def _tails(level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, found {level}")
    return (1 - level) / 2, (1 + level) / 2


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of `resamples` samples of n out of n values with replacement, shape (resamples,)."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or resamples < 1:
        raise ValueError(f"expected values of shape (n,), n > 0, and resamples > 0; found {values.shape}, {resamples}")
    random = np.random.default_rng(seed)
    block = max(1, _DRAWS // values.size)
    sizes = ((min(block, resamples - start), values.size) for start in range(0, resamples, block))
    return np.concatenate(
        [values[random.integers(values.size, size=size, dtype=np.int32)].mean(axis=1) for size in sizes]
    )
