"""The plan of a run: what the probe measures, how it is counted up, and that it comes true without leaving a trace."""

import json
import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sentence_transformers import SentenceTransformer
from tiny import corpus
from transformers import GPT2Config

from cozyrag import cli, run
from cozyrag.config import parse_settings
from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.preflight.cost_model import Costs, Line, Phase, bite, fit, is_sure, peak_at, spread
from cozyrag.preflight.plan import (
    Plan,
    Sizes,
    format_bytes,
    format_time,
    make_plan,
    plan_table,
    predict,
    refreshes,
    verdict,
)
from cozyrag.run import train
from cozyrag.training.setup import load_models, load_tables

PARTS = [
    "index",
    "fit fusion weights",
    "retrieve",
    "generator phase",
    "feedback",
    "retriever phase",
    "evaluation",
    "save",
]


@pytest.fixture
def brief(monkeypatch):
    """A probe of a few seconds."""
    monkeypatch.setattr("cozyrag.preflight.phase_probe.BUDGET", 3.0)


@pytest.fixture
def arguments(corpus_files, generator_path, retriever_path, tmp_path):
    """Settings of a small run, as strings."""
    files = [part for name, path in corpus_files.items() for part in (f"--{name}", path)]
    models = ["--generator", generator_path, "--retriever", retriever_path, "--context_tokens", 48, "--threads", 1]
    sizes = ["--generator_batch_size", 8, "--retriever_batch_size", 8, "--answer_tokens", 4, "--rounds", 2, "--use_cpu"]
    return [*map(str, [*files, *models, *sizes]), "--output_dir", str(tmp_path / "out")]


def planned(arguments):
    """(the plan, the models it was made with)."""
    settings = parse_settings(arguments)
    accelerator = Accelerator(cpu=True)
    tables = load_tables(accelerator, settings)
    models = load_models(accelerator, settings, tables, None)
    return make_plan(accelerator, settings, tables, *models), models


