"""Push the rounds of a run one by one, in the background, while the next round trains.

A finished round's pair is copied first, aside and renamed, so that nothing under upload changes and a copy under its
name is whole. A copy that could not be pushed stays and goes before the next one, and `cozyrag push` finds it too. Left
out: the upload itself (push.py).
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from cozyrag.errors import InputError
from cozyrag.hub.push import push_command, push_pair
from cozyrag.pair_file import PAIR_FILE

WAITING = "pushing"  # folder of the output folder; checkpointing.py knows it as the run's own
PIECES = ("generator", "retriever", "index")
AT_MOST = 3  # rounds that wait; the oldest gives way, since each takes as much disk as a pair


def push_run(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    tag: str | None = None,
    info: Callable[[str], None] | None = print,
) -> str:
    """Push the rounds of a run that still wait, oldest first, then its pair. Returns and raises as `hub.push_pair`."""
    folder = Path(folder)
    again = push_command(folder, repo_id, private=private, tag=tag)
    options = {"private": private, "info": info, "kept": folder, "again": again}
    if (folder / PAIR_FILE).exists():
        for copy in waiting(folder):
            push_pair(copy, repo_id, tag=copy.name, message=f"CoZyRAG pair, {copy.name}", **options)
            shutil.rmtree(copy)
    return push_pair(folder, repo_id, tag=tag, message=f"CoZyRAG pair{f', {tag}' if tag else ''}", **options)


def waiting(folder: Path) -> list[Path]:
    """Whole copies of rounds that wait for their upload, oldest first."""
    copies = [path for path in (folder / WAITING).glob("round-*") if not path.name.endswith(".partial")]
    return sorted(copies, key=lambda path: int(path.name.removeprefix("round-")))


class BackgroundPush:
    """Pushes the rounds of one run; to be used by one process only.

    Args:
        folder: the run's output folder. say: takes lines for the screen, from the thread too.
    """

    def __init__(self, folder: Path, repo_id: str, *, private: bool, every_round: bool, info: Callable[[str], None]):
        self.folder = folder
        self.repo_id = repo_id
        self.private = private
        self.every_round = every_round
        self.info = info
        self._thread: threading.Thread | None = None
        self._more = threading.Event()
        self._over = threading.Event()
        self._under_way: Path | None = None
        self._lock = threading.Lock()  # a copy is either chosen for upload or given up, never both

    def push(self, tag: str) -> None:
        """Copy the pair as it lies in the output folder and push it as `tag`, `round-N`, when the line is free; returns at once.

        A full disk costs this round its own place on the Hub and nothing else.
        """
        try:
            self._copy(tag)
        except OSError as error:
            shutil.rmtree(self.folder / WAITING / f"{tag}.partial", ignore_errors=True)
            return self.info(f"{tag} is not pushed: its pair could not be copied ({error.strerror}). The run goes on.")
        self._give_up_oldest()
        self._more.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="push to hub", daemon=True)
            self._thread.start()

    def finish(self, tag: str | None) -> str:
        """Push what waits and then the pair itself as `tag`; returns its address. Raises PushError as `push_run` does."""
        if self._thread is not None:
            self._over.set()
            self._more.set()
            if self._thread.is_alive() and waiting(self.folder):
                self.info(f"Waiting for the upload of {waiting(self.folder)[0].name} ...")
            self._thread.join()
        return push_run(
            self.folder, self.repo_id, private=self.private, tag=tag if self.every_round else None, info=self.info
        )

    def _copy(self, tag: str) -> None:
        final = self.folder / WAITING / tag
        partial = final.with_name(f"{tag}.partial")
        for stale in (partial, final):
            shutil.rmtree(stale, ignore_errors=True)
        for piece in PIECES:
            shutil.copytree(self.folder / piece, partial / piece)
        shutil.copy2(self.folder / PAIR_FILE, partial / PAIR_FILE)
        partial.rename(final)

    def _give_up_oldest(self) -> None:
        with self._lock:
            for copy in [each for each in waiting(self.folder)[:-AT_MOST] if each != self._under_way]:
                shutil.rmtree(copy)
                self.info(f"{copy.name} gets no place of its own on the Hub: {AT_MOST} later rounds wait already.")

    def _next(self) -> Path | None:
        """The oldest copy that waits; from now on it is under way."""
        with self._lock:
            self._under_way = next(iter(waiting(self.folder)), None)
        return self._under_way

    def _work(self) -> None:
        """Until the run is over: push what waits whenever there is something new. Its bars would cross those of the training."""
        hidden = are_progress_bars_disabled()
        disable_progress_bars()
        while not self._over.is_set():
            self._more.wait()
            self._more.clear()
            self._push_waiting()
        if not hidden:
            enable_progress_bars()

    def _push_waiting(self) -> None:
        """Push copies until none waits or one fails."""
        while copy := self._next():
            try:
                address = self._push(copy)
            except InputError as error:
                return self.info(f"{copy.name} is not pushed yet; it waits in {copy} and is tried again later. {error}")
            shutil.rmtree(copy)
            self.info(f"{copy.name} is pushed to {address}.")

    def _push(self, copy: Path) -> str:
        return push_pair(
            copy,
            self.repo_id,
            private=self.private,
            tag=copy.name,
            message=f"CoZyRAG pair, {copy.name}",
            kept=self.folder,
            again=push_command(self.folder, self.repo_id, private=self.private, tag=None),
        )
