"""What every run and several commands start with: the Accelerator and its precision, the tables, and the two models.

No other module makes an Accelerator. Left out: what is then done with them (run.py, the commands).
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import datasets
import faiss
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, parse_flag_from_env, set_seed

from cozyrag.config import Settings
from cozyrag.config_checks import EMBEDDED, QUICKSTART, SCRATCH
from cozyrag.data.corpus import Corpus, load_corpus
from cozyrag.errors import InputError
from cozyrag.models.fsdp import CONFIGS, LAUNCHED, check_sharding
from cozyrag.models.generator import Generator
from cozyrag.models.int8_encoding import check_int8, reading_precision
from cozyrag.models.retriever import Retriever
from cozyrag.models.smollm2 import SMOLLM2
from cozyrag.runtime.assets import GENERATOR_FOLDER
from cozyrag.runtime.assets import QUICKSTART as QUICKSTART_FILES
from cozyrag.runtime.distributed import refuse
from cozyrag.runtime.precision import Precision, agreed, check_asked, choose
from cozyrag.training.tracking import wanted_trackers

LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "NCCL communicator was aborted",
    "Timed out waiting",
)
SPLITTING = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}  # every model of a run
PATIENCE = timedelta(minutes=30)  # for a process that others wait for: more than the longest act that one does alone


@contextlib.contextmanager
def peers_lost() -> Iterator[None]:
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


def training_accelerator(settings: Settings, kept: Precision | None = None) -> tuple[Accelerator, Precision]:
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
    with peers_lost():
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
        info=accelerator.print,
    )


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
    if settings.training.freeze_document_encoder:
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
