"""Which values settings may have: special names, ranges, and combinations that do not work.

Each check looks at one flat dictionary of all settings before anything is loaded. Left out: types and defaults
(config.py), missing files (the readers).
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from cozyrag.data.delimited import delimiter_of
from cozyrag.data.matching import STEMMERS
from cozyrag.data.rows import Columns
from cozyrag.errors import InputError
from cozyrag.models.smollm2 import SMOLLM2
from cozyrag.retrieval.lance_database import database_of

EMBEDDED = "embedded"
SCRATCH = "scratch"
QUICKSTART = "quickstart"
SYNTHETIC = "synthetic"
COLUMNS = tuple(each.name for each in fields(Columns))
TRACKERS = ("mlflow", "wandb", "tensorboard", "trackio")
# Lowest and highest value, None for no limit.
RANGES: dict[tuple[float, float | None], str] = {
    (0.0, 0.5): "eval_share",
    (1, None): (
        "max_questions max_eval_questions threads top_k context_tokens encode_batch_size answer_batch_size "
        "generator_batch_size reranker_batch_size gradient_accumulation_steps max_skipped_steps refresh_steps "
        "repeat_ngram short_tokens answer_tokens logging_steps save_total_limit"
    ),
    (0, 2**32 - 1): "seed",
    (0.0, 0.99): "dropout lora_dropout",
    (0, None): (
        "lora_rank rounds generator_epochs retriever_epochs generator_steps retriever_steps "
        "reranker_epochs reranker_steps generator_learning_rate retriever_learning_rate reranker_learning_rate "
        "weight_decay contrastive_weight sentence_weight "
        "feedback_weight repeat_penalty keyword_penalty short_penalty min_answer_tokens no_repeat_ngram_size "
        "save_steps save_minutes"
    ),
    (1e-09, None): "lora_alpha max_grad_norm",
    (8, None): "passage_tokens",
    (0.0, 1.0): "context_noise warmup_ratio refresh_overlap",
    (2, None): "retriever_batch_size",
    (0, 50): "hard_negatives",
    (0.0001, None): "temperature feedback_temperature",
    (2, 60): "feedback_passages rerank_passages",
}


def column_names(pairs: Sequence[str]) -> dict[str, str]:
    """The columns named by pairs such as "question=q". Raises InputError for a malformed pair or an unknown name."""
    names = {}
    for pair in pairs:
        name, _, column = pair.partition("=")
        if name not in COLUMNS or not column:
            raise InputError(f"--columns: expected name=column with a name among {', '.join(COLUMNS)}, found {pair!r}.")
        names[name] = column
    return names


def check_values(values: dict) -> None:
    """Check all settings, as `Settings.to_dict` gives them. Raises InputError for the first that cannot work."""
    column_names(values["columns"])
    if values["delimiter"] is not None:
        delimiter_of(values["delimiter"])
    _check_ranges(values)
    _check_choices(values)
    _check_synthetic(values)
    _check_training(values)
    _check_answers(values)
    _check_hub(values)
    if values["resume"] and values["overwrite_output_dir"]:
        raise InputError(
            "--resume continues the run in --output_dir and --overwrite_output_dir deletes it: give only one of them."
        )


def _check_ranges(values: dict) -> None:
    limits = {name: limit for limit, names in RANGES.items() for name in names.split()}
    for name, value in values.items():
        low, high = limits.get(name, (-math.inf, None))
        if name in limits and value is not None and not (low <= value and (high is None or value <= high)):
            most = "" if high is None else f" and at most {high}"
            raise InputError(f"--{name}: expected a value of at least {low}{most}, found {value}.")
    endless = [name for name, value in values.items() if isinstance(value, float) and math.isinf(value)]
    if endless:
        raise InputError(f"--{endless[0]}: expected a finite number, found {values[endless[0]]}.")


def _check_choices(values: dict) -> None:
    if values["stemmer"] not in STEMMERS:
        raise InputError(f"--stemmer: expected one of {', '.join(STEMMERS)}, found {values['stemmer']!r}.")
    foreign = [name for name in values["report_to"] if name not in (*TRACKERS, "none")]
    if foreign:
        raise InputError(f"--report_to: expected none or any of {', '.join(TRACKERS)}, found {foreign[0]!r}.")


def _check_synthetic(values: dict) -> None:
    if values["questions"] == SYNTHETIC and not values["passages"]:
        raise InputError("--questions synthetic: expected --passages to make questions from, found none. Give them.")


def _check_training(values: dict) -> None:
    if values["lora_rank"] and values["generator"] == SCRATCH:
        raise InputError(
            "--lora_rank: expected a pretrained generator, found scratch, which is not saved beside its adapter. "
            "Give another --generator, or omit --lora_rank."
        )
    if not any(values[name] for name in ("contrastive_weight", "sentence_weight", "feedback_weight")):
        raise InputError(
            "--contrastive_weight, --sentence_weight, --feedback_weight: expected at least one above 0, found all 0, "
            "so the retriever would have no loss. Set one of them, or --retriever_steps 0."
        )
    _check_database(values)
    untrained = next((f"--{name} 0" for name in ("reranker_steps", "reranker_epochs") if values[name] == 0), None)
    if values["reranker"] == EMBEDDED and untrained:
        raise InputError(
            "--reranker embedded: expected it to be trained, because all its scores are equal before; found "
            f"{untrained}. Omit one of the two, or name a trained reranker."
        )
    if values["freeze_document_encoder"] and values["index_refresh"] != "phase":
        raise InputError(
            f"--index_refresh {values['index_refresh']}: with --freeze_document_encoder the vectors of passages never "
            "change. Omit one of the two."
        )


def _check_database(values: dict) -> None:
    learns = values["rounds"] and values["retriever_epochs"] and values["retriever_steps"] != 0
    if values["index"] and database_of(values["index"]) and learns and not values["freeze_document_encoder"]:
        raise InputError(
            f"--index {values['index']}: expected vectors of passages that stay as they are, but this run trains their "
            "encoder, and a database is not written again in each round. Give --freeze_document_encoder True, "
            "--retriever_steps 0, or an index in a folder."
        )


def _check_answers(values: dict) -> None:
    if values["extractive"] and values["no_repeat_ngram_size"]:
        raise InputError(
            "--extractive: expected --no_repeat_ngram_size 0, because spans of a text may repeat n-grams; found "
            f"{values['no_repeat_ngram_size']}. Omit one of the two."
        )
    if values["min_answer_tokens"] > values["answer_tokens"]:
        raise InputError(
            f"--min_answer_tokens: expected at most --answer_tokens, {values['answer_tokens']}, found "
            f"{values['min_answer_tokens']}."
        )


def _check_hub(values: dict) -> None:
    name = values["hub_model_id"]
    if values["push_to_hub"] and not name:
        raise InputError("--push_to_hub: expected --hub_model_id user/name as its target, found none.")
    if values["push_to_hub"] and values["lora_rank"] and _is_local(values["generator"]):
        raise InputError(
            f"--push_to_hub: the adapter of --lora_rank would name {values['generator']}, which nobody else could "
            "load. Name a model on the Hub, or omit --push_to_hub and push what `cozyrag merge` makes of the run."
        )
    if name:
        from huggingface_hub.errors import HFValidationError  # here: a quarter of a second that other settings save
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise InputError(f"--hub_model_id: expected user/name, found {name!r} ({error}).") from error


def _is_local(generator: str) -> bool:
    """Whether others could not load this generator by its name."""
    return generator == SMOLLM2 or Path(generator).is_dir()