def times(folder):
    """Rows of metrics.jsonl by kind."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "time"], [row for row in rows if row["kind"] == "step"]


def test_the_sentence_loss_is_refused_for_a_retriever_that_has_no_vectors_of_sentences(
    arguments, retriever_path, tmp_path
):
    """By all that load models: a run, a plan, the self-test."""
    model = SentenceTransformer(str(retriever_path))
    model[1].pooling_mode = "cls"
    model.save_pretrained(str(tmp_path / "cls"))
    with pytest.raises(
        InputError, match="--sentence_weight: expected a retriever with mean pooling.*cls"
    ):
        planned([*arguments, "--retriever", str(tmp_path / "cls"), "--sentence_weight", "1"])


# ---- measuring


def test_a_line_is_found_and_one_that_cannot_be_goes_through_zero():
    line = fit([(units, 2 + 0.5 * units) for units in (1, 2, 4, 8)])
    assert (line.fixed, line.each) == pytest.approx((2, 0.5)) and line.seconds(3, 10) == pytest.approx(11)
    assert fit([(10, 5.0), (11, 5.5), (12, 6.0)]) == Line(0.0, 0.5)  # sizes alike: nothing to tell the two by
    assert fit([(1, 3.0), (2, 2.0), (3, 1.0)]) == Line(0.0, 1.0)  # it would fall
    assert fit([(4, 2.0)]) == Line(0.0, 0.5)


def test_sure_is_who_measured_often_and_alike():
    assert not is_sure([(10, 1.0)] * 4) and is_sure([(10, 1.0)] * 5)
    assert not is_sure([(10, 1.0), (10, 2.0)] * 3)


@pytest.mark.parametrize("count", [1, 2, 5, 17, 64])
def test_the_first_places_are_evenly_spread_and_each_comes_once(count):
    order = list(spread(count))
    assert sorted(order) == list(range(count))
    assert set(order[:3]) == {0, round((count - 1) / 2), count - 1}


def test_a_bite_is_what_fits_four_times():
    assert bite(64, 4, 0.1, 100) == 64  # all of it
    assert bite(64, 4, 1.0, 20) == 20 and bite(64, 4, 1.0, 1) == 4


def test_memory_grows_along_the_line_and_never_falls():
    assert peak_at(100, (10, 1000), (50, 5000)) == 10_000
    assert peak_at(40, (10, 1000), (50, 5000)) == 5000  # as large was seen
    assert peak_at(100, (10, 5000), (50, 1000)) == 1000 and peak_at(9, (10, 1), (10, 3)) == 3


# ---- counting, by hand


SIZES = Sizes(
    questions=1000, answered=900, known=800, eval_questions=100, passages=500, text=50_000, dimensions=10, generator=4_000,
    retriever=2_000, generator_trained=4_000, retriever_trained=1_600, tokenizer=300, held=1_000_000,
)  # fmt: skip
COSTS = Costs(
    encode=Line(1, 0.01), batches=8, tokens=1000, lexical=0.5, search=0.002, first=0.0, reach=3.0, weigh=0.01,
    generator=Phase(30, 100, 120, Line(0.5, 0.001), 900, 7_000), retriever=Phase(25, 50, 60, Line(0, 0.02), 800, 9_000, ending=2),
    feedback=0.1, answer=Line(1, 0.02), write=1e-5, row_bytes=100, sentences=2000, lexical_bytes=5_000,
    writing=3_000, exact=True, peak=0, spent=1,
)  # fmt: skip


def counted(*arguments, sizes=SIZES, costs=COSTS):
    """The parts by name, for settings."""
    settings = parse_settings(["--questions", "my.tsv", "--save_steps", "10", *arguments])
    return {part.name: part for part in predict(settings, sizes, costs)}


def test_seconds_by_hand():
    parts = counted("--feedback_weight", "0.5")
    assert list(parts) == PARTS
    for name, expected in {
        "index": (18.5, 18, 18),  # 8 batches and 1000 tokens; BM25 once
        "fit fusion weights": (1, 1, 1),  # on a tenth of the questions
        "retrieve": (0.2, 2.2, 2.2),
        "generator phase": (0, 18, 18),  # 30 * 0.5 + 3000 * 0.001
        "feedback": (0, 90, 90),
        "retriever phase": (0, 27, 27),  # 25 * 50 * 0.02 and 2 at its end
        "evaluation": (4, 8, 8),  # two batches of up to 64, and again for the gate
    }.items():
        assert parts[name].seconds == pytest.approx(expected), name
    pair, index = 6_300, 2 * 20_000 + 50_000 + 2000 * 10 * 2 + 500 * 8
    inside = 2 * (pair + 8_000) + 2 * (pair + 3_200)  # after steps 10 and 20 of both phases
    assert parts["save"].seconds == pytest.approx(
        [1e-5 * (2 * pair + index), *[1e-5 * (4 * pair + index + inside)] * 2]
    )


def test_passages_that_are_met_for_the_first_time_cost_once():
    parts = counted(costs=replace(COSTS, first=0.01, reach=1e9))
    assert parts["retrieve"].seconds == pytest.approx((0.2 + 5, 2.2, 2.2))


def test_memory_and_disk_by_hand():
    parts = counted("--feedback_weight", "0.5")
    assert parts["index"].memory == 2 * 20_000 + 40_000 + 4_000 + 5_000
    assert parts["index"].disk == 2 * 20_000 + 40_000 + 4_000 + 50_000
    assert parts["retrieve"].memory == 100_000 + 60 * 72 * 1000 and parts["retrieve"].disk == 200_000
    assert parts["generator phase"].memory == 3 * 4_000 + 7_000
    several = counted("--generator_sharding", "full_shard", sizes=replace(SIZES, processes=4))
    assert several["generator phase"].memory == 3 * 1_000 + 7_000
    assert parts["retriever phase"].memory == 3 * 1_600 + 9_000
    assert parts["feedback"].disk == 2 * 1000 * 4 * 4
    # two checkpoints, and beside the old pair the new one with its index: more than a third checkpoint and AdamW's states
    assert parts["save"].disk == 6_300 + 2 * 6_300 + 6_300 + parts["index"].disk
    plan = Plan(tuple(parts.values()), SIZES, COSTS)
    assert plan.memory == 1_000_000 + parts["index"].memory + parts["retrieve"].memory + 19_000
    assert plan.disk == sum(part.disk for part in parts.values())
    assert plan.seconds == pytest.approx(sum(sum(part.seconds) for part in parts.values()))
    assert Plan(plan.parts, SIZES, replace(COSTS, peak=10**9)).memory == 10**9


def test_settings_change_the_counts():
    assert counted("--rollback", "off")["evaluation"].seconds == pytest.approx((4, 4, 4))
    still = replace(COSTS, generator=replace(COSTS.generator, steps=0))
    assert counted(costs=still)["evaluation"].seconds == pytest.approx((4, 4, 4))
    fixed = replace(COSTS, retriever=replace(COSTS.retriever, steps=0))  # the same contexts: the answers are known
    assert counted(costs=fixed)["evaluation"].seconds == pytest.approx((4, 4, 4))
    neither = replace(fixed, generator=replace(COSTS.generator, steps=0))
    assert counted(costs=neither)["evaluation"].seconds == pytest.approx((4, 0, 0))
    assert counted("--freeze_document_encoder", "True")["index"].seconds == pytest.approx((18.5, 0, 0))
    assert counted("--rounds", "0")["retrieve"].seconds == pytest.approx((0.2,))
    silent = counted("--no_answer", "True")
    assert silent["evaluation"].seconds == pytest.approx((2 * 4, *[2 * 2 * 4] * 2))  # as found, and without the answer
    assert silent["retrieve"].seconds == pytest.approx((0.4, 2.6, 2.6))  # each of two looks searches again
    often = counted("--index_refresh", "steps", "--refresh_steps", "10")  # after 10 and 20 of 25 steps
    assert often["index"].seconds == pytest.approx((18.5, 54, 54))
    assert often["retrieve"].seconds == pytest.approx((0.2, 6.2, 6.2))
    still = counted(costs=replace(COSTS, retriever=replace(COSTS.retriever, steps=0)))
    assert still["index"].seconds == pytest.approx((18.5, 0, 0)) and still["fit fusion weights"].seconds == (1, 0, 0)
    halves = counted("--feedback_weight", "1", sizes=replace(SIZES, processes=2))
    assert halves["feedback"].seconds == pytest.approx((0, 45, 45))


@pytest.mark.parametrize(("steps", "times"), [(0, 0), (10, 0), (11, 1), (21, 2)])
def test_refreshes_within_a_phase(steps, times):
    settings = parse_settings(["--questions", "q.tsv", "--index_refresh", "steps", "--refresh_steps", "10"])
    assert refreshes(settings, steps) == times


def test_the_table_and_the_sentence():
    plan = Plan(tuple(counted("--feedback_weight", "0.5").values()), SIZES, COSTS)
    lines = plan_table(plan).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["part", *PARTS, "whole run"]
    assert "each later round" in lines[0] and "30 steps a round, 900 questions" in lines[4]
    told = verdict(plan)
    assert "'feedback'" in told and "--feedback_passages" in told and "One round less" in told
    assert [format_time(seconds) for seconds in (1.23, 99, 120, 7200)] == ["1.2 s", "99 s", "2.0 min", "2.0 h"]
    assert (format_bytes(1_500_000), format_bytes(2.5e9)) == ("1.5 MB", "2.50 GB")


# ---- against real runs


CHANGES = [
    [],
    ["--generator_epochs", "1.5", "--retriever_steps", "3"],
    ["--feedback_weight", "0.5", "--generator_steps", "0", "--gradient_accumulation_steps", "2"],
    ["--retrieval", "dense", "--keep_sentence_vectors", "False", "--freeze_document_encoder", "True", "--no_answer", "True", "--context_noise", "0.3"],
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=[" ".join(each) or "defaults" for each in CHANGES])
def test_steps_and_parts_are_those_of_the_run(arguments, changes, brief, tmp_path):
    arguments = [*arguments, *changes, "--rounds", "1", "--logging_steps", "1"]
    plan, _ = planned(arguments)
    assert not (tmp_path / "out").exists()
    train(arguments)
    timed, steps = times(tmp_path / "out")
    for name, phase in (("generator", plan.costs.generator), ("retriever", plan.costs.retriever)):
        assert phase.steps == sum(row["phase"] == name for row in steps), name
    spent = {part.name for part in plan.parts if part.name != "save" and (sum(part.seconds) or "phase" in part.name)}
    assert {row["part"] for row in timed} == spent
    assert all(math.isfinite(part.seconds[-1]) and part.seconds[-1] >= 0 for part in plan.parts)


def test_the_end_of_a_phase_is_counted(arguments, brief, monkeypatch):
    """Letting go of what trained looks through all of Python's objects, however few steps a phase has."""
    free = Accelerator.free_memory

    def slowly(self, *objects):
        time.sleep(0.4)
        return free(self, *objects)

    monkeypatch.setattr(Accelerator, "free_memory", slowly)
    costs = planned([*arguments, "--generator_steps", "1", "--retriever_steps", "1"])[0].costs
    for phase in (costs.generator, costs.retriever):
        assert 0.4 <= phase.ending < phase.seconds


