"""What the machine refuses is told as that, never as damage, and a pair's folder may have any name.

Permission is taken away for real: files without rights, read as a user who does not own them.
"""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
from datasets import Dataset

from cozyrag import CozyRAG, cli
from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.pair_file import read_pair
from cozyrag.retrieval import passage_index
from cozyrag.retrieval.passage_index import PassageIndex
from cozyrag.runtime.atomic_files import damage, seal
from cozyrag.runtime.machine_faults import fault_sentence, is_environment
from cozyrag.training.checkpointing import Checkpoints

NOBODY = 65534


@pytest.fixture
def powerless():
    """Run as a user who owns nothing, if the tests run as root, whom no permission stops."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    yield
    if root:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that every user may enter; pytest's own are for their owner alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def make_index(folder, factory="Flat"):
    table = Dataset.from_list(tiny.corpus(12)[0])
    vectors = np.eye(12, 16, dtype=np.float32)
    PassageIndex(table, vectors, fingerprint="0", factory=factory).save(folder)
    return folder


def shared_index(folder, factory="Flat"):
    """One that others may read; safetensors writes files for their owner alone."""
    for path in make_index(folder, factory).iterdir():
        path.chmod(0o644)
    return folder


# ---- the sentence


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "", "/a/b"), ["/a/b", "Permission denied", "permissions"]),
        (OSError(errno.EROFS, "", "/a/b"), ["/a/b", "Read-only file system", "another place"]),
        (OSError(errno.ENOSPC, ""), ["No space left", "Free some space"]),
        (OSError(errno.EDQUOT, "", "/a"), ["quota", "Free some space"]),
        (OSError(errno.EIO, "", "/a"), ["Input/output error", "drive"]),
        (OSError(errno.EMFILE, "", "/a"), ["Too many open files", "ulimit"]),
        (OSError(errno.ENAMETOOLONG, "", "/a"), ["shorter path"]),
        (FileNotFoundError(errno.ENOENT, "", "/a"), ["No such file", "Check the path"]),
        (NotADirectoryError(errno.ENOTDIR, "", "/a"), ["a file stands where"]),
        (IsADirectoryError(errno.EISDIR, "", "/a"), ["a folder stands where"]),
        (OSError("Failed to open '/x'. Detail: [errno 13] Permission denied"), ["Permission denied"]),
        (OSError("I/O error (os error 28)"), ["No space left"]),
        (MemoryError(), ["not enough memory"]),
    ],
)
def test_the_command_line_ends_with_one_sentence(error, words, capsys):
    def command():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.entry_point(command)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and told.startswith("error: ")
    assert [word for word in words if word not in told] == []


@pytest.mark.parametrize(
    "error",
    [
        OSError("no number and no path"),
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        FileNotFoundError(errno.ENOENT, "a bug without a path"),
        BrokenPipeError(errno.EPIPE, "pipe"),
        KeyError("x"),
        RuntimeError("x"),
    ],
)
def test_other_errors_keep_their_traceback(error):
    def command():
        raise error

    assert fault_sentence(error) is None and not is_environment(error)
    with pytest.raises(type(error)):
        cli.entry_point(command)


@pytest.mark.parametrize("command", ["index", "passages"])
def test_a_command_that_cannot_write_says_so(command, tmp_path, retriever_path, corpus_files, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("The fox is red.")
    place = str(tmp_path / "file" / "out.jsonl")
    arguments = {
        "index": [str(corpus_files["passages"]), "--retriever", str(retriever_path), "--output", place],
        "passages": [str(tmp_path / "notes"), "--output", place, "--workers", "1"],
    }
    with pytest.raises(SystemExit) as ended:
        cli.entry_point(lambda: cli.run(command, arguments[command]))
    assert ended.value.code == 2 and str(tmp_path / "file") in capsys.readouterr().err


# ---- files that may not be read


def as_owner(make):
    """Make something as the user whom the tests began as."""
    now = os.geteuid()
    os.seteuid(os.getuid())
    try:
        return make()
    finally:
        os.seteuid(now)


@pytest.mark.parametrize("name", ["passages.parquet", "vectors.safetensors", "index.json"])
def test_a_file_of_an_index_without_permission_is_not_damage(open_folder, name, powerless):
    as_owner(lambda: (shared_index(open_folder / "index") / name).chmod(0))
    with pytest.raises(InputError, match=rf"{name}: .*Permission denied.*permissions") as error:
        PassageIndex.load(open_folder / "index", fingerprint="0")
    assert "damaged" not in str(error.value) and "train" not in str(error.value)


@pytest.mark.parametrize("factory", ["Flat", "Mapped"])
def test_a_read_only_index_is_read(open_folder, factory, powerless, monkeypatch):
    """Also without a cache that can be written."""
    as_owner(lambda: shared_index(open_folder / "index", factory))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(open_folder / "cache"))
    index = PassageIndex.load(open_folder / "index", fingerprint="0")
    assert index.search(np.eye(12, 16, dtype=np.float32), 1)[1][:, 0].tolist() == list(range(12))
    assert list(index.passages.texts) == [each["text"] for each in tiny.corpus(12)[0]]
    assert sorted(path.name for path in open_folder.iterdir()) == ["index"]


@pytest.mark.parametrize("role", ["generator", "retriever"])
def test_a_model_without_permission_is_not_misspelt(tmp_path, role, monkeypatch):
    """Loaders call its weights missing, so the file itself is opened."""
    folder = (tiny.make_generator if role == "generator" else tiny.make_retriever)(tmp_path / role)
    (folder / "model.safetensors").write_bytes(b"")
    real = Path.open

    def refuse(path, *arguments, **options):
        if path.name == "model.safetensors":
            raise PermissionError(errno.EACCES, "", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="model.safetensors: .*Permission denied") as error:
        (Generator if role == "generator" else Retriever).load(str(folder))
    assert "spelling" not in str(error.value)


def test_the_file_of_a_pair_without_permission(open_folder, powerless):
    as_owner(lambda: (open_folder / "cozyrag.json").write_text("{}"))
    as_owner(lambda: (open_folder / "cozyrag.json").chmod(0))
    with pytest.raises(InputError, match=r"cozyrag.json: .*Permission denied"):
        read_pair(open_folder)


def test_a_checkpoint_without_permission_is_not_put_aside_as_damaged(open_folder, powerless):
    checkpoint = open_folder / "checkpoints" / "round-001-0-generator-000000"

    def make():
        checkpoint.mkdir(parents=True)
        (checkpoint / "a").write_text("one")
        seal(checkpoint)
        assert damage(checkpoint) is None
        (checkpoint / "a").chmod(0)

    as_owner(make)
    with pytest.raises(InputError, match="Permission denied"):
        damage(checkpoint)
    fake = type("Fake", (), {"folder": open_folder})
    with pytest.raises(InputError, match="Permission denied"):
        Checkpoints._newest(fake)
    assert checkpoint.exists()


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left"),
        (OSError(errno.EIO, "x"), "Input/output error"),
        (OSError(errno.EROFS, "x", "/home/cache"), "/home/cache"),
        (OSError(errno.EMFILE, "x"), "ulimit"),
        (MemoryError(), "not enough memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("step", ["_in_memory", "_tensors"])
def test_a_fault_while_an_index_is_read_is_not_damage(tmp_path, monkeypatch, error, word, step):
    make_index(tmp_path)

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(passage_index, step, refuse)
    with pytest.raises(InputError, match=word) as told:
        PassageIndex.load(tmp_path, fingerprint="0")
    assert "damaged" not in str(told.value) and "train" not in str(told.value)


@pytest.mark.parametrize("factory", ["Flat", "Mapped"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all", bytes(2000)])
def test_damage_is_still_damage(tmp_path, factory, content):
    make_index(tmp_path, factory)
    (tmp_path / "passages.parquet").write_bytes(content)
    facts = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({"retriever_fingerprint": "0", "factory": facts["factory"]}))
    with pytest.raises(InputError, match=r"is damaged.*Copy the whole folder again"):
        PassageIndex.load(tmp_path, fingerprint="0")


# ---- folders of any name


NAMES = ["my[1]*", "a?b", "{x,y}", "**", "[!a]", "50% #1", "a::b", "ümlaut 通", "-x", "'q' \"r\""]


@pytest.mark.parametrize("factory", ["Flat", "Mapped", "SQ8"])
@pytest.mark.parametrize("name", NAMES)
def test_an_index_is_read_from_a_folder_of_any_name(tmp_path, monkeypatch, name, factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / name / "cache"))
    for _ in range(2):  # the second time from the cache
        index = PassageIndex.load(make_index(tmp_path / name / "index", factory), fingerprint="0")
        assert list(index.passages.ids) == [f"p{i}" for i in range(12)]


def test_a_mapped_index_follows_its_passages(tmp_path, monkeypatch):
    """The Arrow file in the cache is of the passages as they are, not as they were."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for colour in ("red", "blue"):
        table = Dataset.from_list([{"id": "0", "title": "", "text": f"The fox is {colour}."}])
        PassageIndex(table, np.ones((1, 4), "float32"), fingerprint="0", factory="Mapped").save(tmp_path / "index")
        index = PassageIndex.load(tmp_path / "index", fingerprint="0")
        assert list(index.passages.texts) == [f"The fox is {colour}."]


@pytest.mark.parametrize("name", ["my[1]*", "a?b", "[!a]"])
def test_a_pair_answers_from_a_folder_of_any_name_without_a_cache(pair_folder, tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    shutil.copytree(pair_folder, tmp_path / name)
    pair = CozyRAG.from_pretrained(tmp_path / name)
    assert pair.answer("What colour is the fox 0?") == CozyRAG.from_pretrained(pair_folder).answer(
        "What colour is the fox 0?"
    )
