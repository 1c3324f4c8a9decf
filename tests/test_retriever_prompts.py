"""What a retriever reads before questions and passages: whose word counts, and that every use of it agrees.

The model is the tiny BERT, compared with sentence-transformers' own `encode_query` and `encode_document`.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from sentence_transformers import SentenceTransformer

from cozyrag import cli
from cozyrag.config import parse_settings
from cozyrag.errors import InputError
from cozyrag.hub.model_cards import _retriever_prompts
from cozyrag.models.retriever import Retriever
from cozyrag.models.retriever_prompts import SEARCH, choose_prompts, known_prompts
from cozyrag.retrieval.index_file import made_by
from cozyrag.retrieval.passage_index import PassageIndex, Passages
from cozyrag.training.setup import load_models

E5, NONE = ("query: ", "passage: "), ("", "")
QUERIES, TEXTS = ["what colour is the fox 0?", "who keeps it?"], [each["text"] for each in tiny.corpus(5)[0]]
INSTRUCT = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("intfloat/e5-small-v2", E5),
        ("intfloat/multilingual-e5-base", E5),
        ("/models/E5-large", E5),
        ("/cache/models--intfloat--e5-base-v2/snapshots/abc123", E5),
        ("someone/museum-e5-small-tuned", E5),
        ("intfloat/multilingual-e5-large-instruct", (INSTRUCT, "")),
        ("intfloat/e5-mistral-7b-instruct", (INSTRUCT, "")),
        ("BAAI/bge-base-en-v1.5", (SEARCH, "")),
        ("BAAI/bge-small-en", (SEARCH, "")),
        ("nomic-ai/nomic-embed-text-v1.5", ("search_query: ", "search_document: ")),
        ("Snowflake/snowflake-arctic-embed-m", (SEARCH, "")),
        ("Snowflake/snowflake-arctic-embed-m-v2.0", ("query: ", "")),
        ("BAAI/bge-m3", NONE),
        ("thenlper/gte-base", NONE),
        ("sentence-transformers/all-MiniLM-L6-v2", NONE),
        ("embedded", NONE),
        ("/data/e5-small/retriever", NONE),
        ("someone/code5-base", NONE),
    ],
)
def test_a_known_family_is_recognised_by_its_name(name, prompts):
    assert known_prompts(name) == prompts


def test_the_chinese_instruction_of_bge():
    query, passage = known_prompts("BAAI/bge-large-zh-v1.5")
    assert len(query) == 19 and not passage


@pytest.mark.parametrize(
    ("name", "own", "query", "passage", "chosen"),
    [
        ("intfloat/e5-base", {}, None, None, E5),
        ("intfloat/e5-base", {"query": "", "document": ""}, None, None, E5),
        ("intfloat/e5-base", {"query": "q: ", "document": ""}, None, None, ("q: ", "")),
        ("x/y", {"query": "q: ", "document": "", "passage": "p: "}, None, None, ("q: ", "p: ")),
        ("x/y", {"query": None, "document": None, "corpus": "c: "}, None, None, ("", "c: ")),
        ("x/y", {"s2p": "other: "}, None, None, NONE),
        ("intfloat/e5-base", {}, "", "", NONE),
        ("intfloat/e5-base", {}, "frage: ", None, ("frage: ", "passage: ")),
        ("x/y", {"query": "q: ", "document": "d: "}, None, "", ("q: ", "")),
    ],
)
def test_the_user_counts_before_the_model_and_the_model_before_its_family(name, own, query, passage, chosen):
    assert choose_prompts(name, own, query, passage) == chosen


@pytest.fixture
def retriever(retriever_path):
    loaded = Retriever.load(str(retriever_path), max_tokens=40)
    loaded.model.eval()
    return loaded


def test_a_retriever_without_prompts_stays_as_it_was(retriever):
    before, prompts = retriever.fingerprint(), dict(retriever.model.prompts)
    retriever.use_prompts("sentence-transformers/all-MiniLM-L6-v2")
    assert (retriever.fingerprint(), retriever.model.prompts) == (before, prompts)
    assert retriever.prompts_sentence == ""


@pytest.mark.parametrize("pooled", [True, False], ids=["prompt pooled", "prompt not pooled"])
def test_every_use_reads_the_prompts_as_sentence_transformers_does_once_it_is_saved(retriever, tmp_path, pooled):
    """Training, search, passages with sentences, int8's way and a question encoder of its own."""
    retriever.model.set_pooling_include_prompt(pooled)
    retriever.use_prompts("intfloat/e5-small-v2")
    retriever.save(tmp_path)
    plain = SentenceTransformer(str(tmp_path), device="cpu")
    assert {kind: plain.prompts[kind] for kind in ("query", "document")} == {"query": E5[0], "document": E5[1]}
    expected = {
        "query": plain.encode_query(QUERIES, normalize_embeddings=True),
        "document": plain.encode_document(TEXTS, normalize_embeddings=True),
    }
    by_hand = plain.encode([f"query: {text}" for text in QUERIES], prompt="", normalize_embeddings=True)
    assert np.allclose(by_hand, expected["query"], atol=1e-5) == pooled
    for kind, texts in (("query", QUERIES), ("document", TEXTS)):
        with torch.no_grad():
            trained = retriever.embed(texts, kind=kind).numpy()
        encoded = retriever.encode(texts, kind=kind, batch_size=2)
        again = Retriever.load(str(tmp_path)).encode(texts, kind=kind, batch_size=2)
        for vectors in (trained, encoded, again):
            np.testing.assert_allclose(vectors, expected[kind], atol=1e-5)
    passages = retriever.encode_passages(TEXTS, [[(0, 9)]] * len(TEXTS), batch_size=2)[0]
    np.testing.assert_allclose(passages, expected["document"], atol=1e-5)
    retriever.freeze_documents()
    np.testing.assert_allclose(retriever.encode(QUERIES, kind="query", batch_size=2), expected["query"], atol=1e-5)


