"""The benchmark of optimisations: each is really taken out, does not change results, and has a row."""

import json

import pytest
import torch
from tiny import corpus, write_jsonl

from benchmarks.shared.round_benchmark import Benchmark, parse
from benchmarks.speed import levers
from cozyrag.models import generator as generator_module
from cozyrag.models.batching import collate
from cozyrag.models.generator import Generator
from cozyrag.models.prompts import encode_examples
from cozyrag.models.token_losses import TokenLosses
from cozyrag.training import step_order
from cozyrag.training.step_order import plan_steps

SMALL = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "vocabulary": 1000,
    "pairs": 8,
    "generator_batch": 4,
    "context_tokens": 24,
    "repeats": 1,
}


@pytest.fixture
def arguments(tmp_path):
    """A small run on generated texts."""
    passages, questions = corpus(40)
    files = (
        "--questions",
        write_jsonl(tmp_path / "q.jsonl", questions),
        "--passages",
        write_jsonl(tmp_path / "p.jsonl", passages),
    )
    sizes = [part for name, value in SMALL.items() for part in (f"--{name}", value)]
    return [str(each) for each in (*files, "--device", "cpu", *sizes)]


def test_every_optimisation_has_its_row(arguments, tmp_path, capsys):
    path = tmp_path / "levers.json"
    options = parse(None, [*arguments, "--json", str(path)])
    levers.compare(options)
    out, numbers = capsys.readouterr().out, json.loads(path.read_text())
    assert all(f"| {name} |" in out for name in numbers) and len(numbers) >= 8
    assert all(len(each["measured"]) == 1 and each["measured"][0] > 0 for each in numbers.values())
    assert options.context_tokens == SMALL["context_tokens"]


def test_predictions_count_tokens(arguments):
    benchmark = Benchmark(parse(None, arguments))
    asked = benchmark.asked.first(8)
    prompts = benchmark.prompts(asked)
    benchmark.options.context_tokens *= 2
    found = levers.predictions(benchmark, prompts.examples, benchmark.prompts(asked).examples)
    assert found["head"] > found["last block"] > 1.2 and 1 < found["context"] < 2.2 and 1 <= found["sorting"] < 2
    assert levers.padded([3, 5, 1, 2], [torch.tensor([0, 1]).numpy(), torch.tensor([2, 3]).numpy()]) == [5, 5, 2, 2]


def test_the_head_everywhere_gives_the_same_losses(generator_path):
    generator = Generator.load(str(generator_path))
    examples = encode_examples(
        generator.tokenizer,
        questions=["a b?", "c?"],
        contexts=["a b c", "d"],
        answers=["c", "d"],
        context_tokens=8,
        max_length=64,
    )
    batch = collate(examples, pad_id=generator.tokenizer.pad_token_id)
    expected = TokenLosses(generator.model)(**batch)
    head, seen = generator.model.get_output_embeddings(), []
    head.register_forward_hook(lambda module, given, made: seen.append(made.numel()))
    TokenLosses(generator.model)(**batch)
    with levers.head_everywhere():
        torch.testing.assert_close(TokenLosses(generator.model)(**batch), expected)
    assert seen[1] > seen[0]


def test_each_optimisation_is_taken_out(generator_path, monkeypatch):
    lengths = list(range(40))
    steps = lambda: plan_steps(lengths, batch_size=4, epochs=1, max_steps=None, seed=1)  # noqa: E731
    spread = lambda made: sum(step.max() - step.min() for step in made)  # noqa: E731
    with levers.unsorted():
        loose = steps()
    assert sorted(row for step in loose for row in step) == lengths and spread(loose) > 2 * spread(steps())
    configs = {}
    for name in ("composed_activation", "with_dropout", "eager_attention"):
        with levers.loaded_with(getattr(levers, name)):
            configs[name] = Generator.load(str(generator_path)).model.config
    plain = Generator.load(str(generator_path)).model.config
    assert configs["composed_activation"].activation_function == "gelu_new" != plain.activation_function
    assert configs["with_dropout"].attn_pdrop == 0.1 and plain.attn_pdrop == 0
    assert configs["eager_attention"]._attn_implementation == "eager" != plain._attn_implementation
    weight = torch.nn.Parameter(torch.ones(2))
    with levers.plain_optimizer():
        assert torch.optim.AdamW([weight], fused=True).defaults["fused"] is False
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    with levers.one_thread():
        assert asked == [1]
    assert asked == [1, 2] and step_order._one_epoch is not levers.shuffled
    assert generator_module.TokenLosses is TokenLosses
