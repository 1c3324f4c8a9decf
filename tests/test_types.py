"""Types: mypy finds at most AT_MOST errors in the package, and all of them in the rooms of STILL_WRONG.

The result does not depend on optional packages. mypy reports errors in files of the package alone, and with
`ignore_missing_imports` an import that is not there is Any, which accepts nearly everything. AT_MOST was counted with
all extras installed, and is the same when mypy skips every optional package. The second run is the other extreme: it
sees no installed package at all, and takes seconds.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import cozyrag

PACKAGE = Path(cozyrag.__file__).parent
AT_MOST = 26  # lower it with every error that goes; never raise it
STILL_WRONG = {"preflight"}


def errors(*options: str) -> list[str]:
    """The lines of mypy that name an error. It takes its configuration from pyproject.toml."""
    command = [sys.executable, "-m", "mypy", "--no-pretty", "--no-color-output", *options]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode in (0, 1), f"mypy itself failed: {done.stdout}{done.stderr}"
    found = [line for line in done.stdout.splitlines() if re.match(r"[^:]+:\d+: error: ", line)]
    assert bool(found) == bool(done.returncode), f"expected lines with errors, found: {done.stdout}"
    return found


def room(line: str) -> str:
    """The room that an error is in, or the module outside of rooms."""
    return re.split(r"[\\/:]", line)[1].removesuffix(".py")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--no-site-packages"]], ids=["all packages", "no packages"])
def test_errors_of_types_become_fewer(options, tmp_path):
    pytest.importorskip("mypy.api")
    found = errors(f"--cache-dir={tmp_path}", *options)
    assert {room(line) for line in found} <= STILL_WRONG, "\n".join(found)
    assert len(found) <= AT_MOST, "\n".join(found)


def test_type_checkers_are_told_that_the_package_has_types():
    assert (PACKAGE / "py.typed").is_file()
