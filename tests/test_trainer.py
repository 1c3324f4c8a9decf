"""What a phase moves and what it leaves alone, and that a step's result does not depend on how it is cut."""

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
from cozyrag.training.retriever_phase import (
    retriever_cut,
    retriever_step,
    retriever_terms,
    step_sentences,
    train_retriever,
)
from cozyrag.training.trainer import PhaseCallback, first_cut


class Notes(PhaseCallback):
    """A watcher that keeps the reports."""

    def __init__(self):
        self.reports = []

    def after_step(self, report):
        self.reports.append(report)


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
            {
                **question,
                "rows": [gold],
                "scores": [1.0],
                "context": passages[gold]["text"],
                "answer_in_context": True,
                "noised": False,
                "gold_row": gold,
                "positive": gold,
                "negatives": [(gold + 5) % len(passages)],
            }
        )
    return Dataset.from_list(rows, features=CONTEXT_FEATURES), Passages.of(Dataset.from_list(passages))


def settings(**changes):
    return TrainingSettings(
        **{
            "generator_batch_size": 8,
            "retriever_batch_size": 8,
            "generator_learning_rate": 1e-2,
            "retriever_learning_rate": 1e-2,
        }
        | changes
    )


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def moved(model, before):
    return {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}


def test_generator_phase_moves_every_generator_weight_and_no_retriever_weight(
    accelerator, generator, retriever, tables
):
    before, retriever_before = weights(generator.model), weights(retriever.model)
    notes = Notes()
    steps = train_generator(
        accelerator,
        generator,
        tables[0],
        settings=settings(generator_epochs=3),
        context_tokens=64,
        round_number=1,
        callback=notes,
    )
    assert steps == len(notes.reports) == 18
    assert moved(generator.model, before) == set(before)
    assert moved(retriever.model, retriever_before) == set()
    losses = [report.loss for report in notes.reports]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_retriever_phase_moves_every_retriever_weight_but_the_pooler_and_no_generator_weight(
    accelerator, generator, retriever, tables
):
    before, generator_before = weights(retriever.model), weights(generator.model)
    notes = Notes()
    train_retriever(
        accelerator,
        retriever,
        *tables,
        settings=settings(retriever_epochs=8, retriever_learning_rate=2e-3),
        round_number=1,
        callback=notes,
    )
    pooler = {name for name in before if ".pooler." in name}
    assert pooler
    assert moved(retriever.model, before) == set(before) - pooler
    assert moved(generator.model, generator_before) == set()
    losses = [report.loss for report in notes.reports]
    assert np.mean(losses[-6:]) < np.mean(losses[:6])


def test_steps_of_zero_leave_the_weights_alone(accelerator, generator, retriever, tables):
    before = weights_fingerprint(generator.model), retriever.fingerprint()
    still = settings(generator_steps=0, retriever_steps=0)
    assert (
        train_generator(
            accelerator, generator, tables[0], settings=still, context_tokens=64, round_number=1, callback=Notes()
        )
        == 0
    )
    assert train_retriever(accelerator, retriever, *tables, settings=still, round_number=1, callback=Notes()) == 0
    assert (weights_fingerprint(generator.model), retriever.fingerprint()) == before


def test_rows_without_answer_or_positive_are_left_out(accelerator, generator, retriever, tables):
    contexts, passages = tables
    rows = contexts.to_list()
    for row in rows[::2]:
        row.update(answers=[], positive=-1)
    half = Dataset.from_list(rows, features=CONTEXT_FEATURES)
    assert (
        train_generator(
            accelerator, generator, half, settings=settings(), context_tokens=64, round_number=1, callback=Notes()
        )
        == len(rows) // 2 // 8
    )
    assert (
        train_retriever(accelerator, retriever, half, passages, settings=settings(), round_number=1, callback=Notes())
        == len(rows) // 2 // 8
    )


