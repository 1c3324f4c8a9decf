"""The exceptions that mean "what the user gave cannot be used" and "it is made, but could not be uploaded".

They exist so that every door (command line, Python) can tell both from a bug of the package: the doors print the message
of an `InputError` and leave with exit code 2, that of a `PushError` with 3, anything else keeps its traceback. Left out:
further codes and subclasses; nothing in the package reacts differently to different mistakes.
"""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one or two sentences: what was expected, what was found (file, line, value), what follows from it,
    and what to do about it. Half a surrogate pair, which a JSON file may hold and no terminal can print, becomes `\\ud800`.
    """

    def __init__(self, message: str):
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))


class PushError(InputError):
    """An upload failed and everything it was made from lies whole on disk; the message ends with the command that finishes it."""
