"""Atomic writes: what an error in the middle leaves, and how a folder shows damage."""

import contextlib
import json
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from cozyrag.errors import InputError
from cozyrag.runtime import atomic_files
from cozyrag.runtime.atomic_files import (
    NEXT,
    check_room,
    damage,
    replacing,
    save_tensors,
    seal,
    switch,
    write_json,
    write_jsonl,
    writing,
)


@contextlib.contextmanager
def small_files():
    """Limit files to 20,000 bytes: real write errors, without filling a disk.

    Not a fixture: pytest reports before fixtures end, and its own output may be a larger file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def sealed(folder):
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "deep" / "b.bin").write_bytes(bytes(1000))
    seal(folder)
    return folder


def test_a_sealed_folder_is_intact(tmp_path):
    folder = sealed(tmp_path / "kept")
    assert damage(folder) is None
    assert json.loads((folder / "manifest.json").read_text())["deep/b.bin"]["bytes"] == 1000


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "a.txt").unlink(), "a.txt is missing"),
        (
            lambda folder: (folder / "deep" / "b.bin").write_bytes(bytes(999)),
            "deep/b.bin has 999 bytes instead of 1000",
        ),
        (
            lambda folder: (folder / "deep" / "b.bin").write_bytes(bytes(999) + b"x"),
            "deep/b.bin is not what was written",
        ),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
    ],
)
def test_damage_is_named(harm, message, tmp_path):
    folder = sealed(tmp_path / "kept")
    harm(folder)
    assert message in damage(folder)


def test_an_error_half_way_leaves_only_the_old_folder(tmp_path):
    folder = sealed(tmp_path / "kept")
    with pytest.raises(ZeroDivisionError), replacing(folder) as coming:
        (coming / "a.txt").write_text("two")
        raise ZeroDivisionError
    assert damage(folder) is None and (folder / "a.txt").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    with replacing(folder) as coming:
        (coming / "a.txt").write_text("two")
    assert damage(folder) is None and (folder / "a.txt").read_text() == "two" and not (folder / "deep").exists()


WRITERS = {
    "json": lambda path: write_json(path, {"long": "x" * 50_000}),
    "safetensors": lambda path: save_file({"a": np.zeros(20_000)}, path),
    "numpy": lambda path: np.save(path, np.zeros(20_000)),
    "torch": lambda path: torch.save({"a": torch.zeros(20_000)}, path),
    "faiss": lambda path: faiss.write_index(filled_index(), str(path)),
}


def filled_index():
    index = faiss.IndexFlatIP(100)
    index.add(np.zeros((1000, 100), dtype=np.float32))
    return index


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_has_the_same_message_in_every_library(name, tmp_path):
    with pytest.raises(InputError, match="disk is full.*needs about [12] MB.*resumes there"):
        with small_files(), replacing(tmp_path / "kept", needed=2_000_000) as coming:
            WRITERS[name](coming / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_earlier_file(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    with small_files(), pytest.raises(InputError, match="disk is full"):
        write_jsonl(tmp_path / "rows.jsonl", [{"a": "x" * 50_000}])
    assert (tmp_path / "rows.jsonl").read_text() == '{"a": 1}\n'


def test_other_errors_are_unchanged(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), writing(tmp_path / "file"):
        raise RuntimeError("something else")


def test_a_write_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_files.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    check_room(tmp_path / "new" / "folder", 10)
    with pytest.raises(InputError, match="disk is full"):
        check_room(tmp_path / "new" / "folder", 11)


def test_a_folder_without_write_permission_is_named():
    with pytest.raises(InputError, match="/sys/cozyrag.json, but that is not allowed"):
        write_json(Path("/sys/cozyrag.json"), {})


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=["022", "077", "002"])
def umask(request):
    """The umask of the process during a test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_a_new_folder_have_the_permissions_of_the_umask(name, tmp_path, umask):
    """Safetensors leaves its files to their owner alone, so that nobody else could load a pair."""
    with replacing(tmp_path / "kept") as coming:
        (coming / "deep").mkdir()
        WRITERS[name](coming / "deep" / "file")
    files = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert len(files) == 2 and {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    assert (tmp_path / "kept" / "deep").stat().st_mode & 0o777 == 0o777 & ~umask


def test_tensors_outside_such_a_folder_too_and_only_there_are_they_written(tmp_path, umask):
    for _ in range(2):  # a file that exists keeps its permissions
        save_tensors({"a": np.arange(3)}, tmp_path / "a.safetensors", {"made": "by hand"})
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2]
    sources = Path(atomic_files.__file__).parents[1].rglob("*.py")
    assert [path.name for path in sources if "safetensors.numpy import save" in path.read_text()] == ["atomic_files.py"]


NAMES = ("cozyrag.json", "generator", "index", "retriever")


def pair(folder, name):
    for part in ("generator", "index", "retriever"):
        (folder / part).mkdir(parents=True)
        (folder / part / "weights").write_text(name)
    (folder / "cozyrag.json").write_text(name)


def held(folder):
    return {(path / "weights" if path.is_dir() else path).read_text() for path in (folder / name for name in NAMES)}


@pytest.mark.parametrize("stopped_after", range(9))
def test_a_switch_that_is_stopped_anywhere_ends_with_the_new_pair(stopped_after, tmp_path, monkeypatch):
    pair(tmp_path, "old")
    with replacing(tmp_path / NEXT) as coming:
        pair(coming, "new")
    moves, rename = [], Path.rename

    def dying(path, target):
        if len(moves) == stopped_after:
            raise KeyboardInterrupt
        moves.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dying)
    try:
        switch(tmp_path)
        assert stopped_after == 8
    except KeyboardInterrupt:
        assert (tmp_path / NEXT).exists(), "a reader must see that the pair may be mixed"
    monkeypatch.setattr(Path, "rename", rename)
    switch(tmp_path)
    assert held(tmp_path) == {"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == list(NAMES)


def test_an_incomplete_pair_never_touches_the_old_one(tmp_path):
    pair(tmp_path, "old")
    with pytest.raises(InputError), replacing(tmp_path / NEXT) as coming:
        pair(coming, "new")
        raise OSError(28, "No space left on device")
    switch(tmp_path)
    assert held(tmp_path) == {"old"} and not (tmp_path / NEXT).exists()
