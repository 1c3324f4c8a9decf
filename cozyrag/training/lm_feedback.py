"""LM-supervised retrieval: the likelihood of each answer under the frozen generator, given each retrieved passage.

Computed once per phase and kept on disk under a hash of weights and inputs, so a resumed run, or a round with an
unchanged generator, reads it. Left out: the loss that uses it (losses.py).
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors import SafetensorError, safe_open

from cozyrag.models.generator import Generator
from cozyrag.models.int8_encoding import FLOAT32
from cozyrag.retrieval.contexts import ContextBuilder
from cozyrag.runtime.atomic_files import replacing_file, save_tensors
from cozyrag.runtime.fingerprints import weights_fingerprint


def answer_likelihoods(
    accelerator: Accelerator,
    generator: Generator,
    contexts: Dataset,
    context_filter: str,
    make_builder: Callable[[], ContextBuilder],
    encode: Callable[[Sequence[str]], np.ndarray],
    *,
    passages: int,
    context_tokens: int,
    batch_size: int,
    folder: Path,
    progress: Callable[[int], object] = lambda questions: None,
    info: Callable[[str], object] = lambda warning: None,
) -> np.ndarray:
    """(n_questions, k) float32: mean log-likelihood in nats of an answer token, given each of the k best passages.

    Each process computes a share of the questions; all return the whole. Rows without an answer are NaN.

    Args:
        contexts: the contexts table; the first reference answer of a row is scored.
        context_filter: how the builder selects sentences; part of the hash.
        make_builder: called for the context builder unless a kept result is read.
        encode: vectors of questions, for the context filter.
        passages: k; fewer if fewer were retrieved.
        folder: of the kept results.
        info: called with a warning if a kept result is damaged; it is computed again.
    """
    columns = contexts.select_columns(["id", "question", "answers", "rows"])[:]
    candidates = [rows[:passages] for rows in columns["rows"]]
    key = (
        weights_fingerprint(generator.model),
        columns["id"],
        columns["answers"],
        candidates,
        context_tokens,
        context_filter,
        *([generator.precision] if generator.precision != FLOAT32 else []),
    )
    path = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.safetensors"
    kept, fault = _read(path)
    if kept is not None:
        return kept
    if fault:
        info(f"The LM feedback in {path.name} is damaged ({fault}); it is computed again.")
    mine = range(len(contexts))[accelerator.process_index :: accelerator.num_processes]
    answered = [row for row in mine if columns["answers"][row]]
    pairs = [(row, passage) for row in answered for passage in candidates[row]]
    questions = [columns["question"][row] for row, _ in pairs]
    vectors = encode([columns["question"][row] for row in answered])
    vectors = np.repeat(vectors, [len(candidates[row]) for row in answered], axis=0)
    likelihoods = np.full((len(contexts), min(map(len, candidates), default=0)), np.nan, dtype=np.float32)
    likelihoods[answered] = generator.log_likelihoods(
        questions,
        make_builder().contexts(questions, [[passage] for _, passage in pairs], vectors),
        [columns["answers"][row][0] for row, _ in pairs],
        context_tokens=context_tokens,
        batch_size=batch_size,
        progress=progress,
    ).reshape(len(answered), -1)
    if accelerator.num_processes > 1:
        for rank, part in enumerate(gather_object([likelihoods[mine]])):
            likelihoods[rank :: accelerator.num_processes] = part
    if accelerator.is_main_process:
        _keep(path, likelihoods)
    accelerator.wait_for_everyone()
    return likelihoods


def _keep(path: Path, likelihoods: np.ndarray) -> None:
    with replacing_file(path, needed=likelihoods.nbytes, flushed=False) as beside:  # checked when it is read
        save_tensors({"likelihoods": likelihoods}, beside, metadata={"sha256": _digest(likelihoods)})


def _read(path: Path) -> tuple[np.ndarray | None, str]:
    """The kept result; or None and its fault, which is empty if there is no file."""
    if not path.exists():
        return None, ""
    try:
        with safe_open(path, framework="np") as file:
            likelihoods, expected = file.get_tensor("likelihoods"), (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        return None, f"{type(error).__name__}: {error}"
    return (likelihoods, "") if _digest(likelihoods) == expected else (None, "the numbers have changed")


def _digest(likelihoods: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(likelihoods).tobytes()).hexdigest()
