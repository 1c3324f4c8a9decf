"""Whether a tokenizer and a generator fit: an end token, and embeddings for the tokens of every prompt.

Checked when a generator is loaded, because training would otherwise stop at some text hours later. Left out: what
prompts look like (prompts.py), whether the model's logits are understood (loading.py).
"""

import warnings

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cozyrag.errors import InputError
from cozyrag.runtime.terminal import one_line

RESIZE = "`model.resize_token_embeddings(len(tokenizer))`"


def outside(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens, with their ids, for which the model has no embedding. More embeddings than tokens are usual."""
    rows = model.get_input_embeddings().weight.shape[0]
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values(), default=0) < rows:
        return {}
    return {token: number for token, number in sorted(vocabulary.items(), key=lambda each: each[1]) if number >= rows}


def check_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError for a tokenizer without EOS; the message names the one of the configuration."""
    if tokenizer.eos_token_id is not None:
        return
    number = model.config.get_text_config().eos_token_id
    named = tokenizer.convert_ids_to_tokens(number) if isinstance(number, int) else None
    raise InputError(
        f"Expected a tokenizer with an end-of-sequence token, found none in {_name(tokenizer)}: no answer would ever "
        f"end. Name one with `tokenizer.eos_token = {named or '</s>'!r}` and save the tokenizer, or choose another "
        "--generator."
    )


def check_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, needed: set[int | None]) -> None:
    """Raise InputError for a tokenizer with ids that the model has no embeddings for.

    A special token without an embedding that no prompt needs, such as a padding token that was added to the tokenizer
    alone or Gemma's placeholder for images, is not refused: a warning says that it is read as ordinary characters.

    Args:
        needed: ids that are in every prompt, or that any text may need.
    """
    name = _name(tokenizer)
    unknown = outside(model, tokenizer)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    refused = [token for token, number in unknown.items() if token not in special or number in needed]
    if refused:
        raise InputError(
            f"Expected embeddings for all tokens of the tokenizer in {name}, found "
            f"{model.get_input_embeddings().weight.shape[0]} embeddings, and {refused[0]!r} with id "
            f"{unknown[refused[0]]}{_more(refused)}: training would stop at the first text with such a token. "
            f"Resize the embeddings with {RESIZE} and save both, use the tokenizer that belongs to the model, or "
            "choose another --generator."
        )
    others = [token for token in unknown if token != tokenizer.pad_token]
    if others:
        warnings.warn(
            f"The generator has no embedding for {others[0]!r}{_more(others)}, a special token of its tokenizer in "
            f"{one_line(name)}. Where a text contains it, it is read as ordinary characters; if it matters, resize the "
            f"embeddings with {RESIZE} first.",
            stacklevel=3,
        )


def _more(tokens: list[str]) -> str:
    return f" (and {len(tokens) - 1} more)" if len(tokens) > 1 else ""


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
