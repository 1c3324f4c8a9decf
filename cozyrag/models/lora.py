"""LoRA adapters of the generator, through PEFT: few weights are trained and saved, the large model stays as it came.

PEFT is an extra (`pip install "cozyrag[lora]"`) and imported only where an adapter is made or read. The model stays the
class it is; transformers puts the adapter into it. Left out: what the model is for (generator.py), where it is saved.
"""

import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import cached_file

from cozyrag.errors import InputError
from cozyrag.runtime.assets import GENERATOR_FOLDER

CONFIG = "adapter_config.json"
SHIPPED = GENERATOR_FOLDER.parts[-3:]  # the end of the path of the model that comes with the package, wherever it lies
NAME = "default"


@dataclass(frozen=True)
class Adapter:
    """What an adapter says about the model that it belongs to: a folder or a Hub id, and its revision."""

    base: str
    revision: str | None


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether a model carries an adapter."""
    return model._hf_peft_config_loaded


def read_adapter(name: str, *, revision: str | None = None, token: str | None = None) -> Adapter | None:
    """What the adapter in a folder or a repository belongs to; None if there is a whole model.

    Raises:
        InputError: there is an adapter, but PEFT is not installed.
    """
    path = Path(name) / CONFIG if Path(name).is_dir() else _config_on_hub(name, revision, token)
    if path is None or not path.exists():
        return None
    check_peft(f"{name} is a LoRA adapter")
    told = json.loads(path.read_text(encoding="utf-8"))
    base = told["base_model_name_or_path"]
    moved = Path(base).parts[-3:] == SHIPPED and not Path(base).is_dir()  # another machine has it elsewhere
    return Adapter(str(GENERATOR_FOLDER) if moved else base, told.get("revision"))


def _config_on_hub(name: str, revision: str | None, token: str | None) -> Path | None:
    """The adapter's description in a repository, if it has one; whether it can be reached is for who loads it to find out."""
    found = cached_file(
        name,
        CONFIG,
        revision=revision,
        token=token,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def check_peft(why: str) -> None:
    """Raise InputError if PEFT is not there."""
    if importlib.util.find_spec("peft") is None:
        raise InputError(f'{why}: expected PEFT, which is not installed. Give `pip install "cozyrag[lora]"`.')


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
    """Freeze a model and put a new LoRA adapter (Hu et al. 2021, arXiv:2106.09685) into it, which changes nothing yet.

    Args:
        base: the folder or Hub id that the adapter will name as its model. rank: of the two factors; alpha: the product is
            multiplied by alpha / rank. targets: ends of the names of the layers that get one; none: what PEFT knows of the
            family, all linear layers where it knows nothing. seed: every process must draw the same first factors.

    Raises:
        InputError: PEFT is missing, or no layer has such a name.
    """
    check_peft("--lora_rank")
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    wanted = list(targets) or (None if model.config.model_type in KNOWN else "all-linear")
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=wanted, task_type="CAUSAL_LM")
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            with _quiet():
                model.add_adapter(config, NAME)
    except ValueError as error:
        raise InputError(
            f"--lora_targets: PEFT cannot put an adapter into this model ({' '.join(str(error).split())[:200]}). Name other layers."
        ) from error
    _train_only_adapter(model)
    _name_base(model, Adapter(str(Path(base).absolute()) if Path(base).is_dir() else base, revision))


def load_adapter(
    model: PreTrainedModel, name: str, adapter: Adapter, *, revision: str | None = None, token: str | None = None
) -> None:
    """Put a saved adapter into the model that it belongs to, to be used or trained on."""
    try:
        with _quiet():
            model.load_adapter(name, NAME, adapter_kwargs={"revision": revision, "token": token}, is_trainable=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"Expected a LoRA adapter in {name} that fits {adapter.base}, it could not be loaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Copy the folder anew, or train again."
        ) from error
    _train_only_adapter(model)
    _name_base(model, adapter)
    model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns of what it does right by itself: GPT-2's matrices are stored the other way round."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        yield


def _name_base(model: PreTrainedModel, adapter: Adapter) -> None:
    config = model.peft_config[NAME]
    config.base_model_name_or_path, config.revision = adapter.base, adapter.revision


def _train_only_adapter(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def merged(name: str, model: PreTrainedModel) -> PreTrainedModel:
    """`model`, the bare one of the adapter in the folder `name`, with the adapter's products added to its weights."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, name).merge_and_unload()
