"""Teach a causal language model to write questions, for `cozyrag questions --from PASSAGES --generator FOLDER`.

Questions with their passages, as of SQuAD, are turned round (cozyrag/synthesis/turned.py): the model learns to list
answers of a passage, to write the question of an answer, and to answer, all with one loss. Before it begins it says how
long it will take. To resume a stopped run, give the same command again: it ends with the same weights.

FOLDER then holds generator/, which is the writer with its card, settings.json, and metrics.jsonl with the loss of the
steps and the loss per token on held-out passages, before and after. One epoch is usual; a sample of the questions
(--max_questions) is enough to try it. The passages that you make questions about should not be among those it was
taught on. Whether its questions are good no loss says: read the page of samples of `cozyrag questions`.

examples:
  accelerate launch scripts/train_question_writer.py --questions train-v1.1.json --output_dir question-writer
  accelerate launch scripts/train_question_writer.py --questions train-v1.1.json --max_questions 2000 \\
      --generator distilgpt2 --output_dir small-writer
  cozyrag questions --from passages.jsonl --output qa.jsonl --generator question-writer

Left out: whether the questions are good (`cozyrag questions` has checks; reading has the rest).
"""

import argparse
import io
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from shlex import quote

from datasets import Dataset
from tqdm import tqdm

from cozyrag.cli import entry_point
from cozyrag.commands.options import at_least
from cozyrag.config import Settings, settings_of
from cozyrag.data.questions import hold_out, read_questions, take
from cozyrag.errors import InputError
from cozyrag.hub.model_cards import write_writer_card
from cozyrag.models.generator import Generator
from cozyrag.models.int8_encoding import reading_precision
from cozyrag.models.smollm2 import SMOLLM2
from cozyrag.preflight.loss_check import left_as_found
from cozyrag.preflight.plan import format_time
from cozyrag.preflight.probe import phase_line
from cozyrag.run import Opened, open_output, opened, record_facts
from cozyrag.runtime.atomic_files import folder_bytes, replacing
from cozyrag.runtime.distributed import main_decides
from cozyrag.runtime.fingerprints import tables_fingerprint
from cozyrag.runtime.terminal import one_line
from cozyrag.synthesis import turned
from cozyrag.synthesis.writers import QUESTION_TOKENS
from cozyrag.training.callbacks import RunCallback
from cozyrag.training.checkpointing import Checkpoints, Progress, load_generator
from cozyrag.training.generator_phase import generator_cut, generator_step_count, train_generator
from cozyrag.training.output_dir import mark_finished
from cozyrag.training.run_log import RunLog
from cozyrag.training.setup import named_generator

HELD_OUT, MOST = 0.02, 500  # share of the questions to measure the loss on, and at most
SAMPLE = 512  # rows on which a few steps are timed
BEFORE, AFTER = "before", "after"
# Options with a shorter name than the setting that they are.
SETTINGS = {
    "epochs": "generator_epochs",
    "steps": "generator_steps",
    "batch_size": "generator_batch_size",
    "learning_rate": "generator_learning_rate",
}


def tables_of(settings: Settings) -> tuple[Dataset, Dataset]:
    """(training rows, held-out rows), turned round; held out by passage. Raises InputError without passages."""
    files, seed = settings.data.questions, settings.training.seed
    read = read_questions(files)
    named = files if isinstance(files, str) else " ".join(files)
    if read.passages is None:
        raise InputError(
            f"{named}: expected questions with their passage (column 'context', or SQuAD's layout), found none, so "
            "there is nothing to ask about. Give such a file."
        )
    texts = dict(zip(read.passages["id"], read.passages["text"], strict=True))
    known = read.table.select(
        [row for row, (key, given) in enumerate(zip(*_columns(read.table), strict=True)) if key in texts and given]
    )
    train, held = hold_out(take(known, settings.data.max_questions, seed), share=HELD_OUT, limit=MOST, seed=seed)

    def turn(table: Dataset) -> Dataset:
        columns = table[:]
        golds = [texts[key] for key in columns["passage_id"]]
        return Dataset.from_list(turned.turned_rows(zip(columns["question"], columns["answers"], golds, strict=True)))

    return turn(train), turn(held)


def _columns(table: Dataset) -> tuple[list, list]:
    return table["passage_id"][:], table["answers"][:]


