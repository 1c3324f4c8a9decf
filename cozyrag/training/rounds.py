"""The rounds of a run: retrieve, train the generator, train the retriever, index again, evaluate, save.

A run is a walk over (round, phase). Each phase ends with a checkpoint that names the next one, so an interrupted run
resumes there. Left out: how a phase trains (generator_phase.py, retriever_phase.py), what a checkpoint holds
(checkpointing.py), reading files (corpus.py), the log (run_log.py).
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset

from cozyrag.config import DEFAULTS, Settings
from cozyrag.data.corpus import Corpus
from cozyrag.errors import InputError
from cozyrag.evaluation.calibration import Calibration, calibrated, sentence
from cozyrag.evaluation.evaluation import choose_threshold, evaluate_pair
from cozyrag.evaluation.metrics import ranks_of, reciprocal_rank
from cozyrag.hub.background_push import BackgroundPush
from cozyrag.hub.model_cards import Example, write_cards
from cozyrag.models.generator import Decoding, Generator
from cozyrag.models.reranker import Reranker
from cozyrag.models.retriever import Retriever
from cozyrag.pair_file import describe_pair, write_pair
from cozyrag.reporting.run_reader import read_evaluation
from cozyrag.retrieval.hybrid import RESULT_OF
from cozyrag.runtime.atomic_files import NEXT, folder_bytes, replacing, switch, write_jsonl
from cozyrag.runtime.distributed import main_decides
from cozyrag.runtime.fingerprints import weights_fingerprint
from cozyrag.runtime.old_names import EVALUATIONS, evaluation_files
from cozyrag.runtime.signals import Interrupts
from cozyrag.training.callbacks import RunCallback
from cozyrag.training.checkpointing import Checkpoints, Progress
from cozyrag.training.generator_phase import generator_cut, generator_token_bytes, train_generator
from cozyrag.training.micro_batches import Cut, describe_cut
from cozyrag.training.reranker_phase import train_reranker
from cozyrag.training.retriever_phase import train_retriever
from cozyrag.training.rollback import decide
from cozyrag.training.round_cache import Caches
from cozyrag.training.run_log import RunLog
from cozyrag.training.run_retrieval import Retrieval, fusion_questions
from cozyrag.training.tracking import log_numbers
from cozyrag.training.trainer import encoder_cut, encoder_token_bytes


class Rounds:
    """One run over a corpus: the models, the tables, and the progress."""

    def __init__(
        self,
        accelerator: Accelerator,
        settings: Settings,
        *,
        corpus: Corpus,
        generator: Generator,
        retriever: Retriever,
        reranker: Reranker | None = None,
        checkpoints: Checkpoints,
        progress: Progress,
        resumed_from: Path | None,
        interrupts: Interrupts,
        pusher: BackgroundPush | None = None,
    ):
        self.accelerator, self.settings, self.corpus = accelerator, settings, corpus
        self.generator, self.retriever, self.reranker = generator, retriever, reranker
        self.checkpoints, self.progress, self.resumed_from = checkpoints, progress, resumed_from
        self.interrupts, self.pusher = interrupts, pusher
        self.folder = Path(settings.output.output_dir)
        self.audit: dict | None = None  # the overlap audit, for the cards
        self.held_out: Dataset | None = None  # contexts of the validation questions at the last evaluation
        self.evaluated: list[dict] | None = None  # and its rows
        self.threshold: float | None = None  # probability of an empty answer above which the pair abstains
        self.calibration: Calibration | None = None  # of the certainty of answers, by the last evaluation
        self.log = RunLog(accelerator, self.folder, progress.metrics, steps=progress.steps_so_far, spent=progress.spent)
        self.log.round = progress.round
        self.retrieval = self._search(retriever, reranker)
        self.caches = Caches(
            accelerator, settings, corpus=corpus, retrieval=self.retrieval, at_start=self._search_at_start, log=self.log
        )

    def run(self) -> None:
        """Run the remaining phases up to the last evaluation."""
        if self.resumed_from and self.progress.round and self.settings.training.rollback == "on":
            self._last_evaluation()  # a damaged file is refused now, not after the phase
        self._choose_cuts()
        phases = {
            "generator": self.run_generator_phase,
            "reranker": self.run_reranker_phase,
            "retriever": self.run_retriever_phase,
            "evaluation": self.evaluate,
        }
        while self.progress.round <= self.settings.training.rounds:
            phases[self.progress.phase]()

    def _choose_cuts(self) -> None:
        """Choose the micro-batch sizes of both phases once, before the first checkpoint, and log them.

        A resumed run keeps them: the memory that is free then must not change its rounding.
        """
        training, context_tokens = self.settings.training, self.settings.contexts.context_tokens
        if not training.rounds or training.gradient_accumulation_steps is not None:
            return
        pair, cuts = (self.accelerator, self.generator), self.progress.cuts
        if "generator" not in cuts:
            cuts["generator"] = asdict(generator_cut(*pair, training, context_tokens))
        if "retriever" not in cuts:
            cuts["retriever"] = asdict(encoder_cut(self.accelerator, self.retriever))
        sizes = {
            "generator": generator_token_bytes(*pair, training, context_tokens),
            "retriever": encoder_token_bytes(self.accelerator, self.retriever),
        }
        if self.reranker is not None:
            if "reranker" not in cuts:
                cuts["reranker"] = asdict(encoder_cut(self.accelerator, self.reranker))
            sizes["reranker"] = encoder_token_bytes(self.accelerator, self.reranker)
        for model, each in sizes.items():
            self.log.info(describe_cut(model, Cut(**cuts[model]), each))

    def _search(self, retriever: Retriever, reranker: Reranker | None) -> Retrieval:
        return Retrieval(
            self.accelerator,
            self.settings,
            corpus=self.corpus,
            generator=self.generator,
            retriever=retriever,
            reranker=reranker,
            log=self.log,
        )

    def _search_at_start(self, *, reranked: bool = False) -> Retrieval:
        """Retrieval as of the start of the round: models that have moved since come from the saved pair.

        `reranked`: with the reranker of that time too; otherwise it does not matter.
        """
        phase, step = self.progress.phase, self.progress.step
        moved = reranked and self.reranker is not None and (phase == "retriever" or (phase == "reranker" and step))
        if not (moved or (phase == "retriever" and step)):
            return self.retrieval
        reads = self.settings.contexts.passage_tokens
        device = str(self.accelerator.device)
        retriever = Retriever.load(str(self.folder / "retriever"), max_tokens=reads, device=device)
        retriever.precision = self.retriever.precision
        reranker = Reranker.load(str(self.folder / "reranker"), device=device) if moved else self.reranker
        if reranker is not None:
            reranker.precision = self.retriever.precision
        return self._search(retriever, reranker)

    def _callback(self, unit: str) -> RunCallback:
        return RunCallback(
            self.accelerator,
            self.settings.output,
            progress=self.progress,
            checkpoints=self.checkpoints,
            generator=self.generator,
            retriever=self.retriever,
            reranker=self.reranker,
            log=self.log,
            interrupts=self.interrupts,
            resumed_from=self.resumed_from,
            unit=unit,
        )

    # ---- phases ----

    def run_generator_phase(self) -> None:
        """Train the generator. The retriever is frozen, and its contexts are made once."""
        contexts = self.caches.training_contexts()
        with self.interrupts.held(), self.log.timed("generator phase", self.progress.round):
            steps = train_generator(
                self.accelerator,
                self.generator,
                contexts,
                settings=self.settings.training,
                context_tokens=self.settings.contexts.context_tokens,
                round_number=self.progress.round,
                callback=self._callback("QA pairs/s"),
            )
        if steps and self.settings.training.rollback == "on":
            self._keep_or_roll_back_generator()
        following = "retriever" if self.reranker is None else "reranker"
        self._advance(self.progress.following(self.progress.round, following))

    def run_reranker_phase(self) -> None:
        """Train the reranker on what the search of this round has found. The other two models are frozen."""
        assert self.reranker is not None  # no other run has this phase
        contexts = self.caches.training_contexts()
        with self.interrupts.held(), self.log.timed("reranker phase", self.progress.round):
            steps = train_reranker(
                self.accelerator,
                self.reranker,
                contexts,
                self.retrieval.passages,
                depth=self.settings.contexts.rerank_passages,
                settings=self.settings.training,
                round_number=self.progress.round,
                callback=self._callback("questions/s"),
                left_out=fusion_questions(self.corpus.questions, self.settings)["id"][:],
            )
        if steps and self.settings.training.rollback == "on":
            self._keep_or_roll_back_reranker(self.reranker)
        self._advance(self.progress.following(self.progress.round, "retriever"))

    def run_retriever_phase(self) -> None:
        """Train the retriever. The generator is frozen; positives and hard negatives come from the contexts table."""
        contexts = self.caches.training_contexts()
        likelihoods = (
            self.caches.likelihoods(self.generator, contexts) if self.settings.training.feedback_weight else None
        )
        with self.interrupts.held(), self.log.timed("retriever phase", self.progress.round):
            train_retriever(
                self.accelerator,
                self.retriever,
                contexts,
                self.retrieval.passages,
                settings=self.settings.training,
                round_number=self.progress.round,
                callback=self._callback("pairs/s"),
                likelihoods=likelihoods,
                left_out=fusion_questions(self.corpus.questions, self.settings)["id"][:],
                refreshed=self._refreshed,
            )
        self._advance(self.progress.following(self.progress.round, "evaluation"))

    def _refreshed(self, done: int, total: int) -> Dataset | None:
        """New contexts if a refresh of the index is due; a resumed phase begins with the ones it had."""
        resumed, self.resumed_from = self.resumed_from is not None, None
        return self.caches.refreshed(done, total, resumed=resumed)

    def evaluate(self) -> None:
        """Index again, answer the validation questions, and save the pair."""
        round_number = self.progress.round
        contexts = self._held_out_contexts()
        if round_number and self.settings.training.rollback == "on":
            contexts = self._keep_or_roll_back_retriever(contexts)
        summary, rows = self._evaluate(contexts, f"round {round_number}: evaluating")
        self.held_out, self.evaluated = contexts, rows
        self.log.record({"kind": "evaluation", "round": round_number} | summary)
        log_numbers(self.accelerator, summary, step=self.log.steps, prefix="evaluation")
        self._calibrate(rows)
        if self.accelerator.is_main_process:
            write_jsonl(self._evaluation_path(round_number), rows)
        main_decides(self.accelerator, self._save_pair)
        self._push_round(round_number)
        if round_number < self.settings.training.rounds:  # the last table is logged with the times
            self.log.info(f"\n{self.log.results()}\n")
        self._advance(self.progress.following(round_number + 1, "generator"))

    def _calibrate(self, rows: list[dict]) -> None:
        """Calibrate the certainty of answers on the evaluated questions, or leave it if they do not suffice."""
        self.calibration, facts = calibrated(rows)
        made = asdict(self.calibration) if self.calibration else None
        self.log.record({"kind": "calibration", "round": self.progress.round, "calibration": made} | facts)
        if self.progress.round == self.settings.training.rounds:
            self.log.info(sentence(facts, self.calibration))

    # ---- rollback ----

    def _keep_or_roll_back_generator(self) -> None:
        """Roll the generator back if it answers worse than before the phase, given the same contexts."""
        contexts = self.held_out or self._held_out_contexts()
        _, rows = self._evaluate(contexts, f"round {self.progress.round}: evaluating the generator")
        if not self._improved("generator", "f1", [row["f1"] for row in rows]):
            self.generator.restore(self.folder / "generator")

    def _keep_or_roll_back_reranker(self, reranker: Reranker) -> None:
        """Roll the reranker back if the search with it ranks worse than before the phase."""
        columns = self._held_out_contexts().select_columns(["rows", "positive"])[:]
        ranks = [ranks_of(rows, {row}) for rows, row in zip(columns["rows"], columns["positive"], strict=True)]
        if not self._improved("reranker", "mrr@10", [reciprocal_rank(each, cutoff=10) for each in ranks]):
            reranker.restore(self.folder / "reranker")

    def _keep_or_roll_back_retriever(self, contexts: Dataset) -> Dataset:
        """Roll the retriever back if it finds less than before the phase; returns the contexts of the one kept.

        With a reranker, the searches before it are compared: it has changed as well.
        """
        columns = contexts.select_columns(["rows", "positive", "ranks"])[:]
        found = [
            float(positive in rows[:5]) for rows, positive in zip(columns["rows"], columns["positive"], strict=True)
        ]
        metric = "recall@5"
        if self.reranker is not None:
            search = RESULT_OF[self.settings.contexts.retrieval]
            metric, found = f"{search}_recall@5", [float(0 < ranks[search] <= 5) for ranks in columns["ranks"]]
        if self._improved("retriever", metric, found):
            return contexts
        self.retriever.restore(self.folder / "retriever")
        self.retrieval.forget()
        return self._held_out_contexts()

    def _improved(self, model: str, metric: str, after: list[float]) -> bool:
        """Whether the model is kept; the reason is logged and recorded."""
        before = [row[metric] for row in self._last_evaluation()]
        decision = decide(np.array(before), np.array(after))
        self.log.record(
            {"kind": "rollback", "round": self.progress.round, "model": model, "metric": metric} | asdict(decision)
        )
        self.log.info(f"round {self.progress.round}: {decision.sentence(model, metric)}")
        return decision.kept

    def _last_evaluation(self) -> list[dict]:
        """Rows of the last evaluation; a resumed run reads them from disk."""
        if self.evaluated is None:
            number, remedy = self.progress.round - 1, "Copy it again, or start again with --overwrite_output_dir."
            path = evaluation_files(self.folder).get(number, self._evaluation_path(number))
            rows = read_evaluation(path, remedy) if path.exists() else []
            if len(rows) != len(self.corpus.eval_questions):
                expected = f"{len(self.corpus.eval_questions)} evaluated questions"
                raise InputError(f"{path}: expected {expected}, to compare with, found {len(rows)}. {remedy}")
            self.evaluated = rows
        return self.evaluated

    def _evaluation_path(self, round_number: int) -> Path:
        return self.folder / EVALUATIONS / f"round-{round_number:03d}.jsonl"

    # ---- evaluation and saving ----

    def _held_out_contexts(self) -> Dataset:
        return self.retrieval.contexts(
            self.corpus.eval_questions,
            f"round {self.progress.round}: retrieving for validation questions",
            measured=True,
        )

    def _evaluate(self, contexts: Dataset, desc: str) -> tuple[dict, list[dict]]:
        with self.log.timed("evaluation", self.progress.round):
            if self.settings.training.no_answer:
                self.threshold = self._choose_threshold(contexts)
            return self._answer(contexts, self.threshold, desc)

    def _answer(self, contexts: Dataset, threshold: float | None, desc: str) -> tuple[dict, list[dict]]:
        chosen = self.settings.contexts
        decoding = Decoding.of(chosen)
        known = self.caches.answers(self.generator, decoding, may_be_empty=threshold is None)
        evaluated = evaluate_pair(
            self.accelerator,
            self.generator,
            contexts,
            top_k=chosen.top_k,
            decoding=decoding,
            no_answer_threshold=threshold,
            known=known,
            batch_size=chosen.answer_batch_size,
            desc=desc,
        )
        known.keep()
        return evaluated

    def _choose_threshold(self, contexts: Dataset) -> float:
        """The probability of an empty answer above which abstaining pays, by F1 on the validation questions.

        Each question counts with its context, and again with an answerless context, weighted by --context_noise.
        """
        noise = self.settings.training.context_noise
        answerless = self.retrieval.contexts(self.corpus.eval_questions, "answerless contexts", noise=1.0)
        nothing, gain, answerable = [], [], []
        for table in (contexts, answerless):
            rows = self._answer(table, 1.0, f"round {self.progress.round}: choosing the threshold")[1]
            nothing.append([row["silence"] for row in rows])
            gain.append([row["f1"] if table is contexts else 0.0 for row in rows])
            answerable.append([bool(row["answers"]) and table is contexts for row in rows])
        weights = np.repeat([1.0, noise / max(1 - noise, 1e-6)], len(contexts))
        threshold, score = choose_threshold(
            np.concatenate(nothing), np.concatenate(gain), np.concatenate(answerable), weights
        )
        threshold = broadcast_object_list([threshold])[0]
        self.log.record(
            {"kind": "threshold", "round": self.progress.round, "threshold": threshold, "f1": round(100 * score, 2)}
        )
        return threshold

    def _save_pair(self) -> None:
        """Replace generator/, retriever/, index/ and cozyrag.json at once, so that they are never mixed."""
        before = sum(folder_bytes(self.folder / name) for name in ("generator", "retriever", "reranker", "index"))
        with replacing(self.folder / NEXT, needed=before) as coming:
            self.generator.save(coming / "generator")
            self.retriever.save(coming / "retriever")
            if self.reranker is not None:
                self.reranker.save(coming / "reranker")
            self.retrieval.index().save(coming / "index")
            write_pair(coming, self._description())
        switch(self.folder)

    def _description(self) -> dict:
        contexts = self.settings.contexts
        return describe_pair(
            fingerprint=self.retrieval.index().fingerprint,
            generator=weights_fingerprint(self.generator.model),
            reranker=self.reranker.fingerprint() if self.reranker is not None else None,
            prompt=self.generator.prompt_facts,
            calibration=asdict(self.calibration) if self.calibration else None,
            retrieval=self.retrieval.description(),
            top_k=contexts.top_k,
            **asdict(Decoding.of(contexts)),
            context_filter=self.retrieval.context_filter,
            no_answer_threshold=self.threshold,
        )

    def write_cards(self) -> None:
        """Write the README.md of the models and of the index from the log."""
        write_cards(
            self.folder,
            settings=self.settings.to_dict(),
            defaults=DEFAULTS,
            rows=self.log.rows,
            times=self.log.times(),
            prompt=self.generator.prompt("Some context.", "Your question?"),
            audit=self.audit,
            example=Example.of(read_evaluation(list(evaluation_files(self.folder).values())[-1]), self._gold_passage),
        )

    def _gold_passage(self, question_id: str) -> tuple[str, str] | None:
        """Title and text of the gold passage of a validation question, if it is known."""
        asked, passages = self.corpus.eval_questions[:], self.retrieval.passages
        gold = asked["passage_id"][asked["id"].index(question_id)]
        row = passages.rows_of([gold]).get(gold)
        return None if row is None else (passages.titles[row], passages.texts[row])

    def _push_round(self, number: int) -> None:
        """Push the pair of this round; that of the last round is pushed at the end, with its final cards."""
        if self.pusher is not None and self.pusher.every_round and 0 < number < self.settings.training.rounds:
            self.write_cards()
            self.pusher.push(f"round-{number}")

    # ---- progress ----

    def _advance(self, progress: Progress) -> None:
        self._check_processes_agree()
        progress.metrics, progress.steps_so_far = self.log.rows, self.log.steps
        self.progress = progress
        self.log.round = progress.round
        self.resumed_from = None
        with self.interrupts.held():
            self.checkpoints.save(progress, self.generator, self.retriever, self.reranker)

    def _check_processes_agree(self) -> None:
        """Stop if the processes hold different weights, which would otherwise show only in bad results."""
        if self.accelerator.num_processes == 1:
            return
        models = [each.model for each in (self.generator, self.retriever, self.reranker) if each is not None]
        found = gather_object([[weights_fingerprint(model) for model in models]])
        self.log.record(
            {"kind": "processes", "round": self.progress.round, "phase": self.progress.phase, "fingerprints": found}
        )
        if any(pair != found[0] for pair in found):
            raise RuntimeError(
                f"the processes ended the {self.progress.phase} phase with different weights: {found}; nothing more "
                "is saved"
            )
