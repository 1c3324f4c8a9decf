"""Encoding with 8 bits: vectors near those of float32, only on request, recorded in the index."""

import importlib.util
import json

import numpy as np
import pytest
import tiny
import torch

from cozyrag import cli
from cozyrag.data.sentences import sentence_spans
from cozyrag.errors import InputError
from cozyrag.models.int8_encoding import check_int8, quantised
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.passage_index import PassageIndex
from cozyrag.run import train

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
TEXTS = [passage["text"] for passage in tiny.corpus(30)[0]]


def vectors(retriever):
    return retriever.encode_passages(TEXTS, [sentence_spans(text) for text in TEXTS], batch_size=8)


def test_vectors_are_near_and_the_model_is_restored(retriever_path):
    retriever = Retriever.load(str(retriever_path))
    before, whole = vectors(retriever)
    weights = retriever.fingerprint()
    with retriever.reading_in("int8"):
        made, sentences = vectors(retriever)
        alone = retriever.encode(TEXTS[:1], kind="document", batch_size=1)
    assert 0.97 < (made * before).sum(axis=1).min() < (made * before).sum(axis=1).max() < 1 - 1e-7
    assert sentences.ends.tolist() == whole.ends.tolist()
    assert (alone @ made[0]).item() > 0.98  # activations are scaled by batch
    after, _ = vectors(retriever)
    assert np.array_equal(after, before) and retriever.fingerprint() == weights
    with retriever.reading_in("float32"):
        assert np.array_equal(vectors(retriever)[0], before)


def test_a_retriever_with_two_sides_encodes_only_passages_in_int8(retriever_path):
    retriever = Retriever.load(str(retriever_path))
    retriever.freeze_documents()
    before, asked = vectors(retriever)[0], retriever.encode(TEXTS[:3], kind="query", batch_size=3)
    with retriever.reading_in("int8"):
        assert 0.97 < (vectors(retriever)[0] * before).sum(axis=1).min() < 1 - 1e-7
        assert np.array_equal(retriever.encode(TEXTS[:3], kind="query", batch_size=3), asked)


def test_it_is_refused_without_its_packages_or_on_a_gpu(monkeypatch, retriever_path):
    check_int8("int8", "cpu", "--index_precision")
    check_int8("float32", "cuda:0", "--index_precision")
    with pytest.raises(InputError, match="--index_precision int8: expected the encoder on the CPU, found it on cuda:0"):
        check_int8("int8", "cuda:0", "--index_precision")
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "onnx" else real(name, *more))
    with pytest.raises(
        InputError, match=r'the package onnx, which is not installed. Run `pip install "cozyrag\[int8\]"'
    ):
        check_int8("int8", "cpu", "--index_precision")
    check_int8("float32", "cpu", "--index_precision")
    rest = torch.nn.Sequential(*list(Retriever.load(str(retriever_path)).model.children())[1:])
    with pytest.raises(InputError, match="begins with a transformer, found Pooling"), quantised(rest):
        pass


def test_the_index_records_the_precision_and_never_mixes_two(
    tmp_path, retriever_path, generator_path, corpus_files, monkeypatch, capsys
):
    index = tmp_path / "index"
    command = [
        str(corpus_files["passages"]),
        "--retriever",
        str(retriever_path),
        "--output",
        str(index),
        "--threads",
        "1",
    ]
    cli.run("index", command)
    fingerprint = Retriever.load(str(retriever_path), max_tokens=160).fingerprint()
    plain = PassageIndex.load(index, fingerprint=fingerprint)
    assert plain.precision == "float32" and "precision" not in json.loads((index / "index.json").read_text())
    capsys.readouterr()
    cli.run("index", [*command, "--index_precision", "int8"])
    assert f"{len(plain)} to encode" in capsys.readouterr().out
    made = PassageIndex.load(index, fingerprint=fingerprint)
    assert made.precision == "int8" and not np.array_equal(made.vectors, plain.vectors)
    assert (made.vectors * plain.vectors).sum(axis=1).min() > 0.97
    cli.run("index", [*command, "--index_precision", "int8"])
    assert ", 0 to encode" in capsys.readouterr().out

    out = tmp_path / "out"
    settings = {
        **corpus_files,
        "generator": generator_path,
        "retriever": retriever_path,
        "output_dir": out,
        "rounds": 0,
        "threads": 1,
        "index_precision": "int8",
    }
    train([part for name, value in settings.items() for part in (f"--{name}", str(value))])
    trained = PassageIndex.load(out / "index", fingerprint=fingerprint)
    assert trained.precision == "int8"
    assert 0.97 < (trained.vectors * plain.vectors).sum(axis=1).min() < 1 - 1e-7
