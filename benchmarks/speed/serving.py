"""How long answers take while several clients ask `cozyrag serve` at once, whether they are the pair's own, and whether
the server's memory stays level.

    python -m benchmarks.speed.serving cozyrag-output --questions cozyrag/assets/quickstart/test.jsonl

The server is a process of its own on a free port of this machine; each client asks its next question when it has its
answer. Left out: the network, and the time that the first question needs more (one is asked before).
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import psutil

from cozyrag.pipeline import CozyRAG
from cozyrag.runtime.json_lines import read_json_lines

PATIENCE = 600  # seconds for one answer


@contextmanager
def server(folder: str, *, errors: int | None = None, environment: Mapping | None = None) -> Iterator[tuple]:
    """The address of `cozyrag serve` for this pair, and its process (a psutil.Popen), which ends with the context.

    `errors` is where its standard error goes, and `environment` its variables, both as for Popen.
    """
    command = [sys.executable, "-m", "cozyrag.cli", "serve", folder, "--port", "0"]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True)
    try:
        found = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stdout)))
        yield found[0], process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


def asked(address: str, question: str) -> tuple[str, float]:
    """(answer, seconds) of one question."""
    request = Request(
        f"{address}/ask", json.dumps({"question": question}).encode(), {"Content-Type": "application/json"}
    )
    started = time.perf_counter()
    with urlopen(request, timeout=PATIENCE) as reply:
        return json.load(reply)["answer"], time.perf_counter() - started


def measure(folder: str, questions: list[str], clients: int) -> dict:
    """Answers, times and memory of one run."""
    with server(folder) as (address, process):
        asked(address, questions[0])
        sizes, started = [process.memory_info().rss], time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            found = []
            for one in pool.map(lambda question: asked(address, question), questions):
                found.append(one)
                sizes.append(process.memory_info().rss)
        wall = time.perf_counter() - started
    seconds = np.array([each for _, each in found])
    half = len(sizes) // 2
    return {
        "answers": [answer for answer, _ in found],
        "questions": len(questions),
        "clients": clients,
        "p50 (s)": round(float(np.percentile(seconds, 50)), 2),
        "p95 (s)": round(float(np.percentile(seconds, 95)), 2),
        "questions/s": round(len(questions) / wall, 2),
        "memory, middle (MB)": round(sizes[half] / 1e6),
        "memory, end (MB)": round(sizes[-1] / 1e6),
    }


def main() -> None:
    """Print one line of a table for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", help="output folder of a run")
    parser.add_argument("--questions", required=True, type=Path, help=".jsonl with a column question")
    parser.add_argument("--limit", type=int, default=200, help="questions to ask")
    parser.add_argument("--clients", type=int, nargs="+", default=[8], help="clients at once; several: one run each")
    options = parser.parse_args()
    questions = [row["question"] for row in read_json_lines(options.questions)[: options.limit]]
    results = [measure(options.pair, questions, clients) for clients in options.clients]
    expected = [answer.text for answer in CozyRAG.from_pretrained(options.pair).answers(questions)]
    for result in results:
        same = sum(a == b for a, b in zip(result.pop("answers"), expected, strict=True))
        result["equal to pair.answers"] = f"{same} of {len(questions)}"
    names = list(results[0])
    print("| " + " | ".join(names) + " |\n|" + "---:|" * len(names))
    for result in results:
        print("| " + " | ".join(str(result[name]) for name in names) + " |")


if __name__ == "__main__":
    main()
