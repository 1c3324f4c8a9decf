"""A push through the real client to a Hub on loopback: the order of the uploads, and that faults cost only time."""

import json
import re
import shlex

import pytest
from huggingface_hub import HfApi
from local_hub import LocalHub, point_client_at

from cozyrag.errors import InputError, PushError
from cozyrag.hub import push
from cozyrag.hub.push import push_pair, refusal
from cozyrag.pair_file import describe_pair
from cozyrag.runtime import hub_retry

REPO = "me/rag"
REPOS = [("models", "me/rag-retriever"), ("datasets", "me/rag-index"), ("models", "me/rag")]
FINGERPRINT = "f" * 16
CARD = b"---\ntags:\n- cozyrag\n---\n# card\n"
FILES = {
    "generator": {"config.json": b"{}", "model.safetensors": b"\0weights", "README.md": CARD},
    "retriever": {"modules.json": b"[]", "1_Pooling/config.json": b"{1}", "model.safetensors": b"\1weights"},
    "index": {
        "index.json": json.dumps({"retriever_fingerprint": FINGERPRINT}).encode(),
        "passages.parquet": b"PAR1",
        "vectors.safetensors": b"\2vectors",
    },
}
PASSING = ("500", "429", "cut", "lost", "slow")
STEPS = {
    "create": "/api/repos/create",
    "info": "/api/models/me/rag$",
    "card": "validate-yaml",
    "preupload": "preupload",
    "batch": "objects/batch",
    "upload": "/lfs/[0-9a-f]+$",
    "verify": "/verify",
    "commit of the retriever": "me/rag-retriever/commit",
    "commit of the index": "me/rag-index/commit",
    "commit of the generator": "me/rag/commit",
    "tree": "me/rag/tree",
    "refs": "/refs",
    "tag": "me/rag/tag",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub where the client is user "me"; `hub.waited` are the seconds that the client did not really wait."""
    with LocalHub(tmp_path / "large", tokens={"hf_right": "me", "hf_other": "you"}) as local:
        local.waited = point_client_at(local, monkeypatch, cache=tmp_path / "cache")
        yield local


@pytest.fixture
def folder(tmp_path):
    """A finished run, as far as pushing is concerned; checkpoints and the like are no part of the pair."""
    root = tmp_path / "my run"
    for piece, files in FILES.items():
        for name, content in files.items():
            path = root / piece / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    facts = describe_pair(
        fingerprint=FINGERPRINT,
        retrieval={"mode": "hybrid", "stemmer": "none", "weights": {"vectors": 15.0, "sentence_words": 0.0}},
        top_k=4,
        context_tokens=64,
        answer_tokens=8,
    )
    (root / "cozyrag.json").write_text(json.dumps(facts))
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


def commits(hub):
    """How many commits each repository has, without the one of its creation."""
    return [len(hub.repo(name, kind).commits) - 1 if (kind, name) in hub.repos else 0 for kind, name in REPOS]


def switch(hub, revision="main"):
    return json.loads(hub.read(REPO, "cozyrag.json", revision=revision))


# ---- a push that nothing disturbs


def test_retriever_and_index_go_first_and_the_generator_last_each_in_one_commit(hub, folder):
    told = push_pair(folder, REPO)
    assert re.findall(r"http\S+", told) == [
        f"{hub.endpoint}/{path}" for path in ("me/rag", "me/rag-retriever", "datasets/me/rag-index")
    ]
    order = [path for method, path, _ in hub.asked("/commit/", method="POST")]
    assert order == [f"/api/{kind}/{name}/commit/main" for kind, name in REPOS] and commits(hub) == [1, 1, 1]


def test_each_repository_gets_its_piece_and_nothing_else(hub, folder):
    push_pair(folder, REPO)
    for (kind, name), piece in zip(REPOS, ("retriever", "index", "generator"), strict=True):
        held = set(hub.repo(name, kind).commits[hub.repo(name, kind).main])
        assert held == {".gitattributes", "README.md", *FILES[piece]} | (
            {"cozyrag.json"} if piece == "generator" else set()
        )
        assert all(
            hub.read(name, path, kind=kind) == FILES[piece][path] for path in FILES[piece] if path != "README.md"
        )


def test_the_last_commit_names_the_exact_revisions_of_the_other_two(hub, folder):
    push_pair(folder, REPO)
    assert switch(hub) == json.loads((folder / "cozyrag.json").read_text()) | {
        "generator": {"folder": "."},
        "retriever": {"repo": REPOS[0][1], "revision": hub.repo("me/rag-retriever").main, "fingerprint": FINGERPRINT},
        "index": {"repo": REPOS[1][1], "revision": hub.repo("me/rag-index", "datasets").main},
    }


@pytest.mark.parametrize("private", [True, False])
def test_all_three_are_private_or_none(hub, folder, private):
    push_pair(folder, REPO, private=private)
    assert [hub.repo(name, kind).private for kind, name in REPOS] == [private] * 3


def test_a_name_without_a_user_is_the_users_own(hub, folder):
    assert "/me/rag " in push_pair(folder, "rag") and switch(hub)["index"]["repo"] == "me/rag-index"


def test_every_card_gets_the_tag_of_a_pair_even_if_there_was_no_card(hub, folder):
    push_pair(folder, REPO)
    api = HfApi()
    for kind, name in REPOS:
        assert "cozyrag" in api.repo_info(name, repo_type=kind.removesuffix("s")).tags
    assert "me/rag-index" in api.model_info(REPO).card_data["datasets"]


def test_a_push_leaves_the_folder_as_it_was_and_the_token_nowhere(hub, folder):
    before = snapshot(folder)
    push_pair(folder, REPO, tag="v1")
    assert snapshot(folder) == before
    held = [
        hub.read(name, path, kind=kind)
        for kind, name in REPOS
        for path in hub.repo(name, kind).commits[hub.repo(name, kind).main]
    ]
    assert not any(b"hf_right" in content for content in held + [content for content, _ in before.values()])


def test_a_second_push_sends_nothing_and_changes_nothing(hub, folder):
    push_pair(folder, REPO, tag="v1")
    received, tags = hub.received, dict(hub.repo(REPO).tags)
    push_pair(folder, REPO, tag="v1")
    assert commits(hub) == [1, 1, 1] and (hub.received, hub.repo(REPO).tags) == (received, tags)


def test_a_piece_that_is_the_same_keeps_its_revision(hub, folder):
    push_pair(folder, REPO)
    before, received = switch(hub), hub.received
    (folder / "generator" / "model.safetensors").write_bytes(b"\0weigher")
    push_pair(folder, REPO)
    assert commits(hub) == [1, 1, 2] and hub.received == received + 8
    assert (switch(hub)["retriever"], switch(hub)["index"]) == (before["retriever"], before["index"])


def test_stale_model_files_are_deleted_and_other_files_stay(hub, folder):
    extra = folder / "generator" / "model-00002-of-00002.safetensors"
    extra.write_bytes(b"more")
    push_pair(folder, REPO)
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="LICENSE", repo_id=REPO)
    extra.unlink()
    push_pair(folder, REPO)
    held = hub.repo(REPO).commits[hub.repo(REPO).main]
    assert extra.name not in held and hub.read(REPO, "LICENSE") == b"mine"


def test_a_tag_is_set_in_all_three_and_moves_when_it_is_given_again(hub, folder):
    push_pair(folder, REPO, tag="v1")
    first = hub.repo(REPO).main
    (folder / "generator" / "config.json").write_bytes(b"[]")
    push_pair(folder, REPO, tag="v2")
    assert hub.repo(REPO).tags == {"v1": first, "v2": hub.repo(REPO).main} and first != hub.repo(REPO).main
    assert switch(hub, "v1") == switch(hub, "v2")  # retriever and index are the same
    push_pair(folder, REPO, tag="v1")
    assert [hub.repo(name, kind).tags["v1"] for kind, name in REPOS] == [
        hub.repo(name, kind).main for kind, name in REPOS
    ]


# ---- what goes up, and who can read it


def test_only_the_files_of_a_pair_are_uploaded_and_the_others_are_named(hub, folder):
    """Whatever lies in the folders: settings of an editor, code, notes, whole folders."""
    strange = [".env", "evil.py", "notes.txt", "private.json", ".git/config.json", "deep/.hidden/model.safetensors",
               "pytorch_model.bin", "passwords.safetensors"]  # fmt: skip
    for piece in FILES:
        for name in strange:
            (folder / piece / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / piece / name).write_bytes(b"secret")
    lines = []
    push_pair(folder, REPO, info=lines.append)
    for (kind, name), piece in zip(REPOS, ("retriever", "index", "generator"), strict=True):
        held = set(hub.repo(name, kind).commits[hub.repo(name, kind).main])
        assert held - {".gitattributes", "README.md", "cozyrag.json"} == set(FILES[piece]) - {"README.md"}
    [told] = [line for line in lines if line.startswith("Not uploaded")]
    assert "retriever/.env" in told and f"and {3 * len(strange) - 8} more." in told


@pytest.mark.parametrize("place", ["generator/tokenizer.json", "retriever/2_Dense", "index"])
def test_a_link_is_not_followed(hub, folder, tmp_path, place):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "config.json").write_text("secret")
    target = tmp_path / "private" if place != "generator/tokenizer.json" else tmp_path / "private" / "config.json"
    if place == "index":
        target = folder / "index"
        target = target.rename(tmp_path / "elsewhere")
    (folder / place).symlink_to(target)
    lines, refused = [], place != "retriever/2_Dense"
    if refused:
        with pytest.raises(InputError, match=f"found the link {place} to "):
            push_pair(folder, REPO, info=lines.append)
        assert hub.requests == []
    else:  # no name of a file of a pair
        push_pair(folder, REPO, info=lines.append)
        assert "retriever/2_Dense" in lines[0] and not hub.asked("2_Dense")


def test_what_becomes_public_is_said_before_anything_is_uploaded(hub, folder):
    lines, commits_then = [], []
    push_pair(folder, REPO, info=lambda line: (lines.append(line), commits_then.append(commits(hub))))
    assert commits_then == [[0, 0, 0]] and "Anyone can read" in lines[0] and "--private" in lines[0]
    assert f"the full text of all passages with their vectors ({hub.endpoint}/datasets/me/rag-index)" in lines[0]
    before = []
    assert refusal("me/other", info=before.append) is None  # the start of a run with --push_to_hub
    assert "Anyone can read" in before[0] and "--hub_private" in before[0]


def test_of_a_private_pair_nothing_is_called_public(hub, folder):
    lines = []
    push_pair(folder, REPO, private=True, info=lines.append)
    assert lines == []


def test_a_tag_that_fails_is_not_told_as_a_failed_upload(hub, folder):
    hub.fail("me/rag-index/tag", "403", times=99)
    with pytest.raises(PushError) as caught:
        push_pair(folder, REPO, tag="v1")
    message = str(caught.value)
    assert message.startswith(f"The pair is uploaded to {hub.endpoint}/me/rag ") and "upload to" not in message
    assert "not all of it has the tag 'v1'" in message and "your token may not write" in message
    assert commits(hub) == [1, 1, 1]
    hub.heal()
    push_pair(*shlex.split(message.split("`")[-2])[2:4], tag="v1")
    assert {hub.repo(name, kind).tags["v1"] == hub.repo(name, kind).main for kind, name in REPOS} == {True}


# ---- temporary faults


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("step", STEPS)
def test_a_temporary_fault_costs_only_time(hub, folder, step, fault):
    hub.fail(STEPS[step], fault)
    push_pair(folder, REPO, tag="v1")
    assert fault in [each[2] for each in hub.asked(STEPS[step])]
    assert commits(hub) == [1, 1, 1]  # also if a commit was made and its reply lost
    assert switch(hub)["retriever"]["revision"] == hub.repo("me/rag-retriever").main
    assert hub.repo(REPO).tags == {"v1": hub.repo(REPO).main}
    assert bool(hub.waited) == (fault != "slow")


@pytest.mark.parametrize("fault", ["429", "503"])
def test_the_delay_that_the_hub_asks_for_is_respected(hub, folder, fault, monkeypatch):
    hub.fail("/commit/", fault)
    push_pair(folder, REPO)
    assert hub.waited == [1.0]
    error = hub_retry.HfHubHTTPError("x", response=_Response({"Retry-After": "17"}))
    assert hub_retry._asked_to_wait(error) == 17
    limit = {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    assert hub_retry._asked_to_wait(hub_retry.HfHubHTTPError("x", response=_Response(limit))) == 55


class _Response:
    """The part of a response that an error reads."""

    def __init__(self, headers):
        self.headers, self.request, self.status_code = headers, None, 429


def test_waits_double_and_are_logged(hub, folder):
    lines = []
    hub.fail("me/rag/commit", "503", times=4)
    push_pair(folder, REPO, info=lines.append)
    assert hub.waited == [1, 2, 4, 8]
    again = [line for line in lines if "trying again" in line]
    assert len(again) == 4 and "503" in again[0] and "trying again in 1 s" in again[0]


def test_a_commit_in_between_is_noticed_and_built_upon(hub, folder, monkeypatch):
    """Somebody commits between the comparison and our commit: ours is refused, retried, and holds exactly the piece."""
    push_pair(folder, REPO)
    (folder / "retriever" / "model.safetensors").write_bytes(b"\1heavier")
    differences, done = push._Repository.differences, []

    def disturbed(self, revision, files):
        found = differences(self, revision, files)
        if self.name.endswith("-retriever") and not done:
            done.append(True)
            self.api.upload_file(path_or_fileobj=b"{}", path_in_repo="added.json", repo_id=self.name)
        return found

    monkeypatch.setattr(push._Repository, "differences", disturbed)
    push_pair(folder, REPO)
    repo = hub.repo("me/rag-retriever")
    assert switch(hub)["retriever"]["revision"] == repo.main and "added.json" not in repo.commits[repo.main]
    assert "412" in [status for _, _, status in hub.asked("me/rag-retriever/commit")]


# ---- permanent faults: one sentence and the command that completes the upload


def failure(folder, **options):
    """The message of a push that fails; nothing on disk has changed, and its command repeats the push."""
    before = snapshot(folder)
    with pytest.raises(PushError) as caught:
        push_pair(folder, REPO, **options)
    message = str(caught.value)
    command = shlex.split(message.split("`")[-2])
    private = ["--private"] if options.get("private") else []
    assert command == ["cozyrag", "push", str(folder), REPO, *private]
    assert str(folder) in message and message.startswith("The pair is complete in ") and "hf_" not in message
    assert snapshot(folder) == before
    return message


def test_no_token(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    message = failure(folder)
    assert "no token was found" in message and "`hf auth login`" in message
    assert hub.requests == []


def test_a_wrong_token(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = failure(folder)
    assert "does not accept the token in HF_TOKEN" in message and "set HF_TOKEN to a valid one or unset it" in message


def test_a_token_that_ends_half_way(hub, folder):
    hub.fail("me/rag/commit", "401", times=99)
    assert "does not accept the token" in failure(folder)
    assert commits(hub) == [1, 1, 0]


def test_a_name_under_another_user(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    message = failure(folder)
    assert "your token may not write to me/rag" in message and "a name under your own user" in message


def test_a_name_that_is_taken(hub, folder):
    HfApi().create_repo(REPO)
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO)
    before = hub.repo(REPO).main
    message = failure(folder)
    assert "The name 'me/rag' is taken" in message and "holds 'config.json'" in message and "another name" in message
    assert hub.repo(REPO).main == before


def test_a_public_repository_is_not_used_for_a_private_pair(hub, folder):
    push_pair(folder, REPO)
    (folder / "index" / "passages.parquet").write_bytes(b"secret")
    assert "already exists and is public, but must be private" in failure(folder, private=True)
    assert commits(hub) == [1, 1, 1]


def test_no_network(hub, folder):
    hub.__exit__()
    message = failure(folder)
    assert f"{hub.endpoint} cannot be reached" in message and "check the network" in message
    assert len(hub.waited) == hub_retry.TRIES - 1


def test_offline_mode(hub, folder, monkeypatch):
    monkeypatch.setattr(hub_retry.constants, "HF_HUB_OFFLINE", True)
    message = failure(folder)
    assert "HF_HUB_OFFLINE is set" in message and "unset HF_HUB_OFFLINE" in message and hub.waited == []


@pytest.mark.parametrize("step", ["preupload", "upload", "tree", *(step for step in STEPS if "commit" in step)])
@pytest.mark.parametrize("fault", ["500", "cut", "403"])
def test_the_old_pair_loads_until_the_last_commit(hub, folder, step, fault):
    """The Hub goes down at any step: cozyrag.json names the old revisions, which still hold the old files."""
    push_pair(folder, REPO)
    before = switch(hub)
    for piece, name in (("generator", "model"), ("retriever", "model"), ("index", "vectors")):
        (folder / piece / f"{name}.safetensors").write_bytes(b"second round")
    hub.fail(STEPS[step], fault, times=999)
    message = failure(folder)
    assert (
        "your token may not write" if fault == "403" else "500" if fault == "500" else "cannot be reached"
    ) in message
    assert switch(hub) == before
    files = hub.repo("me/rag-retriever").commits[before["retriever"]["revision"]]
    assert files["model.safetensors"].content.read_bytes() == FILES["retriever"]["model.safetensors"]
    hub.heal()
    push_pair(folder, REPO)
    assert switch(hub)["retriever"]["revision"] == hub.repo("me/rag-retriever").main != before["retriever"]["revision"]


def test_uploaded_files_are_not_sent_again(hub, folder):
    hub.fail("me/rag/commit", "500", times=99)
    failure(folder)
    received = hub.received
    hub.heal()
    push_pair(folder, REPO)
    assert hub.received == received and commits(hub) == [1, 1, 1]


def test_trying_again_keeps_private_repositories_private(hub, folder):
    hub.fail("/commit/", "403", times=99)
    failure(folder, private=True)


def test_a_fault_of_the_package_keeps_its_traceback(hub, folder, monkeypatch):
    def broken(*_):
        raise KeyError("bug")

    monkeypatch.setattr(push._Repository, "differences", broken)
    with pytest.raises(KeyError):
        push_pair(folder, REPO)


def test_a_large_file_is_not_read_into_memory(hub, folder, monkeypatch):
    """Peak memory of a push of 60 MB stays under a third of that."""
    import tracemalloc

    with (folder / "generator" / "model.safetensors").open("wb") as file:
        file.truncate(60 * 2**20)
    tracemalloc.start()
    push_pair(folder, REPO)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert hub.received > 60 * 2**20 and peak < 20 * 2**20


# ---- before a run


def test_a_wrong_token_or_name_is_found_before_the_run(hub, monkeypatch):
    assert refusal(REPO) is None and len(hub.repos) == 3
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept the token" in refusal(REPO) and "Nothing was trained" in refusal(REPO)
    monkeypatch.delenv("HF_TOKEN")
    assert "no token was found" in refusal(REPO)


def test_a_run_starts_when_the_hub_cannot_be_reached_yet(hub):
    hub.__exit__()
    lines = []
    assert refusal(REPO, info=lines.append) is None
    assert "The run starts all the same" in lines[-1]


# ---- nothing to push


def test_without_cozyrag_json_nothing_is_uploaded(hub, folder):
    (folder / "cozyrag.json").unlink()
    with pytest.raises(InputError, match=r"cozyrag\.json"):
        push_pair(folder, REPO)
    assert hub.requests == []


@pytest.mark.parametrize("piece", sorted(FILES))
def test_with_a_piece_missing_nothing_is_uploaded(hub, folder, piece):
    (folder / piece).rename(folder.parent / "elsewhere")
    with pytest.raises(InputError) as caught:
        push_pair(folder, REPO)
    assert str(folder / piece) in str(caught.value) and hub.requests == []


def test_a_mixed_pair_is_not_pushed(hub, folder):
    (folder / "index" / "index.json").write_text(json.dumps({"retriever_fingerprint": "0" * 16}))
    with pytest.raises(InputError, match=f"index of retriever {FINGERPRINT}.*found that of {'0' * 16}"):
        push_pair(folder, REPO)
    assert hub.requests == []


def test_a_folder_that_is_not_there_is_refused(hub, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        push_pair(tmp_path / "nowhere", REPO)
