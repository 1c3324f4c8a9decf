"""The generator phase: its examples, its steps, and the gradients of a step.

The loss of a step is the mean over all its answer tokens, so it does not depend on the number of processes and of
micro-batches. Left out: the loop over the steps (trainer.py), the size of micro-batches (micro_batches.py), where
contexts come from (contexts.py), the penalties themselves (penalties.py).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset

from cozyrag.config import TrainingSettings
from cozyrag.models.batching import answer_tokens, collate
from cozyrag.models.fsdp import Sharded, is_split
from cozyrag.models.generator import Generator
from cozyrag.models.lean_layers import bf16_step, trains_lean
from cozyrag.models.loading import DROPOUT_FIELDS
from cozyrag.models.penalties import Penalties
from cozyrag.models.product_attention import has_products
from cozyrag.models.prompts import Example, encode_examples, with_keywords
from cozyrag.models.token_losses import PenalizedLosses, TokenLosses, recomputing
from cozyrag.runtime.hardware import room_for_training
from cozyrag.training.micro_batches import ENOUGH, Cut, Load, generator_budget, load_of, micro_batches, token_bytes
from cozyrag.training.step_order import phase_seed, plan_steps
from cozyrag.training.trainer import Phase, PhaseCallback, Rows, chosen_together, first_cut, run_phase, trainable


def train_generator(
    accelerator: Accelerator,
    generator: Generator,
    contexts: Dataset,
    *,
    settings: TrainingSettings,
    context_tokens: int,
    round_number: int,
    callback: PhaseCallback,
) -> int:
    """Train the generator to answer from the contexts; returns the number of steps.

    Rows without an answer are left out; if the settings train the generator to abstain, their answer is empty.
    """
    examples = generator_examples(generator, contexts[:], settings=settings, context_tokens=context_tokens)
    lengths = [len(example.input_ids) for example in examples]
    steps = generator_steps(lengths, settings, round_number)
    cut = first_cut(settings, callback, lambda: generator_cut(accelerator, generator, settings, context_tokens))
    if steps and cut.recomputes(max(lengths)):
        callback.recomputes(max(lengths), cut)
    module, take_step = generator_gradients(accelerator, generator, examples, settings)

    def load(rows: Rows, cut: Cut) -> Load:
        return load_of([lengths[row] for row in rows], cut, processes=accelerator.num_processes)

    def show(rows: Rows) -> list[dict]:
        return [{"text": generator.tokenizer.decode(examples[row].input_ids)} for row in rows]

    phase = Phase("generator", trainable(module), steps, settings.generator_learning_rate, take_step, load, show)
    run_phase(accelerator, phase, cut, settings=settings, round_number=round_number, callback=callback)
    tear_down(accelerator, generator, module)
    generator.model.eval()
    return len(steps)


def generator_examples(
    generator: Generator, columns: Mapping[str, list], *, settings: TrainingSettings, context_tokens: int
) -> list[Example]:
    """The training examples of a contexts table; rows without a target are left out."""
    targets = [answers[0] if answers else "" for answers in columns["answers"]]
    if settings.no_answer:
        targets = ["" if noised else answer for answer, noised in zip(targets, columns["noised"], strict=True)]
    usable = [row for row, answer in enumerate(targets) if answer or settings.no_answer]
    questions = [columns["question"][row] for row in usable]
    examples = encode_examples(
        generator.tokenizer,
        questions=questions,
        contexts=[columns["context"][row] for row in usable],
        answers=[targets[row] for row in usable],
        context_tokens=context_tokens,
        max_length=generator.max_length,
        layout=generator.layout,
    )
    return with_keywords(generator.tokenizer, examples, questions) if generator_penalties(settings).names else examples


def generator_steps(lengths: Sequence[int], settings: TrainingSettings, round_number: int) -> list[np.ndarray]:
    """The steps of a generator phase over examples of these lengths, in tokens; see `plan_steps`."""
    return plan_steps(
        lengths,
        batch_size=settings.generator_batch_size,
        epochs=settings.generator_epochs,
        max_steps=settings.generator_steps,
        seed=phase_seed(settings.seed, round_number=round_number, phase="generator"),
    )


def generator_step_count(examples: int, settings: TrainingSettings) -> int:
    """The number of steps of a generator phase over this many examples."""
    return len(generator_steps([1] * examples, settings, 1))


def generator_cut(
    accelerator: Accelerator,
    generator: Generator,
    settings: TrainingSettings,
    context_tokens: int,
    *,
    free: float | None = None,
) -> Cut:
    """The micro-batches of a generator phase, chosen from the free memory; the same on every process.

    Args:
        free: bytes available to this process for training; None: measured.
    """
    each = generator_token_bytes(accelerator, generator, settings, context_tokens)
    if each is None:
        return Cut(tokens=ENOUGH)
    free = room_for_training(accelerator.device) if free is None else free
    shared = accelerator.num_processes if is_split(settings.generator_sharding) else 1
    states = 3 * sum(weight.numel() * weight.element_size() for weight in trainable(generator.model)) / shared
    can = generator.model.supports_gradient_checkpointing
    cut = generator_budget(each, free, states=states, device=accelerator.device.type, can_recompute=can)
    return chosen_together(accelerator, cut)


def generator_token_bytes(
    accelerator: Accelerator, generator: Generator, settings: TrainingSettings, context_tokens: int
) -> int | None:
    """Estimated bytes of activations per token of a generator step; None if the model's sizes are unknown."""
    config = generator.model.config.get_text_config()
    dropout = any(getattr(config, name, None) for name in DROPOUT_FIELDS)
    whole, precision = not is_split(settings.generator_sharding), accelerator.mixed_precision
    return token_bytes(
        config,
        precision=precision,
        dropout=dropout,
        length=context_tokens,
        products=whole and has_products(accelerator, generator.model),
        lean=whole and trains_lean(accelerator, generator.model),
    )


