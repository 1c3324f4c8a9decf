"""Types: mypy finds no error in the package.

The result does not depend on optional packages: an import that is not there is Any, which accepts nearly everything.
"""

import subprocess
import sys
from pathlib import Path

import pytest

import cozyrag

PACKAGE = Path(cozyrag.__file__).parent


@pytest.mark.slow
def test_mypy_finds_no_error(tmp_path):
    pytest.importorskip("mypy.api")
    command = [sys.executable, "-m", "mypy", "--no-pretty", "--no-color-output", f"--cache-dir={tmp_path}"]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert "no issues found" in done.stdout


def test_type_checkers_see_the_types_of_the_package():
    assert (PACKAGE / "py.typed").is_file()
