"""Lean layers in bf16: the same losses and gradients, but for rounding, and fewer stored activations."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from cozyrag.config import TrainingSettings
from cozyrag.models import lean_layers as lean
from cozyrag.models import product_attention
from cozyrag.models.prompts import Example
from cozyrag.models.token_losses import TokenLosses, recomputing
from cozyrag.training.generator_phase import generator_step, generator_token_bytes
from cozyrag.training.micro_batches import Cut, token_bytes

SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 70}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**SHAPE | HEADS | special | {"tie_word_embeddings": True} | changes)).train()


def gpt2(**changes) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    shape = {"n_embd": 48, "n_head": 6, "n_layer": 3, "vocab_size": 70}
    return GPT2LMHeadModel(GPT2Config(**shape | dropout | {"bos_token_id": 0, "eos_token_id": 0} | changes)).train()


def accelerator(precision="bf16", processes=1, device="cpu"):
    """What a step needs of an Accelerator, with its autocast."""
    return SimpleNamespace(
        mixed_precision=precision,
        num_processes=processes,
        process_index=0,
        device=torch.device(device),
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
        no_sync=lambda module: nullcontext(),
        backward=lambda loss: loss.backward(),
        reduce=lambda values, reduction: values,
    )


def examples(lengths=(14, 9, 12, 5, 14)) -> list[Example]:
    draw = torch.Generator().manual_seed(1)
    return [Example(torch.randint(1, 70, (length,), generator=draw).tolist(), length - 3) for length in lengths]


def step(model, *, tokens=30, place=None, leanly=True, rows=None) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step and the gradients of all weights."""
    place = place or accelerator()
    model.zero_grad()
    with lean.bf16_step(place, model) if leanly else place.autocast():
        (loss,) = generator_step(place, TokenLosses(model), rows or examples(), pad_id=0, cut=Cut(tokens=tokens))
    return loss, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def close(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        distance = (gradient - expected[name]).norm() / expected[name].norm()
        assert gradient.dtype == torch.float32 and distance < tolerance, (name, distance)


# ---- each part against autograd, in float32 and float64


def test_the_norm_is_that_of_transformers():
    norm = modeling_llama.LlamaRMSNorm(48, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    states = torch.randn(3, 5, 48, requires_grad=True)
    found, expected = lean._norm(norm, states), norm(states)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16())
    back = torch.randn(3, 5, 48).bfloat16()
    gradients = [torch.autograd.grad(each, [states, norm.weight], back.to(each.dtype)) for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_swiglu_is_that_of_autograd():
    gate, up = (torch.randn(4, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lean._SwiGLU.apply, (gate, up))


# ---- a step


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (llama, {}),
        (llama, {"tie_word_embeddings": False}),
        (llama, {"num_key_value_heads": 6}),
        (llama, {"pad_token_id": 7}),
        (llama, {"hidden_act": "gelu"}),
        (gpt2, {}),
        (gpt2, {"tie_word_embeddings": False}),
    ],
    ids=lambda part: part.__name__ if callable(part) else str(part),
)
@pytest.mark.parametrize("tokens", [30, 1000])
def test_gradients_are_as_close_to_float32_as_those_of_plain_layers(family, changes, tokens):
    model = family(**changes)
    exact, expected = step(model, place=accelerator("no"), tokens=tokens)
    plain, others = step(model, leanly=False, tokens=tokens)
    found, gradients = step(model, tokens=tokens)
    assert found == pytest.approx(exact, abs=2 * abs(plain - exact) + 2e-3)
    close(gradients, expected, 0.03)
    close(others, expected, 0.03)  # what bf16 costs anyway


@pytest.mark.parametrize(
    ("family", "vocabulary"), [(llama, "model.embed_tokens.weight"), (gpt2, "transformer.wte.weight")]
)
@pytest.mark.parametrize("processes", [1, 2])
def test_every_gradient_reaches_autograd_where_processes_share_it(family, vocabulary, processes):
    """DDP adds the gradients of all processes in hooks of autograd, which see no gradient added in place."""
    model, seen = family(), set()
    for name, weight in model.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: seen.add(name))
    with lean.bf16_step(place := accelerator(processes=processes), model):
        generator_step(accelerator(), TokenLosses(model), examples(), pad_id=0, cut=Cut(tokens=30))
    everything = {name for name, _ in model.named_parameters()}
    assert product_attention.has_products(place, model)
    assert everything - seen == ({vocabulary} if processes == 1 else set())


