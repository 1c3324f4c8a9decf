"""The relay: retrieve, teach the generator, teach the retriever, index again, examine, save - round after round.

A run is a walk over (round, phase); each phase ends by writing down what comes next, so an interrupted run goes on
there. Left out: how a phase trains (trainer.py), what a checkpoint holds (checkpoint.py), reading files (corpus.py), the log (report.py).
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from datasets import Dataset

from cozyrag.background import BackgroundPush
from cozyrag.cards import write_cards
from cozyrag.checkpoint import Checkpoints, Progress, write_json, write_jsonl
from cozyrag.config import Settings
from cozyrag.contexts import CONTEXT_FEATURES, SEARCH_DEPTH, ContextMaker, attach_contexts, sentence_source
from cozyrag.corpus import Corpus
from cozyrag.evaluation import choose_threshold, examine
from cozyrag.feedback import answer_likelihoods
from cozyrag.fingerprints import weights_fingerprint
from cozyrag.gate import judge
from cozyrag.generator import Generator
from cozyrag.index import PassageIndex, Passages, made_by
from cozyrag.lexical import LexicalIndex
from cozyrag.pipeline import describe_pair
from cozyrag.questions import take
from cozyrag.refresh import TOP, RefreshPolicy, mean_overlap
from cozyrag.report import RunLog
from cozyrag.retriever import Retriever
from cozyrag.search import Searcher
from cozyrag.sentences import SentenceVectors
from cozyrag.tracking import log_numbers
from cozyrag.trainer import StepReport, train_generator, train_retriever

PROBE_QUESTIONS = 50  # training questions that show how far the retriever has moved since the index was made
WEIGHT_QUESTIONS = 1000  # training questions on which the two searches are weighed against each other
RETRIEVE_TOGETHER = 256  # questions that are searched for at once


def context_maker(passages: Passages, settings: Settings, generator: Generator, retriever: Retriever) -> ContextMaker:
    """What makes the contexts of a run; its sentence vectors come with the index."""
    return ContextMaker(
        passages,
        generator.count_tokens,
        top_k=settings.contexts.top_k,
        budget=settings.contexts.context_tokens,
        hard_negatives=settings.training.hard_negatives,
        score_by=settings.contexts.context_filter if retriever.reads_sentences else "overlap",
    )


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
        self.index: PassageIndex | None = None
        self.lexical: LexicalIndex | None = None
        self.searcher: Searcher | None = None
        self.searched_by = ""  # fingerprint of all weights it was made for: those that read questions count too
        self.held_out: Dataset | None = None  # contexts of the held-out questions, as of the last examination
        self.examined: list[dict] | None = None  # and its rows
        training = settings.training
        self.refresh = RefreshPolicy(training.index_refresh, training.refresh_steps, training.refresh_overlap)
        self.threshold: float | None = None  # of the probability of writing nothing; None: always answer
        self.log = RunLog(accelerator, self.folder, progress.metrics)
        self.passages = Passages.of(corpus.passages)
        self.maker = context_maker(self.passages, settings, generator, retriever)

    def run(self) -> None:
        """All that is left to do, from where the progress says to the last examination."""
        acts = {"generator": self.teach_generator, "retriever": self.teach_retriever, "examine": self.examine}
        while self.progress.round <= self.settings.training.rounds:
            acts[self.progress.phase]()

    # ---- the acts ----

    def teach_generator(self) -> None:
        """Generator phase: the retriever is frozen, its contexts are made once."""
        contexts = self.training_contexts()
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
        contexts = self.training_contexts()
        likelihoods = self._feedback(contexts) if self.settings.training.feedback_weight else None
        with self.log.timed("retriever phase", self.progress.round):
            train_retriever(
                self.accelerator,
                self.retriever,
                contexts,
                self.passages,
                settings=self.settings.training,
                round_number=self.progress.round,
                watcher=_Watcher(self, "pairs/s"),
                likelihoods=likelihoods,
                refreshed=self._refreshed,
            )
        self._go_on(Progress(self.progress.round, "examine"))

    def _refreshed(self, done: int, total: int) -> Dataset | None:
        """New contexts of the training questions where a refresh of the index is due within the phase, else None.

        They are kept on disk; a resumed phase begins with the ones it had.
        """
        here, resumed = self._contexts_path(step=done), self.resumed_from is not None
        self.resumed_from = None
        if self.refresh.due(done=done, total=total, overlap=lambda: self._probe_overlap(self._tables_before(here)[-1])):
            if not here.exists():
                self._keep(self._contexts(self.corpus.questions, f"round {self.progress.round}: refreshing"), here)
                self.log.record({"kind": "refresh", "round": self.progress.round, "step": done})
                self.log.say(
                    f"round {self.progress.round} retriever step {done}: index made anew, negatives mined again."
                )
            return Dataset.load_from_disk(str(here), keep_in_memory=True)
        earlier = self._tables_before(here) if resumed else []
        return Dataset.load_from_disk(str(earlier[-1]), keep_in_memory=True) if earlier else None

    def _tables_before(self, path: Path) -> list[Path]:
        """The contexts tables of this round that were made before that one, oldest first."""
        made = sorted(path.parent.glob(f"{self._contexts_path().name}*"))
        return [each for each in made if each.name < path.name and not each.name.endswith(".partial")]

    def _probe_overlap(self, table: Path) -> float:
        """How many of the best passages of the probe questions, among those that were best for any of them, still are."""
        columns = Dataset.load_from_disk(str(table)).select_columns(["question", "rows"])[:PROBE_QUESTIONS]
        before = np.array([rows[:TOP] for rows in columns["rows"]])
        pool = np.unique(before)
        vectors = self.retriever.encode(self.passages.select(pool.tolist()), kind="document", batch_size=64)
        scores = self._encode_questions(columns["question"]) @ vectors.T
        now = pool[np.argsort(-scores, axis=1, kind="stable")[:, : before.shape[1]]]
        return float(broadcast_object_list([mean_overlap(before, now)])[0])

    def _feedback(self, contexts: Dataset) -> np.ndarray | None:
        """What the frozen generator makes of the best passages of each question; None where no step will ask for it."""
        if self.settings.training.retriever_steps == 0:
            return None
        self.current_searcher()  # gives the context filter its sentence vectors
        k = self.settings.training.feedback_passages
        with self.log.timed("feedback", self.progress.round):
            bar = tqdm(desc=f"round {self.progress.round}: generator feedback", unit="passage")
            likelihoods = answer_likelihoods(
                self.accelerator,
                self.generator,
                contexts,
                self.maker,
                self._encode_questions,
                passages=k,
                context_tokens=self.settings.contexts.context_tokens,
                batch_size=self.settings.contexts.answer_batch_size,
                folder=self.folder / "feedback",
                progress=bar.update,
            )
            bar.close()
        return likelihoods

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
        self.index = None  # the one that was saved with it is read again
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
        return self._contexts(
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
        robbed = self._contexts(self.corpus.eval_questions, "the same without their answers", noise=1.0)
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

    def training_contexts(self) -> Dataset:
        """The contexts table of this round: made when the round begins, read again from disk afterwards."""
        path = self._contexts_path()
        if not path.exists():
            noise = self.settings.training.context_noise
            contexts = self._contexts(self.corpus.questions, f"round {self.progress.round}: retrieving", noise=noise)
            self._report_positives(contexts)
            self._keep(contexts, path)
        return Dataset.load_from_disk(str(path), keep_in_memory=True)

    def _contexts_path(self, step: int | None = None) -> Path:
        name = f"round-{self.progress.round:03d}" + ("" if step is None else f"-step-{step:06d}")
        return self.folder / "contexts" / name

    def _keep(self, contexts: Dataset, path: Path) -> None:
        """Write a table aside and rename it, so that a table under its name is a whole one."""
        if self.accelerator.is_main_process:
            partial = path.with_name(path.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            contexts.save_to_disk(str(partial))
            partial.rename(path)
        self.accelerator.wait_for_everyone()

    def _report_positives(self, contexts: Dataset) -> None:
        columns = contexts.select_columns(["gold_row", "positive", "answers", "answer_in_context"])[:]
        facts = {
            "questions": len(contexts),
            "gold_known": sum(row >= 0 for row in columns["gold_row"]),
            "without_positive": sum(row < 0 for row in columns["positive"]),
            "without_answer": sum(not answers for answers in columns["answers"]),
            "answer_in_context": sum(columns["answer_in_context"]),
        }
        self.log.record({"kind": "contexts", "round": self.progress.round} | facts)
        self.log.say(
            f"round {self.progress.round}: {facts['questions']} questions, {facts['gold_known']} with a known gold passage; the answer is in the context "
            f"of {facts['answer_in_context']}; {facts['without_positive']} without a positive passage teach the generator only"
            + (f"; {facts['without_answer']} without an answer teach neither" if facts["without_answer"] else "")
            + "."
        )

    def _contexts(self, questions: Dataset, desc: str, *, noise: float = 0.0) -> Dataset:
        """Retrieve for a table of questions; every process does a share and all get the whole."""
        searcher = self.current_searcher()
        with self.log.timed("retrieve", self.progress.round):
            share = questions.shard(self.accelerator.num_processes, self.accelerator.process_index, contiguous=True)
            bar = tqdm(total=len(share), desc=desc, unit="question")
            contexts = attach_contexts(
                share,
                search=lambda texts: searcher.search(texts, SEARCH_DEPTH),
                maker=self.maker,
                fingerprint=_digest(
                    self.searched_by,
                    searcher.index.fingerprint,
                    searcher.mode,
                    str(searcher.weight),
                    questions._fingerprint,
                    str(self.progress.round),
                    str(self.accelerator.process_index),
                    str(noise),
                ),
                noise=noise,
                noise_seed=f"{self.settings.training.seed}|{self.progress.round}",
                batch_size=RETRIEVE_TOGETHER,
                progress=bar.update,
            )
            bar.close()
            if self.accelerator.num_processes > 1:
                parts = gather_object([contexts[:]])
                contexts = Dataset.from_dict(
                    {name: [value for part in parts for value in part[name]] for name in CONTEXT_FEATURES},
                    features=CONTEXT_FEATURES,
                )
        return contexts

    def current_searcher(self) -> Searcher:
        """The search over the index as it is now; in hybrid mode its weight is chosen anew whenever the vectors are new."""
        index, weights = self.current_index(), weights_fingerprint(self.retriever.model)
        if self.searcher is not None and self.searched_by == weights:
            return self.searcher
        self.searched_by = weights
        mode = self.settings.contexts.retrieval
        if mode != "dense" and self.lexical is None:
            with self.log.timed("index", self.progress.round):
                self.lexical = LexicalIndex(self.passages.to_read())
        self.maker.sentence_vectors = sentence_source(index, self.retriever)
        self.searcher = Searcher(index, self.lexical, encode=self._encode_questions, mode=mode)
        if mode == "hybrid":
            self._choose_weight(self.searcher)
        return self.searcher

    def _choose_weight(self, searcher: Searcher) -> None:
        """The weight of the two searches, by recall@5 on training questions whose gold passage is known."""
        columns = take(self.corpus.questions, WEIGHT_QUESTIONS, self.settings.training.seed)[:]
        known = [
            (question, self.maker.row_of[gold])
            for question, gold in zip(columns["question"], columns["passage_id"], strict=True)
            if gold is not None
        ]
        if not known:
            self.log.say(
                f"No gold passage is known, so the two searches are weighed by the usual {searcher.weight:g} to 1."
            )
            return
        with self.log.timed("weigh searches", self.progress.round):
            recall = searcher.choose_weight(*(list(column) for column in zip(*known, strict=True)))
        searcher.weight = broadcast_object_list([searcher.weight])[0]  # a near tie must not part the processes
        self.log.record(
            {
                "kind": "weight",
                "round": self.progress.round,
                "weight": searcher.weight,
                "recall@5": {f"{w:g}": round(100 * r, 2) for w, r in recall.items()},
            }
        )

    def _encode_questions(self, texts: Sequence[str]) -> np.ndarray:
        return self.retriever.encode(texts, kind="query", batch_size=self.settings.contexts.encode_batch_size)

    def current_index(self) -> PassageIndex:
        """The index of the retriever as it is now: kept, read from the output folder, or made anew."""
        fingerprint = self.retriever.fingerprint()
        if self.index is None and made_by(self.folder / "index") == fingerprint:
            self.index = PassageIndex.load(self.folder / "index", fingerprint=fingerprint)
        if self.index is None or self.index.fingerprint != fingerprint:
            with self.log.timed("index", self.progress.round):
                vectors, sentences = self._encode_passages()
                self.index = PassageIndex(self.corpus.passages, vectors, fingerprint=fingerprint, sentences=sentences)
        return self.index

    def _encode_passages(self) -> tuple[np.ndarray, SentenceVectors | None]:
        """Vectors of all passages and their sentences, every process encoding a share.

        Longest first, so the time left is never underrated.
        """
        keep = self.settings.contexts.keep_sentence_vectors and self.maker.score_by != "overlap"
        mine = range(len(self.passages.ids))[self.accelerator.process_index :: self.accelerator.num_processes]
        order = sorted(mine, key=lambda row: -len(self.passages.texts[row]))
        size = self.settings.contexts.encode_batch_size
        vectors: dict[int, np.ndarray] = {}
        sentences: dict[int, np.ndarray] = {}
        with tqdm(total=len(order), desc=f"round {self.progress.round}: indexing", unit="passage") as bar:
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                texts = self.passages.select(rows)
                if keep:
                    made, own = self.retriever.encode_passages(texts, self.passages.spans(rows), batch_size=size)
                    sentences.update(zip(rows, own.of(range(len(rows))), strict=True))
                else:
                    made = self.retriever.encode(texts, kind="document", batch_size=size)
                vectors.update(zip(rows, made, strict=True))
                bar.update(len(rows))
        if self.accelerator.num_processes > 1:
            for part in gather_object([(vectors, sentences)]):
                vectors |= part[0]
                sentences |= part[1]
        rows = range(len(self.passages.ids))
        everything = np.stack([vectors[row] for row in rows])
        return everything, SentenceVectors.join([sentences[row] for row in rows], everything.shape[1]) if keep else None

    def _save_pair(self) -> None:
        """The four things a run leaves: generator/, retriever/, index/ and the file that ties them."""
        self.generator.save(self.folder / "generator")
        self.retriever.save(self.folder / "retriever")
        self.current_index().save(self.folder / "index")
        contexts = self.settings.contexts
        write_json(
            self.folder / "cozyrag.json",
            describe_pair(
                fingerprint=self.index.fingerprint,
                retrieval=contexts.retrieval,
                weight=self.current_searcher().weight,
                top_k=contexts.top_k,
                context_tokens=contexts.context_tokens,
                answer_tokens=contexts.answer_tokens,
                min_answer_tokens=contexts.min_answer_tokens,
                no_repeat_ngram_size=contexts.no_repeat_ngram_size,
                context_filter=self.maker.score_by,
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


def _digest(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]