def losses(generator: Generator, table: Dataset, context_tokens: int, desc: str, *, shown: bool) -> dict[str, float]:
    """The mean loss per token, in nats, of each kind of row: the mean over rows of their means."""
    kinds: dict[str, list[dict]] = {"answers": [], "questions": [], "lists": []}
    for row in table.to_list():
        asks = row["question"] == turned.ASK_ANSWERS
        kind = "lists" if asks else "questions" if row["question"].startswith(turned.ask_question("")) else "answers"
        kinds[kind].append(row)
    found = {}
    with tqdm(total=len(table), desc=desc, unit="row", disable=not shown) as bar:
        for kind, own in kinds.items():
            columns = [[row[name] for row in own] for name in ("question", "context")]
            targets = [row["answers"][0] for row in own]
            how = {"context_tokens": context_tokens, "progress": bar.update}
            found[kind] = -float(generator.log_likelihoods(*columns, targets, **how).mean())
    return found


class Teaching:
    """One run: the rows, the model, the log, and the checkpoints."""

    def __init__(self, settings: Settings, own: Opened):
        self.settings, self.own, self.accelerator = settings, own, own.accelerator
        self.folder = Path(settings.output.output_dir)
        self.train, self.held = tables_of(settings)
        facts = {
            "data": tables_fingerprint(self.train[:], self.held[:]),
            "processes": self.accelerator.num_processes,
        }
        limit = settings.output.save_total_limit
        self.checkpoints = Checkpoints(self.accelerator, self.folder, limit=limit, facts=facts)
        self.newest, warnings = self.checkpoints.newest() if own.begun else (None, [])
        if self.newest:
            self.progress = self.checkpoints.read(self.newest, allow_changes=False)
            self.generator = load_generator(self.newest, dropout=0.0)
        else:
            self.progress = Progress(round=1, phase="generator")
            self.generator = named_generator(settings, self.train.rename_column("context", "text"))
        self.generator.precision = reading_precision(self.accelerator.mixed_precision)
        self.generator.model.to(self.accelerator.device)
        open_output(self.accelerator, settings, self.progress if self.newest else None, own.precision)
        self.log = RunLog(
            self.accelerator,
            self.folder,
            self.progress.metrics,
            steps=self.progress.steps_so_far,
            spent=self.progress.spent,
        )
        for warning in warnings:
            self.log.info(warning)
        self.steps = generator_step_count(len(self.train), settings.training)
        self._choose_cut()

    def _choose_cut(self) -> None:
        """Choose the micro-batches once: the memory that is free when a run resumes must not change its rounding."""
        tokens, cuts = self.settings.contexts.context_tokens, self.progress.cuts
        self.generator.check_room(tokens, QUESTION_TOKENS)
        if "generator" not in cuts:
            cut = generator_cut(self.accelerator, self.generator, self.settings.training, tokens)
            cuts["generator"] = asdict(cut)

    def run(self) -> None:
        """What is left of: measuring, training, measuring again, and writing the folder."""
        self._announce()
        record_facts(self.log, self.own.precision, {"rows": len(self.train), "held": len(self.held)})
        self._measure(BEFORE)
        if self.progress.phase == "generator":
            self.log.info(self._expected())
            with self.own.interrupts.held(), self.log.timed("teaching", 1):
                self._train()
            self._save_end()
        self._measure(AFTER)
        main_decides(self.accelerator, self._write)
        for kind, before in self._losses(BEFORE).items():
            self.log.info(f"{kind}: loss {before:.3f} before, {self._losses(AFTER)[kind]:.3f} after {self.steps} steps")
        use = f"cozyrag questions --from passages.jsonl --output qa.jsonl --generator {quote(str(self.folder))}"
        self.log.info(one_line(f"Its questions are not judged by that. Try: {use}"))

    def _announce(self) -> None:
        model = sum(weight.numel() for weight in self.generator.model.parameters()) / 1e6
        self.log.info(
            f"{len(self.train):,} rows to learn from, {len(self.held):,} held out; {model:.1f} M parameters on "
            f"{self.accelerator.device.type}.\n{self.own.precision.sentence()}."
        )
        if self.newest:
            self.log.info(f"{one_line(self.folder)} holds this run, interrupted. Resuming from {self.newest.name}.")

    def _expected(self) -> str:
        """What is left to do and about how long it takes, by a few steps on a sample; the weights are restored."""
        training, silent = self.settings.training, io.StringIO()
        sample = take(self.train, SAMPLE, training.seed)
        tokens = self.settings.contexts.context_tokens
        train = partial(train_generator, self.accelerator, self.generator, sample, context_tokens=tokens)
        with redirect_stdout(silent), redirect_stderr(silent), left_as_found([self.generator.model], weights=True):
            line, _ = phase_line(self.accelerator, "generator", train, training)
        left, batch = self.steps - self.progress.step, min(training.generator_batch_size, len(self.train))
        seconds = left * (line.fixed + batch * line.each)
        done = f", {self.progress.step:,} are done" if self.progress.step else ""
        return (
            f"About {format_time(seconds)} for {left:,} steps of {batch} rows{done}, by a few steps on this machine. "
            "Ctrl-C saves and ends; the same command resumes."
        )

    def _measure(self, when: str) -> None:
        if self._losses(when):
            return
        shown = self.accelerator.is_main_process
        tokens = self.settings.contexts.context_tokens
        found = losses(self.generator, self.held, tokens, f"loss on held-out rows, {when}", shown=shown)
        self.log.record({"kind": "held-out loss", "when": when} | found)

    def _losses(self, when: str) -> dict[str, float]:
        """The losses that were measured then, by the kind of row; {} if they were not."""
        for row in self.log.rows:
            if row["kind"] == "held-out loss" and row["when"] == when:
                return {name: value for name, value in row.items() if name not in ("kind", "when")}
        return {}

    def _train(self) -> None:
        callback = RunCallback(
            self.accelerator,
            self.settings.output,
            progress=self.progress,
            checkpoints=self.checkpoints,
            generator=self.generator,
            retriever=None,
            reranker=None,
            log=self.log,
            interrupts=self.own.interrupts,
            resumed_from=self.newest,
            unit="rows/s",
        )
        training, tokens = self.settings.training, self.settings.contexts.context_tokens
        how = {"settings": training, "context_tokens": tokens, "round_number": 1, "callback": callback}
        train_generator(self.accelerator, self.generator, self.train, **how)

    def _save_end(self) -> None:
        """The checkpoint with which the phase ends, so that a run that is killed now does not train again."""
        self.progress = self.progress.following(1, "evaluation")
        self.progress.metrics, self.progress.steps_so_far = self.log.rows, self.log.steps
        with self.own.interrupts.held():
            self.checkpoints.save(self.progress, self.generator)

    def _write(self) -> None:
        """The writer with its card; then the checkpoints, which it makes needless, are deleted."""
        base = self.settings.models.generator
        taught = {"rows": len(self.train), "held": len(self.held), "steps": self.steps}
        taught |= {when: self._losses(when) for when in (BEFORE, AFTER)}
        shown = ("questions", "max_questions", "context_tokens", "seed", *SETTINGS.values())
        with replacing(self.folder / "generator", needed=folder_bytes(self.folder / "checkpoints")) as coming:
            self.generator.save(coming)
            turned.mark_trained(coming, base=base, **taught)
            facts = {"settings": self.settings.to_dict(), "shown": shown, "rows": self.log.rows, "taught": taught}
            write_writer_card(coming, **facts)
        mark_finished(self.folder, 1)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)


