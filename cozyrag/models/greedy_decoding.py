"""Greedy answers of a batch, written token by token: rows that have ended leave it, and each row's certainty comes with it.

transformers' `generate` computes ended rows to the end and gives no probabilities without keeping all logits. Left out:
prompts (prompts.py), which tokens an answer may consist of (constrained_decoding.py), what the answers are for (generator.py).
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Cache, NoRepeatNGramLogitsProcessor, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from cozyrag.models.constrained_decoding import Spans


@dataclass(frozen=True)
class Limits:
    """What an answer may be: most and fewest tokens, the token that ends it, and the n-gram that must not come twice (0: none)."""

    longest: int
    end: int
    shortest: int = 0
    no_repeat: int = 0


@dataclass(frozen=True)
class Decoded:
    """tokens: those of the answer, without the end token. score: geometric mean of their probabilities and of the end
    token's, if it was reached. silence: the probability that the end token comes first."""

    tokens: list[int]
    score: float
    silence: float


@torch.inference_mode()
def write_greedily(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    limits: Limits,
    spans: Sequence[Spans] | None = None,
) -> list[Decoded]:
    """The most probable token again and again behind each prompt, until the end token or `limits.longest` tokens.

    Args:
        input_ids, attention_mask: (batch, length) int64, padded on the left.
        spans: of each row's context; the answer stays within one of them.
    """
    count, steps = len(input_ids), _Steps(model, input_ids, attention_mask)
    written = torch.empty(count, 0, dtype=torch.long, device=input_ids.device)
    tokens: list[list[int]] = [[] for _ in range(count)]
    sums, silence = np.zeros(count), np.zeros(count)
    alive = list(range(count))
    for number in range(limits.longest):
        logs = steps.logits(written[:, -1:]).float().log_softmax(-1)
        if number == 0:
            silence = logs[:, limits.end].exp().double().cpu().numpy()
        choice = _allowed(logs.clone(), written, limits, spans and [spans[row] for row in alive]).argmax(-1)
        sums[alive] += logs.gather(1, choice[:, None])[:, 0].double().cpu().numpy()
        written = torch.cat([written, choice[:, None]], dim=1)
        for row, token in zip(alive, choice.tolist(), strict=True):
            tokens[row].append(token)
        going = (choice != limits.end).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(alive):
            steps.keep(going)
            written, alive = written[going], [alive[place] for place in going.tolist()]
    scores = np.exp(sums / [max(1, len(each)) for each in tokens]).tolist()
    ended = [each[:-1] if each and each[-1] == limits.end else each for each in tokens]
    return [Decoded(*each) for each in zip(ended, scores, silence.tolist(), strict=True)]


def _allowed(logs: torch.Tensor, written: torch.Tensor, limits: Limits, spans: Sequence[Spans] | None) -> torch.Tensor:
    """(rows, vocabulary): the log-probabilities, minus infinity where a token may not come next."""
    count = written.shape[1]
    if limits.no_repeat and count:
        logs = NoRepeatNGramLogitsProcessor(limits.no_repeat)(written, logs)
    if spans is None:
        if count < limits.shortest:
            logs[:, limits.end] = -torch.inf
        return logs
    mask = torch.full_like(logs, -torch.inf)
    for row, (span, own) in enumerate(zip(spans, written.cpu().numpy(), strict=True)):
        following = span.next_tokens(own)
        if count < limits.shortest and len(following) > 1:
            following = [token for token in following if token != limits.end]
        mask[row, following] = logs[row, following]
    return mask


def _lets_rows_go(cache: object) -> bool:
    """Whether rows can be taken out of a cache; those of state-space layers have no such thing."""
    return isinstance(cache, Cache) and all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionLayer) for layer in cache.layers
    )


class _Steps:
    """The model's next-token logits, with a cache of keys and values whose rows can leave.

    A model whose cache cannot let rows go, or that has none, reads everything again at each step.
    """

    def __init__(self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        self.model = model
        self.ids, self.mask = input_ids, attention_mask
        self.cache = None
        known = inspect.signature(model.forward).parameters
        self.takes = {name for name in ("position_ids", "logits_to_keep") if name in known}

    def logits(self, newest: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) behind the `newest` tokens (rows, 1), at first (rows, 0) for those behind the prompts."""
        self.ids = torch.cat([self.ids, newest], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(newest)], dim=1)
        places = (self.mask.cumsum(1) - 1).clamp(min=0)
        ids = self.ids if self.cache is None else newest
        options = {"position_ids": places[:, -ids.shape[1] :], "logits_to_keep": 1}
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **{name: value for name, value in options.items() if name in self.takes},
        )
        cache = out.get("past_key_values")
        self.cache = cache if _lets_rows_go(cache) else None
        return out.logits[:, -1]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        if self.cache is not None:
            self.cache.batch_select_indices(rows)
