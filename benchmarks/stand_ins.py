"""Lets the phases of training be imported where datasets and faiss are not installed, as on many borrowed GPU machines.

They name `Dataset` in annotations and `Passages` of the index module, whose head imports both libraries, and need
neither. So where one is missing, an empty module stands in for it while the phases are imported, and is taken away
again. Left out: searching, which needs the real ones.
"""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

WANTED = ("datasets", "faiss")
MISSING = tuple(name for name in WANTED if find_spec(name) is None)
# What the phases need besides, imported first so that no other library meets a stand-in.
BEFORE = (
    "accelerate.utils",
    "transformers",
    "sentence_transformers",
    "cozyrag.models.generator",
    "cozyrag.models.retriever",
)
PHASES = ("cozyrag.training.generator_phase", "cozyrag.training.retriever_phase")


def _empty(name: str, **content) -> ModuleType:
    module = ModuleType(name, "A stand-in for a library that is not installed.")
    vars(module).update(content)
    return module


def _import_phases() -> None:
    for name in BEFORE:
        importlib.import_module(name)
    modules = {
        "datasets": _empty("datasets", Dataset=object),
        "datasets.utils": _empty("datasets.utils", are_progress_bars_disabled=lambda: True),
        "faiss": _empty("faiss", Index=object),
    }
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
