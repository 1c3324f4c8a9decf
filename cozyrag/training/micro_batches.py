"""How a step is cut into micro-batches: by a number of them, or by the tokens that the activations of one may take.

The allocator keeps what large micro-batches leave, so small ones need a fraction of the memory; on a CPU they take the same
time. The result of a step does not depend on its micro-batches, but for the rounding of sums. All here is arithmetic on lengths,
sizes and bytes that are passed in. Left out: looking at free memory (hardware.py), the steps themselves (generator_phase.py,
retriever_phase.py), what is kept for a resumed run (checkpointing.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from cozyrag.models.batching import shard

ENOUGH = 1200  # tokens of a micro-batch of the generator beyond which a CPU gets no faster
GENERATOR_SHARE = 1 / 2  # of the memory that weights, gradients and AdamW's moments leave
RETRIEVER_SHARE = 1 / 4  # of the same: each micro-batch more than one costs forward passes, each fewer costs memory
RETRIEVER_BYTES = 2e9  # and at most so much on a CPU
# Floats that a layer keeps for each token, measured on GPT-2, Llama and BERT (torch.autograd.graph.saved_tensors_hooks)
OF_WIDTH = 11
OF_DROPOUT = 9
OF_INNER = {"gelu": 2, "relu": 2, "silu": 4}  # by activation; those of silu are gated
OF_OTHER_INNER = 5  # gelu_new and its like, written out in Python


@dataclass(frozen=True)
class Cut:
    """How each process works through its share of a step.

    tokens: most tokens, with padding, of a micro-batch; a longer row goes alone. None: `pieces` micro-batches instead.
    room: most tokens whose activations fit. A step with a longer row computes activations again on the way back. None: none does.
    """

    micro_batches: int = 1
    tokens: int | None = None
    room: int | None = None

    def recomputes(self, longest: int) -> bool:
        """Whether a step whose longest row has so many tokens computes activations again (activation checkpointing)."""
        return self.room is not None and longest > self.room

    def smaller(self, load: "Load") -> "Cut | None":
        """The next cut to try where memory did not do for this load: twice the pieces, or half the tokens; None: there is none."""
        if self.tokens is None:
            return (
                None
                if load.micro_batches >= load.most
                else replace(self, micro_batches=min(2 * load.micro_batches, load.most))
            )
        if load.micro_batches >= load.most and (self.room is None or self.recomputes(load.tokens)):
            return None
        tokens = max(1, load.tokens // 2)
        return replace(self, tokens=tokens, room=None if self.room is None else min(self.room, tokens))


@dataclass(frozen=True)
class Load:
    """What a cut makes of a step: micro-batches of each process, tokens of the largest one, and the most that would be of use."""

    micro_batches: int
    tokens: int
    most: int


def micro_batches(lengths: Sequence[int], cut: Cut, *, processes: int = 1) -> list[list[int]]:
    """The rows of a step as micro-batches, as many for each process: those of process i are [i::processes].

    By tokens there are as few as there can be of neighbours, of equal numbers of rows where these fit. Rows should come
    sorted by length. Some micro-batches are empty when rows are few.

    Args:
        lengths: (n_rows,) tokens of each row.
    """
    rows = range(len(lengths))
    if cut.tokens is None:
        return shard(rows, parts=processes * cut.micro_batches)
    groups = _fewest(lengths, cut.tokens)
    parts = processes * max(1, -(-len(groups) // processes))
    even = shard(rows, parts=parts)
    if all(len(group) <= 1 or padded(lengths, group) <= cut.tokens for group in even):
        return even
    return groups + [[] for _ in range(parts - len(groups))]


def _fewest(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows in order, cut wherever one more would bring a group above the tokens."""
    groups, longest = [], 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if groups and (len(groups[-1]) + 1) * longest <= tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = length
    return groups


def padded(lengths: Sequence[int], rows: Sequence[int]) -> int:
    """Tokens of these rows, padded to the longest of them."""
    return len(rows) * max((lengths[row] for row in rows), default=0)


