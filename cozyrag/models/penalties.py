"""Penalties on what the generator predicts: repeats, parroting the question, stopping too early.

Each is the expectation of a count under the generator's own probabilities at the answer positions, in closed form and
differentiable; a count of argmax tokens would have no gradient. Positions are taken as independent given the reference
before them, as in the cross-entropy itself. Left out: the weights (config.py) and the source of the probabilities.
"""

from dataclasses import dataclass
from functools import reduce

import torch


@dataclass(frozen=True)
class Penalties:
    """Weights of the three penalties (0 = off), the length of the n-grams, and the minimum tokens of an answer."""

    repeats: float = 0.0
    keywords: float = 0.0
    shortness: float = 0.0
    ngram: int = 3
    min_tokens: int = 3

    @property
    def names(self) -> list[str]:
        """The penalties that are on."""
        return [name for name in ("repeats", "keywords", "shortness") if vars(self)[name] > 0]

    @property
    def weights(self) -> list[float]:
        """The weights that belong to `values`."""
        return [vars(self)[name] for name in self.names]

    def values(
        self, probabilities: torch.Tensor, lengths: torch.Tensor, keywords: torch.Tensor, *, eos: int
    ) -> torch.Tensor:
        """The penalties that are on, summed over the answers, without weights, in the order of `names`.

        Args:
            probabilities: (answers, positions, vocabulary); at position `lengths[i]` answer i ends with `eos`.
            lengths: (answers,) tokens of each reference, without EOS. keywords: as for `keyword_mass`.
        """
        mask = torch.arange(probabilities.shape[1], device=lengths.device) < lengths.unsqueeze(1)
        compute = {
            "repeats": lambda: expected_repeats(probabilities, mask, n=self.ngram),
            "keywords": lambda: keyword_mass(probabilities, mask, keywords),
            "shortness": lambda: expected_shortfall(probabilities[:, :, eos], lengths.clamp(max=self.min_tokens)),
        }
        return torch.stack([compute[name]().sum() for name in self.names])


def expected_repeats(probabilities: torch.Tensor, mask: torch.Tensor, *, n: int) -> torch.Tensor:
    """(answers,) expected numbers of pairs of equal n-grams in each answer.

    For a pair of n-grams that start at i and i + d, the probability that they are equal is the product, over the chains
    of positions that equality ties together, of sum_v prod p(v). Apart by n or more, each chain has two positions and
    the product runs over entries of G = P P^T; overlapping ones (d < n) tie longer chains.

    Args:
        probabilities: (answers, positions, vocabulary); mask: (answers, positions), True at the tokens of the answer
        (without EOS), which come first in each row.
    """
    masked = probabilities * mask.unsqueeze(-1)
    answers, positions, _ = masked.shape
    if positions <= n:
        return masked.new_zeros(answers)
    agree = masked @ masked.transpose(1, 2)
    starts = positions - n + 1
    pairs = masked.new_ones(answers, starts, starts)  # float32, even if autocast computes `agree` in bf16
    for k in range(n):  # over the n-gram, not over the answer
        pairs = pairs * agree[:, k : k + starts, k : k + starts]
    total = torch.triu(pairs, diagonal=n).sum((1, 2))
    for distance in range(1, min(n, starts)):
        total = total + _overlapping(masked, n, distance)
    return total


def _overlapping(masked: torch.Tensor, n: int, distance: int) -> torch.Tensor:
    """Expected number of equal pairs of n-grams that start `distance` < n apart."""
    starts = masked.shape[1] - n - distance + 1
    chains = [range(first, n + distance, distance) for first in range(distance)]
    tied = [reduce(torch.mul, (masked[:, at : at + starts] for at in chain)).sum(-1) for chain in chains]
    return reduce(torch.mul, tied).sum(-1)


def keyword_mass(probabilities: torch.Tensor, mask: torch.Tensor, keywords: torch.Tensor) -> torch.Tensor:
    """(answers,) expected shares of each answer's tokens that are keywords of the question and not of the reference.

    Args:
        probabilities: (answers, positions, vocabulary); mask: (answers, positions) as above.
        keywords: (answers, k) int64 token ids, each at most once per row, padded with -1.
    """
    wanted = (keywords >= 0).unsqueeze(1)
    ids = keywords.clamp(min=0).unsqueeze(1).expand(-1, probabilities.shape[1], -1)
    mass = (probabilities.gather(2, ids) * wanted).sum(-1) * mask
    return mass.sum(1) / mask.sum(1).clamp(min=1)


def expected_shortfall(stop: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """(answers,) expected numbers of tokens by which an answer ends before `minimum`: E[max(0, minimum - length)].

    The answer reaches token t if no position up to t stops: E[min(length, m)] = sum_{t < m} prod_{s <= t} (1 - stop_s).
    With its own length as minimum, a one-word reference has no penalty.

    Args:
        stop: (answers, positions) probability of EOS at each position; minimum: (answers,) at most `positions`.
    """
    reached = torch.cumprod(1 - stop, dim=1)
    counted = torch.arange(stop.shape[1], device=stop.device) < minimum.unsqueeze(1)
    return minimum - (reached * counted).sum(1)
