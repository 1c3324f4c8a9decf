"""The story of a run, act by act: settings, accelerator, tables, models, rounds, and what is left behind.

Left out: everything an act does in detail, which stands in the module it calls. Nothing else makes an Accelerator.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import datasets
import faiss
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, parse_flag_from_env, set_seed
from tqdm.auto import tqdm

from cozyrag.config import Settings, parse_settings
from cozyrag.config_checks import EMBEDDED, QUICKSTART, SCRATCH
from cozyrag.data.corpus import Corpus, load_corpus
from cozyrag.errors import InputError
from cozyrag.evaluation.evaluation import examples
from cozyrag.evaluation.overlap_audit import audit_corpus, audit_table, brief, part_scores
from cozyrag.hub.background_push import BackgroundPush
from cozyrag.hub.push import refusal
from cozyrag.models.fsdp import CONFIGS, LAUNCHED, check_sharding, is_split
from cozyrag.models.generator import Generator
from cozyrag.models.int8_encoding import check_int8, reading_precision
from cozyrag.models.retriever import Retriever
from cozyrag.models.smollm2 import SMOLLM2
from cozyrag.preflight.loss_check import check_terms, findings_table, one_line, refuse
from cozyrag.preflight.plan import make_plan, plan_table, rough_generator_seconds, told_time, verdict
from cozyrag.reporting.html_report import tell_report
from cozyrag.runtime.assets import GENERATOR_FOLDER
from cozyrag.runtime.assets import QUICKSTART as QUICKSTART_FILES
from cozyrag.runtime.atomic_files import switch, write_json, writing
from cozyrag.runtime.distributed import main_decides
from cozyrag.runtime.fingerprints import tables_fingerprint
from cozyrag.runtime.hardware import machine_facts
from cozyrag.runtime.precision import MEASURED, Precision, agreed, check_asked, choose, float32_rate
from cozyrag.runtime.signals import Interrupted, Interrupts
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
)
from cozyrag.training.rounds import Rounds
from cozyrag.training.tracking import start_trackers, wanted_trackers

LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "NCCL communicator was aborted",
    "Timed out waiting",
)
SPLITTING = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}  # every model of a run
QUESTION_TOKENS = 30  # of a question, its cues and its answer, beside the context
LONG = 300  # seconds of the generator's part that are told before it begins
PATIENCE = timedelta(minutes=30)  # for a process that others wait for: more than the longest act that one does alone


def train(arguments: list[str] | None = None, *, description: str | None = None) -> None:
    """One run, from settings to two checkpoints. Raises InputError for what the user can put right."""
    started = time.perf_counter()
    settings = parse_settings(arguments, description=description)
    if settings.output.plan:
        return show_plan(settings)
    folder = Path(settings.output.output_dir)
    going_on = check_output(folder, settings.to_dict()) and complete_checkpoints(folder)
    kept = Precision.began_with(settings_before(folder)) if going_on else None
    accelerator, precision = _training_accelerator(settings, kept)
    interrupts = Interrupts()
    try:
        with locked(accelerator, folder), interrupts.watched(), _peers_lost():
            finish(train_rounds(accelerator, settings, interrupts, precision), started)
    except Interrupted as interrupted:
        for tracker in accelerator.trackers:
            tracker.finish()
        raise Interrupted(interrupted.number, _how_to_go_on(folder)) from None


def train_rounds(accelerator: Accelerator, settings: Settings, interrupts: Interrupts, precision: Precision) -> Rounds:
    """All rounds of a new run, or those that are left of the one in the output folder."""
    folder = Path(settings.output.output_dir)
    going_on = main_decides(accelerator, lambda: check_output(folder, settings.to_dict()))
    pusher = open_hub(accelerator, settings)
    corpus = load_tables(accelerator, settings)
    checkpoints = Checkpoints(
        accelerator, folder, limit=settings.output.save_total_limit, facts=_facts(accelerator, corpus)
    )
    newest, warnings = checkpoints.newest() if going_on else (None, [])
    progress = checkpoints.read(newest, anyway=settings.output.resume_anyway) if newest else Progress()
    generator, retriever = load_models(accelerator, settings, corpus, newest)
    open_output(accelerator, settings, progress if newest else None, precision)
    rounds = Rounds(
        accelerator, settings, corpus=corpus, generator=generator, retriever=retriever, checkpoints=checkpoints, progress=progress, resumed_from=newest,
        interrupts=interrupts, pusher=pusher,
    )  # fmt: skip
    for warning in warnings:
        rounds.log.say(warning)
    announce(rounds, going_on, precision)
    audit_leaks(rounds)
    if settings.training.rounds and not newest:
        self_test(rounds)
    rounds.run()
    return rounds


def _facts(accelerator: Accelerator, corpus: Corpus) -> dict:
    """What a resumed run must find as it was, beside its settings."""
    data = tables_fingerprint(corpus.questions[:], corpus.eval_questions[:], corpus.passages[:])
    return {"data": data, "processes": accelerator.num_processes}


def _how_to_go_on(folder: Path) -> str:
    saved = complete_checkpoints(folder)
    what = f"{saved[-1].name} is saved" if saved else "nothing was saved yet"
    return f"Interrupted; {what} in {folder.absolute()}. Give the same command again: it goes on from there."


@contextlib.contextmanager
def _peers_lost() -> Iterator[None]:
    """A process that has lost another one says so, instead of a stack of the library that noticed."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST):
            raise
        raise InputError(
            f"Another process of this run has ended or cannot be reached ({' '.join(str(error).split())[:200]}); its own message says why. Give the same "
            "command again: it goes on from the last checkpoint."
        ) from error


