"""The harness of attacks: what a command took is its own, and what was not tried is no success."""

from collections import Counter

import attack_run
from spawned import measured

IDLE, SECOND = "pass", "import time\nwhile time.process_time() < 0.5: pass"


def test_memory_is_that_of_the_command_and_not_of_the_process_that_asked(tmp_path):
    held = b"x" * 400_000_000
    idle = measured(["-c", IDLE], tmp_path / "log", waited=60)
    large = measured(["-c", "held = b'x' * 100_000_000"], tmp_path / "log", waited=60)
    assert len(held) > 5 * idle.bytes
    assert abs(large.bytes - idle.bytes - 100e6) < 10e6


def test_seconds_are_those_of_the_processor(tmp_path):
    assert 0.5 <= measured(["-c", SECOND], tmp_path / "log", waited=60).seconds < 5


def test_exit_code_output_and_a_command_that_does_not_end(tmp_path):
    log = tmp_path / "log"
    assert measured(["-c", "import sys; print('told'); sys.exit('why')"], log, waited=60).code == 1
    assert log.read_text() in ("told\nwhy\n", "why\ntold\n")
    assert measured(["-c", "import time; time.sleep(600)"], log, waited=0.5).code == -9


def test_what_was_not_tried_or_only_told_is_counted_apart():
    table = Counter({("full", "index", attack_run.verdict_of(end)): 3 for end in ("", None)})
    assert attack_run.counted(table, "full", "index").startswith("3 of 3 ended as undisturbed, 3 more not tried")
    table["full", "index", attack_run.verdict_of("exit code 1")] += 1
    assert attack_run.counted(table, "full", "index").startswith("3 of 4 ")
    told = Counter({("cuts", "train", attack_run.verdict_of(end)): 2 for end in ("", attack_run.TOLD)})
    assert attack_run.counted(told, "cuts", "train") == "2 of 4 ended as undisturbed, 2 told what to delete"


def test_of_each_kind_of_document_the_slowest_and_the_largest_are_named():
    costs = [attack_run.Cost("a.md", 1.25, 2e6), attack_run.Cost("b.md", 0.5, 30e6), attack_run.Cost("c.csv", -0.1, -1)]
    assert attack_run.cost_table(costs).split("\n")[2:] == [
        "| csv | 1 | 0.0 | c.csv | 0 | c.csv |",
        "| md | 2 | 1.2 | a.md | 30 | b.md |",
    ]
