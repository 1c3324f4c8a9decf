"""Requests of several clients at once to `cozyrag serve`: right ones, wrong ones, and clients that go.

Each gets its status, each answer is the pair's own, the server's log holds no traceback, its memory stays level, and
it lives at the end. `attack_run.py --requests` runs it on a pair of its own. Left out: speed (benchmarks/speed).
"""

import json
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import damage_run
import httpx
import psutil
import tiny

from benchmarks.speed.serving import server
from cozyrag.pipeline import CozyRAG
from cozyrag.serving.http_api import BODY, LONGEST, SILENT

CLIENTS = 8
GROWTH = 50e6  # bytes that the server may take in the second half of the requests
KEY = "a key"
ROOT = Path(__file__).parents[1]
PATHS = ("/ask", "/search", "/v1/chat/completions")
MALFORMED = (
    b"{", b"", b"\xff\xfe", b"[]", b"null", b'{"question": 7}', b'{"question": "x", "top_k": 1e999}',
    b"[" * 100_000, b'{"question": "x", "top_k": %s}' % (b"9" * 5_000), b'{"question": "\\ud800"}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
)  # fmt: skip


@dataclass(frozen=True)
class Asker:
    """A client of the server, with a question for each of its requests."""

    client: httpx.Client
    key: str

    def post(self, path: str, *, key: str | None = None, headers: dict | None = None, **request) -> httpx.Response:
        """One request; its key is the right one unless another is given."""
        held = {"Authorization": f"Bearer {self.key if key is None else key}", "Content-Type": "application/json"}
        return self.client.post(path, headers=held | (headers or {}), **request)


def _plain(asker: Asker, question: str, chance: random.Random) -> tuple[int, str | None]:
    reply = asker.post("/ask", json={"question": question})
    return reply.status_code, reply.json()["answer"] if reply.is_success else None


def _chat(question: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}]} | more


def _chatted(asker: Asker, question: str, chance: random.Random) -> tuple[int, str | None]:
    reply = asker.post("/v1/chat/completions", json=_chat(question))
    return reply.status_code, reply.json()["choices"][0]["message"]["content"] if reply.is_success else None


def _streamed(asker: Asker, question: str, chance: random.Random) -> tuple[int, str | None]:
    reply = asker.post("/v1/chat/completions", json=_chat(question, stream=True))
    if not reply.is_success:
        return reply.status_code, None
    events = [line.removeprefix("data: ") for line in reply.text.split("\n") if line.startswith("data: {")]
    deltas = (json.loads(event)["choices"][0]["delta"] for event in events)
    return reply.status_code, "".join(delta.get("content", "") for delta in deltas)


def _gone_in_stream(asker: Asker, question: str, chance: random.Random) -> tuple[int, None]:
    headers = {"Authorization": f"Bearer {asker.key}"}
    with asker.client.stream(
        "POST", "/v1/chat/completions", json=_chat(question, stream=True), headers=headers
    ) as reply:
        next(reply.iter_lines(), None)
    return reply.status_code, None


def _gone_before_answer(asker: Asker, question: str, chance: random.Random) -> tuple[int, None]:
    """Sends a request, or a part of it, and reads nothing."""
    place, body = asker.client.base_url, json.dumps({"question": question})
    head = f"POST /ask HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {asker.key}\r\n"
    sent = f"{head}Content-Length: {len(body)}\r\nContent-Type: application/json\r\n\r\n{body}".encode()
    with socket.create_connection((place.host, place.port), tiny.PATIENCE) as gone:
        gone.sendall(sent if chance.random() < 0.5 else sent[: chance.randrange(1, len(sent))])
    return 0, None


def _refused(path: str, **more) -> Callable:
    """A request with a right question, changed by `more`."""
    return lambda asker, question, chance: (
        asker.post(path, **({"json": {"question": question}} | more)).status_code,
        None,
    )


def _malformed(asker: Asker, question: str, chance: random.Random) -> tuple[int, None]:
    return asker.post(chance.choice(PATHS), content=chance.choice(MALFORMED)).status_code, None


KINDS: dict[str, tuple[tuple[int, ...], Callable]] = {  # the statuses that are right, and the request
    "question": ((200,), _plain),
    "chat": ((200,), _chatted),
    "chat as a stream": ((200,), _streamed),
    "wrong key": ((401,), _refused("/ask", key="other")),
    "too long question": ((422,), _refused("/ask", json={"question": "x" * (LONGEST + 1)})),
    "too long chat": ((413,), _refused("/v1/chat/completions", json=_chat("x" * (LONGEST + 1)))),
    "too large request": ((413,), _refused("/ask", json={"question": "x" * (BODY + 1)})),
    "malformed JSON": ((400, 422), _malformed),
    "gone in mid-stream": ((200,), _gone_in_stream),
    "gone before the answer": ((0,), _gone_before_answer),
    "unknown route": ((404,), _refused("/v1/embeddings")),
    "foreign Host": ((403,), _refused("/ask", headers={"Host": "evil.example.org"})),
    "foreign Origin": ((403,), _refused("/ask", headers={"Origin": "http://evil.example.org"})),
}
RIGHT = ("question", "chat", "chat as a stream")


