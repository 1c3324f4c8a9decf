"""The script itself, launched as users launch it: one process and two, to the end, interrupted, and with bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from cozyrag.errors import InputError
from cozyrag.models.retriever import Retriever
from cozyrag.pipeline import CozyRAG
from cozyrag.retrieval.index_file import made_by
from cozyrag.retrieval.passage_index import PassageIndex
from cozyrag.run import train

ROOT = Path(__file__).parents[1]
MACHINE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def launch(
    arguments, *, config=None, cwd=None, environment=None, check=True, timeout=tiny.PATIENCE, script=ROOT / "train.py"
):
    """Run train.py: under `accelerate launch --config_file`, or plainly when no config is named."""
    start = [sys.executable, str(script)]
    if config:
        path = ROOT / "accelerate_configs" / config
        port = [] if config == "cpu.yaml" else ["--main_process_port", "0"]
        start = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(path),
            *port,
            str(script),
        ]
    clean = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*start, *map(str, arguments)],
        cwd=cwd,
        env=clean | MACHINE | (environment or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def settings(corpus_files, generator_path, retriever_path):
    """Settings of a small whole run, without the output folder."""
    files = [part for name, path in corpus_files.items() for part in (f"--{name}", path)]
    sizes = [
        "--generator_batch_size",
        8,
        "--retriever_batch_size",
        16,
        "--top_k",
        3,
        "--context_tokens",
        64,
        "--answer_tokens",
        6,
    ]
    rates = ["--generator_learning_rate", 3e-3, "--retriever_learning_rate", 1e-3]
    return [
        *files,
        "--generator",
        generator_path,
        "--retriever",
        retriever_path,
        *sizes,
        *rates,
        "--logging_steps",
        1,
        "--rounds",
        2,
        "--generator_epochs",
        3,
        "--feedback_weight",
        0.5,
        "--sentence_weight",
        0.5,
        "--index_refresh",
        "steps",
        "--refresh_steps",
        2,
        "--mixed_precision",
        "no",
    ]


@pytest.fixture(scope="session")
def one_process(settings, tmp_path_factory):
    """(output folder, screen) of a whole run under cpu.yaml."""
    folder = tmp_path_factory.mktemp("one") / "out"
    return folder, launch([*settings, "--output_dir", folder, "--threads", 1], config="cpu.yaml").stdout


@pytest.fixture(scope="session")
def two_processes(settings, tmp_path_factory):
    """Output folder of the same run under cpu_ddp.yaml, pieces and all."""
    folder = tmp_path_factory.mktemp("two") / "out"
    launch([*settings, "--output_dir", folder, "--threads", 1], config="cpu_ddp.yaml")
    return folder


def metrics(folder, kind):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_a_run_ends_with_its_report(one_process):
    pytest.importorskip("matplotlib")
    folder, screen = one_process
    assert f"{folder / 'report.html'} shows this run as a page with plots." in screen
    assert (folder / "report.html").read_text(encoding="utf-8").count("<svg") == 6
    names = ["calibration", "losses", "scores", "searches", "times", "verdicts"]
    assert sorted(path.stem for path in (folder / "plots").iterdir()) == names


def test_what_a_run_leaves_behind_loads_with_the_ordinary_libraries(one_process):
    folder, _ = one_process
    AutoTokenizer.from_pretrained(folder / "generator")
    assert AutoModelForCausalLM.from_pretrained(folder / "generator").config.model_type == "gpt2"
    assert SentenceTransformer(str(folder / "retriever")).encode(["a question"]).shape == (1, 32)
    answer = CozyRAG.from_pretrained(folder).answer("What colour is the fox 0?")
    assert isinstance(answer.text, str) and 0 <= answer.score <= 1 and len(answer.passages) == 3
    for name in (
        "generator/README.md",
        "retriever/README.md",
        "settings.json",
        "metrics.jsonl",
        "evaluations/round-002.jsonl",
        "audit.json",
    ):
        assert (folder / name).stat().st_size > 0


def test_the_screen_shows_before_and_after(one_process):
    screen = one_process[1]
    for text in (
        "| untuned baseline |",
        "| after round 1 |",
        "| after round 2 |",
        "| change |",
        "16 validation questions are few",
        "so whether a model is kept or rolled back may be chance; give 50 or more",
        "| recall | dense@1 | dense@5 | sparse@1 | sparse@5 | hybrid@1 | hybrid@5 |",
        "QA pairs/s",
        "cozyrag ask",
        "generator phase",
    ):
        assert text in screen


def test_the_index_searched_after_a_round_holds_the_vectors_of_the_saved_retriever(one_process):
    folder, _ = one_process
    retriever = Retriever.load(str(folder / "retriever"))
    assert made_by(folder / "index") == retriever.fingerprint()
    index = PassageIndex.load(folder / "index", fingerprint=retriever.fingerprint())
    expected = retriever.encode(index.passages.to_read(), kind="document", batch_size=7)
    assert abs(load_file(folder / "index" / "vectors.safetensors")["vectors"] - expected).max() < 1e-5
    assert abs(index._index.reconstruct_n(0, len(index)) - expected).max() < 1e-5


def test_both_models_moved_in_training(one_process, generator_path, retriever_path):
    folder, _ = one_process
    for path, name in ((generator_path, "generator"), (retriever_path, "retriever")):
        before, after = load_file(path / "model.safetensors"), load_file(folder / name / "model.safetensors")
        assert any((before[key] != after[key]).any() for key in before)


def test_the_small_generator_learns_something(one_process):
    losses = [row["loss"] for row in metrics(one_process[0], "step") if row["phase"] == "generator"]
    assert losses[-1] < 0.7 * losses[0]


def test_two_processes_end_with_equal_weights_on_both_ranks(two_processes):
    rows = metrics(two_processes, "processes")
    assert len(rows) == 7  # before, and three phases in each of two rounds
    assert all(len(row["fingerprints"]) == 2 and row["fingerprints"][0] == row["fingerprints"][1] for row in rows)


@pytest.mark.parametrize("phase", ["generator", "retriever"])
def test_two_processes_take_the_same_steps_as_one(one_process, two_processes, phase):
    alone = [row for row in metrics(one_process[0], "step") if row["phase"] == phase]
    together = [row for row in metrics(two_processes, "step") if row["phase"] == phase]
    assert len(alone) == len(together) >= 8
    for a, b in zip(alone[:20], together[:20], strict=True):
        assert (a["round"], a["step"]) == (b["round"], b["step"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_two_processes_examine_alike(one_process, two_processes):
    for a, b in zip(metrics(one_process[0], "evaluation"), metrics(two_processes, "evaluation"), strict=True):
        assert a["recall@5"] == b["recall@5"] and a["em"] == pytest.approx(
            b["em"], abs=7
        )  # a near tie may turn one of 16 answers


def test_killed_in_each_phase_and_resumed_ends_bit_equal(settings, one_process, tmp_path):
    whole, folder = one_process[0], tmp_path / "out"
    arguments = [*settings, "--output_dir", folder, "--threads", 1, "--save_steps", 2]
    for mark in ("round-001-0-generator-000006", "round-001-1-retriever-000002", "round-002-0-generator-000004"):
        resume = ["--resume"] if folder.exists() else []
        run = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *map(str, arguments), *resume],
            env=os.environ | MACHINE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.time() + 120
        while not (folder / "checkpoints" / mark).exists() and time.time() < until and run.poll() is None:
            time.sleep(0.005)
        assert run.poll() is None, "it ended before it could be killed"
        run.send_signal(signal.SIGKILL)
        run.wait()
    screen = launch([*arguments, "--resume"]).stdout
    assert "Resuming from" in screen
    for name in ("generator", "retriever"):
        assert (whole / name / "model.safetensors").read_bytes() == (folder / name / "model.safetensors").read_bytes()
    assert [row["loss"] for row in metrics(whole, "step")] == [row["loss"] for row in metrics(folder, "step")]


def test_the_index_is_refreshed_within_a_phase_and_says_so(one_process):
    folder, screen = one_process
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["round"], row["step"]) for row in rows if row["kind"] == "refresh"] == [(1, 2), (2, 2)]
    assert "round 1 retriever step 2: index made again" in screen
    assert sorted(path.name for path in (folder / "contexts").iterdir())[:2] == ["round-001", "round-001-step-000002"]


def test_query_side_only_moves_questions_and_leaves_passages_and_index_alone(settings, retriever_path, tmp_path):
    skip = settings.index("--index_refresh")
    train(
        [
            *map(str, settings[:skip] + settings[skip + 4 :]),
            *(
                "--output_dir",
                str(tmp_path / "out"),
                "--freeze_document_encoder",
                "--generator_steps",
                "0",
                "--rounds",
                "1",
            ),
            *("--rollback", "off", "--threads", "1"),
        ]
    )
    base, trained = (
        Retriever.load(str(path), max_tokens=160) for path in (retriever_path, tmp_path / "out" / "retriever")
    )
    texts = ["What colour is the fox 0?", "Fox 0"]
    same = [
        np.allclose(*(each.encode(texts, kind=kind, batch_size=2) for each in (base, trained)), atol=1e-6)
        for kind in ("query", "document")
    ]
    assert same == [False, True]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {row["round"] for row in rows if row.get("part") == "index" and row["seconds"] > 0} == {0}
    pair = CozyRAG.from_pretrained(tmp_path / "out")
    assert pair.answer(texts[0]).passages


def test_resume_refuses_other_settings_and_names_them(settings, one_process):
    with pytest.raises(InputError, match=r"max_grad_norm \(was 1.0, now 5.0\)"):
        train([*map(str, settings), "--output_dir", str(one_process[0]), "--resume", "--max_grad_norm", "5"])


def test_processes_that_would_be_strangers_are_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="cpu_ddp.yaml"):
        train([*map(str, settings), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_accelerate_launch_with_cpu_and_two_processes_is_refused(settings, tmp_path):
    start = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        str(ROOT / "train.py"),
    ]
    done = subprocess.run(
        [*start, *map(str, settings), "--output_dir", str(tmp_path / "out")],
        env=os.environ | MACHINE,
        capture_output=True,
        text=True,
        timeout=tiny.PATIENCE,
    )
    assert done.returncode != 0 and "cpu_ddp.yaml" in done.stderr
    assert not (tmp_path / "out").exists()


BAD = {
    "missing file": (["--questions", "nowhere.tsv", "--passages", "p.jsonl"], "nowhere.tsv"),
    "empty file": (["--questions", "empty.tsv", "--passages", "p.jsonl"], "empty.tsv"),
    "row without a question": (["--questions", "noquestion.tsv", "--passages", "p.jsonl"], "line 2"),
    "wrong column": (["--questions", "column.csv", "--passages", "p.jsonl"], "--columns question="),
    "duplicate id": (["--questions", "twice.jsonl", "--passages", "p.jsonl"], "line 2"),
    "bytes that are not UTF-8 below lines that are": (["--questions", "mixed.tsv", "--passages", "p.jsonl"], "line 2"),
    "unknown setting on the command line": (["--learning_speed", "3"], "learning_speed"),
    "unknown setting in YAML": (["--config", "bad.yaml"], "bad.yaml, line 2"),
    "no such generator": (
        ["--questions", "good.tsv", "--passages", "p.jsonl", "--generator", "no-such/model"],
        "no-such/model",
    ),
    "no such retriever": (
        ["--questions", "good.tsv", "--passages", "p.jsonl", "--generator", "scratch", "--retriever", "no-such/model"],
        "no-such/model",
    ),
    "no passages": (["--questions", "good.tsv"], "--passages"),
    "fp16 without a GPU": (["--mixed_precision", "fp16", "--use_cpu"], "fp16"),
}


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "p.jsonl").write_text('{"id": "1", "title": "A", "text": "Paris is the capital of France."}\n')
    (folder / "good.tsv").write_text(
        "What is the capital of France?\tParis\n" * 1 + "Which country has Paris as its capital?\tFrance\n"
    )
    (folder / "empty.tsv").write_text("")
    (folder / "noquestion.tsv").write_text("What is it?\tParis\n\tParis\n")
    (folder / "column.csv").write_text("q,answer\nWhat is it?,Paris\n")
    (folder / "twice.jsonl").write_text('{"id": "a", "question": "What?", "answers": ["x"]}\n' * 2)
    (folder / "mixed.tsv").write_bytes("Où est-il ?\tParis\n".encode() + "Where is it?\tLi\xe8ge\n".encode("latin-1"))
    (folder / "bad.yaml").write_text("rounds: 1\nlearning_speed: 3\n")
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_sentence_and_nothing_is_written(name, bad_files, tmp_path, monkeypatch):
    arguments, expected = BAD[name]
    monkeypatch.chdir(bad_files)
    with pytest.raises(InputError) as found:
        train([*arguments, "--output_dir", str(tmp_path / "out")])
    assert expected in str(found.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["row without a question", "unknown setting in YAML"])
def test_the_script_prints_that_sentence_and_exits_with_2(name, bad_files, tmp_path):
    arguments, expected = BAD[name]
    done = launch([*arguments, "--output_dir", tmp_path / "out"], cwd=bad_files, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    assert lines[-1].startswith("error: ") and expected in lines[-1]
    assert "Traceback" not in done.stderr


def test_an_output_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    for extra in ([], ["--overwrite_output_dir"]):
        with pytest.raises(InputError, match="precious.txt"):
            train(["--output_dir", str(tmp_path), *extra])
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
