"""Inference with a saved pair: answers, scores and sources, its pieces by themselves, loading errors, the Hub."""

import errno
import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import HfApi, constants, file_download
from local_hub import LocalHub, point_client_at
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

import cozyrag
from cozyrag import pipeline
from cozyrag.config import parse_settings
from cozyrag.data.passages import read_passages
from cozyrag.errors import InputError
from cozyrag.hub.push import push_pair
from cozyrag.models import token_losses
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.pair_file import PAIR_FILE, read_pair
from cozyrag.pipeline import Answer, CozyRAG, Source
from cozyrag.retrieval.bm25 import LexicalIndex
from cozyrag.retrieval.hybrid import MODES, Weights
from cozyrag.retrieval.passage_index import PassageIndex, passage_text
from cozyrag.training.rounds import Rounds

PASSAGES, QUESTIONS = tiny.corpus()
ASKED = [row["question"] for row in QUESTIONS[:6]]
SETTINGS = parse_settings(
    ["--questions", "my.tsv", "--retrieval", "dense", "--top_k", "3", "--context_tokens", "60", "--answer_tokens", "7"]
)


def index_of(retriever, corpus_files):
    table = read_passages(str(corpus_files["passages"]))[0]
    vectors = retriever.encode(
        [passage_text(row["title"], row["text"]) for row in table], kind="document", batch_size=16
    )
    return PassageIndex(table, vectors, fingerprint=retriever.fingerprint())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, generator_path, retriever_path, corpus_files):
    """The output of a run, written by the same function; the retriever has a smaller maximum length than its base."""
    root = tmp_path_factory.mktemp("pair") / "run"
    root.mkdir()
    retriever = Retriever.load(str(retriever_path), max_tokens=32)
    index = index_of(retriever, corpus_files)
    run = SimpleNamespace(
        folder=root,
        settings=SETTINGS,
        generator=Generator.load(str(generator_path)),
        retriever=retriever,
        reranker=None,
    )
    run.retrieval = SimpleNamespace(
        index=lambda: index,
        description=lambda: {
            "mode": "dense",
            "stemmer": "english",
            "weights": {"vectors": 12.5, "sentence_words": 0.5},
        },
        context_filter="hybrid",
    )
    run.threshold, run.calibration = None, None
    run._description = lambda: Rounds._description(run)
    Rounds._save_pair(run)
    facts = json.loads((root / PAIR_FILE).read_text())  # these tests replace pieces and entries: without hashes
    del facts["checksum"], facts["generator"]["files"], facts["retriever"]["files"]
    (root / PAIR_FILE).write_text(json.dumps(facts))
    return root


@pytest.fixture(scope="module")
def pair(folder):
    return CozyRAG.from_pretrained(folder)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder that a test can damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# ---- answers


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ("What?", r"a list of questions, found 'What\?'"),
        (b"What?", "a list of questions"),
        (None, "a list of questions, found None"),
        (3, "a list of questions"),
        (["What?", None], "as a text .*found None"),
        ([1], "as a text .*found 1"),
        ([["What?"]], "as a text"),
    ],
)
def test_what_is_no_list_of_texts_is_a_type_error(pair, questions, message):
    with pytest.raises(TypeError, match=message):
        pair.answers(questions)


@pytest.mark.parametrize("top_k", ["3", 2.5, [2], b"1", {}])
def test_top_k_is_a_whole_number(pair, top_k):
    with pytest.raises(TypeError, match="top_k as a whole number"):
        pair.answer("What?", top_k=top_k)
    assert pair.answer("What?", top_k=np.int64(2)).passages == pair.answer("What?", top_k=2).passages


@pytest.mark.parametrize("mode", MODES)
def test_no_questions_have_no_answers(pair, mode, monkeypatch):
    lexical = LexicalIndex([f"text {row}" for row in range(len(pair.searcher.index))])
    monkeypatch.setattr(pair, "searcher", replace(pair.searcher, mode=mode, lexical=lexical))
    assert pair.answers([]) == [] == pair.answers(question for question in ())
    assert pair.retrieve([]) == []


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "mps:7", "CPU1", " "])
def test_a_device_that_is_not_there_is_one_sentence(folder, device):
    with pytest.raises(InputError, match="device: expected one that PyTorch has"):
        CozyRAG.from_pretrained(folder, device=device)


