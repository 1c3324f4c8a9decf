"""Words of any script, and whether a text contains an answer: one normalisation for positives, negatives, checks, BM25.

Exact match and F1 keep the normalisation of SQuAD (metrics.py). Whatever that one equates, this one equates too; it
also folds what people type in several ways (curly quotes, dashes, soft hyphens, composed accents, widths) and knows
scripts without spaces. Accents stay as written: "resume" is not "résumé". Left out: stemming (bm25.py), synonyms.
"""

import re
import string
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

import regex
import Stemmer

STEMMERS = ("none", *Stemmer.algorithms())  # of BM25
_QUOTES, _DOUBLE_QUOTES = "‘’‚‛‹›′`´ʹʻʼʽ", "“”„‟«»″"
_DASHES = "‐‑‒–—―−⁃"
# Soft hyphens, zero-width and direction marks (Cf), variation selectors, the Arabic tatweel, and the trademark signs,
# which NFKC would turn into letters.
_WITHOUT_WIDTH = regex.compile(r"[\p{Cf}\p{Variation_Selector}\u034f\u0640™℠]+")
_TYPED = str.maketrans(dict.fromkeys(_QUOTES, "'") | dict.fromkeys(_DOUBLE_QUOTES, '"') | dict.fromkeys(_DASHES, "-"))
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_THOUSANDS = regex.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# Scripts without spaces, or (Hangul) with particles written to the word: a character with its marks is a word.
_BASE = r"[[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]&&[\p{L}\p{N}]]"
_OTHERS = rf"[[\p{{L}}\p{{M}}\p{{N}}]--{_BASE}]+"
_WORDS = regex.compile(rf"(?V1){_OTHERS}(?:(?<=\d)[.,](?=\d){_OTHERS})*|{_BASE}\p{{M}}*")  # "3.5" is one word
# Most texts have neither such characters nor marks, and `re` reads them three times as fast.
_UNUSUAL = regex.compile(rf"(?V1){_BASE}|\p{{M}}")
_USUAL_WORDS = re.compile(r"[^\W_]+(?:(?<=\d)[.,](?=\d)[^\W_]+)*")
_SINGLE = regex.compile(rf"(?V1){_BASE}\p{{M}}*")
_ARTICLES = frozenset(("a", "an", "the"))


def fold(text: str) -> str:
    """The text without differences of typing: NFKC, case folded, plain quotes and dashes, no marks without width."""
    if text.isascii():
        return text.lower()
    # Twice, since NFKC and case folding make further marks: a prime of a double prime, an apostrophe of "ŉ".
    return _typed_plainly(_typed_plainly(text).casefold())


def words(text: str) -> list[str]:
    """The words of a text, folded: runs of letters, marks and digits; single characters in scripts without spaces.

    Numbers keep their decimals and lose separators of thousands: "1,250.5" is "1250.5".
    """
    return _split(fold(text))


def search_words(text: str) -> list[str]:
    """`words`, and the pairs of neighbouring characters in scripts without spaces, which are rarer than one alone."""
    folded = fold(text)
    found = _split(folded)
    if not _is_unusual(folded):
        return found
    pairs = zip(found, found[1:], strict=False)
    return found + [left + right for left, right in pairs if _SINGLE.fullmatch(left) and _SINGLE.fullmatch(right)]


def word_forms(text: str) -> list[tuple[str, ...]]:
    """The words of a text without articles, in one or two forms: punctuation separates words, or it is dropped.

    The second form is SQuAD's: "U.S." is "us", "co-operation" is "cooperation"; it is left out where it is the same.
    """
    folded = fold(text)
    forms = (_split(folded), _split(folded.translate(_WITHOUT_PUNCTUATION)))
    return list(dict.fromkeys(tuple(word for word in form if word not in _ARTICLES) for form in forms))


def matching_form(text: str) -> str:
    """The text as `contains_answer` takes it: its forms on a line each, words between spaces."""
    return "\n".join(f" {' '.join(form)} " for form in word_forms(text))


def contains_answer(form: str, answers: Iterable[str]) -> bool:
    """Whether some answer, unless it has no words, occurs as whole words in a text, given as its `matching_form`."""
    return any(run in form for answer in answers for run in _runs(answer))


def comparable(text: str) -> str:
    """The words of a text in its last form, single spaces between: equal for texts that differ in typing alone."""
    return " ".join(word_forms(text)[-1])


def _typed_plainly(text: str) -> str:
    composed = unicodedata.normalize("NFC", text)
    return unicodedata.normalize("NFKC", _WITHOUT_WIDTH.sub("", composed).translate(_TYPED))


@lru_cache(maxsize=4096)  # the same few answers are looked for in many passages
def _runs(answer: str) -> list[str]:
    return [f" {' '.join(form)} " for form in word_forms(answer) if form]


def _split(folded: str) -> list[str]:
    if "," in folded:
        folded = _THOUSANDS.sub("", folded)
    return (_WORDS if _is_unusual(folded) else _USUAL_WORDS).findall(folded)


def _is_unusual(folded: str) -> bool:
    return not folded.isascii() and _UNUSUAL.search(folded) is not None
