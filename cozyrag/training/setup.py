"""Set-up of runs and commands: the Accelerator and its precision, the tables, and the models.

No other module makes an Accelerator. Left out: what happens with them (run.py, the commands).
"""

import contextlib
import os
import sys
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

from cozyrag.config import Settings
from cozyrag.config_checks import EMBEDDED, QUICKSTART, SCRATCH, column_names
from cozyrag.data.corpus import Corpus, load_corpus
from cozyrag.data.delimited import delimiter_of
from cozyrag.data.rows import Columns
from cozyrag.errors import InputError
from cozyrag.models.fsdp import CONFIGS, LAUNCHED, check_sharding
from cozyrag.models.generator import Generator
from cozyrag.models.int8_encoding import check_int8, reading_precision
from cozyrag.models.reranker import Reranker
from cozyrag.models.retriever import Retriever
from cozyrag.models.smollm2 import SMOLLM2
from cozyrag.retrieval.lance_database import database_of
from cozyrag.retrieval.passage_index import indexed_passages
from cozyrag.runtime.assets import GENERATOR_FOLDER
from cozyrag.runtime.assets import QUICKSTART as QUICKSTART_FILES
from cozyrag.runtime.distributed import refuse
from cozyrag.runtime.precision import Precision, agreed, check_asked, choose
from cozyrag.runtime.terminal import say
from cozyrag.training.checkpointing import load_generator
from cozyrag.training.synthetic import is_synthetic, synthetic_files
from cozyrag.training.tracking import wanted_trackers

LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "NCCL communicator was aborted",
    "Timed out waiting",
)
# These would shard every model of a run.
SPLITTING = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}
PATIENCE = timedelta(minutes=30)  # longer than the longest step that one process does alone


@contextlib.contextmanager
def peers_lost() -> Iterator[None]:
    """Turn the traceback of a lost connection into an InputError that names the cause."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST):
            raise
        raise InputError(
            f"Another process of this run has ended or cannot be reached ({' '.join(str(error).split())[:200]}); see "
            "its own message. Give the same command again: it resumes from the last checkpoint."
        ) from error


def training_accelerator(settings: Settings, kept: Precision | None = None) -> tuple[Accelerator, Precision]:
    """The Accelerator of a run, and the precision of its training, which is written into the settings.

    kept: the precision that an interrupted run began with. Raises InputError as make_accelerator does.
    """
    state = _start_processes(settings)
    precision = _agree_on_precision(state.device.type, settings.training.mixed_precision, kept)
    settings.training.mixed_precision = precision.name  # type: ignore[assignment]  # a launch may ask for fp8 too
    accelerator = _make_accelerator(settings, state)
    sharding = settings.training.generator_sharding
    check_sharding(sharding, processes=accelerator.num_processes, precision=accelerator.mixed_precision)
    check_int8(settings.contexts.index_precision, str(accelerator.device), "--index_precision")
    return accelerator, precision


def _agree_on_precision(device: str, asked: str | None, kept: Precision | None) -> Precision:
    """One precision for all processes. Raises InputError on all of them if one refuses."""
    choice, fault = None, None
    with peers_lost():
        kept = broadcast_object_list([kept])[0]  # only the main process has read the folder
        try:
            choice = choose(device, asked, kept)
        except InputError as error:
            fault = str(error)
        answers = gather_object([(choice, fault)])
    refuse(fault for _, fault in answers)
    return agreed([choice for choice, _ in answers])


def make_accelerator(settings: Settings) -> Accelerator:
    """The Accelerator of a command that does not train.

    Raises:
        InputError: several processes were started but would not work together, or the precision is not available.
    """
    state = _start_processes(settings)
    check_asked(settings.training.mixed_precision, state.device.type, emulated=True)
    return _make_accelerator(settings, state)


def _start_processes(settings: Settings) -> PartialState:
    """Connect the processes of this launch and set their threads.

    The Accelerator takes this state over, so the processes can agree on its precision before it is made.
    """
    training = settings.training
    os.environ.pop(LAUNCHED, None)  # it is in the settings; Accelerate itself would shard the retriever too
    cpu = training.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if "MASTER_PORT" in os.environ and "RANK" not in os.environ:
        raise InputError(
            "Expected several processes, but accelerate launch started one without a rank (as it does for "
            "`--cpu --num_processes N` and MULTI_CPU): it would train alone. Use `accelerate launch --config_file "
            "accelerate_configs/cpu_ddp.yaml train.py`."
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
            f"Expected {os.environ['WORLD_SIZE']} connected processes, found one without the others: they would "
            "overwrite each other's files. Launch with accelerate_configs/cpu_ddp.yaml or multi_gpu.yaml."
        )
    if accelerator.distributed_type in SPLITTING:
        raise InputError(
            "Expected a launch that leaves sharding to --generator_sharding, found "
            f"{accelerator.distributed_type.value}, which would shard models that are evaluated and saved whole "
            f"between phases. Use {CONFIGS}, which shards what ZeRO-2 does; for a large generator, --lora_rank 16 "
            "also helps."
        )
    transformers.utils.logging.disable_progress_bar()  # "Loading weights"; our own bars are more informative
    datasets.disable_progress_bars()
    set_seed(settings.training.seed)
    return accelerator


@contextlib.contextmanager
def bars_restored() -> Iterator[None]:
    """Show the progress bars of transformers and datasets again afterwards, if they were shown before."""
    loading, mapping = transformers.utils.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    try:
        yield
    finally:
        if loading:
            transformers.utils.logging.enable_progress_bar()
        if not mapping:
            datasets.enable_progress_bars()


def _set_threads(threads: int | None) -> None:
    """Give the thread pools of PyTorch and FAISS this process's share of the cores.

    accelerate launch sets OMP_NUM_THREADS=1 by default, which would leave the other cores of a desktop idle.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def load_tables(accelerator: Accelerator, settings: Settings) -> Corpus:
    """Training questions, validation questions and passages. "quickstart" stands for the files of the package,
    "synthetic" for those that a run has made."""
    data = settings.data
    given = vars(data)
    files = {name: given[name] for name in QUICKSTART_FILES}
    if data.questions == QUICKSTART:
        files = {name: QUICKSTART_FILES[name] if file in (None, QUICKSTART) else file for name, file in files.items()}
    if is_synthetic(settings):
        files = synthetic_files(settings)
    folder = data.index if data.index and database_of(data.index) is None else None
    return load_corpus(
        **files,
        indexed=partial(indexed_passages, folder) if folder else None,
        questions_split=data.questions_split,
        eval_split=data.eval_split,
        passages_split=data.passages_split,
        columns=Columns(**column_names(data.columns)),
        max_questions=data.max_questions,
        max_eval_questions=data.max_eval_questions,
        eval_share=data.eval_share,
        skip_bad_rows=data.skip_bad_rows,
        needs_answer=not settings.training.no_answer,
        delimiter=delimiter_of(data.delimiter) if data.delimiter else None,
        seed=settings.training.seed,
        info=lambda text: say(text) if accelerator.is_main_process else None,
    )


