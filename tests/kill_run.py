"""Kill a tiny two-round run with SIGKILL at random moments, resume it, and compare it with an undisturbed one.

    python tests/kill_run.py --kills 60
    python tests/kill_run.py --kills 6 --processes 2

Each kill has its own run: it is started, killed at a moment drawn uniformly from the duration of the undisturbed run
(with indexing, evaluation, saving and pushing), and started again with the same command. Then metrics.jsonl without
times, evaluated answers, weights and vectors are compared byte for byte. Of several processes, all are killed, or one,
and the others must then end within a minute. Runs are forked from a process with loaded libraries, so that a kill
costs seconds. Left out: faults other than a kill (test_faults.py).
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}.items():
    os.environ[name] = value
for folder in (Path(__file__).parents[1], Path(__file__).parent):
    sys.path.insert(0, str(folder))

from tqdm.std import TqdmDefaultWriteLock  # noqa: E402

TqdmDefaultWriteLock.mp_lock = None  # shared by forks, and a killed one may hold it

import tiny  # noqa: E402

import cozyrag.run  # noqa: E402

LIMIT = 60.0  # seconds within which the other processes must end after a kill
SMALL = (
    "--generator_batch_size 8 --retriever_batch_size 16 --top_k 3 --context_tokens 64 --answer_tokens 6 --rounds 2 "
    "--generator_learning_rate 3e-3 --retriever_learning_rate 1e-3 --generator_epochs 2 --feedback_weight 0.5 "
    "--context_noise 0.2 --index_refresh steps --refresh_steps 2 --logging_steps 3 --threads 1"
).split()
PUSHING = "--push_to_hub --hub_model_id someone/tiny".split()
TIMES = ("seconds", "rate")


def materials(root: Path, precision: str = "no") -> list[str]:
    """Create tiny models and a tiny corpus; returns the settings of a run with them. In bf16 a Llama is trained."""
    passages, questions = tiny.corpus()
    make_generator = tiny.make_llama if precision == "bf16" else tiny.make_generator
    files = {
        "questions": tiny.write_jsonl(root / "train.jsonl", questions[:48]),
        "eval_questions": tiny.write_jsonl(root / "eval.jsonl", questions[64:]),
        "passages": tiny.write_jsonl(root / "passages.jsonl", passages),
        "generator": make_generator(root / "generator"),
        "retriever": tiny.make_retriever(root / "retriever"),
    }
    return [part for name, path in files.items() for part in (f"--{name}", str(path))] + [
        *SMALL,
        *PUSHING,
        "--mixed_precision",
        precision,
    ]


def push(folder: Path, *arguments, **options) -> str:
    """Replaces the upload; takes a while."""
    time.sleep(0.3)
    return "nowhere"


def start(arguments: list[str], processes: int, log: Path) -> list[int]:
    """Fork the processes of a run; returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if processes > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
                )  # fmt: skip
            cozyrag.run.refusal = lambda *arguments, **options: None
            cozyrag.hub.background_push.push_pair = push
            cozyrag.run.train(arguments)
            code = 0
        except BaseException:  # a child must never return into the loop of its parent
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return children


def ended(children: list[int], seconds: float) -> list[int] | None:
    """Exit codes of the processes, in order; None if one has not ended after that time."""
    until, codes = time.monotonic() + seconds, {}
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.005)
    return [codes[child] for child in children]


def whole(arguments: list[str], processes: int, log: Path) -> float:
    """Run to the end; returns the seconds."""
    clock = time.monotonic()
    codes = ended(start(arguments, processes, log), 600)
    if codes is None or any(codes):
        raise RuntimeError(f"the run ended with {codes}: {log.read_text()[-3000:]}")
    return time.monotonic() - clock


