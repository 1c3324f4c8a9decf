"""The reranker: a CrossEncoder that reads a question and a text together and says how well the text answers it.

Left out: which texts it reads and what its scores decide (retrieval/reranking.py), training (reranker_phase.py).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoConfig, PretrainedConfig

from cozyrag.errors import InputError
from cozyrag.models.foreign_files import refuse_foreign_code, refuse_sizes
from cozyrag.models.int8_encoding import BF16, FLOAT32
from cozyrag.models.loading import loading
from cozyrag.models.retriever import MOST_TOKENS, embedded_path
from cozyrag.runtime.fingerprints import weights_fingerprint
from cozyrag.runtime.terminal import quiet_loggers

OTHERWISE = "use --reranker embedded, which needs no network"
HEADED = ("ForSequenceClassification", "ForCausalLM")
MOST_READ = 256  # tokens of question and text together; passages are a paragraph
SCORED_TOGETHER = 32  # pairs of similar length padded together

Pair = tuple[str, str]  # a question and a text


class Reranker:
    """A CrossEncoder with one output. Its scores are logits: only their differences for one question mean something."""

    def __init__(self, model: CrossEncoder):
        self.model = model
        self.precision = FLOAT32  # of inference; weights are trained and saved in float32 in any case
        limit = model.max_seq_length
        model.max_seq_length = min(MOST_READ, limit) if limit else MOST_READ
        model.activation_fn = torch.nn.Identity()  # so that `predict` of the saved model returns these scores

    @classmethod
    def load(cls, name: str, *, device: str = "cpu", token: str | None = None) -> "Reranker":
        """Load a CrossEncoder folder or Hub id in float32; an encoder without a head gets a head of zeros.

        Raises InputError, with alternatives, if it fails.
        """
        with loading("--reranker", "CrossEncoder folder", name, OTHERWISE):
            refuse_foreign_code(name, token=token)
            refuse_sizes(Path(name))
            loaded = cls(_cross_encoder(name, device, token))
            loaded.check_reading()
        return loaded

    @classmethod
    def load_embedded(cls, *, device: str = "cpu") -> "Reranker":
        """The encoder of all-MiniLM-L6-v2 with a head of zeros."""
        return cls.load(str(embedded_path("--reranker")), device=device)

    @property
    def is_trained(self) -> bool:
        """Whether its scores can differ: with a head of zeros all are equal."""
        head = _head(self.model)
        return head is None or bool(head.weight.any())

    def check_reading(self) -> None:
        """Raise ValueError if it does not turn a question and a text into one finite score."""
        limit = self.model.max_seq_length
        if type(limit) is not int or not 1 <= limit <= MOST_TOKENS:
            raise ValueError(f"expected a reading length of 1 to {MOST_TOKENS:,} tokens, found {limit!r:.60}")
        if self.model.num_labels != 1:
            raise ValueError(f"expected a CrossEncoder with one output, found {self.model.num_labels}")
        if not np.isfinite(self.score([("a", "b")])).all():
            raise ValueError("expected a finite score, found NaN or infinity")

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the transformer."""
        return self.model[0].get_submodule("model").config  # type: ignore[return-value]

    def count_tokens(self, pairs: Sequence[Pair]) -> list[int]:
        """Number of tokens that it reads of each pair."""
        if not pairs:
            return []
        encoded = self.model.tokenizer(
            [question for question, _ in pairs], [text for _, text in pairs], verbose=False,
            truncation=True, max_length=self.model.max_seq_length,
        )  # fmt: skip
        return [len(ids) for ids in encoded["input_ids"]]

    def logits(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """(n_pairs,) float32 scores with gradients, in the order of the pairs."""
        order = sorted(range(len(pairs)), key=lambda at: sum(map(len, pairs[at])))
        found = [torch.empty(0, device=self.device)]
        for start in range(0, len(order), SCORED_TOGETHER):
            features = self.model.preprocess([pairs[at] for at in order[start : start + SCORED_TOGETHER]])
            on_device = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in features.items()}
            found.append(self.model(on_device)["scores"].float().view(-1))
        back = torch.argsort(torch.tensor(order, dtype=torch.int64, device=self.device))
        return torch.cat(found)[back]

    @torch.inference_mode()
    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """(n_pairs,) float32 scores without gradients."""
        with self.casting():
            return self.logits(pairs).cpu().numpy()

    def casting(self) -> AbstractContextManager:
        """Autocast in the reranker's precision; weights are cast once per context."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == BF16 else nullcontext()

    def fingerprint(self) -> str:
        """16 hex digits that identify its scores."""
        return weights_fingerprint(self.model, str(self.model.max_seq_length))

    def save(self, folder: str | Path) -> None:
        """Write an ordinary CrossEncoder checkpoint (safetensors)."""
        self.model.save_pretrained(str(folder), create_model_card=False)

    def restore(self, folder: str | Path) -> None:
        """Take the weights of a checkpoint that `save` wrote."""
        self.model.load_state_dict(Reranker.load(str(folder)).model.state_dict())


def _cross_encoder(name: str, device: str, token: str | None) -> CrossEncoder:
    config = AutoConfig.from_pretrained(name, token=token, trust_remote_code=False)
    has_head = any(each.endswith(HEADED) for each in config.architectures or ())
    with quiet_loggers("transformers", "sentence_transformers"):  # an encoder is converted, and its head is new
        model = CrossEncoder(
            name,
            device=device,
            token=token,
            trust_remote_code=False,
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},  # a pytorch_model.bin is a pickle
            num_labels=None if has_head else 1,
        ).eval()
    head = None if has_head else _head(model)
    if head is not None:
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)
    return model


def _head(model: CrossEncoder) -> torch.nn.Linear | None:
    """The last layer, which makes the score of a text; None if there is none, as in a causal LM."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module.out_features == 1]
    return layers[-1] if layers else None


def check_scores(scores: np.ndarray) -> None:
    """Raise InputError for a score that is no number: training has diverged."""
    if not np.isfinite(scores).all():
        raise InputError(
            "Expected finite scores from the reranker, found NaN or infinity: its training has diverged. Lower "
            "--reranker_learning_rate, or resume from an earlier checkpoint."
        )
