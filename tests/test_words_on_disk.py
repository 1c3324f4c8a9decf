"""Words on the disk against those in memory: the same scores; made once, taken over, made again after damage."""

import os
import shutil
import threading
from collections import Counter

import datasets
import numpy as np
import pytest
from datasets import Dataset

from cozyrag.data.sentences import SentenceVectors, split_sentences
from cozyrag.pipeline import CozyRAG
from cozyrag.retrieval import passage_index, words_on_disk
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.hybrid import Searcher
from cozyrag.retrieval.passage_index import PassageIndex, Passages
from cozyrag.retrieval.words_on_disk import WordsOnDisk, word_search

WORDS = "river fox founded hill Wien sea blue red hen sleeps running runs 1,250 3.5 vitamin C of the in and".split()
QUESTIONS = ["Which river runs to the sea?", "the red fox the red hen", "vitamin C", "1250 hills", "zebra", "", "Wien"]


def drawn(count, seed=0):
    """Passages with titles, of one to five sentences."""
    rng = np.random.default_rng(seed)

    def sentence():
        return " ".join(rng.choice(WORDS, rng.integers(2, 9))).capitalize() + "."

    texts = [f"{' '.join(sentence() for _ in range(rng.integers(1, 6)))} Number n{n}x." for n in range(count)]
    return Passages([f"p{n}" for n in range(count)], [f"Title_{n % 7}" for n in range(count)], texts)


def opened(tmp_path, passages, *, name="key", stemmer="english"):
    return WordsOnDisk.opened(tmp_path / name, passages, stemmer=stemmer)


def tables(passages, stemmer="english"):
    lexical = LexicalIndex(passages.to_read(), stemmer=stemmer)
    return lexical, SentenceWords(passages.titles, passages.sentences(), stemmer=stemmer)


@pytest.fixture
def passages():
    return drawn(200)


@pytest.fixture
def making(monkeypatch):
    """The number of passages that each making of the files adds."""
    added, add = [], words_on_disk._added

    def count(writer, passages, rows, *others):
        added.append(len(rows))
        return add(writer, passages, rows, *others)

    monkeypatch.setattr(words_on_disk, "_added", count)
    return added


# ---- the same as in memory


@pytest.mark.parametrize("stemmer", ["none", "english", "german"])
def test_scores_and_words_are_those_of_the_tables_in_memory(tmp_path, passages, stemmer):
    words, (lexical, sentences) = opened(tmp_path, passages, stemmer=stemmer), tables(passages, stemmer)
    rows = np.arange(len(passages.ids))
    assert words.split(QUESTIONS) == lexical.split(QUESTIONS)
    for question, asked in zip(QUESTIONS, lexical.split(QUESTIONS), strict=True):
        np.testing.assert_allclose(words.scores_at(asked, rows), lexical.scores_at(asked, rows), atol=1e-5)
        for own, other in zip(words.shared(asked, rows), sentences.shared(asked, rows), strict=True):
            np.testing.assert_allclose(own, other, atol=1e-5)
        for own, other in zip(words.overlaps(question, rows), sentences.overlaps(question, rows), strict=True):
            np.testing.assert_allclose(own, other, atol=1e-5)
    for word in ("river", "zebra", "runs", "the"):
        assert words.rarity_of(word) == pytest.approx(sentences.rarity_of(word), abs=1e-6)


@pytest.mark.parametrize("k", [1, 5, 60, 200, 1000])
def test_search_finds_the_best_passages(tmp_path, passages, k):
    words, (lexical, _) = opened(tmp_path, passages), tables(passages)
    scores, rows = words.search(QUESTIONS, k)
    expected = lexical.search(QUESTIONS, k)[0]
    assert rows.dtype == np.int64 and scores.shape == rows.shape == expected.shape
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    for asked, own, found in zip(lexical.split(QUESTIONS), scores, rows, strict=True):
        assert len(set(found.tolist())) == len(found)
        np.testing.assert_allclose(own, lexical.scores_at(asked, found), atol=1e-5)