def test_the_prediction_comes_true_within_a_quarter(arguments, tmp_path, monkeypatch):
    """A generator large enough that its work, not fixed overheads, takes the time; best of eight, machines are noisy."""
    monkeypatch.setattr("cozyrag.preflight.phase_probe.BUDGET", 8.0)
    texts = [row["text"] for row in corpus()[0]]
    config = GPT2Config(n_embd=192, n_layer=3, n_head=3, n_positions=160)
    Generator.from_scratch(texts, config=config, vocab_size=400).save(tmp_path / "larger")
    wrong = []
    for number in range(8):
        folder = tmp_path / f"out-{number}"
        given = [*arguments, "--generator", str(tmp_path / "larger"), "--generator_epochs", "4", "--rounds", "1"]
        given += ["--rollback", "off", "--save_steps", "0", "--output_dir", str(folder)]
        plan, _ = planned(given)
        train(given)
        predicted = sum(sum(part.seconds) for part in plan.parts if part.name != "save")
        wrong.append(predicted / sum(row["seconds"] for row in times(folder)[0]) - 1)
        if abs(wrong[-1]) < 0.25:
            return
    pytest.fail(f"predicted against measured seconds of eight runs: {', '.join(f'{each:+.0%}' for each in wrong)}")


def test_nothing_is_changed_and_nothing_is_written(arguments, brief, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = parse_settings([*arguments, "--feedback_weight", "0.5", "--rounds", "1"])
    accelerator = Accelerator(cpu=True)
    tables = load_tables(accelerator, settings)
    models = load_models(accelerator, settings, tables, None)
    models[0].model.train()

    def state():
        bits = [tensor.numpy().tobytes() for each in models for tensor in each.model.state_dict().values()]
        modes = [module.training for each in models for module in each.model.modules()]
        return (
            bits,
            modes,
            random.getstate(),
            np.random.get_state()[1].tobytes(),
            torch.get_rng_state().numpy().tobytes(),
        )

    before = state()
    make_plan(accelerator, settings, tables, *models)
    assert state() == before
    assert all(parameter.grad is None for each in models for parameter in each.model.parameters())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["plan"], ["train", "--plan"], ["train", "--plan", "True"]])
def test_the_commands_print_the_table_and_leave_no_folder(arguments, command, brief, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cozyrag", *command, *arguments])
    cli.main()
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in PARTS if name != "feedback")
    assert "whole run" in shown and "nothing is trained" in shown
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_the_settings_ends_with_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cozyrag", "plan", "--genrator", "x"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and "did you mean 'generator'" in capsys.readouterr().err


def test_without_plan_a_run_is_a_run(monkeypatch):
    monkeypatch.setattr(run, "show_plan", lambda settings: pytest.fail("not asked for"))
    monkeypatch.setattr(run, "check_output", lambda *given, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(["--questions", "q.tsv"])
