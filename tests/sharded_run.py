"""Generator phases of two processes, with and without sharding; results go to FOLDER/RANK.json, for test_sharding.py.

python -m torch.distributed.run --standalone --nproc_per_node 2 tests/sharded_run.py FOLDER GENERATOR RETRIEVER
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from tiny import corpus
from torch.distributed.tensor import DTensor

from cozyrag.config import TrainingSettings
from cozyrag.models.fsdp import Sharded, held_bytes, joined
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.models.token_losses import TokenLosses
from cozyrag.runtime.fingerprints import weights_fingerprint
from cozyrag.training.checkpointing import Checkpoints, Progress
from cozyrag.training.generator_phase import train_generator
from cozyrag.training.trainer import PhaseCallback

SAVED_AT = 3
PHASE = {
    "generator_batch_size": 8, "generator_steps": 6, "generator_learning_rate": 1e-2, "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5, "repeat_penalty": 0.3, "keyword_penalty": 0.2, "short_penalty": 0.2, "warmup_ratio": 0.0,
}  # fmt: skip
ADAPTER = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": [], "revision": None, "seed": 1}


def contexts() -> Dataset:
    """The columns of a contexts table that a generator phase reads, with gold passages as contexts."""
    passages, questions = corpus(24)
    rows = [{"context": passages[number // 2]["text"], "noised": False} for number in range(len(questions))]
    return Dataset.from_list([question | row for question, row in zip(questions, rows, strict=True)])


class Measures(PhaseCallback):
    """Records losses and the bytes that this process holds; saves after one step, or resumes from there."""

    def __init__(self, accelerator, generator, *, save=lambda: None, restore=None):
        self.accelerator, self.generator, self.save, self.load = accelerator, generator, save, restore
        self.losses, self.norms, self.bytes = [], [], {}
        self.clip, self.back = accelerator.clip_grad_norm_, accelerator.backward
        accelerator.clip_grad_norm_, accelerator.backward = self.clipping, self.backward

    def restore(self):
        if self.load is None:
            return 0
        self.load()
        return SAVED_AT

    def _weights(self):
        return list((self.generator.parts.module if self.generator.parts else self.generator.model).parameters())

    def backward(self, loss):
        self.bytes["weights between the passes"] = held_bytes(self._weights())
        self.back(loss)

    def clipping(self, parameters, norm):
        self.bytes["gradients"] = held_bytes(parameter.grad for parameter in parameters)
        found = self.clip(parameters, norm)
        self.norms.append(float(joined(found)))
        return found

    def after_step(self, report):
        self.losses.append([report.loss, *report.terms.values()])
        if report.step == SAVED_AT:
            self.save()
        self.bytes["weights"] = held_bytes(self._weights())
        states = [value for state in self.accelerator._optimizers[-1].state.values() for value in state.values()]
        parts = [value.to_local() if isinstance(value, DTensor) else value for value in states if value.ndim]
        self.bytes["states"] = sum(part.untyped_storage().nbytes() for part in parts)  # a view would keep the whole

    def close(self):
        self.accelerator.clip_grad_norm_, self.accelerator.backward = self.clip, self.back


def phase(accelerator, generator, *, settings=None, **hooks) -> dict:
    """A generator phase and its results."""
    measures = Measures(accelerator, generator, **hooks)
    settings = TrainingSettings(**PHASE | (settings or {}))
    train_generator(
        accelerator, generator, contexts(), settings=settings, context_tokens=64, round_number=1, callback=measures
    )
    measures.close()
    model = generator.model
    return {
        "losses": measures.losses,
        "norms": measures.norms,
        "bytes": measures.bytes,
        "print": weights_fingerprint(model),
        "weights": {name: weight.flatten().tolist() for name, weight in model.named_parameters()},
        "kinds": sorted({type(weight).__name__ for weight in model.parameters()} | {type(model).__name__}),
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "plain": generator.parts is None and not model.training,
    }


def halved(accelerator, generator) -> dict:
    """Losses in bf16 with sharded float32 weights, and in float32 with whole ones."""
    batch = {"input_ids": torch.arange(1, 25).view(2, 12), "positions": torch.tensor([3, 4, 20])}
    batch |= {"targets": torch.tensor([5, 6, 7]), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    whole = TokenLosses(generator.model)
    how = {"device": accelerator.device, "sharding": "full_shard", "precision": "bf16"}
    parts = Sharded(whole, generator.model._no_split_modules, **how).module
    losses = parts(**batch)
    accelerator.backward(losses.sum())
    kinds = {str(weight.grad.dtype) for weight in parts.parameters() if weight.grad is not None}
    return {"bf16": losses.tolist(), "float32": whole(**batch).tolist(), "gradients": sorted(kinds)}


def main(folder: Path, generator_path: str, retriever_path: str) -> None:
    """All phases, each with the same generator."""
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    retriever = Retriever.load(retriever_path)
    checkpoints = Checkpoints(accelerator, folder, limit=9, facts={})
    found = {}
    for sharding in ("none", "shard_grad_op", "full_shard"):
        set_seed(1)
        generator = Generator.load(generator_path)

        def save(generator=generator, sharding=sharding):
            checkpoints.folder = folder / sharding
            checkpoints.save(Progress(1, "generator", SAVED_AT), generator, retriever)

        found[sharding] = phase(accelerator, generator, settings={"generator_sharding": sharding}, save=save)
    for before, after in (("full_shard", "full_shard"), ("full_shard", "none"), ("none", "shard_grad_op")):
        saved = folder / before / "checkpoints" / Progress(1, "generator", SAVED_AT).name
        found[f"{before}, then {after}"] = phase(
            accelerator,
            Generator.load(str(saved / "generator")),
            settings={"generator_sharding": after},
            restore=lambda saved=saved: checkpoints.restore_optimizer(saved),
        )
    if importlib.util.find_spec("peft"):
        for sharding in ("none", "full_shard"):
            generator = Generator.load(generator_path)
            generator.add_adapter(generator_path, **ADAPTER)
            found[f"adapter, {sharding}"] = phase(accelerator, generator, settings={"generator_sharding": sharding})
    found["halved"] = halved(accelerator, Generator.load(generator_path))
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