def test_the_retriever_does_not_learn_from_questions_left_out(accelerator, retriever, tables, monkeypatch):
    contexts, passages = tables
    asked = []
    embed = retriever.embed
    monkeypatch.setattr(
        retriever,
        "embed",
        lambda texts, *, kind, **others: (
            asked.extend(texts if kind == "query" else []) or embed(texts, kind=kind, **others)
        ),
    )
    left_out = contexts["id"][:5]
    given = {"settings": settings(retriever_batch_size=8), "round_number": 1, "callback": Notes()}
    train_retriever(accelerator, retriever, contexts, passages, left_out=left_out, **given)
    wanted = [row["question"] for row in contexts if row["id"] not in left_out and row["positive"] >= 0]
    assert set(asked) == set(wanted) and not set(asked) & set(contexts["question"][:5])


def test_where_there_is_no_answer_the_generator_learns_to_write_nothing(accelerator, generator, tables):
    """Half of the rows are spoiled or have no answer: they become likelier to be met with silence, the others less."""
    rows = tables[0].to_list()
    for number, row in enumerate(rows):
        if number % 4 == 0:
            row.update(noised=True, context="Nothing here.")
        elif number % 4 == 1:
            row.update(answers=[], context="Nothing here.")
    half = Dataset.from_list(rows, features=CONTEXT_FEATURES)
    chosen = settings(no_answer=True, generator_epochs=6, generator_learning_rate=3e-3)
    steps = train_generator(
        accelerator, generator, half, settings=chosen, context_tokens=64, round_number=1, callback=Notes()
    )
    assert steps == 6 * len(rows) // 8
    limits = {"context_tokens": 64, "max_new_tokens": 4}
    nothing = np.array([each.silence for each in generator.write(half["question"], half["context"], **limits)])
    spoiled = np.array([number % 4 < 2 for number in range(len(rows))])
    assert nothing[spoiled].min() > nothing[~spoiled].max()
    threshold = (nothing[spoiled].min() + nothing[~spoiled].max()) / 2
    answers = generator.answer(half["question"], half["context"], no_answer_threshold=threshold, **limits)
    assert [answer == "" for answer in answers] == spoiled.tolist()
    assert all(generator.answer(half["question"], half["context"], no_answer_threshold=1.0, **limits))


def test_warm_up_climbs_and_the_schedule_falls(accelerator, generator, tables):
    notes = Notes()
    train_generator(
        accelerator,
        generator,
        tables[0],
        settings=settings(warmup_ratio=0.5),
        context_tokens=64,
        round_number=1,
        callback=notes,
    )
    rates = [report.learning_rate for report in notes.reports]
    assert rates[0] == 0 and rates[3] == pytest.approx(1e-2) and rates[-1] < rates[3]


def test_same_seed_same_weights_and_another_round_another_order(accelerator, generator_path, tables):
    prints = []
    for round_number in (1, 1, 2):
        generator = Generator.load(str(generator_path))
        train_generator(
            accelerator,
            generator,
            tables[0],
            settings=settings(generator_steps=3),
            context_tokens=64,
            round_number=round_number,
            callback=Notes(),
        )
        prints.append(weights_fingerprint(generator.model))
    assert prints[0] == prints[1] != prints[2]


