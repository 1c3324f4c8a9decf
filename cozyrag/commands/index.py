"""`cozyrag index`: passages in, a folder with their vectors and FAISS index out, on all processes of `accelerate launch`.

Each process encodes its share into shards on the disk, which the first one puts together without ever holding them all.
What an older index in that folder, or a run that was stopped, has encoded already is taken over. Left out: how vectors are
stored and found again (vector_shards.py).
"""

import argparse
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from cozyrag.config import (
    ContextSettings,
    DataSettings,
    ModelSettings,
    OutputSettings,
    Settings,
    TrainingSettings,
)
from cozyrag.config_checks import EMBEDDED
from cozyrag.data.passages import stream_passages
from cozyrag.data.rows import SHOWN, BadRows, Columns, no_rows
from cozyrag.data.sentences import SentenceVectors
from cozyrag.errors import InputError
from cozyrag.models.int8_encoding import AUTO, FLOAT32, INT8, check_int8, reading_precision
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.faiss_index import SENTENCE_VECTORS, memory_of, open_vectors
from cozyrag.retrieval.passage_index import FILES, LISTS, Passages, made_by, write_index
from cozyrag.retrieval.vector_shards import Known, encode_shards, known_vectors, store_passages, write_vectors
from cozyrag.runtime.distributed import main_decides
from cozyrag.runtime.precision import fitting
from cozyrag.training.setup import make_accelerator

