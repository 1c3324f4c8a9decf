"""Attention as products in bf16: that of PyTorch but for rounding, in the encoders that train and nowhere else."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import Accelerator
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cozyrag.models import product_attention
from cozyrag.models.product_attention import ATTENTION, attention, attention_by_products, has_products
from cozyrag.models.reranker import Reranker
from cozyrag.models.retriever import Retriever
from cozyrag.training.losses import contrastive_loss
from cozyrag.training.micro_batches import Cut
from cozyrag.training.reranker_phase import reranker_step
from cozyrag.training.retriever_phase import retriever_step
from cozyrag.training.training_pairs import LossTerm, RetrieverBatch

LENGTH, SCALING = 7, 0.3


def place(precision="bf16", device="cpu"):
    """What these steps need of an Accelerator, with its autocast."""
    return SimpleNamespace(
        mixed_precision=precision,
        num_processes=1,
        process_index=0,
        device=torch.device(device),
        autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        gather=lambda tensor: tensor,
        backward=lambda loss: loss.backward(),
    )


@pytest.fixture
def inputs():
    """Query, key and value of five rows, in which three query heads share a key head."""
    draw = torch.Generator().manual_seed(2)
    shapes = [(5, 6, LENGTH, 8), (5, 2, LENGTH, 8), (5, 2, LENGTH, 8)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]


def module(*, causal):
    return SimpleNamespace(is_causal=causal, num_key_value_groups=3, training=True)


def masks():
    draw = torch.Generator().manual_seed(3)
    own = torch.eye(LENGTH, dtype=torch.bool)
    return {
        "none": None,
        "of each row": torch.rand(5, 1, LENGTH, LENGTH, generator=draw).gt(0.5) | own,
        "of all rows": torch.rand(1, 1, LENGTH, LENGTH, generator=draw).gt(0.5) | own,
    }


@pytest.mark.parametrize("cached", [1, 2 * 6 * LENGTH**2 * 8, 4e6], ids=["row by row", "two rows", "at once"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", masks())
def test_it_is_that_of_pytorch_in_chunks_of_any_size(inputs, mask, causal, cached, monkeypatch):
    monkeypatch.setattr(product_attention, "CACHED", cached)
    weight = torch.randn(5, LENGTH, 6, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    results = []
    for function in (attention, sdpa_attention_forward):
        found, _ = function(module(causal=causal), *inputs, masks()[mask], scaling=SCALING)
        results.append((found, torch.autograd.grad((found * weight).sum(), inputs)))
    torch.testing.assert_close(*results)


def test_a_padded_row_that_sees_nothing_is_finite():
    states = [torch.randn(2, 2, 4, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[1] = False
    found, _ = attention(module(causal=False), *states, mask, scaling=SCALING)
    found.float().sum().backward()
    assert found.isfinite().all() and all(each.grad.isfinite().all() for each in states)


@pytest.mark.parametrize(
    "named",
    [
        {"position_bias": torch.randn(1, 6, LENGTH, LENGTH, dtype=torch.float64)},
        {"is_causal": False},
        {"scaling": None},
    ],
    ids=lambda named: next(iter(named)),
)
def test_what_it_does_not_know_is_left_to_pytorch(inputs, named):
    named = {"scaling": SCALING} | named
    found, _ = attention(module(causal=True), *inputs, None, **named)
    torch.testing.assert_close(found, sdpa_attention_forward(module(causal=True), *inputs, None, **named)[0])


def test_long_rows_are_left_to_pytorch(inputs, counted, monkeypatch):
    for longest, calls in ((LENGTH, 1), (LENGTH - 1, 1)):
        monkeypatch.setattr(product_attention, "LONGEST", longest)
        attention(module(causal=True), *inputs, None, scaling=SCALING)
        assert len(counted) == calls


def test_dropout_earlier_keys_and_wider_values_are_left_to_pytorch(inputs):
    query, key, value = inputs
    wide = torch.cat([value, value], dim=-1)
    found, _ = attention(module(causal=True), query, key, wide, None, scaling=SCALING)
    torch.testing.assert_close(
        found, sdpa_attention_forward(module(causal=True), query, key, wide, None, scaling=SCALING)[0]
    )
    torch.manual_seed(0)
    found, _ = attention(module(causal=True), query, key, value, None, scaling=SCALING, dropout=0.5)
    torch.manual_seed(0)
    expected, _ = sdpa_attention_forward(module(causal=True), query, key, value, None, scaling=SCALING, dropout=0.5)
    torch.testing.assert_close(found, expected)
    one = query[:, :, -1:]
    found, _ = attention(module(causal=True), one, key, value, None, scaling=SCALING)
    torch.testing.assert_close(
        found, sdpa_attention_forward(module(causal=True), one, key, value, None, scaling=SCALING)[0]
    )


# ---- where it is used


def bert(**changes) -> BertModel:
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return BertModel(BertConfig(vocab_size=30, **size, **changes)).eval()


@pytest.mark.parametrize(
    ("where", "model", "expected"),
    [
        (place(), bert, True),
        (place(), lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)), True),
        (place("no"), bert, False),
        (place(device="meta"), bert, False),
        (place(), lambda: bert(attn_implementation="eager"), False),
        (place(), lambda: torch.nn.Linear(2, 2), False),
    ],
)
def test_models_that_take_attention_from_the_table_have_it_in_bf16_on_a_cpu(where, model, expected):
    model = model()
    assert has_products(where, model) is expected
    with attention_by_products(where, model):
        used = [part.config._attn_implementation == ATTENTION for part in model.modules() if hasattr(part, "config")]
    assert used == [expected] * len(used)


def test_the_attention_of_before_is_back_after_an_error():
    model = bert()
    with pytest.raises(RuntimeError, match="in the middle"), attention_by_products(place(), model):
        raise RuntimeError("in the middle")
    assert model.config._attn_implementation == "sdpa"


def retriever_gradients(retriever, where, micro_batches=2):
    """The loss and the gradients of a step on questions and passages of different lengths."""
    passages, questions = tiny.corpus()
    own = torch.arange(6)
    loss = lambda asked, found, _: contrastive_loss(asked, found, positives=own, temperature=0.05)  # noqa: E731
    term = LossTerm("contrastive", 1.0, loss)
    texts = [(each["text"] + " ") * (1 + at % 3) for at, each in enumerate(passages[:9])]
    batch = RetrieverBatch([each["question"] for each in questions[:6]], texts, [term])
    retriever.model.eval().zero_grad()
    told = retriever_step(where, retriever, batch, cut=Cut(micro_batches))
    return told["loss"], gradients_of(retriever.model)


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def distance(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys() and found
    flat = [torch.cat([each.flatten() for each in gradients.values()]) for gradients in (found, expected)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


@pytest.fixture
def counted(monkeypatch):
    """The number of calls of the attention as products."""
    calls, apply = [], product_attention._Attention.apply
    monkeypatch.setattr(product_attention._Attention, "apply", lambda *given: (calls.append(1), apply(*given))[1])
    return calls


def test_a_step_of_the_retriever_takes_it_and_is_as_close_to_float32_as_without(retriever_path, counted, monkeypatch):
    retriever = Retriever.load(str(retriever_path))
    exact, expected = retriever_gradients(retriever, place("no"))
    assert not counted
    loss, gradients = retriever_gradients(retriever, place())
    assert len(counted) == 6  # two sides in two micro-batches, of which the first is embedded twice
    monkeypatch.setattr(product_attention, "_fitting", lambda *given: iter(()))
    plain, others = retriever_gradients(retriever, place())
    assert len(counted) == 6
    assert loss == pytest.approx(exact, abs=2 * abs(plain - exact) + 5e-3)
    assert distance(gradients, expected) < 0.03 and distance(others, expected) < 0.03


def test_a_step_of_the_reranker_takes_it(reranker_path, counted):
    reranker = Reranker.load(str(reranker_path))
    torch.manual_seed(0)
    for weight in reranker.model.eval().parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)  # so that scores differ by more than rounding
    rankings = [
        [("Who?", "The fox is red."), ("Who?", "The garden is yellow. " * 4)],
        [("What?", "Fox 3"), ("What?", "River")],
    ]
    found = []
    for where in (Accelerator(cpu=True), place()):
        reranker.model.zero_grad()
        told = reranker_step(where, reranker, rankings, [30, 8], cut=Cut(2))
        found.append((told["loss"], gradients_of(reranker.model)))
    assert len(counted) == 2
    assert found[1][0] == pytest.approx(found[0][0], abs=5e-3) and distance(found[1][1], found[0][1]) < 0.05
