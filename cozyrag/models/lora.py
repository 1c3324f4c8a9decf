"""LoRA adapters of the generator, through PEFT: few weights are trained and saved, the base model does not change.

PEFT is an extra (`pip install "cozyrag[lora]"`), imported only where an adapter is made or read. transformers puts the
adapter into the model, which keeps its class. Left out: what the model is used for (generator.py), where it is saved.
"""

import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.integrations import peft as transformers_peft
from transformers.utils.peft_utils import check_peft_version

from cozyrag.errors import InputError
from cozyrag.models.foreign_files import find_file
from cozyrag.runtime.assets import GENERATOR_FOLDER

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHIPPED = GENERATOR_FOLDER.parts[-3:]  # the end of the packaged model's path, which depends on the installation
NAME = "default"


@dataclass(frozen=True)
class Adapter:
    """The model that an adapter belongs to: a folder or a Hub id, and its revision."""

    base: str
    revision: str | None


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether a model has an adapter."""
    return model._hf_peft_config_loaded


def read_adapter(name: str, *, revision: str | None = None, token: str | None = None) -> Adapter | None:
    """What the adapter in a folder or a repository belongs to; None for a whole model.

    Raises InputError if there is an adapter, but PEFT is not installed, or the adapter does not say what it belongs to.
    """
    path = find_file(name, CONFIG, revision=revision, token=token)
    if path is None:
        return None
    _check_peft(f"{name} is a LoRA adapter")
    base, its_revision = _base_of(name, path)
    moved = Path(base).parts[-3:] == SHIPPED and not Path(base).is_dir()  # the package is elsewhere on this machine
    return Adapter(str(GENERATOR_FOLDER) if moved else base, its_revision)


def _base_of(name: str, path: Path) -> tuple[str, str | None]:
    """The base model in an adapter's config, and its revision."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
        if not isinstance(base, str) or not base or not isinstance(revision, str | None):
            raise ValueError(f"base model {base!r:.60}, revision {revision!r:.60}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{name}: expected {CONFIG} to name the base model of the LoRA adapter, found something else "
            f"({type(error).__name__}: {error}). Save or download the adapter again."
        ) from error
    return base, revision


def _check_peft(why: str) -> None:
    if importlib.util.find_spec("peft") is None:
        raise InputError(f'{why}: expected PEFT, which is not installed. Run `pip install "cozyrag[lora]"`.')
    least = getattr(transformers_peft, "MIN_PEFT_VERSION", "0")
    try:
        check_peft_version(least)
    except ValueError as error:
        raise InputError(
            f"{why}: expected PEFT {least} or newer, which transformers {version('transformers')} asks for, found "
            f'{version("peft")}. Run `pip install "cozyrag[lora]"`, which installs versions that fit together.'
        ) from error


def add_adapter(
    model: PreTrainedModel,
    base: str,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    revision: str | None,
    seed: int,
) -> None:
    """Freeze a model and add a new LoRA adapter (Hu et al. 2021, arXiv:2106.09685) to it, which changes nothing yet.

    Args:
        base: the folder or Hub id that the adapter names as its base model. rank: of the two factors, whose product is
            multiplied by alpha / rank. targets: suffixes of the names of the layers that get one; none: PEFT's default
            for the family, or all linear layers. seed: every process must draw the same first factors.

    Raises:
        InputError: PEFT is missing, or no layer has such a name.
    """
    _check_peft("--lora_rank")
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    wanted = list(targets) or (None if model.config.model_type in KNOWN else "all-linear")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank: a fraction works
        lora_dropout=dropout,
        target_modules=wanted,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(), _quiet():
            torch.manual_seed(seed)
            model.add_adapter(config, NAME)
    except ValueError as error:
        cause = " ".join(str(error).split())[:200]
        raise InputError(
            f"--lora_targets: PEFT cannot add an adapter to this model ({cause}). Name other layers."
        ) from error
    _prepare(model, Adapter(str(Path(base).absolute()) if Path(base).is_dir() else base, revision))


def load_adapter(
    model: PreTrainedModel, name: str, adapter: Adapter, *, revision: str | None = None, token: str | None = None
) -> None:
    """Put a saved adapter into the model that it belongs to, for inference or further training."""
    try:
        if find_file(name, WEIGHTS, revision=revision, token=token) is None:
            raise OSError(f"no {WEIGHTS}; a pickle (.bin) is not loaded")
        with _quiet():
            model.load_adapter(name, NAME, adapter_kwargs={"revision": revision, "token": token}, is_trainable=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:200]
        raise InputError(
            f"Expected a LoRA adapter in {name} that fits {adapter.base}; it could not be loaded "
            f"({type(error).__name__}: {cause}). Copy the folder again, or train again."
        ) from error
    _prepare(model, adapter)
    model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns about something that it handles itself: GPT-2's matrices are stored transposed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        yield


def _prepare(model: PreTrainedModel, adapter: Adapter) -> None:
    """Make only the adapter trainable, and name the model it belongs to."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    vars(model.peft_config[NAME]).update(base_model_name_or_path=adapter.base, revision=adapter.revision)


def merged(name: str, model: PreTrainedModel) -> PreTrainedModel:
    """`model`, the base of the adapter in the folder `name`, with the adapter's products added to its weights."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, name).merge_and_unload()
