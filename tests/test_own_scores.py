"""The scores on the retriever's card, computed again from the saved folder alone, after runs in every mode."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

from cozyrag.retrieval.hybrid import MODES
from cozyrag.run import train

SMALL = (
    "--rounds 1 --generator_steps 0 --retriever_steps 3 --retriever_batch_size 8 --retriever_learning_rate 1e-3 "
    "--context_tokens 48 --answer_tokens 2 --threads 1 --rollback off --mixed_precision no"
).split()


@pytest.fixture(scope="module", params=MODES)
def folder(request, corpus_files, generator_path, retriever_path, tmp_path_factory):
    """The output folder of a run that trains the retriever."""
    output = tmp_path_factory.mktemp("measured") / "out"
    files = [part for name, path in corpus_files.items() for part in (f"--{name}", str(path))]
    models = ["--generator", str(generator_path), "--retriever", str(retriever_path)]
    train([*files, *models, *SMALL, "--retrieval", request.param, "--output_dir", str(output)])
    return output


@pytest.fixture
def evaluated(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "evaluation"]


def ranks(retriever, passages, questions):
    """The rank, from 1, of the gold passage of each question among the vectors of a SentenceTransformer."""
    model = SentenceTransformer(str(retriever), device="cpu")
    texts = [f"{title}\n{text}" for title, text in zip(passages["title"], passages["text"], strict=True)]
    vectors = model.encode_document(texts, normalize_embeddings=True)
    asked = model.encode_query([row["question"] for row in questions], normalize_embeddings=True)
    order = np.argsort(-(asked @ vectors.T), axis=1, kind="stable")
    found = zip(order, questions, strict=True)
    return np.array([1 + list(rows).index(passages["id"].index(row["passage_id"])) for rows, row in found])


def test_the_retrievers_card_is_what_the_saved_folder_does_by_itself(folder, evaluated, corpus_files, retriever_path):
    passages = pq.read_table(folder / "index" / "passages.parquet").to_pydict()
    questions = [json.loads(line) for line in corpus_files["eval_questions"].read_text().splitlines()]
    tuned = ranks(folder / "retriever", passages, questions)
    expected = {
        "recall@1": 100 * np.mean(tuned <= 1),
        "recall@5": 100 * np.mean(tuned <= 5),
        "mrr@10": 100 * np.mean(np.where(tuned <= 10, 1 / tuned, 0)),
    }
    card = ModelCard.load(folder / "retriever" / "README.md")
    assert {each.metric_type: each.metric_value for each in card.data.eval_results} == pytest.approx(
        expected, abs=0.006
    )
    assert f"| after round 1 | {expected['recall@1']:.1f} (" in str(card)
    untuned = ranks(retriever_path, passages, questions)
    assert evaluated[0]["dense_recall@1"] == pytest.approx(100 * np.mean(untuned <= 1), abs=0.006)
    assert evaluated[0]["dense_mrr@10"] != evaluated[1]["dense_mrr@10"]  # it learned something


def test_each_mode_measures_the_searches_that_it_has(folder, evaluated):
    mode = json.loads((folder / "settings.json").read_text())["retrieval"]
    measured = {"dense": ["dense"], "bm25": ["dense", "sparse"], "hybrid": ["dense", "hybrid", "sparse"]}[mode]
    own = {"bm25": "sparse"}.get(mode, mode)
    for row in evaluated:
        assert sorted({name.split("_")[0] for name in row if name.endswith("_recall@1")}) == measured
        assert row[f"{own}_recall@1"] == row["recall@1"] and row[f"{own}_ndcg@10"] == row["ndcg@10"]
    if mode != "dense":
        assert evaluated[1]["dense_mrr@10"] != evaluated[1]["mrr@10"]  # what the card must not claim
        assert evaluated[0]["sparse_mrr@10"] == evaluated[1]["sparse_mrr@10"]  # training changes no words
