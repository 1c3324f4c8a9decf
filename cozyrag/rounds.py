"""The relay: retrieve, teach the generator, teach the retriever, index again, examine, save - round after round.

A run is a walk over (round, phase); each phase ends by writing down what comes next, so an interrupted run goes on
there. Left out: how a phase trains (trainer.py), what a checkpoint holds (checkpoint.py), reading files (corpus.py), the log (report.py).
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset

from cozyrag.background import BackgroundPush
from cozyrag.caches import Caches
from cozyrag.cards import write_cards
from cozyrag.checkpoint import Checkpoints, Progress, write_json, write_jsonl
from cozyrag.config import Settings
from cozyrag.corpus import Corpus
from cozyrag.evaluation import choose_threshold, examine
from cozyrag.fingerprints import weights_fingerprint
from cozyrag.gate import judge
from cozyrag.generator import Generator
from cozyrag.pipeline import describe_pair
from cozyrag.report import RunLog
from cozyrag.retrieval import Retrieval
from cozyrag.retriever import Retriever
from cozyrag.tracking import log_numbers
from cozyrag.trainer import StepReport, train_generator, train_retriever


class Rounds:
    """One run over a corpus: the two models, the tables, and how far it is."""

    def __init__(
        self,
        accelerator: Accelerator,
        settings: Settings,
        *,
        corpus: Corpus,
        generator: Generator,
        retriever: Retriever,
        checkpoints: Checkpoints,
        progress: Progress,
        resumed_from: Path | None,
        pusher: BackgroundPush | None = None,
    ):
        self.accelerator = accelerator
        self.settings = settings
        self.corpus = corpus
        self.generator = generator
        self.retriever = retriever
        self.checkpoints = checkpoints
        self.progress = progress
        self.resumed_from = resumed_from
        self.pusher = pusher
        self.folder = Path(settings.output.output_dir)
        self.held_out: Dataset | None = None  # contexts of the held-out questions, as of the last examination
        self.examined: list[dict] | None = None  # and its rows
        self.threshold: float | None = None  # of the probability of writing nothing; None: always answer
        self.log = RunLog(accelerator, self.folder, progress.metrics)
        self.retrieval = Retrieval(
            accelerator, settings, corpus=corpus, generator=generator, retriever=retriever, log=self.log
        )
        self.retrieval.round = progress.round
        self.caches = Caches(accelerator, settings, corpus=corpus, retrieval=self.retrieval, log=self.log)

    def run(self) -> None:
        """All that is left to do, from where the progress says to the last examination."""
        acts = {"generator": self.teach_generator, "retriever": self.teach_retriever, "examine": self.examine}
        while self.progress.round <= self.settings.training.rounds:
            acts[self.progress.phase]()

    # ---- the acts ----

    def teach_generator(self) -> None:
        """Generator phase: the retriever is frozen, its contexts are made once."""
        contexts = self.caches.training_contexts()
        with self.log.timed("generator phase", self.progress.round):
            train_generator(
                self.accelerator,
                self.generator,
                contexts,
                settings=self.settings.training,
                context_tokens=self.settings.contexts.context_tokens,
                round_number=self.progress.round,
                watcher=_Watcher(self, "QA pairs/s"),
            )
        if self.settings.training.gate == "on":
            self._gate_generator()
        self._go_on(Progress(self.progress.round, "retriever"))

    def teach_retriever(self) -> None:
        """Retriever phase: the generator is frozen, positives and hard negatives come from the contexts table."""
        contexts = self.caches.training_contexts()
        likelihoods = (
            self.caches.likelihoods(self.generator, contexts) if self.settings.training.feedback_weight else None
        )
        with self.log.timed("retriever phase", self.progress.round):
            train_retriever(
                self.accelerator,
                self.retriever,
                contexts,
                self.retrieval.passages,
                settings=self.settings.training,
                round_number=self.progress.round,
                watcher=_Watcher(self, "pairs/s"),
                likelihoods=likelihoods,
                refreshed=self._refreshed,
            )
        self._go_on(Progress(self.progress.round, "examine"))

    def _refreshed(self, done: int, total: int) -> Dataset | None:
        """New contexts where a refresh is due within the retriever phase; a resumed phase begins with the ones it had."""
        resumed, self.resumed_from = self.resumed_from is not None, None
        return self.caches.refreshed(done, total, resumed=resumed)

    def examine(self) -> None:
        """Index again, let the pair answer the held-out questions, and save it."""
        round_number = self.progress.round
        contexts = self._held_out_contexts()
        if round_number and self.settings.training.gate == "on":
            contexts = self._gate_retriever(contexts)
        summary, rows = self._examine(contexts, f"round {round_number}: examining")
        self.held_out, self.examined = contexts, rows
        self.log.record({"kind": "examined", "round": round_number} | summary)
        log_numbers(self.accelerator, summary, step=self.log.steps, prefix="examined")
        if self.accelerator.is_main_process:
            write_jsonl(self._examined_path(round_number), rows)
            self._save_pair()
            self._push_round(round_number)
        if round_number < self.settings.training.rounds:  # the last table comes with the times, at the end
            self.log.say(f"\n{self.log.results()}\n")
        self._go_on(Progress(round_number + 1, "generator"))

    # ---- do no harm ----

    def _gate_generator(self) -> None:
        """Take the generator back if it answers worse than before the phase, from the same contexts."""
        contexts = self.held_out or self._held_out_contexts()
        _, rows = self._examine(contexts, f"round {self.progress.round}: has the generator gained?")
        if not self._judged("generator", "f1", [row["f1"] for row in rows]):
            self.generator.restore(self.folder / "generator")

    def _gate_retriever(self, contexts: Dataset) -> Dataset:
        """Take the retriever back if it finds less than before the phase; gives the contexts of the one that stays."""
        columns = contexts.select_columns(["rows", "positive"])[:]
        found = [
            float(positive in rows[:5]) for rows, positive in zip(columns["rows"], columns["positive"], strict=True)
        ]
        if self._judged("retriever", "recall@5", found):
            return contexts
        self.retriever.restore(self.folder / "retriever")
        self.retrieval.index = None  # the one that was saved with it is read again
        return self._held_out_contexts()

    def _judged(self, model: str, metric: str, after: list[float]) -> bool:
        """Whether the model stays; the reason goes to the screen and to metrics.jsonl."""
        before = [row[metric] for row in self._last_examined()]
        verdict = judge(np.array(before), np.array(after))
        self.log.record(
            {"kind": "gate", "round": self.progress.round, "model": model, "metric": metric} | asdict(verdict)
        )
        self.log.say(f"round {self.progress.round}: {verdict.sentence(model, metric)}")
        return verdict.kept

    def _last_examined(self) -> list[dict]:
        """Rows of the last examination; a resumed run reads them again."""
        if self.examined is None:
            lines = self._examined_path(self.progress.round - 1).read_text(encoding="utf-8").splitlines()
            self.examined = [json.loads(line) for line in lines]
        return self.examined

    def _examined_path(self, round_number: int) -> Path:
        return self.folder / "examined" / f"round-{round_number:03d}.jsonl"

    # ---- what the acts stand on ----

    def _held_out_contexts(self) -> Dataset:
        return self.retrieval.contexts(
            self.corpus.eval_questions, f"round {self.progress.round}: retrieving for held-out questions"
        )

    def _examine(self, contexts: Dataset, desc: str) -> tuple[dict, list[dict]]:
        with self.log.timed("examine", self.progress.round):
            if self.settings.training.no_answer:
                self.threshold = self._choose_threshold(contexts)
            return self._answer(contexts, self.threshold, desc)

    def _answer(self, contexts: Dataset, threshold: float | None, desc: str) -> tuple[dict, list[dict]]:
        chosen = self.settings.contexts
        return examine(
            self.accelerator,
            self.generator,
            contexts,
            top_k=chosen.top_k,
            context_tokens=chosen.context_tokens,
            answer_tokens=chosen.answer_tokens,
            min_answer_tokens=chosen.min_answer_tokens,
            no_repeat_ngram_size=chosen.no_repeat_ngram_size,
            no_answer_threshold=threshold,
            batch_size=chosen.answer_batch_size,
            desc=desc,
        )

    def _choose_threshold(self, contexts: Dataset) -> float:
        """Above which probability of writing nothing the pair shall keep silent, by F1 on the held-out questions.

        They count as found, and again with contexts that were robbed of the answer, these in the share of --context_noise.
        """
        noise = self.settings.training.context_noise
        robbed = self.retrieval.contexts(self.corpus.eval_questions, "the same without their answers", noise=1.0)
        nothing, gain, answerable = [], [], []
        for table in (contexts, robbed):
            rows = self._answer(table, 1.0, f"round {self.progress.round}: how sure is sure enough?")[1]
            nothing.append(
                self.generator.no_answer_probabilities(
                    table["question"],
                    table["context"],
                    context_tokens=self.settings.contexts.context_tokens,
                    batch_size=self.settings.contexts.answer_batch_size,
                )
            )
            gain.append([row["f1"] if table is contexts else 0.0 for row in rows])
            answerable.append([bool(row["answers"]) and table is contexts for row in rows])
        weights = np.repeat([1.0, noise / max(1 - noise, 1e-6)], len(contexts))
        threshold, score = choose_threshold(*(np.concatenate(each) for each in (nothing, gain, answerable)), weights)
        threshold = broadcast_object_list([threshold])[0]
        self.log.record(
            {"kind": "threshold", "round": self.progress.round, "threshold": threshold, "f1": round(100 * score, 2)}
        )
        return threshold

    def _save_pair(self) -> None:
        """The four things a run leaves: generator/, retriever/, index/ and the file that ties them."""
        self.generator.save(self.folder / "generator")
        self.retriever.save(self.folder / "retriever")
        self.retrieval.current_index().save(self.folder / "index")
        contexts = self.settings.contexts
        write_json(
            self.folder / "cozyrag.json",
            describe_pair(
                fingerprint=self.retrieval.index.fingerprint,
                retrieval=self.retrieval.description(),
                top_k=contexts.top_k,
                context_tokens=contexts.context_tokens,
                answer_tokens=contexts.answer_tokens,
                min_answer_tokens=contexts.min_answer_tokens,
                no_repeat_ngram_size=contexts.no_repeat_ngram_size,
                context_filter=self.retrieval.maker.score_by,
                no_answer_threshold=self.threshold,
            ),
        )

    def write_cards(self) -> None:
        """README.md of the three pieces, from what the log holds by now."""
        write_cards(self.folder, settings=self.settings.to_dict(), rows=self.log.rows, times=self.log.times())

    def _push_round(self, number: int) -> None:
        """Send a round's pair on its way; that of the last round goes when the run ends, with its final cards."""
        if self.pusher is not None and self.pusher.every_round and 0 < number < self.settings.training.rounds:
            self.write_cards()
            self.pusher.push(f"round-{number}")

    # ---- keeping the log ----

    def _go_on(self, progress: Progress) -> None:
        self._check_processes_agree()
        progress.metrics = self.log.rows
        self.progress = progress
        self.retrieval.round = progress.round
        self.resumed_from = None
        self.checkpoints.save(progress, self.generator, self.retriever)

    def _check_processes_agree(self) -> None:
        """Stop when the processes hold different weights: a mistake that otherwise shows in nothing but bad results."""
        if self.accelerator.num_processes == 1:
            return
        found = gather_object([[weights_fingerprint(model) for model in (self.generator.model, self.retriever.model)]])
        self.log.record(
            {"kind": "processes", "round": self.progress.round, "phase": self.progress.phase, "fingerprints": found}
        )
        if any(pair != found[0] for pair in found):
            raise RuntimeError(
                f"the processes ended the {self.progress.phase} phase with different weights: {found}; nothing more is saved"
            )


