"""The last block of a GPT-2 computed only where its output is read: at the few positions that an answer is predicted from.

Its keys and values are needed of every token, the rest (queries' products, projection, MLP: three quarters of its matrices)
only there. Losses and gradients stay what they are. Blocks of other models than GPT-2 are left to themselves. Left out: which positions
are read (batching.py), and the output embeddings, which are computed there alone too (generator.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2Model

FEW = 0.5  # share of the positions above which nothing would be saved


@contextmanager
def read_only_at(model: PreTrainedModel, positions: torch.Tensor, tokens: int) -> Iterator[None]:
    """Within it, hidden states that the model gives are right at `positions` and not to be used elsewhere.

    Args:
        model: the base model, without a head. positions: (n,) int64, ascending, into the flattened (batch * length).
        tokens: batch * length.
    """
    block = _last_block(model)
    if block is None or len(positions) > FEW * tokens:
        yield
        return
    # on the block itself, so that what wraps it (adapters inside, sharding and checkpointing around) works as ever
    block.forward = partial(_forward, block, positions)
    # nor is the block computed again on the way back, when it is itself again: it keeps its few activations
    recomputes, block.gradient_checkpointing = block.gradient_checkpointing, False
    try:
        yield
    finally:
        del block.forward
        block.gradient_checkpointing = recomputes


def _last_block(model: PreTrainedModel) -> GPT2Block | None:
    """The block, if it is one that `_forward` computes as it would itself."""
    if not isinstance(model, GPT2Model) or type(model.h[-1]).forward is not GPT2Block.forward:
        return None
    config = model.config
    known = config._attn_implementation in ("sdpa", "eager")  # others have masks of their own
    return model.h[-1] if known and not (config.add_cross_attention or config.reorder_and_upcast_attn) else None


def _forward(
    block: GPT2Block, positions: torch.Tensor, hidden: torch.Tensor, past=None, attention_mask=None, *unused, **named
) -> torch.Tensor:
    """(batch, length, d): the block's output at `positions`, its input elsewhere.

    attention_mask: None (causal), or (batch or 1, 1, length, length), bool (true: seen) or to be added to the products.
    """
    attention, (batch, length, width) = block.attn, hidden.shape
    rows, places = positions // length, positions % length
    counts = torch.bincount(rows, minlength=batch)
    columns = torch.arange(len(positions), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    queries, keys, values = attention.c_attn(block.ln_1(hidden)).split(width, dim=2)
    heads = lambda states: states.unflatten(2, (-1, attention.head_dim)).transpose(1, 2)  # noqa: E731
    asked = queries.new_zeros(batch, int(counts.max()), width).index_put((rows, columns), queries[rows, places])
    if attention_mask is None:
        seen = torch.arange(length, device=rows.device) <= places[:, None]
    else:
        seen = attention_mask.expand(batch, -1, -1, -1)[rows, 0, places]
    mask = torch.ones(*asked.shape[:2], length, dtype=torch.bool, device=rows.device).to(seen.dtype)  # padding sees all
    mask = mask.index_put((rows, columns), seen).unsqueeze(1)
    found = F.scaled_dot_product_attention(
        heads(asked),
        heads(keys),
        heads(values),
        attn_mask=mask,
        dropout_p=attention.attn_dropout.p if block.training else 0.0,
        scale=attention.scaling,
    )
    found = found.transpose(1, 2).flatten(2)[rows, columns]
    states = hidden[rows, places] + attention.resid_dropout(attention.c_proj(found))
    states = states + block.mlp(block.ln_2(states))
    return hidden.index_put((rows, places), states.to(hidden.dtype))
