"""Extractive answers: the tokens that may come next so that the answer stays a span of the context.

A small generator often finds the answer and then drifts from it, because every step chooses from the whole vocabulary.
Here each step chooses among the tokens that continue a word sequence of the context, or ends the answer after a whole
word (constrained decoding, as in extractive question answering; Rajpurkar et al. 2016). Works with any fast tokenizer:
every suffix of the context that begins a word is tokenized as an answer would be.
Left out: the search (greedy_decoding.py).
"""

import re

import numpy as np
from transformers import PreTrainedTokenizerBase

BEGIN = re.compile(r"\b\w|(?<!\S)\S")  # a word, or a mark after a space, such as "£" or "("
LETTERS = 12  # of the context per token of an answer: more than any tokenizer needs


class Spans:
    """The spans of one context, as tokens of an answer.

    Args:
        tokenizer: of the generator. context: the text it reads. lead: the text before an answer in training.
        end: the token that ends an answer. longest, shortest: limits of an answer, in tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, context: str, *, lead: str, end: int, longest: int, shortest: int = 0
    ):
        suffixes = [lead + _beginning(context[match.start() :], longest) for match in BEGIN.finditer(context)]
        self.end = end
        self.tokens, self.may_end = _suffix_table(tokenizer, suffixes, longest, shortest)

    def __bool__(self) -> bool:
        return len(self.tokens) > 0

    def next_tokens(self, written: np.ndarray) -> list[int]:
        """Token ids that may follow the tokens (n,) written so far; never empty."""
        count = len(written)
        if count >= self.tokens.shape[1]:
            return [self.end]
        matching = (self.tokens[:, :count] == written).all(axis=1)
        following = self.tokens[matching, count]
        allowed = np.unique(following[following >= 0]).tolist()
        if count and self.may_end[matching, count].any() or not allowed:
            allowed.append(self.end)
        return allowed


def _beginning(text: str, longest: int) -> str:
    """Enough whole words for `longest` tokens and one more."""
    cut = text.find(" ", LETTERS * (longest + 1))
    return text if cut < 0 else text[:cut]


def _suffix_table(
    tokenizer: PreTrainedTokenizerBase, suffixes: list[str], longest: int, shortest: int
) -> tuple[np.ndarray, np.ndarray]:
    """(n_suffixes, longest + 1) token ids, -1 after a suffix's end, and whether an answer may end before each."""
    rows = []
    if suffixes:
        encoded = tokenizer(suffixes, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        rows = list(zip(suffixes, encoded["input_ids"], encoded["offset_mapping"], strict=True))
        rows = [row for row in rows if len(row[1]) >= shortest]
    tokens = np.full((len(rows), longest + 1), -1)
    may_end = np.ones((len(rows), longest + 1), dtype=bool)
    for number, (text, ids, offsets) in enumerate(rows):
        kept = min(len(ids), longest + 1)
        tokens[number, :kept] = ids[:kept]
        begins, ends = np.array(offsets[:kept]).reshape(-1, 2).T
        whole = begins >= np.concatenate([[0], ends[:-1]])  # a token may be a part of a character's bytes
        may_end[number, :kept] = [each and _is_boundary(text, at) for each, at in zip(whole, begins, strict=True)]
    return tokens, may_end


def _is_boundary(text: str, place: int) -> bool:
    """Whether the character at `place` does not continue a word."""
    return place == 0 or not (text[place - 1].isalnum() and text[place].isalnum())
