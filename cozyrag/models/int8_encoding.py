"""Encoding with 8-bit integers on a CPU: matrix products in ONNX Runtime, about 1.6 times as fast as in float32.

For passage vectors, which are many and computed again after every retriever phase; a cosine moves by about 0.005.
Weights are quantised by channel, activations by batch (dynamic quantisation; Jacob et al. 2018, arXiv:1712.05877).
Needs `pip install "cozyrag[int8]"`. Left out: training, questions, models that do not begin with a transformer.
"""

import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from cozyrag.errors import InputError

FLOAT32, BF16, INT8 = "float32", "bf16", "int8"
AUTO = "auto"  # the precision in which the retriever reads everything else
INPUTS = ("input_ids", "attention_mask")
OPSET = 17


def check_int8(precision: str, device: str, option: str) -> None:
    """Raise InputError if that precision is not available: a package is missing, or the encoder is on a GPU."""
    if precision != INT8:
        return
    if missing := [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"{option} int8: expected the package {missing[0]}, which is not installed. "
            'Run `pip install "cozyrag[int8]"`, or omit the option.'
        )
    if not device.startswith("cpu"):
        raise InputError(
            f"{option} int8: expected the encoder on the CPU, found it on {device}, where float32 is faster than int8. "
            "Omit the option."
        )


def reading_precision(mixed_precision: str) -> str:
    """The precision of inference for a training precision as Accelerate names it ("no", "bf16", "fp16")."""
    return BF16 if mixed_precision == "bf16" else FLOAT32


@contextmanager
def quantised(modules: nn.Module) -> Iterator[None]:
    """Inside the context, these modules of a SentenceTransformer encode with 8 bits; their weights do not change.

    Quantisation takes some seconds. Raises InputError if the first module is not a transformer.
    """
    first = next(iter(modules.children()))
    if not isinstance(first, Transformer):
        raise InputError(
            f"int8: expected a retriever that begins with a transformer, found {type(first).__name__}. Omit int8."
        )
    with tempfile.TemporaryDirectory() as folder:
        session = _session(_exported(first.model, Path(folder)))

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **unused) -> BaseModelOutput:
        inputs = dict(zip(INPUTS, (input_ids.numpy(), attention_mask.numpy()), strict=True))
        return BaseModelOutput(last_hidden_state=torch.from_numpy(session.run(None, inputs)[0]))

    first.model.forward = forward
    try:
        yield
    finally:
        del first.model.forward


class _TokenVectors(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _exported(model: PreTrainedModel, folder: Path) -> Path:
    """The file of the quantised model."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = copy.deepcopy(model).eval().float()
    plain.set_attn_implementation("eager")  # matrix products and a softmax, which ONNX has
    ids = torch.tensor([[1, 2, 3], [1, 2, 0]])
    whole, quantised = folder / "whole.onnx", folder / "int8.onnx"
    shapes = {name: {0: "batch", 1: "length"} for name in (*INPUTS, "token_vectors")}
    level = logging.getLogger().level
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # from the tracer, about shapes that the model fixes
        torch.onnx.export(
            _TokenVectors(plain), (ids, (ids > 0).long()), str(whole), dynamo=False, opset_version=OPSET,
            input_names=list(INPUTS), output_names=["token_vectors"], dynamic_axes=shapes,
        )  # fmt: skip
        logging.getLogger().setLevel(logging.ERROR)  # a recommendation that does not concern dynamic quantisation
        options = {"MatMulConstBOnly": True}  # products of activations with each other stay in float32
        quantize_dynamic(
            str(whole), str(quantised), weight_type=QuantType.QInt8, per_channel=True, extra_options=options
        )
        logging.getLogger().setLevel(level)
    return quantised


def _session(path: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
