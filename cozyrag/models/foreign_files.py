"""Files of a model that somebody else made: what is refused before a library reads them, and how its errors are told.

Refused are code, pickles, what is no ordinary file, and sizes that the weights do not have. Left out: loading itself
(loading.py, retriever.py), and the files of an index (retrieval/index_file.py).
"""

import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel
from transformers.initialization import no_init_weights
from transformers.utils import cached_file

from cozyrag.runtime.contents import check_ordinary
from cozyrag.runtime.tensor_files import read_header

LARGEST_JSON = 300_000_000  # bytes; the largest tokenizer.json of the Hub have some 40 MB
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
PERMISSIONS = ("allow_all_kernels", "use_kernels", "kernel_config")
# cached_file then returns None; loading the model reports a repository that cannot be reached
QUIETLY = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
CONFIGS = ("config.json", "sentence_bert_config.json", "adapter_config.json")
WEIGHTS = "*.safetensors"
REPEATED = re.compile(r"^(num|n)_.*(layer|expert|block)|layers?$")  # such a part is built so many times
MOST_LAYERS = 1000  # of a kind; the deepest models have some 200
WASTE, SPARE = 2, 1 << 26  # a model may have so many times the weights of its files, and so many more: tied, or masks
PICKLES = ("pytorch_model.bin", "adapter_model.bin")


def find_file(name: str, file: str, *, revision: str | None = None, token: str | None = None) -> Path | None:
    """A file of a model's folder or, downloaded, of its repository; None if there is none."""
    found = Path(name) / file
    if not Path(name).is_dir():
        cached = cached_file(name, file, revision=revision, token=token, **QUIETLY)
        found = Path(cached) if cached else found
    return found if found.is_file() else None


def refuse_foreign_code(name: str, *, revision: str | None = None, token: str | None = None) -> None:
    """Raise ValueError for a model, in a folder or on the Hub, that names code to run or has only pickled weights.

    Code that `auto_map` names needs no check: with trust_remote_code=False the libraries refuse it. But they import
    kernels and PEFT's Megatron by the names that a configuration gives.
    """
    for file in CONFIGS:
        path = find_file(name, file, revision=revision, token=token)
        for key, value in _entries(read_json(path)) if path else ():
            named = key in KERNELS and "/" in json.dumps(value)
            if named or (key in PERMISSIONS and value):
                raise ValueError(f"{file} names a kernel ({key}: {value!r}), which is code of others; remove that line")
            if key == "megatron_config" and value is not None:
                raise ValueError(f"{file}: megatron_config imports a module by its name; remove that line")
    for pickled in (path for each in PICKLES for path in Path(name).rglob(each)) if Path(name).is_dir() else ():
        if not any(pickled.parent.glob(WEIGHTS)):
            raise ValueError(f"{pickled.relative_to(name)} is a pickle, expected safetensors")


def refuse_sizes(folder: Path) -> None:
    """Raise ValueError for a model in a folder whose configuration describes more weights than its files hold.

    It would be built before its weights are read: a number in a small file must not take hours or all memory. Nothing
    is checked for a model on the Hub, whose files are not here yet.
    """
    check_ordinary(sorted(folder.rglob("*")) if folder.is_dir() else ())
    for path in sorted(folder.rglob("config.json")) if folder.is_dir() else ():
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path.name}: expected an object, found a {type(content).__name__}")
        held = sum(prod(place.shape) for each in path.parent.glob(WEIGHTS) for place in read_header(each).values())
        for key, value in _entries(content):
            if isinstance(value, int | float) and REPEATED.search(key) and not -1 <= value <= MOST_LAYERS:
                raise ValueError(f"{path.name}: {key} is {value!r:.40}, expected at most {MOST_LAYERS:,}")
        described = _described(path.parent, content) if held else 0
        if described > WASTE * held + SPARE:
            raise ValueError(f"{path.name} describes {described:,} weights, the files beside it hold {held:,}")


def _described(folder: Path, content: dict) -> int:
    """How many numbers a model of this configuration has; no memory is taken for them."""
    sides = [content[name] for name in ("in_features", "out_features") if name in content]
    if "model_type" not in content:  # a module of sentence-transformers
        return prod(sides) if sides else 0
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"), no_init_weights():
        model = AutoModel.from_config(config, trust_remote_code=False)
    return sum(each.numel() for each in (*model.parameters(), *model.buffers()))


def read_json(path: Path) -> object:
    """The content of a JSON file. Raises ValueError if it is none, is too large, or is nested too deeply."""
    if not path.is_file():
        raise ValueError(f"{path.name} is no file")
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path.name} has {size:,} bytes, expected at most {LARGEST_JSON:,}")
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error


def _entries(content: object) -> Iterator[tuple[str, object]]:
    """All keys of a JSON document, with their values, however deep."""
    waiting = [content]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield from each.items()
            waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)
