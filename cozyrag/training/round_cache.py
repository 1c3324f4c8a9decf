"""Tables that a round computes once and keeps on disk: contexts, the generator's answers and its likelihoods.

A resumed run reads them again. Left out: searching (run_retrieval.py), answering (evaluation.py), the likelihoods
themselves (lm_feedback.py), and the models and their checkpoints (checkpointing.py).
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, tqdm
from datasets import Dataset

from cozyrag.config import Settings
from cozyrag.data.corpus import Corpus
from cozyrag.models.generator import Decoding, Generator, Written
from cozyrag.runtime.atomic_files import PARTIAL, damage, replacing, write_json
from cozyrag.runtime.distributed import main_decides
from cozyrag.runtime.fingerprints import weights_fingerprint
from cozyrag.training.index_refresh import TOP, RefreshPolicy, mean_overlap
from cozyrag.training.lm_feedback import answer_likelihoods
from cozyrag.training.run_log import RunLog
from cozyrag.training.run_retrieval import Retrieval

PROBE_QUESTIONS = 50  # training questions that measure the drift of the retriever since the index was made


class Caches:
    """The tables of a run under OUTPUT/contexts and OUTPUT/feedback.

    Args:
        at_start: gives retrieval as of the start of the round, with `reranked=True` its reranker too. A table that was
            lost during a later phase is made again with it, so that it is the same.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        settings: Settings,
        *,
        corpus: Corpus,
        retrieval: Retrieval,
        at_start: Callable[..., Retrieval],
        log: RunLog,
    ):
        self.accelerator = accelerator
        self.settings = settings
        self.corpus = corpus
        self.retrieval = retrieval
        self.at_start = at_start
        self.log = log
        self.folder = Path(settings.output.output_dir)
        training = settings.training
        self.refresh = RefreshPolicy(training.index_refresh, training.refresh_steps, training.refresh_overlap)

    def training_contexts(self) -> Dataset:
        """The contexts table of this round, made when the round begins and read from disk afterwards."""
        path = self._contexts_path()
        if not self._whole(path):
            noise = self.settings.training.context_noise
            contexts = self.at_start(reranked=True).contexts(
                self.corpus.questions, f"round {self.log.round}: retrieving", noise=noise
            )
            self._keep(contexts, path)
        contexts = Dataset.load_from_disk(str(path), keep_in_memory=True)
        if not self.log.holds(kind="contexts", round=self.log.round):
            self._report_positives(contexts)
        return contexts

    def refreshed(self, done: int, total: int, *, resumed: bool) -> Dataset | None:
        """New contexts of the training questions if a refresh of the index is due, else None.

        They are kept on disk; a resumed phase begins with the ones it had.
        """
        here = self._contexts_path(step=done)
        if self.refresh.due(done=done, total=total, overlap=lambda: self._probe_overlap(self._tables_before(here)[-1])):
            row = {"kind": "refresh", "round": self.log.round, "step": done}
            if not (self.log.holds(**row) and self._whole(here)):
                self._keep(self.retrieval.contexts(self.corpus.questions, f"round {self.log.round}: refreshing"), here)
                self.log.record(row)
                self.log.info(f"round {self.log.round} retriever step {done}: index made again, negatives mined again.")
            return Dataset.load_from_disk(str(here), keep_in_memory=True)
        return self._earlier(here) if resumed else None

    def _earlier(self, here: Path) -> Dataset | None:
        """The last refreshed table before this step of a resumed phase. A damaged one cannot be restored exactly."""
        refreshed = self._tables_before(here)[1:]
        if not refreshed:
            return None
        if not self._whole(refreshed[-1]):
            self.log.info(
                "Its negatives are mined with the current retriever, so the result will not be bit-identical."
            )
            self._keep(
                self.retrieval.contexts(self.corpus.questions, f"round {self.log.round}: mining again"),
                refreshed[-1],
            )
        return Dataset.load_from_disk(str(refreshed[-1]), keep_in_memory=True)

    def _tables_before(self, path: Path) -> list[Path]:
        """The contexts tables of this round that are older than that one, oldest first."""
        made = sorted(path.parent.glob(f"{self._contexts_path().name}*"))
        return [each for each in made if each.name < path.name and not each.name.endswith(PARTIAL)]

    def _probe_overlap(self, table: Path) -> float:
        """Share of the probe questions' best passages that the current retriever still ranks best among them."""
        columns = Dataset.load_from_disk(str(table)).select_columns(["question", "rows"])[:PROBE_QUESTIONS]
        before = np.array([rows[:TOP] for rows in columns["rows"]])
        pool = np.unique(before)
        vectors = self.retrieval.retriever.encode(
            self.retrieval.passages.select(pool.tolist()), kind="document", batch_size=64
        )
        scores = self.retrieval.encode_questions(columns["question"]) @ vectors.T
        now = pool[np.argsort(-scores, axis=1, kind="stable")[:, : before.shape[1]]]
        return float(broadcast_object_list([mean_overlap(before, now)])[0])

    def answers(self, generator: Generator, decoding: Decoding, *, may_be_empty: bool) -> "Answers":
        """The kept answers of this generator with its current weights and this decoding."""
        facts = (weights_fingerprint(generator.model), decoding, generator.layout, generator.precision, may_be_empty)
        name = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
        return Answers(self.accelerator, self.folder / "answers" / f"{name}.json")

    def likelihoods(self, generator: Generator, contexts: Dataset) -> np.ndarray | None:
        """Likelihoods of each answer given each of the best passages; None if no step will use them."""
        if self.settings.training.retriever_steps == 0:
            return None
        search = self.at_start()
        k = self.settings.training.feedback_passages
        with self.log.timed("feedback", self.log.round):
            bar = tqdm(desc=f"round {self.log.round}: generator feedback", unit="passage")
            likelihoods = answer_likelihoods(
                self.accelerator,
                generator,
                contexts,
                self.retrieval.context_filter,
                lambda: search.snapshot().builder,
                search.encode_questions,
                passages=k,
                context_tokens=self.settings.contexts.context_tokens,
                batch_size=self.settings.contexts.answer_batch_size,
                folder=self.folder / "feedback",
                progress=bar.update,
                info=self.log.info,
            )
            bar.close()
        return likelihoods

    def _contexts_path(self, step: int | None = None) -> Path:
        name = f"round-{self.log.round:03d}" + ("" if step is None else f"-step-{step:06d}")
        return self.folder / "contexts" / name

    def _keep(self, contexts: Dataset, path: Path) -> None:
        """Write a table atomically and with a checksum. Raises InputError if the disk is full."""

        def write() -> None:
            with replacing(path, needed=int(contexts.data.nbytes)) as partial:
                contexts.save_to_disk(str(partial))

        main_decides(self.accelerator, write)

    def _whole(self, path: Path) -> bool:
        """Whether that table is there and undamaged; logs damage."""
        fault = main_decides(self.accelerator, lambda: damage(path) if path.exists() else "")
        if fault:
            self.log.info(f"The kept table {path.name} is damaged ({fault}); it is made again.")
        return fault is None

    def _report_positives(self, contexts: Dataset) -> None:
        columns = contexts.select_columns(["gold_row", "positive", "answers", "answer_in_context"])[:]
        facts = {
            "questions": len(contexts),
            "gold_known": sum(row >= 0 for row in columns["gold_row"]),
            "without_positive": sum(row < 0 for row in columns["positive"]),
            "without_answer": sum(not answers for answers in columns["answers"]),
            "answer_in_context": sum(columns["answer_in_context"]),
        }
        self.log.record({"kind": "contexts", "round": self.log.round} | facts)
        self.log.info(
            f"round {self.log.round}: {facts['questions']} questions, {facts['gold_known']} with a known gold "
            f"passage; the answer is in the context of {facts['answer_in_context']}; {facts['without_positive']} "
            "without a positive passage train the generator only"
            + (f"; {facts['without_answer']} without an answer train neither" if facts["without_answer"] else "")
            + "."
        )


class Answers(dict):
    """Answers of a generator with certain weights and a certain decoding, by the key of the prompt, kept in a file.

    The same weights and prompt give the same answer, so it is generated once: the rollback check, the evaluation after
    it and a round whose generator was rolled back share their answers. A resumed run finds them again, bit-identical.
    """

    def __init__(self, accelerator: Accelerator, path: Path):
        self.accelerator = accelerator
        self.path = path
        found = main_decides(accelerator, self._read)
        super().__init__({key: Written(*each) for key, each in found.items()})
        self.kept = len(self)

    def _read(self) -> dict[str, list]:
        """The kept answers. A damaged file counts as empty, and its questions are answered again."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def keep(self) -> None:
        """Write new answers to the file. Raises InputError if the disk is full."""
        if len(self) == self.kept:
            return
        rows = {key: list(asdict(each).values()) for key, each in self.items()}
        main_decides(self.accelerator, lambda: write_json(self.path, rows))
        self.kept = len(self)