def test_in_a_large_corpus_words_of_most_passages_propose_none(tmp_path, monkeypatch):
    """`the` is in all 300 passages, `hen` in 60, `fox` in 3: without `the` the best are found, as by all words."""
    birds = ["the" if n % 5 else "hen " * (1 + n // 5) for n in range(300)]
    texts = [f"The {bird} {'red' if n % 100 else 'fox'} number {n}." for n, bird in enumerate(birds)]
    large = Passages([f"p{n}" for n in range(300)], [""] * 300, texts)
    words, lexical = opened(tmp_path, large), tables(large)[0]
    every = [words._telling(Counter(asked), 21) for asked in words.split(["the hen", "the fox", "the", "of"])]
    monkeypatch.setattr(words_on_disk, "MANY", 300)
    assert every == [[("hen", 1), ("the", 1)], [("fox", 1), ("the", 1)], [("the", 1)], [("of", 1)]]
    asked = [Counter(each) for each in words.split(["the hen", "the fox", "the", "of"])]
    assert [words._telling(each, 21) for each in asked] == [[("hen", 1)], *every[1:]]  # `fox` would fill 3 of 21 places
    for own, other in zip(words.search(["the hen"], 5), lexical.search(["the hen"], 5), strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)


def test_a_passage_that_repeats_is_found_in_each_of_its_rows(tmp_path):
    passages = Passages(list("abcd"), [""] * 4, ["The fox.", "A hen.", "The fox.", "A river."])
    assert sorted(opened(tmp_path, passages).search(["fox"], 2)[1][0].tolist()) == [0, 2]


def test_texts_without_words_and_in_any_script_can_be_searched(tmp_path):
    texts = ["...", "東京は日本の首都です。富士山は高い。", "Wien an der Donau", "word\u2028next"]
    words = opened(tmp_path, Passages(list("abcd"), [""] * 4, texts))
    assert [words.search([asked], 1)[1][0, 0] for asked in ("富士山", "Donau", "next")] == [1, 2, 3]


def test_hybrid_search_is_the_same_with_either(tmp_path):
    passages, rng = drawn(50), np.random.default_rng(1)  # so few that all of them are candidates

    def unit(count):
        made = rng.normal(size=(count, 16)).astype(np.float32)
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    table = Dataset.from_dict({"id": passages.ids, "title": passages.titles, "text": passages.texts})
    counts = [len(split_sentences(text)) for text in passages.texts]
    sentences = SentenceVectors(unit(sum(counts)).astype(np.float16), np.cumsum(counts))
    index = PassageIndex(table, unit(len(counts)), fingerprint="f", sentences=sentences)
    asked = dict(zip(QUESTIONS, unit(len(QUESTIONS)), strict=True))

    def found(lexical, words):
        search = Searcher(
            index, lexical, encode=lambda texts: np.stack([asked[text] for text in texts]), mode="hybrid", words=words
        )
        return search.search(QUESTIONS, 10)

    words = opened(tmp_path, passages)
    in_memory, on_disk = found(*tables(passages)), found(words, words)
    np.testing.assert_allclose(on_disk.scores, in_memory.scores, atol=1e-3)
    assert (on_disk.rows == in_memory.rows).mean() > 0.95  # equal scores may change places


# ---- made once


def test_the_files_are_made_once_and_again_for_another_stemmer(tmp_path, passages, making):
    for stemmer in ("english", "english", "none", "english"):
        opened(tmp_path, passages, stemmer=stemmer)
    assert making == [200, 200]


def test_processes_that_come_together_make_them_once(tmp_path, passages, making):
    together, found = threading.Barrier(4), []

    def come():
        together.wait()
        found.append(opened(tmp_path, passages).search(["river"], 3)[1].tolist())

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert making == [200] and len(found) == 4 and all(each == found[0] for each in found)


def changed(passages, *, without=(), more=0):
    kept = [row for row in range(len(passages.ids)) if row not in without]
    new = drawn(more, seed=9)
    pairs = (passages.ids, new.ids), (passages.titles, new.titles), (passages.texts, new.texts)
    return Passages(*([column[row] for row in kept] + list(fresh) for column, fresh in pairs))


def test_a_changed_corpus_takes_over_what_is_the_same(tmp_path, passages, making):
    opened(tmp_path, passages)
    later = changed(passages, without={0, 50, 51}, more=12)
    own, fresh = opened(tmp_path, later, name="later"), opened(tmp_path / "elsewhere", later)
    assert making == [200, 12, 209]
    for found in own.search(["n50x", "n51x", "n0x"], 5)[1]:
        assert len(found) == 5 and found.max() < len(later.ids)
    row = later.texts.index(passages.texts[199])
    assert own.search(["n199x"], 1)[1][0, 0] == fresh.search(["n199x"], 1)[1][0, 0] == row
    asked = own.split(["n199x"])[0]
    np.testing.assert_allclose(own.scores_at(asked, [row]), fresh.scores_at(asked, [row]), rtol=1e-3)


def test_the_corpus_that_was_taken_over_stays_as_it_was(tmp_path, passages):
    before = opened(tmp_path, passages).search(QUESTIONS, 20)
    opened(tmp_path, changed(passages, without=set(range(80)), more=5), name="later")
    again = opened(tmp_path, passages).search(QUESTIONS, 20)
    for own, other in zip(again, before, strict=True):
        np.testing.assert_array_equal(own, other)


def test_another_corpus_takes_over_nothing(tmp_path, passages, making):
    opened(tmp_path, passages)
    opened(tmp_path, changed(passages, without=set(range(120)), more=100), name="other")
    assert making == [200, 180]


# ---- damage


@pytest.mark.parametrize("name", ["words.json", "rows.safetensors", "inverted/meta.json"])
@pytest.mark.parametrize("content", [b"", b"no such thing"])
def test_damaged_files_are_made_again(tmp_path, passages, making, name, content):
    before = opened(tmp_path, passages).search(QUESTIONS, 5)[1]
    [folder] = tmp_path.glob("*.words")
    (folder / name).write_bytes(content)
    np.testing.assert_array_equal(opened(tmp_path, passages).search(QUESTIONS, 5)[1], before)
    assert making == [200, 200]


def test_what_was_not_finished_is_not_read(tmp_path, passages, monkeypatch, making):
    with monkeypatch.context() as patched:
        patched.setattr(words_on_disk, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            opened(tmp_path, passages)
    assert not list(tmp_path.glob("*.words*"))[1:]  # the lock alone may stay
    opened(tmp_path, passages)
    assert making == [200, 200]


def test_without_a_cache_the_words_are_beside(tmp_path, passages):
    (tmp_path / "file").write_text("")
    words = opened(tmp_path / "file", passages)
    assert words.search(["n7x"], 1)[1][0, 0] == 7


# ---- the choice


def test_passages_are_mapped_in_few_batches_although_they_are_read_in_many(tmp_path, monkeypatch, passages):
    """Opening reads the head of each batch from all over the disk."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(passage_index, "PART", 10)
    monkeypatch.setattr(passage_index, "JOINED", 10_000)
    table = Dataset.from_dict({"id": passages.ids, "title": passages.titles, "text": passages.texts})
    PassageIndex(table, np.eye(200, dtype=np.float32), fingerprint="f", factory="Mapped").save(tmp_path / "index")
    for _ in range(2):  # made, then found
        mapped = passage_index.mapped_passages(tmp_path / "index", {})[0]
        assert Passages.of(mapped, mapped=True) == passages
        sizes = [len(chunk) for chunk in mapped.data.column("text").chunks]
        assert 2 <= len(sizes) <= 8 and all(size % 10 == 0 for size in sizes)


def test_an_index_that_saves_memory_has_its_words_on_the_disk(tmp_path, monkeypatch, passages):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = Dataset.from_dict({"id": passages.ids, "title": passages.titles, "text": passages.texts})
    vectors = np.eye(200, dtype=np.float32)
    for factory, expected in (("Flat", LexicalIndex), ("SQ8", WordsOnDisk), ("Mapped", WordsOnDisk)):
        PassageIndex(table, vectors, fingerprint="f", factory=factory).save(tmp_path / factory)
        index = PassageIndex.load(tmp_path / factory, fingerprint="f")
        lexical, words = word_search(index, mode="hybrid", stemmer="none")
        assert type(lexical) is expected and (words is lexical) == (expected is WordsOnDisk)
        assert word_search(index, mode="dense", stemmer="none")[0] is None


def test_copies_of_an_index_share_the_files(tmp_path, monkeypatch, passages, making):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = Dataset.from_dict({"id": passages.ids, "title": passages.titles, "text": passages.texts})
    PassageIndex(table, np.eye(200, dtype=np.float32), fingerprint="f", factory="Mapped").save(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in "ab":
        word_search(PassageIndex.load(tmp_path / name, fingerprint="f"), mode="bm25", stemmer="none")
    assert making == [200] and len(list((tmp_path / "cache" / "cozyrag").glob("*.arrow"))) == 1


@pytest.mark.parametrize("mode", ["bm25", "hybrid"])
def test_a_pair_answers_alike_with_words_in_memory_and_on_the_disk(pair_folder, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(pair_folder, tmp_path / "pair")
    pair = CozyRAG.from_pretrained(tmp_path / "pair")
    index = pair.index
    PassageIndex(
        Dataset.from_dict({"id": index.passages.ids, "title": index.passages.titles, "text": index.passages.texts}),
        index.vectors, fingerprint=index.fingerprint, factory="Mapped",
    ).save(tmp_path / "saving")  # fmt: skip
    facts = (tmp_path / "pair" / "cozyrag.json").read_text().replace('"dense"', f'"{mode}"')
    answers = []
    for place in ("index", "saving"):
        if place == "saving":
            shutil.rmtree(tmp_path / "pair" / "index")
            os.rename(tmp_path / "saving", tmp_path / "pair" / "index")
        (tmp_path / "pair" / "cozyrag.json").write_text(facts)
        loaded = CozyRAG.from_pretrained(tmp_path / "pair")
        assert (loaded.index.cache is None) == (place == "index")
        answers.append([round(source.score, 3) for source in loaded.answer("What colour is the fox 3?").passages])
    assert answers[0] == answers[1]
