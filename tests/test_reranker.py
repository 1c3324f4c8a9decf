"""The reranker: its scores, the search ordered by them, its training, and a pair that has one."""

import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from kill_run import differences, left
from local_hub import LocalHub, point_client_at
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.losses import ListNetLoss
from short_run import at_step, checkpoints, rows, send

import cozyrag.training.rounds
from cozyrag import CozyRAG
from cozyrag.cli import entry_point
from cozyrag.config import TrainingSettings, parse_settings
from cozyrag.errors import InputError
from cozyrag.hub.push import push_pair
from cozyrag.models.reranker import Reranker
from cozyrag.pair_file import read_pair
from cozyrag.retrieval.passage_index import Passages
from cozyrag.retrieval.reranking import NATS, Reranking
from cozyrag.run import train
from cozyrag.training.losses import ranking_loss
from cozyrag.training.micro_batches import Cut
from cozyrag.training.reranker_phase import NEGATIVES, rankings_of, reranker_step, train_reranker
from cozyrag.training.trainer import PhaseCallback

PAIRS = [
    ("What colour is the fox 3?", "Fox 3\nThe fox 3 is red. It was made in 1503."),
    ("What colour is the fox 3?", "River 4"),
    ("Who?", "The garden 9 is yellow. " * 30),
]


@pytest.fixture
def reranker(reranker_path):
    return Reranker.load(str(reranker_path))


@pytest.fixture
def trained(reranker):
    """With a head that is not zero."""
    torch.nn.init.normal_(reranker.model[0].model.classifier.weight)
    return reranker


# ---- the model


def test_an_untrained_reranker_scores_all_texts_alike(reranker):
    assert not reranker.is_trained and reranker.score(PAIRS).tolist() == [0.0, 0.0, 0.0]


def test_its_scores_are_those_of_the_saved_cross_encoder(trained, tmp_path):
    trained.save(tmp_path / "saved")
    theirs = CrossEncoder(str(tmp_path / "saved"), device="cpu").predict(PAIRS)
    assert trained.is_trained and len(set(theirs.tolist())) == 3
    np.testing.assert_allclose(trained.score(PAIRS), theirs, rtol=1e-4, atol=1e-5)
    again = Reranker.load(str(tmp_path / "saved"))
    assert again.fingerprint() == trained.fingerprint() and again.is_trained
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]


def test_scores_keep_the_order_of_the_pairs(trained):
    together = trained.score(PAIRS)
    np.testing.assert_allclose(together, [trained.score([pair])[0] for pair in PAIRS], rtol=1e-4, atol=1e-5)
    assert trained.score([]).shape == (0,)


def test_a_restored_reranker_has_the_weights_of_the_checkpoint(trained, reranker_path):
    trained.restore(reranker_path)
    assert not trained.is_trained


def test_a_cross_encoder_with_several_outputs_is_refused(retriever_path, tmp_path):
    CrossEncoder(str(retriever_path), num_labels=3, device="cpu").save_pretrained(str(tmp_path / "three"))
    with pytest.raises(InputError, match="--reranker.*expected a CrossEncoder with one output, found 3"):
        Reranker.load(str(tmp_path / "three"))


def test_a_folder_that_is_no_model_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match="Expected --reranker to be a CrossEncoder folder.*--reranker embedded"):
        Reranker.load(str(tmp_path))


# ---- the loss


def test_the_loss_is_that_of_sentence_transformers_with_one_relevant_text(trained):
    documents = [["a red fox", "a river"], ["the fox 3 is red", "stone", "garden"]]
    questions = ["What colour?", "Who is it?"]
    labels = [torch.tensor([100.0] + [0.0] * (len(each) - 1)) for each in documents]  # their softmax is 1, 0, ...
    theirs = ListNetLoss(trained.model)([questions, documents], labels)
    pairs = [(question, text) for question, each in zip(questions, documents, strict=True) for text in each]
    ours = ranking_loss(trained.logits(pairs), [2, 3])
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


