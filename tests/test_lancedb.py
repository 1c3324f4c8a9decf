"""An index in LanceDB against the local one: the same results; resumed, shared, refused, lost."""

import importlib.util
import json
import shutil
import threading

import numpy as np
import pytest
import tiny
from databases import COUNT, QUESTIONS, fill, index_into, local, opened, rows, searcher, settings, unit, write, writer
from local_hub import LocalHub, point_client_at

from cozyrag.config import parse_settings
from cozyrag.errors import InputError
from cozyrag.hub.push import push_pair
from cozyrag.models.retriever import Retriever
from cozyrag.pipeline import CozyRAG
from cozyrag.preflight.pair_check import check_pair
from cozyrag.retrieval import lance_database, lance_writing
from cozyrag.retrieval.lance_database import database_of
from cozyrag.retrieval.lance_index import LanceIndex
from cozyrag.retrieval.lance_writing import LanceWriter
from cozyrag.retrieval.opening import open_index
from cozyrag.retrieval.passage_index import Passages
from cozyrag.retrieval.words_on_disk import word_search
from cozyrag.run import train

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lancedb") is None, reason="lancedb is not installed")


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A database with the local index. No test may change it."""
    return fill(tmp_path_factory.mktemp("lancedb") / "it's")


@pytest.fixture
def own(database, tmp_path):
    """A copy of the database that a test may change."""
    shutil.copytree(database, tmp_path / "own")
    return str(tmp_path / "own")


# ---- the same as locally


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_searches_find_what_the_local_index_finds(database, mode):
    expected = searcher(local(), mode).search(QUESTIONS, 10)
    found = searcher(opened(database), mode).search(QUESTIONS, 10)
    assert found.rows.dtype == np.int64 and found.scores.shape == (len(QUESTIONS), 10)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
    if mode != "bm25":  # many passages have none of the words, so the same score
        assert (found.rows == expected.rows).mean() > 0.95


@pytest.mark.parametrize("k", [1, COUNT, 1000])
def test_any_number_of_passages_can_be_found(database, k):
    expected, found = (index.search(unit(3, 4), k) for index in (local(), opened(database)))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])


def test_passages_words_and_vectors_are_the_same(database):
    index, expected = opened(database), local()
    assert index.passages == expected.passages and len(index) == COUNT
    assert index.passages.titles[5:8] == expected.passages.titles[5:8] and index.passages.ids[-1] == f"p{COUNT - 1}"
    assert [index.passages.metadata_of(row) for row in (0, 1)] == [{}, {"page": 1}]
    np.testing.assert_array_equal(index.vectors[np.array([9, 2])], expected.vectors[[9, 2]])
    for one, other in zip(index.sentences.of([7, 3]), expected.sentences.of([7, 3]), strict=True):
        np.testing.assert_array_equal(one, other)
    (_, words), (_, known) = (word_search(each, mode="hybrid", stemmer="english") for each in (index, expected))
    for word in ("river", "it's", "zebra", "東京", "n7x"):
        assert words.rarity_of(word) == pytest.approx(known.rarity_of(word), abs=1e-6)


def test_few_passages_stay_in_memory(database, monkeypatch):
    monkeypatch.setattr("cozyrag.retrieval.lance_index.KEPT_ROWS", 5)
    index = opened(database)
    assert list(index.passages.texts[0:COUNT]) == local().passages.texts
    assert len(index._rows._kept) == 5


def test_many_vectors_are_searched_in_lists(own, monkeypatch):
    monkeypatch.setattr(lance_writing, "MANY", 50)
    one = writer(own)
    write(one, local(), [0])  # a change, without which nothing is made again
    lists = one.finish(COUNT, lambda count: None)["read_lists"]
    assert 1 <= lists <= 8
    found, expected = opened(own).search(unit(20, 4), 10)[1], local().search(unit(20, 4), 10)[1]
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(found.tolist(), expected.tolist(), strict=True)]) > 0.8
    assert opened(own).search(unit(2, 4), COUNT)[1].shape == (2, COUNT)  # more than the lists that are read hold


# ---- writing


@pytest.mark.parametrize("shares", [[(0, 40), (20,)], [(0, 20, 40), (0, 20, 40)]], ids=["other rows", "the same rows"])
def test_two_writers_at_once_lose_nothing_and_write_nothing_twice(tmp_path, shares):
    index, faults, both = local(), [], threading.Barrier(2, timeout=tiny.PATIENCE)
    writer(tmp_path / "db").create()

    def work(starts):
        try:
            one = writer(tmp_path / "db")
            both.wait()
            for start in starts:
                write(one, index, range(start, min(start + 20, COUNT)))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(starts,)) for starts in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    writer(tmp_path / "db").finish(COUNT, lambda count: None)
    assert opened(str(tmp_path / "db")).passages == index.passages


def test_what_is_not_finished_is_not_searched(tmp_path):
    one = writer(tmp_path / "db")
    one.create()
    write(one, local(), range(50))
    with pytest.raises(InputError, match="none that is finished"):
        opened(str(tmp_path / "db"))
    with pytest.raises(InputError, match="Expected 60 passages .* found 50"):
        one.finish(COUNT, lambda count: None)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"retriever_fingerprint": "other"}, "has retriever f, this command other"),
        ({"stemmer": "none"}, "has stemmer english, this command none"),
        ({"sentence_rules": None}, "has sentence vectors"),
    ],
)
def test_passages_encoded_in_another_way_are_not_replaced(database, how, words):
    with pytest.raises(InputError, match=words):
        writer(database, **how).check()


def test_an_index_that_is_being_changed_is_searched_as_it_was(own):
    before, index = searcher(opened(own), "hybrid").search(QUESTIONS, 10), local()
    early = searcher(opened(own), "hybrid")
    one = writer(own)
    write(one, index, range(20), np.arange(20, dtype=np.uint64))
    turned = np.arange(COUNT)[::-1]
    with one.database.asked():
        one._newest().delete("row < 30")
    for each in (early, searcher(opened(own), "hybrid")):
        np.testing.assert_array_equal(each.search(QUESTIONS, 10).rows, before.rows)
    write(one, index, turned)
    one.finish(COUNT, lambda count: None)
    np.testing.assert_array_equal(early.search(QUESTIONS, 10).rows, before.rows)


# ---- the command


def test_a_command_that_was_stopped_resumes_and_a_change_encodes_only_what_is_new(
    tmp_path, retriever_path, encoded, monkeypatch, capsys
):
    place, small = f"lancedb:{tmp_path / 'db'}", ("--shard_size", "8")
    passages, real, calls = tiny.write_jsonl(tmp_path / "p.jsonl", rows(30)), LanceWriter.write, []

    def stopping(self, *given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, *given)

    with monkeypatch.context() as patched, pytest.raises((KeyboardInterrupt, SystemExit)):
        patched.setattr(LanceWriter, "write", stopping)
        index_into(place, passages, retriever_path, *small)
    encoded.clear()
    index_into(place, passages, retriever_path, *small)
    assert len(encoded) == 30 - 16 and "30 passages, 14 to encode" in capsys.readouterr().out
    encoded.clear()
    changed = [*rows(1), {"id": "new", "title": "", "text": "Something new."}, *rows(29)[3:], *rows(1)]
    changed[-1]["id"] = "again"
    changed[2]["page"] = 77
    index_into(place, tiny.write_jsonl(tmp_path / "q.jsonl", changed), retriever_path, *small)
    assert len(encoded) == 1
    index_into(tmp_path / "files", tmp_path / "q.jsonl", retriever_path)
    mark = Retriever.load(str(retriever_path), max_tokens=160).fingerprint()
    made, expected = (open_index(each, fingerprint=mark) for each in (place, tmp_path / "files"))
    assert made.passages == expected.passages and made.passages.metadata_of(2) == {"page": 77}
    every = np.arange(len(expected))
    np.testing.assert_allclose(made.vectors[every], expected.vectors, atol=1e-5)
    encoded.clear()
    index_into(place, tmp_path / "q.jsonl", retriever_path, *small)
    assert not encoded


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("lancedb:", "expected a folder or an address"),
        ("lancedb:http://x.org/db", "expected a folder or an address"),
        ("lancedb:s3://me:secret@bucket/db", "without user name, password and options"),
        ("lancedb:s3://bucket/db?key=secret", "without user name, password and options"),
    ],
)
def test_addresses_that_cannot_be_used(place, words):
    with pytest.raises(InputError, match=words) as refused:
        database_of(place)
    assert "secret" not in str(refused.value)


def test_folders_and_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert database_of("lancedb:db") == str(tmp_path / "db") and database_of("db") is None
    assert database_of("lancedb:s3://bucket/db") == "s3://bucket/db"


def test_without_lancedb_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(lance_database.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "cozyrag\[lancedb\]"'):
        database_of("lancedb:db")


# ---- refused and lost


def test_an_index_of_another_retriever_stemmer_or_corpus_is_refused(database):
    with pytest.raises(InputError, match="made by retriever f, but the retriever in use is g"):
        LanceIndex.open(database, fingerprint="g")
    with pytest.raises(InputError, match="stemmed with --stemmer english, but this search has german"):
        word_search(opened(database), mode="dense", stemmer="german")
    with pytest.raises(InputError, match="to hold the 3 passages"):
        LanceIndex.open(database, fingerprint="f", expected=Passages(["a"] * 3, [""] * 3, ["b"] * 3))


def test_a_folder_that_is_gone_is_told_in_a_sentence(own):
    index, one = opened(own), writer(own)
    search = searcher(index, "hybrid")
    shutil.rmtree(own)
    with pytest.raises(InputError, match="cannot be read or written .*what was written is kept"):
        search.search(QUESTIONS[:1], 5)
    with pytest.raises(InputError, match="is gone|cannot be read"):
        write(one, local(), range(5))
    with pytest.raises(InputError, match="none that is finished"):
        opened(own)


def test_tables_of_other_programs_are_not_touched(tmp_path):
    connection = lance_database.load_lancedb().connect(str(tmp_path / "db"))
    connection.create_table("passages", data=[{"row": 1}])
    with pytest.raises(InputError, match="expected tables of `cozyrag index`"):
        writer(tmp_path / "db").check()


# ---- pairs and runs


@pytest.fixture
def pair(tmp_path, pair_folder, retriever_path, corpus_files):
    """A copy of the tiny pair whose index is in a database, in the folder db beside it."""
    folder = shutil.copytree(pair_folder, tmp_path / "my-rag")
    place = f"lancedb:{tmp_path / 'db'}"
    index_into(
        place, corpus_files["passages"], folder / "retriever", "--stemmer", "none", "--index_precision", "float32"
    )
    shutil.rmtree(folder / "index")
    mark = Retriever.load(str(folder / "retriever")).fingerprint()
    open_index(place, fingerprint=mark).save(folder / "index")
    return folder


def test_a_pair_answers_from_its_database(pair, pair_folder, tmp_path, monkeypatch):
    assert [path.name for path in (pair / "index").iterdir()] == ["index.json"]
    own, other = CozyRAG.from_pretrained(pair), CozyRAG.from_pretrained(pair_folder)
    asked = ["What colour is the fox 3?", "Where is the hen?"]
    assert [answer.text for answer in own.answers(asked)] == [answer.text for answer in other.answers(asked)]
    for one, two in zip(own.retrieve(asked), other.retrieve(asked), strict=True):
        assert [source.id for source in one] == [source.id for source in two]
    assert any("encoded again" in line for line in check_pair(pair))
    own.save_pretrained(tmp_path / "copy")
    assert CozyRAG.from_pretrained(tmp_path / "copy").answers(asked) == own.answers(asked)
    with LocalHub(tmp_path / "large", tokens={"hf_right": "me"}) as hub:
        point_client_at(hub, monkeypatch, cache=tmp_path / "cache")
        with pytest.raises(InputError, match="local folder .*/db, which nobody else can open"):
            push_pair(pair, "me/rag")
        assert not hub.repos
        monkeypatch.setattr("cozyrag.hub.push.is_local", lambda uri: False)  # an object store, which others reach
        lines = []
        push_pair(pair, "me/rag", info=lines.append)
        assert "the address of the database" in lines[0] and "full text" not in lines[0]
        assert CozyRAG.from_pretrained("me/rag").answers(asked) == own.answers(asked)
    shutil.rmtree(tmp_path / "db")
    with pytest.raises(InputError, match="cannot be read or written"):
        own.answer("What colour is the hill 1?")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"database": "s3://me:secret@bucket/db"}, "without user name"),
        ({"database": 3}, "expected database as a text"),
        ({"collection": "other"}, "expected collection as one of passages"),
        ({"collection": None}, "expected collection as one of"),
        ({"retriever_fingerprint": "0123"}, "was made by retriever 0123"),
    ],
)
def test_an_index_file_that_cannot_be_right_is_refused(pair, change, words):
    path = pair / "index" / "index.json"
    facts = json.loads(path.read_text()) | change
    path.write_text(json.dumps(facts))
    with pytest.raises(InputError, match="does not match its checksum|" + words):
        CozyRAG.from_pretrained(pair)
    path.write_text(json.dumps({name: value for name, value in facts.items() if name != "checksum"}))
    with pytest.raises(InputError, match=words):
        CozyRAG.from_pretrained(pair)


def test_a_run_that_would_push_a_local_database_is_refused_before_training(
    tmp_path, corpus_files, generator_path, retriever_path, encoded
):
    place = f"lancedb:{tmp_path / 'db'}"
    index_into(place, corpus_files["passages"], retriever_path)
    mark = Retriever.load(str(retriever_path)).fingerprint()
    open_index(place, fingerprint=mark).save(tmp_path / "naming-it")
    hub = ["--push_to_hub", "--hub_model_id=me/rag"]
    for index in (place, tmp_path / "naming-it"):
        run = settings(
            **corpus_files, generator=generator_path, retriever=retriever_path, index=index,
            output_dir=tmp_path / "out", freeze_document_encoder=True,
        )  # fmt: skip
        with pytest.raises(InputError, match="--push_to_hub: .*nobody else can open.*Nothing was trained"):
            train([*run, *hub])
        assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_run_searches_in_a_database_and_its_pair_names_it(
    tmp_path, corpus_files, generator_path, retriever_path, encoded, monkeypatch
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    place = f"lancedb:{tmp_path / 'db'}"
    index_into(place, corpus_files["passages"], retriever_path)
    encoded.clear()
    run = settings(
        **corpus_files, generator=generator_path, retriever=retriever_path, index=place, output_dir=tmp_path / "out",
        freeze_document_encoder=True, rounds=1, generator_steps=1, retriever_steps=1, threads=1, context_tokens=48,
        answer_tokens=4, generator_batch_size=4, retriever_batch_size=4,
    )  # fmt: skip
    train(run)
    assert not encoded and sorted(path.name for path in (tmp_path / "out" / "index").iterdir()) == [
        "README.md", "index.json",
    ]  # fmt: skip
    assert CozyRAG.from_pretrained(tmp_path / "out").answer("What colour is the fox 3?").passages
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(b"very-secret" in path.read_bytes() for path in files)
    card = (tmp_path / "out" / "index" / "README.md").read_text()
    assert "LanceDB" in card and "passages.parquet" not in card
    other = tiny.make_retriever(tmp_path / "other", seed=1)
    changed = settings(retriever=other, output_dir=tmp_path / "two")
    with pytest.raises(InputError, match="made by retriever"):
        train([*run, *changed])


def test_a_run_that_trains_the_encoder_of_passages_is_refused_before_it_begins(tmp_path):
    given = settings(questions="q.jsonl", passages="p.jsonl", index=f"lancedb:{tmp_path / 'db'}")
    with pytest.raises(InputError, match="--freeze_document_encoder True"):
        parse_settings(given)
    for allowed in ("--freeze_document_encoder=True", "--retriever_steps=0", "--rounds=0"):
        assert parse_settings([*given, allowed]).data.index
