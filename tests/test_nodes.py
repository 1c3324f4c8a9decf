"""Several machines, simulated by one: two launchers that connect over loopback, started by examples/slurm.sh.

The commands of the cluster are replaced: `srun` runs its command once per machine, in parallel, `scontrol` prints the
first machine. The rest is real: two `accelerate launch`, gloo, and a whole round.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from test_train_script import MACHINE, launch

from cozyrag.pipeline import CozyRAG

ROOT = Path(__file__).parents[1]
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
for node in 0 1; do SLURM_NODEID=$node "$@" > "$LOGS/node-$node.log" 2>&1 & jobs="${jobs:-} $!"; done
for job in $jobs; do wait "$job" || failed=1; done
exit "${failed:-0}"
"""


@pytest.fixture
def cluster(tmp_path):
    """Environment of a job on two machines: replaced commands on the path, and a folder for the fingerprints."""
    commands = {
        "srun": SRUN,
        "scontrol": "#!/bin/bash\necho 127.0.0.1\nsleep 0.2\necho 127.0.0.1\n",
        "accelerate": f'#!/bin/bash\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n',
    }
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "RANK", "WORLD_SIZE")}
    return clean | MACHINE | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "LOGS": str(tmp_path),
        "NODE_PRINTS": str(tmp_path), "SLURM_JOB_NODELIST": "two", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2",
        "PORT": str(port), "ACCELERATE_MIXED_PRECISION": "no",
    }  # fmt: skip


@pytest.fixture
def settings(corpus_files, generator_path, retriever_path):
    files = [part for name, path in corpus_files.items() for part in (f"--{name}", path)]
    small = (
        "--generator_batch_size 8 --retriever_batch_size 16 --context_tokens 64 --answer_tokens 4 --rounds 1 "
        "--threads 1 --generator_learning_rate 3e-3 --retriever_learning_rate 1e-3 --rollback off "
        "--mixed_precision no --use_cpu True"
    )
    return [*files, "--generator", generator_path, "--retriever", retriever_path, *small.split()]


@pytest.mark.slow
def test_two_machines_take_the_steps_of_one(cluster, settings, tmp_path):
    script = (ROOT / "examples" / "slurm.sh").read_text().replace("train.py", str(ROOT / "tests" / "node_run.py"))
    (tmp_path / "slurm.sh").write_text(script)
    command = ["bash", str(tmp_path / "slurm.sh"), *map(str, settings), "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=tiny.PATIENCE)
    logs = [(tmp_path / f"node-{node}.log").read_text() for node in (0, 1)]
    assert done.returncode == 0, done.stderr + logs[0][-3000:] + logs[1][-3000:]
    notes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [(note["GROUP_RANK"], note["LOCAL_WORLD_SIZE"], note["WORLD_SIZE"]) for note in notes] == [
        ("0", "1", "2"),
        ("1", "1", "2"),
    ]
    assert notes[0]["prints"] == notes[1]["prints"]  # bit-equal weights on both machines
    assert CozyRAG.from_pretrained(tmp_path / "two").answer("What colour is the fox 0?").passages
    assert "2 processes on cpu" in logs[0] and "2 processes on cpu" not in logs[1]  # only the first machine logs
    launch([*settings, "--output_dir", tmp_path / "one"])
    for name in ("generator", "retriever"):
        two, one = (load_file(tmp_path / folder / name / "model.safetensors") for folder in ("two", "one"))
        for tensor in one:
            np.testing.assert_allclose(two[tensor], one[tensor], atol=2e-4, err_msg=f"{name} {tensor}")


def test_a_launch_that_splits_models_is_refused(monkeypatch):
    from accelerate.utils import DistributedType

    from cozyrag.config import parse_settings
    from cozyrag.errors import InputError
    from cozyrag.training import setup

    class Split:
        distributed_type = DistributedType.DEEPSPEED
        num_processes = 2

    monkeypatch.setattr(setup, "Accelerator", lambda **options: Split())
    with pytest.raises(InputError, match=r"--generator_sharding.*DEEPSPEED.*zero2\.yaml.*--lora_rank"):
        setup.make_accelerator(parse_settings([]))
