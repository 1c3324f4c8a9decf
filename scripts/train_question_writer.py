"""Teach a generator to write questions, for `cozyrag questions --from PASSAGES --generator FOLDER`.

    accelerate launch scripts/train_question_writer.py --questions train-v1.1.json --output_dir question-writer

Questions with their passages, as of SQuAD, are turned round (cozyrag/synthesis/turned.py): the model learns to list
answers of a passage, to write the question of an answer, and to answer, all with one loss. What it prints last is the
loss per token on the held-out passages, for each kind of row, before and after. Left out: resuming (it takes a
part of an hour on a GPU), and whether the questions are good (`cozyrag questions` has checks; reading has the rest).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from datasets import Dataset
from tqdm.auto import tqdm

from cozyrag.cli import entry_point
from cozyrag.config import Settings, settings_of
from cozyrag.data.questions import hold_out, read_questions, take
from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.models.smollm2 import SMOLLM2
from cozyrag.runtime.folder_lock import new_folder
from cozyrag.runtime.terminal import say
from cozyrag.synthesis import turned
from cozyrag.training.generator_phase import generator_step_count, train_generator
from cozyrag.training.setup import training_accelerator
from cozyrag.training.trainer import PhaseCallback, StepReport

HELD_OUT, MOST = 0.02, 500  # share of the questions to measure the loss on, and at most


class Bar(PhaseCallback):
    """A progress bar with the loss."""

    def __init__(self, steps: int, *, shown: bool):
        self._bar = tqdm(total=steps, desc="training", unit="step", disable=not shown)

    def after_step(self, report: StepReport) -> None:
        """Show a step."""
        self._bar.set_postfix_str(f"loss {report.loss:.3f}", refresh=False)
        self._bar.update()


def rows_of(path: Sequence[str], limit: int | None, seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows), turned round; held out by passage. Raises InputError without passages."""
    read = read_questions(list(path))
    if read.passages is None:
        raise InputError(f"{' '.join(path)}: expected questions with their passage (column 'context'), found none.")
    texts = dict(zip(read.passages["id"], read.passages["text"], strict=True))
    known = read.table.select([row for row, key in enumerate(read.table["passage_id"]) if key in texts])
    train, held = hold_out(take(known, limit, seed), share=HELD_OUT, limit=MOST, seed=seed)

    def turn(table: Dataset) -> list[dict]:
        columns = table[:]
        golds = [texts[key] for key in columns["passage_id"]]
        return turned.turned_rows(zip(columns["question"], columns["answers"], golds, strict=True))

    return turn(train), turn(held)


def losses(generator: Generator, rows: Sequence[dict], context_tokens: int) -> dict[str, float]:
    """The mean loss per token, in nats, of each kind of row: the mean over rows of their means."""
    kinds: dict[str, list[dict]] = {"answers": [], "questions": [], "lists": []}
    for row in rows:
        asks = row["question"] == turned.ASK_ANSWERS
        kind = "lists" if asks else "questions" if row["question"].startswith(turned.ask_question("")) else "answers"
        kinds[kind].append(row)
    found = {}
    for kind, own in kinds.items():
        columns = [[row[name] for row in own] for name in ("question", "context")]
        targets = [row["answers"][0] for row in own]
        found[kind] = -float(generator.log_likelihoods(*columns, targets, context_tokens=context_tokens).mean())
    return found


def train(accelerator: Accelerator, settings: Settings, options: argparse.Namespace) -> dict:
    """Train and save the model; returns what its marker holds."""
    training, tokens = settings.training, settings.contexts.context_tokens
    rows, held = rows_of(options.questions, options.max_questions, training.seed)
    generator = Generator.load(options.generator, chat_template=options.generator != SMOLLM2)
    generator.model.to(accelerator.device)
    facts = {"base": options.generator, "rows": len(rows), "before": losses(generator, held, tokens)}
    table = Dataset.from_list(rows)
    bar = Bar(generator_step_count(len(rows), training), shown=accelerator.is_main_process)
    how = {"settings": training, "context_tokens": tokens, "round_number": 1, "callback": bar}
    facts["steps"] = train_generator(accelerator, generator, table, **how)
    facts["after"] = losses(generator, held, tokens)
    if accelerator.is_main_process:
        with new_folder(Path(options.output_dir), "the question writer") as folder:
            generator.save(folder)
            turned.mark_trained(folder, **facts)
    accelerator.wait_for_everyone()
    return facts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--questions", nargs="+", required=True, help="questions with their passages, in any layout of train.py")
    add("--generator", default=SMOLLM2, help="causal LM to begin with (default: smollm2)")
    add("--output_dir", required=True, help="new folder for the model")
    add("--max_questions", type=int, help="size of the sample of questions (default: all)")
    add("--epochs", type=float, default=1.0, help="default: 1")
    add("--steps", type=int, help="at most (default: those of the epochs)")
    add("--batch_size", type=int, default=32, help="rows of a step (default: 32)")
    add("--learning_rate", type=float, default=1e-4, help="default: 1e-4")
    add("--context_tokens", type=int, default=384, help="tokens of a passage that are read (default: 384)")
    add("--seed", type=int, default=42, help="default: 42")
    add("--threads", type=int, help="CPU threads of each process (default: all cores)")
    add("--use_cpu", action="store_true", help="train on the CPU even if there is a GPU")
    options = parser.parse_args()

    def run() -> None:
        given = {
            "generator_epochs": options.epochs,
            "generator_steps": options.steps,
            "generator_batch_size": options.batch_size,
            "generator_learning_rate": options.learning_rate,
            "context_tokens": options.context_tokens,
            "seed": options.seed,
            "threads": options.threads,
            "use_cpu": options.use_cpu,
            "questions": options.questions,
        }
        settings = settings_of({name: value for name, value in given.items() if value is not None})
        accelerator, _ = training_accelerator(settings)
        facts = train(accelerator, settings, options)
        if accelerator.is_main_process:
            for kind, before in facts["before"].items():
                say(f"{kind}: loss {before:.3f} before, {facts['after'][kind]:.3f} after {facts['steps']} steps")

    entry_point(run)


if __name__ == "__main__":
    main()
