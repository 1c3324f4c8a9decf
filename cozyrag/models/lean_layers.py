"""Llama trained in bf16 on a CPU, with fewer kernels and fewer stored activations.

In bf16 the matrix products are so fast that half of a step goes to everything around them. Parts are replaced whose
gradients are written out: attention (PyTorch's kernel for a CPU is made for long inputs), the RMS norm (returned in
bf16, which the products around it take), SwiGLU (stores its two inputs alone), and the gradients of the vocabulary's
matrix, which are added in place. Results differ by rounding: scores of attention are rounded to bf16, as in
transformers' "eager" attention. Left out: inference, float32, other families (GPT-2 gains nothing), dropout.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP, LlamaRMSNorm

Forward: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
ATTENTION = "cozyrag_products"  # a name for transformers' table of attention functions


@contextmanager
def bf16_step(accelerator: Accelerator, model: PreTrainedModel) -> Iterator[None]:
    """Around all micro-batches of a training step in bf16: weights are cast once, and layers are lean if they can be.

    Take backward passes inside, under `torch.autocast(..., enabled=False)`. Does nothing in other precisions.
    """
    if accelerator.mixed_precision != "bf16":
        yield
        return
    lean, alone = trains_lean(accelerator, model), accelerator.num_processes == 1
    # autocast keeps cast weights until its outermost context ends
    with accelerator.autocast(), lean_layers(model, alone=alone) if lean else nullcontext():
        yield


def trains_lean(accelerator: Accelerator, model: PreTrainedModel) -> bool:
    """Whether `bf16_step` trains this model with lean layers: in bf16, on a CPU, and every part of it is known."""
    if accelerator.mixed_precision != "bf16" or accelerator.device.type != "cpu" or type(model) is not LlamaForCausalLM:
        return False
    config = model.config
    return config._attn_implementation == "sdpa" and not config.attention_dropout and config.hidden_act == "silu"


@contextmanager
def lean_layers(model: LlamaForCausalLM, *, alone: bool) -> Iterator[None]:
    """Inside, under autocast to bf16, the model trains with lean layers.

    alone: there is one process. DDP has to see every gradient, so the vocabulary's are then left to autograd.
    """
    config, kept = model.config, model.config._attn_implementation
    changed = _in_place(model) if alone else {}
    for module in model.modules():
        if type(module) in FORWARDS and _is_as_made(module):
            changed[module] = partial(FORWARDS[type(module)], module)
    config._attn_implementation = ATTENTION
    for module, forward in changed.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        config._attn_implementation = kept
        for module in changed:
            del module.forward


def _is_as_made(module: nn.Module) -> bool:
    """Whether nobody has replaced the forward pass of this module."""
    return "forward" not in vars(module)


# ---- attention, norm, and activation


def attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask=None, **named
) -> tuple[torch.Tensor, None]:
    """softmax(q k^T * scaling) v, as `AttentionInterface` calls it.

    Args:
        query: (batch, heads, length, d); key, value: (batch, key-value heads, length, d).
        attention_mask: None (causal), or (batch or 1, 1, length, length) bool, true where a key is visible.

    Returns:
        (batch, length, heads, d) in the type of `value`, and None for the weights.
    """
    length, kind = query.shape[2], value.dtype
    visible = attention_mask
    if visible is None:
        visible = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
    bias = torch.zeros(visible.shape, dtype=kind, device=query.device)
    bias = bias.masked_fill_(~visible, torch.finfo(kind).min)
    found = _Attention.apply(query.to(kind), key.to(kind), value, bias, named["scaling"])
    return found.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """Batched products; query heads that share a key head are rows of one product."""

    @staticmethod
    def forward(ctx, query, key, value, bias, scaling):
        batch, heads, length, width = query.shape
        groups = key.shape[1]
        shared = heads // groups
        queries = query.reshape(batch * groups, shared * length, width)
        keys, values = (each.reshape(batch * groups, length, width) for each in (key, value))
        bias = bias.expand(batch, groups, length, length).repeat(1, 1, shared, 1).flatten(0, 1)
        weights = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scaling).softmax(-1)
        ctx.save_for_backward(queries, keys, values, weights)
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape)
        return torch.bmm(weights, values).view(query.shape)

    @staticmethod
    def backward(ctx, gradient):
        queries, keys, values, weights = ctx.saved_tensors
        asked, held = ctx.shapes
        gradient = gradient.reshape(queries.shape)
        of_values = torch.bmm(weights.transpose(1, 2), gradient)
        of_weights = torch.bmm(gradient, values.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
        of_queries = torch.bmm(of_scores, keys)
        of_keys = torch.bmm(of_scores.transpose(1, 2), queries)
        return of_queries.view(asked), of_keys.view(held), of_values.view(held), None, None


class _RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + epsilon), in float32, rounded to bf16 (Zhang and Sennrich 2019, equation 4)."""

    @staticmethod
    def forward(ctx, states, weight, epsilon):
        norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norms.square_().div_(states.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(states, inverse, weight)
        return (states * inverse).mul_(weight).bfloat16()

    @staticmethod
    def backward(ctx, gradient):
        states, inverse, weight = ctx.saved_tensors
        normed, gradient = states * inverse, gradient.float()
        of_weight = (gradient * normed).flatten(0, -2).sum(0)
        gradient = gradient * weight
        share = (gradient * normed).mean(-1, keepdim=True)
        return gradient.sub_(normed.mul_(share)).mul_(inverse).to(states.dtype), of_weight, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202)."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


