"""How a step is cut into micro-batches: by their number, or by the tokens of one.

On a CPU, small micro-batches take the same time with a fraction of the memory. The result of a step depends on them
only by rounding. Left out: measuring free memory (hardware.py), the steps (generator_phase.py, retriever_phase.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from cozyrag.models.product_attention import LONGEST
from cozyrag.training.step_order import shard

ENOUGH = 1200  # tokens of a generator's micro-batch above which a CPU gets no faster
GENERATOR_BYTES = 1e9  # of its activations on a CPU; with twice as much SmolLM2 is a twentieth faster
GENERATOR_SHARE = 1 / 2  # of the memory that weights, gradients and AdamW's moments leave
RETRIEVER_SHARE = 1 / 4  # of the same; more micro-batches cost forward passes, fewer cost memory
RETRIEVER_BYTES = 2e9  # upper limit on a CPU
# Floats that a layer keeps per token, measured on GPT-2, Llama and BERT (torch.autograd.graph.saved_tensors_hooks)
OF_WIDTH = 11
OF_DROPOUT = 9
OF_INNER = {"gelu": 2, "relu": 2, "silu": 4}  # by activation; silu is gated
OF_OTHER_INNER = 5  # gelu_new and others that are written in Python
OF_HALF = 2.6  # bytes of each of these floats in half precision, some of which stay in float32
LEAN_WIDTH, LEAN_INNER = 9, 3  # width and inner in bf16 with the layers of lean_layers.py


@dataclass(frozen=True)
class Cut:
    """How each process cuts its share of a step into micro-batches.

    tokens: most tokens of a micro-batch, with padding; a longer row is alone. None: `micro_batches` is their number.
    room: most tokens whose activations fit into memory. A step with a longer row recomputes them in the backward pass
    (activation checkpointing). None: no step does.
    """

    micro_batches: int = 1
    tokens: int | None = None
    room: int | None = None

    def recomputes(self, longest: int) -> bool:
        """Whether a step with a longest row of so many tokens recomputes activations."""
        return self.room is not None and longest > self.room

    def smaller(self, load: "Load") -> "Cut | None":
        """The next cut if this load does not fit: twice the micro-batches or half the tokens; None if there is none."""
        if self.tokens is None:
            doubled = min(2 * load.micro_batches, load.most)
            return replace(self, micro_batches=doubled) if load.micro_batches < load.most else None
        if load.micro_batches >= load.most and (self.room is None or self.recomputes(load.tokens)):
            return None
        tokens = max(1, load.tokens // 2)
        return replace(self, tokens=tokens, room=None if self.room is None else min(self.room, tokens))


@dataclass(frozen=True)
class Load:
    """The size of a step that is cut: micro-batches per process, tokens of the largest, most micro-batches of use."""

    micro_batches: int
    tokens: int
    most: int


def micro_batches(lengths: Sequence[int], cut: Cut, *, processes: int = 1) -> list[list[int]]:
    """The rows of a step as micro-batches, the same number for each process: those of process i are [i::processes].

    By tokens, they are as few as possible and have equal numbers of rows if these fit. Rows should be sorted by length.
    Some micro-batches are empty if rows are few.

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
    """Rows in order, with a new group wherever one more row would exceed the tokens."""
    groups: list[list[int]] = []
    longest = 0
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
    """The load of a step of rows with these lengths, in tokens."""
    groups = micro_batches(lengths, cut, processes=processes)
    return Load(len(groups) // processes, max(padded(lengths, group) for group in groups), max(1, len(lengths)))


def caching_load(sides: Sequence[Sequence[int]], cut: Cut, *, together: int) -> Load:
    """The load of a process's share of a retriever step, whose sides have the same number of micro-batches.

    By tokens, these are as few as possible, since all but the last are embedded twice. The last ones of all sides are
    in memory together, so the tokens are those of the largest ones together.

    Args:
        sides: for questions and for passages the tokens of each text of this process, in order.
        together: number of texts that the encoder pads together, shortest first.
    """
    most = max(1, *map(len, sides))

    def load(number: int) -> Load:
        parts = [[[side[at] for at in part] for part in shard(range(len(side)), parts=number)] for side in sides]
        return Load(number, sum(max(_padded_together(part, together) for part in side) for side in parts), most)

    if cut.tokens is None:
        return load(cut.micro_batches)
    return next((found for number in range(1, most) if (found := load(number)).tokens <= cut.tokens), load(most))


def _padded_together(lengths: Sequence[int], together: int) -> int:
    ordered = sorted(lengths)
    blocks = [ordered[at : at + together] for at in range(0, len(ordered), together)]
    return sum(len(block) * block[-1] for block in blocks)


# ---- how many tokens fit


def token_bytes(
    config: PretrainedConfig,
    *,
    precision: str = "no",
    dropout: bool = False,
    length: int = 0,
    products: bool = False,
    lean: bool = False,
) -> int | None:
    """Estimated bytes of activations per token of training; None if the model's config does not give its sizes.

    Args:
        precision: as Accelerate names it. In half precision norms and sums stay in float32.
        dropout: whether the model trains with dropout.
        length: tokens of a row, which counts only for attention without a fused kernel ("eager", or by products).
        products: attention is that of product_attention.py, in bf16.
        lean: all layers are those of lean_layers.py, in bf16.
    """
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    layers, width, heads = (getattr(config, name, None) for name in names)
    if not (layers and width and heads):
        return None
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    wide = max(width, heads * (getattr(config, "head_dim", None) or 0))
    scores = 2 * heads * min(length, LONGEST)
    if lean:
        return layers * (2 * (LEAN_WIDTH * wide + LEAN_INNER * inner) + scores)
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None) or ""
    kept = (OF_WIDTH + OF_DROPOUT * dropout) * wide + OF_INNER.get(activation, OF_OTHER_INNER) * inner
    if getattr(config, "_attn_implementation", None) == "eager":
        kept += (1 + 2 * dropout) * heads * length
    return int(layers * (kept * (4 if precision == "no" else OF_HALF) + products * scores))


