"""The command line as users call it: its output and exit codes."""

import configparser
import importlib
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import evaluated
import pytest

import cozyrag
from cozyrag import cli, run
from cozyrag.commands import ask
from cozyrag.data.passages import read_passages
from cozyrag.errors import InputError, PushError
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.pair_file import describe_pair
from cozyrag.pipeline import Answer, CozyRAG, Source
from cozyrag.retrieval.passage_index import PassageIndex, passage_text

ROOT = Path(cozyrag.__file__).parents[1]


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs `cozyrag ARGUMENTS`; returns (exit code, stdout, stderr)."""

    def caller(*arguments, stdin=""):
        monkeypatch.setattr("sys.argv", ["cozyrag", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            code = cli.main() or 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return caller


class FakePair:
    """Answers with the question itself and two sources; `loaded` and `asked` record the calls."""

    loaded, asked = [], []

    @classmethod
    def from_pretrained(cls, name, *, min_certainty=None):
        cls.loaded.append(name)
        return cls()

    def answer(self, question, *, top_k):
        if question == "bad":
            raise InputError("The question is bad. Ask another.")
        self.asked.append((question, top_k))
        return Answer(
            question.upper(),
            0.876,
            "context",
            (Source("p1", "Title", "A. Short text. B.", 0.91234, ((3, 14),)), Source("p2", "", "x" * 81, -0.5)),
        )


@pytest.fixture
def fake_pair(monkeypatch):
    monkeypatch.setattr("cozyrag.pipeline.CozyRAG", FakePair)
    FakePair.loaded, FakePair.asked = [], []
    return FakePair


SHOWN = f"{{}}   (certainty 0.88)\n  [1] 0.912 Title: ... Short text. ...\n  [2] -0.500 p2: (not read) {'x' * 77}...\n"


# ---- cozyrag demo, space, report, compare


@pytest.fixture
def called(monkeypatch):
    """The calls of the functions behind the commands."""
    calls = []

    def record(module, name, result=None):
        def recorded(*args, **kwargs):
            calls.append((name, args, kwargs))
            return result

        monkeypatch.setattr(f"cozyrag.reporting.{module}.{name}", recorded)

    record("demo_app", "serve")
    record("hf_space", "write_space")
    record("html_report", "report", Path("my-run/report.html"))
    return calls


def test_demo_shows_the_page(call, called):
    assert call("demo", "my-run")[0] == 0 and call("demo", "user/name", "--port", 80, "--open")[0] == 0
    assert called == [
        ("serve", ("my-run",), {"port": None, "open_browser": False, "feedback": None}),
        ("serve", ("user/name",), {"port": 80, "open_browser": True, "feedback": None}),
    ]


def test_space_writes_a_folder_and_names_it(call, called):
    code, out, _ = call("space", "my-run", "my space", "--title", "T")
    assert code == 0 and out.startswith("my space/ is ready; its README.md explains how to try it and upload it.")
    assert "hf upload USER/NAME 'my space' . --repo-type space\n" in out and "/spaces/USER/NAME, open to anyone" in out
    assert called == [("write_space", ("my-run", "my space"), {"title": "T"})]


def test_report_prints_its_path(call, called):
    assert call("report", "my-run", "--latency", 0)[:2] == (0, f"Written to {Path('my-run/report.html')}\n")
    assert call("report", "my-run")[0] == 0
    assert [kwargs for _, _, kwargs in called] == [{"latency": 0}, {"latency": 20}]


def test_report_refuses_a_negative_number(call, called):
    code, _, err = call("report", "my-run", "--latency", -1)
    assert code == 2 and "--latency: expected a whole number of at least 0, found '-1'" in err and called == []


def test_compare_prints_and_writes_the_page(call, tmp_path):
    a = evaluated.write_run(tmp_path / "a", [[evaluated.row(1, em=1)]])
    b = evaluated.write_run(tmp_path / "b", [[evaluated.row(1, em=0)]], seed=2)
    code, out, _ = call("compare", a, b)
    assert code == 0 and "correct -> wrong: 1" in out and "Written" not in out
    code, out, _ = call("compare", a, b, "--html", tmp_path / "page.html")
    assert code == 0 and out.endswith(f"Written to {tmp_path / 'page.html'}\n")
    assert "Question 1?" in (tmp_path / "page.html").read_text()


def test_compare_with_a_folder_that_is_no_run_is_refused(call, tmp_path):
    code, _, err = call("compare", tmp_path, tmp_path)
    assert code == 2 and err.startswith("error: Expected evaluated questions in")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_each_command_explains_it_with_an_example(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0 and len(out.split()) > 50 and f"\n  cozyrag {command} " in out
    assert "Left out" not in out and ".py)" not in out


# ---- cozyrag ask


def test_ask_prints_the_answer_its_certainty_and_its_numbered_sources(call, fake_pair):
    assert call("ask", "my-run", "who?") == (0, SHOWN.format("WHO?"), "")
    assert (fake_pair.loaded, fake_pair.asked) == (["my-run"], [("who?", None)])


def test_ask_takes_several_questions_and_loads_once(call, fake_pair):
    assert call("ask", "my-run", "who?", "when?", "--top_k", 2)[1] == SHOWN.format("WHO?") + SHOWN.format("WHEN?")
    assert (fake_pair.loaded, fake_pair.asked) == (["my-run"], [("who?", 2), ("when?", 2)])


def test_ask_reads_questions_from_standard_input_one_a_line(call, fake_pair):
    assert call("ask", "my-run", stdin="who?\n\n  when? \n")[:2] == (0, SHOWN.format("WHO?") + SHOWN.format("WHEN?"))
    assert [question for question, _ in fake_pair.asked] == ["who?", "when?"]


def test_questions_given_as_arguments_leave_standard_input_alone(call, fake_pair):
    call("ask", "my-run", "who?", stdin="when?\n")
    assert fake_pair.asked == [("who?", None)]


@pytest.mark.parametrize(
    ("used", "metadata", "line"),
    [
        (((0, 2),), {}, "T: A. ..."),
        (((0, 2), (3, 5)), {}, "T: A. B. ..."),
        (((3, 5), (9, 11)), {}, "T: ... B. ... D."),
        (((0, 2), (3, 5), (6, 8), (9, 11)), {"url": "https://x.org"}, "T <https://x.org>: A. B. C. D."),
        (((0, 2), (3, 5), (6, 8), (9, 11)), {"source": "a/b.md"}, "T <a/b.md>: A. B. C. D."),
        ((), {"source": "a.pdf", "page": 3}, "T <a.pdf, p. 3>: (not read) A. B. C. D."),
        ((), {"page": "iv"}, "T <p. iv>: (not read) A. B. C. D."),
    ],
)
def test_of_a_passage_what_was_read_is_shown(used, metadata, line):
    source = Source("p", "T", "A. B. C.\nD.", 0.0, used, metadata)
    assert ask.shown(Answer("a", 0.5, "", (source,))).splitlines()[1] == f"  [1] 0.000 {line}"


def test_what_was_read_is_cut_when_it_is_long():
    source = Source("p", "T", "y" * 500, 0.0, ((0, 500),))
    assert ask.shown(Answer("a", 0.5, "", (source,))).endswith(f"T: {'y' * 317}...")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_terminal_it_asks_for_questions_until_an_empty_line(fake_pair, monkeypatch, capsys):
    for typed in ("who?\nbad\nwhen?\n\nnever?\n", "who?\nbad\nwhen?\n"):
        fake_pair.asked.clear()
        monkeypatch.setattr(sys, "stdin", Terminal(typed))
        cli.run("ask", ["my-run"])
        assert [question for question, _ in fake_pair.asked] == ["who?", "when?"]
        assert "The question is bad. Ask another.\n" in capsys.readouterr().out


def test_ctrl_c_ends_it_without_traceback(call, fake_pair, monkeypatch):
    monkeypatch.setattr(FakePair, "answer", lambda *given, **named: signal.raise_signal(signal.SIGINT))
    code, _, err = call("ask", "my-run", "who?")
    assert code == 130 and "Traceback" not in err


def test_ask_on_a_real_pair(call, generator_path, retriever_path, corpus_files, tmp_path):
    retriever = Retriever.load(str(retriever_path))
    passages = read_passages(str(corpus_files["passages"]))[0]
    vectors = retriever.encode(
        [passage_text(row["title"], row["text"]) for row in passages], kind="document", batch_size=40
    )
    Generator.load(str(generator_path)).save(tmp_path / "generator")
    retriever.save(tmp_path / "retriever")
    PassageIndex(passages, vectors, fingerprint=retriever.fingerprint()).save(tmp_path / "index")
    facts = describe_pair(
        fingerprint=retriever.fingerprint(),
        retrieval={"mode": "dense", "stemmer": "none", "weights": {"vectors": 15.0, "sentence_words": 0.0}},
        top_k=3,
        context_tokens=60,
        answer_tokens=4,
    )
    (tmp_path / "cozyrag.json").write_text(json.dumps(facts))
    code, out, _ = call("ask", tmp_path, "What colour is the fox 0?", "--top_k", 2)
    expected = CozyRAG.from_pretrained(tmp_path).answer("What colour is the fox 0?", top_k=2)
    assert code == 0 and out.splitlines()[0] == f"{expected.text}   (certainty {expected.score:.2f})"
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        [f"[{n}]", f"{source.score:.3f}"] for n, source in enumerate(expected.passages, 1)
    ]


# ---- cozyrag train, cozyrag push


def test_train_passes_its_arguments_on_unchanged(call, monkeypatch):
    seen = []
    monkeypatch.setattr("cozyrag.commands.train.train", lambda arguments, *, description: seen.append(arguments))
    given = ["--rounds", "3", "--report_to", "mlflow", "wandb", "--use_cpu", "--top_k=2", "--resume"]
    assert call("train", *given)[0] == 0 and call("train")[0] == 0
    assert seen == [given, []]


def test_train_help_shows_the_settings(call):
    code, out, _ = call("train", "--help")
    assert code == 0 and all(f"--{name}" in out for name in ("questions", "rounds", "hub_model_id", "help-all"))


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {"private": False, "tag": None}),
        (["--private"], {"private": True, "tag": None}),
        (["--tag", "v1"], {"private": False, "tag": "v1"}),
    ],
)
def test_push_uploads_and_prints_the_address(call, monkeypatch, arguments, options):
    seen = []

    def push_run(*given, **options):
        seen.append((given, options))
        return "https://hub.example/me/rag"

    monkeypatch.setattr("cozyrag.hub.background_push.push_run", push_run)
    assert call("push", "my-run", "me/rag", *arguments) == (0, "Pushed to https://hub.example/me/rag\n", "")
    assert seen == [(("my-run", "me/rag"), options)]


def test_a_failed_upload_has_its_own_exit_code(call, monkeypatch):
    def fail(*_, **__):
        raise PushError("The pair is complete in my-run, but the upload failed.")

    monkeypatch.setattr("cozyrag.hub.background_push.push_run", fail)
    assert call("push", "my-run", "me/rag") == (
        3,
        "",
        "error: The pair is complete in my-run, but the upload failed.\n",
    )


# ---- help and version


def test_version(call):
    assert call("--version") == (0, f"cozyrag {cozyrag.__version__}\n", "")


def test_help_lists_the_commands(call):
    code, out, _ = call("--help")
    assert code == 0 and all(f"\n  {command} " in out for command in cli.COMMANDS)


def test_the_command_line_opens_without_loading_torch():
    code = (
        "import sys; sys.argv = ['cozyrag', '--help']; from cozyrag.cli import main\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


REFUSED = {  # command lines with a mistake, and what is told
    "train": ("--genrator x", "did you mean 'generator'?"),
    "plan": ("--genrator x", "did you mean 'generator'?"),
    "passages": ("x.txt --output x.jsonl --wrods 3", "--wrods"),
    "questions": ("x.tsv --chek_only", "--chek_only"),
    "index": ("x.jsonl --output x --thread 3", "--thread"),
    "ask": ("x --tpo_k 3", "--tpo_k"),
    "evaluate": ("x --questions x.tsv --limt 3", "--limt"),
    "demo": ("x --prot 3", "--prot"),
    "serve": ("x --prot 3", "--prot"),
    "space": ("x y --titel z", "--titel"),
    "report": ("x --latncy 3", "--latncy"),
    "compare": ("x y --htm z", "--htm"),
    "audit": ("--genrator x", "did you mean 'generator'?"),
    "doctor": ("--genrator x", "did you mean 'generator'?"),
    "merge": ("x y --z", "--z"),
    "push": ("x user/x --tga z", "--tga"),
}
WITHOUT = {  # command lines that need a package which is missing, and what is told
    "demo": ("x", "cozyrag[demo]"),
    "space": ("x y", "cozyrag[demo]"),
    "report": ("x", "cozyrag[plots]"),
    "serve": ("x", "cozyrag[serve]"),
    "serve --mcp": ("x", "cozyrag[serve]"),
}
LIGHT = """
import contextlib, io, json, runpy, sys
from cozyrag import cli
sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))
for line, told in json.loads(sys.argv[2]):
    sys.argv = line.split()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__") if sys.argv[0].endswith(".py") else cli.main()
        except SystemExit as end:
            assert end.code == 2, (line, end.code)
    assert told in said.getvalue(), (line, said.getvalue())
    heavy = {"torch", "transformers", "sentence_transformers", "accelerate", "faiss", "datasets", "pandas"}
    heavy &= set(sys.modules)
    assert not heavy, (line, heavy)