def load_of(lengths: Sequence[int], cut: Cut, *, processes: int = 1) -> Load:
    """What `micro_batches` makes of a step of rows with these lengths, in tokens."""
    groups = micro_batches(lengths, cut, processes=processes)
    largest = max((padded(lengths, group) for group in groups), default=0)
    return Load(len(groups) // processes, largest, max(1, len(lengths)))


def caching_load(sides: Sequence[Sequence[int]], cut: Cut, *, together: int) -> Load:
    """What a cut makes of a process's share of a retriever step, each side of which goes through in as many equal pieces.

    By tokens these are as few as can be, since all but the last go through the encoder twice. The last pieces of all sides are
    held at the same time, so the tokens are those of the largest ones together.

    Args:
        sides: for questions and for passages the tokens of each text of this process, in order.
        together: texts that the encoder pads together, shortest first.
    """
    most = max(1, *(len(side) for side in sides))

    def tokens(micro_batches: int) -> int:
        shares = (
            [[side[at] for at in piece] for piece in shard(range(len(side)), parts=micro_batches)] for side in sides
        )
        return sum(max(_padded_together(piece, together) for piece in pieces_of_side) for pieces_of_side in shares)

    if cut.tokens is None:
        return Load(cut.micro_batches, tokens(cut.micro_batches), most)
    found = (Load(micro_batches, tokens(micro_batches), most) for micro_batches in range(1, most + 1))
    return next((load for load in found if load.tokens <= cut.tokens), Load(most, tokens(most), most))


def _padded_together(lengths: Sequence[int], together: int) -> int:
    ordered = sorted(lengths)
    return sum(
        len(block) * block[-1] for at in range(0, len(ordered), together) if (block := ordered[at : at + together])
    )


# ---- how many tokens fit


def token_bytes(
    config: PretrainedConfig, *, precision: str = "no", dropout: bool = False, length: int = 0
) -> int | None:
    """About how many bytes of activations a token of training takes; None for a model that does not tell its sizes.

    Args:
        precision: of the arithmetic, as Accelerate names it. In half precision norms and sums stay in float32.
        dropout: whether the model trains with dropout.
        length: tokens of a row, which counts only where attention is written out ("eager").
    """
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    layers, width, heads = (getattr(config, name, None) for name in names)
    if not (layers and width and heads):
        return None
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    wide = max(width, heads * (getattr(config, "head_dim", None) or 0))
    act = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    kept = (OF_WIDTH + OF_DROPOUT * dropout) * wide + OF_INNER.get(act, OF_OTHER_INNER) * inner
    if getattr(config, "_attn_implementation", None) == "eager":
        kept += (1 + 2 * dropout) * heads * length
    return int(layers * kept * (4 if precision == "no" else 3.5))


def token_budget(each: int, free: float, *, share: float, states: float, at_most: float | None = None) -> int:
    """How many tokens of `each` bytes fit into a share of what is free beside the states of training, at least one.

    Args:
        free: bytes. states: bytes of gradients and of AdamW's moments, which are yet to come. at_most: bytes of activations.
    """
    room = share * max(0.0, free - states)
    return max(1, int(min(room, at_most or room) // each))


def generator_budget(each: int, free: float, *, states: float, device: str, can_recompute: bool = True) -> Cut:
    """The cut of the generator's steps: by the tokens that fit, on a CPU no more than bring speed."""
    room = token_budget(each, free, share=GENERATOR_SHARE, states=states)
    return Cut(tokens=min(room, ENOUGH) if device == "cpu" else room, room=room if can_recompute else None)


def retriever_budget(each: int, free: float, *, states: float, device: str) -> Cut:
    """The cut of the retriever's steps: by the tokens that fit into a bounded share. It does not compute activations again."""
    at_most = RETRIEVER_BYTES if device == "cpu" else None
    return Cut(tokens=token_budget(each, free, share=RETRIEVER_SHARE, states=states, at_most=at_most))


def told(model: str, cut: Cut, each: int | None) -> str:
    """What was chosen, in a line."""
    if cut.tokens is None:
        return f"{model}: {cut.micro_batches} micro-batch{'es' if cut.micro_batches > 1 else ''} a step in each process"
    size = f" (about {cut.tokens * each / 1e9:.1f} GB of activations)" if each else ""
    return f"{model}: micro-batches of up to {cut.tokens:,} tokens{size}"
