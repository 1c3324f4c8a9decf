"""Rounds pushed during a run: from copies, in order, tried again later, and never at the cost of the run."""

import errno
import json
import shutil
import threading

import pytest
from test_hub import FILES, FINGERPRINT, REPO, commits, folder, hub, switch  # noqa: F401  (fixtures too)

from cozyrag.config import parse_settings
from cozyrag.errors import InputError, PushError
from cozyrag.hub import background_push
from cozyrag.hub.background_push import AT_MOST, WAITING, BackgroundPush, push_run, waiting
from cozyrag.hub.push import push_pair
from cozyrag.training.output_dir import FREE_TO_CHANGE, OURS


@pytest.fixture
def pusher(hub, folder):  # noqa: F811
    """Keeps its log lines in `lines`."""
    lines = []
    made = BackgroundPush(folder, REPO, private=False, every_round=True, info=lines.append)
    made.lines = lines
    return made


def trained(folder, number):  # noqa: F811
    """The folder after a round: other weights of both models, vectors of the new retriever."""
    fingerprint = f"{number:016d}"
    (folder / "generator" / "model.safetensors").write_bytes(b"generator %d" % number)
    (folder / "retriever" / "model.safetensors").write_bytes(b"retriever %d" % number)
    (folder / "index" / "index.json").write_text(json.dumps({"retriever_fingerprint": fingerprint}))
    pair = json.loads((folder / "cozyrag.json").read_text())
    pair["retriever"]["fingerprint"] = fingerprint
    (folder / "cozyrag.json").write_text(json.dumps(pair))


def held(hub, revision):  # noqa: F811
    """The rounds that the three pieces at a revision of the generator's repository belong to."""
    pair = switch(hub, revision)
    found = [pair["retriever"]["fingerprint"].lstrip("0")]
    found.append(hub.read(REPO, "model.safetensors", revision=revision).decode().split()[-1])
    place = pair["retriever"]
    found.append(hub.read(place["repo"], "model.safetensors", revision=place["revision"]).decode().split()[-1])
    place = pair["index"]
    made = json.loads(hub.read(place["repo"], "index.json", kind="datasets", revision=place["revision"]))
    return {*found, made["retriever_fingerprint"].lstrip("0")}


def test_each_round_gets_a_commit_and_a_tag_and_the_last_one_loads(hub, folder, pusher):  # noqa: F811
    for number in (1, 2):
        trained(folder, number)
        pusher.push(f"round-{number}")
    trained(folder, 3)
    assert f"/{REPO} " in pusher.finish("round-3")
    assert list(hub.repo(REPO).tags) == ["round-1", "round-2", "round-3"] and commits(hub) == [3, 3, 3]
    assert [held(hub, f"round-{number}") for number in (1, 2, 3)] == [{"1"}, {"2"}, {"3"}]
    assert hub.repo(REPO).main == hub.repo(REPO).tags["round-3"] and not waiting(folder)
    assert [line.split(" to ")[0] for line in pusher.lines if "pushed" in line] == [
        "round-1 is pushed",
        "round-2 is pushed",
    ]


def test_pushing_does_not_wait_for_the_upload_and_works_on_a_copy(hub, folder, pusher, monkeypatch):  # noqa: F811
    begin, real = threading.Event(), background_push.push_pair
    monkeypatch.setattr(
        background_push, "push_pair", lambda *given, **options: begin.wait(60) and real(*given, **options)
    )
    trained(folder, 1)
    pusher.push("round-1")  # returns although nothing is uploaded yet
    trained(folder, 2)  # the next round is saved over it, half of it before and half of it during the upload
    begin.set()
    trained(folder, 3)
    pusher.finish("round-3")
    assert held(hub, "round-1") == {"1"} and held(hub, "main") == {"3"}


def test_a_failed_round_is_pushed_before_the_next_one(hub, folder, pusher):  # noqa: F811
    hub.fail("/commit/", "403", times=1)
    trained(folder, 1)
    pusher.push("round-1")
    while not pusher.lines:
        threading.Event().wait(0.01)
    assert "round-1 is not pushed yet" in pusher.lines[0] and waiting(folder) == [folder / WAITING / "round-1"]
    trained(folder, 2)
    pusher.push("round-2")
    trained(folder, 3)
    pusher.finish("round-3")
    assert [held(hub, f"round-{number}") for number in (1, 2, 3)] == [{"1"}, {"2"}, {"3"}]
    assert hub.repo(REPO).main == hub.repo(REPO).tags["round-3"]


