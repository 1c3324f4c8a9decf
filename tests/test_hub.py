"""A push: what goes up in which order, and that a failure anywhere costs nothing but the time."""

import importlib
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from cozyrag.errors import InputError
from cozyrag.hub import push_pair
from cozyrag.pipeline import describe_pair

REPO = "me/rag"
CALLS = [
    ("repo", "me/rag-retriever", "model"),
    ("repo", "me/rag-index", "dataset"),
    ("repo", "me/rag", "model"),
    ("commit", "me/rag-retriever", "model"),
    ("commit", "me/rag-index", "dataset"),
    ("commit", "me/rag", "model"),
]
FILES = {
    "generator": {"config.json": b"{}", "model.safetensors": b"\0weights", "README.md": b"# card"},
    "retriever": {"modules.json": b"[]", "1_Pooling/config.json": b"{1}", "model.safetensors": b"\1weights"},
    "index": {"index.json": b"{2}", "passages.parquet": b"PAR1"},
}
httpx = importlib.import_module(HTTPError.__module__.split(".")[0])  # httpx or httpx2, whichever huggingface_hub uses
REQUEST = httpx.Request("POST", "https://huggingface.co/api/repos/create")


class FakeApi:
    """Records what HfApi would be asked for; the call with number `fails_at` raises `error` instead."""

    endpoint = "https://hub.example"

    def __init__(self, *, fails_at=None, error=None):
        self.calls, self.private, self.content, self.messages = [], [], {}, set()
        self.fails_at, self.error = fails_at, error

    def _called(self, *call):
        if len(self.calls) == self.fails_at:
            raise self.error
        self.calls.append(call)

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        assert exist_ok
        self._called("repo", repo_id, repo_type)
        self.private.append(private)

    def create_commit(self, repo_id, operations, *, commit_message, repo_type):
        self._called("commit", repo_id, repo_type)
        given = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
        self.content[repo_id] = {
            name: source if isinstance(source, bytes) else Path(source).read_bytes() for name, source in given.items()
        }
        self.messages.add(commit_message)
        return SimpleNamespace(oid=f"sha-of-{repo_id}")


@pytest.fixture
def folder(tmp_path):
    """A finished run, as far as pushing is concerned; checkpoints and the like are no part of the pair."""
    root = tmp_path / "my run"
    for piece, files in FILES.items():
        for name, content in files.items():
            path = root / piece / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (root / "cozyrag.json").write_text(
        json.dumps(
            describe_pair(
                fingerprint="f" * 16,
                retrieval={"mode": "hybrid", "stemmer": "none", "weights": {"vectors": 15.0, "sentence_words": 0.0}},
                top_k=4,
                context_tokens=64,
                answer_tokens=8,
            )
        )
    )
    (root / "checkpoints").mkdir()
    (root / "checkpoints" / "secret.bin").write_bytes(b"not yours")
    (root / "metrics.jsonl").write_text("{}\n")
    return root


def snapshot(folder):
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_three_repositories_are_written_in_order_the_generator_last(folder):
    api = FakeApi()
    assert push_pair(folder, REPO, api=api) == "https://hub.example/me/rag"
    assert api.calls == CALLS


def test_each_repository_gets_its_piece_and_nothing_else(folder):
    api = FakeApi()
    push_pair(folder, REPO, api=api)
    assert api.content["me/rag-retriever"] == FILES["retriever"]
    assert api.content["me/rag-index"] == FILES["index"]
    generator = api.content["me/rag"]
    assert set(generator) == {*FILES["generator"], "cozyrag.json"} and all(
        generator[name] == content for name, content in FILES["generator"].items()
    )


def test_the_last_commit_names_the_exact_revisions_of_the_other_two(folder):
    api = FakeApi()
    push_pair(folder, REPO, api=api)
    assert json.loads(api.content["me/rag"]["cozyrag.json"]) == json.loads((folder / "cozyrag.json").read_text()) | {
        "generator": {"folder": "."},
        "retriever": {"repo": "me/rag-retriever", "revision": "sha-of-me/rag-retriever", "fingerprint": "f" * 16},
        "index": {"repo": "me/rag-index", "revision": "sha-of-me/rag-index"},
    }


