"""Inference with a trained pair: `CozyRAG.from_pretrained(folder or repo).answer("...")` gives an answer with sources.

Left out: training, evaluation, and any way to change the pair.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from cozyrag.data.sentences import sentence_spans
from cozyrag.errors import InputError
from cozyrag.models.generator import Decoding, Generator
from cozyrag.models.int8_encoding import BF16, FLOAT32, reading_precision
from cozyrag.models.retriever import Retriever
from cozyrag.pair_file import PAIR_FILE, check_piece, read_pair, starts_text
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.contexts import Chosen, ContextBuilder, sentence_source
from cozyrag.retrieval.hybrid import Searcher, Weights
from cozyrag.retrieval.passage_index import PassageIndex, check_fits
from cozyrag.runtime.fingerprints import weights_fingerprint
from cozyrag.runtime.hub_retry import HUB_FAULTS, explain, patiently
from cozyrag.runtime.precision import fitting

# The files downloaded from a repository: no pickles, no code, and no index.faiss, which is rebuilt.
FETCHED = ["*.json", "*.jsonl", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.parquet", "README.md"]


@dataclass(frozen=True)
class Source:
    """A passage that was retrieved for an answer.

    `score`: its cosine with the question, its BM25 score, or the weighted sum of hybrid.py. `used`: (start, end), in
    characters of `text`, of each sentence in the context.
    """

    id: str
    title: str
    text: str
    score: float
    used: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Answer:
    """`text` (empty if the pair abstains), `score` (0 to 1, the geometric mean of the token probabilities), the context
    that the generator read, and the passages found."""

    text: str
    score: float
    context: str
    passages: tuple[Source, ...]


class CozyRAG:
    """A generator, a retriever and their index, ready to answer. Threads can share it.

    Args:
        mode, weights, stemmer: of the search; see `Searcher`.
        top_k: passages whose sentences compete for a context.
        decoding: limits of contexts and answers.
        context_filter: how sentences are chosen; see `ContextBuilder`.
        no_answer_threshold: the probability of an empty answer above which the pair abstains; None: it never does.
    """

    def __init__(
        self,
        generator: Generator,
        retriever: Retriever,
        index: PassageIndex,
        *,
        mode: str,
        weights: dict[str, float],
        stemmer: str,
        top_k: int,
        decoding: Decoding,
        context_filter: str = "sparse",
        no_answer_threshold: float | None = None,
    ):
        generator.only_read()
        self.generator, self.retriever, self.index = generator, retriever, index
        self.top_k, self.decoding, self.no_answer_threshold = top_k, decoding, no_answer_threshold
        lexical = None if mode == "dense" else LexicalIndex(index.passages.to_read(), stemmer=stemmer)
        words = SentenceWords(index.passages.titles, index.passages.sentences(), stemmer=stemmer)
        self.searcher = Searcher(
            index,
            lexical,
            encode=lambda texts: retriever.encode(texts, kind="query", batch_size=64),
            mode=mode,
            words=words,
            weights=Weights(**weights),
        )
        self._builder = ContextBuilder(
            index.passages,
            generator.count_tokens,
            top_k=top_k,
            budget=decoding.context_tokens,
            score_by=context_filter,
            sentence_vectors=sentence_source(index, retriever),
            words=words,
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        device: str | None = None,
        precision: str | None = None,
    ) -> "CozyRAG":
        """Load the output folder of train.py, or a pair that was pushed as `user/name`.

        From the Hub, the generator comes at `revision` (a branch, a tag such as round-1, a commit; None: the newest),
        and the retriever and the index at the exact revisions that it names. Later loads need no network.

        Args:
            precision: of inference, "float32" or "bf16"; None: bf16 if the machine has it and it is faster.

        Raises:
            InputError: the name has no usable pair, generator, retriever and index do not belong together, or this
                machine has no such device.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        _check_machine(device, precision)
        folder = Path(name) if Path(name).is_dir() else _download(str(name), revision=revision, token=token)
        pair = read_pair(folder)
        place = _piece(folder, pair["generator"], "model", token)
        check_piece(place, pair["generator"])
        generator = Generator.load(str(place), start_of_text=starts_text(pair))
        expected, found = pair["generator"].get("fingerprint"), weights_fingerprint(generator.model)
        if expected not in (None, found):
            raise InputError(
                f"{folder / PAIR_FILE} names generator {expected}, but the one beside it is {found}: the files come "
                "from different rounds or runs. Copy the whole folder again, or train again."
            )
        generator.model.to(device).eval()  # type: ignore[arg-type]  # a decorator of transformers hides `self`
        generator.precision = precision or reading_precision(fitting(torch.device(device).type).name)
        place = _piece(folder, pair["retriever"], "model", token)
        check_piece(place, pair["retriever"])
        retriever = Retriever.load(str(place), device=device)
        found, named = retriever.fingerprint(), pair["retriever"]["fingerprint"]
        index = PassageIndex.load(_piece(folder, pair["index"], "dataset", token), fingerprint=found)
        if found != named:
            raise InputError(
                f"{PAIR_FILE} of {name} names retriever {named}, but the one found is {found}: they belong to "
                "different pairs. Load another revision, copy the folder again or run train.py again."
            )
        check_fits(index, retriever.dimensions)
        contexts = dict(pair["contexts"])
        decoding = Decoding(
            **{each.name: contexts.pop(each.name) for each in fields(Decoding) if each.name in contexts}
        )
        return cls(generator, retriever, index, **pair["retrieval"], decoding=decoding, **contexts)

    def answer(self, question: str, *, top_k: int | None = None) -> Answer:
        """Answer one question; see `answers`."""
        return self.answers([question], top_k=top_k)[0]

    def answers(self, questions: Sequence[str], *, top_k: int | None = None) -> list[Answer]:
        """Answer questions from the passages, greedily, each with its sources.

        Raises TypeError for anything but texts, InputError for an empty one.
        """
        questions = _checked(questions)
        k = self.top_k if top_k is None else top_k
        if not isinstance(k, Integral):
            raise TypeError(f"expected top_k as a whole number, found {k!r}")
        if k < 1:
            raise InputError(f"Expected top_k to be at least 1, found {k}.")
        k = int(k)  # FAISS takes no integer of NumPy
        found = self.searcher.search(questions, k)
        rows = found.rows.tolist()
        chosen = self._builder.chosen(questions, rows, found.vectors, top_k=k)
        contexts = [self._builder.write(kept, ranked) for kept, ranked in zip(chosen, rows, strict=True)]
        written = self.generator.write(questions, contexts, **self.decoding.limits(self.no_answer_threshold is None))
        written = [each.kept_above(self.no_answer_threshold) for each in written]
        sources = [self._sources(*each) for each in zip(rows, found.scores.tolist(), chosen, strict=True)]
        return [
            Answer(each.text, each.score, context, source)
            for each, context, source in zip(written, contexts, sources, strict=True)
        ]

    def _sources(self, rows: Sequence[int], scores: Sequence[float], chosen: Sequence[Chosen]) -> tuple[Source, ...]:
        """The passages of one answer, best first, with the places of their sentences in the context."""
        passages = self.index.passages
        used: dict[int, list[int]] = {}
        for rank, number, _ in chosen:
            used.setdefault(rank, []).append(number)
        sources = []
        for rank, (row, score) in enumerate(zip(rows, scores, strict=True)):
            spans = sentence_spans(passages.texts[row]) if rank in used else []
            places = tuple(spans[number] for number in used.get(rank, ()))
            sources.append(Source(passages.ids[row], passages.titles[row], passages.texts[row], score, places))
        return tuple(sources)


