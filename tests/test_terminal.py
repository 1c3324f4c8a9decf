"""Text of others on the screen: it cannot steer the terminal, nor look like a line of ours."""

import ast
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import evaluated
import pytest
import tiny

import cozyrag
from cozyrag import cli
from cozyrag.commands import ask
from cozyrag.data.rows import BadRows
from cozyrag.errors import InputError
from cozyrag.evaluation.evaluation import examples
from cozyrag.evaluation.overlap_audit import examples_alike
from cozyrag.pipeline import Answer, Source
from cozyrag.reporting.compare import as_text, compare
from cozyrag.runtime.terminal import escaped, one_line, say, say_above_bars

PACKAGE = Path(cozyrag.__file__).parent
STEERING = {
    "escape": "\x1b",
    "return": "\r",
    "backspace": "\b",
    "null": "\0",
    "delete": "\x7f",
    "c1": "\x9b",
    "next-line": "\x85",
    "line-separator": "\u2028",
    "override": "\u202e",
    "isolate": "\u2067",
    "half-a-pair": "\ud83d",
}
HOSTILE = "a" + "".join(STEERING.values()) + "b\nerror: forged"


def is_safe(printed):
    """Nothing that steers is in the text, and no line begins as the forged one."""
    return not any(each in printed for each in STEERING.values()) and "\nerror: forged" not in f"\n{printed}"


@pytest.mark.parametrize("character", STEERING.values(), ids=STEERING)
def test_a_character_that_steers_the_terminal_is_shown_as_an_escape(character):
    shown = escaped(f"a{character}b")
    assert shown.isprintable() and shown.startswith("a\\") and shown.endswith("b")


def test_ordinary_text_of_any_script_stays_as_it_is():
    text = "Zoë\t東京 שלום عربى 👩‍🔬 e\u0301 a\u00adb\nc:\\new"
    assert escaped(text) == text and escaped(escaped(HOSTILE)) == escaped(HOSTILE)


