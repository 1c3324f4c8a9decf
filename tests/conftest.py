"""Fixtures of the whole suite: no Hub, one thread, tiny models made once."""

import json
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import faiss  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from accelerate.utils import set_seed  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)
faiss.omp_set_num_threads(1)
# A machine that does other work is slow at times; that is no fault of what is tested.
# Two runs of one commit try the same inputs; COZYRAG_TEST_SEED, like tests/fuzz_run.py, tries new ones.
settings.register_profile(
    "patient",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="COZYRAG_TEST_SEED" not in os.environ,
)
settings.load_profile("patient")


def seed_everything():
    """A test's numbers are its own: with several workers its neighbours differ from run to run.

    COZYRAG_TEST_SEED tries the suite on other numbers.
    """
    set_seed(int(os.environ.get("COZYRAG_TEST_SEED", "0")))


@pytest.fixture(scope="module", autouse=True)
def seeded_module():
    seed_everything()


@pytest.fixture(autouse=True)
def seeded_test(seeded_module):
    seed_everything()


@pytest.fixture(scope="session", autouse=True)
def machine_without_bf16():
    """What is computed, launched processes included, does not depend on the machine. Tests of the precision put in
    machines of their own."""
    import cozyrag.runtime.precision

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cozyrag.runtime.precision, "native_bf16", lambda device: False)
        patched.setenv(cozyrag.runtime.precision.FLOAT32_ONLY, "1")
        yield


@pytest.fixture(scope="session")
def generator_path(tmp_path_factory):
    """Checkpoint folder of the tiny generator."""
    return tiny.make_generator(tmp_path_factory.mktemp("models") / "generator")


@pytest.fixture(scope="session")
def retriever_path(tmp_path_factory):
    """Checkpoint folder of the tiny retriever."""
    return tiny.make_retriever(tmp_path_factory.mktemp("models") / "retriever")


@pytest.fixture(scope="session")
def reranker_path(tmp_path_factory, retriever_path):
    """Checkpoint folder of the tiny reranker, untrained."""
    return tiny.make_reranker(tmp_path_factory.mktemp("reranker") / "base", retriever_path)


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
def pair_folder(tmp_path_factory, generator_path, retriever_path, corpus_files):
    """A tiny pair with its index, as a run leaves it; reads three passages, 60 tokens of them."""
    from cozyrag.data.passages import read_passages
    from cozyrag.models.generator import Generator
    from cozyrag.models.retriever import Retriever
    from cozyrag.pair_file import describe_pair
    from cozyrag.retrieval.passage_index import PassageIndex, passage_text

    folder = tmp_path_factory.mktemp("whole") / "my-rag"
    retriever = Retriever.load(str(retriever_path))
    passages = read_passages(str(corpus_files["passages"]))[0]
    texts = [passage_text(row["title"], row["text"]) for row in passages]
    index = PassageIndex(
        passages, retriever.encode(texts, kind="document", batch_size=40), fingerprint=retriever.fingerprint()
    )
    Generator.load(str(generator_path)).save(folder / "generator")
    retriever.save(folder / "retriever")
    index.save(folder / "index")
    facts = describe_pair(
        fingerprint=index.fingerprint,
        retrieval={"mode": "dense", "stemmer": "none", "weights": {"vectors": 15.0, "sentence_words": 0.0}},
        top_k=3,
        context_tokens=60,
        answer_tokens=4,
    )
    (folder / "cozyrag.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium of this machine, if there is one and Playwright to drive it.

    It ends with its module: while it is open, Playwright has an event loop running, in which asyncio.run fails.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def short_run(corpus_files, generator_path, retriever_path):
    """Settings of a run of one round, 5 steps and 3, without the output folder."""
    files = [part for name, path in corpus_files.items() for part in (f"--{name}", str(path))]
    models = ["--generator", str(generator_path), "--retriever", str(retriever_path)]
    small = (
        "--rounds 1 --generator_steps 5 --retriever_steps 3 --generator_batch_size 8 --retriever_batch_size 8 "
        "--context_tokens 48 --top_k 2 --answer_tokens 4 --threads 1 --logging_steps 2 "
        "--generator_learning_rate 1e-3 --retriever_learning_rate 1e-3 --feedback_weight 0.5 "
        "--mixed_precision no"
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


@pytest.fixture
def encoded(monkeypatch):
    """The texts that were encoded."""
    from cozyrag.models.retriever import Retriever

    seen, real = [], Retriever.encode_passages

    def encode(self, texts, spans, **options):
        seen.extend(texts)
        return real(self, texts, spans, **options)

    monkeypatch.setattr(Retriever, "encode_passages", encode)
    return seen
