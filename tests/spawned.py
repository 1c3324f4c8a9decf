"""A Python command in a new process, and what it took: seconds of the processor and its largest memory.

    python tests/spawned.py LOG SECONDS WORDS...

A child's count of memory begins at the size of the process that started it, even across exec. So this small file, run
as a program, starts the command; the harness, with all its libraries, does not.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Took:
    """The end of a command: exit code, seconds of the processor, and bytes of its largest process at their most."""

    code: int
    seconds: float
    bytes: int


def measured(words: list[str], log: Path, *, waited: float) -> Took:
    """Run `python WORDS`, killed after `waited` seconds on the clock; what it prints goes to `log`."""
    words = [sys.executable, __file__, str(log), str(waited), *words]
    return Took(*json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    """Run the command, and print exit code, seconds and bytes."""
    log, waited, words = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
    with open(log, "w") as out:
        child = subprocess.Popen([sys.executable, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=out).pid
    clock = time.monotonic()
    while not (found := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() - clock > waited:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    used = found[2]
    code = os.waitstatus_to_exitcode(found[1])
    print(json.dumps([code, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))


if __name__ == "__main__":
    main()
