"""Greedy decoding of a batch, token by token: finished rows leave the batch, and every answer has its confidence.

transformers' `generate` computes finished rows to the end and gives no probabilities without keeping all logits. Left
out: prompts (prompts.py), tokens of an extractive answer (constrained_decoding.py).
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Cache, NoRepeatNGramLogitsProcessor, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from cozyrag.models.constrained_decoding import Spans

# Of a standard deviation of the logits. Rounding moves them by 0.0004 in SmolLM2, RWKV's padding by 2.
MOVED = 0.05


@dataclass(frozen=True)
class Limits:
    """Of an answer: maximum tokens, the end token, minimum tokens, length of n-grams that must not repeat (0: off)."""

    longest: int
    end: int
    shortest: int = 0
    no_repeat: int = 0


@dataclass(frozen=True)
class Decoded:
    """tokens: of the answer, without the end token. score: geometric mean of their probabilities and, if reached, the
    end token's. silence: the probability that the end token comes first."""

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
    """The most probable token after each prompt, repeatedly, until the end token or `limits.longest` tokens.

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
        unfinished = (choice != limits.end).nonzero()[:, 0]
        if not len(unfinished):
            break
        if len(unfinished) < len(alive):
            steps.keep(unfinished)
            written, alive = written[unfinished], [alive[place] for place in unfinished.tolist()]
    scores = np.exp(sums / [max(1, len(each)) for each in tokens]).tolist()
    answers = [each[:-1] if each and each[-1] == limits.end else each for each in tokens]
    return [Decoded(*each) for each in zip(answers, scores, silence.tolist(), strict=True)]


@torch.inference_mode()
def reads_past_padding(model: PreTrainedModel) -> bool:
    """Whether a prompt that is padded beside a longer one gets the logits that it gets alone.

    Models with attention do; RWKV accepts an attention mask and ignores it. Measured at two steps, with a cache.
    """
    ids = torch.arange(1, 9, device=model.device) % model.get_input_embeddings().weight.shape[0]
    own = torch.ones(1, 3, dtype=torch.long, device=model.device)
    mask = torch.cat([torch.zeros_like(ids[None, :5]), own], dim=1)
    alone = _Steps(model, ids[None, :3], own)
    beside = _Steps(model, torch.stack([ids.roll(-3), ids]), torch.cat([mask, torch.ones_like(mask)]))
    for newest in (ids[:0], ids[:1]):
        logits = alone.logits(newest[None]).float()
        moved = (beside.logits(newest.expand(2, -1))[:1].float() - logits).abs().max()
        if moved > MOVED * logits.std():
            return False
    return True


def _allowed(logs: torch.Tensor, written: torch.Tensor, limits: Limits, spans: Sequence[Spans] | None) -> torch.Tensor:
    """(rows, vocabulary): the log-probabilities, minus infinity for tokens that may not come next."""
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


class _Steps:
    """The model's next-token logits, with a cache of keys and values that finished rows can leave.

    A model without such a cache, as one with state-space layers, reads the whole input again at each step.
    """

    def __init__(self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        self.model, self.ids, self.mask = model, input_ids, attention_mask
        self.cache: Cache | None = None
        self.takes = {"position_ids", "logits_to_keep", "cache"} & set(inspect.signature(model.forward).parameters)

    def logits(self, newest: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) after the `newest` tokens (rows, 1); in the first step (rows, 0), after the prompts."""
        self.ids = torch.cat([self.ids, newest], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(newest)], dim=1)
        places = (self.mask.cumsum(1) - 1).clamp(min=0)
        ids = self.ids if self.cache is None else newest
        kept = "cache" if "cache" in self.takes else "past_key_values"  # renamed in transformers 5.24
        options = {"position_ids": places[:, -ids.shape[1] :], "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in self.takes} | {kept: self.cache}
        out = self.model(input_ids=ids, attention_mask=self.mask, use_cache=True, **options)
        cache = out.get(kept)
        self.cache = cache if isinstance(cache, Cache) and all(map(_can_drop_rows, cache.layers)) else None
        return out.logits[:, -1]

    def keep(self, rows: torch.Tensor) -> None:
        """Continue with these rows only."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        if self.cache is not None:
            self.cache.batch_select_indices(rows)


def _can_drop_rows(layer: object) -> bool:
    return isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionLayer)
