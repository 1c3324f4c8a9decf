"""The pairs that a benchmark compares: the one asked for, the one it was trained from, and how they are to be read with.

MODEL is a run's output folder, a repository on the Hub, or `embedded`, the untuned pair that comes with the package. Left
out: passages and questions (searching.py, suites.py).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from cozyrag.config import parse_settings
from cozyrag.config_checks import EMBEDDED, SCRATCH
from cozyrag.models.generator import Decoding, Generator
from cozyrag.models.retriever import Retriever
from cozyrag.pipeline import CozyRAG
from cozyrag.retrieval.hybrid import Weights
from cozyrag.retrieval.passage_index import PassageIndex
from cozyrag.runtime.assets import GENERATOR_FOLDER


@dataclass(frozen=True, kw_only=True)
class Reading(Decoding):
    """How questions become contexts and answers; the same for all rows of a table, so that they compare."""

    top_k: int
    context_filter: str
    stemmer: str


@dataclass(frozen=True)
class Pair:
    """Two models. `weights`: of the hybrid search, None where they are to be fitted; `index`: the one the pair came with.

    `mode`: how the pair searches; `threshold`: above which probability of writing nothing it keeps silent, if it may.
    """

    name: str
    generator: Generator
    retriever: Retriever
    mode: str
    weights: Weights | None
    threshold: float | None
    index: PassageIndex | None


def load_pair(model: str, device: torch.device) -> tuple[Pair, Reading]:
    """The pair asked for. Raises InputError where nothing usable has that name."""
    if model == EMBEDDED:
        chosen = parse_settings([]).contexts
        retriever = load_retriever(EMBEDDED, chosen.passage_tokens, device)
        return Pair(EMBEDDED, load_generator(EMBEDDED, device), retriever, chosen.retrieval, None, None, None), Reading.of(chosen)  # fmt: skip
    made = CozyRAG.from_pretrained(model, device=str(device))
    pair = Pair(
        Path(model).name, made.generator, made.retriever, made.searcher.mode, made.searcher.weights,
        made.no_answer_threshold, made.index,
    )  # fmt: skip
    return pair, Reading.of(made)


def load_retriever(name: str, max_tokens: int | None, device: torch.device) -> Retriever:
    """A retriever by name, "embedded" too, reading at most so many tokens of a passage."""
    if name == EMBEDDED:
        return Retriever.load_embedded(max_tokens=max_tokens, device=str(device))
    return Retriever.load(name, max_tokens=max_tokens, device=str(device))


def load_generator(name: str, device: torch.device, *, chat_template: bool = True) -> Generator:
    """A generator by name, "embedded" too, ready to answer."""
    generator = Generator.load(str(GENERATOR_FOLDER) if name == EMBEDDED else name, chat_template=chat_template)
    generator.model.to(device).eval()
    return generator


def settings_of(model: str) -> dict:
    """The settings of the run that left this folder; {} where it is none or holds none."""
    path = Path(model) / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def base_names(model: str, retriever: str | None, generator: str | None) -> tuple[str | None, str | None]:
    """Names of the (retriever, generator) that a model was trained from: those given, else those its run noted."""
    noted = {"retriever": EMBEDDED, "generator": EMBEDDED} if model == EMBEDDED else settings_of(model)
    return retriever or noted.get("retriever"), generator or noted.get("generator")


def load_base(model: str, pair: Pair, names: tuple[str | None, str | None], device: torch.device) -> Pair | str:
    """The pair as it was before training, reading as long passages; or why there is none to compare with.

    Raises InputError where a model that is named cannot be had.
    """
    if model == EMBEDDED:
        return "this model is the untuned pair"
    retriever, generator = names
    if retriever is None or generator is None:
        return "no settings.json says what it was trained from: name it with --base_retriever and --base_generator"
    if generator == SCRATCH:
        return "its generator was trained from nothing"
    untuned = load_generator(generator, device, chat_template=bool(pair.generator.tokenizer.chat_template))
    untuned.precision = pair.generator.precision
    return Pair(
        "untuned pair",
        untuned,
        load_retriever(retriever, pair.retriever.model.max_seq_length, device),
        pair.mode,
        None,
        None,
        None,
    )
