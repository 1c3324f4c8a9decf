"""Sparse search from the disk, for corpora whose tables of words (bm25.py) do not fit into memory.

An inverted file (Tantivy) proposes passages; their texts decide (words_of_texts.py). The files are memory-mapped, so
the processes of a machine share them. They are made once for a corpus, beside its Arrow file in the cache of
`datasets`; a corpus of which most passages were there before takes over their entries. Left out: tables in memory
(bm25.py), fusion with dense search (hybrid.py).
"""

import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import cast

import numpy as np
import tantivy
from filelock import FileLock
from tqdm import tqdm

from cozyrag.data.deduplication import repeats
from cozyrag.errors import InputError
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords, stemmed_words
from cozyrag.retrieval.faiss_index import open_vectors
from cozyrag.retrieval.index_file import read_facts
from cozyrag.retrieval.lance_index import LanceIndex
from cozyrag.retrieval.opening import Index
from cozyrag.retrieval.passage_index import PART, Passages, mapped_passages
from cozyrag.retrieval.vector_shards import content_hashes
from cozyrag.retrieval.words_of_texts import WordsOfTexts, words_of
from cozyrag.runtime.atomic_files import flush, replacing, save_tensors, write_json
from cozyrag.runtime.contents import read_object

VERSION = 1  # increase with every change of the words of a text, or of the files
FACTS, ROWS, INVERTED = "words.json", "rows.safetensors", "inverted"
HEAP = 128_000_000  # bytes that Tantivy fills before it writes a segment
BYTES = 300  # on the disk for each passage, at most: measured are some 200
MANY, COMMON = 100_000, 0.3  # from so many passages on, words that more than this share have propose none
WORTHWHILE = 0.5  # share of the passages that an earlier corpus must have to be taken over


class WordsOnDisk(WordsOfTexts):
    """`WordsOfTexts` by files of Tantivy, whose own scores have k1 = 1.2 and rounded lengths.

    Passages that repeat count once. After passages were removed, words count as a little less rare until Tantivy
    merges its segments.

    Args:
        place: a folder that `opened` made for these passages.
    """

    _beside: TemporaryDirectory | None = None

    def __init__(self, place: Path, passages: Passages, *, stemmer: str):
        super().__init__(len(passages.ids), read_object(place / FACTS, "")["mean_length"], stemmer=stemmer)
        self.passages = passages
        self._inverted = tantivy.Index.open(str(place / INVERTED))
        self._found = self._inverted.searcher()
        self._hashes, self._rows = (open_vectors(place / ROWS, name) for name in ("hashes", "rows"))
        self._counted = lru_cache(1 << 16)(lambda word: self._found.doc_freq("words", word))

    @classmethod
    def opened(cls, cache: Path, passages: Passages, *, stemmer: str) -> "WordsOnDisk":
        """The words of these passages, made if they are not there; other processes wait meanwhile.

        Args:
            cache: the beginning of the path, which names the content of the passages.

        Raises:
            InputError: the disk is full, or may not be written.
        """
        place = cache.with_name(f"{cache.name}-{stemmer}-{VERSION}.words")
        if found := cls._complete(place, passages, stemmer):
            return found
        if not _may_write(place.parent):
            beside = TemporaryDirectory(ignore_cleanup_errors=True)
            made = cls.opened(Path(beside.name) / cache.name, passages, stemmer=stemmer)
            made._beside = beside  # removed with this object
            return made
        with FileLock(place.with_suffix(".lock")):
            if found := cls._complete(place, passages, stemmer):
                return found
            _make(place, passages, stemmer)
        return cls(place, passages, stemmer=stemmer)

    @classmethod
    def _complete(cls, place: Path, passages: Passages, stemmer: str) -> "WordsOnDisk | None":
        """What is in a folder; None if nothing is, or if it is damaged."""
        if (place / FACTS).exists():
            with suppress(ValueError, OSError, KeyError, InputError):
                return cls(place, passages, stemmer=stemmer)
        return None

    def _proposed(self, words: list[str], limit: int) -> np.ndarray:
        terms = [self._term(word, times) for word, times in self._telling(Counter(words), limit)]
        query = tantivy.Query.boolean_query([(tantivy.Occur.Should, term) for term in terms])
        hits = self._found.search(query, limit=limit, count=False).hits
        return self._rows_of(np.array(self._found.fast_field_values("hash", [at for _, at in hits]), np.uint64))

    def _telling(self, words: Counter[str], limit: int) -> list[tuple[str, int]]:
        """The words that propose passages, with their number in the question, sorted.

        Words that many passages have weigh little, and reading their lists takes most of a search: without them the
        first 20 passages of 200 questions were the same among 5 million, in a quarter of the time. All words are taken
        if no other one has enough passages.
        """
        every = sorted(words.items())
        if len(self) < MANY:
            return every
        rare = [each for each in every if self._holders(each[0]) <= COMMON * len(self)]
        return rare if any(self._holders(word) >= limit for word, _ in rare) else every

    def _holders(self, word: str) -> int:
        return self._counted(word)

    def _text(self, row: int) -> tuple[str, str]:
        return self.passages.titles[row], self.passages.texts[row]

    def _term(self, word: str, times: int) -> tantivy.Query:
        term = tantivy.Query.term_query(self._inverted.schema, "words", word, "freq")
        return tantivy.Query.boost_query(term, float(times)) if times > 1 else term

    def _rows_of(self, hashes: np.ndarray) -> np.ndarray:
        """The rows of the passages with these hashes; equal passages have one."""
        starts, ends = (np.searchsorted(self._hashes, hashes, side=side) for side in ("left", "right"))
        return np.concatenate([np.zeros(0, np.int64), *(self._rows[a:b] for a, b in zip(starts, ends, strict=True))])


