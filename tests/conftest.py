"""Fixtures of the whole suite: no Hub, one thread, tiny models made once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import faiss  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
faiss.omp_set_num_threads(1)


@pytest.fixture(scope="session")
def generator_path(tmp_path_factory):
    """Checkpoint folder of the tiny generator."""
    return tiny.make_generator(tmp_path_factory.mktemp("models") / "generator")


@pytest.fixture(scope="session")
def retriever_path(tmp_path_factory):
    """Checkpoint folder of the tiny retriever."""
    return tiny.make_retriever(tmp_path_factory.mktemp("models") / "retriever")


@pytest.fixture(scope="session")
def corpus_files(tmp_path_factory):
    """Files of the tiny corpus: {"questions": ..., "eval_questions": ..., "passages": ...}."""
    folder = tmp_path_factory.mktemp("corpus")
    passages, questions = tiny.corpus()
    return {
        "questions": tiny.write_jsonl(folder / "train.jsonl", questions[:64]),
        "eval_questions": tiny.write_jsonl(folder / "eval.jsonl", questions[64:]),
        "passages": tiny.write_jsonl(folder / "passages.jsonl", passages),
    }
