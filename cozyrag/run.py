"""The story of a run, act by act: settings, accelerator, tables, models, rounds, and what is left behind.

Left out: everything an act does in detail, which stands in the module it calls. Nothing else makes an Accelerator.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import faiss
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from tqdm.auto import tqdm

from cozyrag.audit import audit_corpus, audit_table, brief, part_scores
from cozyrag.background import BackgroundPush
from cozyrag.checkpoint import Checkpoints, Progress, check_output, clear_output, write_json
from cozyrag.config import EMBEDDED, QUICKSTART, Settings, parse_settings
from cozyrag.corpus import Corpus, load_corpus
from cozyrag.doctor import check_terms, findings_table, one_line, refuse
from cozyrag.embedded import GENERATOR_FOLDER
from cozyrag.embedded import QUICKSTART as QUICKSTART_FILES
from cozyrag.errors import InputError
from cozyrag.evaluation import examples
from cozyrag.generator import SCRATCH, Generator
from cozyrag.hardware import machine_facts
from cozyrag.html_report import tell_report
from cozyrag.hub import refusal
from cozyrag.plan import make_plan, plan_table, verdict
from cozyrag.retriever import Retriever
from cozyrag.rounds import Rounds
from cozyrag.tracking import start_trackers, wanted_trackers


def train(arguments: list[str] | None = None, *, description: str | None = None) -> None:
    """One run, from settings to two checkpoints. Raises InputError for what the user can put right."""
    started = time.perf_counter()
    settings = parse_settings(arguments, description=description)
    if settings.output.plan:
        return show_plan(settings)
    check_output(
        Path(settings.output.output_dir), resume=settings.output.resume, overwrite=settings.output.overwrite_output_dir
    )
    accelerator = make_accelerator(settings)
    checkpoints = Checkpoints(accelerator, Path(settings.output.output_dir), settings)
    pusher = open_hub(accelerator, settings)
    newest = checkpoints.newest() if settings.output.resume else None
    progress = checkpoints.read(newest) if newest else Progress()
    corpus = load_tables(accelerator, settings)
    generator, retriever = load_models(accelerator, settings, corpus, newest)
    open_output(accelerator, settings)
    rounds = Rounds(
        accelerator, settings, corpus=corpus, generator=generator, retriever=retriever, checkpoints=checkpoints, progress=progress, resumed_from=newest, pusher=pusher
    )  # fmt: skip
    announce(rounds)
    audit_leaks(rounds)
    if settings.training.rounds and not newest:
        self_test(rounds)
    rounds.run()
    finish(rounds, started)


def doctor(arguments: list[str] | None = None) -> None:
    """`cozyrag doctor` with settings: load what a run would load, test its loss terms, write nothing."""
    settings = parse_settings(arguments)
    accelerator = make_accelerator(settings)
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
    accelerator = make_accelerator(settings)
    corpus = load_tables(accelerator, settings)
    generator, retriever = load_models(accelerator, settings, corpus, None)
    made = make_plan(accelerator, settings, corpus, generator, retriever)
    accelerator.print(f"{plan_table(made)}\n\n{verdict(made)}\nProbed in {made.costs.spent:.0f} s; nothing is trained.")


def make_accelerator(settings: Settings) -> Accelerator:
    """The Accelerator of the run: CPU where there is no GPU, the trackers asked for, and threads that use the machine.

    Raises:
        InputError: several processes were asked for but would not work together, or the precision cannot be had here.
    """
    training = settings.training
    cpu = training.use_cpu or not torch.accelerator.is_available()
    if "MASTER_PORT" in os.environ and "RANK" not in os.environ:
        raise InputError(
            "Expected several processes, but accelerate launch started one without a rank (it does so for `--cpu --num_processes N` and for "
            "MULTI_CPU): it would train alone. Use `accelerate launch --config_file accelerate_configs/cpu_ddp.yaml train.py`."
        )
    if "fp16" in (training.mixed_precision, os.environ.get("ACCELERATE_MIXED_PRECISION")) and cpu:
        raise InputError(
            "--mixed_precision fp16: expected a GPU, found only the CPU. Use no (or bf16 on a CPU that has it)."
        )
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=training.mixed_precision,
        log_with=wanted_trackers(settings.output.report_to) or None,
        project_dir=settings.output.output_dir,
        step_scheduler_with_optimizer=False,
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and accelerator.num_processes == 1:
        raise InputError(
            f"Expected {os.environ['WORLD_SIZE']} processes that train together, but each believes it is alone, so they would overwrite each "
            "other. Launch with accelerate_configs/cpu_ddp.yaml or multi_gpu.yaml."
        )
    _set_threads(training.threads)
    transformers.utils.logging.disable_progress_bar()  # "Loading weights" and the like: ours say more
    datasets.disable_progress_bars()
    set_seed(training.seed)
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


def open_output(accelerator: Accelerator, settings: Settings) -> None:
    """Make the output folder, cleared if asked, and start the trackers below it: the first act that writes anything."""
    output, folder = settings.output, Path(settings.output.output_dir)
    if accelerator.is_main_process:
        if output.overwrite_output_dir:
            clear_output(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", settings.to_dict())
    accelerator.wait_for_everyone()
    start_trackers(
        accelerator,
        wanted_trackers(output.report_to),
        project=output.project_name,
        run_name=output.run_name or folder.resolve().name,
        folder=folder / "trackers",
        settings=settings.to_dict(),
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
    if settings.training.query_side_only:
        retriever.freeze_documents()
    generator.model.to(device)
    return generator, retriever


def _load_generator(settings: Settings, corpus: Corpus) -> Generator:
    models = settings.models
    if models.generator == SCRATCH:
        return Generator.from_scratch(corpus.passages[:]["text"])
    if models.generator == EMBEDDED:
        return Generator.load(str(GENERATOR_FOLDER), dropout=models.dropout)
    return Generator.load(models.generator, revision=models.generator_revision, dropout=models.dropout)


def announce(rounds: Rounds) -> None:
    """Say what is about to happen, in a few lines."""
    settings, corpus, accelerator = rounds.settings, rounds.corpus, rounds.accelerator
    sizes = [
        sum(p.numel() for p in model.parameters()) / 1e6 for model in (rounds.generator.model, rounds.retriever.model)
    ]
    rounds.log.say(
        f"CoZyRAG: {len(corpus.questions)} questions to train on, {len(corpus.eval_questions)} to examine with, {len(corpus.passages)} passages.\n"
        f"generator {settings.models.generator} ({sizes[0]:.1f} M parameters), retriever {settings.models.retriever} ({sizes[1]:.1f} M parameters); "
        f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''} on {accelerator.device.type}, {torch.get_num_threads()} threads each, "
        f"precision {accelerator.mixed_precision}; {settings.training.rounds} rounds into {settings.output.output_dir}."
    )
    record_facts(rounds)
    if settings.models.generator == SCRATCH:
        rounds.log.say(
            "Note: a generator from scratch has never read a word. From a few thousand questions it learns what answers look like, not how to find "
            "them; for answers worth reading start from a pretrained one, such as --generator distilgpt2."
        )
    if rounds.resumed_from:
        rounds.log.say(f"Going on from {rounds.resumed_from.name}.")
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        rounds.log.say("Note: bf16 on a CPU without native support for it is two to three times slower than float32.")


def audit_leaks(rounds: Rounds, rows: list[dict] | None = None) -> None:
    """What of the held-out questions is known from training, into audit.json; with examined rows also the scores of each part."""
    models = rounds.settings.models
    found = audit_corpus(rounds.corpus, retriever=models.retriever, generator=models.generator)
    if rows is None:
        rounds.log.say(brief(found))
    else:
        found["parts"] = part_scores(found, rows)
        rounds.log.say(f"By what was seen in training (audit.json):\n\n{audit_table(found['parts'])}\n")
    if rounds.accelerator.is_main_process:
        write_json(rounds.folder / "audit.json", found)


def record_facts(rounds: Rounds) -> None:
    """A row of metrics.jsonl that says what the run works on and with; the cards tell it."""
    corpus, accelerator = rounds.corpus, rounds.accelerator
    sizes = {name: len(vars(corpus)[name]) for name in ("questions", "eval_questions", "passages")}
    machine = machine_facts(
        processes=accelerator.num_processes, threads=torch.get_num_threads(), device=accelerator.device.type
    )
    rounds.log.record({"kind": "run"} | sizes | {"machine": machine})


def self_test(rounds: Rounds) -> None:
    """See on one batch that every active loss term moves what it should; says so in a line. Raises InputError if not."""
    started = time.perf_counter()
    findings = check_terms(rounds.generator, rounds.retriever, rounds.corpus, rounds.settings)
    seconds = round(time.perf_counter() - started, 2)
    rounds.log.record({"kind": "self-test", "seconds": seconds, "terms": [finding.row() for finding in findings]})
    refuse(gather_object([finding.fault for finding in findings]))  # a fault of one process stops them all
    rounds.log.say(one_line(findings, seconds))


def finish(rounds: Rounds, started: float) -> None:
    """Cards, the tables, three answers, what to try next; then the Hub if asked. Raises PushError if that fails."""
    settings, folder, accelerator = rounds.settings, rounds.folder, rounds.accelerator
    rounds.log.say(f"\n{rounds.log.results()}\n\n{rounds.log.times()}\n")
    if accelerator.is_main_process:
        rounds.write_cards()
        newest = sorted((folder / "examined").glob("*.jsonl"))[-1]
        rows = [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]
        audit_leaks(rounds, rows)
        rounds.log.say(f"Some of its answers:\n\n{examples(rows)}\n")
        rounds.log.say(
            f"Done in {(time.perf_counter() - started) / 60:.1f} minutes. {folder}/ holds generator/, retriever/, index/ and metrics.jsonl. Try:\n"
            f'  cozyrag ask {folder} "{rows[0]["question"]}"\n'
            f"  accelerate launch train.py --questions your-questions.tsv --passages your-passages.jsonl --output_dir my-rag"
        )
    accelerator.end_training()
    if rounds.pusher is not None:
        rounds.log.say(f"Pushed to {rounds.pusher.finish(f'round-{settings.training.rounds}')}")
    if accelerator.is_main_process:  # last: whatever happens to it, the run is whole and uploaded
        rounds.log.say(tell_report(folder, rounds.generator, context_tokens=settings.contexts.context_tokens))