@pytest.mark.parametrize("precision", ["fp8", "int8", "", "float16", "BF16"])
def test_a_precision_of_another_name_is_one_sentence(folder, precision):
    with pytest.raises(InputError, match="precision: expected 'float32', 'bf16'"):
        CozyRAG.from_pretrained(folder, precision=precision)


def test_the_folder_records_how_the_pieces_work_together(folder, pair):
    assert sorted(path.name for path in folder.iterdir()) == ["cozyrag.json", "generator", "index", "retriever"]
    assert (pair.top_k, pair.decoding.context_tokens, pair.decoding.answer_tokens) == (3, 60, 7)
    assert (pair.searcher.mode, pair.searcher.weights) == ("dense", Weights(12.5, 0.5))
    assert pair.retriever.model.max_seq_length == 32
    assert not pair.generator.model.training and {p.dtype for p in pair.generator.model.parameters()} == {torch.float32}


def test_an_answer_has_text_score_context_and_sources(pair):
    answer = pair.answer(ASKED[0])
    assert isinstance(answer, Answer) and isinstance(answer.text, str) and 0 <= answer.score <= 1
    assert len(answer.passages) == 3 and all(isinstance(source, Source) for source in answer.passages)
    for source in answer.passages:
        number = int(source.id.removeprefix("p"))
        assert {"id": source.id, "title": source.title, "text": source.text} == PASSAGES[number]


@pytest.mark.parametrize("asked", ASKED)
def test_the_sources_are_the_nearest_passages_in_order_with_their_cosines(asked, pair, folder):
    model = SentenceTransformer(str(folder / "retriever"), device="cpu")
    vectors = model.encode([passage_text(row["title"], row["text"]) for row in PASSAGES])
    cosines = vectors @ model.encode(asked) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(model.encode(asked))
    nearest = np.argsort(-cosines)[:3]
    sources = pair.answer(asked).passages
    assert [source.id for source in sources] == [f"p{row}" for row in nearest]
    assert [source.score for source in sources] == pytest.approx(cosines[nearest].tolist(), abs=1e-5)


def test_the_context_is_made_of_sentences_of_the_sources(pair):
    for answer in pair.answers(ASKED):
        texts = " ".join(source.text for source in answer.passages)
        titles = [source.title for source in answer.passages]
        for line in answer.context.split("\n"):
            title, _, sentences = line.partition(": ")
            assert title in titles and all(sentence.rstrip(".") in texts for sentence in sentences.split(". "))


@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_the_sources_mark_the_sentences_of_the_context(pair, top_k):
    for answer in pair.answers(ASKED, top_k=top_k):
        read = [(source, [source.text[start:end] for start, end in source.used]) for source in answer.passages]
        assert answer.context == "\n".join(f"{source.title}: {' '.join(parts)}" for source, parts in read if parts)
        assert all(part.endswith(".") and part.count(".") == 1 for _, parts in read for part in parts)


