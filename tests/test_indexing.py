"""`cozyrag index`: one process and two give the same, nothing is encoded twice, and the folder can be read."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import tiny

from cozyrag import cli
from cozyrag.errors import InputError
from cozyrag.models.retriever import Retriever
from cozyrag.pipeline import CozyRAG
from cozyrag.retrieval import words_on_disk
from cozyrag.retrieval.faiss_index import open_vectors
from cozyrag.retrieval.index_file import made_by
from cozyrag.retrieval.passage_index import PassageIndex
from cozyrag.run import train

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]


def rows(count, start=0):
    names = [f"{tiny.THINGS[i % 12]} {i}" for i in range(start + count)]
    return [
        {"id": f"p{i}", "title": names[i], "text": f"The {names[i]} was made in {1500 + i} of stone."}
        for i in range(start, start + count)
    ]


def run(passages, folder, retriever, *more):
    cli.run("index", [str(passages), "--retriever", str(retriever), "--output", str(folder), "--threads", "1", *more])


def loaded(folder, retriever):
    fingerprint = Retriever.load(str(retriever), max_tokens=160).fingerprint()
    return PassageIndex.load(folder, fingerprint=fingerprint)


def test_the_folder_is_read_by_the_package(tmp_path, retriever_path, capsys):
    passages = tiny.write_jsonl(tmp_path / "p.jsonl", rows(50))
    run(passages, tmp_path / "index", retriever_path, "--shard_size", "8")
    made, model = loaded(tmp_path / "index", retriever_path), Retriever.load(str(retriever_path), max_tokens=160)
    assert made.passages.ids == [f"p{i}" for i in range(50)]
    expected = model.encode(made.passages.to_read(), kind="document", batch_size=64)
    np.testing.assert_allclose(made.vectors, expected, atol=1e-5)
    question = model.encode(["The fox 12 was made in 1512"], kind="query", batch_size=1)
    assert made.search(question, 3)[1].tolist() == np.argsort(-(question @ expected.T), kind="stable")[:, :3].tolist()
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        "index.faiss", "index.json", "passages.parquet", "vectors.safetensors",
    ]  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "index").iterdir()} == {passages.stat().st_mode & 0o777}
    assert "50 passages, index Flat" in capsys.readouterr().out


def test_other_columns_go_into_the_index(tmp_path, retriever_path, capsys):
    passages = [row | {"url": f"https://x.org/{row['id']}", "list": [1]} for row in rows(9)]
    passages[3] = {name: passages[3][name] for name in ("id", "title", "text")}
    run(tiny.write_jsonl(tmp_path / "p.jsonl", passages), tmp_path / "index", retriever_path)
    made = loaded(tmp_path / "index", retriever_path).passages
    assert [made.metadata_of(row).get("url") for row in range(9)] == [each.get("url") for each in passages]
    assert 'some values of "list"' in capsys.readouterr().out
    run(tiny.write_jsonl(tmp_path / "p.jsonl", rows(9)), tmp_path / "index", retriever_path)
    assert loaded(tmp_path / "index", retriever_path).passages.metadata is None
    assert "9 passages, 0 to encode" in capsys.readouterr().out


def same_sentences(one, other):
    """Both keep the same vectors of sentences."""
    assert one.sentences.ends.tolist() == other.sentences.ends.tolist()
    np.testing.assert_allclose(one.sentences.vectors.astype(float), other.sentences.vectors.astype(float), atol=2e-3)


def test_sentences_have_vectors_as_in_a_run(tmp_path, retriever_path, capsys):
    some = rows(30)
    some[3]["text"] = "It is red. It is old! Is it new?"
    some[7] = {
        "id": "untitled",
        "title": "",
        "text": f"{some[3]['title']}\n{some[3]['text']}",
    }  # reads the same, one more sentence
    run(tiny.write_jsonl(tmp_path / "p.jsonl", some), tmp_path / "index", retriever_path, "--shard_size", "7")
    made, model = loaded(tmp_path / "index", retriever_path), Retriever.load(str(retriever_path), max_tokens=160)
    columns = made.passages
    assert columns.to_read()[3] == columns.to_read()[7]
    _, expected = model.encode_passages(columns.to_read(), columns.spans(range(30)), batch_size=64)
    assert made.sentences.ends.tolist() == expected.ends.tolist()
    np.testing.assert_allclose(made.sentences.vectors.astype(float), expected.vectors.astype(float), atol=2e-3)
    assert [len(each) for each in made.sentences.of([3, 7])] == [
        len(split) for split in map(columns.sentences().__getitem__, (3, 7))
    ]
    assert "of sentence vectors)" in capsys.readouterr().out


def test_sentence_vectors_can_be_left_out_and_made_later(tmp_path, retriever_path, encoded):
    passages = tiny.write_jsonl(tmp_path / "p.jsonl", rows(20))
    run(passages, tmp_path / "index", retriever_path, "--no_sentence_vectors")
    assert not encoded and loaded(tmp_path / "index", retriever_path).sentences is None
    run(passages, tmp_path / "index", retriever_path)
    assert len(encoded) == 20
    made = loaded(tmp_path / "index", retriever_path)
    run(passages, tmp_path / "index", retriever_path, "--no_sentence_vectors")  # nothing to encode, but they go
    assert len(encoded) == 20 and loaded(tmp_path / "index", retriever_path).sentences is None
    assert len(made.sentences.ends) == 20


def test_only_new_and_changed_passages_are_encoded(tmp_path, retriever_path, encoded):
    passages = tiny.write_jsonl(tmp_path / "p.jsonl", rows(40))
    run(passages, tmp_path / "index", retriever_path)
    encoded.clear()
    later = rows(45)[3:]  # three gone, five new, one changed, two changed places
    later[10]["text"] = "Now it is of brick."
    later[0], later[1] = later[1], later[0]
    tiny.write_jsonl(passages, later)
    run(passages, tmp_path / "index", retriever_path)
    assert len(encoded) == 6
    recompute = tmp_path / "fresh"
    run(passages, recompute, retriever_path)
    updated, fresh = loaded(tmp_path / "index", retriever_path), loaded(recompute, retriever_path)
    assert updated.passages == fresh.passages
    np.testing.assert_allclose(updated.vectors, fresh.vectors, atol=1e-5)
    same_sentences(updated, fresh)


def test_another_retriever_reuses_nothing(tmp_path, retriever_path, encoded, capsys):
    passages = tiny.write_jsonl(tmp_path / "p.jsonl", rows(20))
    run(passages, tmp_path / "index", retriever_path)
    other = tiny.make_retriever(tmp_path / "other", seed=1)
    encoded.clear()
    run(passages, tmp_path / "index", other)
    assert len(encoded) == 20
    assert made_by(tmp_path / "index") == Retriever.load(str(other), max_tokens=160).fingerprint()
    assert "it replaces the index of another retriever" in capsys.readouterr().out


def test_equal_texts_are_encoded_once(tmp_path, retriever_path, encoded):
    same = [{"id": f"p{i}", "title": "", "text": "The same text for all of them."} for i in range(30)]
    run(tiny.write_jsonl(tmp_path / "p.jsonl", same), tmp_path / "index", retriever_path)
    assert len(encoded) == 1
    assert len(loaded(tmp_path / "index", retriever_path)) == 30


def test_resumes_after_a_shard_and_keeps_the_old_index_until_then(tmp_path, retriever_path, encoded, monkeypatch):
    passages = tiny.write_jsonl(tmp_path / "p.jsonl", rows(10))
    run(passages, tmp_path / "index", retriever_path)
    tiny.write_jsonl(passages, rows(60))
    counted, calls = Retriever.encode_passages, []

    def fails(self, texts, spans, **options):
        calls.append(len(texts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return counted(self, texts, spans, **options)

    monkeypatch.setattr(Retriever, "encode_passages", fails)
    with pytest.raises(KeyboardInterrupt):
        run(passages, tmp_path / "index", retriever_path, "--shard_size", "8")
    assert len(loaded(tmp_path / "index", retriever_path)) == 10
    monkeypatch.setattr(Retriever, "encode_passages", counted)
    encoded.clear()
    run(passages, tmp_path / "index", retriever_path, "--shard_size", "16")
    assert len(encoded) == 50 - 3 * 8
    recompute = tmp_path / "fresh"
    run(passages, recompute, retriever_path)
    resumed, fresh = (open_vectors(path / "vectors.safetensors") for path in (tmp_path / "index", recompute))
    np.testing.assert_allclose(resumed, fresh, atol=1e-5)


def test_a_memory_budget_chooses_a_quantised_index(tmp_path, retriever_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    passages = tiny.write_jsonl(tmp_path / "p.jsonl", rows(200))
    run(passages, tmp_path / "index", retriever_path, "--index_memory", "20KB")  # flat: 200 * 32 * 4 = 25,600 bytes
    assert json.loads((tmp_path / "index" / "index.json").read_text())["factory"] == "SQ8"
    assert "index SQ8" in (out := capsys.readouterr().out) and "of the 10 nearest" in out
    made = loaded(tmp_path / "index", retriever_path)
    assert isinstance(made.vectors, np.memmap)
    scores, found = made.search(np.array(made.vectors[[3, 77]]), 5)
    exact = made.vectors[[3, 77]] @ made.vectors.T
    np.testing.assert_allclose(scores, np.take_along_axis(exact, found, axis=1), atol=1e-6)
    assert found[:, 0].tolist() == [3, 77]
    with pytest.raises(InputError, match="--index_memory: 200 vectors of 32 dimensions need at least"):
        run(passages, tmp_path / "index", retriever_path, "--index_memory", "1KB")
    made.save(tmp_path / "index")  # onto the file that its vectors are read from
    assert loaded(tmp_path / "index", retriever_path).factory == "SQ8"


def test_the_words_of_an_index_that_saves_memory_are_made_with_it(
    tmp_path, retriever_path, generator_path, corpus_files, monkeypatch
):
    """So it opens in seconds, in a run, too."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run(corpus_files["passages"], tmp_path / "flat", retriever_path)
    assert not (tmp_path / "cache" / "cozyrag").exists()
    run(corpus_files["passages"], tmp_path / "index", retriever_path, "--index_memory", "2KB", "--stemmer", "german")
    assert made_by(tmp_path / "index") and list((tmp_path / "cache" / "cozyrag").glob("*-german-*.words"))
    monkeypatch.setattr(words_on_disk, "_make", lambda *_: pytest.fail("made again"))
    settings = {
        "generator": generator_path,
        "retriever": retriever_path,
        "index": tmp_path / "index",
        "output_dir": tmp_path / "out",
    }
    given = [f"--{name}={value}" for name, value in (corpus_files | settings).items() if name != "passages"]
    train([*given, *"--stemmer german --rounds 1 --generator_steps 1 --retriever_steps 0 --threads 1".split()])
    assert CozyRAG.from_pretrained(tmp_path / "out").answer("What colour is the fox 3?").passages


