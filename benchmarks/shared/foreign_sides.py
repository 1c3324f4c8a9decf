"""Sides of the speed benchmark that run FedRAG in a Python environment of its own, and our counterpart of its LSR.

FedRAG's requirements do not fit beside ours. A side starts fed_rag_side.py with the other interpreter and waits until
its models are loaded, which is not timed; data and models travel as files. Left out: the trainers themselves
(fed_rag_side.py), sides that run in this process (training_sides.py).
"""

import json
import os
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

from benchmarks.shared.measuring import Build, Elsewhere, Side
from benchmarks.shared.speed_data import Asked, Models, Prompts
from benchmarks.shared.training_sides import RETRIEVER_RATE, Losses, Place, Table, as_it_comes
from cozyrag.config import TrainingSettings
from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.models.prompts import MARKS
from cozyrag.retrieval.passage_index import Passages
from cozyrag.training.retriever_phase import train_retriever

RALT, RALT_OUR_PROMPT, LSR = "FedRAG RALT", "FedRAG RALT, our prompt", "FedRAG LSR"
OURS_LM = "CoZyRAG, LM-supervised"
LM_ALONE = {"feedback_weight": 1.0, "contrastive_weight": 0.0}
PROGRAM = Path(__file__).with_name("fed_rag_side.py")


class FedRAG(Elsewhere):
    """One training in another process: made when its models are loaded, called to train, then its own result."""

    def __init__(self, python: str, job: dict):
        self._files = tempfile.TemporaryDirectory()
        self.folder, self._log = (Path(self._files.name) / name for name in ("trained", "log"))
        path = Path(self._files.name) / "job.json"
        path.write_text(json.dumps(job | {"output": str(self.folder)}), encoding="utf-8")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-I", str(PROGRAM), str(path)],
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._line()

    def __call__(self) -> "FedRAG":
        self._process.stdin.write("begin\n")
        self._process.stdin.flush()
        self.report = self._line()
        return self

    def _line(self) -> dict:
        """What the program prints next."""
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().split("\n")
            raise InputError(
                f"Expected FedRAG to train with --fed_rag_python, it ended with: {' '.join(said[-1:])[:400]}. Install "
                'it there (pip install "fed-rag[huggingface]"), or leave the option out.'
            )
        return json.loads(line)

    def end(self) -> int:
        """Wait until the model is saved; peak memory in bytes beyond that before models were loaded."""
        self._process.communicate()
        return self.report["memory"]


def job(models: Models, asked: Asked, passages: list[str], place: Place, options: Namespace, **more: object) -> dict:
    """What both trainers of FedRAG need to know. Retrieved passages are the texts from which they make prompts."""
    return {
        "generator": models.generator_folder,
        "retriever": models.retriever_folder,
        "questions": asked.questions,
        "answers": asked.answers,
        "passages": list(dict.fromkeys(passages)),
        "passage_tokens": options.passage_tokens,
        "device": str(place.device),
        "threads": torch.get_num_threads(),
        "seed": options.seed,
        **more,
    }


def arguments(place: Place, batch: int, rate: float) -> dict:
    """TrainingArguments of FedRAG's trainers; they write no files."""
    return place.arguments("unused") | {"per_device_train_batch_size": batch, "learning_rate": rate}


# ---- the generator phase


def template(generator: Generator) -> str:
    """Our prompt, answer, and end token as FedRAG's template."""
    text = generator.prompt(*MARKS) + generator.layout.lead + "{response}" + generator.tokenizer.decode(generator.end)
    return text.replace(MARKS[0], "{context}").replace(MARKS[1], "{query}")


def ralt(
    models: Models, prompts: Prompts, place: Place, options: Namespace, example: str | None
) -> Callable[[int], FedRAG]:
    """FedRAG's retrieval-augmented training of the generator, one context each, found by its own search."""

    def build(rows: int) -> FedRAG:
        asked = Asked(prompts.questions[:rows], prompts.answers[:rows], [])
        how = arguments(place, options.generator_batch, options.learning_rate)
        more = {"trainer": "ralt", "template": example, "top_k": 1, "arguments": how}
        return FedRAG(options.fed_rag_python, job(models, asked, prompts.contexts[:rows], place, options, **more))

    return build


