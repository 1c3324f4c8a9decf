"""Which requests a server on this machine answers: only those that name it, and not those of other web pages.

A page of a foreign site can make its own name point to this machine (DNS rebinding) and then read answers as if they
were its own. Its requests carry that name as Host, and its address as Origin. Left out: keys (http_api.py).
"""

import ipaddress
import json
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

LOCAL = ("localhost", "127.0.0.1", "::1")


class KnownHosts:
    """ASGI middleware that answers 403 to a foreign Host or Origin, and to addresses that are closed.

    Args:
        names: under which the server is reached, besides those of this machine and addresses in digits, which nobody
            can make point elsewhere.
        closed: beginnings of paths that are not served.
    """

    def __init__(self, app: Any, names: Collection[str] = (), closed: tuple[str, ...] = ()):
        self._app, self._closed = app, closed
        self._names = {name.lower() for name in (*LOCAL, *names)}

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
        elif (why := self._refused(scope)) is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": why})
        else:
            body = json.dumps({"error": {"message": why, "type": "forbidden"}}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _refused(self, scope: dict) -> str | None:
        """Why a request is not answered; None: it is."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if not self._is_known(host):
            return "Expected this server's own name as Host. Give further names with --names."
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return "Expected no Origin, or this server's own: other pages may not ask it."
        if scope["path"].startswith(self._closed or ("\0",)):
            return "This path is closed."
        return None

    def _is_known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._names or _in_digits(name)


def _in_digits(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