def _norm(module: LlamaRMSNorm, states: torch.Tensor) -> torch.Tensor:
    return _RMSNorm.apply(states, module.weight, module.variance_epsilon)


def _mlp(module: LlamaMLP, states: torch.Tensor) -> torch.Tensor:
    return module.down_proj(_SwiGLU.apply(module.gate_proj(states), module.up_proj(states)))


FORWARDS: dict[type, Callable] = {LlamaRMSNorm: _norm, LlamaMLP: _mlp}
AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


# ---- the vocabulary's matrix, whose gradient of 113 MB (SmolLM2) autograd makes anew, casts, and adds each time


class _Lookup(torch.autograd.Function):
    """Rows of an embedding."""

    @staticmethod
    def forward(ctx, ids, module, anchor):
        ctx.save_for_backward(ids)
        ctx.module = module
        return F.embedding(ids, module.weight)

    @staticmethod
    def backward(ctx, gradient):
        (ids,), module = ctx.saved_tensors, ctx.module
        if module.padding_idx is not None:  # as PyTorch, which does not train this row
            gradient = gradient.masked_fill((ids == module.padding_idx).unsqueeze(-1), 0)
        _sum_of(module.weight).index_add_(0, ids.flatten(), gradient.flatten(0, -2).float())
        return None, None, None


class _Logits(torch.autograd.Function):
    """States times a matrix, of which `cast` is a copy in bf16."""

    @staticmethod
    def forward(ctx, states, module, cast):
        states = states.to(cast.dtype)
        ctx.save_for_backward(states, cast)
        ctx.module = module
        return states @ cast.t()

    @staticmethod
    def backward(ctx, gradient):
        states, cast = ctx.saved_tensors
        _sum_of(ctx.module.weight).addmm_(gradient.flatten(0, -2).float().t(), states.flatten(0, -2).float())
        return gradient @ cast, None, None


def _in_place(model: LlamaForCausalLM) -> dict[nn.Module, Forward]:
    """The forward functions of the embedding and the head, where these are trained and plain."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    forwards: dict[nn.Module, Forward] = {}
    if type(embedding) is nn.Embedding and _is_as_made(embedding) and embedding.weight.requires_grad:
        anchor = torch.zeros((), requires_grad=True)  # autograd calls `backward` only if an input wants a gradient
        forwards[embedding] = lambda ids: _Lookup.apply(ids, embedding, anchor)
    if type(head) is nn.Linear and _is_as_made(head) and head.weight.requires_grad and head.bias is None:
        cast = head.weight.detach().bfloat16()
        forwards[head] = lambda states: _Logits.apply(states, head, cast)
    return forwards


def _sum_of(weight: nn.Parameter) -> torch.Tensor:
    """The gradient of a weight, to add to."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad
