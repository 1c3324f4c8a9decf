"""Pretrain the bundled generator: cloze questions on plain text, then real questions with contexts of varying quality.

    python scripts/pretrain_generator.py prepare --text wiki.jsonl.gz --questions squad_train.jsonl.gz \\
        --leave_out squad_dev.jsonl.gz --folder prepared
    python scripts/pretrain_generator.py train --folder prepared --output_dir generator --stage1_steps 20000
    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml scripts/pretrain_generator.py train ...

A GPT-2 of some ten million parameters cannot learn to read from a few thousand questions. So it starts with the word
vectors and first layers of the retriever (warm_start.py). Stage 1 makes cloze questions from encyclopaedia text: a span
of a sentence is the answer, the sentence with a question word in its place is the question, and the passage around it
is the context. In a share of the contexts every token is a target, which is language modelling. Stage 2 uses real
questions: whole paragraphs with all their questions, and single questions with the contexts that the package builds.
Several questions of one context share its tokens, so a step contains more of them.

`prepare` writes token arrays (a few minutes, no GPU). `train` needs only these arrays, PyTorch, transformers, and
accelerate, and runs on a CPU or a GPU. It first prints the cost, and resumes an interrupted run with --resume. Several
processes share the rows of a step, which is meant for several GPUs or sockets: on two cores, 1 process with 2 threads
and 2 processes with 1 thread read as many tokens a second (1,875 to 2,030 and 1,710 to 1,870; two runs of 60 steps
each).

Prompts and loss are those of the package. Left out: evaluation (evaluate_generator.py).
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from packed_readings import reading_mask
from pretrain_examples import Cloze, Questions, Steps
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase
from warm_start import gpt2_config

from cozyrag.evaluation.metrics import exact_match, f1
from cozyrag.models.generator import Generator
from cozyrag.models.token_losses import TokenLosses

TIMED_STEPS = 20  # after which the time of a stage is estimated


@dataclass
class Progress:
    """The place of a run: a stage, and the number of its steps that are done."""

    stage: int = 1
    step: int = 0


def train(options: argparse.Namespace) -> None:
    """Train both stages, from the saved state with --resume."""
    folder, output = Path(options.folder), Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    set_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    on_gpu = torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16" if on_gpu else "no", cpu=not on_gpu)
    if options.rows % accelerator.num_processes:
        raise SystemExit(
            f"--rows: expected a multiple of the {accelerator.num_processes} processes, found {options.rows}."
        )
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    generator = Generator(make_model(folder, tokenizer, options), tokenizer)
    progress = restore(output, generator) if options.resume else Progress()
    generator.model.to(accelerator.device)
    validation = json.loads((folder / "validation.json").read_text(encoding="utf-8"))
    if accelerator.is_main_process:
        log_cost(accelerator, generator, options)
    for stage, steps in stages_of(accelerator, folder, tokenizer, options).items():
        if stage >= progress.stage and len(steps):
            first = progress.step if stage == progress.stage else 0
            Stage(accelerator, generator, steps, stage, output, validation, options).run(first)
    if accelerator.is_main_process:
        generator.model.half()
        generator.save(output / "generator")
        print(f"saved in half precision: {output / 'generator'}")
    accelerator.end_training()


def stages_of(
    accelerator: Accelerator, folder: Path, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> dict[int, Steps]:
    """The batches of this process, by stage."""
    cloze = Cloze(folder, tokenizer, lm_share=options.lm_share, ask_share=options.ask_share)
    questions = Questions(folder, tokenizer, mixed=not options.gold_only, ask_share=options.ask_share)
    shape = {
        "rows": options.rows // accelerator.num_processes,
        "row_tokens": options.row_tokens,
        "pad_id": tokenizer.pad_token_id,
        "process": accelerator.process_index,
    }
    return {
        1: Steps(cloze, steps=options.stage1_steps, seed=options.seed, **shape),
        2: Steps(questions, steps=options.stage2_steps, seed=options.seed + 1, **shape),
    }


def make_model(folder: Path, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> GPT2LMHeadModel:
    """The starting model that `prepare` wrote, or an untrained GPT-2."""
    if (folder / "start").exists() and not options.cold_start:
        return GPT2LMHeadModel.from_pretrained(folder / "start", dtype=torch.float32, trust_remote_code=False)
    return GPT2LMHeadModel(
        gpt2_config(tokenizer, width=options.width, layers=options.layers, heads=options.width // 64)
    )


def log_cost(accelerator: Accelerator, generator: Generator, options: argparse.Namespace) -> None:
    """Print parameters, tokens, and FLOPs of the run."""
    parameters = sum(parameter.numel() for parameter in generator.model.parameters())
    tokens = (options.stage1_steps + options.stage2_steps) * options.rows * options.row_tokens
    processes = f" of {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    print(
        f"{parameters / 1e6:.2f} M parameters on {accelerator.device}{processes}; {tokens / 1e6:.1f} M tokens in "
        f"{options.stage1_steps} + {options.stage2_steps} steps, about {6 * parameters * tokens / 1e15:.2f} PFLOP. The "
        f"time follows after the first {TIMED_STEPS} steps.",
        flush=True,
    )


@dataclass
class Stage:
    """One stage: AdamW, warm-up and cosine decay, log lines, validation, and a state to resume from."""

    accelerator: Accelerator
    generator: Generator
    steps: Steps
    number: int
    output: Path
    validation: list[dict]
    options: argparse.Namespace

    def run(self, first: int) -> None:
        """Train from step `first` to the last one."""
        options, accelerator, model = self.options, self.accelerator, self.generator.model
        peak = options.learning_rate if self.number == 1 else options.learning_rate * options.stage2_rate
        parameters = list(model.parameters())
        optimizer = make_optimizer(model, peak, options.body_rate)
        if first:
            # With several CPU processes the device is cpu:0, which torch.load does not know; the optimizer moves it.
            state = torch.load(self.output / "state" / "optimizer.pt", map_location="cpu", weights_only=True)
            optimizer.load_state_dict(state)
        module = self._module()
        losses, began, validated = [], time.perf_counter(), time.perf_counter()
        for step, batch in enumerate(self._batches(first), first):
            for group in optimizer.param_groups:
                group["lr"] = peak * group["share"] * shape_of_rate(step, len(self.steps))
            loss = self._loss(module, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            done, seconds = step + 1, time.perf_counter() - began
            if done == first + TIMED_STEPS:
                self._log_time(seconds / TIMED_STEPS, len(self.steps) - first)
            if done % options.logging_steps == 0 or done == len(self.steps):
                self._log_loss(losses, done, seconds / (done - first))
                losses.clear()
            # The other processes wait for the main process in their next step.
            due = time.perf_counter() - validated > 60 * options.validate_minutes or done == len(self.steps)
            if due and accelerator.is_main_process:
                log(self.output, {"stage": self.number, "step": done} | validate(self.generator, self.validation))
                save_state(self.output, self.generator, optimizer, self.number, done)
                validated = time.perf_counter()

    def _module(self) -> torch.nn.Module:
        module: torch.nn.Module = TokenLosses(self.generator.model)
        if self.accelerator.device.type == "cuda" and not self.options.no_compile:
            module = torch.compile(module, dynamic=True)
        return self.accelerator.prepare_model(module) if self.accelerator.num_processes > 1 else module

    def _batches(self, first: int) -> DataLoader:
        workers = self.options.workers
        return DataLoader(
            self.steps,
            batch_size=None,
            sampler=range(first, len(self.steps)),
            num_workers=workers,
            prefetch_factor=8 if workers else None,
        )

    def _loss(self, module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        batch = {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        weights = batch.pop("weights")
        batch["attention_mask"] = reading_mask(batch.pop("documents"), batch.pop("branches"))
        with self.accelerator.autocast():
            return (module(**batch) * weights).sum()

    def _log_time(self, seconds: float, steps: int) -> None:
        if self.accelerator.is_main_process:
            print(f"stage {self.number}: about {seconds * steps / 60:.1f} minutes for {steps} steps", flush=True)

    def _log_loss(self, losses: list[torch.Tensor], done: int, seconds: float) -> None:
        """Log the mean loss of all processes, and tokens per second from the seconds of a step."""
        loss = round(float(self.accelerator.reduce(torch.stack(losses).mean(), "mean")), 4)
        rate = round(self.options.rows * self.options.row_tokens / seconds)
        if self.accelerator.is_main_process:
            log(self.output, {"stage": self.number, "step": done, "loss": loss, "tokens_per_second": rate})


def make_optimizer(model: GPT2LMHeadModel, peak: float, body_rate: float) -> torch.optim.Optimizer:
    """AdamW with a `share` of the learning rate for each group.

    Layers of the warm start get a smaller share, so that they keep what they know while the word vectors learn to be
    written as well as read. The last norm, which sets how confident the model can be, gets a larger one.
    """
    last = list(model.transformer.ln_f.parameters())
    words = list(model.transformer.wte.parameters())
    body = [p for p in model.parameters() if all(p is not other for other in [*last, *words])]
    groups = [
        {"params": words, "share": 1.0, "weight_decay": 0.01},
        {"params": [p for p in body if p.ndim >= 2], "share": body_rate, "weight_decay": 0.01},
        {"params": [p for p in body if p.ndim < 2], "share": body_rate, "weight_decay": 0.0},
        {"params": last, "share": 3.0, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


def shape_of_rate(step: int, steps: int) -> float:
    """The share of the peak learning rate: warm-up over 2 % of the steps, then cosine decay to a twentieth."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def validate(generator: Generator, rows: list[dict]) -> dict:
    """EM and F1, in percent, on the validation questions with the filtered gold passage."""
    answers = generator.answer(
        [row["question"] for row in rows],
        [row["context"] for row in rows],
        context_tokens=144,
        max_new_tokens=24,
        batch_size=100,
    )
    scores = [
        (exact_match(answer, row["answers"]), f1(answer, row["answers"]))
        for answer, row in zip(answers, rows, strict=True)
    ]
    em, f1_mean = np.mean(scores, axis=0)
    return {
        "validation_em": round(100 * float(em), 2),
        "validation_f1": round(100 * float(f1_mean), 2),
        "sample": answers[:3],
    }