def written(model, tokenizer, prompt, tokens):
    """Greedy decoding by hand, one token at a time, without cache, batch or padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens:
        best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        ids.append(best)
    return " ".join(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).split())


@torch.no_grad()
@pytest.mark.parametrize("asked", ASKED[:3])
def test_text_and_score_are_the_greedy_answer_and_the_geometric_mean_of_its_probabilities(asked, pair, folder):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "generator").eval(),
        AutoTokenizer.from_pretrained(folder / "generator"),
    )
    answer = pair.answer(asked)
    prompt = tokenizer.encode(answer.context)[:60] + tokenizer.encode(f"\nQuestion: {asked}\nAnswer:")
    assert answer.text == written(model, tokenizer, prompt, 7)
    tail = []  # the generated tokens: the text may be tokenized differently
    while len(tail) < 7 and tail[-1:] != [tokenizer.eos_token_id]:
        tail.append(int(model(torch.tensor([prompt + tail])).logits[0, -1].argmax()))
    log_probabilities = model(torch.tensor([prompt + tail])).logits[0].log_softmax(-1)
    likely = [float(log_probabilities[len(prompt) - 1 + at, token]) for at, token in enumerate(tail)]
    assert answer.score == pytest.approx(math.exp(sum(likely) / len(likely)), rel=1e-4)


def test_a_batch_of_questions_gets_the_same_answers_in_order(pair):
    together = pair.answers(ASKED)
    for asked, answer in zip(ASKED, together, strict=True):
        alone = pair.answer(asked)
        assert (answer.text, answer.context) == (alone.text, alone.context)
        assert answer.score == pytest.approx(alone.score, rel=1e-4)
        assert [source.id for source in answer.passages] == [source.id for source in alone.passages]


def test_extra_white_space_in_a_question_is_ignored(pair):
    assert pair.answer(f"  {ASKED[0].replace(' ', chr(10), 1)}\t") == pair.answer(ASKED[0])


@pytest.mark.parametrize(("top_k", "found"), [(1, 1), (5, 5), (40, 40), (1000, 40)])
def test_top_k_of_one_question_decides_how_many_passages_are_read(pair, top_k, found):
    sources = pair.answer(ASKED[0], top_k=top_k).passages
    assert len(sources) == found and [source.score for source in sources] == sorted(
        (source.score for source in sources), reverse=True
    )
    assert len(pair.answer(ASKED[0]).passages) == 3  # the next call uses the default again


def test_context_is_made_from_the_top_k_passages_only(pair):
    [best] = pair.answer(ASKED[0], top_k=1).passages
    assert (
        pair.answer(ASKED[0], top_k=1).context.startswith(f"{best.title}: ")
        and "\n" not in pair.answer(ASKED[0], top_k=1).context
    )


def test_with_a_larger_top_k_sentences_of_far_passages_reach_the_context(pair):
    """The words of the question select its sentence among all 40 passages, whatever its rank."""
    for number, asked in enumerate(ASKED):
        gold = PASSAGES[number // 2]["text"].split(". ")
        assert any(sentence in pair.answer(asked, top_k=40).context for sentence in gold)
    assert not all(
        any(source.id == f"p{number // 2}" for source in pair.answer(asked).passages)
        for number, asked in enumerate(ASKED)
    )


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_below_one_is_refused(pair, top_k):
    with pytest.raises(InputError, match=f"at least 1, found {top_k}"):
        pair.answer(ASKED[0], top_k=top_k)


@pytest.mark.parametrize("asked", ["", " \n\t"])
def test_an_empty_question_is_refused(pair, asked):
    with pytest.raises(InputError, match="Expected a question"):
        pair.answers([ASKED[0], asked])


@pytest.mark.parametrize("call", ["answers", "retrieve"])
def test_half_a_character_is_refused_since_no_tokenizer_takes_it(pair, call):
    with pytest.raises(InputError, match=r"'a \\udcff\?' holds half a surrogate pair at character 3"):
        getattr(pair, call)([ASKED[0], "a  \udcff?"])


def test_a_question_too_long_for_the_generator_is_refused_and_not_truncated(pair):
    with pytest.raises(InputError, match="160 tokens"):
        pair.answer("What colour is the fox? " * 40)


# ---- the pieces by themselves


@torch.no_grad()
def test_transformers_loads_the_generator_by_itself(folder, pair):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "generator"),
        AutoTokenizer.from_pretrained(folder / "generator"),
    )
    batch = tokenizer(PASSAGES[0]["text"], return_tensors="pt")
    assert tokenizer.decode(batch["input_ids"][0]) == PASSAGES[0]["text"]
    assert torch.equal(model.eval()(**batch).logits, pair.generator.model(**batch).logits)


def test_sentence_transformers_loads_the_retriever_by_itself(folder, pair):
    model = SentenceTransformer(str(folder / "retriever"), device="cpu")
    assert model.max_seq_length == 32
    ours = pair.retriever.encode(ASKED, kind="query", batch_size=8)
    assert np.allclose(model.encode_query(ASKED, normalize_embeddings=True), ours, atol=1e-6)


def test_weights_are_stored_in_safetensors_only(folder):
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert len(list(folder.rglob("model.safetensors"))) == 2


# ---- errors of loading


def test_the_index_of_another_retriever_is_refused(copy, corpus_files, tmp_path):
    other = Retriever.load(str(tiny.make_retriever(tmp_path / "other", seed=1)), max_tokens=32)
    shutil.rmtree(copy / "index")
    index_of(other, corpus_files).save(copy / "index")
    with pytest.raises(InputError, match=f"made by retriever {other.fingerprint()}"):
        CozyRAG.from_pretrained(copy)


def test_another_retriever_beside_the_index_is_refused(copy, retriever_path):
    shutil.rmtree(copy / "retriever")
    Retriever.load(str(retriever_path)).save(copy / "retriever")  # same weights, but it reads 64 tokens instead of 32
    with pytest.raises(InputError, match="do not compare"):
        CozyRAG.from_pretrained(copy)


def test_a_cozyrag_json_of_another_pair_is_refused_naming_both(copy, pair):
    facts = json.loads((copy / "cozyrag.json").read_text())
    facts["retriever"]["fingerprint"] = "0123456789abcdef"
    (copy / "cozyrag.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=f"names retriever 0123456789abcdef.*found is {pair.retriever.fingerprint()}"):
        CozyRAG.from_pretrained(copy)


@pytest.mark.parametrize("name", ["index.json", "vectors.safetensors", "passages.parquet"])
def test_an_incomplete_index_is_refused(copy, name):
    (copy / "index" / name).unlink()
    with pytest.raises(InputError, match=name):
        CozyRAG.from_pretrained(copy)


@pytest.mark.parametrize("piece", ["generator", "retriever", "index"])
def test_a_missing_piece_is_refused(copy, piece):
    shutil.rmtree(copy / piece)
    with pytest.raises(InputError, match=piece):
        CozyRAG.from_pretrained(copy)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "found none"),
        ("{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        ("[]", "expected a JSON object, found a list"),
        ("{}", "expected format_version 4 or lower, found None"),
        ('{"format_version": 5}', "expected format_version 4 or lower, found 5"),
    ],
)
def test_an_unusable_cozyrag_json_is_refused(copy, content, words):
    path = copy / "cozyrag.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        CozyRAG.from_pretrained(copy)
    assert words in str(caught.value) and str(copy) in str(caught.value)


@pytest.mark.parametrize("name", ["no/such/folder/here", "~nope", "a b"])
def test_a_name_that_is_neither_a_folder_nor_can_be_a_repository_is_refused(name):
    with pytest.raises(InputError) as caught:
        CozyRAG.from_pretrained(name)
    assert f"found no folder {name!r}" in str(caught.value) and "give it as user/name" in str(caught.value)


def test_a_repository_that_is_not_cached_cannot_be_loaded_offline():
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set.*unset HF_HUB_OFFLINE"):
        CozyRAG.from_pretrained("nobody/nothing")


# ---- to the Hub and back


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub whose client is user "me" and has an empty cache."""
    with LocalHub(tmp_path / "large", tokens={"hf_right": "me", "hf_other": "you"}) as local:
        local.waited = point_client_at(local, monkeypatch, cache=tmp_path / "cache")
        yield local