def load_models(
    accelerator: Accelerator, settings: Settings, corpus: Corpus, newest: Path | None
) -> tuple[Generator, Retriever, Reranker | None]:
    """The models on this process's device: those of the checkpoint `newest`, else those that the settings name."""
    models, device, reads = settings.models, accelerator.device, settings.contexts.passage_tokens
    if newest:
        generator = load_generator(newest, dropout=models.dropout)
        retriever = Retriever.load(str(newest / "retriever"), max_tokens=reads, device=str(device))
    else:
        generator = named_generator(settings, corpus.passages)
        if models.retriever == EMBEDDED:
            retriever = Retriever.load_embedded(max_tokens=reads, device=str(device))
        else:
            retriever = Retriever.load(
                models.retriever, revision=models.retriever_revision, max_tokens=reads, device=str(device)
            )
        retriever.use_prompts(models.retriever, query=models.query_prompt, passage=models.passage_prompt)
    generator.check_room(settings.contexts.context_tokens, settings.contexts.answer_tokens)
    if settings.training.sentence_weight and not retriever.reads_sentences:
        raise InputError(
            "--sentence_weight: expected a retriever with mean pooling, because the vector of a sentence is the mean "
            f"over its tokens; found {models.retriever}. Give another --retriever, or omit --sentence_weight."
        )
    if settings.training.freeze_document_encoder:
        retriever.freeze_documents()
    reranker = _load_reranker(settings, newest, device)
    for model in (generator, retriever, reranker):
        if model is not None:
            model.precision = reading_precision(accelerator.mixed_precision)
    generator.model.to(device)
    return generator, retriever, reranker


def _load_reranker(settings: Settings, newest: Path | None, device: torch.device) -> Reranker | None:
    name = settings.models.reranker
    if name is None:
        return None
    if newest is None and name == EMBEDDED:
        return Reranker.load_embedded(device=str(device))
    return Reranker.load(str(newest / "reranker" if newest else name), device=str(device))


def named_generator(settings: Settings, passages: datasets.Dataset) -> Generator:
    """The generator that the settings name, on the CPU; an untrained one reads the passages for its tokenizer."""
    models = settings.models
    if models.generator == SCRATCH:
        return Generator.from_scratch(passages[:]["text"])
    name = str(GENERATOR_FOLDER) if models.generator == EMBEDDED else models.generator
    chat = models.chat_template == "on" or models.chat_template == "auto" and models.generator != SMOLLM2
    generator = Generator.load(name, revision=models.generator_revision, dropout=models.dropout, chat_template=chat)
    if models.lora_rank and not generator.is_adapter:  # an adapter is trained further
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
