"""The header of a safetensors file, checked: what follows trusts its shapes, to map a file or to judge a model's size.

Left out: reading tensors (safetensors itself, retrieval/faiss_index.py).
"""

import json
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

TYPES: dict[str, type] = {
    "F32": np.float32, "F16": np.float16, "U8": np.uint8, "I32": np.int32, "I64": np.int64, "U64": np.uint64,
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # bytes, as in the format's own reader


class TensorPlace(NamedTuple):
    """Type, shape and first byte of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: str | Path) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file by name. Raises ValueError for a header that does not fit the file."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{Path(path).name}: a header of {length} bytes in a file of {size}")
        try:
            head = json.loads(file.read(length))
            found = {name: _place(facts, 8 + length, size) for name, facts in head.items() if name != "__metadata__"}
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{Path(path).name}: its header names no tensors ({error})") from error
    return found


def _place(facts: dict, begin: int, size: int) -> TensorPlace:
    shape, (start, end) = facts["shape"], facts["data_offsets"]
    if any(type(each) is not int or each < 0 for each in (*shape, start, end)):
        raise ValueError(f"a shape or a place is no whole number: {str(facts)[:80]}")
    if not start <= end <= size - begin or prod(shape) > 8 * (end - start):
        raise ValueError(f"a tensor of the shape {str(shape)[:80]} does not fit into the file")
    return TensorPlace(facts["dtype"], tuple(shape), begin + start, begin + end)
