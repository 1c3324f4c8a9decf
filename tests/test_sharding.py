"""A sharded generator learns what a whole one does, each process holds its shard, and checkpoints are whole.

Real processes, gloo, CPU: first single phases (sharded_run.py), compared with DDP's, then runs with the two configs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file
from test_train_script import MACHINE, launch, metrics

from cozyrag.config import parse_settings
from cozyrag.errors import InputError
from cozyrag.models import fsdp
from cozyrag.models.generator import Generator
from cozyrag.run import train

ROOT = Path(__file__).parents[1]
PARTS = ("shard_grad_op", "full_shard")
STOPPED = """import os, signal, sys
import cozyrag.run, cozyrag.training.generator_phase
from cozyrag.cli import entry_point
real, calls = cozyrag.training.generator_phase.generator_step, []
def step(*arguments, **options):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*arguments, **options)
cozyrag.training.generator_phase.generator_step = step
entry_point(lambda: cozyrag.run.train(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def phases(generator_path, retriever_path, tmp_path_factory):
    """The results of sharded_run.py on each of two processes, with an odd vocabulary, so that nothing halves evenly."""
    folder = tmp_path_factory.mktemp("phases")
    odd = Generator.load(str(generator_path))
    torch.manual_seed(0)
    odd.model.resize_token_embeddings(odd.model.config.vocab_size + 1, mean_resizing=False)
    odd.save(folder / "generator")
    script = [str(ROOT / "tests" / "sharded_run.py"), str(folder), str(folder / "generator"), str(retriever_path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script]
    clean = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "RANK", "WORLD_SIZE")}
    place = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "ACCELERATE_MIXED_PRECISION": "no"}
    done = subprocess.run(command, env=clean | MACHINE | place, capture_output=True, text=True, timeout=tiny.PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def same_end(found, expected, atol=2e-5):
    """Compare losses and penalties, gradient norms and weights up to rounding; `found` may have only the last ones."""
    count = len(found["losses"])
    np.testing.assert_allclose(found["losses"], expected["losses"][-count:], atol=atol)
    np.testing.assert_allclose(found["norms"], expected["norms"][-count:], rtol=1e-4)
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][name], weight, atol=atol, err_msg=name)


# ---- phases


@pytest.mark.slow
@pytest.mark.parametrize("mode", PARTS)
def test_shards_learn_what_a_whole_generator_does(phases, mode):
    same_end(phases[0][mode], phases[0]["none"])
    assert phases[0]["none"]["norms"][0] > 0.5  # gradients were clipped
    assert all(term > 0 for losses in phases[0][mode]["losses"] for term in losses[2:])  # penalties were on


@pytest.mark.slow
@pytest.mark.parametrize("mode", PARTS)
def test_each_process_holds_about_half(phases, mode):
    whole = phases[0]["none"]["bytes"]
    for found in phases:
        shares = {name: held / whole[name] for name, held in found[mode]["bytes"].items()}
        between = shares.pop("weights between the passes")
        assert shares.keys() == {"weights", "gradients", "states"}
        assert all(0.49 < share < 0.51 for share in shares.values()), shares
        assert (
            between == 1 if mode == "shard_grad_op" else 0.5 < between < 0.8
        )  # embeddings stay until the backward pass


@pytest.mark.slow
def test_every_phase_ends_with_an_equal_whole_generator_on_each_process(phases):
    for name in phases[0].keys() - {"halved"}:
        first, second = (found[name] for found in phases)
        assert first["print"] == second["print"], name
        assert first["plain"] and first["tied"] and second["tied"], name
        assert first["kinds"] == ["GPT2LMHeadModel", "Parameter"], name


