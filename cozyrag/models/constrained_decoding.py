"""Answers made of the context's own words: which tokens may come next so that the answer stays a span of the context.

A small generator often knows where the answer stands and loses it half-way, because every step chooses from the whole
vocabulary. Here each step chooses among the tokens that continue a word sequence of the context, or ends the answer behind
a whole word (constrained decoding, as in extractive question answering; Rajpurkar et al. 2016). Works with any tokenizer that
tells where its tokens stand: every suffix of the context that begins a word is tokenized as an answer would be. Left out: the search (greedy_decoding.py).
"""

import re

import numpy as np
from transformers import PreTrainedTokenizerBase

BEGIN = re.compile(r"\b\w|(?<!\S)\S")  # a word, or a mark that stands apart, as "£" or "("
LETTERS = 12  # of the context for each token that may be written: more than any tokenizer needs


class Spans:
    """The spans of one context, as an answer's tokens.

    Args:
        tokenizer: the generator's. context: what it reads. lead: what training puts before an answer.
        end: the token that ends an answer. longest, shortest: limits of an answer, in tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: str,
        *,
        lead: str,
        end: int,
        longest: int,
        shortest: int = 0,
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
        fitting = (self.tokens[:, :count] == written).all(axis=1)
        following = self.tokens[fitting, count]
        allowed = np.unique(following[following >= 0]).tolist()
        if count and self.may_end[fitting, count].any() or not allowed:
            allowed.append(self.end)
        return allowed


def _beginning(text: str, longest: int) -> str:
    """Enough whole words for `longest` tokens and one more."""
    cut = text.find(" ", LETTERS * (longest + 1))
    return text if cut < 0 else text[:cut]


def _suffix_table(
    tokenizer: PreTrainedTokenizerBase, suffixes: list[str], longest: int, shortest: int
) -> tuple[np.ndarray, np.ndarray]:
    """(n_suffixes, longest + 1) token ids, -1 behind a suffix's end, and whether an answer may end before each of them."""
    if suffixes:
        made = tokenizer(suffixes, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        rows = list(zip(suffixes, made["input_ids"], made["offset_mapping"], strict=True))
    else:
        rows = []
    rows = [row for row in rows if len(row[1]) >= shortest]
    tokens = np.full((len(rows), longest + 1), -1)
    may_end = np.zeros((len(rows), longest + 1), dtype=bool)
    for number, (text, ids, places) in enumerate(rows):
        kept = min(len(ids), longest + 1)
        tokens[number, :kept] = ids[:kept]
        begins, ends = np.array(places[:kept]).reshape(-1, 2).T
        whole = begins >= np.concatenate([[0], ends[:-1]])  # a token may be a part of a character's bytes
        may_end[number, :kept] = [
            is_whole and _is_boundary(text, at) for is_whole, at in zip(whole, begins, strict=True)
        ]
        may_end[number, kept:] = True
    return tokens, may_end


def _is_boundary(text: str, place: int) -> bool:
    """Whether no word is cut in two before the character at `place`."""
    return place == 0 or not (text[place - 1].isalnum() and text[place].isalnum())