def test_without_a_hub_one_command_completes_the_upload_later(hub, folder, pusher):  # noqa: F811
    hub.fail("/commit/", "403", times=999)
    for number in (1, 2):
        trained(folder, number)
        pusher.push(f"round-{number}")
    trained(folder, 3)
    with pytest.raises(PushError) as caught:
        pusher.finish("round-3")
    message = str(caught.value)
    assert f"complete in {folder}" in message and message.endswith(f"`cozyrag push '{folder}' {REPO} --tag round-3`.")
    hub.heal()
    push_run(folder, REPO, tag="round-3", info=None)
    assert [held(hub, f"round-{number}") for number in (1, 2, 3)] == [{"1"}, {"2"}, {"3"}]
    assert hub.repo(REPO).main == hub.repo(REPO).tags["round-3"] and not waiting(folder)


def test_copies_do_not_fill_the_disk(hub, folder, pusher, monkeypatch):  # noqa: F811
    monkeypatch.setattr(BackgroundPush, "_push_waiting", lambda self: None)
    for number in range(1, AT_MOST + 3):
        pusher.push(f"round-{number}")
    assert [copy.name for copy in waiting(folder)] == [f"round-{number}" for number in range(3, AT_MOST + 3)]
    assert "round-1 is not pushed: 3 later rounds" in pusher.lines[0]


def test_the_copy_under_upload_is_not_deleted(hub, folder, pusher, monkeypatch):  # noqa: F811
    monkeypatch.setattr(BackgroundPush, "_push_waiting", lambda self: None)
    pusher.push("round-1")
    assert pusher._next() == folder / WAITING / "round-1"
    for number in range(2, AT_MOST + 3):
        pusher.push(f"round-{number}")
    assert (folder / WAITING / "round-1").exists() and not (folder / WAITING / "round-2").exists()


def test_a_copy_does_not_follow_links_so_that_the_push_refuses_them(hub, folder, pusher, tmp_path):  # noqa: F811
    (tmp_path / "private.json").write_text("secret")
    (folder / "generator" / "tokenizer.json").symlink_to(tmp_path / "private.json")
    pusher.push("round-1")
    with pytest.raises(InputError, match="found the link generator/tokenizer.json to "):
        pusher.finish("round-2")
    assert commits(hub) == [0, 0, 0]


def test_a_full_disk_costs_the_copy_and_not_the_run(hub, folder, pusher, monkeypatch):  # noqa: F811
    def full(source, target, **_):
        target.mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", full)
        pusher.push("round-1")
    assert pusher.lines == [
        "round-1 is not pushed: its pair could not be copied (No space left on device). The run continues."
    ]
    assert list((folder / WAITING).iterdir()) == []
    assert pusher.finish("round-2") and list(hub.repo(REPO).tags) == ["round-2"]


def test_copies_of_a_killed_run_are_pushed_by_the_next(hub, folder, pusher):  # noqa: F811
    trained(folder, 1)
    pusher._copy("round-1")
    (folder / WAITING / "round-2.partial").mkdir()  # killed while copying
    trained(folder, 2)
    pusher.push("round-2")
    pusher.finish("round-3")
    assert [held(hub, f"round-{number}") for number in (1, 2)] == [{"1"}, {"2"}]


def test_rounds_are_sorted_by_number(folder):  # noqa: F811
    for number in (10, 9, 2):
        (folder / WAITING / f"round-{number}").mkdir(parents=True)
    assert [copy.name for copy in waiting(folder)] == ["round-2", "round-9", "round-10"]


def test_without_every_round_only_the_end_is_pushed_and_no_tag_is_set(hub, folder):  # noqa: F811
    pusher = BackgroundPush(folder, REPO, private=True, every_round=False, info=print)
    pusher.finish("round-2")
    assert commits(hub) == [1, 1, 1] and hub.repo(REPO).tags == {} and hub.repo(REPO).private


def test_a_fault_of_the_package_is_not_swallowed(hub, folder, pusher, monkeypatch):  # noqa: F811
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with monkeypatch.context() as patched:
        patched.setattr(background_push, "push_pair", lambda *_, **__: FILES["no such piece"])
        pusher.push("round-1")
        with pytest.raises(KeyError):
            pusher.finish("round-2")
    assert push_pair(folder, REPO) and FINGERPRINT


def test_the_folder_of_copies_belongs_to_the_run_and_push_settings_are_free_to_change():
    assert WAITING in OURS
    assert {
        "push_to_hub",
        "hub_model_id",
        "hub_private",
        "hub_strategy",
        "model_license",
        "data_license",
    } <= FREE_TO_CHANGE
    assert parse_settings(["--push_to_hub", "--hub_model_id", REPO]).output.hub_strategy == "end"
