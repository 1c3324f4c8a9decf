"""Several processes that decide as one: a fault of one stops them all with the same sentence, instead of a hang.

Left out: what is decided. Nothing here starts or ends a process.
"""

from collections.abc import Callable, Iterable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from cozyrag.errors import InputError


def main_decides(accelerator: Accelerator, act: Callable[[], Any]) -> Any:
    """What `act` gives on the main process, on every process. Raises InputError everywhere if it does there."""
    told: list = [None, None]
    if accelerator.is_main_process:
        try:
            told = [act(), None]
        except InputError as error:
            told = [None, str(error)]
    result, fault = broadcast_object_list(told)
    if fault:
        raise InputError(fault)
    return result


def all_manage(accelerator: Accelerator, act: Callable[[], object]) -> None:
    """Let every process act. Raises InputError everywhere if it is raised anywhere."""
    fault = None
    try:
        act()
    except InputError as error:
        fault = str(error)
    faults = [each for each in gather_object([fault]) if each]
    if faults:
        raise InputError(faults[0])


def refuse(faults: Iterable[str | None]) -> None:
    """Raise InputError for the first fault, if there is one."""
    for fault in filter(None, faults):
        raise InputError(fault)
