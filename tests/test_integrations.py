"""The retrievers of examples/ for other libraries find what the pair finds, and docs/serving.md shows the same code."""

import os
import runpy
from pathlib import Path

import pytest
import tiny

from cozyrag.pipeline import CozyRAG

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # before its import: it would report to its makers
ROOT = Path(__file__).parents[1]
QUESTION = tiny.corpus()[1][0]["question"]
NAMES = ("langchain", "llama_index", "haystack")


@pytest.fixture(scope="module")
def pair(pair_folder):
    return CozyRAG.from_pretrained(pair_folder)


def retriever(library):
    return runpy.run_path(str(ROOT / "examples" / f"{library}_retriever.py"))["CozyRetriever"]


@pytest.mark.parametrize("name", NAMES)
def test_the_documentation_shows_the_example(name):
    code = (ROOT / "examples" / f"{name}_retriever.py").read_text(encoding="utf-8")
    assert f"```python\n{code}```" in (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def test_langchain(pair):
    pytest.importorskip("langchain_core")
    found, expected = retriever("langchain")(pair=pair, top_k=2).invoke(QUESTION), pair.retrieve(QUESTION, 2)
    assert [(each.id, each.page_content) for each in found] == [(each.id, each.text) for each in expected]
    assert found[0].metadata == {"title": expected[0].title, "score": expected[0].score}


def test_llama_index(pair):
    pytest.importorskip("llama_index.core")
    found, expected = retriever("llama_index")(pair, top_k=2).retrieve(QUESTION), pair.retrieve(QUESTION, 2)
    assert [(each.node_id, each.text, each.score) for each in found] == [(e.id, e.text, e.score) for e in expected]
    assert found[0].metadata == {"title": expected[0].title}


def test_haystack(pair):
    haystack = pytest.importorskip("haystack")
    pipeline = haystack.Pipeline()
    pipeline.add_component("retriever", retriever("haystack")(pair, top_k=2))
    found, expected = (
        pipeline.run({"retriever": {"query": QUESTION}})["retriever"]["documents"],
        pair.retrieve(QUESTION, 2),
    )
    assert [(each.id, each.content, each.score) for each in found] == [(e.id, e.text, e.score) for e in expected]
    assert found[0].meta == {"title": expected[0].title}