@dataclass(frozen=True)
class Planned:
    """A request to be sent: its kind, its question, and the seed of what it draws."""

    kind: str
    question: str
    seed: str


def plan(count: int, questions: Sequence[str], seed: int) -> list[Planned]:
    """So many requests: half of them right ones, the others of all other kinds in turn, in a drawn order."""
    chance, others = random.Random(f"{seed} requests"), [kind for kind in KINDS if kind not in RIGHT]
    kinds = [RIGHT[at // 2 % len(RIGHT)] if at % 2 == 0 else others[at // 2 % len(others)] for at in range(count)]
    chance.shuffle(kinds)
    return [Planned(kind, chance.choice(questions), f"{seed} {at}") for at, kind in enumerate(kinds)]


def fault_of(planned: Planned, asker: Asker, expected: dict[str, str]) -> str:
    """Send one request; what is wrong with its reply, or nothing."""
    right, send = KINDS[planned.kind]
    try:
        status, answer = send(asker, planned.question, random.Random(planned.seed))
    except (httpx.HTTPError, OSError, ValueError, LookupError) as error:
        return f"{planned.kind}: {error!r:.200}"
    if status not in right:
        return f"{planned.kind}: expected the status {' or '.join(map(str, right))}, found {status}"
    wanted = expected[planned.question] or ("" if planned.kind == "question" else SILENT)
    if planned.kind in RIGHT and answer != wanted:
        return f"{planned.kind}: expected the answer {wanted!r:.60} to {planned.question!r:.60}, found {answer!r:.60}"
    return ""


def send_all(address: str, key: str, requests: Sequence[Planned], expected: dict[str, str]) -> list[str]:
    """Send these requests from several clients at once; returns the faults."""

    def client(own: Sequence[Planned]) -> list[str]:
        with httpx.Client(base_url=address, timeout=tiny.PATIENCE) as held:
            return [fault_of(each, Asker(held, key), expected) for each in own]

    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(client, [requests[number::CLIENTS] for number in range(CLIENTS)]))
    return [fault for faults in found for fault in faults if fault]


def server_faults(address: str, process: psutil.Popen, log: Path, sizes: Sequence[int]) -> list[str]:
    """What is wrong with the server after all requests. `sizes`: its memory in the middle, and at the end."""
    faults, told = [], log.read_text("utf-8", "replace")
    if process.poll() is not None:
        faults.append(f"the server has ended with the code {process.poll()}")
    else:
        try:
            status = httpx.get(f"{address}/health", timeout=tiny.PATIENCE).status_code
        except httpx.HTTPError as error:
            status = repr(error)
        if status != 200:
            faults.append(f"/health: expected the status 200, found {status}")
    if count := told.count("Traceback (most recent call last)"):
        faults.append(f"the log has {count} tracebacks; the last line: {told.strip().rpartition(chr(10))[2][:200]}")
    if sizes[-1] - sizes[0] > GROWTH:
        faults.append(f"the memory grew from {sizes[0] / 1e6:.0f} to {sizes[-1] / 1e6:.0f} MB in the second half")
    return faults


def run_requests(count: int, seed: int, root: Path, info: Callable = print) -> list[str]:
    """Serve a tiny pair, and send so many requests; returns the faults."""
    pair, log = damage_run.make_pair(root), root / "server.log"
    questions = [row["question"] for row in tiny.corpus()[1]]
    found = CozyRAG.from_pretrained(pair).answers(questions)
    expected = {question: answer.text for question, answer in zip(questions, found, strict=True)}
    requests, clock = plan(count, questions, seed), time.monotonic()
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COZYRAG_API_KEY": KEY}
    with log.open("w") as file, server(str(pair), errors=file.fileno(), environment=variables) as (address, process):
        faults, sizes = [], []
        for half in (requests[: count // 2], requests[count // 2 :]):
            faults += send_all(address, KEY, half, expected)
            sizes.append(process.memory_info().rss if process.poll() is None else 0)
        faults += server_faults(address, process, log, sizes)
    for fault in faults:
        info(fault)
    kinds = Counter(each.kind for each in requests)
    info(
        f"requests: {count - len(faults)} of {count} replies as they should be, {CLIENTS} clients, "
        f"{time.monotonic() - clock:.0f} s; memory {sizes[0] / 1e6:.0f} MB in the middle and {sizes[-1] / 1e6:.0f} MB "
        f"at the end; {', '.join(f'{kind} {kinds[kind]}' for kind in KINDS)}"
    )
    return faults
