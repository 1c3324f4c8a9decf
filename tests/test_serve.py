"""cozyrag serve: its answers are the pair's, over HTTP, OpenAI's client and MCP; what it refuses; how it ends."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import tiny

from benchmarks.speed.serving import server
from cozyrag import cli
from cozyrag.errors import InputError
from cozyrag.pipeline import Answer, CozyRAG, Source
from cozyrag.serving.question_queue import QuestionQueue, QueueFull

ROOT = Path(__file__).parents[1]
MACHINE = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ASKED = [row["question"] for row in tiny.corpus()[1][:16]]
KEY = "a key"


class FakePair:
    """Answers each question with itself, and notes the calls; "refuse" is an InputError. `hold` delays its calls."""

    index = ("p0", "p1")

    def __init__(self):
        self.calls, self.hold = [], threading.Event()
        self.hold.set()

    def answers(self, questions, *, top_k=None):
        self.hold.wait(tiny.PATIENCE)
        self.calls.append((list(questions), top_k))
        if "refuse" in questions:
            raise InputError("refused")
        if "break" in questions:
            raise RuntimeError("broken")
        return [Answer("" if q == "silent" else f"to {q}", 0.5, "c", self.retrieve([q], 1)[0]) for q in questions]

    def retrieve(self, questions, top_k=None):
        source = Source("p0", "Fox", "It is red. Yes.", 0.9, ((0, 10),), {"url": "https://x.org"})
        return [(source,) * (top_k or 1) for _ in questions]


def served_app(pair, **options):
    pytest.importorskip("fastapi")
    from cozyrag.serving.http_api import build_app

    return build_app(pair, name="my-rag", **{"key": None} | options)


def call(app, method, path, *, base="http://localhost", **request):
    """One request, in this process."""

    async def ask():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, path, **request)

    return asyncio.run(ask())


# ---- the queue


def test_questions_that_wait_are_answered_together_and_each_gets_its_own():
    pair = FakePair()

    async def all_of_them():
        queue = QuestionQueue(pair, together=3)
        return await asyncio.gather(*(queue.answer(f"q{n}", n % 2 + 1) for n in range(10)))

    assert [each.text for each in asyncio.run(all_of_them())] == [f"to q{n}" for n in range(10)]
    assert pair.calls == [
        (["q0", "q2", "q4"], 1), (["q1", "q3", "q5"], 2), (["q6", "q8"], 1), (["q7", "q9"], 2),
    ]  # fmt: skip


def test_a_refused_question_does_not_refuse_those_beside_it():
    async def all_of_them():
        queue = QuestionQueue(FakePair())
        return await asyncio.gather(*map(queue.answer, ("a", "refuse", "b")), return_exceptions=True)

    a, refused, b = asyncio.run(all_of_them())
    assert (a.text, b.text) == ("to a", "to b") and isinstance(refused, InputError)


def test_a_fault_reaches_its_clients_and_the_queue_goes_on():
    async def all_of_them():
        queue = QuestionQueue(FakePair())
        return [await asyncio.gather(queue.answer(q), return_exceptions=True) for q in ("break", "a")]

    [broken], [a] = asyncio.run(all_of_them())
    assert isinstance(broken, RuntimeError) and a.text == "to a"


def test_the_queue_is_bounded_and_who_has_gone_is_not_answered():
    pair = FakePair()
    pair.hold.clear()

    async def crowd():
        queue = QuestionQueue(pair, waiting=3, together=1)
        tasks = [asyncio.create_task(queue.answer(f"q{n}")) for n in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        pair.hold.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, gone, third, full = asyncio.run(crowd())
    assert (first.text, third.text) == ("to q0", "to q2") and isinstance(full, QueueFull)
    assert isinstance(gone, asyncio.CancelledError) and [asked for asked, _ in pair.calls] == [["q0"], ["q2"]]


# ---- HTTP


def test_an_answer_has_its_sources_spans_and_metadata():
    app = served_app(FakePair())
    found = call(app, "POST", "/ask", json={"question": "what?", "top_k": 2}).json()
    source = {
        "id": "p0", "title": "Fox", "text": "It is red. Yes.", "score": 0.9, "spans": [[0, 10]], "read": ["It is red."],
        "metadata": {"url": "https://x.org"},
    }  # fmt: skip
    assert found == {"answer": "to what?", "score": 0.5, "context": "c", "sources": [source]}
    assert call(app, "POST", "/search", json={"question": "what?", "top_k": 2}).json() == {"passages": [source] * 2}
    assert call(app, "GET", "/health").json() == {"status": "ok", "model": "my-rag", "passages": 2}


@pytest.mark.parametrize(
    ("path", "request_", "status"),
    [
        ("/ask", {"content": b"{"}, 422),
        ("/ask", {"content": b"\xff\xfe"}, 422),
        ("/ask", {"json": {}}, 422),
        ("/ask", {"json": []}, 422),
        ("/ask", {"json": {"question": ""}}, 422),
        ("/ask", {"json": {"question": 7}}, 422),
        ("/ask", {"json": {"question": "refuse"}}, 422),
        ("/ask", {"json": {"question": "x" * 4_001}}, 422),
        ("/ask", {"json": {"question": "x", "top_k": 0}}, 422),
        ("/ask", {"json": {"question": "x", "top_k": 101}}, 422),
        ("/ask", {"content": b'{"question": "' + b"x" * 1_000_000 + b'"}'}, 413),
        ("/ask", {"json": {"question": "break"}}, 500),
        ("/search", {"json": {"question": "x" * 4_001}}, 422),
        ("/v1/chat/completions", {"json": {"messages": []}}, 422),
        ("/v1/chat/completions", {"json": {"messages": [{"role": "system", "content": "x"}]}}, 422),
        ("/v1/chat/completions", {"json": {"messages": [{"role": "user", "content": "x" * 4_001}]}}, 413),
        ("/v1/chat/completions", {"json": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}}, 422),
        ("/v1/completions", {"json": {}}, 404),
        ("/docs", {}, 404),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_answered_gets_a_status(path, request_, status):
    reply = call(served_app(FakePair()), "POST", path, headers={"Content-Type": "application/json"}, **request_)
    assert reply.status_code == status
    assert status == 500 or reply.json()["error"]["message"]


@pytest.mark.parametrize("given", [None, "Bearer other", "Bearer ", "Basic a key", "Bearer ä", "a"])
def test_a_wrong_key_is_refused(given):
    app, headers = served_app(FakePair(), key=KEY), {} if given is None else {"Authorization": given.encode("latin-1")}
    for method, path in (
        ("POST", "/ask"),
        ("POST", "/search"),
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
    ):
        assert call(app, method, path, json={"question": "x"}, headers=headers).status_code == 401
    assert call(app, "GET", "/health", headers=headers).status_code == 200
    right = {"Authorization": f"Bearer {KEY}"}
    assert call(app, "POST", "/ask", json={"question": "x"}, headers=right).json()["answer"] == "to x"


@pytest.mark.parametrize(
    ("base", "origin", "status"),
    [
        ("http://localhost", None, 200),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000", 200),
        ("http://[::1]:8000", None, 200),
        ("http://10.0.0.7:8000", None, 200),
        ("http://rag.example.org", "https://rag.example.org", 200),
        ("http://evil.example.org", None, 403),
        ("http://localhost.evil.org", None, 403),
        ("http://localhost", "http://evil.example.org", 403),
        ("http://localhost:8000", "http://localhost:3000", 403),
        ("http://localhost", "null", 403),
    ],
)
def test_only_known_hosts_and_the_own_origin_are_answered(base, origin, status):
    app = served_app(FakePair(), hosts=["rag.example.org"])
    reply = call(app, "GET", "/health", base=base, headers={"Origin": origin} if origin else {})
    assert reply.status_code == status and "access-control-allow-origin" not in reply.headers


def test_a_crowd_beyond_the_queue_is_told_to_come_back():
    pair = FakePair()
    pair.hold.clear()
    app = served_app(pair, waiting=2)

    async def crowd():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
            tasks = [asyncio.create_task(client.post("/ask", json={"question": f"q{n}"})) for n in range(5)]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            pair.hold.set()
            return next(iter(done)).result(), [(await task).status_code for task in tasks]

    refused, codes = asyncio.run(crowd())
    assert (
        refused.status_code == 503 and refused.headers["Retry-After"] == "1" and sorted(codes) == [200] * 2 + [503] * 3
    )


# ---- a real pair, as the command serves it


@pytest.fixture(scope="module")
def served(pair_folder):
    """(address, process) of the tiny pair, served by the command with a key."""
    pytest.importorskip("fastapi")
    environment = MACHINE | {"COZYRAG_API_KEY": KEY}
    with server(str(pair_folder), errors=subprocess.STDOUT, environment=environment) as running:
        yield running


def test_openai_clients_get_the_answers_of_the_pair(served, pair_folder):
    openai = pytest.importorskip("openai")
    expected = CozyRAG.from_pretrained(pair_folder).answers(ASKED)
    client = openai.OpenAI(base_url=f"{served[0]}/v1", api_key=KEY, max_retries=0)
    [model] = client.models.list().data
    assert model.id == "my-rag"

    def answer(question, stream):
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
        found = client.chat.completions.create(model=model.id, messages=chat, stream=stream, temperature=0.7)
        if not stream:
            return found.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in found)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(answer, ASKED, [number % 2 == 0 for number in range(len(ASKED))]))
    assert found == [each.text or "(no answer in these passages)" for each in expected]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served[0]}/v1", api_key="wrong", max_retries=0).models.list()


def test_plain_answers_and_searches_are_those_of_the_pair(served, pair_folder):
    pair, headers = CozyRAG.from_pretrained(pair_folder), {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=served[0], headers=headers, timeout=tiny.PATIENCE) as client:
        for question, k in ((ASKED[0], None), (ASKED[1], 2)):
            found, answer = (
                client.post("/ask", json={"question": question, "top_k": k}).json(),
                pair.answer(question, top_k=k),
            )
            assert (found["answer"], found["context"]) == (answer.text, answer.context)
            assert [each["read"] for each in found["sources"]] == [list(each.read) for each in answer.passages]
            passages = client.post("/search", json={"question": question, "top_k": k}).json()["passages"]
            assert [each["id"] for each in passages] == [each.id for each in pair.retrieve(question, k)]


def test_what_is_malformed_is_refused_on_each_path(served):
    request_run = pytest.importorskip("request_run")
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with httpx.Client(base_url=served[0], headers=headers, timeout=tiny.PATIENCE) as client:
        for path in request_run.PATHS:
            for content in request_run.MALFORMED:
                reply = client.post(path, content=content)
                assert reply.status_code in (400, 422) and reply.json()["error"]["message"], (path, content[:80])


def test_a_client_that_goes_in_mid_stream_harms_nobody(served):
    chat = {"messages": [{"role": "user", "content": ASKED[0]}], "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    for _ in range(3):
        with httpx.stream(
            "POST", f"{served[0]}/v1/chat/completions", json=chat, headers=headers, timeout=tiny.PATIENCE
        ) as reply:
            next(reply.iter_lines())
    body = json.dumps({"question": ASKED[0]})
    head = f"POST /ask HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", int(served[0].split(":")[-1]))) as gone:  # asks, and reads nothing
        gone.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
    assert httpx.get(f"{served[0]}/health", timeout=tiny.PATIENCE).json()["status"] == "ok"


@pytest.mark.parametrize("number", [signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_it_as_it_ends_other_commands(served, number):
    served[1].send_signal(number)
    rest = served[1].stdout.read()
    assert served[1].wait(tiny.PATIENCE) == 128 + number and "Traceback" not in rest and "ERROR" not in rest


def test_agents_find_two_tools_over_mcp(pair_folder):
    pytest.importorskip("mcp")
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client

    arguments = ["-m", "cozyrag.cli", "serve", str(pair_folder), "--mcp"]
    server = StdioServerParameters(command=sys.executable, args=arguments, env=MACHINE)

    async def talk():
        async with stdio_client(server) as streams, ClientSession(*streams) as session:
            await session.initialize()
            tools = [tool.name for tool in (await session.list_tools()).tools]
            calls = (
                ("ask", {"question": ASKED[0]}),
                ("search", {"question": ASKED[0], "top_k": 2}),
                ("ask", {"question": ""}),
            )
            return tools, [await session.call_tool(*call) for call in calls]

    tools, (answer, passages, refused) = asyncio.run(talk())
    pair = CozyRAG.from_pretrained(pair_folder)
    assert tools == ["ask", "search"] and refused.is_error
    assert json.loads(answer.content[0].text)["answer"] == pair.answer(ASKED[0]).text
    found = json.loads(passages.content[0].text)["passages"]
    assert [each["id"] for each in found] == [each.id for each in pair.retrieve(ASKED[0], 2)]


# ---- the command


@pytest.mark.parametrize("more", [[], ["--mcp"]], ids=["http", "mcp"])
def test_without_the_extra_one_sentence_names_it(monkeypatch, more):
    for name in ("uvicorn", "fastapi", "mcp.server.mcpserver"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("http_api", "mcp_tools"):
        monkeypatch.delitem(sys.modules, f"cozyrag.serving.{name}", raising=False)
    with pytest.raises(InputError, match=r'pip install "cozyrag\[serve\]"'):
        cli.run("serve", ["my-rag", *more])


def test_beyond_this_machine_a_key_is_required(monkeypatch):
    pytest.importorskip("fastapi")
    monkeypatch.delenv("COZYRAG_API_KEY", raising=False)
    with pytest.raises(InputError, match="expected a key in COZYRAG_API_KEY"):
        cli.run("serve", ["my-rag", "--host", "0.0.0.0"])


@pytest.mark.parametrize("place", [["--port", "99999"], ["--host", "192.0.2.1"], ["--host", "no such host"]])
def test_an_address_that_cannot_be_had_is_an_input_error(monkeypatch, place):
    pytest.importorskip("fastapi")
    monkeypatch.setenv("COZYRAG_API_KEY", KEY)
    monkeypatch.setattr(CozyRAG, "from_pretrained", lambda name: FakePair())
    with pytest.raises(InputError, match="expected an address of this machine"):
        cli.run("serve", ["my-rag", *place])