def doctor(arguments: list[str] | None = None) -> None:
    """`cozyrag doctor` with settings: load what a run would load, test its loss terms, write nothing."""
    settings = parse_settings(arguments)
    accelerator = make_accelerator(settings)
    check_asked(settings.training.mixed_precision, accelerator.device.type)
    corpus = load_tables(accelerator, settings)
    generator, retriever = load_models(accelerator, settings, corpus, None)
    started = time.perf_counter()
    findings = check_terms(generator, retriever, corpus, settings)
    seconds = time.perf_counter() - started
    if not findings:
        return accelerator.print("No loss term is active with these settings: nothing would be trained.")
    accelerator.print(findings_table(findings))
    refuse(finding.fault for finding in findings)
    accelerator.print(f"Loss terms checked: {len(findings)}, in {seconds:.1f} s. Nothing wrong.")


def plan(arguments: list[str] | None = None, *, description: str | None = None) -> None:
    """`cozyrag plan` with settings: what the run would take, from a probe of half a minute; nothing is written."""
    show_plan(parse_settings(arguments, description=description))


def show_plan(settings: Settings) -> None:
    """Load what a run would load, probe it, and print seconds, memory and disk of each part."""
    accelerator, precision = _training_accelerator(settings)
    corpus = load_tables(accelerator, settings)
    generator, retriever = load_models(accelerator, settings, corpus, None)
    made = make_plan(accelerator, settings, corpus, generator, retriever)
    accelerator.print(
        f"{plan_table(made)}\n\n{verdict(made)}\nProbed in {made.costs.spent:.0f} s, {precision.sentence()}; nothing is trained."
    )


def _training_accelerator(settings: Settings, kept: Precision | None = None) -> tuple[Accelerator, Precision]:
    """The Accelerator of a run, and the precision of its training, which then stands in the settings.

    kept: what an interrupted run began with. Raises InputError as make_accelerator does.
    """
    state = _start_processes(settings)
    precision = _agree_on_precision(state.device.type, settings.training.mixed_precision, kept)
    settings.training.mixed_precision = precision.name
    accelerator = _make_accelerator(settings, state)
    sharding = settings.training.generator_sharding
    check_sharding(sharding, processes=accelerator.num_processes, precision=accelerator.mixed_precision)
    check_int8(settings.contexts.index_precision, str(accelerator.device), "--index_precision")
    return accelerator, precision


def _agree_on_precision(device: str, asked: str | None, kept: Precision | None) -> Precision:
    """One precision for all processes. Raises InputError on each of them if one of them refuses."""
    choice, fault = None, None
    with _peers_lost():
        kept = broadcast_object_list([kept])[0]  # the main process has the folder
        try:
            choice = choose(device, asked, kept)
        except InputError as error:
            fault = str(error)
        told = gather_object([(choice, fault)])
    refuse(fault for _, fault in told)
    return agreed([choice for choice, _ in told])


def make_accelerator(settings: Settings) -> Accelerator:
    """The Accelerator of what trains nothing: CPU where there is no GPU, the trackers asked for, and threads that use the machine.

    Raises:
        InputError: several processes were asked for but would not work together, or the precision cannot be had here.
    """
    state = _start_processes(settings)
    check_asked(settings.training.mixed_precision, state.device.type, emulated=True)
    return _make_accelerator(settings, state)


