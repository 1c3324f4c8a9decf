"""The pairs that a benchmark compares: the one given and the untuned one that it was trained from.

MODEL is the output folder of a run, a repository on the Hub, or `embedded`, the untuned pair of the package. Left out:
passages and questions (corpus.py, suites.py).
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download

from cozyrag.config import parse_settings
from cozyrag.config_checks import EMBEDDED, SCRATCH
from cozyrag.models.generator import Decoding, Generator
from cozyrag.models.retriever import Retriever
from cozyrag.pair_file import PAIR_FILE, read_pair
from cozyrag.pipeline import CozyRAG
from cozyrag.retrieval.hybrid import Weights
from cozyrag.retrieval.passage_index import PassageIndex
from cozyrag.retrieval.reranking import Reranking
from cozyrag.runtime.assets import GENERATOR_FOLDER

UNTUNED = "untuned baseline"


@dataclass(frozen=True, kw_only=True)
class ReadingSettings(Decoding):
    """How questions become contexts and answers. All rows of a table share it, so that they compare."""

    top_k: int
    context_filter: str
    stemmer: str


@dataclass(frozen=True)
class Pair:
    """A generator and a retriever, with their search mode and the index that they came with, if any.

    `weights`: fusion weights, None: to be fitted; `threshold`: see `CozyRAG`; `reranking`: of the search in its mode.
    """

    name: str
    generator: Generator
    retriever: Retriever
    mode: str
    weights: Weights | None = None
    threshold: float | None = None
    index: PassageIndex | None = None
    reranking: Reranking | None = None


def load_pair(model: str, device: torch.device, precision: str | None = None) -> tuple[Pair, ReadingSettings]:
    """Load MODEL. precision: see `CozyRAG.from_pretrained`. Raises InputError if there is no usable pair there."""
    if model == EMBEDDED:
        chosen = parse_settings([]).contexts
        retriever = load_retriever(EMBEDDED, chosen.passage_tokens, device)
        pair = Pair(EMBEDDED, load_generator(EMBEDDED, device), retriever, chosen.retrieval)
        return pair, _reading_settings(vars(chosen))
    made = CozyRAG.from_pretrained(model, device=str(device), precision=precision)
    pair = Pair(
        Path(model).name, made.generator, made.retriever, made.searcher.mode, made.searcher.weights,
        made.no_answer_threshold, made.index, made.searcher.reranking,
    )  # fmt: skip
    facts = read_pair(Path(model) if Path(model).is_dir() else Path(hf_hub_download(model, PAIR_FILE)).parent)
    return pair, _reading_settings({"context_filter": "sparse"} | facts["contexts"] | facts["retrieval"])


def _reading_settings(known: dict) -> ReadingSettings:
    names = {each.name for each in fields(ReadingSettings)}
    return ReadingSettings(**{name: value for name, value in known.items() if name in names})


def load_retriever(name: str, max_tokens: int | None, device: torch.device) -> Retriever:
    """A retriever by name (or "embedded") that reads at most `max_tokens` of a passage."""
    if name == EMBEDDED:
        return Retriever.load_embedded(max_tokens=max_tokens, device=str(device))
    return Retriever.load(name, max_tokens=max_tokens, device=str(device))


def load_generator(name: str, device: torch.device, *, chat_template: bool = True) -> Generator:
    """A generator by name (or "embedded"), in evaluation mode."""
    generator = Generator.load(str(GENERATOR_FOLDER) if name == EMBEDDED else name, chat_template=chat_template)
    generator.model.to(device).eval()
    return generator


def run_settings(model: str) -> dict:
    """The content of settings.json in the output folder of a run; {} if there is none."""
    path = Path(model) / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def base_names(model: str, retriever: str | None, generator: str | None) -> tuple[str | None, str | None]:
    """The (retriever, generator) that a model was trained from: those given, else those in its settings.json."""
    noted = {"retriever": EMBEDDED, "generator": EMBEDDED} if model == EMBEDDED else run_settings(model)
    return retriever or noted.get("retriever"), generator or noted.get("generator")


def load_base(model: str, pair: Pair, names: tuple[str | None, str | None], device: torch.device) -> Pair | str:
    """The untuned baseline of a pair, or the reason why there is none.

    Raises InputError if a model cannot be loaded.
    """
    if model == EMBEDDED:
        return f"this model is the {UNTUNED}"
    retriever, generator = names
    if retriever is None or generator is None:
        return "no settings.json names the models it was trained from: give --base_retriever and --base_generator"
    if generator == SCRATCH:
        return "its generator was trained from scratch"
    untuned = load_generator(generator, device, chat_template=bool(pair.generator.tokenizer.chat_template))
    untuned.precision = pair.generator.precision
    return Pair(UNTUNED, untuned, load_retriever(retriever, pair.retriever.model.max_seq_length, device), pair.mode)
