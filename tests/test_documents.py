"""What documents and messages tell people to type or to believe: extras, shell lines, figures of the quickstart set."""

import ast
import json
import re
from pathlib import Path

import pytest

from cozyrag.runtime.assets import QUICKSTART_FOLDER

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [path for room in ("cozyrag", "benchmarks", "scripts") for path in sorted((ROOT / room).rglob("*.py"))]
TEXTS = [
    *PAGES, *SOURCES, *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "cozyrag").rglob("*.md"), *ROOT.glob("*.txt"),
    *ROOT.glob("*.yml"), *(ROOT / "model_cards").glob("*.md"), *(ROOT / "scripts").glob("*.sh"),
]  # fmt: skip


def name_of(path):
    return path.relative_to(ROOT).as_posix()


# ---- extras


UNQUOTED = re.compile(r"pip install(?: (?:-\S+|[\w.=-]+))* (?:cozyrag|\.)\[")


@pytest.mark.parametrize(
    ("line", "wrong"),
    [("pip install cozyrag[web]", True), ("pip install -e .[test]", True), ("pip install -U torch cozyrag[a,b]", True),
     ('pip install "cozyrag[web]"', False), ('pip install -q -r requirements.txt -e ".[test]"', False)],
)  # fmt: skip
def test_an_extra_without_quotes_is_found(line, wrong):
    assert bool(UNQUOTED.search(line)) is wrong


def test_extras_are_quoted_wherever_people_are_told_to_install_one():
    """zsh takes cozyrag[web] for a pattern of file names and stops."""
    assert [name_of(path) for path in TEXTS if UNQUOTED.search(path.read_text(encoding="utf-8"))] == []


# ---- shell lines in messages


COMMAND = re.compile(r"(?:`|\n  )(?:cozyrag|accelerate|python|pip|hf|train\.py|rm|mv|cp) [^`\n]*$")
QUOTED = {"quote", "shlex.quote", "shlex.join"}
PLAIN = {"extra", "name", "','.join(machine.missing)"}  # names of packages and extras


def unquoted(source):
    """Values that an f-string puts into a shell line as they are."""
    for node in ast.walk(ast.parse(source)):
        text = ""
        for part in node.values if isinstance(node, ast.JoinedStr) else ():
            if not isinstance(part, ast.FormattedValue):
                text += part.value
                continue
            value = ast.unparse(part.value)
            called = isinstance(part.value, ast.Call) and ast.unparse(part.value.func) in QUOTED
            if COMMAND.search(text) and not (called or value in PLAIN or value.isupper()):
                yield value
            text += "_"


def test_an_unquoted_value_in_a_shell_line_is_found():
    assert list(unquoted("f'Run `cozyrag ask {folder} {quote(question)}`.'")) == ["folder"]
    assert list(unquoted("f'{folder} holds it. Try:\\n  cozyrag ask {quote(folder)}'")) == []


def test_folders_and_questions_in_suggested_commands_are_quoted_for_the_shell():
    """A folder with a space, or a question with a quote or $, must give a line that can be pasted."""
    assert [(name_of(path), value) for path in SOURCES for value in unquoted(path.read_text(encoding="utf-8"))] == []


# ---- figures of the quickstart set


def counts():
    """What may stand before a noun."""
    rows = {
        name: [json.loads(line) for line in (QUICKSTART_FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("train", "validation", "test", "passages")
    }
    about = {name: len({row["passage_id"] for row in rows[name]}) for name in ("train", "validation", "test")}
    whole = sum(len(rows[name]) for name in about)
    return {
        "passages": {len(rows["passages"])},
        "training passages": {about["train"]},
        "articles": {len(rows["passages"]), *about.values()},
        "training questions": {len(rows["train"])},
        "validation questions": {len(rows["validation"])},
        "held-out questions": {len(rows["validation"])},
        "test questions": {len(rows["test"])},
        "questions": {whole},
        "question-answer pairs": {whole},
    }


FIGURE = re.compile(
    r"\b(\d[\d,]*) (?:short |encyclopaedia |of the )*"
    r"(question-answer pairs|(?:training |validation |held-out |test )?questions|(?:training )?passages|articles)\b"
)


@pytest.mark.parametrize("path", [*PAGES, QUICKSTART_FOLDER / "README.md"], ids=name_of)
def test_figures_of_the_quickstart_set_are_those_of_its_files(path):
    """In every paragraph that names the set; the page of the first run and the set's own are about nothing else."""
    known = counts()
    paragraphs = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
    everywhere = path.name == "first-run.md" or path.parent == QUICKSTART_FOLDER
    told = [
        (int(number.replace(",", "")), noun)
        for paragraph in paragraphs
        if everywhere or (not paragraph.lstrip().startswith("|") and "quickstart set" in paragraph)
        for number, noun in FIGURE.findall(" ".join(paragraph.split()))
    ]
    assert [(number, noun) for number, noun in told if number not in known[noun]] == []
    assert told or not everywhere


def test_the_figure_of_a_set_that_has_grown_is_found():
    assert FIGURE.findall("1,460 training questions of 114 passages") == [
        ("1,460", "training questions"), ("114", "passages"),
    ]  # fmt: skip
