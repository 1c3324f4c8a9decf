"""Lists and dicts that were written into a cell of text: as JSON, or as Python or NumPy print them.

Left out: which cells may hold some, and what they mean (questions.py).
"""

import ast
import json
import re
import warnings

from cozyrag.data.rows import BadValue

_STRING = r"""'(?:[^'\\]|\\.)*+(?:'|\Z)|"(?:[^"\\]|\\.)*+(?:"|\Z)"""  # looked at once, also without its end
# Brackets around texts, lists or dicts; a text that merely begins with a bracket, such as "[1] foo", is none.
_LIST = re.compile(r"\[\s*(?:['\"\[{]|array\(|None\b|null\b).*\]", re.S)
_DICT = re.compile(r"\{\s*['\"][^'\"]*['\"]\s*[:,}].*\}|\{\s*['\"][^'\"]*['\"]\s*\}", re.S)
_NUMBERS = re.compile(r"\[(?:[\s,]*+-?\d++(?:\.\d+)?(?=[\s,\]]))*+[\s,]*\]|\{\s*\}")
_NUMPY = re.compile(
    rf"(?P<text>{_STRING})(?P<gap>\s+(?=['\"]))?|(?P<array>\barray\()|,\s*dtype=(?:[\w.]+|'[^']*')\s*(?=\))", re.S
)
LONGEST = 1_000_000  # characters in the notation of Python or NumPy, whose parser takes 250 bytes for each
_FAULTS = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)


def literal(text: str, name: str, *, numbers: bool = False) -> object:
    """The list or dict that this text writes out, the text itself if it does not look like one.

    numbers: whether [1, 2] is a list as well; it is text in a format that has lists of its own.

    Raises BadValue with the column `name` for one that cannot be parsed.
    """
    stripped = text.strip()
    if not (_LIST.fullmatch(stripped) or _DICT.fullmatch(stripped)):
        return _numbers(stripped) if numbers and _NUMBERS.fullmatch(stripped) else text
    try:
        return json.loads(stripped)
    except _FAULTS:
        if len(stripped) > LONGEST:
            raise _unreadable(stripped, name) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown escapes such as \d
            found = ast.literal_eval(_as_python(stripped))
    except _FAULTS as error:
        raise _unreadable(stripped, name) from error
    if not isinstance(found, list | dict) or _has_gap(found):
        raise _unreadable(stripped, name)
    return found


def _as_python(text: str) -> str:
    """NumPy's notation as Python's: commas between the items of ['a' 'b'], no array(...) and dtype=..."""

    def python(part: re.Match) -> str:
        if part["text"]:
            return part["text"] + (", " if part["gap"] else "")
        return "(" if part["array"] else ""

    return _NUMPY.sub(python, text)


def _has_gap(value: object) -> bool:
    """Whether NumPy left items out (...)."""
    if isinstance(value, dict):
        return any(map(_has_gap, value.values()))
    return value is ... or (isinstance(value, list | tuple) and any(map(_has_gap, value)))


def _numbers(text: str) -> list[str]:
    return re.findall(r"[^\s,\[\]{}]+", text)


def _unreadable(text: str, name: str) -> BadValue:
    shown = text if len(text) <= 60 else text[:57] + "..."
    return BadValue(
        f"{name} looks like a list or dict and cannot be parsed ({shown}); write a JSON list, or plain text"
    )