KINDS = {"retriever": "model", "index": "dataset"}


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pushed_pair_loads_unchanged_and_then_works_offline(folder, pair, hub, monkeypatch):
    push_pair(folder, "me/rag")
    pulled = CozyRAG.from_pretrained("me/rag")
    assert pulled.answers(ASKED[:3]) == pair.answers(ASKED[:3])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert CozyRAG.from_pretrained("me/rag").answers(ASKED[:3]) == pair.answers(ASKED[:3])
    assert len(hub.requests) == asked


def test_weights_and_vectors_are_downloaded_byte_by_byte(folder, hub):
    push_pair(folder, "me/rag")
    facts = json.loads(hub.read("me/rag", "cozyrag.json"))
    places = {"generator": ("me/rag", "model", None)}
    places |= {piece: (facts[piece]["repo"], kind, facts[piece]["revision"]) for piece, kind in KINDS.items()}
    for piece, (name, kind, revision) in places.items():
        pulled = files_of(pipeline._download(name, revision=revision, token=None, repo_type=kind))
        for path, content in files_of(folder / piece).items():
            assert path in ("README.md", "index.faiss") or pulled[path] == content


def test_an_earlier_revision_loads_its_own_retriever_and_index(folder, pair, copy, hub, corpus_files, tmp_path):
    push_pair(folder, "me/rag", tag="round-1")
    other = Retriever.load(str(tiny.make_retriever(tmp_path / "other", seed=1)), max_tokens=32)
    other.save(copy / "retriever")
    index_of(other, corpus_files).save(copy / "index")
    facts = json.loads((copy / "cozyrag.json").read_text())
    facts["retriever"]["fingerprint"] = other.fingerprint()
    (copy / "cozyrag.json").write_text(json.dumps(facts))
    push_pair(copy, "me/rag", tag="round-2")
    assert CozyRAG.from_pretrained("me/rag").retriever.fingerprint() == other.fingerprint()
    for revision in ("round-1", hub.repo("me/rag").tags["round-1"]):
        pulled = CozyRAG.from_pretrained("me/rag", revision=revision)
        assert pulled.answers(ASKED[:3]) == pair.answers(ASKED[:3])


