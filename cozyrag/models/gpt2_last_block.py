"""GPT-2's last block computed only where its output is used: at the few positions that predict answer tokens.

Every token needs its keys and values; queries, projection and MLP (three quarters of its weights) are needed only
there. Losses and gradients stay the same. Models other than GPT-2 are left unchanged. Left out: which positions are
used (batching.py), and the output embeddings, which are also computed only there (token_losses.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2Model

FEW = 0.5  # share of the positions above which nothing would be saved


@contextmanager
def read_only_at(model: nn.Module, positions: torch.Tensor, tokens: int) -> Iterator[None]:
    """Inside the context, the model's hidden states are valid only at `positions`.

    Args:
        model: the base model, without a head. positions: (n,) int64, ascending, into the flattened (batch * length).
        tokens: batch * length.
    """
    block = _last_block(model)
    if block is None or len(positions) > FEW * tokens:
        yield
        return
    # Set on the block itself, so that wrappers (adapters inside, sharding and checkpointing around it) keep working.
    vars(block)["forward"] = partial(_forward, block, positions)
    # No gradient checkpointing: the backward pass would recompute the original block. It keeps its few activations.
    recomputes, block.gradient_checkpointing = block.gradient_checkpointing, False
    try:
        yield
    finally:
        del block.forward
        block.gradient_checkpointing = recomputes


def _last_block(model: nn.Module) -> GPT2Block | None:
    """The last block, if `_forward` computes what it would compute itself."""
    if not isinstance(model, GPT2Model):
        return None
    block, config = model.h[-1], model.config
    if not isinstance(block, GPT2Block) or type(block).forward is not GPT2Block.forward:
        return None
    known = config._attn_implementation in ("sdpa", "eager")  # others have masks of their own
    return block if known and not (config.add_cross_attention or config.reorder_and_upcast_attn) else None


def _forward(
    block: GPT2Block, positions: torch.Tensor, hidden: torch.Tensor, past=None, attention_mask=None, *unused, **named
) -> torch.Tensor:
    """(batch, length, d): the block's output at `positions`, its input elsewhere.

    attention_mask: None (causal), or (batch or 1, 1, length, length), bool (true: visible) or added to the scores.
    """
    attention, (batch, length, width) = block.attn, hidden.shape
    rows, places = positions // length, positions % length
    counts = torch.bincount(rows, minlength=batch)
    columns = torch.arange(len(positions), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    queries, keys, values = attention.c_attn(block.ln_1(hidden)).split(width, dim=2)
    heads = lambda states: states.unflatten(2, (-1, attention.head_dim)).transpose(1, 2)  # noqa: E731
    asked = queries.new_zeros(batch, int(counts.max()), width).index_put((rows, columns), queries[rows, places])
    if attention_mask is None:
        visible = torch.arange(length, device=rows.device) <= places[:, None]
    else:
        visible = attention_mask.expand(batch, -1, -1, -1)[rows, 0, places]
    mask = torch.ones(*asked.shape[:2], length, dtype=torch.bool, device=rows.device).to(visible.dtype)
    mask = mask.index_put((rows, columns), visible).unsqueeze(1)  # padding sees everything
    dropout = attention.attn_dropout.p if block.training else 0.0
    found = F.scaled_dot_product_attention(
        heads(asked), heads(keys), heads(values), attn_mask=mask, dropout_p=dropout, scale=attention.scaling
    )
    found = found.transpose(1, 2).flatten(2)[rows, columns]
    states = hidden[rows, places] + attention.resid_dropout(attention.c_proj(found))
    states = states + block.mlp(block.ln_2(states))
    return hidden.index_put((rows, places), states.to(hidden.dtype))
