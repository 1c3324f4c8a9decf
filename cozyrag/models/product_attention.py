"""Attention as batched products, for training in bf16 on a CPU.

PyTorch's fused kernel for a CPU is made for long inputs: the retriever's backward pass through it takes a quarter of a
step. Batched products with a written-out gradient take a third of its time, if their scores stay in the cache. Results
differ by rounding: scores are rounded to bf16, as in transformers' "eager" attention. Left out: inference, float32 (no
gain), long rows, models that do not take attention from transformers' table.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "cozyrag_products"  # a name for transformers' table of attention functions
LONGEST = 512  # tokens; longer rows store more than they gain
CACHED = 4e6  # bytes of scores computed at a time; with 1 MB attention takes 1.5 times as long, with 8 MB 1.2 times


@contextmanager
def attention_by_products(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Inside, the models of transformers within `model` take this attention if they train in bf16 on a CPU."""
    configs = {id(part.config): part.config for part in _fitting(accelerator, model)}.values()
    for config in configs:
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"


def has_products(accelerator: Accelerator, model: nn.Module) -> bool:
    """Whether `attention_by_products` changes anything in this model."""
    return any(True for _ in _fitting(accelerator, model))


def _fitting(accelerator: Accelerator, model: nn.Module) -> Iterator[PreTrainedModel]:
    """The models of transformers within a model whose attention is replaced."""
    if accelerator.mixed_precision != "bf16" or accelerator.device.type != "cpu":
        return
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or not part._supports_attention_backend:
            continue
        if part.config._attn_implementation == "sdpa":
            yield part


def attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask=None, **named
) -> tuple[torch.Tensor, None]:
    """softmax(q k^T * scaling) v, as `AttentionInterface` calls it.

    What it does not know, such as dropout or a bias of positions, PyTorch's kernel computes, and rows beyond LONGEST.

    Args:
        query: (batch, heads, length, d); key, value: (batch, key-value heads, length, d).
        attention_mask: None (causal if the module is), or (batch or 1, 1, length, length) bool, true where a key is
            visible.

    Returns:
        (batch, length, heads, d) in the type of `value`, and None for the weights.
    """
    if not _is_known(query, key, value, attention_mask, named):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **named)
    length, kind = query.shape[2], value.dtype
    visible = attention_mask
    if visible is None and getattr(module, "is_causal", True):
        visible = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
    bias = torch.zeros((1, 1, 1, length) if visible is None else visible.shape, dtype=kind, device=query.device)
    if visible is not None:
        bias.masked_fill_(~visible, torch.finfo(kind).min)
    found = _Attention.apply(query.to(kind), key.to(kind), value, bias, named["scaling"])
    return found.transpose(1, 2).contiguous(), None


def _is_known(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, named: dict
) -> bool:
    """Whether these are the arguments of plain self-attention."""
    others = (named.get(name) for name in ("position_bias", "cache", "softcap", "is_causal"))
    if named.get("dropout") or named.get("scaling") is None or any(each is not None for each in others):
        return False
    length = query.shape[2]
    shapes = {(rows, 1, length, length) for rows in (1, query.shape[0])}
    seen = attention_mask is None or (attention_mask.dtype == torch.bool and tuple(attention_mask.shape) in shapes)
    return seen and key.shape[2] == length <= LONGEST and key.shape == value.shape


class _Attention(torch.autograd.Function):
    """Batched products; query heads that share a key head are rows of one product."""

    @staticmethod
    def forward(ctx, query, key, value, bias, scaling):
        batch, heads, length, width = query.shape
        groups = key.shape[1]
        shared = heads // groups
        queries = query.reshape(batch * groups, shared * length, width)
        keys, values = (each.reshape(batch * groups, length, width) for each in (key, value))
        weights = queries.new_empty(batch * groups, shared * length, length)
        found = torch.empty_like(queries)
        for rows in _chunks(batch, weights):
            own, part = bias[rows] if len(bias) > 1 else bias, slice(rows.start * groups, rows.stop * groups)
            own = own.expand(rows.stop - rows.start, groups, length, length).repeat(1, 1, shared, 1).flatten(0, 1)
            scores = torch.baddbmm(own, queries[part], keys[part].transpose(1, 2), alpha=scaling)
            torch.softmax(scores, -1, out=weights[part])
            torch.bmm(weights[part], values[part], out=found[part])
        ctx.save_for_backward(queries, keys, values, weights)
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape)
        return found.view(query.shape)

    @staticmethod
    def backward(ctx, gradient):
        queries, keys, values, weights = ctx.saved_tensors
        asked, held = ctx.shapes
        gradient = gradient.reshape(queries.shape)
        of_queries, of_keys, of_values = (torch.empty_like(each) for each in (queries, keys, values))
        for rows in _chunks(asked[0], weights):
            part = slice(rows.start * held[1], rows.stop * held[1])
            torch.bmm(weights[part].transpose(1, 2), gradient[part], out=of_values[part])
            of_weights = torch.bmm(gradient[part], values[part].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights[part], -1, weights.dtype).mul_(ctx.scaling)
            torch.bmm(of_scores, keys[part], out=of_queries[part])
            torch.bmm(of_scores.transpose(1, 2), queries[part], out=of_keys[part])
        return of_queries.view(asked), of_keys.view(held), of_values.view(held), None, None


def _chunks(batch: int, weights: torch.Tensor) -> Iterator[slice]:
    """Slices of the batch whose scores stay in the cache."""
    rows = max(1, int(CACHED * batch // max(1, weights.nbytes)))
    return (slice(at, min(at + rows, batch)) for at in range(0, batch, rows))


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
