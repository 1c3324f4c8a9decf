"""Writes that survive a power cut, and folders that can tell whether they are still what was written.

Whatever is written goes beside its final name first, is brought to the disk, and is renamed: a name stands for a whole
thing or for none. Left out: what the files are; nothing here knows a model or a run.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from cozyrag.errors import InputError

PARTIAL = ".partial"
MANIFEST = "manifest.json"
NEXT = "pair.next"  # a whole new pair that is being moved to its place
OLD = "pair.old"  # a piece of the one before it, on its way out
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_LEAVE = {errno.EACCES, errno.EPERM, errno.EROFS}
# What safetensors, torch and FAISS say of a disk that is full; torch names no cause, only a position that it did not reach.
FULL = ("No space left", "os error 27", "os error 28", "os error 122", "inline_container.cc", "write error in")
SPARE = 1 << 20  # bytes that the small files beside the big ones may take


def write_json(path: Path, content: dict) -> None:
    """One JSON object, whole or not at all. Raises InputError when the disk is full or may not be written."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """All rows, one JSON object a line, whole or not at all. Raises InputError as `write_json`."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write aside and rename, so that a reader never sees half a file. Raises InputError as `write_json`."""
    with writing(path, needed=len(text.encode())):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + PARTIAL)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)


@contextlib.contextmanager
def writing(path: Path, *, needed: int = 0) -> Iterator[None]:
    """What writing libraries raise when the disk is full or may not be written becomes one InputError that says so.

    Safetensors, torch and FAISS each have an error of their own for a full disk, so the free space is looked at too.

    Args:
        needed: bytes about to be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in NO_LEAVE:
            raise InputError(
                f"Expected to write {path.absolute()}, but that is not allowed ({error.strerror}). What was saved before stays; make the folder "
                "writable, or give another --output_dir."
            ) from error
        if code in NO_SPACE or any(sign in str(error) for sign in FULL) or _free(path) < needed:
            raise InputError(_no_room(path, needed)) from error
        raise


def check_room(path: Path, needed: int) -> None:
    """Refuse to begin writing what does not fit. Raises InputError that says how many bytes are needed and free."""
    if _free(path) < needed:
        raise InputError(_no_room(path, needed))


def _free(path: Path) -> int:
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    return shutil.disk_usage(there).free


def _no_room(path: Path, needed: int) -> str:
    return (
        f"The disk is full: {path.absolute()} needs about {max(1, round(needed / 1e6))} MB, {_free(path) / 1e6:.0f} MB are free. What was saved "
        "before stays; make room, then run the same command again and it goes on from there."
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---- whole folders


@contextlib.contextmanager
def replacing(folder: Path, *, needed: int = 0) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` when it is whole and on the disk; on an error it goes away again."""
    partial = folder.with_name(folder.name + PARTIAL)
    with writing(folder, needed=needed):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            seal(partial)
            settle(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # what does not fit must not fill the disk


def settle(partial: Path, folder: Path) -> None:
    """Give a folder its final name, once it is on the disk."""
    flush(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _flush_folder(folder.parent)


def flush(folder: Path) -> None:
    """Bring every file below a folder, and their names, to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            _flush_folder(path)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
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
    """What is wrong with a folder that `seal` closed: the first file that is missing or not what it was; None if nothing."""
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
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- a pair that is never half


def switch(folder: Path) -> None:
    """Move the pieces of OUTPUT/pair.next to their places, or go on with that where a run was killed.

    `pair.next` is whole from the moment it has that name. As long as it is there the pair in the folder may be mixed, and
    readers refuse it; moving on from any point ends at the new pair.
    """
    coming, leaving = folder / NEXT, folder / OLD
    shutil.rmtree(leaving, ignore_errors=True)
    if not coming.exists():
        return
    leaving.mkdir()
    for piece in sorted(coming.iterdir()):
        if piece.name == MANIFEST:
            continue
        if (folder / piece.name).exists():
            (folder / piece.name).rename(leaving / piece.name)
        piece.rename(folder / piece.name)
    _flush_folder(folder)
    shutil.rmtree(coming)
    shutil.rmtree(leaving)
