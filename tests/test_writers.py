"""Every command that writes: what a full disk, a power cut, a second writer or a wrong place leaves."""

import ast
import hashlib
import os
import shutil
from pathlib import Path

import evaluated
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from filelock import FileLock
from test_cut_files import CUTS, cut
from test_files import small_files

from cozyrag import cli
from cozyrag.commands import evaluate
from cozyrag.data import ingest, ingest_worker
from cozyrag.errors import InputError
from cozyrag.models.retriever import Retriever
from cozyrag.pair_evaluation import Evaluation
from cozyrag.pipeline import CozyRAG
from cozyrag.retrieval import passage_index
from cozyrag.runtime import atomic_files
from cozyrag.runtime.atomic_files import replacing_file, reserve
from cozyrag.runtime.folder_lock import new_folder
from cozyrag.training.output_dir import check_output, clear_output

PACKAGE = Path(atomic_files.__file__).parents[1]
ENDS = {"settings.json.123.partial", "pair.next.partial", "report.html.7.partial", "audit.json.lock"}


def texts(count):
    words = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(count)]
    return [{"id": f"p{i}", "title": f"T{i}", "text": f"The tower {i} is {' '.join(words[i])}."} for i in range(count)]


def asked(count):
    return [{"id": f"q{i}", "question": f"Who {'long ' * 20} {i}?", "answers": ["me"]} for i in range(count)]


# ---- the commands: each takes a folder and a number of rows, and returns what writes into it


def passages(place, rows, retriever, name="out.jsonl", more=()):
    source = tiny.write_jsonl(place.parent / "p.jsonl", texts(rows))
    return lambda: cli.run("passages", [str(source), "--output", str(place / name), "--workers", "1", *more])


def near(place, rows, retriever):
    return passages(place, rows, retriever, "out.parquet", ["--near_duplicates", "1"])


def questions(place, rows, retriever):
    source = tiny.write_jsonl(place.parent / "q.jsonl", asked(rows))
    return lambda: cli.run("questions", [str(source), "--output", str(place / "out.jsonl")])


def index(place, rows, retriever):
    source = tiny.write_jsonl(place.parent / "p.jsonl", texts(rows))
    command = [str(source), "--retriever", str(retriever), "--output", str(place / "index"), "--threads", "1"]
    return lambda: cli.run("index", command)


def compare(place, rows, retriever):
    for odd, name in enumerate(("a", "b")):
        shutil.rmtree(place.parent / name, ignore_errors=True)
        row = [evaluated.row(number, em=(number + odd) % 2) for number in range(rows)]
        evaluated.write_run(place.parent / name, [row, row])
    command = [str(place.parent / "a"), str(place.parent / "b"), "--html", str(place / "page.html")]
    return lambda: cli.run("compare", command)


def scores(place, rows, retriever):
    held = [evaluated.row(number, em=1) | {"certainty": 0.5} for number in range(rows)]
    return lambda: evaluate.write(place / "scores.json", Evaluation(rows, 1, {}, {}, {}, {}, held))


WRITERS = {each.__name__: each for each in (passages, near, questions, index, compare, scores)}


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not {"work", "out.jsonl.parts", "out.parquet.parts"} & set(path.relative_to(folder).parts)
    }


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(name, tmp_path, retriever_path):
    (place := tmp_path / "place").mkdir()
    WRITERS[name](place, 4, retriever_path)()
    before = content(place)
    assert before
    write = WRITERS[name](place, 600, retriever_path)
    with small_files(), pytest.raises(InputError, match="disk is full.*needs about") as error:
        write()
    assert "\n" not in str(error.value)
    left = content(place)
    assert left.keys() == before.keys()
    assert {path for path in left if left[path] != before[path]} <= {Path("scores.json")}  # the first of two files
    write()
    assert content(place).keys() == before.keys() and not list(place.rglob("*.partial"))


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_is_flushed_before_it_gets_its_name(name, tmp_path, retriever_path, monkeypatch):
    (place := tmp_path / "place").mkdir()
    flushed, renamed = set(), {}
    real = os.fsync

    def fsync(handle):
        flushed.add(os.fstat(handle).st_ino)
        real(handle)

    def moving(move):
        def moved(source, target):
            renamed[Path(target)] = os.stat(source).st_ino in flushed
            return move(source, target)

        return moved

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", moving(Path.replace))
    monkeypatch.setattr(os, "replace", moving(os.replace))
    WRITERS[name](place, 4, retriever_path)()
    assert all(renamed[place / path] for path in content(place)), renamed
    assert {each.stat().st_ino for each in (place, place / "index") if each.exists()} & flushed