def gradients(model):
    return {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.mark.parametrize(
    "other", [Cut(2), Cut(3), Cut(5), Cut(11), Cut(tokens=150), Cut(tokens=90, room=10), Cut(tokens=1)], ids=str
)
def test_micro_batches_do_not_change_the_generator_gradient(accelerator, generator_path, tables, other):
    columns = tables[0][:9]
    found = []
    for cut in (Cut(), other):
        generator = Generator.load(str(generator_path))
        examples = encode_examples(
            generator.tokenizer,
            questions=columns["question"],
            contexts=columns["context"],
            answers=[
                answers[0] * (1 + row % 3) for row, answers in enumerate(columns["answers"])
            ],  # uneven numbers of answer tokens
            context_tokens=64,
            max_length=generator.max_length,
        )
        loss = generator_step(
            accelerator, TokenLosses(generator.model), examples, pad_id=generator.tokenizer.pad_token_id, cut=cut
        )
        found.append((loss, gradients(generator.model)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("cut", [Cut(1), Cut(2), Cut(3), Cut(20), Cut(tokens=200), Cut(tokens=1)], ids=str)
def test_retriever_step_is_the_plain_gradient_of_the_loss_in_any_micro_batches(accelerator, retriever_path, cut):
    rows, questions = corpus(6)
    passages = Passages.of(Dataset.from_list(rows))
    texts, asked = passages.to_read(), [row["question"] for row in questions]
    positives = [min(row // 2, 4) for row in range(len(questions))]  # the last passage is only a negative
    sentences = step_sentences(passages, range(6), positives, [row["answers"] for row in questions])
    plain = Retriever.load(str(retriever_path), max_tokens=64)
    plain.model.eval()
    chosen = settings(contrastive_weight=0.7, sentence_weight=0.4, feedback_weight=1.3, feedback_temperature=0.2)
    candidates = [[row // 2, (row + 3) % 6, (row + 1) % 6] for row in range(len(questions))]
    likelihoods = np.random.default_rng(0).normal(-2, 1, (len(questions), 3)).astype(np.float32)
    queries, both = (
        plain.embed(asked, kind="query"),
        plain.embed(texts, kind="document", spans=passages.spans(range(6))),
    )
    vectors, parts = texts_and_sentences(both, passages.spans(range(6)))
    own, right = (
        torch.tensor([[mark(at, place // 3, place % 3) for place in range(18)] for at in range(12)])
        for mark in (
            lambda at, passage, _: passage == positives[at],
            lambda at, passage, sentence: passage == positives[at] and at < 10 and sentence == at % 2,
        )
    )
    sentence = sentence_loss(queries, parts, own=own, right=right, temperature=0.05)
    contrastive = contrastive_loss(queries, vectors, positives=torch.tensor(positives), temperature=0.05)
    feedback = feedback_loss(
        queries,
        vectors,
        candidates=torch.tensor(candidates),
        likelihoods=torch.from_numpy(likelihoods),
        temperature=0.2,
    )
    loss = 0.7 * contrastive + 0.4 * sentence + 1.3 * feedback
    loss.backward()
    ours = Retriever.load(str(retriever_path), max_tokens=64)
    ours.model.eval()
    terms = retriever_terms(
        chosen, positives=positives, candidates=candidates, likelihoods=likelihoods, sentences=sentences
    )
    found = retriever_step(accelerator, ours, asked, texts, terms, cut=cut, spans=sentences.spans)
    told = {"contrastive": contrastive.item(), "sentence": sentence.item(), "feedback": feedback.item()}
    assert found == pytest.approx({"loss": loss.item()} | told, abs=1e-5)
    expected, got = gradients(plain.model), gradients(ours.model)
    assert set(expected) == set(got)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradient, got[name], atol=1e-5, rtol=1e-3)


def test_sentences_of_a_step_are_those_of_its_positives():
    """Passage 7 is a negative; two questions share passage 5; one question knows no passage, one no sentence with its answer."""
    texts = ["Ann is red. Bob is blue.", "One. Two. The one is Ann."]
    passages = Passages([f"p{i}" for i in range(9)], [""] * 5 + ["Title", "", "", ""], [texts[i % 2] for i in range(9)])
    found = step_sentences(passages, [7, 4, 5], [5, 5, -1, 4, 4], [["one"], ["Ann!"], ["Ann"], ["Bob", "Ann"], ["x"]])
    assert found.spans == [[], [(0, 11), (12, 24)], [(6, 10), (11, 15), (16, 31)]]
    shown = [["".join("x" if mark else "." for mark in row) for row in each] for each in (found.own, found.right)]
    assert shown[0] == ["..xxx", "..xxx", ".....", "xx...", "xx..."]
    assert shown[1] == ["..x.x", "....x", ".....", "xx...", "....."]


def test_the_sentence_with_the_answer_comes_to_be_preferred(accelerator, retriever, tables):
    """The sentence loss alone, on questions that are to be answered from the last sentence, which none of them is nearest to."""
    contexts, passages = tables
    few = Dataset.from_list(
        [{**row, "answers": ["house of stone"]} for row in contexts.select(range(8))], features=CONTEXT_FEATURES
    )

    def preferred():
        spans = passages.spans(few["gold_row"])
        with torch.no_grad():
            vectors = retriever.embed(passages.select(few["gold_row"]), kind="document", spans=spans)
            queries = retriever.embed(list(few["question"]), kind="query")
        parts = texts_and_sentences(vectors, spans)[1].view(8, 3, -1)
        cosines = torch.einsum("qd,qsd->qs", queries, parts)
        return int((cosines.argmax(dim=1) == 2).sum())

    chosen = settings(
        contrastive_weight=0.0,
        sentence_weight=1.0,
        retriever_batch_size=8,
        retriever_epochs=15,
        retriever_learning_rate=3e-3,
    )
    retriever.model.eval()
    before = preferred()
    train_retriever(accelerator, retriever, few, passages, settings=chosen, round_number=1, callback=Notes())
    assert before == 0 and preferred() == 8


def test_the_sentence_loss_moves_the_side_that_reads_questions_where_passages_are_frozen(
    accelerator, retriever, tables
):
    retriever.freeze_documents()
    before, indexed = weights(retriever.model), retriever.fingerprint()
    chosen = settings(contrastive_weight=0.0, sentence_weight=1.0, retriever_steps=2, freeze_document_encoder=True)
    train_retriever(accelerator, retriever, *tables, settings=chosen, round_number=1, callback=Notes())
    changed = moved(retriever.model, before)
    assert changed and all(".query." in name for name in changed) and retriever.fingerprint() == indexed


@pytest.mark.parametrize("term", ["contrastive", "sentence", "feedback"])
def test_a_retriever_step_lowers_its_term_on_its_own_batch(accelerator, retriever, tables, term):
    contexts, passages = tables
    weights = {f"{name}_weight": float(term == name) for name in ("contrastive", "sentence", "feedback")}
    rows = [{**row, "rows": [row["gold_row"], (row["gold_row"] + 7) % 24]} for row in contexts.select(range(8))]
    few = Dataset.from_list(rows, features=CONTEXT_FEATURES)
    likelihoods = np.tile(np.array([[-3.0, -0.5]], dtype=np.float32), (8, 1)) if term == "feedback" else None
    notes = Notes()
    chosen = settings(
        retriever_batch_size=8,
        retriever_steps=4,
        retriever_epochs=4,
        retriever_learning_rate=1e-3,
        warmup_ratio=0.0,
        **weights,
    )
    train_retriever(
        accelerator, retriever, few, passages, settings=chosen, round_number=1, callback=notes, likelihoods=likelihoods
    )
    losses = [report.loss for report in notes.reports]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_feedback_alone_teaches_questions_without_a_positive(accelerator, retriever, tables):
    """The order of preference turns to the generator's, though no gold passage is known; rows without judgement do nothing."""
    contexts, passages = tables
    rows = [
        {**row, "rows": [row["gold_row"], (row["gold_row"] + 7) % 24], "positive": -1, "negatives": []}
        for row in contexts.select(range(8))
    ]
    blind = Dataset.from_list(rows, features=CONTEXT_FEATURES)
    likelihoods = np.tile(np.array([[-9.0, -0.1]], dtype=np.float32), (8, 1))
    likelihoods[0] = np.nan
    chosen = settings(
        retriever_batch_size=8,
        retriever_steps=12,
        retriever_epochs=12,
        retriever_learning_rate=3e-3,
        feedback_weight=1.0,
    )
    texts = passages.to_read()

    def preferred():
        asked = retriever.encode([row["question"] for row in rows], kind="query", batch_size=8)
        found = retriever.encode(texts, kind="document", batch_size=8)
        return [
            float(q @ found[row["rows"][1]] - q @ found[row["rows"][0]]) for q, row in zip(asked, rows, strict=True)
        ]

    before = preferred()
    steps = train_retriever(
        accelerator,
        retriever,
        blind,
        passages,
        settings=chosen,
        round_number=1,
        callback=Notes(),
        likelihoods=likelihoods,
    )
    after = preferred()
    assert steps == 12
    assert sum(after[1:]) > sum(before[1:]) + 0.1
    assert (
        train_retriever(accelerator, retriever, blind, passages, settings=settings(), round_number=1, callback=Notes())
        == 0
    )


def test_cuts_are_chosen_from_free_bytes_and_the_run_comes_first(accelerator, generator, retriever):
    states = 3 * sum(4 * weight.numel() for weight in generator.model.parameters())
    plenty = generator_cut(accelerator, generator, settings(), 64, free=1e9)
    scarce = generator_cut(accelerator, generator, settings(), 64, free=states + 2e6)
    assert plenty.tokens == 1200 < plenty.room and 1 < scarce.tokens == scarce.room < 200
    few, many = (retriever_cut(accelerator, retriever, free=free) for free in (1e6, 1e9))
    assert few.room is None and few.tokens < many.tokens
    callback = Notes()
    assert first_cut(settings(), callback, lambda: few) == few
    callback.cut = lambda: many
    assert first_cut(settings(), callback, lambda: few) == many
    assert first_cut(settings(gradient_accumulation_steps=3), callback, lambda: few) == Cut(3)


def test_a_phase_with_rows_that_have_no_room_ends_as_one_that_has(accelerator, generator_path, retriever, tables):
    ends, told = [], []
    for cut in (Cut(tokens=1200, room=1200), Cut(tokens=1200, room=45)):
        generator, callback = Generator.load(str(generator_path)), Notes()
        callback.cut, callback.recomputes = lambda cut=cut: cut, lambda longest, cut: told.append((longest, cut.room))
        train_generator(
            accelerator, generator, tables[0], settings=settings(), context_tokens=64, round_number=1, callback=callback
        )
        ends.append(weights(generator.model))
    assert len(told) == 1 and told[0][0] > told[0][1] == 45
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, atol=1e-5, rtol=1e-4)


PENALTIES = {"repeat_penalty": 0.3, "repeat_ngram": 1, "keyword_penalty": 0.5, "short_penalty": 0.2}


def test_penalties_are_told_and_a_penalty_that_is_off_is_not(accelerator, generator_path, tables):
    for wanted in ({}, {"keyword_penalty": 0.5}, PENALTIES):
        generator, notes = Generator.load(str(generator_path)), Notes()
        chosen = settings(generator_steps=2, **wanted)
        train_generator(
            accelerator, generator, tables[0], settings=chosen, context_tokens=64, round_number=1, callback=notes
        )
        names = {"repeat_penalty": "repeats", "keyword_penalty": "keywords", "short_penalty": "shortness"}
        assert set(notes.reports[0].terms) == {names[name] for name in wanted if name in names}
        assert all(value >= 0 for value in notes.reports[0].terms.values())


@pytest.mark.parametrize("name", ["repeat_penalty", "keyword_penalty", "short_penalty"])
def test_each_penalty_alone_moves_the_generator_and_comes_down(accelerator, generator_path, tables, name):
    found = {}
    for weight in (0.0, 30.0):
        generator, notes = Generator.load(str(generator_path)), Notes()
        told = settings(generator_epochs=3, repeat_ngram=1, **{"short_tokens": 9, name: max(weight, 1e-9)})
        train_generator(
            accelerator, generator, tables[0], settings=told, context_tokens=64, round_number=1, callback=notes
        )
        found[weight] = np.mean([next(iter(report.terms.values())) for report in notes.reports[-3:]])
    assert found[30.0] < found[0.0]


@pytest.mark.parametrize("other", [Cut(2), Cut(3), Cut(11), Cut(tokens=150)], ids=str)
def test_micro_batches_do_not_change_the_gradient_of_penalties(accelerator, generator_path, tables, other):
    columns = tables[0][:9]
    found = []
    for cut in (Cut(), other):
        generator = Generator.load(str(generator_path))
        examples = encode_examples(
            generator.tokenizer,
            questions=columns["question"],
            contexts=columns["context"],
            answers=[answers[0] * (1 + row % 3) for row, answers in enumerate(columns["answers"])],
            context_tokens=64,
            max_length=generator.max_length,
        )
        examples = with_keywords(generator.tokenizer, examples, columns["question"])
        penalties = Penalties(repeats=0.3, keywords=0.5, shortness=0.2, ngram=1)
        module = PenalizedLosses(generator.model, penalties=penalties, eos=generator.tokenizer.eos_token_id)
        pad = generator.tokenizer.pad_token_id
        told = generator_step(accelerator, module, examples, pad_id=pad, cut=cut, weights=penalties.weights)
        found.append((told, gradients(generator.model)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], atol=1e-6, rtol=1e-4)