def test_frozen_ends_stay_frozen():
    model = llama(tie_word_embeddings=False)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        part.weight.requires_grad_(False)
    _, expected = step(model, place=accelerator("no"))
    _, gradients = step(model)
    assert "lm_head.weight" not in gradients and "model.embed_tokens.weight" not in gradients
    close(gradients, expected, 0.03)


def test_recomputed_activations_give_the_same_gradients():
    model = llama()
    expected = step(model)
    with recomputing(model, True):
        found = step(model)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


def test_after_a_step_the_model_is_as_before():
    model = llama()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="in the middle"), lean.bf16_step(accelerator(), model):
        assert model.config._attn_implementation == product_attention.ATTENTION
        raise RuntimeError("in the middle")
    assert model.config._attn_implementation == "sdpa"
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_the_row_of_padding_is_not_trained_by_looking_it_up():
    model = llama(tie_word_embeddings=False, pad_token_id=7)
    rows = [Example([5, 7, 7, 9, 7, 8], 4)]
    for leanly in (True, False):
        _, gradients = step(model, rows=rows, leanly=leanly)
        rows_trained = gradients["model.embed_tokens.weight"].abs().sum(1).nonzero()[:, 0].tolist()
        assert rows_trained == [5, 9], leanly


def test_a_layer_that_someone_has_replaced_is_left_alone():
    model, calls = llama(), []
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda states: (calls.append(1), own(states))[1]
    step(model)
    assert calls and "forward" in vars(mlp)


def test_weights_are_cast_once_for_all_micro_batches():
    model, casts = llama(), []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].shape == (96, 48):
                casts.append(func)
            return func(*args, **kwargs or {})

    for tokens in (1000, 15):
        casts.clear()
        with Counting():
            step(model, tokens=tokens)
        # gate and up of three layers, to bf16 once; their gradients come back once for each micro-batch
        assert len(casts) == 6 + 6 * (1 if tokens == 1000 else 5)


# ---- which models


@pytest.mark.parametrize(
    ("place", "model", "expected"),
    [
        (accelerator(), llama, True),
        (accelerator("no"), llama, False),
        (accelerator(device="meta"), llama, False),
        (accelerator(), lambda: llama(hidden_act="gelu"), False),
        (accelerator(), lambda: llama(attn_implementation="eager"), False),
        (accelerator(), gpt2, False),
    ],
)
def test_only_a_llama_is_lean_in_all_parts(place, model, expected):
    assert lean.trains_lean(place, model()) is expected


def test_an_embedding_that_scales_its_rows_is_left_alone():
    model = gpt2()
    model.transformer.wte.max_norm = 1.0
    assert list(lean._in_place(model)) == [model.lm_head]


def test_micro_batches_are_cut_for_what_is_trained():
    """Lean layers store less, so more tokens fit."""
    plain, leanly = llama(attn_implementation="eager"), llama()

    def bytes_of(model, **settings):
        return generator_token_bytes(accelerator(), SimpleNamespace(model=model), TrainingSettings(**settings), 40)

    assert bytes_of(leanly) == token_bytes(leanly.config, precision="bf16", length=40, lean=True)
    assert bytes_of(leanly) < 0.7 * bytes_of(plain) and bytes_of(leanly) < bytes_of(
        leanly, generator_sharding="full_shard"
    )
