"""Assemble a metric module as a Space for the Hugging Face Hub, where this package is not installed.

    python scripts/metric_space.py cozyrag_qa FOLDER
    hf upload USER/cozyrag_qa FOLDER --repo-type space

In FOLDER the module imports the metrics from a file beside it instead of from the package, and
`evaluate.load("USER/cozyrag_qa")` gives the same numbers. Left out: uploading.
"""

import argparse
import shlex
import shutil
from pathlib import Path

from cozyrag.cli import entry_point
from cozyrag.errors import InputError
from cozyrag.runtime.assets import shipped_folder

MODULES = ("cozyrag_qa", "cozyrag_retrieval")
METRICS = Path(__file__).parents[1] / "cozyrag" / "evaluation" / "metrics.py"
BESIDE = "cozyrag_metrics"


def assemble(name: str, folder: Path) -> None:
    """Write the Space of one of MODULES. Raises InputError if the folder is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"Expected a new or empty folder, found files in {folder.absolute()}. Name another.")
    shutil.copytree(shipped_folder("metric_modules") / name, folder, dirs_exist_ok=True)
    shutil.copy(METRICS, folder / f"{BESIDE}.py")
    module = folder / f"{name}.py"
    text = module.read_text(encoding="utf-8")
    module.write_text(
        text.replace("from cozyrag.evaluation.metrics import", f"from .{BESIDE} import"), encoding="utf-8"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODULES, help="the metric module")
    parser.add_argument("folder", type=Path, help="new or empty output folder")
    options = parser.parse_args()
    entry_point(lambda: assemble(options.name, options.folder))
    upload = shlex.join(["hf", "upload", f"USER/{options.name}", str(options.folder), "--repo-type", "space"])
    print(f"Written. Upload it with `{upload}`.")


if __name__ == "__main__":
    main()
