"""Questions of many clients at once: a bounded queue, from which several are answered by one call of the pair.

One call for 16 questions takes far less time than 16 calls. Left out: HTTP (http_api.py), answering (pipeline.py).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cozyrag.errors import InputError
from cozyrag.pipeline import Answer, CozyRAG, Source

WAITING = 64  # questions; the next ones are refused
TOGETHER = 16  # questions in one call


class QueueFull(Exception):
    """As many questions wait as may wait."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    call: Callable[..., list]
    question: str
    top_k: int | None
    result: asyncio.Future


class QuestionQueue:
    """Answers and searches for coroutines of one event loop, one call of the pair at a time in a thread."""

    def __init__(self, pair: CozyRAG, *, waiting: int = WAITING, together: int = TOGETHER):
        self._pair, self._most, self._together = pair, waiting, together
        self._waiting: list[_Waiting] = []
        self._running = 0
        self._worker: asyncio.Task | None = None

    async def answer(self, question: str, top_k: int | None = None) -> Answer:
        """As `pair.answer`. Raises QueueFull, and what that raises."""
        return await self._result(self._pair.answers, question, top_k)

    async def search(self, question: str, top_k: int | None = None) -> tuple[Source, ...]:
        """As `pair.retrieve`. Raises QueueFull, and what that raises."""
        return await self._result(self._pair.retrieve, question, top_k)

    async def _result(self, call: Callable[..., list], question: str, top_k: int | None) -> Any:
        if len(self._waiting) + self._running >= self._most:
            raise QueueFull
        each = _Waiting(call, question, top_k, asyncio.get_running_loop().create_future())
        self._waiting.append(each)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await each.result

    async def _work(self) -> None:
        """Answer what waits, the oldest first and with it what asks for the same."""
        while self._waiting:
            first = self._waiting[0]
            same = [each for each in self._waiting if (each.call, each.top_k) == (first.call, first.top_k)]
            group = same[: self._together]
            self._waiting = [each for each in self._waiting if each not in group]
            self._running = len(group)
            await self._settle([each for each in group if not each.result.done()])  # clients may have gone
            self._running = 0

    async def _settle(self, group: list[_Waiting]) -> None:
        """One call for the group; if it refuses a question, each by itself, since the others can be answered."""
        if not group:
            return
        call = asyncio.to_thread(group[0].call, [each.question for each in group], top_k=group[0].top_k)
        results: list[Any] = await asyncio.gather(call, return_exceptions=True)
        found = results[0]
        if isinstance(found, InputError) and len(group) > 1:
            for each in group:
                await self._settle([each])
            return
        for number, each in enumerate(group):
            if each.result.done():
                continue
            if isinstance(found, BaseException):
                each.result.set_exception(found)
            else:
                each.result.set_result(found[number])