class _Watcher:
    """Logs and saves inside a phase, and brings back an interrupted one."""

    def __init__(self, rounds: Rounds, unit: str):
        self.rounds = rounds
        self.unit = unit
        self.losses: list[float] = []
        self.terms: list[dict[str, float]] = []
        self.rates: list[float] = []

    def restore(self) -> int:
        """Steps already taken in this phase; loads the optimizer if there are any."""
        rounds = self.rounds
        if rounds.progress.step and rounds.resumed_from:
            rounds.checkpoints.restore_optimizer(rounds.resumed_from)
        return rounds.progress.step

    def after_step(self, report: StepReport) -> None:
        """A log line every `logging_steps`, a checkpoint every `save_steps`."""
        rounds, output = self.rounds, self.rounds.settings.output
        self.losses.append(report.loss)
        self.terms.append(report.terms)
        self.rates.append(1 / report.rate)
        rounds.log.steps += 1
        rounds.progress.step = report.step
        if report.step % output.logging_steps == 0 or report.step == report.steps:
            self._log(report)
        if output.save_steps and report.step % output.save_steps == 0 and report.step < report.steps:
            rounds.checkpoints.save(rounds.progress, rounds.generator, rounds.retriever)

    def _log(self, report: StepReport) -> None:
        rounds, progress = self.rounds, self.rounds.progress
        loss, rate = float(np.mean(self.losses)), float(1 / np.mean(self.rates))
        terms = {name: float(np.mean([each[name] for each in self.terms])) for name in report.terms}
        row = {
            "kind": "step",
            "round": progress.round,
            "phase": progress.phase,
            "step": report.step,
            "loss": loss,
            "learning_rate": report.learning_rate,
            "rate": round(rate, 2),
            "steps_so_far": rounds.log.steps,
        } | terms
        rounds.log.record(row)
        numbers = {"loss": loss, "learning_rate": report.learning_rate, "rows_per_second": rate} | terms
        log_numbers(rounds.accelerator, numbers, step=rounds.log.steps, prefix=progress.phase)
        told = "".join(f", {name} {value:.4f}" for name, value in terms.items())
        rounds.log.say(
            f"round {progress.round} {progress.phase} step {report.step}/{report.steps}: loss {loss:.4f}{told}, learning rate {report.learning_rate:.2e}, {rate:.1f} {self.unit}"
        )
        self.losses.clear()
        self.terms.clear()
        self.rates.clear()
