"""Import the training phases without datasets and faiss, which many GPU machines do not have.

The phases name `Dataset` in annotations and `Passages` of passage_index.py, which imports both libraries, but need
neither. An empty module replaces a missing library while the phases are imported, and is removed afterwards. Left out:
search, which needs the libraries.
"""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

WANTED = ("datasets", "faiss")
MISSING = tuple(name for name in WANTED if find_spec(name) is None)
# Imported first, so that no other library sees an empty module.
FIRST = (
    "accelerate.utils",
    "transformers",
    "sentence_transformers",
    "cozyrag.models.generator",
    "cozyrag.models.retriever",
)
PHASES = ("cozyrag.training.generator_phase", "cozyrag.training.retriever_phase")


class _Stub(ModuleType):
    """Replaces a library that is not installed. Every name in it is `object`, which is enough for annotations."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def _import_phases() -> None:
    for name in FIRST:
        importlib.import_module(name)
    modules = {name: _Stub(name) for name in ("datasets", "datasets.exceptions", "datasets.utils", "faiss")}
    placed = {name: module for name, module in modules.items() if name.partition(".")[0] in MISSING}
    sys.modules.update(placed)
    try:
        for name in PHASES:
            importlib.import_module(name)
    finally:
        for name in placed:
            del sys.modules[name]


if MISSING:
    _import_phases()
