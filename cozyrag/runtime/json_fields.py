"""What the fields of a JSON file may hold, and one sentence for the first field of an object that holds something else.

Plain predicates: the two files that are checked have two dozen fields, and no validator is a dependency of every
installation. Left out: the fields themselves (pair_file.py, retrieval/index_file.py).
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cozyrag.errors import InputError

LONGEST = 60  # characters of a value in a message


class Kind(NamedTuple):
    """What a field may hold, in words and as a predicate."""

    words: str
    accepts: Callable[[object], bool]


def whole(least: int, most: int) -> Kind:
    """A whole number."""
    words = f"a whole number from {least} to {most:,}"
    return Kind(words, lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most)


def number(least: float, most: float) -> Kind:
    """A finite number."""
    words = f"a number from {least:g} to {most:g}"

    def accepts(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return least <= value <= most  # false for NaN, too

    return Kind(words, accepts)


def text(longest: int = 200) -> Kind:
    """A text that is not empty."""
    return Kind(
        f"a text of 1 to {longest} characters", lambda value: isinstance(value, str) and 0 < len(value) <= longest
    )


def one_of(choices: Collection[object]) -> Kind:
    """One of some values, of the same type too: 1 is not True."""
    words = f"one of {', '.join(map(str, choices))}"
    return Kind(words, lambda value: any(type(value) is type(each) and value == each for each in choices))


def or_null(kind: Kind) -> Kind:
    """That kind, or null."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.accepts(value))


def each_of(kind: Kind, many: int = 1000) -> Kind:
    """An object, or a list, of values of that kind."""

    def accepts(value: object) -> bool:
        held = list(value.values()) if isinstance(value, dict) else value
        return isinstance(held, list) and len(held) <= many and all(map(kind.accepts, held))

    return Kind(f"at most {many} entries, each of them {kind.words}", accepts)


def check_fields(
    content: object,
    known: Mapping[str, Kind | Mapping],
    *,
    path: Path | str,
    remedy: str,
    optional: Collection[str] = (),
    closed: Collection[str] = (),
    within: str = "",
) -> None:
    """Raise InputError for the first field that is missing or holds something else; names of inner fields have a dot.

    Args:
        known: kinds by name; a mapping stands for an inner object. optional: names that may be missing, with the dot.
        closed: objects that hold no other fields; elsewhere a later version may add some.
    """
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected {within.rstrip('.')} as an object, found {_shown(content)}. {remedy}")
    for name, kind in known.items():
        place = within + name
        if name not in content:
            if place not in optional:
                raise InputError(f"{path}: expected an entry {place!r}, found none. {remedy}")
        elif not isinstance(kind, Kind):
            inner = partial(check_fields, path=path, remedy=remedy, optional=optional, closed=closed)
            inner(content[name], kind, within=f"{place}.")
        elif not kind.accepts(content[name]):
            raise InputError(f"{path}: expected {place} as {kind.words}, found {_shown(content[name])}. {remedy}")
    if within.rstrip(".") in closed and (others := sorted(set(content) - set(known))):
        raise InputError(f"{path}: {within}{others[0]} is an entry that this version does not know. Update cozyrag.")


def _shown(value: object) -> str:
    """A value for a message, cut; a number of thousands of digits has no text."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)} entries"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    said = repr(value[: LONGEST + 1] if isinstance(value, str) else value)
    return said if len(said) <= LONGEST else f"{said[: LONGEST - 3]}..."