def foreign_generator_sides(models: Models, prompts: Prompts, place: Place, options: Namespace) -> list[Side]:
    """FedRAG with its own prompt and with ours, in each precision of the libraries."""
    ours = template(as_it_comes(models))
    return [
        Side(name + precision, options.pairs, options.generator_batch, ralt(models, prompts, at, options, example))
        for precision, at in place.of_libraries(options).items()
        for name, example in ((RALT, None), (RALT_OUR_PROMPT, ours))
    ]


def trained_generator(models: Models, trained: FedRAG) -> Generator:
    """The generator that FedRAG has saved."""
    trained.end()
    model = AutoModelForCausalLM.from_pretrained(trained.folder, dtype=torch.float32, trust_remote_code=False)
    return Generator(model, as_it_comes(models).tokenizer)


# ---- the retriever phase


def lsr(models: Models, asked: Asked, passages: Passages, place: Place, options: Namespace) -> Callable[[int], FedRAG]:
    """FedRAG's LM-supervised training of the retriever, over the passages that its search finds."""

    def build(rows: int) -> FedRAG:
        how = arguments(place, options.retriever_batch, RETRIEVER_RATE)
        more = {"trainer": "lsr", "template": None, "top_k": options.top_k, "arguments": how}
        texts = passages.select(passages_of(asked, passages))
        return FedRAG(options.fed_rag_python, job(models, asked.first(rows), texts, place, options, **more))

    return build


def ours_lm(models: Models, asked: Asked, passages: Passages, place: Place, options: Namespace) -> Build:
    """The same with our parts: search, likelihoods of the answers, and `train_retriever` with that loss alone."""
    settings = TrainingSettings(retriever_batch_size=options.retriever_batch, **LM_ALONE)

    def build(rows: int) -> Callable[[], SentenceTransformer]:
        accelerator = place.accelerator()
        generator = Generator.load(models.generator_folder)
        generator.model.to(place.device)
        retriever = models.load_retriever(str(place.device), options.passage_tokens)
        some, searched = asked.first(rows), np.array(passages_of(asked, passages))
        encode = {"batch_size": options.encode_batch}
        vectors = retriever.encode(passages.select(searched.tolist()), kind="document", **encode)

        def run() -> SentenceTransformer:
            scores = retriever.encode(some.questions, kind="query", **encode) @ vectors.T
            found = searched[np.argsort(-scores, axis=1)[:, : options.top_k]]
            likelihoods = generator.log_likelihoods(
                [question for question in some.questions for _ in range(found.shape[1])],
                passages.select(found.ravel().tolist()),
                [answer for answer in some.answers for _ in range(found.shape[1])],
                context_tokens=options.passage_tokens,
                batch_size=options.encode_batch,
            )
            table = Table(
                id=[str(row) for row in range(rows)],
                question=some.questions,
                answers=[[answer] for answer in some.answers],
                positive=some.gold,
                negatives=[[] for _ in range(rows)],
                rows=found.tolist(),
            )
            train_retriever(
                accelerator,
                retriever,
                table,
                passages,
                settings=settings,
                round_number=1,
                callback=Losses(),
                likelihoods=likelihoods.reshape(found.shape).astype(np.float32),
            )
            return retriever.model

        return run

    return build


def passages_of(asked: Asked, passages: Passages) -> list[int]:
    """The rows that both LM-supervised sides search: the gold passages, and others up to 64."""
    return list(dict.fromkeys([*asked.gold, *range(min(64, len(passages.ids)))]))


def foreign_retriever_sides(
    models: Models, asked: Asked, passages: Passages, place: Place, options: Namespace
) -> list[Side]:
    """LM-supervised training: ours, and FedRAG's in each precision of the libraries."""
    size, warm_up = options.supervised_pairs, min(options.retriever_batch, options.supervised_pairs)
    sides = [Side(OURS_LM, size, warm_up, ours_lm(models, asked, passages, place, options))]
    for precision, at in place.of_libraries(options).items():
        sides.append(Side(LSR + precision, size, warm_up, lsr(models, asked, passages, at, options)))
    return sides


def trained_retriever(trained: FedRAG, place: Place, options: Namespace) -> SentenceTransformer:
    """The retriever that FedRAG has saved."""
    trained.end()
    model = SentenceTransformer(str(trained.folder), device=str(place.device), trust_remote_code=False)
    model.max_seq_length = options.passage_tokens
    return model