# ---- making the files


def _may_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _make(place: Path, passages: Passages, stemmer: str) -> None:
    """Write the files of `WordsOnDisk`; see `replacing` for what it raises."""
    shutil.rmtree(place, ignore_errors=True)  # damaged: nothing is taken over from it
    hashes = content_hashes(passages)
    order = np.argsort(hashes, kind="stable")
    known, known_lengths, earlier = _earlier(place, hashes, stemmer)
    lengths = np.zeros(len(hashes), np.int32)
    with replacing(place, needed=BYTES * len(hashes), kept=False) as coming:
        writer = _writer(coming / INVERTED, earlier)
        for gone in known[~np.isin(known, hashes)].tolist():
            writer.delete_documents_by_term("hash", gone)
        new = np.flatnonzero(~np.isin(hashes, known) & ~repeats(hashes))
        for row, length in _added(writer, passages, new, hashes, stemmer):
            lengths[row] = length
        writer.commit()
        writer.wait_merging_threads()
        every = np.concatenate([known, hashes[new]])
        by_hash = np.concatenate([known_lengths, lengths[new]])[np.argsort(every)]
        own = by_hash[np.searchsorted(np.sort(every), hashes)]
        kept = {"hashes": hashes[order], "rows": order, "lengths": own[order]}
        save_tensors(kept, coming / ROWS)
        flush(coming / ROWS)  # Tantivy has flushed its own files
        facts = {"passages": len(hashes), "mean_length": max(1.0, float(own.mean())) if len(own) else 1.0}
        write_json(coming / FACTS, facts)