def token_budget(each: int, free: float, *, share: float, states: float, at_most: float | None = None) -> int:
    """The tokens of `each` bytes that fit into a share of the free memory, at least one.

    Args:
        free: bytes. states: bytes of gradients and AdamW's moments, not yet allocated. at_most: bytes of activations.
    """
    room = share * max(0.0, free - states)
    return max(1, int(min(room, at_most or room) // each))


def generator_budget(each: int, free: float, *, states: float, device: str, can_recompute: bool = True) -> Cut:
    """The cut of the generator's steps: the tokens that fit, on a CPU no more than make it faster."""
    room = token_budget(each, free, share=GENERATOR_SHARE, states=states)
    enough = min(ENOUGH, max(1, int(GENERATOR_BYTES // each))) if device == "cpu" else room
    return Cut(tokens=min(room, enough), room=room if can_recompute else None)


def retriever_budget(each: int, free: float, *, states: float, device: str) -> Cut:
    """The cut of the retriever's steps: the tokens that fit into a bounded share. It does not recompute activations."""
    at_most = RETRIEVER_BYTES if device == "cpu" else None
    return Cut(tokens=token_budget(each, free, share=RETRIEVER_SHARE, states=states, at_most=at_most))


def describe_cut(model: str, cut: Cut, each: int | None) -> str:
    """The log line about a cut; `each`: bytes of activations per token."""
    if cut.tokens is None:
        return f"{model}: {cut.micro_batches} micro-batch{'es' if cut.micro_batches > 1 else ''} per step and process"
    size = f" (about {cut.tokens * each / 1e9:.1f} GB of activations)" if each else ""
    return f"{model}: micro-batches of up to {cut.tokens:,} tokens{size}"
