"""The HTTP interface of a pair: what OpenAI's clients speak, and plain answers and searches with their sources.

    GET  /health               {"status": "ok", ...}, without a key
    GET  /v1/models            the pair as a model
    POST /v1/chat/completions  the last message of the user is the question; also as a stream
    POST /ask, /search         {"question": ..., "top_k": ...}

Needs `pip install "cozyrag[serve]"`, so only `cozyrag serve` imports this module. Left out: the queue
(question_queue.py), foreign pages (known_hosts.py), tools for agents (mcp_tools.py).
"""

import hmac
import json
import time
import uuid
from collections.abc import Collection, Iterator
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteException

from cozyrag.errors import InputError
from cozyrag.pipeline import Answer, CozyRAG, Source
from cozyrag.serving.known_hosts import KnownHosts
from cozyrag.serving.question_queue import QuestionQueue, QueueFull

LONGEST = 4_000  # characters of a question; the generator reads fewer
MOST_PASSAGES = 100
BODY = 1_000_000  # bytes of a request: a long chat before the last question
SILENT = "(no answer in these passages)"  # what a chat shows when the pair abstains
ERRORS = {401: "authentication_error", 413: "too_large", 422: "invalid_request_error", 503: "overloaded"}


class Asked(BaseModel):
    """A question, and how many passages to find for it."""

    question: str = Field(min_length=1, max_length=LONGEST)
    top_k: int | None = Field(None, ge=1, le=MOST_PASSAGES)


class Message(BaseModel):
    """A message of a chat; its content is a text, or parts of which those of type text are read."""

    role: str
    content: str | list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """The text of all parts."""
        if isinstance(self.content, list):
            return " ".join(str(part["text"]) for part in self.content if part.get("type") == "text" and "text" in part)
        return self.content or ""


class Chat(BaseModel):
    """What is read of a request of OpenAI's clients. Answers are greedy, so temperature and the like have no effect."""

    messages: list[Message] = Field(min_length=1, max_length=1_000)
    stream: bool = False
    top_k: int | None = Field(None, ge=1, le=MOST_PASSAGES)

    def question(self) -> str:
        """The last message of the user. Raises HTTPException if there is none, or a bad one."""
        text = next((each.text for each in reversed(self.messages) if each.role == "user"), "").strip()
        if not text:
            raise HTTPException(422, "Expected a message of the user with a text, found none.")
        if len(text) > LONGEST:
            raise HTTPException(413, f"Expected a question of at most {LONGEST:,} characters, found {len(text):,}.")
        return text


def source_data(source: Source) -> dict:
    """A source as plain data: `spans` are the (start, end) of the sentences that were read, `read` their texts."""
    names = ("id", "title", "text", "score")
    spans = {"spans": [list(span) for span in source.used], "read": list(source.read)}
    return {name: getattr(source, name) for name in names} | spans | {"metadata": dict(source.metadata)}


def answer_data(answer: Answer) -> dict:
    """An answer as plain data, with its sources."""
    sources = [source_data(each) for each in answer.passages]
    return {"answer": answer.text, "score": answer.score, "context": answer.context, "sources": sources}


def build_app(pair: CozyRAG, *, name: str, key: str | None, hosts: Collection[str] = (), **queue: int) -> FastAPI:
    """The application. `key`: which clients must send as bearer; None: none. `queue`: as for QuestionQueue."""
    # The pages of the documentation would be loaded from other servers; the schema at /openapi.json stays.
    app = FastAPI(title=f"CoZyRAG: {name}", docs_url=None, redoc_url=None, dependencies=[Depends(_key_check(key))])
    questions = QuestionQueue(pair, **queue)
    _add_plain(app, questions, name=name, passages=len(pair.index))
    _add_chat(app, questions, name=name)
    for kind in (StarletteException, RequestValidationError, InputError, QueueFull):
        app.add_exception_handler(kind, _told)
    app.add_middleware(_Bounded)
    app.add_middleware(KnownHosts, names=hosts)
    return app


def _add_plain(app: FastAPI, questions: QuestionQueue, *, name: str, passages: int) -> None:
    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "model": name, "passages": passages}

    @app.post("/ask")
    async def ask(asked: Asked) -> dict:
        return answer_data(await questions.answer(asked.question, asked.top_k))

    @app.post("/search")
    async def search(asked: Asked) -> dict:
        return {"passages": [source_data(each) for each in await questions.search(asked.question, asked.top_k)]}


def _add_chat(app: FastAPI, questions: QuestionQueue, *, name: str) -> None:
    started = int(time.time())

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": started, "owned_by": "cozyrag"}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: Chat) -> dict | StreamingResponse:
        answer = await questions.answer(asked.question(), asked.top_k)
        if asked.stream:
            return StreamingResponse(_events(answer, name), media_type="text/event-stream")
        message = {"role": "assistant", "content": answer.text or SILENT}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return _envelope(name, "chat.completion") | {"choices": [choice], "cozyrag": answer_data(answer)}


def _envelope(name: str, kind: str) -> dict:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}


def _events(answer: Answer, name: str) -> Iterator[str]:
    """The answer, which is written when it is sent, as server-sent events of a word each; the last has the sources."""
    head = _envelope(name, "chat.completion.chunk")
    words = (answer.text or SILENT).split(" ")
    deltas = [{"content": word if at == 0 else f" {word}"} for at, word in enumerate(words)]
    for delta in ({"role": "assistant", "content": ""}, *deltas):
        yield _event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "cozyrag": answer_data(answer)}
    yield _event(head | last)
    yield "data: [DONE]\n\n"


def _event(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _key_check(key: str | None):
    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if key and request.url.path != "/health" and not hmac.compare_digest(given.encode(), key.encode()):
            raise HTTPException(401, "Expected the key of this server as `Authorization: Bearer KEY`.")

    return check


async def _told(request: Request, error: Exception) -> JSONResponse:
    """A fault in the form that OpenAI's clients show."""
    status, message, headers = 422, str(error), {}
    if isinstance(error, StarletteException):
        status, message = error.status_code, error.detail
    elif isinstance(error, RequestValidationError):
        places = (f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}".lstrip(": ") for each in error.errors())
        message = "; ".join(list(places)[:5])
    elif isinstance(error, QueueFull):
        status, message, headers = 503, "Too many questions wait. Ask again in a moment.", {"Retry-After": "1"}
    kind = ERRORS.get(status, "invalid_request_error")
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, headers)


class _Bounded:
    """ASGI middleware that refuses a body of more than `BODY` bytes while it is read."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        read = 0

        async def bounded() -> dict:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > BODY:
                raise HTTPException(413, f"Expected a request of at most {BODY:,} bytes.")
            return message

        await self._app(scope, bounded if scope["type"] == "http" else receive, send)
