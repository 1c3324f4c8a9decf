"""scripts/train_question_writer.py, killed at a fixed point: `killed_teaching.py N --questions ...`.

N kills after the Nth checkpoint of this process is on the disk, -1 before the first step, and 0 never.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cozyrag.cli import entry_point  # noqa: E402
from cozyrag.preflight import probe  # noqa: E402
from cozyrag.training.checkpointing import Checkpoints  # noqa: E402
from scripts import train_question_writer  # noqa: E402

NUMBER = int(sys.argv[1])


class Killing(Checkpoints):
    """Counts the checkpoints that it has saved."""

    saved = 0

    def save(self, *given):
        super().save(*given)
        self.saved += 1
        if self.saved == NUMBER:
            os.kill(os.getpid(), signal.SIGKILL)


class Teaching(train_question_writer.Teaching):
    """May end before the first step."""

    def _train(self):
        if NUMBER < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._train()


if __name__ == "__main__":
    probe.SECONDS["generator"] = 0.1
    train_question_writer.Checkpoints = Killing
    train_question_writer.Teaching = Teaching
    entry_point(lambda: train_question_writer.teach(train_question_writer.parsed(sys.argv[2:])))
