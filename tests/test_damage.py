"""Malformed pairs and flipped bits, a few of each; contents that are tied; one writer at a time."""

import json
import shutil

import damage_run
import numpy as np
import pytest
import tiny
import torch
from filelock import FileLock
from safetensors.numpy import load_file, save_file

from cozyrag import cli
from cozyrag.errors import InputError
from cozyrag.hub.push import _pieces
from cozyrag.pair_file import read_pair
from cozyrag.pipeline import CozyRAG
from cozyrag.runtime.contents import BLOCK, check_contents, contents_of, sealed


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return damage_run.make_pair(tmp_path_factory.mktemp("damage"))


@pytest.fixture
def copy(pair, tmp_path):
    return shutil.copytree(pair, tmp_path / "pair")


def test_a_forked_command_ends_although_its_parent_computed_with_two_threads(copy, tmp_path):
    torch.set_num_threads(2)
    torch.rand(1 << 20).exp().sum()  # begins a pool of OpenMP
    try:
        assert damage_run.ask(copy, tmp_path / "ask")[0] == 0
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
def test_malformed_pairs_are_answered_or_refused_in_one_sentence(tmp_path):
    assert damage_run.run_malformed(12, 1, tmp_path) == []


@pytest.mark.slow
def test_no_flipped_bit_goes_unnoticed(tmp_path):
    assert damage_run.run_flips(6, 1, tmp_path) == []


def shuffled(folder):
    path = folder / "index" / "vectors.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"vectors": np.ascontiguousarray(tensors["vectors"][::-1])}, path)


def weights(folder):
    path = folder / "generator" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def settings(folder):
    path = folder / "cozyrag.json"
    path.write_text(path.read_text().replace("45.0", "45.1"))


@pytest.mark.parametrize("change", [shuffled, weights, settings])
def test_what_was_changed_after_saving_is_neither_loaded_nor_pushed(copy, change):
    assert _pieces(copy, read_pair(copy), None)
    change(copy)
    with pytest.raises(InputError, match="what was written"):
        CozyRAG.from_pretrained(copy)
    with pytest.raises(InputError, match="what was written"):
        _pieces(copy, read_pair(copy), None)


@pytest.mark.parametrize(
    ("name", "entry", "value"),
    [
        ("cozyrag.json", ("contexts", "top_k"), 1),
        ("cozyrag.json", ("contexts", "no_answer_threshold"), 0.9),
        ("index/index.json", ("cozyrag_version",), "0"),
    ],
)
def test_a_value_changed_by_hand_counts_once_the_checksum_is_deleted_as_the_message_says(copy, name, entry, value):
    path = copy / name
    facts = json.loads(path.read_text())
    inner = facts[entry[0]] if len(entry) > 1 else facts
    inner[entry[-1]] = value
    path.write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r'If you changed it on purpose, delete the entry "checksum"\.$') as refused:
        CozyRAG.from_pretrained(copy)
    assert str(path) in str(refused.value)
    del facts["checksum"]
    path.write_text(json.dumps(facts))
    pair = CozyRAG.from_pretrained(copy)
    if entry[-1] == "top_k":
        assert pair.top_k == 1 and len(pair.answer("What colour is the fox 0?").passages) == 1


def test_a_pair_saved_with_another_top_k_has_a_valid_checksum(copy, tmp_path):
    pair = CozyRAG.from_pretrained(copy)
    pair.top_k = 1
    pair.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "cozyrag.json").read_text())
    assert saved == sealed(saved) and saved["checksum"] != json.loads((copy / "cozyrag.json").read_text())["checksum"]
    assert CozyRAG.from_pretrained(tmp_path / "saved").top_k == 1


@pytest.mark.parametrize("value", [float("nan"), 0.0, 2.0])
def test_a_pair_without_hashes_loads_as_before_if_its_vectors_can_be_right(copy, value):
    damage_run.forge(copy)
    assert CozyRAG.from_pretrained(copy).answer("What colour is the fox 0?").passages
    path = copy / "index" / "vectors.safetensors"
    tensors = load_file(path)
    tensors["vectors"][3] = value
    save_file(tensors, path)
    with pytest.raises(InputError, match="expected vectors of length 1"):
        CozyRAG.from_pretrained(copy)


def test_of_a_large_file_loading_reads_a_sample_and_pushing_all(tmp_path, monkeypatch):
    monkeypatch.setattr("cozyrag.runtime.contents.LARGE", 4 * BLOCK)
    monkeypatch.setattr("cozyrag.runtime.contents.BLOCKS", 2)
    path = tmp_path / "large"
    path.write_bytes(bytes(5 * BLOCK))
    contents = contents_of(tmp_path, ["large"])
    for at, noticed in ((0, True), (5 * BLOCK - 1, True), (2 * BLOCK, False)):
        content = bytearray(5 * BLOCK)
        content[at] = 1
        path.write_bytes(content)
        for whole in (False, True):
            if noticed or whole:
                with pytest.raises(InputError):
                    check_contents(tmp_path, contents, "Copy it.", whole=whole)
            else:
                check_contents(tmp_path, contents, "Copy it.", whole=whole)


@pytest.mark.parametrize("command", ["index", "passages"])
def test_a_second_writer_is_refused(command, tmp_path, retriever_path):
    source = tiny.write_jsonl(tmp_path / "p.jsonl", tiny.corpus(4)[0])
    output = tmp_path / ("out" if command == "index" else "out.jsonl")
    lock = output / ".lock" if command == "index" else tmp_path / "out.jsonl.lock"
    lock.parent.mkdir(exist_ok=True)
    more = ["--retriever", str(retriever_path), "--threads", "1"] if command == "index" else ["--workers", "1"]
    with FileLock(lock), pytest.raises(InputError, match="--output: another .* is writing"):
        cli.run(command, [str(source), "--output", str(output), *more])
    cli.run(command, [str(source), "--output", str(output), *more])
    assert not lock.exists()
    assert json.loads((output / "index.json").read_text()) if command == "index" else output.read_text()
