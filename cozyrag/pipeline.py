"""Inference with a trained pair: `CozyRAG.from_pretrained(folder or repo).answer("...")` gives an answer with sources.

Left out: training (api.py), the arithmetic of evaluating and calibrating (pair_evaluation.py, calibration.py).
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path
from shlex import quote
from typing import Any, overload

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download

from cozyrag.data.rows import BadValue, Columns, text_of
from cozyrag.data.sentences import sentence_spans
from cozyrag.errors import InputError
from cozyrag.evaluation.calibration import Calibration, certainty_of, check_least
from cozyrag.hub.background_push import push_run
from cozyrag.models.generator import Decoding, Generator
from cozyrag.models.int8_encoding import BF16, FLOAT32, reading_precision
from cozyrag.models.reranker import Reranker
from cozyrag.models.retriever import Retriever
from cozyrag.pair_evaluation import Evaluated, Evaluation, check_counts, questions_for
from cozyrag.pair_file import PAIR_FILE, SavedPair, check_piece, models_of, pieces_of, read_pair, starts_text
from cozyrag.retrieval.contexts import Chosen, ContextBuilder, sentence_source
from cozyrag.retrieval.hybrid import Searcher, Weights
from cozyrag.retrieval.opening import Index, check_fits, open_index
from cozyrag.retrieval.reranking import Reranking
from cozyrag.retrieval.words_on_disk import word_search
from cozyrag.runtime.distributed import own_state
from cozyrag.runtime.fingerprints import weights_fingerprint
from cozyrag.runtime.hub_retry import HUB_FAULTS, explain, patiently
from cozyrag.runtime.precision import fitting

# The files downloaded from a repository: no pickles, no code, and no index.faiss, which is rebuilt.
FETCHED = ["*.json", "*.jsonl", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.parquet", "README.md"]


@dataclass(frozen=True)
class Source:
    """A passage that was retrieved for a question.

    `score`: its cosine with the question, its BM25 score, or the weighted sum of hybrid.py, with what a reranker adds
    (reranking.py). `used`: (start, end), in characters of `text`, of each sentence in the context. `metadata`: its
    other columns in the file of passages, such as url or page.
    """

    id: str
    title: str
    text: str
    score: float
    used: tuple[tuple[int, int], ...] = ()
    metadata: Mapping[str, str | int | float | bool] = field(default_factory=dict, hash=False)

    @property
    def read(self) -> tuple[str, ...]:
        """The sentences that the generator read."""
        return tuple(self.text[start:end] for start, end in self.used)

    @property
    def page(self) -> str:
        """The page on which it begins, such as "p. 3", if its metadata have one; else ""."""
        return f"p. {self.metadata['page']}" if self.metadata.get("page") else ""


@dataclass(frozen=True)
class Answer:
    """`text` (empty if the pair abstains), `score` (its certainty, 0 to 1), the context that the generator read, and
    the passages found.

    `score` is the estimated probability that the answer is right if the pair is calibrated (`CozyRAG.calibration`),
    else the geometric mean of the token probabilities.
    """

    text: str
    score: float
    context: str
    passages: tuple[Source, ...]


class CozyRAG:
    """A generator, a retriever and their index, ready to answer.

    Threads can share it; their calls are answered one after another, since tokenizers and stemmers have state of their
    own, and one call uses all cores already. Many questions are answered fastest in one call.

    Args:
        mode, weights, stemmer: of the search; see `Searcher`.
        reranker, reranking: the model that orders the first passages again, and its depth and weight; see `Reranking`.
        top_k: passages whose sentences compete for a context.
        decoding: limits of contexts and answers.
        context_filter: how sentences are chosen; see `ContextBuilder`.
        no_answer_threshold: the probability of an empty answer above which the pair abstains; None: it never does.
        calibration: of the certainty of answers, as its run measured it; None: it is the generator's own.
        min_certainty: answers that are less certain become empty. An attribute that can be set at any time; None: off.
    """

    saved: SavedPair | None = None  # where it was loaded from

    def __init__(
        self,
        generator: Generator,
        retriever: Retriever,
        index: Index,
        *,
        mode: str,
        weights: dict[str, float],
        stemmer: str,
        top_k: int,
        decoding: Decoding,
        context_filter: str = "sparse",
        no_answer_threshold: float | None = None,
        calibration: Calibration | None = None,
        min_certainty: float | None = None,
        reranker: Reranker | None = None,
        reranking: dict | None = None,
    ):
        check_least(min_certainty)
        generator.only_read()
        self._one_at_a_time = threading.Lock()
        self.generator, self.retriever, self.reranker, self.index = generator, retriever, reranker, index
        self.top_k, self.decoding, self.no_answer_threshold = top_k, decoding, no_answer_threshold
        self.calibration, self.min_certainty = calibration, min_certainty
        lexical, words = word_search(index, mode=mode, stemmer=stemmer)
        self.searcher = Searcher(
            index,
            lexical,
            encode=lambda texts: retriever.encode(texts, kind="query", batch_size=64),
            mode=mode,
            words=words,
            weights=Weights(**weights),
            reranking=Reranking(reranker.score, index.passages, **reranking or {}) if reranker else None,
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
        min_certainty: float | None = None,
    ) -> "CozyRAG":
        """Load the output folder of train.py, or a pair that was pushed as `user/name`.

        From the Hub, the generator comes at `revision` (a branch, a tag such as round-1, a commit; None: the newest),
        and the retriever and the index at the exact revisions that it names. Later loads need no network.

        Args:
            precision: of inference, "float32" or "bf16"; None: bf16 if the machine has it and it is faster.
            min_certainty: answers that are less certain, from 0 to 1, become empty: "I do not know".

        Raises:
            InputError: the name has no usable pair, generator, retriever and index do not belong together, or this
                machine has no such device.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        _check_machine(device, precision)
        check_least(min_certainty)
        folder = Path(name) if Path(name).is_dir() else _download(str(name), revision=revision, token=token)
        pair = read_pair(folder)
        calibration = Calibration.read(pair.get("calibration"), folder / PAIR_FILE)
        pieces = {
            role: _piece(folder, pair[role], "dataset" if role == "index" else "model", token)
            for role in pieces_of(pair)
        }
        for role in models_of(pair):
            check_piece(pieces[role], pair[role])
        generator = Generator.load(str(pieces["generator"]), start_of_text=starts_text(pair))
        expected, found = pair["generator"].get("fingerprint"), weights_fingerprint(generator.model)
        if expected not in (None, found):
            raise InputError(
                f"{folder / PAIR_FILE} names generator {expected}, but the one beside it is {found}: the files come "
                "from different rounds or runs. Copy the whole folder again, or train again."
            )
        generator.model.to(device).eval()  # type: ignore[arg-type]  # a decorator of transformers hides `self`
        generator.precision = precision or reading_precision(fitting(torch.device(device).type).name)
        retriever = Retriever.load(str(pieces["retriever"]), device=device)
        found, named = retriever.fingerprint(), pair["retriever"]["fingerprint"]
        index = open_index(pieces["index"], fingerprint=found)
        if found != named:
            raise InputError(
                f"{PAIR_FILE} of {name} names retriever {named}, but the one found is {found}: they belong to "
                "different pairs. Load another revision, copy the folder again or train again."
            )
        check_fits(index, retriever.dimensions)
        contexts = dict(pair["contexts"])
        decoding = Decoding(
            **{each.name: contexts.pop(each.name) for each in fields(Decoding) if each.name in contexts}
        )
        reranker = None
        if "reranker" in pieces:
            reranker = _load_reranker(pieces["reranker"], pair, device)
            reranker.precision = generator.precision
        search = pair["retrieval"] | {"reranker": reranker}
        made = cls(generator, retriever, index, **search, decoding=decoding, **contexts)
        made.calibration, made.min_certainty = calibration, min_certainty
        made.saved = SavedPair(folder, pair, pieces)
        return made

    def answer(self, question: str, *, top_k: int | None = None) -> Answer:
        """Answer one question; see `answers`."""
        return self.answers([question], top_k=top_k)[0]

    def answers(self, questions: Sequence[str], *, top_k: int | None = None) -> list[Answer]:
        """Answer questions from the passages, greedily, each with its sources.

        Raises TypeError for anything but texts, InputError for one that is empty or not UTF-8.
        """
        check_least(self.min_certainty)
        questions, k = _checked(questions), self._passages_to_find(top_k)
        with self._one_at_a_time:
            return self._answers(questions, k) if questions else []

    @overload
    def retrieve(self, question: str, top_k: int | None = None) -> tuple[Source, ...]: ...  # type: ignore[overload-overlap]

    @overload
    def retrieve(self, question: Sequence[str], top_k: int | None = None) -> list[tuple[Source, ...]]: ...

    def retrieve(
        self, question: str | Sequence[str], top_k: int | None = None
    ) -> tuple[Source, ...] | list[tuple[Source, ...]]:
        """The best passages for a question, best first, without an answer; for a list of questions, a list of those.

        Raises as `answers`.
        """
        asked, k = _checked([question] if isinstance(question, str) else question), self._passages_to_find(top_k)
        if not asked:
            return []
        with self._one_at_a_time:
            found = self.searcher.search(asked, k)
        sources = [self._sources(*each, ()) for each in zip(found.rows.tolist(), found.scores.tolist(), strict=True)]
        return sources[0] if isinstance(question, str) else sources

    def _passages_to_find(self, top_k: int | None) -> int:
        """A checked `top_k`; None: the pair's own."""
        k = self.top_k if top_k is None else top_k
        if not isinstance(k, Integral):
            raise TypeError(f"expected top_k as a whole number, found {k!r}")
        if k < 1:
            raise InputError(f"Expected top_k to be at least 1, found {k}.")
        return int(k)  # FAISS takes no integer of NumPy

    def _answers(self, questions: list[str], k: int) -> list[Answer]:
        found = self.searcher.search(questions, k)
        rows = found.rows.tolist()
        chosen = self._builder.chosen(questions, rows, found.vectors, top_k=k)
        contexts = [self._builder.write(kept, ranked) for kept, ranked in zip(chosen, rows, strict=True)]
        written = self.generator.write(questions, contexts, **self.decoding.limits(self.no_answer_threshold is None))
        written = [each.kept_above(self.no_answer_threshold) for each in written]
        sources = [self._sources(*each) for each in zip(rows, found.scores.tolist(), chosen, strict=True)]
        certain = certainty_of(self.calibration, [each.text for each in written], [each.score for each in written])
        least = self.min_certainty or 0.0
        return [
            Answer(each.text if certainty >= least else "", certainty, context, source)
            for each, certainty, context, source in zip(written, certain, contexts, sources, strict=True)
        ]

    def evaluate(
        self,
        questions: Any,
        *,
        columns: dict[str, str] | None = None,
        limit: int | None = None,
        batch_size: int = 32,
        baselines: bool = False,
    ) -> Evaluation:
        """The scores of the pair on questions with known answers, as `cozyrag evaluate` prints them.

        `min_certainty` plays no part: the table shows what each value would do.

        Args:
            questions: paths, a list of dictionaries or a Dataset, as for `cozyrag.train`.
            columns: other names of the columns, such as {"question": "q"}.
            limit: a fixed sample of so many questions; None: all.
            baselines: also answer without context, and with the gold passage, which takes three times as long.

        Raises:
            InputError: the questions cannot be read.
        """
        how: dict[str, Any] = {"needs_answer": self.no_answer_threshold is None}
        if columns:
            how["columns"] = _columns(columns)
        check_counts(limit=limit, batch_size=batch_size)
        table = questions_for(questions, self._builder, limit=limit, **how)
        with own_state():
            return self.evaluated().on(table, PartialState(), batch_size=batch_size, baselines=baselines)

    def evaluated(self) -> Evaluated:
        """The pair as `evaluate` and `cozyrag evaluate` see it."""
        return Evaluated(
            self.generator, self.searcher, self._builder, self.decoding, self.no_answer_threshold, self.calibration
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pair into a new folder, which `from_pretrained` loads, with its cards and its present `top_k` and
        `no_answer_threshold`. Raises InputError if the folder holds something."""
        self._saved().copy(Path(folder), top_k=self.top_k, no_answer_threshold=self.no_answer_threshold)

    def push_to_hub(self, repo: str, *, private: bool = False, tag: str | None = None) -> str:
        """Upload the pair as it was loaded, like `cozyrag push`; returns the addresses of its repositories in a phrase.

        Raises PushError, InputError.
        """
        saved = self._saved()
        if not saved.is_whole:
            raise InputError(
                f"push_to_hub: expected a pair in a folder, found one from the Hub. Write it with "
                f"save_pretrained(FOLDER), then `cozyrag push FOLDER {quote(repo)}`."
            )
        return push_run(saved.folder, repo, private=private, tag=tag)

    def _saved(self) -> SavedPair:
        if self.saved is None:
            raise InputError("Expected a pair that from_pretrained or cozyrag.train made, found one made in memory.")
        return self.saved

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
            own = passages.ids[row], passages.titles[row], passages.texts[row]
            sources.append(Source(*own, score, places, passages.metadata_of(row)))
        return tuple(sources)


def _load_reranker(place: Path, pair: Mapping, device: str) -> Reranker:
    """The reranker of a pair. Raises InputError if it is not the one that cozyrag.json names."""
    reranker = Reranker.load(str(place), device=device)
    named, found = pair["reranker"]["fingerprint"], reranker.fingerprint()
    if found != named:
        raise InputError(
            f"{PAIR_FILE} names reranker {named}, but the one found is {found}: they belong to different pairs. Copy "
            "the folder again or train again."
        )
    return reranker


def _columns(names: dict[str, str]) -> Columns:
    """Columns by their names. Raises InputError for an unknown one."""
    known = [each.name for each in fields(Columns)]
    if (
        not isinstance(names, dict)
        or not set(names) <= set(known)
        or not all(isinstance(v, str) for v in names.values())
    ):
        raise InputError(
            f"columns: expected names among {', '.join(known)} with those of your file, found {names!r:.80}."
        )
    return Columns(**names)


def _checked(questions: Sequence[str]) -> list[str]:
    """The questions without superfluous spaces. Raises TypeError, or InputError for one that is empty or no text."""
    if isinstance(questions, str | bytes) or not isinstance(questions, Iterable):
        raise TypeError(f"expected a list of questions, found {questions!r}; `answer` takes a single question")
    questions = list(questions)
    for question in questions:
        if not isinstance(question, str):
            raise TypeError(f"expected a question as a text (str), found {question!r}")
    questions = [" ".join(question.split()) for question in questions]
    if not all(questions):
        raise InputError("Expected a question, found an empty text.")
    for question in questions:
        try:
            text_of(question, f"the question {question!r:.60}")  # JSON and other encodings leave halves of characters
        except BadValue as error:
            raise InputError(f"Expected questions in UTF-8, but {error}. Ask without it, or in UTF-8.") from error
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
            f"Expected the folder of a trained pair or a repository on the Hub, found no folder {repo!r}, and the "
            f"repository could not be downloaded{at}: {what}. To load it, {remedy}, then try again; downloaded files "
            "are kept."
        ) from error