@pytest.mark.parametrize("words", [["report", "a", f"--{HOSTILE}"], [HOSTILE], ["report", "a", "--latency", HOSTILE]])
def test_the_parser_names_what_it_was_given_as_escapes(words, monkeypatch, capsys):
    words = [each.replace("\ud83d", "") for each in words]
    monkeypatch.setattr(sys, "argv", ["cozyrag", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and is_safe(told) and "\\x1b" in told


def test_warnings_are_printed_as_escapes(capsys):
    def command():
        sys.stderr.write(warnings.formatwarning(UserWarning("a\x1b[2Jb\rc"), UserWarning, "d\x9b.py", 1))

    before = warnings.formatwarning
    cli.entry_point(command)
    told = capsys.readouterr().err
    assert "a\\x1b[2Jb\\rc" in told and "d\\x9b.py" in told and warnings.formatwarning is before


def test_a_name_stays_on_its_line():
    assert one_line("a\nb\tc\r\n") == "a\\nb\\tc\\r\\n" and one_line(Path("x")) == "x"


@pytest.mark.parametrize("printer", [say, say_above_bars])
def test_whatever_is_printed_is_escaped(printer, capsys):
    printer("our line\nof \x1b[2J others")
    assert capsys.readouterr().out == "our line\nof \\x1b[2J others\n"


@pytest.mark.parametrize(
    "error", [InputError(f"No file {HOSTILE}."), FileNotFoundError(2, "gone", HOSTILE), OSError(28, "full", HOSTILE)]
)
def test_an_error_is_one_line(error, capsys):
    def command():
        raise error

    with pytest.raises((SystemExit, OSError)) as end:
        cli.entry_point(command)
    if end.type is SystemExit:
        printed = capsys.readouterr().err
        assert is_safe(printed) and printed.count("\n") == 1


def test_an_answer_and_its_sources_keep_their_lines():
    source = Source("p", HOSTILE, f"{HOSTILE} text", 0.5, ((0, len(HOSTILE)),), {"url": f"https://x/{HOSTILE}"})
    shown = ask.shown(Answer(HOSTILE, 0.5, "", (source, Source(HOSTILE, "", HOSTILE, 0.1))))
    assert is_safe(shown) and shown.count("\n") == 2


def test_notes_and_bad_rows_keep_their_lines():
    bad = BadRows()
    bad.note(HOSTILE)
    bad.add(HOSTILE, HOSTILE)
    report = bad.finish(HOSTILE, skip=True)
    assert is_safe(report) and report.count("\n") == 1


def test_sample_answers_and_near_duplicates_keep_their_lines():
    row = {"f1": 1.0, "question": HOSTILE, "prediction": HOSTILE, "answers": [HOSTILE], "context": HOSTILE}
    assert is_safe(shown := examples([row | {"verdict": "correct"}])) and shown.count("\n") == 2
    alike = {"near_duplicates": [{"similarity": 1.0, "question": HOSTILE, "train_question": HOSTILE}]}
    assert is_safe(examples_alike(alike)) and "\n" not in examples_alike(alike)


def test_a_comparison_keeps_its_lines(tmp_path):
    texts = {"question": HOSTILE, "prediction": HOSTILE, "answers": [HOSTILE]}
    a = evaluated.write_run(tmp_path / "a\nerror: forged", [[evaluated.row(1, em=1, **texts)]], generator=HOSTILE)
    b = evaluated.write_run(tmp_path / "b\x1b[2J", [[evaluated.row(1, em=0, **texts)]])
    assert is_safe(as_text(compare(a, b)))


def test_the_errors_of_the_questions_command_keep_their_lines(tmp_path, monkeypatch, capsys):
    text = HOSTILE.replace(STEERING["half-a-pair"], "")
    path = tmp_path / "q\nerror: forged\x1b.jsonl"
    tiny.write_jsonl(path, [*({"question": text, "answers": [each]} for each in "xy"), {"question": text}])
    monkeypatch.setattr("sys.argv", ["cozyrag", "questions", str(path), "--check_only", "--skip_bad_rows"])
    cli.main()
    printed = capsys.readouterr().out
    assert is_safe(printed) and "disagreeing" in printed and "1 row skipped" in printed


def printing(tree):
    """Calls that print without `say`: of print, of a `print` or `write` of an accelerator or a bar, of a stream."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno
        if isinstance(node, ast.Attribute) and node.attr == "print":
            yield node.lineno
        if isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "tqdm.write", "bar.write", "sys.stdout.write", "sys.stderr.write",
        ):  # fmt: skip
            yield node.lineno


def test_every_line_is_printed_in_one_place():
    found = {path.name for path in PACKAGE.rglob("*.py") if list(printing(ast.parse(path.read_text("utf-8"))))}
    assert found == {"terminal.py"}


# ---- a screen that is gone

PRINTS = """
import sys, time
sys.path.insert(0, {root!r})
from cozyrag.cli import entry_point
from cozyrag.runtime.terminal import say, say_above_bars
from tqdm import tqdm
def command():
    for number in tqdm(range(300), mininterval=0):
        say("a line of some length, so that the pipe and the buffer are full soon" * 9)
        say_above_bars("another")
    open({done!r}, "w").close()
entry_point(command, prints={prints})
"""


def printed_into(tmp_path, prints, redirection):
    """(exit code of a command that prints, whether it came to its end, standard error)."""
    done = tmp_path / "done"
    (tmp_path / "program.py").write_text(PRINTS.format(root=str(PACKAGE.parent), done=str(done), prints=prints))
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / 'program.py'))} {redirection}"
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=tiny.PATIENCE
    )
    return ended.returncode, done.exists(), ended.stderr


@pytest.mark.parametrize(
    ("redirection", "result_code"),
    [
        ("| head -1", 0),
        ("2>&1 | head -1", 0),
        (">&-", 0),
        (">&- 2>&-", 0),
        ("> /dev/full", 2),
        ("> /dev/full 2>&1", 2),
    ],
)
def test_a_screen_that_is_gone_ends_no_command(redirection, result_code, tmp_path):
    code, done, told = printed_into(tmp_path, True, redirection)
    assert (code, done) == (result_code, True) and "Traceback" not in told
    if "full" in redirection and "2>" not in redirection:
        assert "error: Lines are missing: standard output cannot be written (No space left on device)." in told
    (tmp_path / "done").unlink()
    assert printed_into(tmp_path, False, redirection)[:2] == (0, True)  # of a run only the log is lost
