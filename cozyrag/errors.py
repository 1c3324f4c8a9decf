"""The two exceptions for faults that a user can correct: bad input, and an upload that failed.

Entry points (command line, Python) tell them from bugs of the package: they print the message of an `InputError` and
exit with code 2, that of a `PushError` with 3. Anything else keeps its traceback. Left out: further codes and
subclasses, because nothing reacts differently to them.
"""


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message has one or two sentences: what was expected, what was found (file, line, value), the consequence and the
    remedy. A lone surrogate, which JSON may hold and no terminal can print, becomes `\\ud800`.
    """

    def __init__(self, message: str):
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))


class PushError(InputError):
    """An upload failed, and all its files are complete on disk; the message ends with the command that finishes it."""