def log(output: Path, row: dict) -> None:
    """Print a row and append it to log.jsonl."""
    print(json.dumps(row), flush=True)
    with (output / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def save_state(output: Path, generator: Generator, optimizer: torch.optim.Optimizer, stage: int, step: int) -> None:
    """Write the state for --resume. Files are written under other names and then renamed, progress last."""
    folder = output / "state"
    folder.mkdir(exist_ok=True)
    weights = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in generator.model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.partial")
    torch.save(optimizer.state_dict(), folder / "optimizer.partial")
    (folder / "progress.partial").write_text(json.dumps({"stage": stage, "step": step}), encoding="utf-8")
    for name, final in (("model", "model.safetensors"), ("optimizer", "optimizer.pt"), ("progress", "progress.json")):
        (folder / f"{name}.partial").replace(folder / final)


def restore(output: Path, generator: Generator) -> Progress:
    """Load the weights of an interrupted run, and return its place."""
    folder = output / "state"
    if not (folder / "progress.json").exists():
        return Progress()
    generator.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    generator.model.tie_weights()
    return Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = argparse.ArgumentDefaultsHelpFormatter
    add_prepare(commands.add_parser("prepare", help="text and questions to token arrays", formatter_class=defaults))
    add_train(commands.add_parser("train", help="token arrays to a generator", formatter_class=defaults))
    options = parser.parse_args()
    if options.command == "prepare":
        from pretrain_prepare import prepare  # needs packages that training does not need

        prepare(options)
    else:
        train(options)


def add_prepare(parser: argparse.ArgumentParser) -> None:
    """Add the options of `prepare`."""
    add = parser.add_argument
    add("--text", nargs="+", required=True, help="JSON-lines files or folders of articles with title and text")
    add("--questions", nargs="+", required=True, help="question files with question, answers, title, and context")
    add("--leave_out", nargs="*", default=[], help="question files whose titles are left out of everything")
    add("--folder", required=True, help="output folder of the token arrays")
    add("--vocab_size", type=int, default=8192, help="entries of the tokenizer")
    known = "BERT whose first layers start the model: a folder, a Hub id, embedded (the retriever), or none"
    add("--warm_start", default="embedded", help=known)
    add("--layers", type=int, default=4, help="number of these layers")
    add("--max_text_tokens", type=int, help="maximum tokens of text; passages of the questions come first; none: all")
    add("--seed", type=int, default=42, help="seed that selects the validation articles")


def add_train(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train`."""
    add = parser.add_argument
    add("--folder", required=True, help="output folder of prepare")
    add("--output_dir", required=True, help="folder for generator/, log.jsonl, and the state to resume from")
    add("--stage1_steps", type=int, default=20000, help="steps on cloze questions; 0: none")
    add("--stage2_steps", type=int, default=4000, help="steps on real questions; 0: none")
    add("--gold_only", action="store_true", help="use gold passages only in stage 2 (ablation)")
    add("--rows", type=int, default=24, help="packed rows of a step")
    add("--row_tokens", type=int, default=384, help="tokens of a packed row")
    add("--cold_start", action="store_true", help="start from an untrained model even if prepare wrote another")
    add("--width", type=int, default=256, help="hidden size of an untrained model, a multiple of 64")
    add("--layers", type=int, default=4, help="layers of an untrained model")
    add("--lm_share", type=float, default=0.3, help="share of the contexts of stage 1 of which every token is a target")
    add("--ask_share", type=float, default=0.3, help="share of the contexts whose questions are targets as a whole")
    add("--learning_rate", type=float, default=1e-3, help="peak of stage 1")
    add("--stage2_rate", type=float, default=0.5, help="peak of stage 2, as a share of that of stage 1")
    add("--body_rate", type=float, default=0.4, help="rate of the layers, relative to word vectors; 1 if untrained")
    add("--workers", type=int, default=0, help="processes that make batches")
    add("--threads", type=int, default=0, help="CPU threads; 0: the default of PyTorch")
    add("--logging_steps", type=int, default=50, help="steps between log lines")
    add("--validate_minutes", type=float, default=10, help="minutes between validations, which also save the state")
    add("--no_compile", action="store_true", help="do not use torch.compile on a GPU")
    add("--resume", action="store_true", help="resume the run in --output_dir")
    add("--seed", type=int, default=42, help="seed of weights and batches")


if __name__ == "__main__":
    main()
