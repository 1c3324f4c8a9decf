"""How steps are cut into micro-batches, and how many tokens fit: the arithmetic, and the activations of real models."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cozyrag.models.lean_layers import lean_layers
from cozyrag.models.product_attention import attention_by_products
from cozyrag.training.micro_batches import (
    Cut,
    Load,
    caching_load,
    describe_cut,
    generator_budget,
    load_of,
    micro_batches,
    padded,
    retriever_budget,
    token_budget,
    token_bytes,
)
from cozyrag.training.step_order import shard


def test_a_step_that_fits_is_sharded_over_the_processes():
    for processes in (1, 2, 3):
        assert micro_batches([30] * 8, Cut(tokens=1200), processes=processes) == shard(range(8), parts=processes)
    assert micro_batches([30] * 8, Cut(micro_batches=3), processes=2) == shard(range(8), parts=6)


def test_by_tokens_rows_of_similar_length_are_cut_evenly():
    assert [len(group) for group in micro_batches([150] * 32, Cut(tokens=1200))] == [8] * 4
    assert [len(group) for group in micro_batches([160] * 32, Cut(tokens=1200))] == [7, 7, 6, 6, 6]
    assert [len(group) for group in micro_batches([150] * 32, Cut(tokens=1200), processes=3)] == [6, 6, 5, 5, 5, 5]


def test_a_long_row_is_alone_and_does_not_make_the_others_smaller():
    assert micro_batches([10, 10, 10, 10, 100], Cut(tokens=40)) == [[0, 1, 2, 3], [4]]
    assert micro_batches([10] * 5 + [100] * 2, Cut(tokens=50), processes=2) == [[0, 1, 2, 3, 4], [5], [6], []]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 300), st.integers(1, 4))
def test_every_row_is_in_one_micro_batch_and_none_is_too_large(lengths, tokens, processes):
    lengths = sorted(lengths)
    groups = micro_batches(lengths, Cut(tokens=tokens), processes=processes)
    assert [row for group in groups for row in group] == list(range(len(lengths)))
    assert len(groups) % processes == 0 and len(groups) < len(lengths) + processes
    assert all(len(group) <= 1 or padded(lengths, group) <= tokens for group in groups)


def test_cuts_get_smaller_until_there_is_none():
    assert Cut(3).smaller(Load(3, 0, 5)) == Cut(5) and Cut(5).smaller(Load(5, 0, 5)) is None
    cut, tried = Cut(tokens=1200, room=9000), []
    while cut:
        load = load_of([20] * 6 + [70], cut)
        tried.append((load.tokens, cut.recomputes(70)))
        cut = cut.smaller(load)
    assert tried == [(490, False), (210, False), (100, False), (70, True), (70, True)]
    assert Cut(tokens=9).smaller(Load(3, 30, 3)) is None  # the retriever does not recompute


def test_a_retriever_step_has_as_few_micro_batches_as_possible():
    sides = [[10] * 4, [100] * 8]  # 40 tokens of questions, 800 of passages
    for tokens, expected in ((840, (1, 840)), (839, (2, 420)), (300, (4, 210)), (250, (4, 210)), (1, (8, 110))):
        assert caching_load(sides, Cut(tokens=tokens), together=16) == Load(*expected, 8)
    assert caching_load(sides, Cut(micro_batches=2), together=16) == Load(2, 420, 8)
    assert caching_load([[5, 1, 5, 1], []], Cut(tokens=12), together=2) == Load(1, 12, 4)  # 2 x 1 and 2 x 5


# ---- how many tokens fit


def kept_bytes(model, run, tokens):
    """Bytes that autograd keeps of a forward pass per token, without the weights."""
    weights, kept = {weight.untyped_storage().data_ptr() for weight in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # a reference, so that the storage is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values()) / tokens


HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3}
SMOL = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 500} | HEADS
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}
PLAIN = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {  # two layers with the shape of a known model
    "distilgpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, vocab_size=500, **PLAIN, **SPECIAL)),
    "distilgpt2 with dropout": lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, vocab_size=500, **SPECIAL)),
    "distilgpt2, eager": lambda: GPT2LMHeadModel(
        GPT2Config(n_layer=2, vocab_size=500, attn_implementation="eager", **PLAIN, **SPECIAL)
    ),
    "SmolLM2-135M": lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SMOL, **SPECIAL)),
    "MiniLM": lambda: BertModel(
        BertConfig(hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_hidden_layers=2, vocab_size=500)
    ),
}


def kept_per_token(model, length):
    ids = (torch.arange(4 * length) % 500).view(4, length)
    core = model if isinstance(model, BertModel) else model.base_model
    options = {} if isinstance(model, BertModel) else {"use_cache": False}
    return kept_bytes(model, lambda: core(input_ids=ids, attention_mask=torch.ones_like(ids), **options), 4 * length)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_is_close_to_the_activations_of_a_model(name, precision):
    model = MODELS[name]().train(name != "MiniLM")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        found = kept_per_token(model, 120)
    if precision == "bf16":
        found -= cast_bytes(model) / (4 * 120)
    expected = token_bytes(model.config, precision=precision, dropout="with dropout" in name, length=120)
    assert 0.85 < expected / found < 1.4


def cast_bytes(model):
    """Bytes of the weights of the layers in bf16, which all tokens share."""
    layers = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
    return sum(2 * weight.numel() for weight in layers.parameters() if weight.ndim == 2)


PLACE = SimpleNamespace(mixed_precision="bf16", num_processes=1, device=torch.device("cpu"))


@pytest.mark.parametrize("length", [60, 240])
@pytest.mark.parametrize("name", ["distilgpt2", "MiniLM"])
def test_the_estimate_is_close_to_the_activations_with_attention_by_products(name, length):
    model = MODELS[name]().train(name != "MiniLM")
    with torch.autocast("cpu", dtype=torch.bfloat16), attention_by_products(PLACE, model):
        found = kept_per_token(model, length)
    expected = token_bytes(model.config, precision="bf16", length=length, products=True)
    assert 0.85 < expected / (found - cast_bytes(model) / (4 * length)) < 1.4


@pytest.mark.parametrize("length", [60, 240])
def test_the_estimate_is_close_to_the_activations_of_lean_layers(length):
    model, ids = MODELS["SmolLM2-135M"]().train(), torch.arange(4 * length).view(4, length) % 500
    with torch.autocast("cpu", dtype=torch.bfloat16), lean_layers(PLACE, model):
        found = kept_bytes(model, lambda: model.base_model(input_ids=ids, use_cache=False), 4 * length)
    expected = token_bytes(model.config, precision="bf16", length=length, lean=True)
    assert 0.85 < expected / (found - cast_bytes(model) / (4 * length)) < 1.4


def test_a_model_of_unknown_sizes_has_no_estimate():
    class Other:
        hidden_size = 8

    assert token_bytes(Other()) is None


def test_the_tokens_that_fit():
    assert token_budget(1000, 9e6, share=0.5, states=1e6) == 4000
    assert token_budget(1000, 9e6, share=0.5, states=1e6, at_most=1e6) == 1000
    assert token_budget(1000, 1e6, share=0.5, states=2e6) == 1


def test_the_generator_takes_what_is_fast_on_a_cpu_and_what_fits_on_a_gpu():
    given = {"each": 1_000_000, "states": 2e9}
    assert generator_budget(500_000, 22e9, states=2e9, device="cpu") == Cut(tokens=1200, room=20_000)
    assert generator_budget(free=22e9, device="cpu", **given) == Cut(tokens=1000, room=10_000)  # 1 GB
    assert generator_budget(free=3e9, device="cpu", **given) == Cut(tokens=500, room=500)
    assert generator_budget(free=22e9, device="cuda", **given) == Cut(tokens=10_000, room=10_000)
    assert generator_budget(free=22e9, device="cpu", can_recompute=False, **given).room is None


def test_the_retriever_takes_a_bounded_share():
    given = {"each": 100_000, "states": 1e9}
    assert retriever_budget(free=5e9, device="cpu", **given) == Cut(tokens=10_000)
    assert retriever_budget(free=99e9, device="cpu", **given) == Cut(tokens=20_000)
    assert retriever_budget(free=81e9, device="cuda", **given) == Cut(tokens=200_000)


def test_the_log_line_about_a_cut():
    line = "generator: micro-batches of up to 1,200 tokens (about 0.6 GB of activations)"
    assert describe_cut("generator", Cut(tokens=1200), 525_000) == line
    assert describe_cut("retriever", Cut(), None) == "retriever: 1 micro-batch per step and process"
