"""The generator phase: what it learns from the contexts of its questions, in which steps, and the gradients of a step.

The loss of a step is the mean over all its answer tokens, on however many processes and in however many micro-batches, so the
result depends on neither. Left out: the loop over the steps (trainer.py), how they are cut (micro_batches.py), where contexts
come from (contexts.py), the penalties themselves (penalties.py).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset

from cozyrag.config import TrainingSettings
from cozyrag.models.batching import answer_tokens, collate, phase_seed, plan_steps
from cozyrag.models.fsdp import Sharded, is_split
from cozyrag.models.generator import Generator
from cozyrag.models.loading import DROPOUT_FIELDS
from cozyrag.models.penalties import Penalties
from cozyrag.models.prompts import Example, encode_examples, with_keywords
from cozyrag.models.token_losses import PenalizedLosses, TokenLosses, recomputing
from cozyrag.runtime.hardware import room_for_training
from cozyrag.training.micro_batches import ENOUGH, Cut, Load, generator_budget, load_of, micro_batches, token_bytes
from cozyrag.training.trainer import PhaseCallback, chosen_together, first_cut, run_phase, trainable


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
    """Teach the generator to answer from the contexts; returns the number of steps. Loss on answer and EOS tokens only.

    Rows without an answer are left out, unless it is to learn to write nothing (EOS alone) where there is none.
    """
    examples = generator_examples(generator, contexts[:], settings=settings, context_tokens=context_tokens)
    lengths = [len(example.input_ids) for example in examples]
    steps = generator_steps(lengths, settings, round_number)
    cut = first_cut(settings, callback, lambda: generator_cut(accelerator, generator, settings, context_tokens))
    if steps and cut.recomputes(max(lengths)):
        callback.recomputes(max(lengths), cut)
    module, take = generator_gradients(accelerator, generator, examples, settings)

    def take_step(number: int, cut: Cut) -> dict[str, float]:
        return take(steps[number], cut)

    def load(number: int, cut: Cut) -> Load:
        return load_of([lengths[row] for row in steps[number]], cut, processes=accelerator.num_processes)

    def show(number: int) -> list[dict]:
        return [{"text": generator.tokenizer.decode(examples[row].input_ids)} for row in steps[number]]

    run_phase(
        accelerator, "generator", trainable(module), steps, take_step,
        settings=settings, learning_rate=settings.generator_learning_rate, round_number=round_number, callback=callback, show=show, cut=cut,
        load=load,
    )  # fmt: skip
    tear_down(accelerator, generator, module)
    generator.model.eval()
    return len(steps)


def generator_examples(
    generator: Generator, columns: dict[str, list], *, settings: TrainingSettings, context_tokens: int
) -> list[Example]:
    """The examples that the rows of a contexts table make, without those that have nothing to teach."""
    wanted = [answers[0] if answers else "" for answers in columns["answers"]]
    if settings.no_answer:
        wanted = ["" if noised else answer for answer, noised in zip(wanted, columns["noised"], strict=True)]
    usable = [row for row, answer in enumerate(wanted) if answer or settings.no_answer]
    questions = [columns["question"][row] for row in usable]
    examples = encode_examples(
        generator.tokenizer,
        questions=questions,
        contexts=[columns["context"][row] for row in usable],
        answers=[wanted[row] for row in usable],
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
    """How many steps a generator phase over so many examples takes."""
    return len(generator_steps([1] * examples, settings, 1))


def generator_cut(
    accelerator: Accelerator,
    generator: Generator,
    settings: TrainingSettings,
    context_tokens: int,
    *,
    free: float | None = None,
) -> Cut:
    """How the steps of a generator phase are cut automatically, the same on every process.

    Args:
        free: bytes that this process may take for training; None: it looks.
    """
    each = generator_token_bytes(accelerator, generator, context_tokens)
    if each is None:
        return Cut(tokens=ENOUGH)
    free = room_for_training(accelerator.device) if free is None else free
    shared = accelerator.num_processes if is_split(settings.generator_sharding) else 1
    states = 3 * sum(weight.numel() * weight.element_size() for weight in trainable(generator.model)) / shared
    can = generator.model.supports_gradient_checkpointing
    cut = generator_budget(each, free, states=states, device=accelerator.device.type, can_recompute=can)
    return chosen_together(accelerator, cut)


def generator_token_bytes(accelerator: Accelerator, generator: Generator, context_tokens: int) -> int | None:
    """About how many bytes of activations a token of a generator step takes."""
    config = generator.model.config.get_text_config()
    dropout = any(getattr(config, name, None) for name in DROPOUT_FIELDS)
    return token_bytes(config, precision=accelerator.mixed_precision, dropout=dropout, length=context_tokens)


def generator_gradients(
    accelerator: Accelerator, generator: Generator, examples: Sequence[Example], settings: TrainingSettings
) -> tuple[torch.nn.Module, Callable[..., dict[str, float]]]:
    """The module that a generator phase trains, and what leaves in it the gradients of a step on some of the examples.

    That takes their rows and how to cut them into micro-batches. `end_lesson` must follow.
    """
    penalties = generator_penalties(settings)
    generator.model.train()
    module = _prepared(accelerator, generator, generator_losses(generator, penalties), settings.generator_sharding)

    def take(rows: Sequence[int], cut: Cut) -> dict[str, float]:
        lengths = [len(examples[row].input_ids) for row in rows]
        with recomputing(generator.model, cut.recomputes(max(lengths))):
            told = generator_step(
                accelerator,
                module,
                [examples[row] for row in rows],
                pad_id=generator.tokenizer.pad_token_id,
                cut=cut,
                weights=penalties.weights,
            )
        return dict(zip(["loss", *penalties.names], told, strict=True))

    return module, take


def _prepared(
    accelerator: Accelerator, generator: Generator, losses: TokenLosses, sharding: str | None
) -> torch.nn.Module:
    """The losses as all processes train them together: whole under DDP, or in parts."""
    if not is_split(sharding):
        return accelerator.prepare(losses)
    blocks = generator.model._no_split_modules or ()  # transformers' name for its layers
    generator.parts = Sharded(
        losses, blocks, device=accelerator.device, sharding=sharding, precision=accelerator.mixed_precision
    )
    return generator.parts.module


def tear_down(accelerator: Accelerator, generator: Generator, module: torch.nn.Module) -> None:
    """Give the generator back whole and plain after `generator_lesson`, and let go of what trained it."""
    if generator.parts is None:
        accelerator.unwrap_model(module, keep_fp32_wrapper=False)
    else:
        generator.gather()
        generator.parts = None
    accelerator.free_memory()
    generator.model.to(accelerator.device)


def generator_penalties(settings: TrainingSettings) -> Penalties:
    """The penalties on answers as the settings weigh them."""
    return Penalties(
        repeats=settings.repeat_penalty,
        keywords=settings.keyword_penalty,
        shortness=settings.short_penalty,
        ngram=settings.repeat_ngram,
        min_tokens=settings.short_tokens,
    )


def generator_losses(generator: Generator, penalties: Penalties) -> TokenLosses:
    """The module that gives the terms of the generator: the cross-entropy, and the penalties that are on."""
    if penalties.names:
        return PenalizedLosses(generator.model, penalties=penalties, eos=generator.end)
    return TokenLosses(generator.model)


def generator_terms(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(1 + n_penalties,) sums over one micro-batch: cross-entropy over its answer tokens, penalties over its answers."""
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
    """Gradients of the mean loss over all answer tokens of the step and of the weighted penalties.

    Every process works through as many micro-batches. Each weighs as much as it has answer tokens (for the
    penalties: answers), so uneven lengths and shares change nothing.

    Args:
        module: TokenLosses, or with `weights` of the penalties that are on PenalizedLosses.

    Returns:
        the loss, then the penalties before their weights, each a mean over the step.
    """
    world = accelerator.num_processes
    groups = micro_batches([len(example.input_ids) for example in examples], cut, processes=world)
    mine = groups[accelerator.process_index :: world]
    # DDP takes the mean over processes, we want the sum
    shares = torch.tensor([world / answer_tokens(examples)] + [world / len(examples)] * len(weights))
    shares, factors = shares.to(accelerator.device), torch.tensor([1.0, *weights], device=accelerator.device)
    told = torch.zeros_like(factors)
    for number, rows in enumerate(mine):
        # An empty one still goes forward and backward, with weight 0: DDP waits for every process.
        batch = collate([examples[row] for row in rows] or examples[:1], pad_id=pad_id)
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        with accelerator.no_sync(module) if number + 1 < len(mine) else nullcontext():
            parts = generator_terms(module, batch) * shares * bool(rows)
            accelerator.backward((parts * factors).sum())
        told += parts.detach()
    return accelerator.reduce(told, reduction="mean").tolist()
