"""Greedy decoding of a batch, compared with one prompt at a time without a cache, for several model families."""

import inspect

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.utils import ModelOutput

from cozyrag.models.greedy_decoding import Limits, _allowed, write_greedily

SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "initializer_range": 0.5}
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, initializer_range=0.5)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, **HEADS)),
    "sliding windows": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, **HEADS, head_dim=8, sliding_window=4)),
    "no positions": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.5)
    ),
    "no cache of keys": lambda: MambaForCausalLM(MambaConfig(**SIZE, state_size=4, initializer_range=0.5)),
}
PROMPTS = [[3, 9, 21], [5], [11, 2, 30, 31, 4, 6], [8, 8], [13, 14, 15, 16], [33], [1, 2], [39, 3, 3, 3, 3]]


def padded(prompts):
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(each)) + each for each in prompts])
    return ids, torch.tensor([[0] * (length - len(each)) + [1] * len(each) for each in prompts])


def alone(model, prompt, longest, end=None):
    """The tokens of an answer, its score and the probability of an empty one, without a cache."""
    written, logs = [], []
    while len(written) < longest:
        with torch.no_grad():
            found = model(torch.tensor([prompt + written]), use_cache=False).logits[0, -1].log_softmax(-1)
        logs.append(found)
        written.append(found.argmax().item())
        if written[-1] == end:
            break
    score = np.exp(np.mean([each[token].item() for each, token in zip(logs, written, strict=True)]))
    return [token for token in written if token != end], score, logs[0][end or 0].exp().item()


@pytest.fixture
def model(request):
    """A model with random weights."""
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


@pytest.fixture
def end(model):
    """A token that the answers reach at different steps, and some never."""
    free = [alone(model, prompt, 12)[0] for prompt in PROMPTS]
    steps = {token: [own.index(token) if token in own else 12 for own in free] for own in free for token in own}
    return max(sorted(steps), key=lambda token: (len(set(steps[token])), min(steps[token]) < 3))


class Renamed:
    """A model whose cache has the name that transformers gives it since 5.24, or had before."""

    def __init__(self, model, name):
        self.model, self.name, self.lengths = model, name, []
        self.forward = self._with_cache if name == "cache" else self._with_past

    def _with_cache(self, input_ids, attention_mask, position_ids, cache, use_cache):
        return self._outputs(input_ids, attention_mask, position_ids, cache)

    def _with_past(self, input_ids, attention_mask, position_ids, past_key_values, use_cache):
        return self._outputs(input_ids, attention_mask, position_ids, past_key_values)

    def _outputs(self, ids, mask, places, cache):
        self.lengths.append(ids.shape[1])
        taken = inspect.signature(self.model.forward).parameters
        own = "cache" if "cache" in taken else "past_key_values"
        found = self.model(ids, attention_mask=mask, position_ids=places, use_cache=True, **{own: cache})
        return ModelOutput({"logits": found.logits, self.name: found[own]})

    def __call__(self, **given):
        return self.forward(**given)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_the_cache_is_used_under_its_old_and_its_new_name(model, name):
    renamed = Renamed(model, name)
    assert write_greedily(renamed, *padded(PROMPTS), Limits(4, 39)) == write_greedily(
        model, *padded(PROMPTS), Limits(4, 39)
    )
    assert renamed.lengths == [6, 1, 1, 1]


@pytest.mark.parametrize("model", [name for name in FAMILIES if name != "no cache of keys"], indirect=True)
def test_a_batch_gives_the_answers_of_its_rows_alone(model, end):
    found = write_greedily(model, *padded(PROMPTS), Limits(12, end))
    expected = [alone(model, prompt, 12, end) for prompt in PROMPTS]
    assert [each.tokens for each in found] == [tokens for tokens, _, _ in expected]
    assert len({len(tokens) for tokens, _, _ in expected}) > 1  # rows leave at different steps
    np.testing.assert_allclose([each.score for each in found], [score for _, score, _ in expected], rtol=1e-4)
    np.testing.assert_allclose([each.silence for each in found], [silence for _, _, silence in expected], rtol=1e-4)


@pytest.mark.parametrize("model", ["no cache of keys"], indirect=True)
def test_a_model_without_keys_and_values_reads_the_whole_input_again(model, end):
    for prompt in PROMPTS[:4]:  # one at a time: such a model does not mask padding on the left
        (found,) = write_greedily(model, *padded([prompt]), Limits(6, end))
        assert found.tokens == alone(model, prompt, 6, end)[0]


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_finished_rows_are_not_computed(model, end):
    seen = []
    model.register_forward_pre_hook(lambda *call: seen.append(len(call[2]["input_ids"])), with_kwargs=True)
    lengths = [len(each.tokens) for each in write_greedily(model, *padded(PROMPTS), Limits(12, end))]
    unfinished = [sum(length >= step for length in lengths) for step in range(12)]
    assert seen == [count for count in unfinished if count]
    assert seen[-1] < len(PROMPTS)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_limits(model, end):
    longer = write_greedily(model, *padded(PROMPTS), Limits(12, end, shortest=3))
    assert all(len(each.tokens) >= 3 for each in longer)
    unrepeated = write_greedily(model, *padded(PROMPTS), Limits(12, end, shortest=12, no_repeat=2))
    for each in unrepeated:
        pairs = list(zip(each.tokens, each.tokens[1:], strict=False))
        assert len(pairs) == len(set(pairs)) == 11


def test_n_grams_of_the_context_may_be_repeated():
    """Only n-grams of the answer are forbidden."""
    for answer, forbidden in (([], []), ([1], []), ([1, 2], []), ([1, 2, 1], [2]), ([1, 2, 1, 3, 1], [2, 3])):
        written = torch.tensor([answer], dtype=torch.long)
        found = _allowed(torch.zeros(1, 10), written, Limits(9, 0, no_repeat=2), None)
        assert torch.isinf(found[0]).nonzero().flatten().tolist() == forbidden
