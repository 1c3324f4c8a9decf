"""Which values settings may have: names with a meaning of their own, ranges, and what cannot go together.

Each check looks at one flat dictionary of all settings, before anything is loaded, and refuses with the setting, what was
expected and what was found. Left out: types and defaults (config.py), files that do not exist (whoever reads them).
"""

import math
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from cozyrag.errors import InputError
from cozyrag.models.smollm2 import SMOLLM2
from cozyrag.retrieval.bm25 import STEMMERS

EMBEDDED = "embedded"
SCRATCH = "scratch"
QUICKSTART = "quickstart"
TRACKERS = ("mlflow", "wandb", "tensorboard")
RANGES = {
    "eval_share": (0.0, 0.5), "max_questions": (1, None), "max_eval_questions": (1, None), "seed": (0, 2**32 - 1), "threads": (1, None),
    "dropout": (0.0, 0.99), "lora_rank": (0, None), "lora_alpha": (1e-9, None), "lora_dropout": (0.0, 0.99),
    "top_k": (1, None), "passage_tokens": (8, None), "context_tokens": (1, None), "context_noise": (0.0, 1.0),
    "encode_batch_size": (1, None), "answer_batch_size": (1, None), "generator_batch_size": (1, None), "retriever_batch_size": (2, None),
    "rounds": (0, None), "generator_epochs": (0.0, None), "retriever_epochs": (0.0, None), "generator_steps": (0, None), "retriever_steps": (0, None),
    "generator_learning_rate": (0.0, None), "retriever_learning_rate": (0.0, None), "warmup_ratio": (0.0, 1.0), "weight_decay": (0.0, None),
    "max_grad_norm": (1e-9, None), "gradient_accumulation_steps": (1, None), "max_skipped_steps": (1, None),
    "hard_negatives": (0, 50), "temperature": (1e-4, None), "contrastive_weight": (0.0, None), "sentence_weight": (0.0, None), "feedback_weight": (0.0, None),
    "feedback_passages": (2, 60), "feedback_temperature": (1e-4, None), "refresh_steps": (1, None), "refresh_overlap": (0.0, 1.0),
    "repeat_penalty": (0.0, None), "keyword_penalty": (0.0, None), "short_penalty": (0.0, None), "repeat_ngram": (1, None), "short_tokens": (1, None),
    "answer_tokens": (1, None), "min_answer_tokens": (0, None), "no_repeat_ngram_size": (0, None),
    "logging_steps": (1, None), "save_steps": (0, None), "save_total_limit": (1, None), "save_minutes": (0.0, None),
}  # fmt: skip


def check_values(values: dict) -> None:
    """Refuse what cannot work.

    Args:
        values: every setting by name, as `Settings.to_dict` gives them.

    Raises:
        InputError: the first value, or the first two values, that cannot work.
    """
    _check_ranges(values)
    _check_choices(values)
    _check_training(values)
    _check_answers(values)
    _check_hub(values)
    if values["resume"] and values["overwrite_output_dir"]:
        raise InputError(
            "--resume goes on with what --output_dir holds and --overwrite_output_dir deletes it: give one of the two."
        )


def _check_ranges(values: dict) -> None:
    for name, (low, high) in RANGES.items():
        value = values[name]
        if value is not None and not (low <= value and (high is None or value <= high)):
            raise InputError(
                f"--{name}: expected a value of at least {low}{f' and at most {high}' if high is not None else ''}, found {value}."
            )
    endless = [name for name, value in values.items() if isinstance(value, float) and math.isinf(value)]
    if endless:
        raise InputError(f"--{endless[0]}: expected a finite number, found {values[endless[0]]}.")


def _check_choices(values: dict) -> None:
    if values["stemmer"] not in STEMMERS:
        raise InputError(f"--stemmer: expected one of {', '.join(STEMMERS)}, found {values['stemmer']!r}.")
    foreign = [name for name in values["report_to"] if name not in (*TRACKERS, "none")]
    if foreign:
        raise InputError(f"--report_to: expected none or any of {', '.join(TRACKERS)}, found {foreign[0]!r}.")


def _check_training(values: dict) -> None:
    if values["lora_rank"] and values["generator"] == SCRATCH:
        raise InputError(
            "--lora_rank: expected a generator that has learned something, found scratch, which is not saved with an adapter. "
            "Give another --generator, or leave --lora_rank out."
        )
    if not any(values[name] for name in ("contrastive_weight", "sentence_weight", "feedback_weight")):
        raise InputError(
            "--contrastive_weight, --sentence_weight and --feedback_weight are all 0: the retriever would learn from nothing. Give one of them, or "
            "--retriever_steps 0."
        )
    if values["freeze_document_encoder"] and values["index_refresh"] != "phase":
        raise InputError(
            f"--index_refresh {values['index_refresh']}: with --query_side_only the vectors of passages never change. Leave one of the two out."
        )


def _check_answers(values: dict) -> None:
    if values["extractive"] and values["no_repeat_ngram_size"]:
        raise InputError(
            "--extractive: expected --no_repeat_ngram_size 0, because a text may repeat itself; found "
            f"{values['no_repeat_ngram_size']}. Leave one of the two out."
        )
    if values["min_answer_tokens"] > values["answer_tokens"]:
        raise InputError(
            f"--min_answer_tokens: expected at most --answer_tokens, {values['answer_tokens']}, found {values['min_answer_tokens']}."
        )


def _check_hub(values: dict) -> None:
    name = values["hub_model_id"]
    if values["push_to_hub"] and not name:
        raise InputError("--push_to_hub: expected --hub_model_id user/name to say where to, found none.")
    if values["push_to_hub"] and values["lora_rank"] and _is_here_only(values["generator"]):
        raise InputError(
            f"--push_to_hub: the adapter of --lora_rank would name {values['generator']}, which nobody else could load. Name a model "
            "on the Hub, or leave --push_to_hub out and push what `cozyrag merge` makes of the finished run."
        )
    if name:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise InputError(f"--hub_model_id: expected user/name, found {name!r} ({error}).") from error


def _is_here_only(generator: str) -> bool:
    """Whether a generator is no model on the Hub under the name that the settings give it."""
    return generator == SMOLLM2 or Path(generator).is_dir()