def test_a_run_reuses_the_vectors_of_the_same_retriever(
    tmp_path, retriever_path, generator_path, corpus_files, encoded
):
    run(corpus_files["passages"], tmp_path / "index", retriever_path)
    encoded.clear()
    words = {
        "generator": generator_path,
        "retriever": retriever_path,
        "index": tmp_path / "index",
        "output_dir": tmp_path / "out",
    }
    words |= {"questions": corpus_files["questions"], "passages": corpus_files["passages"], "rounds": 0}
    words["threads"] = 1
    train([word for name, value in words.items() for word in (f"--{name}", str(value))])
    assert not encoded  # neither passages nor, for the context filter, their sentences
    same_sentences(*(loaded(folder, retriever_path) for folder in (tmp_path / "index", tmp_path / "out" / "index")))
    words |= {
        "passages": tiny.write_jsonl(tmp_path / "other.jsonl", tiny.corpus(41)[0]),
        "output_dir": tmp_path / "other",
    }
    with pytest.raises(InputError, match="hold the 41 passages that are searched, found 40"):
        train([word for name, value in words.items() for word in (f"--{name}", str(value))])


# ---- errors


def test_bad_rows_are_named_and_skipped_on_request(tmp_path, retriever_path, capsys):
    bad = [*rows(3), {"id": "e", "text": " "}, rows(1)[0], *rows(2, start=5)]
    passages = tiny.write_jsonl(tmp_path / "p.jsonl", bad)
    with pytest.raises(InputError, match=r"2 rows cannot be used: .*line 4: empty text; .*line 5: repeats .*line 1"):
        run(passages, tmp_path / "index", retriever_path)
    run(passages, tmp_path / "index", retriever_path, "--skip_bad_rows")
    assert "2 rows skipped" in capsys.readouterr().out
    assert loaded(tmp_path / "index", retriever_path).passages.ids == ["p0", "p1", "p2", "p5", "p6"]


