"""Training of a generator in bf16 on a CPU, with fewer kernels and fewer stored activations.

In bf16 the matrix products are so fast that half of a step goes to everything around them. Parts are replaced whose
gradients are written out: attention (product_attention.py), the gradients of the vocabulary's matrix, which are added
in place, and of a Llama the RMS norm (returned in bf16, which the products around it take) and SwiGLU (stores its two
inputs alone). Results differ by rounding. Left out: inference, float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP, LlamaRMSNorm

from cozyrag.models.product_attention import attention_by_products, has_products

Forward: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def bf16_step(accelerator: Accelerator, model: PreTrainedModel) -> Iterator[None]:
    """Around all micro-batches of a training step in bf16: weights are cast once, and layers are lean if they can be.

    Take backward passes inside, under `torch.autocast(..., enabled=False)`. Does nothing in other precisions.
    """
    if accelerator.mixed_precision != "bf16":
        yield
        return
    lean = has_products(accelerator, model)
    # autocast keeps cast weights until its outermost context ends
    with accelerator.autocast(), lean_layers(accelerator, model) if lean else nullcontext():
        yield


def trains_lean(accelerator: Accelerator, model: PreTrainedModel) -> bool:
    """Whether `bf16_step` replaces every part of the model that stores much: the model is a Llama."""
    return type(model) is LlamaForCausalLM and model.config.hidden_act == "silu" and has_products(accelerator, model)


@contextmanager
def lean_layers(accelerator: Accelerator, model: PreTrainedModel) -> Iterator[None]:
    """Inside, under autocast to bf16, the model trains with lean layers.

    DDP has to see every gradient, so with several processes the vocabulary's are left to autograd.
    """
    changed = _in_place(model) if accelerator.num_processes == 1 else {}
    for module in model.modules():
        if type(module) in FORWARDS and _is_as_made(module):
            changed[module] = partial(FORWARDS[type(module)], module)
    for module, forward in changed.items():
        vars(module)["forward"] = forward
    try:
        with attention_by_products(accelerator, model):
            yield
    finally:
        for module in changed:
            del module.forward


def _is_as_made(module: nn.Module) -> bool:
    """Whether nobody has replaced the forward pass of this module."""
    return "forward" not in vars(module)


# ---- norm and activation


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
    if module.config.hidden_act != "silu":
        return type(module).forward(module, states)
    return module.down_proj(_SwiGLU.apply(module.gate_proj(states), module.up_proj(states)))


FORWARDS: dict[type, Callable] = {LlamaRMSNorm: _norm, LlamaMLP: _mlp}


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


def _in_place(model: PreTrainedModel) -> dict[nn.Module, Forward]:
    """The forward functions of the embedding and the head, where these are trained and plain."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    forwards: dict[nn.Module, Forward] = {}
    if type(embedding) is nn.Embedding and _is_as_made(embedding) and _is_plain(embedding):
        anchor = torch.zeros((), requires_grad=True)  # autograd calls `backward` only if an input wants a gradient
        forwards[embedding] = lambda ids: _Lookup.apply(ids, embedding, anchor)
    if type(head) is nn.Linear and _is_as_made(head) and head.weight.requires_grad and head.bias is None:
        cast = head.weight.detach().bfloat16()
        forwards[head] = lambda states: _Logits.apply(states, head, cast)
    return forwards


def _is_plain(embedding: nn.Embedding) -> bool:
    """Whether it is trained, and neither scales its rows nor their gradients."""
    special = embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse
    return embedding.weight.requires_grad and not special


def _sum_of(weight: nn.Parameter) -> torch.Tensor:
    """The gradient of a weight, to add to."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad
