"""Hands on a short run: something that happens at one of its steps, and what it has left. Its settings are a fixture."""

import json
import os

from cozyrag.training import generator_phase, retriever_phase

STEPS = {"generator_step": generator_phase, "retriever_step": retriever_phase}  # where each is looked up


def at_step(monkeypatch, number, act, function="retriever_step"):
    """Do something within the step of that number, counted from 1 in this process."""
    real, calls = getattr(STEPS[function], function), []

    def step(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            act()
        return real(*arguments, **options)

    monkeypatch.setattr(STEPS[function], function, step)


def send(number):
    return lambda: os.kill(os.getpid(), number)


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def rows(folder, kind):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]
