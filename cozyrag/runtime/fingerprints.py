"""Short names for what a model holds, so that things made from it can say whose they are.

Left out: files on disk; a fingerprint is of the weights in memory.
"""

import hashlib
from collections.abc import Mapping, Sequence

from torch import nn


def weights_fingerprint(model: nn.Module, *facts: str) -> str:
    """16 hex digits that change when a weight of `model` or one of `facts` changes; the same on every machine."""
    digest = hashlib.sha256("|".join(facts).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def tables_fingerprint(*tables: Mapping[str, Sequence]) -> str:
    """16 hex digits that change when a cell of one of the tables (columns by name) changes."""
    digest = hashlib.sha256()
    for table in tables:
        for name, column in table.items():
            digest.update(f"{name}|{len(column)}|".encode())
            for value in column:
                digest.update(repr(value).encode())
    return digest.hexdigest()[:16]
