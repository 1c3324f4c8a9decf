"""The loss of a causal language model at its target tokens: logits are computed only where there is a target.

Left out: which tokens are targets (prompts.py, batching.py), the penalties themselves (penalties.py), optimization.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from cozyrag.models.gpt2_last_block import read_only_at
from cozyrag.models.penalties import Penalties


class TokenLosses(nn.Module):
    """Cross-entropy of each target token.

    With GPT-2's vocabulary the LM head costs more per position than a transformer layer, and only the few answer tokens
    carry loss. Most of GPT-2's last block is computed only there, too (gpt2_last_block.py). How a family scales or caps
    its logits is read from its configuration.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        known = model.config.get_text_config().to_dict()
        # Cohere multiplies its logits, Granite divides them; Gemma 2 caps them: cap * tanh(logits / cap)
        self.scale = float(known.get("logit_scale") or 1.0) / float(known.get("logits_scaling") or 1.0)
        self.cap = known.get("final_logit_softcapping")

    def forward(self, input_ids, positions, targets, attention_mask=None, position_ids=None, **unused) -> torch.Tensor:
        """Losses of shape (n_targets,) in nats; arguments as `batching.collate` returns them."""
        logits = self.logits(input_ids, positions, attention_mask, position_ids)
        return F.cross_entropy(logits, targets, reduction="none")

    def logits(self, input_ids, positions, attention_mask, position_ids=None) -> torch.Tensor:
        """Logits (n_positions, vocabulary) in float32 at `positions` of the flattened batch."""
        model = self.model.base_model
        # torch.compile would trace the replacement of the block instead of executing it
        compiling = torch.compiler.is_compiling()
        with nullcontext() if compiling else read_only_at(model, positions, input_ids.numel()):
            hidden = model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            ).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden.flatten(0, 1)[positions]).float() * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class PenalizedLosses(TokenLosses):
    """Token losses, and penalties on the model's own predictions at the same positions."""

    def __init__(self, model: PreTrainedModel, *, penalties: Penalties, eos: int):
        super().__init__(model)
        self.penalties, self.eos = penalties, eos

    def forward(self, input_ids, positions, targets, attention_mask, rows, columns, keywords):
        """(losses (n_targets,), penalties summed over the answers (n_penalties,)), from one pass."""
        logits = self.logits(input_ids, positions, attention_mask)
        losses = F.cross_entropy(logits, targets, reduction="none")
        lengths = torch.bincount(rows, minlength=len(input_ids)) - 1  # without EOS
        padded = logits.new_zeros(len(input_ids), int(columns.max()) + 1, logits.shape[-1])
        padded = padded.index_put((rows, columns), torch.softmax(logits, dim=-1))
        return losses, self.penalties.values(padded, lengths, keywords, eos=self.eos)


@contextmanager
def recomputing(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing inside the context, if `wanted`: equal gradients, less memory, about a quarter more time.

    The model must be in training mode and have `supports_gradient_checkpointing`.
    """
    if not wanted:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the argument's new name does not exist in all versions yet
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()
