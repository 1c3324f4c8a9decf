"""Several processes that act as one: an error in one stops all of them with the same message, instead of a hang.

Left out: what is decided. Nothing here starts or ends a process.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list, gather_object

from cozyrag.errors import InputError

T = TypeVar("T")


@contextlib.contextmanager
def own_state() -> Iterator[None]:
    """Forget Accelerate's state at the end if there was none before.

    Otherwise the first run of a Python process would fix device and precision of every later one.
    """
    others = bool(PartialState._shared_state)
    try:
        yield
    finally:
        if not others:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def main_decides(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call `function` on the main process and return its result on all. Raises its InputError on all, too."""
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except InputError as error:
            outcome[1] = str(error)
    result, fault = broadcast_object_list(outcome)
    if fault:
        raise InputError(fault)
    return result


def run_on_all(accelerator: Accelerator, function: Callable[[], object]) -> None:
    """Call `function` on every process. Raises InputError on all of them if one raises it."""
    fault = None
    try:
        function()
    except InputError as error:
        fault = str(error)
    refuse(gather_object([fault]))


def refuse(faults: Iterable[str | None]) -> None:
    """Raise InputError for the first fault, if there is one."""
    for fault in filter(None, faults):
        raise InputError(fault)