def test_two_texts_under_one_id(tmp_path, retriever_path):
    passages = tiny.write_jsonl(tmp_path / "p.jsonl", [*rows(3), {"id": "p1", "title": "", "text": "Something else."}])
    with pytest.raises(InputError, match='line 4: expected a new id, found "p1", which .*line 2'):
        run(passages, tmp_path / "index", retriever_path, "--skip_bad_rows")


def test_a_folder_with_other_files_is_refused(tmp_path, retriever_path):
    passages = tiny.write_jsonl(tmp_path / "p.jsonl", rows(3))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(InputError, match="found cat.jpg in it"):
        run(passages, tmp_path / "photos", retriever_path)


def test_the_index_of_a_run_is_updated_and_its_card_stays(tmp_path, retriever_path, pair_folder):
    """Every file that a run, git or a download of the Hub leaves in OUTPUT/index is no reason to refuse the folder."""
    shutil.copytree(pair_folder, tmp_path / "my-rag")
    folder = tmp_path / "my-rag" / "index"
    left = {"README.md": "# a card\n", ".gitattributes": "*.bin filter=lfs\n", ".DS_Store": ""}
    for name, text in left.items():
        (folder / name).write_text(text)
    run(tiny.write_jsonl(tmp_path / "p.jsonl", rows(5)), folder, tmp_path / "my-rag" / "retriever")
    assert len(loaded(folder, tmp_path / "my-rag" / "retriever")) == 5
    assert {name: (folder / name).read_text() for name in left} == left


