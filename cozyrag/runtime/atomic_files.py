"""Atomic writes that survive a power cut, and folders with a manifest that shows damage.

Content is written beside its final name, flushed to disk, and renamed: a name stands for a complete file or folder, or
does not exist. Left out: what the files are, since nothing here knows a model or a run; one writer at a time
(folder_lock.py).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from cozyrag.errors import InputError
from cozyrag.runtime.json_lines import json_line
from cozyrag.runtime.machine_faults import FORBIDDEN, NO_SPACE, code_of, is_environment, machine_faults_told

PARTIAL = ".partial"
MANIFEST = "manifest.json"
NEXT = "pair.next"  # a complete new pair that is being moved to its place
OLD = "pair.old"  # files of the pair before it, to be deleted
# How safetensors, torch, FAISS and NumPy report a full disk; torch and NumPy name no cause, only what is missing.
FULL = (
    "No space left", "os error 27", "os error 28", "os error 122", "inline_container.cc", "write error in",
    " requested and ",
)  # fmt: skip
SPARE = 1 << 20  # bytes reserved for the small files beside the big ones


def write_json(path: Path, content: object) -> None:
    """Write one JSON object atomically. Raises InputError if the disk is full or writing is not allowed."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict], *, flushed: bool = True) -> None:
    """Write all rows atomically, one JSON object per line. `flushed`, and what it raises: as `replacing_file`."""
    write_text(path, "".join(map(json_line, rows)), flushed=flushed)


def write_text(path: Path, text: str, *, flushed: bool = True) -> None:
    """Write a text atomically. `flushed`, and what it raises: as `replacing_file`."""
    with replacing_file(path, needed=len(text.encode()), flushed=flushed) as beside:
        beside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing_file(path: Path, *, needed: int = 0, flushed: bool = True) -> Iterator[Path]:
    """A place to write a file to, which gets the name `path` when it is complete; on an error it is removed.

    Args:
        needed: bytes, as far as they are known. flushed: whether a power cut must not harm it either; of a file that is
            checked when it is read and made again, and of one in a folder that is flushed as a whole, it may.

    Raises:
        InputError: as `writing`, or `path` is a folder, a pipe or a device.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")  # two processes may write the same file
    if path.exists() and not path.is_file():
        raise InputError(f"Expected to write a file, but {path.absolute()} is something else. Give another name.")
    flushed = flushed and not any(part.endswith(PARTIAL) for part in path.parent.parts)
    with writing(path, needed=needed):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            if flushed:
                flush(beside)
            beside.replace(path)
            if flushed:
                flush(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def is_partial_of(name: str, names: Iterable[str]) -> bool:
    """Whether this is the name of an unfinished file or folder of one of these."""
    whole, partial, _ = name.rpartition(PARTIAL)
    return bool(partial) and (whole in names or re.sub(r"\.\d+$", "", whole) in names)


def reserve(file: BinaryIO, size: int) -> None:
    """Give a new file its size, and the disk space for it: writing to a mapped file without would kill the process.

    Raises InputError as `check_room`, OSError.
    """
    check_room(Path(file.name), size)
    if sys.platform == "linux" and size:
        os.posix_fallocate(file.fileno(), 0, size)
    file.truncate(size)


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that may be read by whom the umask allows; the library leaves it to its owner alone."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)


@contextlib.contextmanager
def writing(path: Path, *, needed: int = 0) -> Iterator[None]:
    """Turn what writing libraries raise for a full disk or missing permission into an InputError.

    Safetensors, torch and FAISS each have their own error for a full disk, so it is also checked whether the `needed`
    bytes are free.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        code = code_of(error)
        if code in FORBIDDEN:
            raise InputError(
                f"Expected to write {path.absolute()}, but that is not allowed ({os.strerror(code)}). What was saved "
                "before stays; make the folder writable, or give another place."
            ) from error
        if code in NO_SPACE or any(sign in str(error) for sign in FULL) or _free(path) < needed:
            raise InputError(_no_room(path, needed)) from error
        raise


def check_room(path: Path, needed: int) -> None:
    """Raise InputError with the bytes needed and free if `needed` bytes do not fit on the disk of `path`."""
    if _free(path) < needed:
        raise InputError(_no_room(path, needed))


def _free(path: Path) -> int:
    return shutil.disk_usage(next(each for each in (path, *path.absolute().parents) if each.exists())).free


def _no_room(path: Path, needed: int) -> str:
    return (
        f"The disk is full: {path.absolute()} needs about {max(1, round(needed / 1e6))} MB, {_free(path) / 1e6:.0f} MB "
        "are free. What was saved before stays; free some space, then run the same command again: it resumes there."
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def replacing(folder: Path, *, needed: int = 0, kept: bool = True) -> Iterator[Path]:
    """A folder to fill, which gets the name `folder` when it is complete and on disk; on an error it is removed.

    Args:
        needed: bytes. kept: whether to `seal` and flush it, which what can be made again does without.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    with writing(folder, needed=needed):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if kept:
                seal(partial)
            settle(partial, folder, flushed=kept)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # what does not fit must not fill the disk


def settle(partial: Path, folder: Path, *, flushed: bool = True) -> None:
    """Flush a folder to disk, if it is to be `flushed`, then give it its final name.

    Its files get the permissions that the umask gave to it: safetensors would leave weights to their owner alone.
    """
    mode = partial.stat().st_mode & 0o666
    for path in partial.rglob("*"):
        if path.is_file():
            path.chmod(mode)
        if flushed:
            flush(path)
    if flushed:
        flush(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(folder: Path) -> None:
    """Write a manifest: size and SHA-256 of every file below the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    facts = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    write_text(folder / MANIFEST, json.dumps(facts, indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """The first file of a sealed folder that is missing or changed, in words; None if the folder is intact.

    Raises InputError if the machine does not let it read, which says nothing about the content.
    """
    with machine_faults_told(folder):
        return _damage(folder)


def _damage(folder: Path) -> str | None:
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, fact in facts.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != fact["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {fact['bytes']}"
            if _sha256(path) != fact["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if is_environment(error):
            raise
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def switch(folder: Path) -> None:
    """Move the content of OUTPUT/pair.next to its place, or finish the move of a run that was killed.

    `pair.next` is complete from the moment it has that name. While it exists, the pair in the folder may be mixed, and
    readers refuse it; a repeated call at any point ends with the new pair.
    """
    coming, leaving = folder / NEXT, folder / OLD
    shutil.rmtree(leaving, ignore_errors=True)
    if not coming.exists():
        return
    leaving.mkdir()
    for new in sorted(coming.iterdir()):
        if new.name == MANIFEST:
            continue
        place = folder / new.name
        if place.exists():
            place.rename(leaving / new.name)
        new.rename(place)
    flush(folder)
    shutil.rmtree(coming)
    shutil.rmtree(leaving)