def teach(settings: Settings) -> None:
    """Teach a writer into the output folder. Raises as `cozyrag.run.run`."""
    with opened(settings) as own:
        Teaching(settings, own).run()


def parsed(arguments: Sequence[str] | None = None) -> Settings:
    """The settings of the command line, checked."""
    description = (__doc__ or "").partition("\nLeft out:")[0]
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what it learns from").add_argument
    add("--questions", nargs="+", required=True, help="questions with their passages, in any layout of train.py")
    add("--max_questions", type=at_least(2), metavar="N", help="learn from so many, drawn with --seed (default: all)")
    add(
        "--context_tokens", type=at_least(1), metavar="N", default=384, help="of a passage that are read (default: 384)"
    )
    add = parser.add_argument_group("the model and its training").add_argument
    add("--generator", default=SMOLLM2, help="causal LM to begin with: a folder or a Hub id (default: smollm2)")
    add("--epochs", type=float, default=1.0, help="times that each row is seen, may be a fraction (default: 1)")
    add("--steps", type=at_least(1), metavar="N", help="at most so many (default: those of the epochs)")
    add("--batch_size", type=at_least(1), metavar="N", default=32, help="rows of a step (default: 32)")
    add("--learning_rate", type=float, default=1e-4, help="highest one; it rises, then falls (default: 1e-4)")
    add("--seed", type=at_least(0), metavar="N", default=42, help="of every random choice (default: 42)")
    add("--threads", type=at_least(1), metavar="N", help="CPU threads of each process (default: all cores)")
    add("--use_cpu", action="store_true", help="train on the CPU even if there is a GPU")
    add = parser.add_argument_group("the folder").add_argument
    add("--output_dir", required=True, metavar="FOLDER", help="new, or that of the run to resume")
    add("--overwrite_output_dir", action="store_true", help="delete an earlier run in FOLDER and start again")
    add("--save_minutes", type=float, default=10.0, help="minutes between checkpoints (default: 10)")
    add("--save_steps", type=at_least(0), metavar="N", default=0, help="steps between them; 0: by minutes (default: 0)")
    given = vars(parser.parse_args(arguments))
    return settings_of({SETTINGS.get(name, name): value for name, value in given.items() if value is not None})


def main() -> None:
    """The command line."""
    entry_point(lambda: teach(parsed()), prints=False)


if __name__ == "__main__":
    main()
