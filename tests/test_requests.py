"""The harness of parallel requests notices wrong statuses, wrong answers, tracebacks, growth, and a dead server."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
import request_run  # noqa: E402

QUESTIONS = ["What colour is the fox?", "Who keeps the tower?"]


@contextmanager
def server_that_says(status, body):
    """The address of a server that replies to each request with the same."""

    class Reply(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Reply) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def requests(*kinds):
    return [request_run.Planned(kind, QUESTIONS[0], str(number)) for number, kind in enumerate(kinds)]


def told(faults):
    return {fault.split(":")[0] for fault in faults}


def test_half_of_a_plan_are_right_requests_and_no_kind_is_missing():
    planned = request_run.plan(200, QUESTIONS, 1)
    kinds = [each.kind for each in planned]
    assert len(planned) == 200 and set(kinds) == set(request_run.KINDS)
    assert sum(kind in request_run.RIGHT for kind in kinds) == 100
    assert request_run.plan(200, QUESTIONS, 1) == planned != request_run.plan(200, QUESTIONS, 2)


def test_a_server_that_lets_everything_in_is_noticed_for_each_kind():
    body = json.dumps({"answer": "red"}).encode()
    asked = requests(*request_run.KINDS)
    with server_that_says(200, body) as address:
        faults = request_run.send_all(address, "key", asked, dict.fromkeys(QUESTIONS, "red"))
    fine = {"question", "gone in mid-stream", "gone before the answer"}
    assert told(faults) == set(request_run.KINDS) - fine and len(faults) == len(request_run.KINDS) - len(fine)


def test_another_answer_than_the_pair_s_and_a_broken_server_are_noticed():
    with server_that_says(200, json.dumps({"answer": "blue"}).encode()) as address:
        [fault] = request_run.send_all(address, "key", requests("question"), {QUESTIONS[0]: "red"})
        assert "expected the answer 'red'" in fault and "'blue'" in fault
    with server_that_says(500, b"") as address:
        kinds = [kind for kind in request_run.KINDS if kind != "gone before the answer"]
        faults = request_run.send_all(address, "key", requests(*kinds), dict.fromkeys(QUESTIONS, "red"))
        assert told(faults) == set(kinds)
    faults = request_run.send_all(address, "key", requests("question", "wrong key"), dict.fromkeys(QUESTIONS, "red"))
    assert len(faults) == 2 and all("ConnectError" in fault for fault in faults)


def test_tracebacks_growth_and_a_dead_server_are_noticed(tmp_path):
    log, lives, dead = tmp_path / "log", SimpleNamespace(poll=lambda: None), SimpleNamespace(poll=lambda: -9)
    log.write_text("Started\n")
    with server_that_says(200, b"{}") as address:
        assert request_run.server_faults(address, lives, log, [100_000_000, 101_000_000]) == []
        [grown] = request_run.server_faults(address, lives, log, [100_000_000, 200_000_000])
        assert "from 100 to 200 MB" in grown
        log.write_text("ERROR\nTraceback (most recent call last):\nKeyError: 'x'\n")
        [traceback] = request_run.server_faults(address, lives, log, [0, 0])
        assert "1 tracebacks" in traceback and "KeyError" in traceback
    log.write_text("")
    assert "/health" in request_run.server_faults(address, lives, log, [0, 0])[0]
    assert "ended with the code -9" in request_run.server_faults(address, dead, log, [0, 0])[0]


@pytest.mark.slow
def test_a_served_pair_replies_to_each_kind_as_it_should(tmp_path):
    assert request_run.run_requests(2 * len(request_run.KINDS), 1, tmp_path) == []