def test_a_prompt_counts_among_the_tokens_that_are_read(retriever):
    text = "the fox is red . " * 20
    for prompts in (NONE, ("what colour : ", "the tower : ")):
        retriever.use_prompts("x", query=prompts[0], passage=prompts[1])
        assert retriever.count_tokens([text], kind="document") == [40]
    assert retriever.count_tokens(["fox"], kind="query") == [3 + 3]


@pytest.mark.parametrize("option", ["query", "passage"])
def test_a_prompt_must_leave_room_for_a_text(retriever, option):
    with pytest.raises(InputError, match=f"--{option}_prompt: .*half of the 40 tokens.*Shorten it"):
        retriever.use_prompts("x", **{option: "the fox is red . " * 5})


@pytest.mark.parametrize("kinds", [("query",), ("document",), ("query", "document")])
def test_an_index_of_other_prompts_is_not_used(retriever, tmp_path, kinds):
    from datasets import Dataset

    table, before = Dataset.from_list(tiny.corpus(5)[0]), retriever.fingerprint()
    vectors = retriever.encode(Passages.of(table).to_read(), kind="document", batch_size=8)
    PassageIndex(table, vectors, fingerprint=before).save(tmp_path)
    retriever.use_prompts("x", query="q " if "query" in kinds else None, passage="p " if "document" in kinds else None)
    with pytest.raises(InputError, match="made by retriever"):
        PassageIndex.load(tmp_path, fingerprint=retriever.fingerprint())


# ---- settings, commands and cards


def settings_for(generator_path, retriever_path, *more):
    return parse_settings(["--generator", str(generator_path), "--retriever", str(retriever_path), *more])


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ([], NONE),
        (["--query_prompt", "query: "], ("query: ", "")),
        (["--query_prompt", "query: ", "--passage_prompt", "passage: "], E5),
        (["--query_prompt=", "--passage_prompt=the : "], ("", "the : ")),
    ],
)
def test_a_run_and_its_index_have_the_prompts_of_the_settings(
    generator_path, retriever_path, corpus_files, tmp_path, given, prompts
):
    machine = SimpleNamespace(device="cpu", mixed_precision="no")
    settings = settings_for(generator_path, retriever_path, *given)
    retriever = load_models(machine, settings, SimpleNamespace(passages=None), None)[1]
    assert [retriever.model.prompts[kind] for kind in ("query", "document")] == list(prompts)
    common = ["--retriever", str(retriever_path), "--output", str(tmp_path), "--threads", "1", *given]
    cli.run("index", [str(corpus_files["passages"]), *common])
    assert made_by(tmp_path) == retriever.fingerprint()


def test_a_run_from_e5_has_its_prompts_and_keeps_them_when_it_is_loaded_again(generator_path, tmp_path):
    """As does a retriever that an earlier version trained without them, which a pair or a checkpoint names."""
    old = tiny.make_retriever(tmp_path / "e5-small-v2")
    machine = SimpleNamespace(device="cpu", mixed_precision="no")
    made = load_models(machine, settings_for(generator_path, old), SimpleNamespace(passages=None), None)[1]
    made.save(tmp_path / "retriever")
    assert Retriever.load(str(tmp_path / "retriever"), max_tokens=160).fingerprint() == made.fingerprint()
    assert made.prompts_sentence == "The retriever reads questions after 'query: ', passages after 'passage: '."
    assert Retriever.load(str(old)).prompts_sentence == ""


def test_a_card_names_the_prompts(tmp_path):
    assert _retriever_prompts(tmp_path) == {}
    for saved, named in (({"query": "", "document": ""}, {}), ({"query": "q: "}, {"query": '"q: "', "document": '""'})):
        (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": saved}))
        assert _retriever_prompts(tmp_path) == named