def test_the_loss_by_hand():
    scores = torch.tensor([2.0, 0.0, 1.0, 1.0, 1.0])
    expected = (np.log(1 + np.exp(-2)) + np.log(3)) / 2
    assert ranking_loss(scores, [2, 3]).item() == pytest.approx(expected)


# ---- the order of a search


def passages(count):
    return Passages([f"p{row}" for row in range(count)], [""] * count, [f"text {row}" for row in range(count)])


def reranking(points, **options):
    """Scores by row, for any question."""
    return Reranking(
        lambda pairs: np.array([points[int(text.split()[-1])] for _, text in pairs]), passages(6), **options
    )


SCORES, ROWS = np.array([[9.0, 8.0, 7.0, 6.9]], dtype=np.float32), np.array([[3, 0, 5, 1]])
POINTS = {3: -2.0, 0: 0.0, 5: 1.5, 1: 50.0}


def test_the_first_passages_are_ordered_by_both_scores_and_the_others_stay_behind():
    scores, found = reranking(POINTS, depth=3, weight=1.0).ordered(["q"], SCORES, ROWS)
    # 9 - 2, 8 + 0, 7 + 1.5, each plus 2, so that nothing is taken away; row 1 is not read
    assert found.tolist() == [[5, 0, 3, 1]]
    np.testing.assert_allclose(scores, [[10.5, 10.0, 9.0, 6.9]])
    scores, found = reranking(POINTS, depth=3, weight=0.0).ordered(["q"], SCORES, ROWS)
    assert found is ROWS and scores is SCORES


def test_without_passages_nothing_is_read():
    empty = np.zeros((2, 0))
    assert reranking({}, depth=3, weight=1.0).ordered(["a", "b"], empty, empty.astype(int))[1].shape == (2, 0)


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="finite scores from the reranker"):
        reranking(dict.fromkeys(range(6), np.nan), depth=3, weight=1.0).ordered(["q"], SCORES, ROWS)


@pytest.mark.parametrize(("sign", "better"), [(1, True), (-1, False)])
def test_the_fitted_weight_depends_on_whether_the_reranker_is_right(sign, better):
    random = np.random.default_rng(0)
    rows_found = np.stack([random.permutation(6)[:4] for _ in range(200)])
    relevant = rows_found[np.arange(200), random.integers(4, size=200)]  # anywhere among those found
    questions = [f"{row}" for row in relevant]

    def score(pairs):
        return np.array([3.0 * sign * (text.split()[-1] == question) for question, text in pairs])

    plain = Reranking(score, passages(6), depth=4)
    fitted, facts = plain.fitted(questions, np.tile(SCORES, (200, 1)), rows_found, relevant, mode="hybrid")
    assert facts["reranker"] == fitted.weight and (fitted.weight > NATS["hybrid"]) is better
    assert facts["recall@1 before"] < 0.4
    if better:
        assert facts["recall@1"] == 1.0
    else:
        assert fitted.weight < 0.1 and facts["recall@1"] >= facts["recall@1 before"] - 0.01


# ---- what it is trained on


def columns(**changed):
    texts = {"id": ["a", "b", "c"], "question": ["q1", "q2", "q3"], "answers": [["0"], ["1"], ["x"]]}
    return (
        texts | {"positive": [0, 1, -1], "rows": [[0, 1, 2, 3, 4, 5], [2, 1, 4, 5, 3, 0], [1, 2, 3, 4, 5, 0]]} | changed
    )


def test_negatives_come_from_what_the_search_finds_and_hold_no_answer():
    found = rankings_of(columns(answers=[["0"], ["2"], ["x"]]), passages(6), depth=4, seed=1)
    assert [ranking.question for ranking in found] == ["q1", "q2"]  # c has no known passage
    assert found[0].rows[0] == 0 and sorted(found[0].rows[1:]) == [1, 2, 3]
    assert found[1].rows[0] == 1 and sorted(found[1].rows[1:]) == [4, 5]  # row 2 holds the answer
    assert found[0].pairs(passages(6))[0] == ("q1", passages(6).select([0])[0])


