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


@pytest.fixture(scope="session")
def short_run(corpus_files, generator_path, retriever_path):
    """Settings of a run of one round, 5 steps and 3, without the output folder."""
    files = [part for name, path in corpus_files.items() for part in (f"--{name}", str(path))]
    models = ["--generator", str(generator_path), "--retriever", str(retriever_path)]
    small = (
        "--rounds 1 --generator_steps 5 --retriever_steps 3 --generator_batch_size 8 --retriever_batch_size 8 --context_tokens 48 --top_k 2 "
        "--answer_tokens 4 --threads 1 --logging_steps 2 --generator_learning_rate 1e-3 --retriever_learning_rate 1e-3 --feedback_weight 0.5"
    )
    return [*files, *models, *small.split()]


@pytest.fixture(scope="session")
def undisturbed(short_run, tmp_path_factory):
    """What the run leaves when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    from kill_run import left

    from cozyrag.run import train

    train([*short_run, "--output_dir", str(folder)])
    return left(folder, rounds=1)
