"""`cozyrag index` into a database, killed before its Nth write: `killed_indexing.py N PASSAGES --output lancedb:...`.

0 kills never.
"""

import os
import signal
import sys

from cozyrag import cli
from cozyrag.retrieval.lance_writing import LanceWriter

NUMBER = int(sys.argv[1])
written, calls = LanceWriter.write, iter(range(1, sys.maxsize))


def killing(self, *given):
    if next(calls) == NUMBER:
        os.kill(os.getpid(), signal.SIGKILL)
    written(self, *given)


if __name__ == "__main__":
    LanceWriter.write = killing
    cli.entry_point(lambda: cli.run("index", sys.argv[2:]))