def test_as_many_negatives_as_a_step_takes_are_drawn_by_the_seed():
    many = {"positive": [0], "rows": [list(range(30))], "id": ["a"], "question": ["q"], "answers": [["x"]]}
    drawn = [rankings_of(many, passages(30), depth=20, seed=seed)[0].rows for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 1 + NEGATIVES == len(set(drawn[0]))
    assert max(drawn[0] + drawn[2]) < 20


def test_questions_that_are_left_out_and_those_without_negatives_do_not_train():
    assert [each.question for each in rankings_of(columns(), passages(6), depth=6, seed=1, left_out=["a"])] == ["q2"]
    assert rankings_of(columns(rows=[[0], [1], []]), passages(6), depth=6, seed=1) == []


def test_the_gradients_do_not_depend_on_the_micro_batches(trained):
    rankings = [PAIRS[:2], PAIRS[1:], [("Who?", "stone"), ("Who?", "fox"), ("Who?", "river 3")]]
    lengths, found = [sum(trained.count_tokens(each)) for each in rankings], []
    for cut in (Cut(), Cut(micro_batches=3), Cut(tokens=60)):
        trained.model.zero_grad()
        loss = reranker_step(Accelerator(cpu=True), trained, rankings, lengths, cut=cut)["loss"]
        found.append((loss, [p.grad.clone() for p in trained.model.parameters() if p.grad is not None]))
    expected = ranking_loss(trained.logits([pair for each in rankings for pair in each]), [2, 2, 3]).item()
    assert found[0][0] == pytest.approx(expected, abs=1e-6)
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        for one, other in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_training_places_the_right_passage_first(reranker):
    texts = [f"The fox is {kind}." for kind in ("red", "blue", "green", "white")]
    asked = [
        {"id": str(number), "question": "Which fox is it?", "answers": ["red"], "positive": 0, "rows": [3, 2, 1, 0]}
        for number in range(32)
    ]
    settings = TrainingSettings(reranker_epochs=5, reranker_batch_size=8, reranker_learning_rate=0.01)
    table = Passages([f"p{row}" for row in range(4)], [""] * 4, texts)
    steps = train_reranker(
        Accelerator(cpu=True), reranker, Dataset.from_list(asked), table,
        depth=4, settings=settings, round_number=1, callback=PhaseCallback(),
    )  # fmt: skip
    scores = reranker.score([("Which fox is it?", text) for text in table.select(range(4))])
    assert steps == 20 and reranker.is_trained
    assert scores[0] > max(scores[1:]) + 1


# ---- a pair with a reranker


@pytest.fixture(scope="module")
def settings(short_run, reranker_path):
    """A run whose reranker learns fast; no feedback, which has nothing to do with it."""
    at = short_run.index("--feedback_weight")
    words = [*short_run[:at], *short_run[at + 2 :]]
    more = "--reranker_steps 4 --reranker_batch_size 8 --reranker_learning_rate 0.01 --rerank_passages 6"
    return [*words, "--reranker", str(reranker_path), *more.split()]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The output folder of that run."""
    out = tmp_path_factory.mktemp("reranked") / "out"
    train([*settings, "--output_dir", str(out)])
    return out


def test_a_run_trains_measures_and_saves_the_reranker(whole):
    assert [row["phase"] for row in rows(whole, "step")] == ["generator"] * 3 + ["reranker"] * 2 + ["retriever"] * 2
    untuned, tuned = rows(whole, "evaluation")
    assert untuned["reranked_recall@1"] == untuned["hybrid_recall@1"] == untuned["recall@1"]
    assert tuned["reranked_recall@1"] == tuned["recall@1"]
    [decision] = [row for row in rows(whole, "rollback") if row["model"] == "reranker"]
    assert decision["metric"] == "mrr@10"
    [retriever] = [row for row in rows(whole, "rollback") if row["model"] == "retriever"]
    assert retriever["metric"] == "hybrid_recall@5"  # the reranker has changed, too
    [checked] = rows(whole, "self-test")
    assert [term["model"] for term in checked["terms"]] == ["generator", "retriever", "reranker"]
    assert checked["terms"][-1]["lowered"] is True  # though its head is zero
    pair = read_pair(whole)
    assert pair["format_version"] == 4 and pair["retrieval"]["reranking"]["depth"] == 6
    assert (whole / "reranker" / "README.md").is_file() and (whole / "report.html").is_file()
    own = Reranker.load(str(whole / "reranker"))
    assert own.is_trained and own.fingerprint() == pair["reranker"]["fingerprint"]


def test_the_pair_answers_with_its_reranker_and_a_copy_does_the_same(whole, tmp_path):
    pair = CozyRAG.from_pretrained(whole)
    question = "What colour is the fox 3?"
    assert pair.searcher.reranking.weight == read_pair(whole)["retrieval"]["reranking"]["weight"]
    found = pair.retrieve(question, 4)
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    pair.searcher = replace(pair.searcher, reranking=replace(pair.searcher.reranking, weight=1e6))  # it alone decides
    first = {each.id for each in pair.retrieve(question, 6)}
    texts = {row: text for row, text in zip(pair.index.passages.ids, pair.index.passages.to_read(), strict=True)}
    scores = {row: pair.reranker.score([(question, texts[row])])[0] for row in first}
    ordered = [each.id for each in pair.retrieve(question, 6)]
    assert [scores[row] for row in ordered] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-5)
    pair = CozyRAG.from_pretrained(whole)
    pair.save_pretrained(tmp_path / "copy")
    again = CozyRAG.from_pretrained(tmp_path / "copy")
    assert again.answer(question) == pair.answer(question)


def test_a_pair_whose_reranker_is_another_is_refused(whole, reranker_path, tmp_path):
    CozyRAG.from_pretrained(whole).save_pretrained(tmp_path / "copy")
    (tmp_path / "copy" / "reranker" / "model.safetensors").write_bytes(
        (reranker_path / "model.safetensors").read_bytes()
    )
    with pytest.raises(InputError, match="model.safetensors"):
        CozyRAG.from_pretrained(tmp_path / "copy")


def test_a_table_that_is_lost_in_the_phase_is_made_again_with_the_reranker_before_it(
    settings, whole, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        at_step(patched, 3, send(signal.SIGTERM), "reranker_step")
        with pytest.raises(SystemExit):
            entry_point(lambda: train([*settings, "--output_dir", str(out)]))
    shutil.rmtree(out / "contexts")
    train([*settings, "--output_dir", str(out)])
    assert differences(left(whole, rounds=1), left(out, rounds=1)) == []


@pytest.mark.parametrize("lost", ["reranker", "reranking"])
def test_a_pair_file_with_half_a_reranker_is_refused(lost, whole, tmp_path):
    CozyRAG.from_pretrained(whole).save_pretrained(tmp_path / "copy")
    facts = json.loads((tmp_path / "copy" / "cozyrag.json").read_text())
    (facts if lost == "reranker" else facts["retrieval"]).pop(lost)
    (tmp_path / "copy" / "cozyrag.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="'reranker' and 'retrieval.reranking' together"):
        CozyRAG.from_pretrained(tmp_path / "copy")


def test_a_signal_in_the_reranker_phase_saves_the_step_and_the_resumed_run_ends_equal(
    settings, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        at_step(patched, 2, send(signal.SIGTERM), "reranker_step")
        with pytest.raises(SystemExit):
            entry_point(lambda: train([*settings, "--output_dir", str(out)]))
    assert checkpoints(out) == ["round-001-0-reranker-000000", "round-001-0-reranker-000002"]
    capsys.readouterr()
    train([*settings, "--output_dir", str(out)])
    assert "Resuming from round-001-0-reranker-000002." in capsys.readouterr().out
    assert differences(left(whole, rounds=1), left(out, rounds=1)) == []
    assert (out / "reranker" / "model.safetensors").read_bytes() == (
        whole / "reranker" / "model.safetensors"
    ).read_bytes()


def test_a_spoiled_reranker_is_rolled_back(settings, tmp_path, monkeypatch):
    def spoil(accelerator, reranker, *rest, **options):
        with torch.no_grad():
            reranker.model[0].model.classifier.weight.copy_(torch.randn(1, 32))
        return 1

    class Opposed(Reranking):
        """The last of those that are read comes first."""

        def points(self, questions, found):
            return np.tile(np.arange(self.depth, dtype=np.float32), (len(questions), 1))

        def fitted(self, *arguments, mode):
            return replace(self, weight=100.0), {}

    monkeypatch.setattr(cozyrag.training.rounds, "train_reranker", spoil)
    monkeypatch.setattr("cozyrag.training.run_retrieval.Reranking", Opposed)
    train([*settings, "--output_dir", str(tmp_path / "out")])
    [decision] = [row for row in rows(tmp_path / "out", "rollback") if row["model"] == "reranker"]
    assert decision["kept"] is False and decision["after"] < decision["before"]
    assert not Reranker.load(str(tmp_path / "out" / "reranker")).is_trained
    untuned, tuned = rows(tmp_path / "out", "evaluation")
    assert tuned["reranked_recall@1"] == tuned["hybrid_recall@1"]


def test_it_goes_to_a_repository_of_its_own_and_comes_back(whole, tmp_path, monkeypatch):
    with LocalHub(tmp_path / "large", tokens={"hf_right": "me"}) as hub:
        point_client_at(hub, monkeypatch, cache=tmp_path / "cache")
        told = push_pair(whole, "me/rag")
        assert "me/rag-reranker (reranker)" in told and told.index("(retriever)") < told.index("(reranker)")
        again = CozyRAG.from_pretrained("me/rag")
        question = "What colour is the fox 3?"
        assert again.answer(question) == CozyRAG.from_pretrained(whole).answer(question)
        assert again.searcher.reranking is not None and again.reranker.is_trained


@pytest.mark.parametrize("off", ["--reranker_steps", "--reranker_epochs"])
def test_an_untrained_reranker_must_be_trained(off):
    with pytest.raises(InputError, match=f"--reranker embedded: expected it to be trained.*{off} 0"):
        parse_settings(["--reranker", "embedded", off, "0"])


def test_the_benchmark_compares_the_search_with_and_without_it(whole, corpus_files, tmp_path, monkeypatch, capsys):
    from benchmarks.quality import reranker as benchmark

    words = ["reranker", str(whole), "--questions", str(corpus_files["eval_questions"]), "--limit", "6"]
    monkeypatch.setattr(
        "sys.argv", [*words, "--budgets", "20", "60", "--sentences", "--json", str(tmp_path / "out.json")]
    )
    benchmark.main()
    screen, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert "6 questions, 40 passages, the first 6 reranked." in screen
    assert list(found["ranks"]) == ["search", "with the reranker", "reranker alone"]
    pair = CozyRAG.from_pretrained(whole)
    questions = [json.loads(line) for line in corpus_files["eval_questions"].read_text().splitlines()]
    first = pair.searcher.first([each["question"] for each in questions], 20).rows
    everywhere = [1 + each.tolist().index(row) for each, row in zip(first, golds(pair, questions), strict=True)]
    drawn = np.random.default_rng(0).permutation(len(questions))[:6]
    assert found["ranks"]["search"] == [everywhere[at] for at in drawn]
    shares = found["answer_in_context"]
    assert set(shares) == {"search", "reranked", "reranked, sentences too"}
    assert all(own["20"] <= own["60"] for own in shares.values())


def golds(pair, questions):
    """The rows of the gold passages."""
    return [pair.index.passages.ids.index(each["passage_id"]) for each in questions]


def test_the_benchmark_refuses_a_pair_without_one(pair_folder, corpus_files, monkeypatch, capsys):
    from benchmarks.quality import reranker as benchmark

    monkeypatch.setattr("sys.argv", ["x", str(pair_folder), "--questions", str(corpus_files["eval_questions"])])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "Expected a pair with a reranker" in capsys.readouterr().err
