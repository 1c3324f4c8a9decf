"""What the doctor says of a machine: each finding from facts that are put in, the looking itself against this one."""

import configparser
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cozyrag import cli
from cozyrag.errors import InputError
from cozyrag.preflight import environment
from cozyrag.preflight.environment import EXTRAS, Machine, ask_hub, free_memory, judge, openmp_runtimes
from cozyrag.runtime.precision import Precision

FIT = Machine(
    system="Linux",
    python=(3, 11, 7),
    torch="2.13.0+cpu",
    torch_cuda=False,
    nvidia=False,
    openmp=("libgomp-a.so.1", "libgomp-b.so.1"),
    duplicates_allowed=False,
    cores=4,
    threads_asked="4",
    memory=8e9,
    disk=90e9,
    missing=(),
    hub="",
    losses=(5.6, 2.9),
    faiss_agrees=True,
    rates=(197.2, 846.4),
    precision=Precision("bf16", "so fast", 197.2, 846.4),
)


def test_nothing_is_said_against_a_machine_that_is_fit():
    assert [finding for finding in judge(FIT) if finding.remedy or finding.stops] == []


@pytest.mark.parametrize(
    ("facts", "what", "remedy", "stops"),
    [
        ({"python": (3, 10, 12)}, "Python", "Python 3.11 or later", True),
        ({"nvidia": True}, "torch", "CUDA build", False),
        ({"system": "Darwin", "openmp": ()}, "OpenMP", "KMP_DUPLICATE_LIB_OK=TRUE", True),
        ({"openmp": ("libgomp-a.so.1", "libiomp5.so")}, "OpenMP", "both from PyPI", False),
        ({"threads_asked": "8"}, "threads", "at most 4", False),
        ({"threads_asked": "many"}, "threads", "Unset OMP_NUM_THREADS", False),
        ({"memory": 3e9}, "memory", "cozyrag plan", False),
        ({"disk": 1e9}, "disk", "HF_HOME", False),
        ({"missing": ("demo", "pdf")}, "extras", 'pip install "cozyrag[demo,pdf]"', False),
        ({"hub": "HF_HUB_OFFLINE is set"}, "Hugging Face Hub", "--retriever embedded", False),
        ({"faiss_agrees": False}, "FAISS", "--force-reinstall", True),
        ({"losses": (5.6, 5.5)}, "training", "reinstall torch", True),
        ({"losses": (5.6, float("nan"))}, "training", "reinstall torch", True),
    ],
)
def test_each_fact_that_is_amiss_has_one_finding_with_its_remedy(facts, what, remedy, stops):
    said = [finding for finding in judge(replace(FIT, **facts)) if finding.remedy]
    assert [(finding.what, finding.stops) for finding in said] == [(what, stops)]
    assert remedy in said[0].remedy and str(said[0]).startswith("FAULT" if stops else "note")


@pytest.mark.parametrize(
    ("rates", "precision", "told"),
    [
        (
            (197.2, 846.4),
            Precision("bf16", "so fast", 197.2, 846.4),
            "float32 197, bf16 846 GFLOP/s; training takes bf16",
        ),
        (
            (43.8, 0.99),
            Precision("no", "this processor has no native bf16"),
            "float32 44, bf16 1.0 GFLOP/s; training takes float32, this processor has no native bf16",
        ),
    ],
)
def test_the_rates_of_both_precisions_are_told_and_which_one_training_takes(rates, precision, told):
    (finding,) = [f for f in judge(replace(FIT, rates=rates, precision=precision)) if f.what == "arithmetic"]
    assert str(finding) == f"ok     arithmetic: {told}"


def test_a_mac_that_allows_two_runtimes_is_fit():
    assert not [finding for finding in judge(replace(FIT, system="Darwin", duplicates_allowed=True)) if finding.stops]


def test_the_runtimes_in_memory_are_counted_by_file(tmp_path):
    maps = "7f00-7f01 r-xp 0 08:01 5   /a/torch.libs/libgomp-98b21ff3.so.1.0.0\n" * 2
    (tmp_path / "maps").write_text(maps + "7f02-7f03 r-xp 0 08:01 6   /opt/libiomp5.so\n7f04-7f05 rw-p 0 0 0 [heap]\n")
    assert openmp_runtimes(tmp_path / "maps") == ("libgomp-98b21ff3.so.1.0.0", "libiomp5.so")
    assert openmp_runtimes(tmp_path / "none") == ()


def test_the_memory_of_a_container_counts(tmp_path):
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_memory(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 1e6


def test_extras_are_those_of_the_setup_file():
    setup = configparser.ConfigParser()
    setup.read(Path(environment.__file__).parents[2] / "setup.cfg")
    assert set(EXTRAS) == set(setup["options.extras_require"]) - {"test", "docs", "all", "trackers"}


class _Answering(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(404)
        self.end_headers()

    def log_message(self, *words):
        pass


def test_any_answer_of_the_hub_will_do_and_none_is_told(monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()  # its hooks remember whether the network was allowed
    server = HTTPServer(("127.0.0.1", 0), _Answering)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert ask_hub(endpoint) == ""
    server.shutdown()
    server.server_close()
    assert ask_hub(endpoint) == f"{endpoint} does not answer (ConnectError)"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert ask_hub(endpoint) == "HF_HUB_OFFLINE is set"
    close_session()


@pytest.mark.parametrize("arguments", [[], ["--machine"]])
def test_the_command_looks_at_this_machine_and_learns(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cozyrag", "doctor", *arguments])
    cli.main()
    said = capsys.readouterr().out
    assert "ok     training: the loss of a tiny model goes from" in said and "ok     FAISS: finds" in said
    assert "ok     arithmetic: float32 " in said
    assert "HF_HUB_OFFLINE is set" in said and "This machine can train" in said


def test_a_fault_ends_with_its_remedy(monkeypatch):
    monkeypatch.setattr(environment, "inspect_machine", lambda folder, endpoint: replace(FIT, faiss_agrees=False))
    with pytest.raises(InputError, match="FAISS: does not find the nearest vectors. Reinstall"):
        list(environment.check_machine())


def test_the_machine_is_examined_alone(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cozyrag", "doctor", "--machine", "my-rag"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "found 'my-rag'" in capsys.readouterr().err