def committed(name, path, content, kind="model"):
    """Change a repository by hand; returns the new revision."""
    return HfApi().upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=name, repo_type=kind).oid


def named(hub, piece, revision):
    """Set another revision of a piece in cozyrag.json, as a user or a broken tool might."""
    facts = json.loads(hub.read("me/rag", "cozyrag.json"))
    facts[piece]["revision"] = revision
    committed("me/rag", "cozyrag.json", json.dumps(facts).encode())


def test_an_index_of_another_retriever_is_refused_naming_both(folder, hub, pair):
    push_pair(folder, "me/rag")
    facts = json.loads(hub.read("me/rag-index", "index.json", kind="datasets"))
    foreign = json.dumps(facts | {"retriever_fingerprint": "0123456789abcdef"}).encode()
    named(hub, "index", committed("me/rag-index", "index.json", foreign, "dataset"))
    with pytest.raises(InputError, match=f"0123456789abcdef.*{pair.retriever.fingerprint()}"):
        CozyRAG.from_pretrained("me/rag")


def test_another_retriever_than_the_one_named_is_refused_naming_both(folder, hub, pair, tmp_path):
    push_pair(folder, "me/rag")
    other = Retriever.load(str(tiny.make_retriever(tmp_path / "other", seed=1)), max_tokens=32)
    other.save(tmp_path / "other")
    weights = (tmp_path / "other" / "model.safetensors").read_bytes()
    named(hub, "retriever", committed("me/rag-retriever", "model.safetensors", weights))
    with pytest.raises(
        InputError, match=f"made by retriever {pair.retriever.fingerprint()}.*in use is {other.fingerprint()}"
    ):
        CozyRAG.from_pretrained("me/rag")


def test_pickles_code_and_the_faiss_file_are_not_downloaded(folder, hub, tmp_path):
    push_pair(folder, "me/rag")
    for name in ("pytorch_model.bin", "modeling_own.py", "optimizer.pt", "data.pkl"):
        committed("me/rag", name, b"evil")
    CozyRAG.from_pretrained("me/rag")
    fetched = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink()}
    assert {Path(name).suffix for name in fetched} <= {".json", ".safetensors", ".parquet", ".md", ".txt"}
    assert "model.safetensors" in fetched and "index.faiss" not in fetched


@pytest.mark.parametrize("fault", ["500", "429", "cut", "half", "slow"])
@pytest.mark.parametrize(
    "step", ["/api/models/me/rag/revision", "/tree/", "resolve/.*/model.safetensors", "resolve/.*/config.json"]
)
def test_transient_faults_cost_only_time(folder, pair, hub, step, fault):
    push_pair(folder, "me/rag")
    hub.fail(step, fault, method="GET")
    assert CozyRAG.from_pretrained("me/rag").answer(ASKED[0]) == pair.answer(ASKED[0])
    assert fault in [status for _, _, status in hub.asked(step)]


def not_loaded(name="me/rag", **options):
    with pytest.raises(InputError) as caught:
        CozyRAG.from_pretrained(name, **options)
    message = str(caught.value)
    assert f"found no folder {name!r}" in message and "hf_" not in message and message.count("To load it, ") == 1
    return message


