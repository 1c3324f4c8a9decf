"""Tools for short runs, whose settings are a fixture: act at one of the steps, read the output."""

import json
import os

from cozyrag.training import generator_phase, reranker_phase, retriever_phase

STEPS = {
    "generator_step": generator_phase,
    "retriever_step": retriever_phase,
    "reranker_step": reranker_phase,
}  # the modules that call them


def at_step(monkeypatch, number, event, function="retriever_step"):
    """Call `event` in the step of this number, counted from 1 in this process."""
    real, calls = getattr(STEPS[function], function), []

    def step(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            event()
        return real(*arguments, **options)

    monkeypatch.setattr(STEPS[function], function, step)


def send(number):
    return lambda: os.kill(os.getpid(), number)


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def rows(folder, kind):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]
