"""Upload the rounds of a run one by one in the background, while the next round trains.

The pair of a finished round is copied to a temporary name and renamed, so that training cannot change files under
upload and every copy under its final name is complete. A copy that could not be uploaded is uploaded before the next
one; `cozyrag push` finds it too. Left out: the upload itself (push.py).
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from cozyrag.errors import InputError
from cozyrag.hub.push import push_command, push_pair
from cozyrag.pair_file import PAIR_FILE, pieces_of, read_pair
from cozyrag.runtime.atomic_files import settle

WAITING = "pushing"  # folder of the output folder; checkpointing.py knows it as the run's own
AT_MOST = 3  # rounds that wait; each takes as much disk space as a pair, so the oldest is dropped


def push_run(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    tag: str | None = None,
    info: Callable[[str], None] | None = print,
) -> str:
    """Push the waiting rounds of a run, oldest first, then its pair. Returns and raises as `push_pair`."""
    folder = Path(folder)
    again = push_command(folder, repo_id, private=private, tag=tag)
    if (folder / PAIR_FILE).exists():
        for copy in waiting(folder):
            push_pair(copy, repo_id, private=private, tag=copy.name, info=info, kept=folder, again=again)
            shutil.rmtree(copy, ignore_errors=True)  # another `cozyrag push` may have been faster
    return push_pair(folder, repo_id, private=private, tag=tag, info=info)


def waiting(folder: Path) -> list[Path]:
    """Complete copies of rounds that wait for their upload, oldest first."""
    copies = [path for path in (folder / WAITING).glob("round-*") if not path.name.endswith(".partial")]
    return sorted(copies, key=lambda path: int(path.name.removeprefix("round-")))


class BackgroundPush:
    """Pushes the rounds of a run in a thread of the main process.

    Args:
        folder: the run's output folder. info: takes log lines, from the thread too.
    """

    def __init__(self, folder: Path, repo_id: str, *, private: bool, every_round: bool, info: Callable[[str], None]):
        self.folder, self.repo_id, self.private = folder, repo_id, private
        self.every_round, self.info = every_round, info
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._finished = threading.Event()
        self._current: Path | None = None  # the copy under upload
        self._lock = threading.Lock()  # a copy is either chosen for upload or dropped, never both

    def push(self, tag: str) -> None:
        """Copy the current pair and queue it for upload under `tag`, `round-N`; returns at once.

        If the disk is full, only this round is lost on the Hub.
        """
        try:
            self._copy(tag)
        except OSError as error:
            shutil.rmtree(self.folder / WAITING / f"{tag}.partial", ignore_errors=True)
            self.info(f"{tag} is not pushed: its pair could not be copied ({error.strerror}). The run continues.")
            return
        self._drop_oldest()
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="push to hub", daemon=True)
            self._thread.start()

    def finish(self, tag: str | None) -> str:
        """Push the waiting rounds and then the pair as `tag`; returns its addresses. Raises PushError as `push_run`."""
        if self._thread is not None:
            self._finished.set()
            self._wake.set()
            if self._thread.is_alive() and waiting(self.folder):
                self.info(f"Waiting for the upload of {waiting(self.folder)[0].name} ...")
            self._thread.join()
        tag = tag if self.every_round else None
        return push_run(self.folder, self.repo_id, private=self.private, tag=tag, info=self.info)

    def _copy(self, tag: str) -> None:
        final = self.folder / WAITING / tag
        partial = final.with_name(f"{tag}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for piece in pieces_of(read_pair(self.folder)):
            shutil.copytree(self.folder / piece, partial / piece, symlinks=True)  # which a push refuses
        shutil.copy2(self.folder / PAIR_FILE, partial / PAIR_FILE)
        settle(partial, final)

    def _drop_oldest(self) -> None:
        with self._lock:
            for copy in [each for each in waiting(self.folder)[:-AT_MOST] if each != self._current]:
                shutil.rmtree(copy)
                self.info(f"{copy.name} is not pushed: {AT_MOST} later rounds are waiting for their upload.")

    def _next(self) -> Path | None:
        """The oldest waiting copy, marked as under upload."""
        with self._lock:
            self._current = next(iter(waiting(self.folder)), None)
        return self._current

    def _work(self) -> None:
        """Push what is queued until the run ends. Progress bars are off, as they would mix with those of training."""
        hidden = are_progress_bars_disabled()
        disable_progress_bars()
        while not self._finished.is_set():
            self._wake.wait()
            self._wake.clear()
            self._push_waiting()
        if not hidden:
            enable_progress_bars()

    def _push_waiting(self) -> None:
        """Push copies until none waits or one fails."""
        again = push_command(self.folder, self.repo_id, private=self.private, tag=None)
        while copy := self._next():
            try:
                address = push_pair(
                    copy, self.repo_id, private=self.private, tag=copy.name, kept=self.folder, again=again
                )
            except InputError as error:
                return self.info(f"{copy.name} is not pushed yet; it waits in {copy} and is tried again later. {error}")
            shutil.rmtree(copy)
            self.info(f"{copy.name} is pushed to {address}.")
