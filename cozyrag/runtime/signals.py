"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal): a run that is training saves first, any other ends at once.

Left out: what is saved and how (checkpointing.py), and leaving the process (cli.py).
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

PATIENCE = 25.0  # seconds from the signal to the end, saved or not: launchers send SIGKILL after 30
STEP_PATIENCE = 10.0  # seconds that a step may still take, which leaves the others for saving the state before it
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run, which has saved its state; `number` is the signal's, `message` is for the user."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number = number
        self.message = message


class Interrupts:
    """Inside `watched` the signals raise `Interrupted`; inside `held` they are only recorded in `received`.

    Code inside `held` checks `received` and ends in time: after PATIENCE seconds `Interrupted` is raised in any case,
    and inside `may_give_up` after STEP_PATIENCE.
    Further signals change nothing, since a launcher repeats what the terminal has already sent to every process.
    """

    received: int | None = None
    _holders = 0
    _may_give_up = False
    _alarms = 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Handle the signals. Only the main thread can; in other threads this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()  # by nohup
        before = {number: signal.signal(number, self._receive) for number in SIGNALS if number not in ignored}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._too_late)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For work that must not be interrupted: a signal is recorded, and raised at the end."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
        if self.received and not self._holders:
            raise Interrupted(self.received)

    @contextlib.contextmanager
    def may_give_up(self) -> Iterator[None]:
        """Inside `held`, for work that can be done again: `Interrupted` comes STEP_PATIENCE seconds after a signal."""
        self._may_give_up = True
        try:
            yield
        finally:
            self._may_give_up = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            return
        self.received = number
        if not self._holders:
            raise Interrupted(number)
        signal.setitimer(signal.ITIMER_REAL, STEP_PATIENCE, PATIENCE - STEP_PATIENCE)
        line = f"\n{signal.Signals(number).name}: saving after this step, then ending.\n"
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, line.encode())  # not through sys.stderr, which may be in the middle of a progress bar

    def _too_late(self, number: int, frame: FrameType | None) -> None:
        self._alarms += 1
        if self._may_give_up or self._alarms > 1:
            raise Interrupted(self.received or signal.SIGTERM)