"""


def _told_before_torch(missing, lines):
    """Run lines one after another in a process of their own: each ends with its message, and nothing heavy is there."""
    command = [sys.executable, "-c", LIGHT, json.dumps(missing), json.dumps(lines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_misspelt_option_is_told_before_torch_is_loaded():
    assert set(REFUSED) == set(cli.COMMANDS)
    lines = [(f"cozyrag {command} {words}", told) for command, (words, told) in REFUSED.items()]
    _told_before_torch([], [("train.py --genrator x", "did you mean 'generator'?"), *lines])


def test_a_missing_file_is_told_before_datasets_is_loaded():
    lines = [
        ("passages nowhere.txt --output x.jsonl", "found nothing at"),
        ("passages nowhere.PDF --output x.jsonl", "found nothing at"),
        ("passages nowhere/at/all --output x.jsonl", "found nothing at"),
        ("passages x.txt --output x.doc", "expected a name that ends in"),
        ("questions nowhere.tsv --check_only", "Expected a file at"),
        ("questions nowhere.tsv --output nowhere/x.jsonl", "there is no folder"),
        ("questions x.tsv", "give --output FILE, or --check_only"),
    ]
    _told_before_torch([], [(f"cozyrag {words}", told) for words, told in lines])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--top_k 0", "--top_k: expected a value of at least 1"),
        ("--rounds many", "argument --rounds: invalid int value: 'many'"),
        ("--rollback never", "argument --rollback: invalid choice: 'never'"),
        ("--use_cpu perhaps", "found 'perhaps'"),
        ("--config none.yaml", "none.yaml cannot be read"),
        ("--hub_model_id a/b/c", "--hub_model_id: expected user/name"),
    ],
)
def test_a_wrong_value_is_told_before_torch_is_loaded(words, told):
    _told_before_torch([], [(f"cozyrag train {words}", told)])


def test_a_missing_package_is_told_before_torch_is_loaded():
    lines = [(f"cozyrag {command} {words}", told) for command, (words, told) in WITHOUT.items()]
    _told_before_torch(["gradio", "matplotlib", "fastapi", "uvicorn", "mcp"], lines)


@pytest.mark.parametrize(
    ("program", "hint"),
    [("train.py", "accelerate launch train.py"), ("cozyrag", "cozyrag train"), ("python", "cozyrag train")],
)
def test_the_hint_after_a_run_names_a_command_that_is_there(program, hint, monkeypatch):
    monkeypatch.setattr("sys.argv", [f"/somewhere/{program}"])
    assert run.training_command() == hint


def test_no_message_of_the_package_asks_for_train_py():
    """The wheel has no train.py: what the package prints must work without a checkout."""
    named = [path for path in (ROOT / "cozyrag").rglob("*.py") if "launch train.py" in path.read_text("utf-8")]
    again = [path for path in (ROOT / "cozyrag").rglob("*.py") if re.search("[Rr]un train.py", path.read_text("utf-8"))]
    assert (named, again) == ([ROOT / "cozyrag" / "run.py"], [])


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "cozyrag", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"cozyrag {cozyrag.__version__}\n")


def test_the_installed_commands_exist():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = dict(line.split(" = ") for line in setup["options.entry_points"]["console_scripts"].strip().splitlines())
    assert scripts["cozyrag"] == "cozyrag.cli:main"
    for target in scripts.values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), target


# ---- mistakes: exit code 2, one sentence, on stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", "nowhere/at/all", "q?"], ["'nowhere/at/all'", "give it as user/name"]),
        (["push", "nowhere", "me/rag"], ["cozyrag.json", "nowhere"]),
        (["train", "--rounds", "two"], ["--rounds", "'two'"]),
        (["train", "--genrator", "x"], ["'--genrator'", "did you mean 'generator'?"]),
        (["train", "stray"], ["'stray'"]),
        (
            ["train", "--questions", "none.tsv", "--output_dir", "OUT", "--use_cpu", "--threads", "1"],
            ["none.tsv", "found none"],
        ),
    ],
)
def test_a_mistake_ends_with_one_line_on_stderr_and_exit_code_2(call, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


def test_answers_given_before_a_mistake_are_kept(call, fake_pair):
    assert call("ask", "my-run", "who?", "bad") == (
        2,
        SHOWN.format("WHO?"),
        "error: The question is bad. Ask another.\n",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["COMMAND"]),
        (["explode"], ["explode", "ask"]),
        (["ask"], ["OUTPUT"]),
        (["ask", "my-run", "q?", "--topk", "3"], ["--topk"]),
        (["ask", "my-run", "q?", "--top_k", "many"], ["--top_k", "'many'"]),
        (["ask", "my-run", "q?", "--top_k", "0"], ["--top_k", "at least 1", "'0'"]),
        (["push", "my-run"], ["USER/NAME"]),
        (["push", "my-run", "me/rag", "extra"], ["extra"]),
    ],
)
def test_a_command_that_does_not_exist_or_lacks_something_shows_the_usage(call, arguments, words):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and "usage: cozyrag" in err and all(word in err for word in words), err


@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("1", False), (None, True)])
def test_of_many_processes_only_the_first_prints_but_all_end(rank, printed, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)

    def fail():
        raise InputError("Not so.")

    with pytest.raises(SystemExit) as end:
        cli.entry_point(fail)
    assert end.value.code == 2 and capsys.readouterr().err == ("error: Not so.\n" if printed else "")


def test_a_fault_of_the_package_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.entry_point(lambda: 1 // 0)


def test_a_successful_command_passes_through_the_entry_point(capsys):
    cli.entry_point(lambda: print("done"))
    assert capsys.readouterr() == ("done\n", "")


# ---- preparing data


def test_data_commands_pass_their_arguments_on(call, tmp_path):
    (tmp_path / "note.md").write_text("# Well\nThe well behind the house is eleven metres deep.")
    (tmp_path / "qa.tsv").write_text("How deep is the well?\televen metres\n")
    passages, asked = tmp_path / "p.jsonl", tmp_path / "q.jsonl"
    code, out, _ = call("passages", tmp_path / "note.md", "--output", passages, "--workers", 1)
    assert code == 0 and "1 passage, " in out and read_passages(str(passages))[0]["title"][:] == ["Well"]
    code, out, _ = call("questions", tmp_path / "qa.tsv", "--passages", passages, "--output", asked)
    assert code == 0 and "1 questions read, 1 written" in out and asked.exists()


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        ("passages", ["near_duplicates", "(default: 100)"]),
        ("questions", ["not_in_gold", "(default: 3)"]),
        ("index", ["index_memory", "(default: embedded)"]),
    ],
)
def test_help_shows_options_and_defaults(call, command, texts):
    code, out, _ = call(command, "--help")
    assert code == 0 and all(text in out for text in texts) and "--columns" in out and "_column" not in out


def test_columns_have_old_and_new_options(call, tmp_path):
    """Both --columns title=t and the --text_column of earlier versions map a column."""
    (tmp_path / "a.jsonl").write_text('{"t": "Well", "x": "The well behind the house is eleven metres deep."}\n')
    output = tmp_path / "p.jsonl"
    arguments = [tmp_path / "a.jsonl", "--output", output, "--workers", 1, "--columns", "title=t", "--text_column", "x"]
    assert call("passages", *arguments)[0] == 0 and read_passages(str(output))[0]["title"][:] == ["Well"]
    code, _, err = call("passages", *arguments[:5], "--columns", "titel=t")
    assert code == 2 and "expected name=column" in err


@pytest.mark.parametrize("command", ["passages", "questions", "index"])
def test_data_commands_end_with_one_sentence(call, tmp_path, command):
    missing = tmp_path / "none.jsonl"
    more = ["--retriever", str(tmp_path)] if command == "index" else []
    code, out, error = call(command, missing, "--output", tmp_path / "out.jsonl", *more)
    assert code == 2 and error.splitlines()[-1].startswith("error: ") and "Traceback" not in error
