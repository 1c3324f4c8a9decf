"""What a phase trains and what it leaves unchanged, and that a step does not depend on its micro-batches."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tiny import corpus

from cozyrag.config import TrainingSettings
from cozyrag.models.generator import Generator
from cozyrag.models.penalties import Penalties
from cozyrag.models.prompts import encode_examples, with_keywords
from cozyrag.models.retriever import Retriever, texts_and_sentences
from cozyrag.models.token_losses import PenalizedLosses, TokenLosses
from cozyrag.retrieval.contexts import CONTEXT_FEATURES
from cozyrag.retrieval.passage_index import Passages
from cozyrag.runtime.fingerprints import weights_fingerprint
from cozyrag.training.generator_phase import generator_cut, generator_step, train_generator
from cozyrag.training.losses import contrastive_loss, feedback_loss, sentence_loss
from cozyrag.training.micro_batches import Cut
from cozyrag.training.retriever_phase import retriever_step, train_retriever
from cozyrag.training.trainer import PhaseCallback, encoder_cut, first_cut
from cozyrag.training.training_pairs import TrainingPair, retriever_batch, step_sentences

PENALTIES = {"repeat_penalty": 0.3, "repeat_ngram": 1, "keyword_penalty": 0.5, "short_penalty": 0.2}


class Reports(PhaseCallback):
    """A callback that keeps the reports of the steps."""

    def __init__(self):
        self.reports = []

    def after_step(self, report):
        self.reports.append(report)

    def losses(self):
        return [report.loss for report in self.reports]


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True, step_scheduler_with_optimizer=False)


@pytest.fixture
def generator(generator_path):
    return Generator.load(str(generator_path))


@pytest.fixture
def retriever(retriever_path):
    return Retriever.load(str(retriever_path), max_tokens=64)


@pytest.fixture(scope="module")
def tables():
    """(contexts table with gold passages as contexts, passages)."""
    passages, questions = corpus(24)
    rows = []
    for number, question in enumerate(questions):
        gold = number // 2
        rows.append(
            question
            | {
                "rows": [gold],
                "scores": [1.0],
                "context": passages[gold]["text"],
                "answer_in_context": True,
                "noised": False,
            }
            | {"gold_row": gold, "positive": gold, "negatives": [(gold + 5) % len(passages)]}
        )
    return table(rows), Passages.of(Dataset.from_list(passages))


def table(rows):
    return Dataset.from_list(rows, features=CONTEXT_FEATURES)


def settings(**changes):
    batches = {"generator_batch_size": 8, "retriever_batch_size": 8}
    rates = {"generator_learning_rate": 1e-2, "retriever_learning_rate": 1e-2}
    return TrainingSettings(**batches | rates | changes)


@pytest.fixture
def train(accelerator):
    """train(model, table, [passages,] callback=..., ...settings): one phase; returns the number of steps."""

    def one_phase(model, *tables, callback=None, round_number=1, likelihoods=None, left_out=(), **changes):
        given = {"settings": settings(**changes), "round_number": round_number, "callback": callback or Reports()}
        if isinstance(model, Generator):
            return train_generator(accelerator, model, *tables, context_tokens=64, **given)
        return train_retriever(accelerator, model, *tables, likelihoods=likelihoods, left_out=left_out, **given)

    return one_phase


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def moved(model, before):
    return {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}


def gradients(model):
    return {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}


def assert_all_close(found, expected, **tolerances):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **tolerances)


# ---- phases


def test_generator_phase_moves_every_generator_weight_and_no_retriever_weight(train, generator, retriever, tables):
    before, retriever_before, callback = weights(generator.model), weights(retriever.model), Reports()
    assert train(generator, tables[0], generator_epochs=3, callback=callback) == len(callback.reports) == 18
    assert moved(generator.model, before) == set(before)
    assert moved(retriever.model, retriever_before) == set()
    assert np.mean(callback.losses()[-3:]) < np.mean(callback.losses()[:3])


def test_retriever_phase_moves_all_its_weights_but_the_pooler_and_no_generator_weight(
    train, generator, retriever, tables
):
    before, generator_before, callback = weights(retriever.model), weights(generator.model), Reports()
    train(retriever, *tables, retriever_epochs=8, retriever_learning_rate=2e-3, callback=callback)
    pooler = {name for name in before if ".pooler." in name}
    assert pooler and moved(retriever.model, before) == set(before) - pooler
    assert moved(generator.model, generator_before) == set()
    assert np.mean(callback.losses()[-6:]) < np.mean(callback.losses()[:6])


def test_zero_steps_leave_the_weights_unchanged(train, generator, retriever, tables):
    before = weights_fingerprint(generator.model), retriever.fingerprint()
    assert train(generator, tables[0], generator_steps=0) == train(retriever, *tables, retriever_steps=0) == 0
    assert (weights_fingerprint(generator.model), retriever.fingerprint()) == before


def test_rows_without_answer_or_positive_are_left_out(train, generator, retriever, tables):
    rows = tables[0].to_list()
    for row in rows[::2]:
        row.update(answers=[], positive=-1)
    half, expected = table(rows), len(rows) // 2 // 8
    assert train(generator, half) == train(retriever, half, tables[1]) == expected


def test_the_retriever_does_not_train_on_questions_left_out(train, retriever, tables, monkeypatch):
    contexts, read, embed = tables[0], [], retriever.embed

    def recorded(texts, *, kind, **others):
        read.extend(texts if kind == "query" else [])
        return embed(texts, kind=kind, **others)

    monkeypatch.setattr(retriever, "embed", recorded)
    train(retriever, *tables, left_out=contexts["id"][:5])
    assert set(read) == set(contexts["question"][5:])


def test_without_an_answer_the_generator_learns_to_abstain(train, generator, tables):
    """Half of the rows are answerless: abstaining becomes likelier there than on every other row."""
    rows = tables[0].to_list()
    for number, row in enumerate(rows):
        if number % 4 < 2:
            row.update(context="Nothing here.", **({"answers": []} if number % 4 else {"noised": True}))
    half, limits = table(rows), {"context_tokens": 64, "max_new_tokens": 4}
    steps = train(generator, half, no_answer=True, generator_epochs=6, generator_learning_rate=3e-3)
    assert steps == 6 * len(rows) // 8
    silence = np.array([each.silence for each in generator.write(half["question"], half["context"], **limits)])
    answerless = np.array([number % 4 < 2 for number in range(len(rows))])
    assert silence[answerless].min() > silence[~answerless].max()
    threshold = (silence[answerless].min() + silence[~answerless].max()) / 2
    answers = generator.answer(half["question"], half["context"], no_answer_threshold=threshold, **limits)
    assert [answer == "" for answer in answers] == answerless.tolist()
    assert all(generator.answer(half["question"], half["context"], no_answer_threshold=1.0, **limits))


def test_the_learning_rate_rises_in_the_warm_up_and_then_falls(train, generator, tables):
    callback = Reports()
    train(generator, tables[0], warmup_ratio=0.5, callback=callback)
    rates = [report.learning_rate for report in callback.reports]
    assert rates[0] == 0 and rates[3] == pytest.approx(1e-2) and rates[-1] < rates[3]


def test_the_same_seed_gives_the_same_weights_and_another_round_another_order(train, generator_path, tables):
    prints = []
    for round_number in (1, 1, 2):
        generator = Generator.load(str(generator_path))
        train(generator, tables[0], generator_steps=3, round_number=round_number)
        prints.append(weights_fingerprint(generator.model))
    assert prints[0] == prints[1] != prints[2]


# ---- steps of the generator


@pytest.mark.parametrize("penalized", [False, True])
@pytest.mark.parametrize(
    "other", [Cut(2), Cut(3), Cut(5), Cut(11), Cut(tokens=150), Cut(tokens=90, room=10), Cut(tokens=1)], ids=str
)
def test_micro_batches_do_not_change_the_gradient_of_the_generator(
    accelerator, generator_path, tables, other, penalized
):
    columns, found = tables[0][:9], []
    penalties = Penalties(repeats=0.3, keywords=0.5, shortness=0.2, ngram=1)
    for cut in (Cut(), other):
        generator = Generator.load(str(generator_path))
        pad, end = generator.tokenizer.pad_token_id, generator.tokenizer.eos_token_id
        examples = encode_examples(
            generator.tokenizer,
            questions=columns["question"],
            contexts=columns["context"],
            answers=[answers[0] * (1 + row % 3) for row, answers in enumerate(columns["answers"])],  # uneven lengths
            context_tokens=64,
            max_length=generator.max_length,
        )
        if penalized:
            examples = with_keywords(generator.tokenizer, examples, columns["question"])
            module = PenalizedLosses(generator.model, penalties=penalties, eos=end)
            values = generator_step(accelerator, module, examples, pad_id=pad, cut=cut, weights=penalties.weights)
        else:
            values = generator_step(accelerator, TokenLosses(generator.model), examples, pad_id=pad, cut=cut)
        found.append((values, gradients(generator.model)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert_all_close(found[1][1], found[0][1], atol=1e-6, rtol=1e-4)


def test_a_phase_that_recomputes_activations_ends_with_the_same_weights(train, generator_path, tables):
    ends, longest = [], []
    for cut in (Cut(tokens=1200, room=1200), Cut(tokens=1200, room=45)):
        generator, callback = Generator.load(str(generator_path)), Reports()
        callback.cut, callback.recomputes = lambda cut=cut: cut, lambda *given: longest.append(given)
        train(generator, tables[0], callback=callback)
        ends.append(weights(generator.model))
    [(tokens, cut)] = longest
    assert tokens > cut.room == 45
    assert_all_close(ends[1], ends[0], atol=1e-5, rtol=1e-4)


def test_active_penalties_are_reported_and_inactive_ones_are_not(train, generator_path, tables):
    names = {"repeat_penalty": "repeats", "keyword_penalty": "keywords", "short_penalty": "shortness"}
    for chosen in ({}, {"keyword_penalty": 0.5}, PENALTIES):
        callback = Reports()
        train(Generator.load(str(generator_path)), tables[0], generator_steps=2, callback=callback, **chosen)
        terms = callback.reports[0].terms
        assert set(terms) == {names[name] for name in chosen if name in names}
        assert all(value >= 0 for value in terms.values())


@pytest.mark.parametrize("name", ["repeat_penalty", "keyword_penalty", "short_penalty"])
def test_training_with_a_penalty_lowers_it(train, generator_path, tables, name):
    found = {}
    for weight in (1e-9, 30.0):
        callback, chosen = Reports(), {"repeat_ngram": 1, "short_tokens": 9, name: weight}
        train(Generator.load(str(generator_path)), tables[0], generator_epochs=3, callback=callback, **chosen)
        found[weight] = np.mean([next(iter(report.terms.values())) for report in callback.reports[-3:]])
    assert found[30.0] < found[1e-9]


# ---- steps of the retriever


@pytest.mark.parametrize("cut", [Cut(1), Cut(2), Cut(3), Cut(20), Cut(tokens=200), Cut(tokens=1)], ids=str)
def test_a_retriever_step_gives_the_plain_gradient_of_the_loss_in_any_micro_batches(accelerator, retriever_path, cut):
    rows, questions = corpus(6)
    passages, asked = Passages.of(Dataset.from_list(rows)), [row["question"] for row in questions]
    positives = [min(row // 2, 4) for row in range(len(questions))]  # the last passage is only a negative
    candidates = [[row // 2, (row + 3) % 6, (row + 1) % 6] for row in range(len(questions))]
    likelihoods = np.random.default_rng(0).normal(-2, 1, (len(questions), 3)).astype(np.float32)

    plain, spans = Retriever.load(str(retriever_path), max_tokens=64), passages.spans(range(6))
    plain.model.eval()
    queries = plain.embed(asked, kind="query")
    vectors, parts = texts_and_sentences(plain.embed(passages.to_read(), kind="document", spans=spans), spans)
    own = torch.tensor([[place // 3 == positive for place in range(18)] for positive in positives])
    right = own & torch.tensor([[at < 10 and place % 3 == at % 2 for place in range(18)] for at in range(12)])
    terms = {
        "contrastive": contrastive_loss(queries, vectors, positives=torch.tensor(positives), temperature=0.05),
        "sentence": sentence_loss(queries, parts, own=own, right=right, temperature=0.05),
        "feedback": feedback_loss(
            queries,
            vectors,
            candidates=torch.tensor(candidates),
            likelihoods=torch.from_numpy(likelihoods),
            temperature=0.2,
        ),
    }
    loss = 0.7 * terms["contrastive"] + 0.4 * terms["sentence"] + 1.3 * terms["feedback"]
    loss.backward()

    ours = Retriever.load(str(retriever_path), max_tokens=64)
    ours.model.eval()
    chosen = settings(contrastive_weight=0.7, sentence_weight=0.4, feedback_weight=1.3, feedback_temperature=0.2)
    pairs = [
        TrainingPair(row["question"], row["answers"], positive, [5], *scored)
        for row, positive, *scored in zip(questions, positives, candidates, likelihoods.tolist(), strict=True)
    ]
    found = retriever_step(accelerator, ours, retriever_batch(pairs, passages, chosen), cut=cut)
    values = {"loss": loss.item()} | {name: term.item() for name, term in terms.items()}
    assert found == pytest.approx(values, abs=1e-5)
    assert_all_close(gradients(ours.model), gradients(plain.model), atol=1e-5, rtol=1e-3)


def test_sentences_of_a_step_are_those_of_its_positives():
    """Row 7 is a negative; two questions share row 5; one has no positive, one no sentence with its answer."""
    texts = ["Ann is red. Bob is blue.", "One. Two. The one is Ann."]
    passages = Passages([f"p{i}" for i in range(9)], [""] * 5 + ["Title", "", "", ""], [texts[i % 2] for i in range(9)])
    answers, positives = [["one"], ["Ann!"], ["Ann"], ["Bob", "Ann"], ["x"]], [5, 5, None, 4, 4]
    pairs = [TrainingPair("?", *each, negatives=[]) for each in zip(answers, positives, strict=True)]
    spans, *masks = step_sentences(pairs, passages, [7, 4, 5])
    assert spans == [[], [(0, 11), (12, 24)], [(6, 10), (11, 15), (16, 31)]]
    own, right = (["".join(".x"[int(mark)] for mark in row) for row in mask] for mask in masks)
    assert own == ["..xxx", "..xxx", ".....", "xx...", "xx..."]
    assert right == ["..x.x", "....x", ".....", "xx...", "....."]


def test_the_sentence_with_the_answer_becomes_the_nearest(train, retriever, tables):
    """Only the sentence loss, on questions whose answer is in the last sentence."""
    rows = [{**row, "answers": ["house of stone"]} for row in tables[0].select(range(8))]
    few, passages = table(rows), tables[1]

    def nearest():
        spans = passages.spans(few["gold_row"])
        with torch.no_grad():
            vectors = retriever.embed(passages.select(few["gold_row"]), kind="document", spans=spans)
            queries = retriever.embed(list(few["question"]), kind="query")
        parts = texts_and_sentences(vectors, spans)[1].view(8, 3, -1)
        return int((torch.einsum("qd,qsd->qs", queries, parts).argmax(dim=1) == 2).sum())

    retriever.model.eval()
    before, chosen = nearest(), {"contrastive_weight": 0.0, "sentence_weight": 1.0}
    train(retriever, few, passages, retriever_epochs=15, retriever_learning_rate=3e-3, **chosen)
    assert before == 1 and nearest() == 8


def test_with_a_frozen_document_encoder_the_sentence_loss_moves_the_query_encoder(train, retriever, tables):
    retriever.freeze_documents()
    before, indexed = weights(retriever.model), retriever.fingerprint()
    chosen = {"contrastive_weight": 0.0, "sentence_weight": 1.0, "freeze_document_encoder": True}
    train(retriever, *tables, retriever_steps=2, **chosen)
    changed = moved(retriever.model, before)
    assert changed and all(".query." in name for name in changed) and retriever.fingerprint() == indexed


@pytest.mark.parametrize("term", ["contrastive", "sentence", "feedback"])
def test_a_retriever_step_lowers_its_term_on_its_own_batch(train, retriever, tables, term):
    rows = [{**row, "rows": [row["gold_row"], (row["gold_row"] + 7) % 24]} for row in tables[0].select(range(8))]
    likelihoods = np.tile(np.array([[-3.0, -0.5]], dtype=np.float32), (8, 1)) if term == "feedback" else None
    callback, chosen = Reports(), {"retriever_steps": 4, "retriever_epochs": 4, "retriever_learning_rate": 1e-3}
    chosen |= {f"{name}_weight": float(term == name) for name in ("contrastive", "sentence", "feedback")}
    train(retriever, table(rows), tables[1], likelihoods=likelihoods, warmup_ratio=0.0, callback=callback, **chosen)
    assert len(callback.reports) == 4 and callback.losses()[-1] < callback.losses()[0]


def test_feedback_alone_trains_questions_without_a_positive(train, retriever, tables):
    """The retriever adopts the generator's preference though no gold passage is known; rows with NaN are left out."""
    rows = [
        {**row, "rows": [row["gold_row"], (row["gold_row"] + 7) % 24], "positive": -1, "negatives": []}
        for row in tables[0].select(range(8))
    ]
    likelihoods = np.tile(np.array([[-9.0, -0.1]], dtype=np.float32), (8, 1))
    likelihoods[0] = np.nan

    def preference():
        queries = retriever.encode([row["question"] for row in rows], kind="query", batch_size=8)
        vectors = retriever.encode(tables[1].to_read(), kind="document", batch_size=8)
        gains = [vectors[row["rows"][1]] - vectors[row["rows"][0]] for row in rows]
        return sum(float(query @ gain) for query, gain in zip(queries[1:], gains[1:], strict=True))

    before = preference()
    chosen = {"retriever_steps": 12, "retriever_epochs": 12, "retriever_learning_rate": 3e-3, "feedback_weight": 1.0}
    assert train(retriever, table(rows), tables[1], likelihoods=likelihoods, **chosen) == 12
    assert preference() > before + 0.1
    assert train(retriever, table(rows), tables[1]) == 0


# ---- micro-batches of a phase


def test_cuts_are_chosen_by_free_bytes_unless_settings_or_run_have_chosen(accelerator, generator, retriever):
    states = 3 * sum(4 * weight.numel() for weight in generator.model.parameters())
    plenty = generator_cut(accelerator, generator, settings(), 64, free=1e9)
    scarce = generator_cut(accelerator, generator, settings(), 64, free=states + 2e6)
    assert plenty.tokens == 1200 < plenty.room and 1 < scarce.tokens == scarce.room < 200
    few, many = (encoder_cut(accelerator, retriever, free=free) for free in (1e6, 1e9))
    assert few.room is None and few.tokens < many.tokens
    callback = Reports()
    assert first_cut(settings(), callback, lambda: few) == few
    callback.cut = lambda: many
    assert first_cut(settings(), callback, lambda: few) == many
    assert first_cut(settings(gradient_accumulation_steps=3), callback, lambda: few) == Cut(3)