@pytest.mark.parametrize("place", ["folder", "pipe"])
def test_a_name_that_is_no_file_is_refused(place, tmp_path):
    path = tmp_path / place
    path.mkdir() if place == "folder" else os.mkfifo(path)
    with pytest.raises(InputError, match="something else"), replacing_file(path) as beside:
        beside.write_text("x")
    assert path.is_dir() or path.is_fifo()


def test_two_processes_that_write_one_file_do_not_share_the_unfinished_one(tmp_path, monkeypatch):
    with replacing_file(tmp_path / "a") as one:
        one.write_text("one")
        monkeypatch.setattr(os, "getpid", lambda: 7)
        with replacing_file(tmp_path / "a") as two:
            two.write_text("two")
        assert (tmp_path / "a").read_text() == "two"
    assert (tmp_path / "a").read_text() == "one" and [path.name for path in tmp_path.iterdir()] == ["a"]


# ---- new folders


def test_a_new_folder_has_one_writer_and_is_there_as_a_whole(tmp_path):
    folder = tmp_path / "new"
    with new_folder(folder, "the pair") as coming:
        (coming / "a").write_text("a")
        with pytest.raises(InputError, match="Another process is writing"), new_folder(folder, "the pair"):
            pass
        assert not folder.exists()
    assert sorted(path.name for path in folder.iterdir()) == ["a", "manifest.json"]
    with pytest.raises(InputError, match="new or empty folder for the Space"), new_folder(folder, "the Space"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_copy_of_a_pair_that_does_not_fit_leaves_nothing(tmp_path, pair_folder):
    pair = CozyRAG.from_pretrained(pair_folder)
    with small_files(), pytest.raises(InputError, match="disk is full"):
        pair.save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    with FileLock(tmp_path / "new.lock"), pytest.raises(InputError, match="Another process"):
        pair.save_pretrained(tmp_path / "new")


def test_unfinished_files_and_locks_of_a_killed_command_are_no_foreign_files(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    for name in ENDS:
        (tmp_path / name).write_text("")
    assert check_output(tmp_path, {"overwrite_output_dir": True}) is False
    clear_output(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.123.partial").write_text("")
    with pytest.raises(InputError, match="no run wrote"):
        check_output(tmp_path, {"overwrite_output_dir": True})


# ---- power cuts


@pytest.mark.parametrize("how", CUTS)
def test_parts_that_were_cut_are_made_again(how, tmp_path, monkeypatch):
    sources = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for source in sources:
        tiny.write_jsonl(source, texts(30))
    command = ["passages", [*map(str, sources), "--output", str(tmp_path / "out.jsonl"), "--workers", "1"]]
    cli.run(*command)
    expected = (tmp_path / "out.jsonl").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("cozyrag.commands.passages.assemble", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.run(*command)
    one, other, _ = (tmp_path / "out.jsonl.parts").iterdir()
    cut(one, how)
    made = []
    monkeypatch.setattr(ingest, "make_part", lambda batch: made.append(batch.path) or ingest_worker.make_part(batch))
    cli.run(*command)
    assert made == [str(one)] and (tmp_path / "out.jsonl").read_bytes() == expected


def test_a_part_with_other_bytes_is_not_intact(tmp_path):
    source = tiny.write_jsonl(tmp_path / "a.jsonl", texts(30))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cozyrag.commands.passages.assemble", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.run("passages", [str(source), "--output", str(tmp_path / "out.jsonl"), "--workers", "1"])
    (part,) = (tmp_path / "out.jsonl.parts").iterdir()
    assert ingest_worker.is_intact(part)
    group, whole = pq.read_metadata(part).row_group(0), bytearray(part.read_bytes())
    columns = [group.column(at) for at in range(group.num_columns)]
    column = next(each for each in columns if each.path_in_schema == "hash")  # its bytes are random
    start = column.dictionary_page_offset or column.data_page_offset
    whole[start + column.total_compressed_size - 20] ^= 1
    part.write_bytes(whole)
    assert not ingest_worker.is_intact(part)


@pytest.mark.parametrize("how", CUTS)
def test_unfinished_files_of_an_index_that_were_cut_change_nothing(how, tmp_path, retriever_path, monkeypatch):
    source = tiny.write_jsonl(tmp_path / "p.jsonl", texts(40))
    command = [str(source), "--retriever", str(retriever_path), "--threads", "1", "--shard_size", "8", "--output"]
    cli.run("index", [*command, str(tmp_path / "whole")])
    expected = content(tmp_path / "whole")
    real, calls = Retriever.encode_passages, []

    def fails(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Retriever, "encode_passages", fails)
        with pytest.raises(KeyboardInterrupt):
            cli.run("index", [*command, str(tmp_path / "index")])
    shards = sorted((tmp_path / "index" / "work" / "shards").glob("*.safetensors"))
    assert len(shards) == 3
    for path in (*(tmp_path / "index" / "work").glob("*.*"), *shards[:2]):
        cut(path, how)
    cli.run("index", [*command, str(tmp_path / "index")])
    assert content(tmp_path / "index") == expected


@pytest.mark.parametrize("how", CUTS)
def test_an_index_that_was_cut_is_made_again_or_the_folder_to_delete_is_named(how, tmp_path, retriever_path):
    index(tmp_path, 10, retriever_path)()
    expected = content(tmp_path / "index")
    for name in expected:
        shutil.copytree(tmp_path / "index", tmp_path / "copy" / "index")
        cut(tmp_path / "copy" / "index" / name, how)
        try:
            index(tmp_path / "copy", 10, retriever_path)()
        except InputError as error:
            assert str(error).endswith("Delete that folder to make the index from the beginning.")  # noqa: PT017
        else:
            assert content(tmp_path / "copy" / "index") == expected
        shutil.rmtree(tmp_path / "copy")


def test_a_damaged_file_in_the_cache_is_made_again(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = datasets.Dataset.from_list([{"id": "0", "title": "", "text": "The fox is red."}])
    vectors = np.eye(1, 4, dtype="float32")
    passage_index.PassageIndex(table, vectors, fingerprint="0", factory="Mapped").save(tmp_path / "index")
    for how in (None, *CUTS):
        for path in (tmp_path / "cache" / "cozyrag").glob("*.arrow") if how else ():
            cut(path, how)
        index = passage_index.PassageIndex.load(tmp_path / "index", fingerprint="0")
        assert list(index.passages.texts) == ["The fox is red."]


def test_a_mapped_file_gets_its_space_before_it_is_written(tmp_path, monkeypatch):
    with (tmp_path / "a").open("wb") as file:
        reserve(file, 100_000)
    assert (tmp_path / "a").stat().st_size == 100_000 and (tmp_path / "a").stat().st_blocks * 512 >= 100_000
    monkeypatch.setattr(atomic_files, "_free", lambda path: 10)
    with (tmp_path / "b").open("wb") as file, pytest.raises(InputError, match="disk is full"):
        reserve(file, 100_000)


# ---- one place


def test_files_that_stay_are_written_in_one_place():
    """Others write into a folder or to a name that `atomic_files` gave them, or into a temporary folder."""
    names = {"write_text", "write_bytes", "replace", "rename", "copyfile", "copy2"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
                owner = ast.unparse(node.func.value)
                if node.func.attr not in ("replace", "rename") or owner in ("os", "beside", "partial", "checkpoint"):
                    found.add((path.stem, node.func.attr))
    assert found == {
        ("atomic_files", "replace"),
        ("atomic_files", "rename"),
        ("atomic_files", "write_text"),
        ("background_push", "copy2"),  # into a folder that `settle` renames
        ("checkpointing", "rename"),  # of a damaged one, aside
        ("hf_space", "copyfile"),  # into a `new_folder`
        ("hf_space", "write_text"),
        ("merge", "write_text"),
        ("pair_evaluation", "write_text"),  # temporary
        ("passage_encoding", "replace"),  # of what was flushed
        ("passage_index", "copyfile"),  # beside, then renamed
        ("passage_index", "replace"),
        ("probe", "write_text"),  # in /proc
        ("words_on_disk", "copyfile"),  # into a folder that `replacing` renames
    }
