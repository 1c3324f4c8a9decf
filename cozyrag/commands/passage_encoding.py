"""The work of `cozyrag index`: stage the passages, encode them on all processes, build the index and publish it.

Left out: the options (index.py), storing and finding vectors (vector_shards.py).
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from cozyrag.commands.options import columns_of
from cozyrag.config import ContextSettings, DataSettings, ModelSettings, OutputSettings, Settings, TrainingSettings
from cozyrag.config_checks import EMBEDDED
from cozyrag.data.metadata import OtherColumns
from cozyrag.data.passages import stream_passages
from cozyrag.data.readers import described, size_of
from cozyrag.data.rows import SHOWN, BadRows, Row, no_rows
from cozyrag.data.sentences import RULES, SentenceVectors
from cozyrag.errors import InputError
from cozyrag.hub.model_cards import CARD
from cozyrag.models.int8_encoding import check_int8, reading_precision
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.faiss_index import SENTENCE_VECTORS, memory_of, open_vectors
from cozyrag.retrieval.index_file import FILES, LISTS, made_by
from cozyrag.retrieval.lance_database import database_of
from cozyrag.retrieval.passage_index import Passages, write_index
from cozyrag.retrieval.vector_shards import Known, encode_shards, known_vectors, store_passages, write_vectors
from cozyrag.retrieval.words_on_disk import prepare_words
from cozyrag.runtime.atomic_files import PARTIAL, flush, writing
from cozyrag.runtime.distributed import main_decides
from cozyrag.runtime.folder_lock import LOCK
from cozyrag.runtime.precision import fitting
from cozyrag.runtime.terminal import one_line, say
from cozyrag.training.output_dir import locked
from cozyrag.training.setup import make_accelerator


def build_index(options: argparse.Namespace) -> None:
    """Encode what has no vector yet and build the index. Raises InputError; encoded shards are kept for a later run."""
    started = time.perf_counter()
    accelerator = _accelerator(options)
    retriever = _load(options, str(accelerator.device))
    retriever.precision = reading_precision(main_decides(accelerator, lambda: fitting(accelerator.device.type).name))
    sentences = not options.no_sentence_vectors and retriever.reads_sentences
    precision = retriever.reads_in(options.index_precision)
    if uri := database_of(options.output):
        _fill_database(accelerator, retriever, uri, options, precision, sentences)
        return accelerator.end_training()
    work = _Workspace(Path(options.output), retriever.fingerprint(), precision, sentences)
    with locked(accelerator, work.folder, "--output"), writing(work.folder):
        _index(accelerator, retriever, work, options, started)
    accelerator.end_training()


def _index(
    accelerator: Accelerator, retriever: Retriever, work: "_Workspace", options: argparse.Namespace, started: float
) -> None:
    """Everything between the lock and its release."""
    if accelerator.is_main_process:
        work.open()
        np.save(work.hashes, _stage(options, work.passages))
    accelerator.wait_for_everyone()
    hashes = np.load(work.hashes)
    rows = work.known().missing(hashes)
    accelerator.wait_for_everyone()  # all processes must see the same shards before new ones are written
    if accelerator.is_main_process:
        say(f"{len(hashes):,} passages, {len(rows):,} to encode. {one_line(retriever.prompts_sentence)}".rstrip())
    seconds = _encode(accelerator, retriever, work, rows, hashes, options)
    if accelerator.is_main_process:
        speed = f", {len(rows) / seconds:.1f} per second" if len(rows) else ""
        say(one_line(_finish(work, hashes, options.index_memory)))
        prepare_words(work.folder, options.stemmer)
        say(f"{len(rows):,} passages encoded{speed}; {time.perf_counter() - started:.0f} s in total.")
    accelerator.wait_for_everyone()


def _fill_database(
    accelerator: Accelerator, retriever: Retriever, uri: str, options: argparse.Namespace, precision: str,
    sentences: bool,
) -> None:  # fmt: skip
    """Write passages and vectors into a database."""
    from cozyrag.commands.database_encoding import DatabaseFilling
    from cozyrag.retrieval.lance_writing import LanceWriter

    started = time.perf_counter()
    writer = LanceWriter(
        uri,
        retriever_fingerprint=retriever.fingerprint(),
        precision=precision,
        sentence_rules=RULES if sentences else None,
        stemmer=options.stemmer,
        dimensions=retriever.dimensions,
    )
    filling = DatabaseFilling(
        accelerator,
        writer,
        stage=partial(_stage, options),
        encode=_encoder(retriever, options.encode_batch_size, sentences),
        reading=partial(retriever.reading_in, precision),
        size=options.shard_size,
    )
    count = filling.run(retriever.prompts_sentence)
    if accelerator.is_main_process:
        say(f"{count:,} passages encoded; {time.perf_counter() - started:.0f} s in total.")


class _Workspace:
    """The unfinished files, in a folder inside the output that is removed when the index is complete.

    `sentences`: whether sentence vectors are made too.
    """

    def __init__(self, folder: Path, fingerprint: str, precision: str, sentences: bool):
        self.folder, self.fingerprint, self.precision, self.sentences = folder, fingerprint, precision, sentences
        self.place = folder / "work"
        self.shards, self.passages = self.place / "shards", self.place / "passages.parquet"
        self.hashes = self.place / "hashes.npy"

    def known(self) -> Known:
        """The vectors that exist already."""
        return known_vectors(
            self.folder, self.shards, self.fingerprint, sentences=self.sentences, precision=self.precision
        )

    def open(self) -> None:
        """Create the folders. Raises InputError if the output folder holds other files."""
        if self.folder.exists() and not self.place.exists():
            names = {path.name for path in self.folder.iterdir() if not path.name.startswith(".")}
            foreign = sorted(names - {*FILES, LISTS, CARD, LOCK})
            if foreign:
                raise InputError(
                    f"--output {self.folder}: expected a new folder or one with an index, found {foreign[0]} in it. "
                    "Name another folder."
                )
        self.shards.mkdir(parents=True, exist_ok=True)
        for path in (*self.place.iterdir(), *self.shards.glob(f"*{PARTIAL}")):
            if path.is_file():  # of a run that was stopped; only shards are used again
                path.unlink()

    def publish(self) -> None:
        """Move the finished files to the output; without its index.json, removed first, no partial index is read."""
        names = [*([LISTS] if (self.place / LISTS).exists() else []), *FILES]
        for name in names:
            flush(self.place / name)
        (self.folder / "index.json").unlink(missing_ok=True)
        (self.folder / LISTS).unlink(missing_ok=True)
        flush(self.folder)
        for name in names:  # index.json comes last
            os.replace(self.place / name, self.folder / name)
        flush(self.folder)
        shutil.rmtree(self.place)


def _accelerator(options: argparse.Namespace) -> Accelerator:
    training = TrainingSettings(use_cpu=options.use_cpu, threads=options.threads)
    settings = Settings(DataSettings(), ModelSettings(), ContextSettings(), training, OutputSettings())
    accelerator = make_accelerator(settings)
    check_int8(options.index_precision, str(accelerator.device), "--index_precision")
    return accelerator


def _load(options: argparse.Namespace, device: str) -> Retriever:
    if options.retriever == EMBEDDED:
        retriever = Retriever.load_embedded(max_tokens=options.passage_tokens, device=device)
    else:
        revision = options.retriever_revision
        retriever = Retriever.load(
            options.retriever, revision=revision, max_tokens=options.passage_tokens, device=device
        )
    retriever.use_prompts(options.retriever, query=options.query_prompt, passage=options.passage_prompt)
    return retriever


# ---- the passages


def _stage(options: argparse.Namespace, path: Path) -> np.ndarray:
    """Write the passages for all processes; returns the hashes of their contents. Raises InputError for bad rows."""
    bad, others = BadRows(), OtherColumns(columns_of(options))
    read = _reader(options)
    size = size_of(options.passages)
    with tqdm(total=size, desc="reading passages", unit="B", unit_scale=True) as bar:
        rows = read(bad=bad, progress=bar.update if size else None)
        ids, contents = store_passages(((key, title, text, others.of(row)) for row, key, title, text in rows), path)
    others.report(bad, described(options.passages))
    again = _repeated(options, ids, contents, bad)
    if report := bad.finish(described(options.passages), options.skip_bad_rows):
        say(report)
    if again.any():
        rows = (row for repeat, row in zip(again, read(bad=BadRows()), strict=True) if not repeat)
        contents = store_passages(((key, title, text, others.of(row)) for row, key, title, text in rows), path)[1]
    if not len(contents):
        raise no_rows(described(options.passages), "text")
    return contents


def _reader(options: argparse.Namespace) -> Callable[..., Iterator[tuple[Row, str, str, str]]]:
    return partial(
        stream_passages,
        options.passages,
        split=options.passages_split,
        columns=columns_of(options),
        delimiter=options.delimiter,
    )


def _repeated(options: argparse.Namespace, ids: np.ndarray, contents: np.ndarray, bad: BadRows) -> np.ndarray:
    """Which rows repeat an earlier id; added to `bad`. Raises InputError if one of them has another text or title."""
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
            f'{found[row][0]}: expected a new id, found "{found[row][1]}", which {found[first[row]][0]} gave to '
            "another text or title, so answers could not be traced to a passage. Correct the ids, or leave that column "
            "out to generate them."
        )
    for row in named:
        bad.add(found[row][0], f"repeats {found[first[row]][0]}")
    bad.count += int(again.sum()) - len(named)
    return again


# ---- vectors and index


def _encoder(
    retriever: Retriever, batch_size: int, sentences: bool
) -> Callable[[Passages], tuple[np.ndarray, SentenceVectors | None]]:
    """Passages to their vectors and, if wanted, those of their sentences."""

    def encode(passages: Passages) -> tuple[np.ndarray, SentenceVectors | None]:
        texts = passages.to_read()
        if sentences:
            return retriever.encode_passages(texts, passages.spans(range(len(texts))), batch_size=batch_size)
        return retriever.encode(texts, kind="document", batch_size=batch_size), None

    return encode


def _encode(
    accelerator: Accelerator, retriever: Retriever, work: _Workspace, rows: np.ndarray, hashes: np.ndarray,
    options: argparse.Namespace,
) -> float:  # fmt: skip
    """Every process encodes its share; returns the seconds until all are done. The bar shows the main process."""
    started = time.perf_counter()
    rank, world, size = accelerator.process_index, accelerator.num_processes, options.shard_size
    mine = sum(len(rows[start : start + size]) for start in range(rank * size, len(rows), world * size))
    desc = "encoding" if world == 1 else "encoding (share of the main process)"
    encode = _encoder(retriever, options.encode_batch_size, work.sentences)
    reading = retriever.reading_in(work.precision) if mine else nullcontext()
    with reading, tqdm(total=mine, desc=desc, unit="passage", disable=not accelerator.is_main_process) as bar:
        encode_shards(
            work.passages, rows, hashes, encode, work.shards, size=size, share=(rank, world), done=bar.update,
            fingerprint=work.fingerprint, precision=work.precision,
        )  # fmt: skip
    accelerator.wait_for_everyone()
    return time.perf_counter() - started


def _finish(work: _Workspace, hashes: np.ndarray, memory: int | None) -> str:
    """Join the vectors, build the index and publish both; returns a summary."""
    path = work.place / "vectors.safetensors"
    vectors = write_vectors(path, hashes, work.known())
    beside = open_vectors(path, SENTENCE_VECTORS).nbytes if work.sentences else 0
    factory, share = write_index(work.place, work.fingerprint, vectors, memory, beside=beside, precision=work.precision)
    size = (memory_of(factory, *vectors.shape) + (beside if factory == "Flat" else 0)) / 1e6
    summary = f"{work.folder}: {len(vectors):,} passages, index {factory}, {size:.0f} MB in memory"
    if work.sentences:
        summary += f" ({beside / 1e6:.0f} MB of sentence vectors{'' if factory == 'Flat' else ' stay on disk'})"
    if share is not None:
        summary += f"; it finds {share:.1%} of the 10 nearest of an exact search"
    replaced = made_by(work.folder)
    if replaced not in (None, work.fingerprint):
        summary += f"; it replaces the index of another retriever ({replaced})"
    work.publish()
    return f"{summary}."