def _earlier(place: Path, hashes: np.ndarray, stemmer: str) -> tuple[np.ndarray, np.ndarray, Path | None]:
    """Hashes, lengths and folder of the corpus in the cache that has most of these passages, if it has many of them.

    Hashes are sorted, equal ones are there once.
    """
    most: tuple[np.ndarray, np.ndarray, Path | None] = np.zeros(0, np.uint64), np.zeros(0, np.int32), None
    least = max(1, math.ceil(WORTHWHILE * len(hashes)))
    for folder in place.parent.glob(f"*-{stemmer}-{VERSION}.words"):
        try:
            tantivy.Index.open(str(folder / INVERTED))
            held, lengths = (np.asarray(open_vectors(folder / ROWS, name)) for name in ("hashes", "lengths"))
        except (OSError, ValueError, KeyError):
            continue
        first = np.flatnonzero(~repeats(held)) if len(held) <= len(hashes) / WORTHWHILE else np.zeros(0, np.int64)
        if (shared := int(np.isin(held[first], hashes).sum())) >= least:
            least, most = shared + 1, (held[first], lengths[first], folder)
    return most


def _writer(folder: Path, earlier: Path | None) -> tantivy.IndexWriter:
    """A writer into a new folder, or into one that begins with the segments of an earlier corpus."""
    folder.mkdir(parents=True)
    if earlier is None:
        schema = tantivy.SchemaBuilder()
        schema.add_text_field("words", tokenizer_name="whitespace", index_option="freq")
        schema.add_unsigned_field("hash", indexed=True, fast=True)
        index = tantivy.Index(schema.build(), path=str(folder))
    else:
        for path in (earlier / INVERTED).iterdir():
            if path.suffix in (".json", ".lock"):
                shutil.copyfile(path, folder / path.name)
            else:
                _share(path, folder / path.name)
        index = tantivy.Index.open(str(folder))
    return cast(tantivy.IndexWriter, index.writer(heap_size=HEAP, num_threads=1))  # one: rows keep their order


def _share(path: Path, other: Path) -> None:
    """The same file under another name; segments never change, so they need no second place on the disk."""
    try:
        os.link(path, other)
    except OSError:  # a file system without links
        shutil.copyfile(path, other)


def _added(
    writer: tantivy.IndexWriter, passages: Passages, rows: np.ndarray, hashes: np.ndarray, stemmer: str
) -> Iterator[tuple[int, int]]:
    """Add these passages; yields the row and the number of words of each."""
    words = stemmed_words(stemmer)
    for row in tqdm(rows.tolist(), desc="words", unit="passage", disable=len(rows) < PART):
        found = words_of(words, passages.titles[row], passages.texts[row])
        document = tantivy.Document()
        document.add_text("words", " ".join(found))
        document.add_unsigned("hash", int(hashes[row]))
        writer.add_document(document)
        yield row, len(found)


# ---- the choice


def prepare_words(folder: Path, stemmer: str) -> None:
    """Make the files for the index in a folder now, so that it opens in seconds.

    Nothing is done for a Flat one, whose words are in memory, and where the cache may not be written.
    """
    facts = read_facts(folder)
    if facts.get("factory", "Flat") == "Flat":
        return
    table, cache = mapped_passages(folder, facts)
    if _may_write(cache.parent):
        WordsOnDisk.opened(cache, Passages.of(table, mapped=True), stemmer=stemmer)


WordSearch = tuple[LexicalIndex | WordsOfTexts | None, SentenceWords | WordsOfTexts | None]


def word_search(index: Index, *, mode: str, stemmer: str) -> WordSearch:
    """BM25 over the passages of an index, None for dense search, and the words of their sentences.

    They are in the database with an index in LanceDB, on the disk beside an index that saves memory, else in memory.

    Args:
        mode: one of the MODES of hybrid.py. stemmer: see `LexicalIndex`.
    """
    passages = index.passages
    both: WordsOfTexts | None = None
    if isinstance(index, LanceIndex):
        both = index.words(stemmer=stemmer)
    elif index.cache is not None:
        both = WordsOnDisk.opened(index.cache, passages, stemmer=stemmer)
    if both is not None:
        return None if mode == "dense" else both, both
    lexical = None if mode == "dense" else LexicalIndex(passages.to_read(), stemmer=stemmer)
    return lexical, SentenceWords(passages.titles, passages.sentences(), stemmer=stemmer)
