"""Hashes that tie a JSON file to itself and to the files beside it, so that no changed bit passes for the original.

XXH3 reads gigabytes in a second; it finds damage and mixed files, not forgery: who can change a file can change its
hash. Left out: which files belong together (pair_file.py, retrieval/index_file.py).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from stat import S_ISDIR, S_ISREG

import xxhash

from cozyrag.errors import InputError
from cozyrag.runtime.machine_faults import machine_faults_told

HASH, SAMPLE, CHECKSUM = "xxh3_128", "xxh3_128_of_sample", "checksum"
LARGE = 1 << 31  # bytes from which loading reads a sample: all of it would take seconds, and be read again later
READ, BLOCK, BLOCKS = 1 << 22, 1 << 16, 2048  # bytes read at once; bytes and number of the blocks of a sample


def contents_of(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """Bytes and hashes of these files of a folder, for `check_contents`."""
    return {name: _facts(folder / name) for name in names}


def _facts(path: Path) -> dict:
    size = path.stat().st_size
    sample = {SAMPLE: _hash(path, _sampled(size))} if size > LARGE else {}
    return {"bytes": size, HASH: _hash(path, [(0, size)])} | sample


def _sampled(size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of evenly spread blocks, the first and the last included."""
    return ((at, at + BLOCK) for at in (number * (size - BLOCK) // (BLOCKS - 1) for number in range(BLOCKS)))


def _hash(path: Path, stretches: Iterable[tuple[int, int]]) -> str:
    digest = xxhash.xxh3_128()
    with machine_faults_told(path), path.open("rb") as file:
        for start, end in stretches:
            file.seek(start)
            while start < end and (content := file.read(min(READ, end - start))):
                digest.update(content)
                start += len(content)
    return digest.hexdigest()


def is_contents(value: object) -> bool:
    """Whether this has the form of `contents_of`, and names only files inside the folder."""
    if not isinstance(value, dict):
        return False
    return all(
        isinstance(facts, dict)
        and type(facts.get("bytes")) is int
        and isinstance(facts.get(HASH), str)
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
        for name, facts in value.items()
    )


def check_contents(folder: Path, contents: Mapping[str, Mapping], remedy: str, *, whole: bool = False) -> None:
    """Raise InputError for the first of these files that is missing or is not what was written.

    Args:
        contents: from `contents_of`. remedy: the last sentence of the message. whole: read files above `LARGE` whole.
    """
    for name, facts in contents.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"Expected {path}, which belongs to {folder}, found none. {remedy}")
        if (size := path.stat().st_size) != facts["bytes"]:
            raise InputError(
                f"Expected {facts['bytes']} bytes in {path}, found {size}: the file was cut short or replaced. {remedy}"
            )
        kind = HASH if whole or size <= LARGE or SAMPLE not in facts else SAMPLE
        if _hash(path, [(0, size)] if kind == HASH else _sampled(size)) != facts[kind]:
            raise InputError(
                f"Expected in {path} what was written together with {folder}, found other contents: it is damaged, or "
                f"of another run. {remedy}"
            )


def sealed(facts: Mapping) -> dict:
    """The content of a JSON file with a checksum of itself."""
    known = {name: value for name, value in facts.items() if name != CHECKSUM}
    text = json.dumps(known, sort_keys=True, ensure_ascii=True)
    return known | {CHECKSUM: xxhash.xxh3_128_hexdigest(text.encode("ascii"))}


def check_seal(path: Path, facts: Mapping, remedy: str) -> None:
    """Raise InputError if a JSON file has a checksum that is not that of its content. Earlier versions wrote none."""
    if CHECKSUM in facts and facts[CHECKSUM] != sealed(facts)[CHECKSUM]:
        raise InputError(
            f"{path}: its content does not match its checksum, so a value in it is not what was written. {remedy} If "
            f'you changed it on purpose, delete the entry "{CHECKSUM}".'
        )


def check_ordinary(paths: Iterable[Path]) -> None:
    """Raise InputError for the first path that is neither a file nor a folder: reading a pipe would never end."""
    for path in paths:
        with machine_faults_told(path):
            try:
                mode = path.stat().st_mode
            except FileNotFoundError:
                continue
        if not S_ISREG(mode) and not S_ISDIR(mode):
            raise InputError(
                f"{path} is neither a file nor a folder, but a pipe or a device, and is not read. Delete it."
            )


def read_object(path: Path, remedy: str) -> dict:
    """The object in a JSON file. Raises InputError if there is none."""
    check_ordinary([path])
    with machine_faults_told(path):
        try:
            content = json.loads(path.read_bytes().decode("utf-8"))
        except (ValueError, RecursionError, IsADirectoryError, FileNotFoundError, NotADirectoryError) as error:
            cause = " ".join(str(error).split())[:200]
            raise InputError(f"{path} is not valid JSON ({cause}). {remedy}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(content).__name__}. {remedy}")
    return content
