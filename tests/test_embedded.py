"""The packaged generator: small, quick to load, and described by its card."""

import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.runtime.assets import GENERATOR_FOLDER


@pytest.fixture(scope="module")
def generator():
    return Generator.load(str(GENERATOR_FOLDER))


def test_it_is_an_ordinary_small_checkpoint(generator):
    assert isinstance(AutoModelForCausalLM.from_pretrained(GENERATOR_FOLDER), GPT2LMHeadModel)
    assert sum(parameter.numel() for parameter in generator.model.parameters()) <= 12_000_000
    assert sum(path.stat().st_size for path in GENERATOR_FOLDER.rglob("*")) <= 24_000_000
    assert {tensor.dtype for tensor in load_file(GENERATOR_FOLDER / "model.safetensors").values()} == {torch.float16}
    assert all(torch.isfinite(parameter).all() for parameter in generator.model.parameters())


def test_the_package_stays_small():
    package = GENERATOR_FOLDER.parents[1]
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 40_000_000


def test_its_tokenizer_encodes_any_bytes():
    tokenizer = AutoTokenizer.from_pretrained(GENERATOR_FOLDER)
    text = "Łódź, 東京 and\tnaïve 🦊 cost 5 €."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id is not None


def test_it_has_learned_which_answer_belongs_to_a_context(generator):
    """The correct answer is more likely with the passage that contains it than with another one."""
    pairs = [
        ("What is the capital of Ruritania?", "Ruritania: The capital of Ruritania is Strelsau.", "Strelsau"),
        ("Who founded the village?", "The village: It was founded by Anna Holm.", "Anna Holm"),
        ("In which year was the bridge built?", "The bridge: It was built in 1874.", "1874"),
        ("What do the bears eat?", "Bears: The bears eat berries.", "berries"),
    ]
    questions, contexts, answers = zip(*pairs, strict=True)
    own = generator.log_likelihoods(questions, contexts, answers, context_tokens=64)
    other = generator.log_likelihoods(questions, contexts[1:] + contexts[:1], answers, context_tokens=64)
    assert (own > other).mean() > 0.5 and own.mean() > other.mean()


def test_generator_and_retriever_load_in_seconds():
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        began = time.perf_counter()
        Generator.load(str(GENERATOR_FOLDER))
        Retriever.load_embedded()
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 5


def test_its_card_has_the_licence_and_the_numbers():
    card = (GENERATOR_FOLDER / "README.md").read_text(encoding="utf-8")
    for part in ("license:", "EM", "F1", "10,570", "pretrain_generator.py", "evaluate_generator.py", "Limits"):
        assert part in card, part