def generator_gradients(
    accelerator: Accelerator, generator: Generator, examples: Sequence[Example], settings: TrainingSettings
) -> tuple[torch.nn.Module, Callable[[Rows, Cut], dict[str, float]]]:
    """Prepare the generator for training; `tear_down` undoes it.

    Returns:
        the module that the phase trains, and a function that leaves the gradients of a step on some rows of `examples`
        in it, in these micro-batches, and returns the loss and the penalties by name.
    """
    penalties = generator_penalties(settings)
    generator.model.train()
    module: torch.nn.Module = generator_losses(generator, penalties)
    sharding, precision = settings.generator_sharding, accelerator.mixed_precision
    if sharding is None or not is_split(sharding):
        module = accelerator.prepare(module)
    else:
        blocks = generator.model._no_split_modules or ()  # transformers' name for its layers
        device = accelerator.device
        generator.parts = Sharded(module, blocks, device=device, sharding=sharding, precision=precision)
        module = generator.parts.module

    def take_step(rows: Rows, cut: Cut) -> dict[str, float]:
        batch = [examples[row] for row in rows]
        pad_id, weights = generator.tokenizer.pad_token_id, penalties.weights
        longest = max(len(example.input_ids) for example in batch)
        # a sharded module is cast by PyTorch's FSDP
        whole = bf16_step(accelerator, generator.model) if generator.parts is None else nullcontext()
        with recomputing(generator.model, cut.recomputes(longest)), whole:
            values = generator_step(accelerator, module, batch, pad_id=pad_id, cut=cut, weights=weights)
        return dict(zip(["loss", *penalties.names], values, strict=True))

    return module, take_step


def tear_down(accelerator: Accelerator, generator: Generator, module: torch.nn.Module) -> None:
    """Unwrap the generator after `generator_gradients`, with whole weights, and free the optimizer."""
    if generator.parts is None:
        accelerator.unwrap_model(module, keep_fp32_wrapper=False)
    else:
        generator.gather()
        generator.parts = None
    accelerator.free_memory()
    generator.model.to(accelerator.device)


def generator_penalties(settings: TrainingSettings) -> Penalties:
    """The penalties on answers, with the weights of the settings."""
    return Penalties(
        repeats=settings.repeat_penalty,
        keywords=settings.keyword_penalty,
        shortness=settings.short_penalty,
        ngram=settings.repeat_ngram,
        min_tokens=settings.short_tokens,
    )


def generator_losses(generator: Generator, penalties: Penalties) -> TokenLosses:
    """The module that computes the terms of the generator's loss: the cross-entropy and the active penalties."""
    if penalties.names:
        return PenalizedLosses(generator.model, penalties=penalties, eos=generator.end)
    return TokenLosses(generator.model)


def generator_terms(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(1 + n_penalties,) sums over a micro-batch: cross-entropy over its answer tokens, penalties over its answers."""
    result = module(**batch)
    losses, penalties = result if isinstance(result, tuple) else (result, result.new_zeros(0))
    return torch.cat([losses.sum().unsqueeze(0), penalties])


def generator_step(
    accelerator: Accelerator,
    module: torch.nn.Module,
    examples: Sequence[Example],
    *,
    pad_id: int,
    cut: Cut,
    weights: Sequence[float] = (),
) -> list[float]:
    """Compute the gradients of the mean loss over all answer tokens of the step, plus the weighted penalties.

    Every process takes the same number of micro-batches. Each is weighted by its answer tokens (for the penalties: its
    answers), so uneven lengths and shares change nothing.

    Args:
        module: from `generator_losses`. weights: of the active penalties.

    Returns:
        the loss, then the penalties before weighting, each a mean over the step.
    """
    world = accelerator.num_processes
    groups = micro_batches([len(example.input_ids) for example in examples], cut, processes=world)
    mine = groups[accelerator.process_index :: world]
    # DDP averages over the processes; `world` turns the mean into the sum
    shares = torch.tensor([world / answer_tokens(examples)] + [world / len(examples)] * len(weights))
    shares, factors = shares.to(accelerator.device), torch.tensor([1.0, *weights], device=accelerator.device)
    values = torch.zeros_like(factors)
    for number, rows in enumerate(mine):
        # An empty micro-batch still takes both passes, with weight 0: DDP waits for every process.
        batch = collate([examples[row] for row in rows] or examples[:1], pad_id=pad_id)
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        with accelerator.no_sync(module) if number + 1 < len(mine) else nullcontext():
            parts = generator_terms(module, batch) * shares * bool(rows)
            with torch.autocast(accelerator.device.type, enabled=False):  # of no use in a backward pass
                accelerator.backward((parts * factors).sum())
        values += parts.detach()
    return accelerator.reduce(values, reduction="mean").tolist()