@pytest.mark.slow
def test_a_sharded_phase_resumes_exactly(phases):
    assert phases[0]["full_shard, then full_shard"]["print"] == phases[0]["full_shard"]["print"]
    assert phases[0]["full_shard, then full_shard"]["bytes"] == phases[0]["full_shard"]["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["full_shard, then none", "none, then shard_grad_op"])
def test_a_checkpoint_is_the_same_with_and_without_sharding(phases, way):
    assert len(phases[0][way]["losses"]) == 3
    same_end(phases[0][way], phases[0]["none"])


@pytest.mark.slow
def test_a_sharded_adapter_learns(phases):
    if "adapter, none" not in phases[0]:
        pytest.skip("PEFT is not installed")
    same_end(phases[0]["adapter, full_shard"], phases[0]["adapter, none"])
    held = [phases[0][f"adapter, {mode}"]["bytes"] for mode in ("none", "full_shard")]
    assert held[1]["states"] * 2 == held[0]["states"] and held[1]["weights"] < 0.52 * held[0]["weights"]


@pytest.mark.slow
def test_bf16_computes_in_it_and_keeps_float32(phases):
    found = phases[0]["halved"]
    assert found["bf16"] == pytest.approx(found["float32"], abs=0.03) and found["bf16"] != found["float32"]
    assert found["gradients"] == ["torch.float32"]


# ---- whole runs


@pytest.mark.slow
def test_the_configs_train_the_pair_of_one_process_and_resume_each_others_checkpoints(
    corpus_files, generator_path, retriever_path, tmp_path
):
    files = [part for name, path in corpus_files.items() for part in (f"--{name}", path)]
    settings = [
        *files, "--generator", generator_path, "--retriever", retriever_path, "--generator_batch_size", 8,
        "--generator_steps", 5, "--retriever_batch_size", 16, "--retriever_steps", 2, "--context_tokens", 64,
        "--answer_tokens", 4, "--generator_learning_rate", 3e-3, "--retriever_learning_rate", 1e-3, "--rounds", 1,
        "--logging_steps", 1, "--threads", 1, "--rollback", "off", "--mixed_precision", "no", "--use_cpu", "True",
    ]  # fmt: skip
    stopped, two = tmp_path / "stopped.py", [*settings, "--output_dir", tmp_path / "two"]
    stopped.write_text(STOPPED)
    path = {"PYTHONPATH": str(ROOT)}
    first = launch(two, config="fsdp.yaml", script=stopped, environment=path, check=False)
    assert "round-001-0-generator-000003 is saved" in first.stderr, first.stderr[-3000:]
    assert "self-test: without the generator's terms" in first.stdout and "contrastive" in first.stdout
    assert "2 processes on cpu, the generator's training sharded (full_shard)" in first.stdout
    last = launch([*two, "--allow_changed_settings"], config="zero2.yaml", environment=path)
    assert "Resuming from round-001-0-generator-000003" in last.stdout and "(shard_grad_op)" in last.stdout
    prints = [row["fingerprints"] for row in metrics(tmp_path / "two", "processes")]
    assert len(prints) == 4 and all(len(pair) == 2 and pair[0] == pair[1] for pair in prints)
    train([*map(str, settings), "--output_dir", str(tmp_path / "one")])
    losses = [[row["loss"] for row in metrics(tmp_path / name, "step")] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and len(losses[0]) == 7
    for name in ("generator", "retriever"):
        pair = [load_file(tmp_path / folder / name / "model.safetensors") for folder in ("one", "two")]
        assert pair[0].keys() == pair[1].keys()
        for tensor in pair[0]:
            np.testing.assert_allclose(pair[1][tensor], pair[0][tensor], atol=2e-4, err_msg=f"{name} {tensor}")


# ---- settings


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}, None),  # a leftover: FSDP itself is off
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}, "full_shard"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}, "shard_grad_op"),
    ],
)
def test_the_launch_config_selects_the_sharding_unless_a_setting_does(environment, expected, monkeypatch):
    assert fsdp.launched(environment) == expected
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert parse_settings([]).training.generator_sharding == expected
    assert parse_settings(["--generator_sharding", "none"]).training.generator_sharding == "none"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing: true"),
    ],
)
def test_unsupported_launch_options_are_refused(more, message):
    with pytest.raises(InputError, match=f"(?s){message}.*fsdp.yaml"):
        fsdp.launched({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | more)


def test_one_process_and_fp16_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"found one.*fsdp.yaml"):
        train(["--generator_sharding", "full_shard", "--use_cpu", "True", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="bf16"):
        fsdp.check_sharding("full_shard", processes=2, precision="fp16")
    fsdp.check_sharding("none", processes=1, precision="fp16")
    fsdp.check_sharding("shard_grad_op", processes=2, precision="bf16")


def test_whole_weights_are_unchanged():
    weights = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))]
    assert fsdp.held_bytes(weights) == 34 and fsdp.joined(weights[0]) is weights[0]
    optimizer = torch.optim.AdamW(weights)
    fsdp.keep_state_whole(optimizer)
    weights[0].grad = torch.ones(3, 2)
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["exp_avg"] is optimizer.state[weights[0]]["exp_avg"]