def _start_processes(settings: Settings) -> PartialState:
    """The processes of this launch, which can talk to each other from here on, and the threads of each.

    An Accelerator takes the state over as it finds it, so that they can agree on its precision before it is made.
    """
    training = settings.training
    os.environ.pop(LAUNCHED, None)  # the settings have it: Accelerate itself would split the retriever, too
    cpu = training.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if "MASTER_PORT" in os.environ and "RANK" not in os.environ:
        raise InputError(
            "Expected several processes, but accelerate launch started one without a rank (it does so for `--cpu --num_processes N` and for "
            "MULTI_CPU): it would train alone. Use `accelerate launch --config_file accelerate_configs/cpu_ddp.yaml train.py`."
        )
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    _set_threads(training.threads)
    return state


def _make_accelerator(settings: Settings, state: PartialState) -> Accelerator:
    accelerator = Accelerator(
        cpu=state.device.type == "cpu",
        mixed_precision=settings.training.mixed_precision,
        log_with=wanted_trackers(settings.output.report_to) or None,
        project_dir=settings.output.output_dir,
        step_scheduler_with_optimizer=False,
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and accelerator.num_processes == 1:
        raise InputError(
            f"Expected {os.environ['WORLD_SIZE']} processes that train together, but each believes it is alone, so they would overwrite each "
            "other. Launch with accelerate_configs/cpu_ddp.yaml or multi_gpu.yaml."
        )
    if accelerator.distributed_type in SPLITTING:
        raise InputError(
            f"Expected a launch that leaves splitting to --generator_sharding, found {accelerator.distributed_type.value}, which would split models that are "
            f"examined and saved whole between phases. Use {CONFIGS}, which splits what ZeRO-2 does; for a large generator --lora_rank 16 helps, too."
        )
    transformers.utils.logging.disable_progress_bar()  # "Loading weights" and the like: ours say more
    datasets.disable_progress_bars()
    set_seed(settings.training.seed)
    return accelerator


def _set_threads(threads: int | None) -> None:
    """Give PyTorch and FAISS, which have a thread pool each, the cores of this process's share of the machine.

    accelerate launch sets OMP_NUM_THREADS=1 by default, which would leave a desktop's other cores idle.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def load_tables(accelerator: Accelerator, settings: Settings) -> Corpus:
    """Questions, questions to examine with, and passages. "quickstart" stands for the files of the package."""
    data = settings.data
    given = vars(data)
    files = {name: given[name] for name in QUICKSTART_FILES}
    if data.questions == QUICKSTART:
        files = {name: QUICKSTART_FILES[name] if file in (None, QUICKSTART) else file for name, file in files.items()}
    names = ("question_column", "answer_column", "context_column", "title_column", "id_column", "passage_id_column")
    return load_corpus(
        **files,
        questions_split=data.questions_split,
        eval_split=data.eval_split,
        passages_split=data.passages_split,
        columns={name: given[name] for name in names},
        text_column=data.text_column,
        max_questions=data.max_questions,
        max_eval_questions=data.max_eval_questions,
        eval_share=data.eval_share,
        skip_bad_rows=data.skip_bad_rows,
        seed=settings.training.seed,
        say=accelerator.print,
    )


def open_output(accelerator: Accelerator, settings: Settings, resumed: Progress | None, precision: Precision) -> None:
    """Clear the output folder unless a run is gone on with, put a pair there that was saved but not in its place, start the trackers."""
    output, folder = settings.output, Path(settings.output.output_dir)

    def prepare() -> None:
        with writing(folder):
            if resumed is None:  # what a run left that was ended before its first checkpoint goes too
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
    """What will push for the main process, if asked to; a token or a name that cannot work ends the run before it begins."""
    output = settings.output
    if not output.push_to_hub:
        return None
    main = accelerator.is_main_process
    found = refusal(output.hub_model_id, private=output.hub_private, say=accelerator.print) if main else None
    refuse(gather_object([found]))
    every_round = output.hub_strategy == "every_round"
    options = {"private": output.hub_private, "every_round": every_round, "say": partial(tqdm.write, file=sys.stdout)}
    return BackgroundPush(Path(output.output_dir), output.hub_model_id, **options) if main else None


def load_models(
    accelerator: Accelerator, settings: Settings, corpus: Corpus, newest: Path | None
) -> tuple[Generator, Retriever]:
    """The pair, on this process's device: as named in the settings, or as an interrupted run left it."""
    models, device, reads = settings.models, accelerator.device, settings.contexts.passage_tokens
    if newest:
        generator = Generator.load(str(newest / "generator"), dropout=models.dropout)
        retriever = Retriever.load(str(newest / "retriever"), max_tokens=reads, device=str(device))
    else:
        generator = _load_generator(settings, corpus)
        if models.retriever == EMBEDDED:
            retriever = Retriever.load_embedded(max_tokens=reads, device=str(device))
        else:
            retriever = Retriever.load(
                models.retriever, revision=models.retriever_revision, max_tokens=reads, device=str(device)
            )
    if settings.training.sentence_weight and not retriever.reads_sentences:
        raise InputError(
            "--sentence_weight: expected a retriever that takes the mean over its tokens, since a sentence's vector is the mean over its own; "
            f"{models.retriever} pools otherwise, so there would be nothing to learn. Give another --retriever, or leave --sentence_weight out."
        )
    if settings.training.query_side_only:
        retriever.freeze_documents()
    generator.precision = retriever.precision = reading_precision(accelerator.mixed_precision)
    generator.model.to(device)
    return generator, retriever


def _load_generator(settings: Settings, corpus: Corpus) -> Generator:
    models = settings.models
    if models.generator == SCRATCH:
        return Generator.from_scratch(corpus.passages[:]["text"])
    name = str(GENERATOR_FOLDER) if models.generator == EMBEDDED else models.generator
    wished = models.chat_template
    chat = wished == "on" or wished == "auto" and models.generator != SMOLLM2  # its results are without
    generator = Generator.load(name, revision=models.generator_revision, dropout=models.dropout, chat_template=chat)
    if models.lora_rank and not generator.is_adapter:  # one that was trained before is trained on
        generator.add_adapter(
            name,
            rank=models.lora_rank,
            alpha=models.lora_alpha or 2 * models.lora_rank,
            dropout=models.lora_dropout,
            targets=models.lora_targets,
            revision=models.generator_revision,
            seed=settings.training.seed,
        )
    return generator


def announce(rounds: Rounds, going_on: bool, precision: Precision) -> None:
    """Say what is about to happen, in a few lines."""
    settings, corpus, accelerator = rounds.settings, rounds.corpus, rounds.accelerator
    sizes = [
        sum(p.numel() for p in model.parameters()) / 1e6 for model in (rounds.generator.model, rounds.retriever.model)
    ]
    sharding = settings.training.generator_sharding
    split = f", the generator's training split between them ({sharding})" if is_split(sharding) else ""
    rounds.log.say(
        f"CoZyRAG: {len(corpus.questions)} questions to train on, {len(corpus.eval_questions)} to examine with, {len(corpus.passages)} passages.\n"
        f"generator {settings.models.generator} ({sizes[0]:.1f} M parameters), retriever {settings.models.retriever} ({sizes[1]:.1f} M parameters); "
        f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''} on {accelerator.device.type}{split}, {torch.get_num_threads()} threads each; "
        f"{settings.training.rounds} rounds into {settings.output.output_dir}.\n{precision.sentence()}."
    )
    record_facts(rounds, precision)
    if settings.models.generator == SCRATCH:
        rounds.log.say(
            "Note: a generator from scratch has never read a word. From a few thousand questions it learns what answers look like, not how to find "
            "them; for answers worth reading start from a pretrained one, such as --generator distilgpt2."
        )
    if rounds.resumed_from:
        rounds.log.say(f"{rounds.folder} holds this run, interrupted. Going on from {rounds.resumed_from.name}.")
    elif going_on:
        rounds.log.say(f"{rounds.folder} holds this run, interrupted before its first checkpoint. Starting anew.")
    if precision.note:
        rounds.log.say(f"Note: {precision.note}")
    if accelerator.device.type == "cpu" and precision.name == "no" and not rounds.resumed_from:
        _tell_how_long(rounds)


