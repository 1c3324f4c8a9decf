"""A writer behind an address: any server that speaks OpenAI's protocol, through the official client.

Passages are sent there, so the address is this machine's unless another one is allowed in so many words. The key comes
from the environment alone. Retries and waiting are the client's. Left out: what is asked (writers.py).
"""

import importlib.util
import ipaddress
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from cozyrag.errors import InputError
from cozyrag.serving.known_hosts import LOCAL
from cozyrag.synthesis.drafts import Draft, Passage, Reading, parse_pairs, tidy
from cozyrag.synthesis.writers import ANSWER_TOKENS, INSTRUCTION, PAIR_TOKENS, READING

if TYPE_CHECKING:
    from openai import OpenAI

KEY = "OPENAI_API_KEY"
RETRIES, SECONDS = 5, 120.0  # of a request
SPARE = 4  # times as many tokens as an answer needs: chat models begin with a sentence
T = TypeVar("T")


def check_endpoint(url: str, *, sending: bool) -> None:
    """Raise InputError for an address that is none, or is not this machine's unless `sending` allows it.

    Also if the client is not installed.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        parts, host = urlsplit(""), ""
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"--endpoint {url}: expected an address such as http://127.0.0.1:8000/v1. Correct it.")
    if parts.username or parts.password:
        raise InputError(f"--endpoint: expected an address without a key in it; give the key as {KEY}.")
    if not is_loopback(host) and not sending:
        raise InputError(
            f"--endpoint {url}: {host} is another machine, and every passage would be sent there. "
            "Add --send_passages if it may have them."
        )
    if importlib.util.find_spec("openai") is None:
        raise InputError(
            'Expected the client openai for --endpoint, found none. Install it with: pip install "cozyrag[endpoint]"'
        )


def is_loopback(host: str) -> bool:
    """Whether a host of an address is this machine."""
    try:
        return host in LOCAL or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class EndpointWriter:
    """A chat model of a server. Temperature 0, as far as the server keeps to it.

    Args:
        model: its name there; None: the first that the server lists.
        at_once: requests under way.
    """

    def __init__(self, url: str, model: str | None = None, *, at_once: int = 8):
        self._client, self._at_once = _client(url), at_once
        self._model = model or self._first_model(url)
        self.name = f"{self._model} at {urlsplit(url).hostname}"
        self.fingerprint = f"{url} {self._model}"

    def draft(self, passages: Sequence[Passage], count: int) -> list[list[Draft]]:
        """At most `count` pairs for each passage."""
        asked = INSTRUCTION.format(count=count)
        texts = self._each(lambda passage: self._ask(passage.text, asked, PAIR_TOKENS * count), passages)
        return [
            [Draft(*pair) for pair in parse_pairs(text, passage.text)[:count]]
            for text, passage in zip(texts, passages, strict=True)
        ]

    def read(self, questions: Sequence[str], passages: Sequence[Passage]) -> list[Reading]:
        """The answer to each question."""

        def answer(pair: tuple[str, Passage]) -> Reading:
            question, passage = pair
            text = self._ask(passage.text, READING.format(question=question), ANSWER_TOKENS)
            return Reading(tidy(text, passage.text))

        return self._each(answer, list(zip(questions, passages, strict=True)))

    def _each(self, ask: Callable[..., T], items: Sequence) -> list[T]:
        with ThreadPoolExecutor(self._at_once) as pool:
            return list(pool.map(ask, items))

    def _ask(self, passage: str, asked: str, tokens: int) -> str:
        from openai import OpenAIError

        try:
            made = self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": f"{passage}\n\n{asked}"}],
                temperature=0,
                max_tokens=tokens * SPARE,
            )
        except OpenAIError as error:
            raise _failed(error) from error
        return made.choices[0].message.content or "" if made.choices else ""

    def _first_model(self, url: str) -> str:
        from openai import OpenAIError

        try:
            listed = list(self._client.models.list())
        except OpenAIError as error:
            raise _failed(error) from error
        if not listed:
            raise InputError(f"--endpoint {url}: the server lists no model. Give its name with --endpoint_model.")
        return listed[0].id


def _client(url: str) -> "OpenAI":
    from openai import DefaultHttpxClient, OpenAI

    # A proxy of the environment would carry requests to this machine elsewhere; a redirect could do the same.
    own = is_loopback(urlsplit(url).hostname or "")
    http = DefaultHttpxClient(trust_env=not own, follow_redirects=False)
    key = os.environ.get(KEY) or "none"
    return OpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=SECONDS, http_client=http)


def _failed(error: Exception) -> InputError:
    cause = " ".join(str(error).split())[:200]
    return InputError(
        f"--endpoint: the server did not answer as expected ({type(error).__name__}: {cause}). Check that it runs, the "
        f"address, which usually ends in /v1, --endpoint_model and the key in {KEY}; then give the same command again: "
        "it resumes."
    )