def is_running(child: int) -> bool:
    """Whether a process has not ended; leaves its exit status to `ended`."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def kill(children: list[int], after: float, one: int | None) -> bool:
    """SIGKILL all processes, or that one, after so many seconds; returns whether it was still running.

    The main process writes the report alone, so another may have ended before the kill, but none afterwards.
    """
    time.sleep(after)
    others = [child for rank, child in enumerate(children) if one is not None and rank != one and is_running(child)]
    victims = children if one is None else [children[one]]
    if not is_running(victims[0]):
        ended(children, LIMIT)
        return False
    for child in victims:
        os.kill(child, signal.SIGKILL)
    clock = time.monotonic()
    codes = ended(children, LIMIT)
    if codes is None:
        for child in children:
            os.kill(child, signal.SIGKILL)
        raise RuntimeError(f"the other processes were still there {LIMIT:.0f} s after one was killed")
    if any(code == 0 and child in others for child, code in zip(children, codes, strict=True)):
        raise RuntimeError(
            f"a process ended with 0 although another was killed: {codes}, {time.monotonic() - clock:.1f} s"
        )
    return True


def where(folder: Path) -> str:
    """The phase of a killed run, as far as its folder shows."""
    partial = [path.name.split("-")[0] for path in folder.rglob("*.partial")]
    if partial:
        return f"saving {'checkpoint' if partial[0] == 'round' else partial[0].removesuffix('.partial')}"
    if (folder / "pair.next").exists():
        return "switching the pair"
    newest = sorted(path.name for path in folder.glob("checkpoints/round-*"))
    if not newest:
        return "before the first checkpoint"
    return "end and pushing" if newest[-1].startswith("round-003") else newest[-1].split("-")[3]


def left(folder: Path, rounds: int = 2) -> dict[str, object]:
    """All that must be equal: rows of metrics.jsonl without times, and the bytes of the output files."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in rows if row["kind"] != "time"]
    for row in rows:
        for term in row.get("terms", []):
            term.pop("seconds", None)
    # Of cozyrag.json not the hashes: transformers writes tokenizer_config.json of a reloaded tokenizer differently.
    pair = json.loads((folder / "cozyrag.json").read_text())
    pair.pop("checksum")
    for model in ("generator", "retriever"):
        pair[model].pop("files")
    files = ["generator/model.safetensors", "retriever/model.safetensors", "index/vectors.safetensors"]
    files += [f"evaluations/round-{number:03d}.jsonl" for number in range(rounds + 1)]
    found: dict[str, object] = {name: (folder / name).read_bytes() for name in files}
    return found | {"metrics.jsonl": rows, "cozyrag.json": pair}


def differences(expected: dict[str, object], found: dict[str, object]) -> list[str]:
    """The names of differing parts."""
    return [name for name, value in expected.items() if found[name] != value]


def trial(settings: list[str], root: Path, number: int, processes: int, seconds: float, chance: random.Random) -> str:
    """One run that is killed once; returns its phase at the kill. Leaves the finished run in root/out-NUMBER."""
    folder, log = root / f"out-{number}", root / f"log-{number}"
    more = ["--output_dir", str(folder), "--save_steps", str(chance.choice([0, 1, 2, 5]))]
    one = chance.choice([None, *range(processes)]) if processes > 1 else None
    while True:
        if kill(start(settings + more, processes, log), chance.uniform(0, seconds), one):
            break
        for path in sorted(folder.rglob("*"), reverse=True):  # it ended before the kill: once more
            path.rmdir() if path.is_dir() else path.unlink()
    at = where(folder)
    resume = ["--resume"] if (folder / "settings.json").exists() and chance.random() < 0.5 else []
    whole([*settings, *more, *resume], processes, log)
    return at


def kill_and_compare(kills: int, processes: int, seed: int, root: Path, precision: str = "no", info=print) -> list[str]:
    """All trials; returns a line for each run that did not end like the undisturbed one."""
    chance, settings = random.Random(seed), materials(root, precision)
    seconds = whole([*settings, "--output_dir", str(root / "undisturbed")], processes, root / "log")
    expected, failures, places = left(root / "undisturbed"), [], Counter()
    for number in range(kills):
        try:
            at = trial(settings, root, number, processes, seconds, chance)
            wrong = differences(expected, left(root / f"out-{number}"))
        except RuntimeError as error:
            at, wrong = "?", [str(error)]
        places[at] += 1
        if wrong:
            failures.append(f"kill {number} ({at}): {', '.join(wrong)}")
        info(f"kill {number + 1} of {kills}: {at}: {'bit-equal' if not wrong else failures[-1]}")
    phases = ", ".join(f"{place} {count}" for place, count in places.most_common())
    info(
        f"{kills - len(failures)} of {kills} kills resumed bit-equal, {processes} process"
        f"{'es' if processes > 1 else ''}, undisturbed run {seconds:.1f} s; killed at: {phases}"
    )
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="runs that are killed (default: 3)")
    parser.add_argument("--processes", type=int, default=1, help="processes of a run (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument(
        "--precision",
        choices=["no", "bf16"],
        default="no",
        help="bf16 trains a Llama, and is emulated where the processor lacks it (default: no)",
    )
    parser.add_argument("--folder", type=Path, help="for runs and logs (default: a temporary folder)")
    chosen = parser.parse_args()
    if chosen.precision == "bf16":
        os.environ["COZYRAG_ALLOW_EMULATED_BF16"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        place = chosen.folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        sys.exit(bool(kill_and_compare(chosen.kills, chosen.processes, chosen.seed, place, chosen.precision)))