def _checked(questions: Sequence[str]) -> list[str]:
    """The questions without superfluous spaces. Raises TypeError, or InputError for an empty one."""
    if isinstance(questions, str | bytes) or not isinstance(questions, Iterable):
        raise TypeError(f"expected a list of questions, found {questions!r}; `answer` takes a single question")
    questions = list(questions)
    for question in questions:
        if not isinstance(question, str):
            raise TypeError(f"expected a question as a text (str), found {question!r}")
    questions = [" ".join(question.split()) for question in questions]
    if not all(questions):
        raise InputError("Expected a question, found an empty text.")
    return questions


def _check_machine(device: str, precision: str | None) -> None:
    """Raise InputError for a device that PyTorch does not find, or a precision of another name."""
    if precision not in (None, FLOAT32, BF16):
        raise InputError(f"precision: expected {FLOAT32!r}, {BF16!r} or None, found {precision!r}.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cause = " ".join(str(error).split())[:200]
        raise InputError(
            f"device: expected one that PyTorch has on this machine, such as 'cpu', 'cuda' or 'cuda:1', found "
            f"{device!r} ({cause}). Give another one, or none: a GPU is then used if there is one."
        ) from error


def _piece(folder: Path, piece: dict, repo_type: str, token: str | None) -> Path:
    """The folder of one piece of the pair: beside cozyrag.json, or a Hub repository at the revision it names."""
    if "folder" in piece:
        place = folder / piece["folder"]
        if not place.resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"{folder / PAIR_FILE}: expected a piece of the pair in its own folder, found {piece['folder']!r}, "
                "which is outside. Nothing is read from there. Move the piece into the folder, or get the pair again."
            )
        return place
    return _download(piece["repo"], revision=piece["revision"], token=token, repo_type=repo_type)


def _download(repo: str, *, revision: str | None, token: str | None, repo_type: str = "model") -> Path:
    """The cache folder of a repository at a revision; files that it holds already are not downloaded again."""

    def fetch() -> str:
        return snapshot_download(repo, revision=revision, token=token, repo_type=repo_type, allow_patterns=FETCHED)

    try:
        return Path(patiently(fetch, tries=4))
    except HUB_FAULTS as error:
        what, remedy = explain(error, repo, writing=False)
        at = f" at revision {revision!r}" if revision else ""
        raise InputError(
            f"Expected a folder that train.py wrote or a repository on the Hub, found no folder {repo!r}, and the "
            f"repository could not be downloaded{at}: {what}. To load it, {remedy}, then try again; downloaded files "
            "are kept."
        ) from error
