"""Short hashes of weights and tables, so that files made from them can name their source.

Left out: files on disk; a fingerprint covers the weights in memory.
"""

import hashlib
from collections.abc import Mapping, Sequence

from torch import nn


def weights_fingerprint(model: nn.Module, *facts: str) -> str:
    """16 hex digits that change with any weight of `model` or any of `facts`; the same on every machine."""
    digest = hashlib.sha256("|".join(facts).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def tables_fingerprint(*tables: Mapping[str, Sequence]) -> str:
    """16 hex digits that change with any cell of the tables (columns by name)."""
    digest = hashlib.sha256()
    for table in tables:
        for name, column in table.items():
            digest.update(f"{name}|{len(column)}|".encode())
            for value in column:
                digest.update(repr(value).encode())
    return digest.hexdigest()[:16]
