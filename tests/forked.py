"""A `cozyrag` command in a forked process, for the harnesses: the libraries are imported once, not for each command."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import faiss
import torch

from cozyrag import cli


def start(words: list[str], out: Path, before: Callable[[], None] = lambda: None, *, errors: Path | None = None) -> int:
    """Fork a process that gives a command; returns its id. What it prints goes to `out`, errors to `errors` if named.

    The process calls `before` first. It ends with the command's exit code, 1 for what only a traceback tells, 70 if it
    did not get so far.
    """
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        for number, path in ((1, out), (2, errors or out)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = open(1, "w", encoding="utf-8"), open(2, "w", encoding="utf-8")  # a test's go elsewhere
        # A pool of OpenMP does not survive a fork: a child would wait for its threads for ever.
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
        before()
        code = 0
        try:
            cli.entry_point(lambda: cli.run(words[0], words[1:]))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # a child must never return into the loop of its parent
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
