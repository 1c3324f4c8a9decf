"""A pair end to end, in separate processes: trained and pushed round by round, then loaded by somebody else."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from huggingface_hub import HfApi, constants
from local_hub import LocalHub
from push_under_faults import push_rounds
from test_train_script import MACHINE, ROOT, launch, settings  # noqa: F401

pytestmark = pytest.mark.slow
PIECES = """
import os, sys
from datasets import load_dataset
from huggingface_hub import hf_hub_download
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

revision = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained("me/rag", revision=revision)
ids = AutoTokenizer.from_pretrained("me/rag", revision=revision)("The fox", return_tensors="pt")
assert model(**ids).logits.isfinite().all()
vector = SentenceTransformer("me/rag-retriever", revision=revision, device="cpu").encode("The fox")
passages = load_dataset("me/rag-index", revision=revision, split="train")
path = hf_hub_download("me/rag-index", "vectors.safetensors", repo_type="dataset", revision=revision)
vectors = load_file(path)["vectors"]
assert passages.column_names == ["id", "title", "text"] and vectors.shape == (len(passages), len(vector))
from cozyrag import CozyRAG
print(CozyRAG.from_pretrained("me/rag", revision=revision).answer("What colour is the fox 0?").passages[0].id)
"""


@pytest.fixture(scope="module")
def shared(settings, tmp_path_factory):  # noqa: F811
    """(Hub, environment, output folder, screen) of a run of two rounds that pushed each of them."""
    root = tmp_path_factory.mktemp("shared")
    with LocalHub(root / "large") as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_right", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(root / "home")}
        hub.fail("/commit/", "503", times=2)  # a real Hub fails now and then
        arguments = [
            *settings,
            "--output_dir",
            root / "out",
            "--threads",
            1,
            "--push_to_hub",
            "--hub_model_id",
            "me/rag",
        ]
        done = launch([*arguments, "--hub_strategy", "every_round"], environment=environment)
        yield hub, environment, root / "out", done.stdout


def python(code, *arguments, environment, cwd):
    """Standard output of some lines of Python in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | MACHINE | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=tiny.PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_each_round_is_a_revision_and_the_last_one_loads(shared):
    hub, _, folder, screen = shared
    assert "round-1 is pushed to" in screen and f"Pushed to {hub.endpoint}/me/rag" in screen
    assert list(hub.repo("me/rag").tags) == ["round-1", "round-2"]
    assert hub.repo("me/rag").tags["round-2"] == hub.repo("me/rag").main
    assert len(hub.repo("me/rag").commits) == 3  # made, round 1, round 2
    pair = json.loads(hub.read("me/rag", "cozyrag.json", revision="round-2"))
    local = json.loads((folder / "cozyrag.json").read_text())
    assert pair["retriever"]["fingerprint"] == local["retriever"]["fingerprint"]
    assert not list((folder / "pushing").iterdir())


def test_the_pieces_load_by_themselves_and_offline_afterwards(shared, tmp_path):
    _, environment, _, _ = shared
    first = python(PIECES, "round-2", environment=environment, cwd=tmp_path)
    offline = environment | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert python(PIECES, "round-2", environment=offline, cwd=tmp_path) == first


def test_the_code_of_the_cards_on_the_hub_runs_unchanged(shared, tmp_path):
    hub, environment, _, _ = shared
    cards = [("me/rag", "models"), ("me/rag-retriever", "models"), ("me/rag-index", "datasets")]
    blocks = [
        block
        for name, kind in cards
        for block in re.findall(r"```python\n(.*?)```", hub.read(name, "README.md", kind=kind).decode(), re.DOTALL)
    ]
    assert len(blocks) == 5
    assert len(python("\n".join(blocks), environment=environment, cwd=tmp_path).splitlines()) >= 7


def test_the_hub_reads_the_cards(shared, monkeypatch):
    hub, _, _, _ = shared
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    api = HfApi(endpoint=hub.endpoint)
    info = api.model_info("me/rag")
    assert "cozyrag" in info.tags and info.card_data["datasets"] == ["me/rag-index"] and info.card_data.eval_results
    assert "training.png" in [each.rfilename for each in info.siblings]
    assert api.dataset_info("me/rag-index").card_data["configs"][0]["data_files"] == "passages.parquet"


def test_a_run_that_cannot_push_keeps_everything_and_names_the_command(settings, tmp_path):  # noqa: F811
    with LocalHub(tmp_path / "large") as hub:
        environment = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": "hf_right",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        }
        environment |= {"HF_HUB_DISABLE_XET": "1"}
        hub.fail("me/rag/commit", "403", times=99)
        arguments = [
            *settings,
            "--rounds",
            1,
            "--output_dir",
            "out",
            "--threads",
            1,
            "--push_to_hub",
            "--hub_model_id",
            "me/rag",
        ]
        done = launch(arguments, environment=environment, cwd=tmp_path, check=False)
        assert done.returncode == 3 and done.stderr.strip().endswith("then run `cozyrag push out me/rag`.")
        hub.heal()
        command = [sys.executable, "-c", "from cozyrag.cli import main; main()", "push", "out", "me/rag"]
        again = subprocess.run(
            command,
            env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert again.returncode == 0 and f"\nPushed to {hub.endpoint}/me/rag " in again.stdout


def test_a_wrong_token_ends_the_run_before_it_begins(settings, tmp_path):  # noqa: F811
    with LocalHub(tmp_path / "large") as hub:
        environment = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": "hf_wrong",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        }
        arguments = [*settings, "--output_dir", "out", "--push_to_hub", "--hub_model_id", "me/rag"]
        done = launch(arguments, environment=environment, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "does not accept the token in HF_TOKEN" in done.stderr
    assert "Nothing was trained" in done.stderr and "hf_wrong" not in done.stdout + done.stderr
    assert not Path(tmp_path / "out").exists()


def test_no_fault_leaves_two_rounds_mixed(tmp_path):
    """The harness of push_under_faults.py, a few pushes of it."""
    found = push_rounds(tmp_path, pushes=6, seed=0)
    assert found.mixed == [] and found.looked == 6 and found.loaded >= 1


def test_the_harness_detects_a_mix(tmp_path, monkeypatch):
    """It must find a push that names the retriever and the index of an earlier round."""
    from cozyrag.hub import push

    first = {}

    def stale(pair, names, made):
        named = {
            role: {"repo": names[role], "revision": first.setdefault(role, made[role])}
            for role in ("retriever", "index")
        }
        fingerprint = first.setdefault("fingerprint", pair["retriever"]["fingerprint"])
        return (
            pair
            | {"generator": {"folder": "."}}
            | named
            | {"retriever": named["retriever"] | {"fingerprint": fingerprint}}
        )

    monkeypatch.setattr(push, "_on_hub", stale)
    monkeypatch.setattr(LocalHub, "fail_at_random", lambda *_: None)
    assert len(push_rounds(tmp_path, pushes=2, seed=1, rounds=2).mixed) == 2  # main and the tag of the second
