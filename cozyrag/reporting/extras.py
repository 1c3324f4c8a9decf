"""The optional packages of pages, Gradio and Matplotlib: whether they are there, told before anything heavy is loaded.

Left out: what is made with them (demo_app.py, plots.py).
"""

import importlib.util
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from cozyrag.errors import InputError


def plots_are_possible() -> bool:
    """Whether Matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_plots() -> None:
    """Raise InputError if Matplotlib is not installed."""
    if not plots_are_possible():
        raise InputError('Expected Matplotlib for the plots, found none. Install it with: pip install "cozyrag[plots]"')


def check_gradio() -> None:
    """Raise InputError if Gradio is not installed, without importing it."""
    if importlib.util.find_spec("gradio") is None:
        raise _without_gradio("No module named 'gradio'")


def load_gradio() -> ModuleType:
    """Gradio without its analytics, which must be off before the import. Raises InputError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        with without_proxies():  # the import makes clients that a malformed proxy stops
            import gradio
    except ImportError as error:
        raise _without_gradio(error) from error
    return gradio


def _without_gradio(why: object) -> InputError:
    return InputError(f'Expected Gradio for the page, found none ({why}). Install it with: pip install "cozyrag[demo]"')


@contextmanager
def without_proxies() -> Iterator[None]:
    """Hide the proxies of the environment: Gradio asks its own server, on this machine, whether it runs.

    No proxy answers for this machine, and NO_PROXY does not help where a proxy is malformed or needs another package.
    """
    hidden = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def without_haste() -> Iterator[None]:
    """Wait for the page's server as long as its thread lives, however busy the machine is.

    Gradio gives it five seconds, and then takes the next port, or calls the one that was asked for taken.
    """
    from gradio import http_server

    def run_in_thread(server: http_server.Server) -> None:
        server.thread = threading.Thread(target=server.run, daemon=True)
        server.thread.start()
        while not server.started:
            if not server.thread.is_alive():  # uvicorn ends it where the port is taken
                raise http_server.ServerFailedToStartError("The server did not start.")
            time.sleep(0.001)

    hasty = http_server.Server.run_in_thread
    http_server.Server.run_in_thread = run_in_thread  # type: ignore[method-assign]
    try:
        yield
    finally:
        http_server.Server.run_in_thread = hasty  # type: ignore[method-assign]
