"""The one exception that means "what the user gave cannot be used".

It exists so that every door (command line, Python) can tell a user's mistake from a bug of the package: the doors print
the message of an `InputError` and leave with exit code 2, anything else keeps its traceback. It leaves out error codes
and subclasses: nothing in the package reacts differently to different mistakes.
"""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one or two sentences: what was expected, what was found (file, line, value), what follows from it,
    and what to do about it.
    """
