"""An index in LanceDB that several processes write, one of which is killed, in a folder and in an object store (S3).

The store is moto's, a server on loopback. Left out: what does not depend on the place (test_lancedb.py).
"""

import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from databases import COUNT, QUESTIONS, fill, index_into, local, opened, rows, searcher, settings

from cozyrag.errors import InputError
from cozyrag.models.retriever import Retriever
from cozyrag.pipeline import CozyRAG
from cozyrag.retrieval.opening import open_index
from cozyrag.run import train
from cozyrag.training.rounds import Rounds

MISSING = [name for name in ("lancedb", "moto", "flask", "boto3") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
KILLED = Path(__file__).parent / "killed_indexing.py"
SMALL = ("--shard_size", "8")
SECRET = "very-secret"


class Store:
    """An object store with one bucket, which can be switched off and on."""

    def __init__(self):
        self.port = 0
        self.switch_on()

    def switch_on(self):
        """Serve, with what was stored before, at the same address."""
        from moto.server import ThreadedMotoServer

        self.server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def switch_off(self):
        """Refuse all connections."""
        self.server.stop()

    @property
    def environment(self):
        """The variables by which LanceDB and boto3 find the store."""
        place = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "AWS_ALLOW_HTTP": "true"}
        return place | {"AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": SECRET}


@pytest.fixture(scope="module")
def running():
    """The store of all tests; each has a folder of its own in it."""
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    store = Store()
    own = store.environment
    client = boto3.client(
        "s3",
        endpoint_url=own["AWS_ENDPOINT_URL"],
        region_name=own["AWS_REGION"],
        aws_access_key_id=own["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=SECRET,
    )
    client.create_bucket(Bucket="corpus")
    yield store
    store.switch_off()


@pytest.fixture
def store(running, monkeypatch):
    """The store, with its address in the environment."""
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    return running


@pytest.fixture(params=["folder", "store"])
def place(request, tmp_path):
    """The address of a new database."""
    if request.param == "folder":
        return f"lancedb:{tmp_path / 'db'}"
    request.getfixturevalue("store")
    return f"lancedb:s3://corpus/{tmp_path.name}"


def launched(number, place, passages, retriever):
    """`cozyrag index` in a new process, killed before its write of this number."""
    words = [passages, "--retriever", retriever, "--output", place, "--threads", "1", *SMALL]
    command = [sys.executable, str(KILLED), str(number), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(process):
    """Exit code and errors of a process."""
    errors = process.communicate(timeout=tiny.PATIENCE)[1]
    return process.returncode, errors


def same_as_files(place, passages, retriever, folder):
    """Whether a database has what an index in files has."""
    index_into(folder, passages, retriever)
    mark = Retriever.load(str(retriever), max_tokens=160).fingerprint()
    made, expected = (open_index(each, fingerprint=mark) for each in (place, folder))
    every = np.arange(len(expected))
    return made.passages == expected.passages and np.allclose(made.vectors[every], expected.vectors, atol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_searches_in_a_store_find_what_the_local_index_finds(store, tmp_path, mode):
    place = fill(f"s3://corpus/{tmp_path.name}")
    expected, found = (searcher(each, mode).search(QUESTIONS, 10) for each in (local(), opened(place)))
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
    assert opened(place).passages == local().passages and len(opened(place)) == COUNT


@pytest.mark.slow
def test_a_killed_command_resumes(place, tmp_path, retriever_path, encoded, capsys):
    passages = tiny.write_jsonl(tmp_path / "p.jsonl", rows(30))
    assert ended(launched(3, place, passages, retriever_path))[0] == -9
    index_into(place, passages, retriever_path, *SMALL)
    assert len(encoded) == 30 - 16 and "30 passages, 14 to encode" in capsys.readouterr().out
    assert same_as_files(place, passages, retriever_path, tmp_path / "files")


@pytest.mark.slow
def test_two_commands_at_once_lose_nothing(place, tmp_path, retriever_path, encoded):
    passages = tiny.write_jsonl(tmp_path / "p.jsonl", rows(60))
    found = [ended(each) for each in [launched(0, place, passages, retriever_path) for _ in range(2)]]
    for code, errors in found:
        assert code == 0 or (code == 2 and "what was written is kept" in errors and "Traceback" not in errors)
    encoded.clear()
    index_into(place, passages, retriever_path, *SMALL)
    assert not encoded or {code for code, _ in found} != {0}
    assert same_as_files(place, passages, retriever_path, tmp_path / "files")


def test_a_run_whose_store_is_gone_loses_nothing(
    store, tmp_path, corpus_files, generator_path, retriever_path, monkeypatch
):
    place = f"lancedb:s3://corpus/{tmp_path.name}"
    index_into(place, corpus_files["passages"], retriever_path)
    out = tmp_path / "out"
    run = settings(
        **corpus_files, generator=generator_path, retriever=retriever_path, index=place, output_dir=out,
        freeze_document_encoder=True, rounds=1, generator_steps=2, retriever_steps=1, threads=1, context_tokens=48,
        answer_tokens=4, generator_batch_size=4, retriever_batch_size=4,
    )  # fmt: skip
    real = Rounds.run_generator_phase

    def losing(self):
        real(self)
        store.switch_off()

    with monkeypatch.context() as patched, pytest.raises(InputError, match="cannot be read .*what was written is kept"):
        patched.setattr(Rounds, "run_generator_phase", losing)
        train(run)
    store.switch_on()
    train(run)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().split("\n") if line]
    steps = [(line["phase"], line["step"]) for line in lines if line["kind"] == "step"]
    assert steps == [("generator", 2), ("retriever", 1)]
    assert CozyRAG.from_pretrained(out).answer("What colour is the fox 3?").passages
    assert not any(SECRET.encode() in path.read_bytes() for path in out.rglob("*") if path.is_file())
