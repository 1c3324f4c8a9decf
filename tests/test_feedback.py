"""LM-supervised retrieval: the likelihoods, their order, and when they are read from disk."""

import numpy as np
import pytest
from accelerate import Accelerator
from datasets import Dataset
from tiny import corpus

from cozyrag.models.generator import Generator
from cozyrag.retrieval.contexts import CONTEXT_FEATURES, ContextBuilder
from cozyrag.retrieval.passage_index import Passages
from cozyrag.training.lm_feedback import answer_likelihoods


@pytest.fixture
def generator(generator_path):
    return Generator.load(str(generator_path))


@pytest.fixture(scope="module")
def table():
    passages, questions = corpus(12)
    rows = [
        {
            **question,
            "answers": question["answers"] if number else [],
            "rows": [(number // 2 + shift) % 12 for shift in (0, 3, 5)],
            "scores": [1.0] * 3,
            "context": "",
            "answer_in_context": False,
            "noised": False,
            "gold_row": number // 2,
            "positive": number // 2,
            "negatives": [],
        }
        for number, question in enumerate(questions[:7])
    ]
    return Dataset.from_list(rows, features=CONTEXT_FEATURES), Passages.of(Dataset.from_list(passages))


def likelihoods_of(generator, table, folder, *, passages=2):
    contexts, columns = table
    builder = ContextBuilder(columns, generator.count_tokens, top_k=3, budget=64)
    return answer_likelihoods(
        Accelerator(cpu=True),
        generator,
        contexts,
        builder.score_by,
        lambda: builder,
        lambda texts: np.zeros((len(texts), 2), dtype=np.float32),
        passages=passages,
        context_tokens=64,
        batch_size=3,
        folder=folder,
    )


def test_each_likelihood_is_that_of_its_question_and_passage(generator, table, tmp_path):
    likelihoods = likelihoods_of(generator, table, tmp_path)
    contexts, columns = table
    assert likelihoods.shape == (7, 2) and likelihoods.dtype == np.float32
    assert np.isnan(likelihoods[0]).all()  # a question without an answer
    builder = ContextBuilder(columns, generator.count_tokens, top_k=1, budget=64)
    for row in range(1, 7):
        for place, passage in enumerate(contexts[row]["rows"][:2]):
            [context] = builder.contexts([contexts[row]["question"]], [[passage]])
            (alone,) = generator.log_likelihoods(
                [contexts[row]["question"]], [context], [contexts[row]["answers"][0]], context_tokens=64
            )
            assert likelihoods[row, place] == pytest.approx(alone, rel=1e-4)


def test_likelihoods_are_kept_until_a_weight_or_the_table_changes(generator, table, tmp_path, monkeypatch):
    first = likelihoods_of(generator, table, tmp_path)
    compute = Generator.log_likelihoods
    monkeypatch.setattr(Generator, "log_likelihoods", None)  # a call would fail
    np.testing.assert_array_equal(likelihoods_of(generator, table, tmp_path), first)
    monkeypatch.setattr(Generator, "log_likelihoods", compute)
    generator.model.get_input_embeddings().weight.data *= 1.5
    assert not np.array_equal(likelihoods_of(generator, table, tmp_path), first, equal_nan=True)
    assert likelihoods_of(generator, table, tmp_path, passages=3).shape == (7, 3)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