def _tell_how_long(rounds: Rounds) -> None:
    """On a CPU without bf16: about how long the generator will take, where that is more than some minutes, and what is shorter."""
    settings, training = rounds.settings, rounds.settings.training
    generator = rounds.generator.model
    steps = generator_step_count(len(rounds.corpus.questions), training)
    rate = float32_rate()
    seconds = rough_generator_seconds(
        sum(p.numel() for p in generator.parameters()) - generator.get_input_embeddings().weight.numel(),
        trained=training.rounds * steps * training.generator_batch_size,
        asked=(1 + training.rounds) * len(rounds.corpus.eval_questions),
        tokens=settings.contexts.context_tokens + QUESTION_TOKENS,
        rate=rate,
    )
    if seconds < LONG:
        return
    small = (
        "--generator embedded (some 3 minutes, right in 3 answers of 10)"
        if settings.data.questions == QUICKSTART
        else "--max_questions"
    )
    rounds.log.say(
        f"Note: this takes about {told_time(seconds / max(1, rounds.accelerator.num_processes))} for the generator alone, in float32 at {rate:.0f} GFLOP/s. Shorter: {small} or "
        f"fewer --generator_steps ({steps} a round); `cozyrag plan` measures every part."
    )


def audit_leaks(rounds: Rounds, rows: list[dict] | None = None) -> None:
    """What of the held-out questions is known from training, into audit.json; with examined rows also the scores of each part."""
    models = rounds.settings.models
    found = audit_corpus(rounds.corpus, retriever=models.retriever, generator=models.generator)
    rounds.leaks = [brief(found)]
    if rows is None:
        rounds.log.say(brief(found))
    else:
        found["parts"] = part_scores(found, rows)
        rounds.leaks.append(audit_table(found["parts"]))
        rounds.log.say(f"By what was seen in training (audit.json):\n\n{audit_table(found['parts'])}\n")
    if rounds.accelerator.is_main_process:
        write_json(rounds.folder / "audit.json", found)


