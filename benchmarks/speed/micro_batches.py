"""How much time and memory does a training step need in micro-batches? Peak memory and seconds for a number of them.

    python -m benchmarks.speed.micro_batches generator auto
    python -m benchmarks.speed.micro_batches generator 1

`auto` chooses micro-batches by tokens. The generator, with SmolLM2-135M's shape and random weights, trains on 32 rows
of 150 tokens; the retriever, all-MiniLM-L6-v2, on 64 questions and 128 passages of about 160 tokens; both in float32.
The peak is that of the process, so each case needs its own. Left out: GPUs.
"""

import argparse
import random
import resource
import time
from collections.abc import Callable
from functools import partial
from statistics import median_high

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from cozyrag.config import TrainingSettings
from cozyrag.models.generator import Generator
from cozyrag.models.prompts import Example
from cozyrag.models.retriever import Retriever
from cozyrag.models.token_losses import TokenLosses
from cozyrag.training.generator_phase import generator_cut, generator_step
from cozyrag.training.losses import contrastive_loss
from cozyrag.training.micro_batches import Cut
from cozyrag.training.retriever_phase import retriever_step
from cozyrag.training.trainer import encoder_cut, trainable
from cozyrag.training.training_pairs import LossTerm, RetrieverBatch

SHAPE = LlamaConfig(
    hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
    vocab_size=49152, tie_word_embeddings=True,
)  # fmt: skip
ROWS, TOKENS, ANSWER = 32, 150, 5
WORDS = (
    "river tower castle garden bridge falcon engine planet violin cheese lamp house stone village colour year".split()
)


def generator_work(accelerator: Accelerator, wanted: str) -> tuple[torch.nn.Module, Callable[[], object]]:
    """The module that is trained, and a function that computes the gradients of a step."""
    scratch = Generator.from_scratch(["some text"], vocab_size=300)
    generator = Generator(LlamaForCausalLM(SHAPE).train(), scratch.tokenizer)
    cut = generator_cut(accelerator, generator, TrainingSettings(), TOKENS) if wanted == "auto" else Cut(int(wanted))
    module = accelerator.prepare(TokenLosses(generator.model))
    rows = [Example(torch.randint(5, 49_000, (TOKENS,)).tolist(), TOKENS - ANSWER) for _ in range(ROWS)]
    return module, partial(generator_step, accelerator, module, rows, pad_id=0, cut=cut)


def retriever_work(accelerator: Accelerator, wanted: str) -> tuple[torch.nn.Module, Callable[[], object]]:
    """The same for the retriever."""
    retriever = Retriever.load_embedded(max_tokens=192)
    retriever.model.eval()
    cut = encoder_cut(accelerator, retriever) if wanted == "auto" else Cut(int(wanted))
    draw = random.Random(0)
    questions = ["what " + " ".join(draw.choices(WORDS, k=10)) for _ in range(64)]
    passages = [" ".join(draw.choices(WORDS, k=158)) for _ in range(128)]
    own = torch.arange(64)
    term = lambda asked, found, _: contrastive_loss(asked, found, positives=own, temperature=0.05)  # noqa: E731
    batch = RetrieverBatch(questions, passages, [LossTerm("contrastive", 1.0, term)])
    return retriever.model, partial(retriever_step, accelerator, retriever, batch, cut=cut)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["generator", "retriever"], help="the model that is trained")
    parser.add_argument("micro_batches", help="number of micro-batches of a step, or auto")
    parser.add_argument("--steps", type=int, default=3, help="number of steps (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default: 2)")
    measure(parser.parse_args())


def measure(options: argparse.Namespace) -> None:
    """Train some steps; print the median of their seconds and the peak memory."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    work = {"generator": generator_work, "retriever": retriever_work}[options.model]
    module, compute_gradients = work(accelerator, options.micro_batches)
    optimizer = torch.optim.AdamW(trainable(module), lr=1e-5, fused=True)
    seconds = []
    for _ in range(options.steps):
        began = time.perf_counter()
        compute_gradients()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"{options.model}, micro-batches {options.micro_batches}: {median_high(seconds):.1f} s a step (median of "
        f"{options.steps}), peak {peak:.2f} GB"
    )


if __name__ == "__main__":
    main()