@pytest.mark.parametrize("private", [True, False])
def test_all_three_are_private_or_none(folder, private):
    api = FakeApi()
    push_pair(folder, REPO, private=private, api=api)
    assert api.private == [private] * 3


def test_a_push_leaves_the_folder_as_it_was(folder):
    before = snapshot(folder)
    push_pair(folder, REPO, api=FakeApi())
    assert snapshot(folder) == before


def test_a_folder_may_be_given_as_text_and_pushed_again(folder):
    first, second = FakeApi(), FakeApi()
    push_pair(str(folder), REPO, api=first)
    push_pair(str(folder), REPO, api=second)
    assert first.content == second.content


# ---- failures

ERRORS = [
    httpx.ConnectError("no route to host"),  # what huggingface_hub lets through when there is no network
    HfHubHTTPError("403 Forbidden: no rights", response=httpx.Response(403, request=REQUEST)),
    ConnectionError("Connection reset by peer"),
    HFValidationError("Repo id must be in the form"),
]


@pytest.mark.parametrize("step", range(len(CALLS)))
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_failure_at_any_step_is_told_with_the_way_to_try_again(folder, step, error):
    api, before = FakeApi(fails_at=step, error=error), snapshot(folder)
    with pytest.raises(InputError) as caught:
        push_pair(folder, REPO, api=api)
    message = str(caught.value)
    assert f"`cozyrag push '{folder}' me/rag`" in message and "hf auth login" in message
    assert type(error).__name__ in message and str(error).split(":")[0] in message and str(folder) in message
    assert api.calls == CALLS[:step]
    assert snapshot(folder) == before


@pytest.mark.parametrize("step", range(len(CALLS)))
def test_until_the_last_commit_the_old_pair_stays_what_can_be_loaded(folder, step):
    api = FakeApi(fails_at=step, error=OSError("gone"))
    with pytest.raises(InputError):
        push_pair(folder, REPO, api=api)
    assert "me/rag" not in api.content


def test_trying_again_keeps_private_repositories_private(folder):
    with pytest.raises(InputError) as caught:
        push_pair(folder, REPO, private=True, api=FakeApi(fails_at=0, error=OSError("gone")))
    command = str(caught.value).split("`")[-2]
    assert shlex.split(command) == ["cozyrag", "push", str(folder), REPO, "--private"]


def test_a_fault_of_the_package_keeps_its_traceback(folder):
    with pytest.raises(KeyError):
        push_pair(folder, REPO, api=FakeApi(fails_at=3, error=KeyError("bug")))


def test_the_real_api_without_a_connection_gives_the_same_sentence(folder, monkeypatch):
    before = snapshot(folder)
    with pytest.raises(InputError, match="cozyrag push"):
        push_pair(folder, REPO, api=HfApi(token=False))  # HF_HUB_OFFLINE is set for the suite
    assert snapshot(folder) == before


# ---- nothing to push


def test_without_cozyrag_json_nothing_goes_up(folder):
    (folder / "cozyrag.json").unlink()
    api = FakeApi()
    with pytest.raises(InputError, match="cozyrag.json"):
        push_pair(folder, REPO, api=api)
    assert api.calls == []


@pytest.mark.parametrize("piece", sorted(FILES))
def test_with_a_piece_missing_nothing_goes_up(folder, piece):
    (folder / piece).rename(folder.parent / "elsewhere")
    api = FakeApi()
    with pytest.raises(InputError) as caught:
        push_pair(folder, REPO, api=api)
    assert str(folder / piece) in str(caught.value) and api.calls == []


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        push_pair(tmp_path / "nowhere", REPO, api=FakeApi())
