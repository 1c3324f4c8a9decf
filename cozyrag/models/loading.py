"""Causal language models from a folder, the Hub or the package index, set up for training.

Left out: what the model is used for (generator.py), making and saving adapters (lora.py).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cozyrag.errors import InputError
from cozyrag.models.foreign_files import refuse_foreign_code, refuse_sizes
from cozyrag.models.lora import load_adapter, read_adapter
from cozyrag.models.smollm2 import HINT, SMOLLM2, load_smollm2
from cozyrag.models.token_losses import TokenLosses
from cozyrag.runtime.machine_faults import check_readable, fault_sentence, is_environment

ALTERNATIVES = f"use {HINT} or --generator scratch, a small untrained GPT-2"
DROPOUT_FIELDS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "dropout")


def load_causal_lm(
    name: str, *, revision: str | None, dropout: float, token: str | None, chat_template: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in float32 and its tokenizer; arguments and errors are those of `Generator.load`."""
    if name == SMOLLM2:
        model, tokenizer = load_smollm2()
        training_config(model.config, dropout)
    else:
        model, tokenizer = _load_checkpoint(name, revision, dropout, token)
    if not chat_template:
        tokenizer.chat_template = None
    return model, tokenizer


def _load_checkpoint(
    name: str, revision: str | None, dropout: float, token: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """From a folder or the Hub: a whole model, or an adapter and the model it belongs to."""
    source = {"revision": revision, "token": token}
    with loading("--generator", "checkpoint folder", name, ALTERNATIVES):
        refuse_foreign_code(name, **source)
        adapter = read_adapter(name, **source)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **source)
        if adapter is None:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, **source)
            refuse_sizes(Path(name))
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                name,
                config=training_config(config, dropout),
                trust_remote_code=False,
                dtype=torch.float32,
                use_safetensors=True,  # a pytorch_model.bin is a pickle
                **source,
            )
    if adapter is None:
        _check_head(model)
    else:
        base = {"revision": adapter.revision, "token": token}
        model, _ = load_causal_lm(adapter.base, **base, dropout=dropout, chat_template=False)
        load_adapter(model, name, adapter, **source)
    return model, tokenizer


def training_config(config: PretrainedConfig, dropout: float) -> PretrainedConfig:
    """Set the dropout, and GPT-2's activation as one fused kernel: the same formula, half the time on a CPU."""
    known = config.to_dict()
    for field in DROPOUT_FIELDS:
        if field in known:
            setattr(config, field, dropout)
    if known.get("activation_function") == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"
    return config


@torch.inference_mode()
def _check_head(model: PreTrainedModel) -> None:
    """Refuse a model that reads ahead, or whose logits `TokenLosses` does not reproduce: its loss would be wrong."""
    ids = torch.arange(1, 9).unsqueeze(0) % model.config.vocab_size
    mask = torch.ones_like(ids)
    model.eval()
    ours = TokenLosses(model).logits(ids, torch.arange(ids.numel()), mask)
    theirs = model(input_ids=ids, attention_mask=mask).logits[0]
    if theirs.isnan().any():
        raise InputError(
            "Expected a generator with finite logits, found NaN: its weights are damaged, for example by training that "
            "diverged. Resume from an earlier checkpoint, or choose another --generator."
        )
    half = model(input_ids=ids[:, :4], attention_mask=mask[:, :4]).logits[0]
    if not torch.allclose(half, theirs[:4], rtol=1e-3, atol=1e-4):
        raise InputError(
            "Expected a causal generator, whose logits depend on earlier tokens alone; those of "
            f"{type(model).__name__} change with the tokens that follow, so it would be trained to copy and could not "
            "answer. Choose another --generator (GPT-2, Llama, SmolLM2, ...)."
        )
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4):
        raise InputError(
            "Expected a generator whose logits are its output embeddings applied to its last hidden states, scaled or "
            f"capped as in its configuration; {type(model).__name__} computes something else, so its loss would be "
            "wrong. Choose another --generator."
        )


@contextlib.contextmanager
def loading(option: str, kind: str, name: str, otherwise: str) -> Iterator[None]:
    """Turn whatever the libraries raise for the files of a model into an InputError; see `not_loaded`.

    tokenizers raises bare exceptions, and its panics are not even those; a malformed configuration becomes any error.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        raise not_loaded(option, kind, name, error, otherwise) from error


def not_loaded(option: str, kind: str, name: str, error: BaseException, otherwise: str) -> InputError:
    """The error for a model that cannot be loaded; `otherwise`: the last of its remedies.

    Raises InputError itself for a file that may not be read.
    """
    check_readable(sorted(Path(name).rglob("*")) if Path(name).is_dir() else ())
    if is_environment(error):
        return InputError(f"{option} {name!r} could not be loaded: {fault_sentence(error)}")
    cause = " ".join(str(error).split())[:200]
    return InputError(
        f"Expected {option} to be a {kind} or a model on the Hub that can be reached; {name!r} could not be loaded "
        f"({type(error).__name__}: {cause}). Check the spelling and the network, give a local folder, or {otherwise}."
    )