DESCRIPTION = """\
Encode passages with a retriever and make their index: DIR gets passages.parquet, vectors.safetensors, index.faiss and
index.json, as a run of train.py leaves them in OUTPUT/index.

Every process of `accelerate launch` encodes a share. A run that was stopped goes on where it was. Run again after passages
have changed, only those that are new or changed are encoded, if the retriever is the same.
"""
EXAMPLES = """\
examples:
  cozyrag index passages.jsonl --output my-index
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m cozyrag.cli index wiki.parquet --output wiki-index
  cozyrag index wiki.parquet --retriever my-rag/retriever --output my-rag/index --index_memory 8GB
  accelerate launch train.py --questions qa.tsv --passages passages.jsonl --index my-index
"""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """The command. Raises InputError for what the user can put right; what is encoded until then is kept for a later run."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    accelerator = make_accelerator(
        Settings(
            DataSettings(),
            ModelSettings(),
            ContextSettings(),
            TrainingSettings(use_cpu=options.use_cpu, threads=options.threads),
            OutputSettings(),
        )
    )
    check_int8(options.index_precision, str(accelerator.device), "--index_precision")
    retriever = _load(options, str(accelerator.device))
    retriever.precision = reading_precision(main_decides(accelerator, lambda: fitting(accelerator.device.type).name))
    work = _Work(Path(options.output), retriever.fingerprint(), retriever.reads_in(options.index_precision))
    if accelerator.is_main_process:
        work.open()
        np.save(work.hashes, _stage(options, work.passages))
    accelerator.wait_for_everyone()
    hashes = np.load(work.hashes)
    work = replace(work, sentences=not options.no_sentence_vectors and retriever.reads_sentences)
    rows = work.known().missing(hashes)
    accelerator.wait_for_everyone()  # from here on shards are written, and each process must have seen the same ones
    accelerator.print(f"{len(hashes):,} passages, {len(rows):,} to encode.")
    seconds = _encode(accelerator, retriever, work, rows, hashes, options)
    if accelerator.is_main_process:
        told = _finish(work, hashes, options.index_memory)
        speed = f", {len(rows) / seconds:.1f} a second" if len(rows) else ""
        print(f"{told}\n{len(rows):,} passages encoded{speed}; {time.perf_counter() - started:.0f} s in all.")
    accelerator.wait_for_everyone()
    accelerator.end_training()


@dataclass(frozen=True)
class _Work:
    """Where things lie while they are made: in a folder below the output, gone when the index is whole."""

    folder: Path
    fingerprint: str
    precision: str = FLOAT32
    sentences: bool = False  # whether those of sentences are made too

    def known(self) -> Known:
        """What need not be encoded any more."""
        return known_vectors(
            self.folder, self.shards, self.fingerprint, sentences=self.sentences, precision=self.precision
        )

    @property
    def place(self) -> Path:
        return self.folder / "work"

    @property
    def shards(self) -> Path:
        return self.place / "shards"

    @property
    def passages(self) -> Path:
        return self.place / "passages.parquet"

    @property
    def hashes(self) -> Path:
        return self.place / "hashes.npy"

    def open(self) -> None:
        """Make the folders; leave alone a folder that holds other things."""
        if self.folder.exists() and not self.place.exists():
            foreign = sorted({path.name for path in self.folder.iterdir()} - {*FILES, LISTS})
            if foreign:
                raise InputError(
                    f"--output {self.folder}: expected a new folder or one with an index, found {foreign[0]} in it. Name another folder."
                )
        self.shards.mkdir(parents=True, exist_ok=True)

    def publish(self) -> None:
        """Move the finished files into their folder; index.json goes first and comes last, so that no half index passes for whole."""
        (self.folder / "index.json").unlink(missing_ok=True)
        (self.folder / LISTS).unlink(missing_ok=True)
        for name in (*([LISTS] if (self.place / LISTS).exists() else []), *FILES):
            os.replace(self.place / name, self.folder / name)
        shutil.rmtree(self.place)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    contexts, data, add = ContextSettings(), DataSettings(), parser.add_argument
    add(
        "passages",
        metavar="PASSAGES",
        help="file that `cozyrag passages` made, or any that train.py takes as --passages",
    )
    add("--output", required=True, metavar="DIR", help="folder for the index; an index in it is brought up to date")
    add("--retriever", default=EMBEDDED, help="folder or Hub id of a SentenceTransformer (default: embedded)")
    add("--retriever_revision", help="Hub revision of --retriever")
    add("--index_memory", type=bytes_of, metavar="SIZE", help="memory for the index, such as 400MB or 8GB: Flat (exact) if it fits, else SQ8 (a quarter of it), from 100,000 passages on lists of short codes (about a 25th; also faster), else the vectors stay on the disk (exact and slow); default: no limit")  # fmt: skip
    add("--passage_tokens", type=int, default=contexts.passage_tokens, help=f"what the retriever reads of a passage, as in train.py (default: {contexts.passage_tokens})")  # fmt: skip
    add("--encode_batch_size", type=int, default=contexts.encode_batch_size, help=f"passages encoded at once (default: {contexts.encode_batch_size})")  # fmt: skip
    add("--index_precision", choices=(AUTO, FLOAT32, INT8), default=contexts.index_precision, help=f"auto: bf16 where the machine has it, else float32; int8: some 1.6 times as fast on a CPU, cosines differ by some 0.005; needs cozyrag[int8] (default: {contexts.index_precision})")  # fmt: skip
    add("--shard_size", type=int, default=4096, help="passages after which what is encoded is kept (default: 4096)")
    add("--no_sentence_vectors", action="store_true", help="leave out the vectors of sentences (half precision, some 4 KB a passage): a search by vectors and words then looks at whole passages, and contexts are filtered with vectors made on the fly")  # fmt: skip
    add("--passages_split", default=data.passages_split, help="split, if PASSAGES is a Hub dataset")
    for name in ("id", "title", "text"):
        add(f"--{name}_column", default=name, help=f"default: {name}")
    add("--skip_bad_rows", action="store_true", help="count, list and skip unusable rows instead of stopping")
    add("--use_cpu", action="store_true", help="encode on the CPU although there is a GPU")
    add("--threads", type=int, help="CPU threads of each process (default: the cores shared by the processes)")


def bytes_of(text: str) -> int:
    """The bytes of a size such as 400MB. Raises argparse.ArgumentTypeError for what is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 400MB or 8GB, found {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def _load(options: argparse.Namespace, device: str) -> Retriever:
    for name, least in (("passage_tokens", 8), ("encode_batch_size", 1), ("shard_size", 1)):
        if vars(options)[name] < least:
            raise InputError(f"--{name}: expected at least {least}, found {vars(options)[name]}.")
    if options.retriever == EMBEDDED:
        return Retriever.load_embedded(max_tokens=options.passage_tokens, device=device)
    revision = options.retriever_revision
    return Retriever.load(options.retriever, revision=revision, max_tokens=options.passage_tokens, device=device)


# ------------------------------------------------------------------------------------------------- passages, checked


def _stage(options: argparse.Namespace, path: Path) -> np.ndarray:
    """Write the passages where all processes read them; returns the hashes of their contents. Raises InputError for bad rows."""
    bad = BadRows()
    read = _reader(options)
    size = os.path.getsize(options.passages) if os.path.exists(options.passages) else None
    with tqdm(total=size, desc="reading passages", unit="B", unit_scale=True) as bar:
        ids, contents = store_passages(
            (passage for _, *passage in read(bad=bad, progress=bar.update if size else None)), path
        )
    again = _repeated(options, ids, contents, bad)
    if report := bad.finish(options.passages, options.skip_bad_rows):
        print(report)
    if again.any():
        rows = (passage for repeat, (_, *passage) in zip(again, read(bad=BadRows()), strict=True) if not repeat)
        contents = store_passages(rows, path)[1]
    if not len(contents):
        raise no_rows(options.passages, "text")
    return contents


def _reader(options: argparse.Namespace) -> Callable[..., Iterator]:
    return partial(stream_passages, options.passages, split=options.passages_split, columns=Columns.of(vars(options)))


def _repeated(options: argparse.Namespace, ids: np.ndarray, contents: np.ndarray, bad: BadRows) -> np.ndarray:
    """Which rows repeat an earlier id; noted in `bad`. Raises InputError if one of them has another text or title."""
    _, firsts, place = np.unique(ids, return_index=True, return_inverse=True)
    first = firsts[place]
    again = first != np.arange(len(ids))
    clashing = np.flatnonzero(contents != contents[first])
    named = clashing[:1] if len(clashing) else np.flatnonzero(again)[:SHOWN]
    wanted = {int(row) for row in (*named, *first[named])}
    rows = enumerate(_reader(options)(bad=BadRows())) if wanted else ()
    found = {number: (row.where, key) for number, (row, key, *_) in rows if number in wanted}
    for row in clashing[:1]:
        raise InputError(
            f'{found[row][0]}: expected a new id, found "{found[row][1]}", which {found[first[row]][0]} gave to another text or title, so '
            "answers could not be traced to a passage. Correct the ids, or leave that column out to have them made."
        )
    for row in named:
        bad.add(found[row][0], f"repeats {found[first[row]][0]}")
    bad.count += int(again.sum()) - len(named)
    return again


# ------------------------------------------------------------------------------------------------ vectors and index


def _encode(
    accelerator: Accelerator, retriever: Retriever, work: _Work, rows: np.ndarray, hashes: np.ndarray, options: argparse.Namespace
) -> float:  # fmt: skip
    """Every process encodes its share; returns the seconds until all are done. The bar counts shards of this process."""
    started = time.perf_counter()
    rank, world, size = accelerator.process_index, accelerator.num_processes, options.shard_size
    mine = sum(len(rows[start : start + size]) for start in range(rank * size, len(rows), world * size))
    desc = "encoding" if world == 1 else "encoding (share of the first process)"
    reading = retriever.reading_in(work.precision) if mine else nullcontext()
    with reading, tqdm(total=mine, desc=desc, unit="passage", disable=not accelerator.is_main_process) as bar:

        def encode(passages: Passages) -> tuple[np.ndarray, SentenceVectors | None]:
            read, size = passages.to_read(), options.encode_batch_size
            if work.sentences:
                return retriever.encode_passages(read, passages.spans(range(len(read))), batch_size=size)
            return retriever.encode(read, kind="document", batch_size=size), None

        encode_shards(
            work.passages, rows, hashes, encode, work.shards, size=size, share=(rank, world), fingerprint=work.fingerprint, precision=work.precision, done=bar.update
        )  # fmt: skip
    accelerator.wait_for_everyone()
    return time.perf_counter() - started


def _finish(work: _Work, hashes: np.ndarray, memory: int | None) -> str:
    """Put vectors and index together and in their place; returns what to tell."""
    path = work.place / "vectors.safetensors"
    vectors = write_vectors(path, hashes, work.known())
    beside = open_vectors(path, SENTENCE_VECTORS).nbytes if work.sentences else 0
    factory, share = write_index(work.place, work.fingerprint, vectors, memory, beside=beside, precision=work.precision)
    size = (memory_of(factory, *vectors.shape) + (beside if factory == "Flat" else 0)) / 1e6
    told = f"{work.folder}: {len(vectors):,} passages, index {factory}, {size:.0f} MB in memory"
    if work.sentences:
        told += f" ({beside / 1e6:.0f} MB of sentence vectors{'' if factory == 'Flat' else ' stay on the disk'})"
    if share is not None:
        told += f"; it finds {share:.1%} of the 10 nearest that exact search finds"
    replaced = made_by(work.folder)
    if replaced not in (None, work.fingerprint):
        told += f"; the index of another retriever ({replaced}) that was there is replaced"
    work.publish()
    return f"{told}."
