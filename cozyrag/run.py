"""A run from its settings to two checkpoints: set-up, rounds, and the output.

Left out: every detail, which is in the module that a step calls.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from types import MappingProxyType
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from cozyrag.config import Settings, parse_settings
from cozyrag.config_checks import QUICKSTART, SCRATCH
from cozyrag.data.corpus import Corpus
from cozyrag.evaluation.evaluation import FEW, examples, few_questions
from cozyrag.evaluation.overlap_audit import audit_corpus, audit_table, brief, part_scores
from cozyrag.hub.background_push import BackgroundPush
from cozyrag.hub.push import refusal
from cozyrag.models.fsdp import is_split
from cozyrag.preflight.loss_check import check_terms, findings_line
from cozyrag.preflight.plan import format_time, make_plan, plan_table, rough_generator_seconds, verdict
from cozyrag.reporting.html_report import report_at_end
from cozyrag.reporting.run_reader import FinishedRun
from cozyrag.retrieval.opening import named_database
from cozyrag.retrieval.passage_index import TextColumn
from cozyrag.runtime.atomic_files import switch, write_json, writing
from cozyrag.runtime.distributed import main_decides, refuse
from cozyrag.runtime.fingerprints import tables_fingerprint
from cozyrag.runtime.hardware import changed_rounding, machine_facts
from cozyrag.runtime.precision import MEASURED, Precision, float32_rate
from cozyrag.runtime.signals import Interrupted, Interrupts
from cozyrag.runtime.terminal import one_line, say, say_above_bars
from cozyrag.training.checkpointing import Checkpoints, Progress
from cozyrag.training.generator_phase import generator_step_count
from cozyrag.training.output_dir import (
    FINISHED,
    SETTINGS,
    check_output,
    clear_output,
    complete_checkpoints,
    locked,
    mark_finished,
    settings_before,
    write_given,
)
from cozyrag.training.rounds import Rounds
from cozyrag.training.run_log import RunLog
from cozyrag.training.setup import load_models, load_tables, peers_lost, training_accelerator
from cozyrag.training.synthetic import make_questions, synthetic_facts
from cozyrag.training.tracking import end_trackers, start_trackers, wanted_trackers

QUESTION_TOKENS = 30  # of a question, the cues of the prompt and the answer, beside the context
LONG = 300  # seconds above which the expected time is logged


def train(arguments: list[str] | None = None, *, description: str | None = None) -> None:
    """Train a pair as the command line says. Raises as `run`."""
    start(parse_settings(arguments, description=description))


def start(settings: Settings) -> None:
    """Train a pair, or only print the plan if the settings say so. Raises as `run`."""
    if settings.output.plan:
        return show_plan(settings)
    run(settings)


def run(settings: Settings, files: Mapping[Path, str] = MappingProxyType({})) -> None:
    """Train a pair. Raises InputError for faults that the user can correct, Interrupted after Ctrl-C or SIGTERM.

    Args:
        files: texts of files named by the settings, which are written when the output folder is this run's.
    """
    started = time.perf_counter()
    with opened(settings) as own:
        main_decides(own.accelerator, lambda: write_given(files, begun=own.begun))
        finish(train_rounds(own.accelerator, settings, own.interrupts, own.precision), started)


class Opened(NamedTuple):
    """What a run has while it holds its output folder. begun: whether the folder has a checkpoint to resume from."""

    accelerator: Accelerator
    precision: Precision
    interrupts: Interrupts
    begun: bool


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Opened]:
    """Hold the output folder of the settings, with signals handled.

    Raises InputError if the folder holds something else, Interrupted with what to do next after a signal.
    """
    folder = Path(settings.output.output_dir)
    begun = check_output(folder, settings.to_dict()) and bool(complete_checkpoints(folder))
    kept = Precision.began_with(settings_before(folder)) if begun else None
    accelerator, precision = training_accelerator(settings, kept)
    interrupts = Interrupts()
    try:
        with locked(accelerator, folder), interrupts.watched(), peers_lost():
            yield Opened(accelerator, precision, interrupts, begun)
    except Interrupted as interrupted:
        end_trackers(accelerator)
        raise Interrupted(interrupted.number, _how_to_resume(folder)) from None


def train_rounds(accelerator: Accelerator, settings: Settings, interrupts: Interrupts, precision: Precision) -> Rounds:
    """All rounds of a new run, or the remaining rounds of the one in the output folder."""
    folder = Path(settings.output.output_dir)
    resuming = main_decides(accelerator, lambda: check_output(folder, settings.to_dict()))
    pusher = open_hub(accelerator, settings)
    make_questions(accelerator, settings)
    corpus = load_tables(accelerator, settings)
    limit = settings.output.save_total_limit
    checkpoints = Checkpoints(accelerator, folder, limit=limit, facts=_facts(accelerator, corpus))
    newest, warnings = checkpoints.newest() if resuming else (None, [])
    progress = checkpoints.read(newest, allow_changes=settings.output.allow_changed_settings) if newest else Progress()
    generator, retriever, reranker = load_models(accelerator, settings, corpus, newest)
    with interrupts.held():  # a tracker that is half started cannot be closed
        open_output(accelerator, settings, progress if newest else None, precision)
    rounds = Rounds(
        accelerator,
        settings,
        corpus=corpus,
        generator=generator,
        retriever=retriever,
        reranker=reranker,
        checkpoints=checkpoints,
        progress=progress,
        resumed_from=newest,
        interrupts=interrupts,
        pusher=pusher,
    )
    for warning in warnings:
        rounds.log.info(warning)
    announce(rounds, resuming, precision)
    audit_overlap(rounds)
    if settings.training.rounds and not newest:
        self_test(rounds)
    rounds.run()
    return rounds


def _facts(accelerator: Accelerator, corpus: Corpus) -> dict:
    """What must be unchanged when the run resumes, besides its settings."""
    tables = [table[:] for table in (corpus.questions, corpus.eval_questions)]
    for table in tables:
        if not any(table["negative_ids"]):  # earlier versions had no such column
            del table["negative_ids"]
    passages = {name: TextColumn(corpus.passages.data.column(name)) for name in corpus.passages.column_names}
    data = tables_fingerprint(*tables, passages)
    return {"data": data, "processes": accelerator.num_processes}


def _how_to_resume(folder: Path) -> str:
    saved = complete_checkpoints(folder)
    what = f"{saved[-1].name} is saved" if saved else "no checkpoint was saved yet"
    return f"Interrupted; {what} in {folder.absolute()}. Give the same command again to resume."


def show_plan(settings: Settings) -> None:
    """Load what a run would load, probe it, and print the seconds, memory and disk space of each part."""
    accelerator, precision = training_accelerator(settings)
    corpus = load_tables(accelerator, settings)
    models = load_models(accelerator, settings, corpus, None)
    made = make_plan(accelerator, settings, corpus, *models)
    probed = f"Probed in {made.costs.spent:.0f} s, {precision.sentence()}; nothing is trained."
    if accelerator.is_main_process:
        say(f"{plan_table(made)}\n\n{verdict(made)}\n{probed}")


def open_output(accelerator: Accelerator, settings: Settings, resumed: Progress | None, precision: Precision) -> None:
    """Clear the output folder of a new run, complete an interrupted replacement of the pair, and start the trackers."""
    output, folder = settings.output, Path(settings.output.output_dir)

    def prepare() -> None:
        with writing(folder):
            if resumed is None:  # also the files of a run that ended before its first checkpoint
                clear_output(folder)
            switch(folder)
            (folder / FINISHED).unlink(missing_ok=True)
            write_json(folder / SETTINGS, settings.to_dict() | {MEASURED: precision.facts()})

    main_decides(accelerator, prepare)
    start_trackers(
        accelerator,
        wanted_trackers(output.report_to),
        project=output.project_name,
        run_name=output.run_name or folder.resolve().name,
        folder=folder / "trackers",
        settings=settings.to_dict(),
        resumed_at=resumed.steps_so_far if resumed else None,
    )


def open_hub(accelerator: Accelerator, settings: Settings) -> BackgroundPush | None:
    """The uploader of the main process, with --push_to_hub. Raises InputError early for a bad token or repository
    name."""
    output = settings.output
    if not output.push_to_hub or output.hub_model_id is None:  # config_checks.py asks for the second with the first
        return None
    main = accelerator.is_main_process
    found = None
    if main:
        reranker, index = settings.models.reranker is not None, settings.data.index
        database = named_database(index) if index else None
        private = output.hub_private
        found = refusal(output.hub_model_id, reranker=reranker, private=private, database=database, info=say)
    refuse(gather_object([found]))
    every_round = output.hub_strategy == "every_round"
    if not main:
        return None
    return BackgroundPush(
        Path(output.output_dir),
        output.hub_model_id,
        private=output.hub_private,
        every_round=every_round,
        info=say_above_bars,
    )


def announce(rounds: Rounds, resuming: bool, precision: Precision) -> None:
    """Log the sizes, the machine, the precision and what the user should know beforehand."""
    rounds.log.info(f"{_summary(rounds)}\n{precision.sentence()}.")
    if rounds.retriever.prompts_sentence:
        rounds.log.info(one_line(rounds.retriever.prompts_sentence))
    corpus = rounds.corpus
    sizes = {name: len(vars(corpus)[name]) for name in ("questions", "eval_questions", "passages")}
    record_facts(rounds.log, precision, sizes | synthetic_facts(rounds.settings))
    if rounds.settings.models.generator == SCRATCH:
        rounds.log.info(
            "Note: a generator from scratch has no knowledge of language. From a few thousand questions it learns "
            "the form of answers, not to find them. For useful answers start from a pretrained one, such as "
            "--generator distilgpt2."
        )
    here = one_line(rounds.folder)
    if rounds.resumed_from:
        rounds.log.info(f"{here} holds this run, interrupted. Resuming from {rounds.resumed_from.name}.")
    elif resuming:
        rounds.log.info(f"{here} holds this run, interrupted before its first checkpoint. Starting again.")
    if precision.note:
        rounds.log.info(f"Note: {precision.note}")
    if few := few_questions(len(rounds.corpus.eval_questions)):
        rounds.log.info(
            f"Note: {few}, so whether a model is kept or rolled back may be chance; give {FEW} or more with "
            "--eval_questions, --max_eval_questions or --eval_share."
        )
    if rounds.accelerator.device.type == "cpu" and precision.name == "no" and not rounds.resumed_from:
        _log_expected_time(rounds)


def _summary(rounds: Rounds) -> str:
    """The data, the models and the machine of a run, in three lines."""
    settings, corpus, accelerator = rounds.settings, rounds.corpus, rounds.accelerator
    modules: dict[str, torch.nn.Module] = {"generator": rounds.generator.model, "retriever": rounds.retriever.model}
    modules |= {"reranker": rounds.reranker.model} if rounds.reranker is not None else {}
    named = ", ".join(
        f"{role} {one_line(getattr(settings.models, role))} ({_parameters(module) / 1e6:.1f} M parameters)"
        for role, module in modules.items()
    )
    sharding = settings.training.generator_sharding
    split = f", the generator's training sharded ({sharding})" if is_split(sharding) else ""
    processes = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
    rounds_given = settings.training.rounds
    return (
        f"CoZyRAG: {len(corpus.questions)} training questions, {len(corpus.eval_questions)} validation questions, "
        f"{len(corpus.passages)} passages.\n"
        f"{named}\n"
        f"{processes} on {accelerator.device.type}{split}, {torch.get_num_threads()} threads each; "
        f"{rounds_given} round{'' if rounds_given == 1 else 's'} into {one_line(settings.output.output_dir)}."
    )


def _parameters(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _log_expected_time(rounds: Rounds) -> None:
    """On a CPU without bf16: about how long the generator takes, if that is more than some minutes, and what is
    shorter."""
    settings, training = rounds.settings, rounds.settings.training
    generator = rounds.generator.model
    steps = generator_step_count(len(rounds.corpus.questions), training)
    rate = float32_rate()
    seconds = rough_generator_seconds(
        _parameters(generator) - _parameters(generator.get_input_embeddings()),
        trained=training.rounds * steps * training.generator_batch_size,
        asked=(1 + training.rounds) * len(rounds.corpus.eval_questions),
        tokens=settings.contexts.context_tokens + QUESTION_TOKENS,
        rate=rate,
    )
    if seconds < LONG:
        return
    small = "--max_questions"
    if settings.data.questions == QUICKSTART:
        small = "--generator embedded (about 3 minutes, 3 of 10 answers correct)"
    expected = format_time(seconds / max(1, rounds.accelerator.num_processes))
    rounds.log.info(
        f"Note: the generator alone takes about {expected}, in float32 at {rate:.0f} GFLOP/s. Shorter: {small} or "
        f"fewer --generator_steps ({steps} a round); `cozyrag plan` measures every part."
    )


def audit_overlap(rounds: Rounds, rows: list[dict] | None = None) -> None:
    """Write what training reveals of the validation questions to audit.json, with evaluated rows also the scores by
    part."""
    models = rounds.settings.models
    found = audit_corpus(rounds.corpus, retriever=models.retriever, generator=models.generator)
    rounds.audit = found
    if rows is None:
        rounds.log.info(brief(found))
    else:
        found["parts"] = part_scores(found, rows)
        rounds.log.info(f"Scores by overlap with the training data (audit.json):\n\n{audit_table(found['parts'])}\n")
    if rounds.accelerator.is_main_process:
        write_json(rounds.folder / "audit.json", found)


def record_facts(log: RunLog, precision: Precision, facts: Mapping) -> None:
    """Add the row of metrics.jsonl with these facts, such as sizes, and the machine, which the cards report. A resumed
    run has it already, and logs whether the machine is another."""
    accelerator = log.accelerator
    machine = machine_facts(
        processes=accelerator.num_processes, threads=torch.get_num_threads(), device=accelerator.device.type
    )
    for row in log.rows:
        if row["kind"] == "run":
            if sentence := changed_rounding(row.get("machine", {}), machine):
                log.info(one_line(sentence))
            return
    computed = {"name": precision.name} | precision.facts()
    log.record({"kind": "run"} | dict(facts) | {"machine": machine, "precision": computed})


def self_test(rounds: Rounds) -> None:
    """Check on one batch that every active loss term moves the right weights. Raises InputError otherwise.

    A sharded generator is left out, because its gradients would be whole here and might not fit.
    """
    started = time.perf_counter()
    sharded = is_split(rounds.settings.training.generator_sharding) and not rounds.generator.is_adapter
    moving = ("retriever", "reranker") if sharded else ("generator", "retriever", "reranker")
    models = rounds.generator, rounds.retriever
    findings = check_terms(*models, rounds.corpus, rounds.settings, reranker=rounds.reranker, moving=moving)
    seconds = round(time.perf_counter() - started, 2)
    rounds.log.record({"kind": "self-test", "seconds": seconds, "terms": [finding.row() for finding in findings]})
    refuse(gather_object([finding.fault for finding in findings]))  # a fault of one process stops them all
    rounds.log.info(findings_line(findings, seconds))
    if sharded:
        rounds.log.info(
            "self-test: without the generator's terms, whose gradients would be whole in each process; on a machine "
            "with enough memory, `cozyrag doctor` with the same settings tests them."
        )


def training_command() -> str:
    """The command that trains, as it was given: train.py comes with a checkout only."""
    return "accelerate launch train.py" if Path(sys.argv[0]).name == "train.py" else "cozyrag train"


def finish(rounds: Rounds, started: float) -> None:
    """Write the cards, log the tables, some answers and the next steps, and push if asked. Raises PushError if that
    fails."""
    settings, folder, accelerator = rounds.settings, rounds.folder, rounds.accelerator
    rounds.log.info(f"\n{rounds.log.results()}\n\n{rounds.log.times()}\n")
    if accelerator.is_main_process:
        rows = FinishedRun.read(folder).evaluated[settings.training.rounds]
        audit_overlap(rounds, rows)
        rounds.write_cards()
        rounds.log.info(f"Some answers:\n\n{examples(rows)}\n")
        minutes = (time.perf_counter() - started) / 60
        held = ", ".join(
            f"{piece}/" for piece in ("generator", "retriever", "reranker", "index") if (folder / piece).exists()
        )
        rounds.log.info(
            f"Done in {minutes:.1f} minutes. {folder}/ holds {held} and metrics.jsonl. Try:\n"
            f"  cozyrag ask {quote(str(folder))} {quote(rows[0]['question'])}\n"
            f"  {training_command()} --questions your-questions.tsv --passages your-passages.jsonl --output_dir my-rag"
        )
    end_trackers(accelerator)
    accelerator.end_training()
    if rounds.pusher is not None:
        rounds.log.info(f"Pushed to {rounds.pusher.finish(f'round-{settings.training.rounds}')}")
    if accelerator.is_main_process:  # the report comes last: if it fails, the run is complete and uploaded
        rounds.log.info(report_at_end(folder))
        mark_finished(folder, settings.training.rounds)
