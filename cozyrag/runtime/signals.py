"""Ctrl-C and SIGTERM: a run that is training saves first, one that is not ends at once.

Left out: what is saved and how (checkpointing.py), and leaving the process (cli.py).
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

PATIENCE = 25.0  # seconds from the signal to the end, saved or not: launchers send SIGKILL after 30
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The run was asked to end and has saved what there was to save; `number` is the signal's."""

    def __init__(self, number: int, told: str = ""):
        super().__init__(told)
        self.number = number
        self.told = told


class Interrupts:
    """While it is entered, the signals raise `Interrupted`; inside `held` they are only noted in `received`.

    Whoever holds them looks at `received` and ends in time: after PATIENCE seconds `Interrupted` is raised all the same.
    Further signals change nothing, since a launcher passes on what the terminal has already sent to everyone.
    """

    def __init__(self):
        self.received: int | None = None
        self._holders = 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Listen. Other threads than the main one cannot, and then nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._too_late)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Something that should not be cut short: a signal is noted, and raised at the end."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
        if self.received and not self._holders:
            raise Interrupted(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            return
        self.received = number
        if not self._holders:
            raise Interrupted(number)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        told = f"\n{signal.Signals(number).name}: saving after this step, then ending.\n"
        os.write(2, told.encode())  # not through sys.stderr, which may be in the middle of a progress bar

    def _too_late(self, number: int, frame: FrameType | None) -> None:
        raise Interrupted(self.received or signal.SIGTERM)