def record_facts(rounds: Rounds, precision: Precision) -> None:
    """A row of metrics.jsonl that says what the run works on and with; the cards tell it. A resumed run has it already."""
    if rounds.log.holds(kind="run"):
        return
    corpus, accelerator = rounds.corpus, rounds.accelerator
    sizes = {name: len(vars(corpus)[name]) for name in ("questions", "eval_questions", "passages")}
    machine = machine_facts(
        processes=accelerator.num_processes, threads=torch.get_num_threads(), device=accelerator.device.type
    )
    computed = {"name": precision.name} | precision.facts()
    rounds.log.record({"kind": "run"} | sizes | {"machine": machine, "precision": computed})


def self_test(rounds: Rounds) -> None:
    """See on one batch that every active loss term moves what it should; says so in a line. Raises InputError if not.

    A generator that is trained in parts, for want of room, is left out: its gradients would be whole here.
    """
    started = time.perf_counter()
    parts = is_split(rounds.settings.training.generator_sharding) and not rounds.generator.is_adapter
    moving = ("retriever",) if parts else ("generator", "retriever")
    findings = check_terms(rounds.generator, rounds.retriever, rounds.corpus, rounds.settings, moving=moving)
    seconds = round(time.perf_counter() - started, 2)
    rounds.log.record({"kind": "self-test", "seconds": seconds, "terms": [finding.row() for finding in findings]})
    refuse(gather_object([finding.fault for finding in findings]))  # a fault of one process stops them all
    rounds.log.say(one_line(findings, seconds))
    if parts:
        rounds.log.say(
            "self-test: without the terms of the generator, whose gradients would be whole in each process; where there is room, "
            "`cozyrag doctor` with the same settings tests them."
        )


def finish(rounds: Rounds, started: float) -> None:
    """Cards, the tables, three answers, what to try next; then the Hub if asked. Raises PushError if that fails."""
    settings, folder, accelerator = rounds.settings, rounds.folder, rounds.accelerator
    rounds.log.say(f"\n{rounds.log.results()}\n\n{rounds.log.times()}\n")
    if accelerator.is_main_process:
        newest = sorted((folder / "examined").glob("*.jsonl"))[-1]
        rows = [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]
        audit_leaks(rounds, rows)
        rounds.write_cards()
        rounds.log.say(f"Some of its answers:\n\n{examples(rows)}\n")
        rounds.log.say(
            f"Done in {(time.perf_counter() - started) / 60:.1f} minutes. {folder}/ holds generator/, retriever/, index/ and metrics.jsonl. Try:\n"
            f'  cozyrag ask {folder} "{rows[0]["question"]}"\n'
            f"  accelerate launch train.py --questions your-questions.tsv --passages your-passages.jsonl --output_dir my-rag"
        )
    accelerator.end_training()
    if rounds.pusher is not None:
        rounds.log.say(f"Pushed to {rounds.pusher.finish(f'round-{settings.training.rounds}')}")
    if accelerator.is_main_process:  # the report last: whatever happens to it, the run is whole and uploaded
        rounds.log.say(tell_report(folder))
        mark_finished(folder, settings.training.rounds)
