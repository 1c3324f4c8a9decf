"""Serve a pair to programs: HTTP that OpenAI's clients speak (/v1/chat/completions, /v1/models), plain
answers and searches with their sources (/ask, /search), /health; or tools for agents over MCP.
Needs: pip install "cozyrag[serve]"

Without --host only programs of this machine reach it. The environment variable COZYRAG_API_KEY is the
key that clients must send; beyond this machine it is required. Simultaneous questions are answered
together; beyond 64 that wait, clients get 503 and may ask again.

examples:
  cozyrag serve my-rag
  COZYRAG_API_KEY=... cozyrag serve user/my-rag --host 0.0.0.0 --names rag.example.org
  cozyrag serve my-rag --mcp

Left out: encryption, which a proxy in front of it adds; the interface itself (serving/).
"""

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cozyrag.commands.options import at_least
from cozyrag.errors import InputError
from cozyrag.runtime.signals import Interrupts
from cozyrag.runtime.terminal import one_line, say
from cozyrag.serving.known_hosts import LOCAL

if TYPE_CHECKING:
    from cozyrag.pipeline import CozyRAG

KEY = "COZYRAG_API_KEY"
GOODBYE = 5  # seconds that answers may take once the server is told to end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("model", metavar="OUTPUT", help="output folder of a run, or user/name on the Hub")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on")
    add("--port", type=at_least(0), default=8000, metavar="N", help="port; 0: a free one")
    add("--names", nargs="+", default=[], metavar="NAME", help="further names under which clients reach it")
    add("--mcp", action="store_true", help="tools over standard input and output instead of HTTP")


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises InputError: a package is missing, no pair, no key, or a port in use."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    with Interrupts().watched():
        if options.mcp:
            _serve_tools(options.model)
        else:
            _serve_http(options)


def _serve_tools(model: str) -> None:
    try:
        from cozyrag.serving.mcp_tools import build_tools
    except ImportError as error:
        raise _missing(error) from error
    build_tools(_load(model), name=_name_of(model)).run("stdio")


def _serve_http(options: argparse.Namespace) -> None:
    try:
        import uvicorn  # before the package's own modules, which load torch

        from cozyrag.serving.http_api import build_app
    except ImportError as error:
        raise _missing(error) from error
    key = os.environ.get(KEY) or None
    if key is None and options.host not in LOCAL:
        raise InputError(
            f"--host {options.host}: expected a key in {KEY}, found none: anybody who reaches this address could ask. "
            "Set it, or leave --host out to serve this machine only."
        )
    pair, name = _load(options.model), _name_of(options.model)
    with _listening(options.host, options.port) as listener:
        app = build_app(pair, name=name, key=key, hosts=[options.host, *options.names])
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GOODBYE, server_header=False)
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        say(f"{one_line(name)} answers at {address} (OpenAI clients: {address}/v1). Ctrl-C stops it.")
        uvicorn.Server(config).run(sockets=[listener])


def _load(model: str) -> "CozyRAG":
    from transformers.utils import logging

    from cozyrag.pipeline import CozyRAG

    logging.disable_progress_bar()
    return CozyRAG.from_pretrained(model)


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--host {host} --port {port}: expected an address of this machine with a free port, found none ({error}). "
            "Give another --port, or the right --host."
        ) from error


def _missing(error: ImportError) -> InputError:
    return InputError(
        f'Expected the packages of the server, found one missing ({error}). Install them: pip install "cozyrag[serve]"'
    )


def _name_of(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model
