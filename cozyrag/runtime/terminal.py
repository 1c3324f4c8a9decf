"""Text on the screen: what other people wrote cannot steer a terminal, nor look like a line of ours.

Every line of the package is printed here; texts, titles, names of files and answers come from anywhere. Left out:
progress bars, whose descriptions are ours, and `--help`.
"""

import re
import sys
from typing import TextIO

# control characters but for tab and line feed, separators of lines, embeddings, overrides and isolates of direction,
# lone surrogates
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    """The text with characters that a terminal would obey as escapes, such as \\x1b; line feeds and tabs stay."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: object) -> str:
    """A name or a text for a line of ours: `escaped`, its line feeds and tabs too."""
    return escaped(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print a text of ours, with line feeds; names and texts of others in it are given through `one_line`."""
    print(escaped(text), file=file, flush=True)


def say_above_bars(text: str, *, file: TextIO | None = None) -> None:
    """`say`, above progress bars."""
    from tqdm.auto import tqdm  # most commands that print have no bar

    tqdm.write(escaped(text), file=file or sys.stdout)