@pytest.mark.parametrize(("name", "value"), [("--shard_size", "0"), ("--passage_tokens", "3")])
def test_numbers_too_small(tmp_path, name, value, capsys):
    with pytest.raises(SystemExit):
        cli.run("index", ["p.jsonl", "--output", "x", name, value])
    assert f"argument {name}: expected a whole number of at least" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "400 apples", "-3GB", "GB"])
def test_invalid_sizes(size, capsys):
    with pytest.raises(SystemExit):
        cli.run("index", ["p.jsonl", "--output", "x", f"--index_memory={size}"])
    assert "expected a size such as 400MB" in capsys.readouterr().err


# ---- the real launcher


def launch(passages, folder, retriever, *more):
    config = ROOT / "accelerate_configs" / "cpu_ddp.yaml"
    command = [*LAUNCH, "--config_file", str(config), "-m", "cozyrag.cli", "index", str(passages)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--retriever", str(retriever), "--output", str(folder), "--threads", "1", *more],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_give_the_same_as_one_and_resume_after_a_kill(tmp_path, retriever_path):
    passages = tiny.write_jsonl(tmp_path / "p.jsonl", rows(3000))
    run(passages, tmp_path / "one", retriever_path)
    two = tmp_path / "two"
    first = launch(passages, two, retriever_path, "--shard_size", "16")
    deadline = time.monotonic() + 300
    while len(list(two.glob("work/shards/*.safetensors"))) < 8 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.01)
    assert first.poll() is None, first.stdout.read()
    for process in [*psutil.Process(first.pid).children(recursive=True), first]:
        process.send_signal(signal.SIGKILL)
    first.communicate()
    kept = len(list(two.glob("work/shards/*.safetensors")))
    assert 8 <= kept < 3000 // 16 and made_by(two) is None
    second = launch(passages, two, retriever_path, "--shard_size", "16")
    out = second.communicate(timeout=300)[0]
    assert second.returncode == 0, out
    assert f"3,000 passages, {3000 - kept * 16:,} to encode." in out
    a, b = (loaded(folder, retriever_path) for folder in (tmp_path / "one", two))
    np.testing.assert_allclose(a.vectors, b.vectors, atol=1e-5)
    same_sentences(a, b)
    questions = Retriever.load(str(retriever_path)).encode(a.passages.texts[::97], kind="query", batch_size=64)
    (scores, found), (others, also) = (each.search(questions, 10) for each in (a, b))
    np.testing.assert_allclose(scores, others, atol=1e-5)
    assert (found == also).mean() > 0.999  # scores within 1e-5 of each other may change places