def test_a_missing_repository(hub):
    message = not_loaded()
    assert "the Hub has no me/rag, or it is private" in message and "check the name, or run `hf auth login`" in message


def test_a_private_repository_without_access(folder, hub, monkeypatch):
    push_pair(folder, "me/rag", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "it is private" in not_loaded()
    assert CozyRAG.from_pretrained("me/rag", token="hf_right").top_k == 3


def test_a_wrong_token(folder, hub, monkeypatch):
    push_pair(folder, "me/rag")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = not_loaded()
    assert "does not accept the token in HF_TOKEN" in message and "unset it" in message


def test_a_missing_revision(folder, hub):
    push_pair(folder, "me/rag")
    message = not_loaded(revision="round-7")
    assert "at revision 'round-7'" in message and "no such revision" in message


def test_no_network(folder, hub):
    push_pair(folder, "me/rag")
    hub.__exit__()
    message = not_loaded()
    assert f"{hub.endpoint} cannot be reached" in message and "check the network" in message
    assert hub.waited == [1, 2, 4]


def test_a_hub_that_is_down(folder, hub):
    push_pair(folder, "me/rag")
    hub.fail("resolve", "500", times=999)
    assert "the Hub reports an internal error (status 500)" in not_loaded()


def test_a_full_disk_during_a_download_keeps_finished_files(folder, pair, hub, monkeypatch):
    push_pair(folder, "me/rag")
    fetch = file_download.http_get

    def full(url, *given, **options):
        if "model.safetensors" in url:
            raise OSError(errno.ENOSPC, "No space left on device")
        return fetch(url, *given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(file_download, "http_get", full)
        message = not_loaded()
    assert "the disk is full (No space left on device)" in message and "HF_HOME" in message and hub.waited == []
    asked = len(hub.asked("me/rag/resolve/.*/tokenizer.json", method="GET"))
    assert CozyRAG.from_pretrained("me/rag").answer(ASKED[0]) == pair.answer(ASKED[0])
    assert len(hub.asked("me/rag/resolve/.*/tokenizer.json", method="GET")) == asked


def test_a_folder_takes_precedence_over_a_repository_of_that_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(pipeline, "snapshot_download", lambda *a, **k: pytest.fail("the Hub was asked"))
    assert CozyRAG.from_pretrained("run").answer(ASKED[0]).passages


def test_read_pair_returns_the_contents_of_the_file(folder):
    assert read_pair(folder) == json.loads((folder / "cozyrag.json").read_text())
    assert read_pair(folder)["prompt"] == {"question_cue": "\nQuestion: ", "answer_cue": "\nAnswer:"}


# ---- the package itself


def test_the_package_exports_its_public_names():
    assert (cozyrag.CozyRAG, cozyrag.Answer, cozyrag.Source) == (CozyRAG, Answer, Source)
    assert all(getattr(cozyrag, name) for name in cozyrag.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        cozyrag.nothing  # noqa: B018


def test_reading_the_version_does_not_import_torch():
    code = (
        "import cozyrag, sys; assert cozyrag.__version__ and not {'torch', 'transformers', 'faiss'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(cozyrag.__file__).parents[1], check=True)


@pytest.mark.parametrize("place", ["../elsewhere", "/etc", "generator/../../elsewhere"])
@pytest.mark.parametrize("piece", ["generator", "retriever", "index"])
def test_a_pair_that_names_a_place_outside_its_folder_is_refused(copy, piece, place):
    pair = json.loads((copy / "cozyrag.json").read_text())
    pair[piece]["folder"] = place
    (copy / "cozyrag.json").write_text(json.dumps(pair))
    with pytest.raises(InputError, match="outside"):
        CozyRAG.from_pretrained(copy)


# ---- threads


def test_threads_with_different_top_k_share_one_pair(folder):
    """Eight threads with their own top_k get the answers that one thread gets alone."""
    pair, alone = CozyRAG.from_pretrained(folder), CozyRAG.from_pretrained(folder)
    asked = [(f"What colour is the fox {number}?", number % 4 + 1) for number in range(40)]
    expected = [alone.answer(question, top_k=k) for question, k in asked]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda each: pair.answer(each[0], top_k=each[1]), asked))
    for each, right in zip(found, expected, strict=True):
        assert (each.text, each.context, each.passages) == (right.text, right.context, right.passages)


def test_calls_of_threads_are_answered_one_after_another(folder, monkeypatch):
    """Tokenizers keep the padding of their last call, and raise "Already borrowed" if it changes during another."""
    pair, inside, most = CozyRAG.from_pretrained(folder), [], []

    def counted(real, *given, **named):
        inside.append(1)
        most.append(len(inside))
        found = real(*given, **named)
        inside.pop()
        return found

    for owner, name in ((pair.retriever, "encode"), (pair.retriever, "encode_passages"), (pair.generator, "write")):
        monkeypatch.setattr(owner, name, partial(counted, getattr(owner, name)))
    jobs = [(number, number % 3) for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        calls = [lambda n: pair.answer(f"Fox {n}?"), lambda n: pair.retrieve(f"Fox {n}?", 1 + n % 5), lambda n: pair]
        list(pool.map(lambda job: calls[job[1]](job[0]), jobs))
    assert max(most) == 1 and len(most) >= 24


def test_inference_leaves_the_modules_of_the_generator_as_they_are(folder, monkeypatch):
    """Only losses are computed with a replaced last block: answers of two threads would share the replacement."""

    def refused(*given):
        raise AssertionError("the last block was replaced")

    pair = CozyRAG.from_pretrained(folder)
    monkeypatch.setattr(token_losses, "read_only_at", refused)
    assert len(pair.answers(ASKED)) == len(ASKED)


# ---- passages alone, and their metadata


def test_retrieved_passages_are_those_of_the_answer(pair):
    for k in (None, 1, 5):
        found = pair.retrieve(ASKED, k)
        assert [[each.id for each in own] for own in found] == [
            [each.id for each in answer.passages] for answer in pair.answers(ASKED, top_k=k)
        ]
        assert pair.retrieve(ASKED[0], k) == pair.retrieve([ASKED[0]], k)[0]
        assert all(source.used == () and source.read == () for own in found for source in own)
    assert pair.retrieve([]) == []


@pytest.mark.parametrize(("question", "top_k"), [("", 1), ([" "], 1), ("What?", 0), (None, 1), ([1], 1), ("x", "1")])
def test_retrieval_checks_its_arguments_as_answers_are_checked(pair, question, top_k):
    with pytest.raises((InputError, TypeError)):
        pair.retrieve(question, top_k)


@pytest.mark.parametrize("factory", ["Flat", "SQ8"])
def test_metadata_go_from_the_passage_file_to_the_sources(copy, pair, tmp_path, factory):
    rows = [row | {"url": f"https://x.org/{row['id']}", "page": n} for n, row in enumerate(PASSAGES)]
    table = read_passages(str(tiny.write_jsonl(tmp_path / "p.jsonl", rows)))[0]
    index = PassageIndex(table, pair.index.vectors, fingerprint=pair.index.fingerprint, factory=factory)
    assert index.passages == pair.index.passages and pair.index.passages.metadata is None
    index.save(copy / "index")
    CozyRAG.from_pretrained(copy).index.save(copy / "index")  # what was loaded is saved again
    for source in CozyRAG.from_pretrained(copy).answer(ASKED[0]).passages:
        assert source.metadata == {"url": f"https://x.org/{source.id}", "page": int(source.id[1:])}
    assert all(source.metadata == {} for source in pair.answer(ASKED[0]).passages)
    assert hash(source) == hash(source)


# ---- earlier versions


def test_a_pair_of_format_1_is_read_with_its_old_names(copy, pair):
    path = copy / PAIR_FILE
    facts = json.loads(path.read_text())
    facts["format_version"], facts["contexts"]["context_filter"] = 1, "both"
    path.write_text(json.dumps(facts))
    assert read_pair(copy)["contexts"]["context_filter"] == "hybrid"
    question = "What colour is the fox 3?"
    assert CozyRAG.from_pretrained(copy).answer(question).text == pair.answer(question).text
