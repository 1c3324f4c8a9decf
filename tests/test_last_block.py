"""GPT-2's last block at few positions gives the losses and gradients of the whole block; other models are unchanged."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from cozyrag.models.gpt2_last_block import read_only_at
from cozyrag.models.token_losses import TokenLosses, recomputing

SIZES = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50, "n_positions": 32}
LENGTHS = (9, 5, 12)


def model(**changes):
    torch.manual_seed(0)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    made = GPT2LMHeadModel(GPT2Config(**SIZES, **quiet | changes))
    for parameter in made.parameters():  # away from zero, so that every term matters
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def batch(*, answers=(2, 1, 3)):
    """Right-padded rows; the last tokens of each are answers."""
    torch.manual_seed(1)
    length = max(LENGTHS)
    ids = torch.randint(1, 50, (len(LENGTHS), length))
    mask = (torch.arange(length) < torch.tensor(LENGTHS)[:, None]).long()
    spans = [range(end - count - 1, end - 1) for end, count in zip(LENGTHS, answers, strict=True)]
    positions = torch.tensor([row * length + place for row, span in enumerate(spans) for place in span])
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "positions": positions,
        "targets": ids.flatten()[positions + 1],
    }


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the inputs of the last block's MLP, and a function that records them."""
    seen = []

    def record(made):
        made.base_model.h[-1].mlp.register_forward_hook(lambda module, given, out: seen.append(tuple(given[0].shape)))
        return made

    return seen, record


def losses_and_gradients(made, given):
    made.zero_grad()
    losses = TokenLosses(made)(**given)
    losses.sum().backward()
    return losses, {
        name: parameter.grad.clone() for name, parameter in made.named_parameters() if parameter.grad is not None
    }


def whole(monkeypatch):
    """Use the block of transformers."""
    monkeypatch.setattr("cozyrag.models.gpt2_last_block.FEW", -1.0)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    "changes", [{}, {"attn_implementation": "eager"}, {"scale_attn_by_inverse_layer_idx": True}, {"n_inner": 24}]
)
def test_losses_and_gradients_are_those_of_the_whole_block(monkeypatch, calls, changes, padded):
    seen, record = calls
    made, given = record(model(**changes)), batch()
    if not padded:
        given["attention_mask"] = None
    found, gradients = losses_and_gradients(made, given)
    whole(monkeypatch)
    expected, others = losses_and_gradients(made, given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-6, msg=name)
    assert seen == [(6, 16), (3, 12, 16)]


def test_rows_without_an_answer_and_any_order_of_lengths(monkeypatch):
    made, given = model(), batch(answers=(0, 4, 0))
    found, gradients = losses_and_gradients(made, given)
    whole(monkeypatch)
    expected, others = losses_and_gradients(made, given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradients["transformer.h.2.attn.c_attn.weight"], others["transformer.h.2.attn.c_attn.weight"]
    )


def test_masks_of_packed_rows_are_applied(monkeypatch):
    """A mask with four dimensions: the second half of a row does not see the first."""
    made, given = model(), batch()
    seen = torch.ones(3, 1, 12, 12).tril().bool()
    seen[:, :, 3:, :2] = False
    given["attention_mask"] = seen
    found, _ = losses_and_gradients(made, given)
    plain, _ = losses_and_gradients(made, batch())
    whole(monkeypatch)
    expected, _ = losses_and_gradients(made, given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_change_nothing(dropout):
    """The last block is not recomputed, because it is the original one in the backward pass; then all is as before."""
    made, given = model(resid_pdrop=dropout, attn_pdrop=dropout).train(), batch()
    torch.manual_seed(3)
    expected, gradients = losses_and_gradients(made, given)
    torch.manual_seed(3)
    runs = []
    made.base_model.h[0].mlp.register_forward_pre_hook(lambda *rest: runs.append("first"))
    made.base_model.h[-1].mlp.register_forward_pre_hook(lambda *rest: runs.append("last"))
    with recomputing(made, True):
        found, others = losses_and_gradients(made, given)
        assert made.base_model.h[-1].gradient_checkpointing
    assert torch.equal(found, expected) and runs == ["first", "last", "first"]
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    losses_and_gradients(made, given)
    assert runs[3:] == ["first", "last"]


def test_recomputed_activations_of_a_llama_change_nothing():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=50)).train()
    expected, gradients = losses_and_gradients(made, batch())
    runs = []
    made.base_model.layers[0].mlp.register_forward_pre_hook(lambda *rest: runs.append(1))
    with recomputing(made, True):
        found, others = losses_and_gradients(made, batch())
    assert torch.equal(found, expected) and len(runs) == 2
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_dropout_is_random(calls):
    seen, record = calls
    made, given = record(model(resid_pdrop=0.5, attn_pdrop=0.5)).train(), batch()
    assert not torch.equal(TokenLosses(made)(**given), TokenLosses(made)(**given))
    made.eval()
    assert torch.equal(TokenLosses(made)(**given), TokenLosses(made)(**given))
    assert set(seen) == {(6, 16)}


def test_bfloat16_and_autocast():
    made, given = model(), batch()
    expected = TokenLosses(made)(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(TokenLosses(made)(**given), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(TokenLosses(made.bfloat16())(**given), expected, rtol=0.1, atol=0.1)


def test_the_block_is_restored_also_after_an_error():
    made, given = model(), batch()
    before = made(given["input_ids"]).logits
    TokenLosses(made)(**given)
    assert torch.equal(made(given["input_ids"]).logits, before)
    with pytest.raises(ValueError), read_only_at(made.base_model, given["positions"], 36):
        raise ValueError
    assert "forward" not in vars(made.base_model.h[-1])


def test_another_block_or_too_many_positions_leave_it_unchanged(calls):
    seen, record = calls

    class Other(GPT2Block):
        def forward(self, *given, **named):
            return super().forward(*given, **named)

    made = record(model())
    made.base_model.h[-1].__class__ = Other
    TokenLosses(made)(**batch())
    many = batch()
    many["positions"] = torch.arange(20)
    many["targets"] = torch.zeros(20, dtype=torch.long)
    plain = record(model())
    TokenLosses(plain)(**many)
    assert set(seen) == {(3, 12, 16)}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50))
    assert TokenLosses(llama)(**batch()).shape == (6,)


def test_it_is_unchanged_under_torch_compile(calls):
    seen, record = calls
    made = record(model())
    found = torch.compile(TokenLosses(made), backend="eager")(**batch())
    torch.testing.assert_close(found, TokenLosses(made)(**batch()), rtol=1e-5, atol=1e-6)
    assert seen == [(3, 12, 16), (6, 16)]


def test_adapters_inside_the_block_are_applied(monkeypatch):
    peft = pytest.importorskip("peft")
    made = model()
    made.add_adapter(peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM"))
    for name, parameter in made.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn_like(parameter)
    given = batch()
    found, gradients = losses_and_gradients(made, given)
    whole(monkeypatch)
    expected, others = losses_and_gradients(made, given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert any("lora" in name for name in gradients) and gradients.keys() == others.keys()
    assert not torch.allclose(expected, TokenLosses(copy.deepcopy(model()))(**given), atol=1e-3)
