"""Every setting is explained where users look, and what they write is understood or refused with its place."""

import dataclasses
import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from cozyrag import config
from cozyrag.config import FIRST, GROUPS, NAMES, OutputSettings, TrainingSettings, parse_settings
from cozyrag.errors import InputError

OWN = ["--questions", "own.tsv"]  # not the quickstart set, which brings settings of its own
FIELDS = {f.name: f for group in GROUPS for f in dataclasses.fields(group)}
DEFAULTS = {
    name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for name, f in FIELDS.items()
}
RANGES = {  # setting: (values that must be refused, values at the edge that must be accepted)
    "eval_share": ([-0.01, 0.51], [0, 0.5]),
    "dropout": ([-0.1, 1.0], [0, 0.99]),
    "lora_rank": ([-1], [0, 8]),
    "lora_alpha": ([0, -1.0], [0.5, 32]),
    "lora_dropout": ([-0.1, 1.0], [0, 0.99]),
    "warmup_ratio": ([-0.1, 1.1], [0, 1]),
    "rounds": ([-1], [0]),
    "save_minutes": ([-1], [0, 0.5]),
    "max_skipped_steps": ([0], [1]),
    "top_k": ([0], [1]),
    "context_tokens": ([0], [1]),
    "answer_tokens": ([0], [1]),
    "passage_tokens": ([7], [8]),
    "encode_batch_size": ([0], [1]),
    "answer_batch_size": ([0], [1]),
    "generator_batch_size": ([0], [1]),
    "retriever_batch_size": ([1], [2]),
    "reranker_batch_size": ([0], [1]),
    "hard_negatives": ([-1, 51], [0, 50]),
    "gradient_accumulation_steps": ([0], [1]),
    "generator_epochs": ([-0.5], [0]),
    "refresh_steps": ([0], [1]),
    "refresh_overlap": ([-0.1, 1.1], [0, 1]),
    "context_noise": ([-0.1, 1.1], [0, 1]),
    "contrastive_weight": ([-0.1], [2]),
    "sentence_weight": ([-0.1], [0, 3]),
    "feedback_weight": ([-0.1], [0, 3]),
    "feedback_passages": ([1, 61], [2, 60]),
    "rerank_passages": ([1, 61], [2, 60]),
    "feedback_temperature": ([0], [1e-3]),
    "repeat_penalty": ([-0.1], [0, 3]),
    "keyword_penalty": ([-0.1], [0, 3]),
    "short_penalty": ([-0.1], [0, 3]),
    "repeat_ngram": ([0], [1]),
    "short_tokens": ([0], [1]),
    "min_answer_tokens": ([-1], [0]),
    "no_repeat_ngram_size": ([-1], [0]),
    "retriever_epochs": ([-0.5], [0]),
    "reranker_epochs": ([-0.5], [0]),
    "generator_steps": ([-1], [0]),
    "retriever_steps": ([-1], [0]),
    "reranker_steps": ([-1], [0]),
    "max_grad_norm": ([0], [0.001]),
    "temperature": ([0], [0.0001]),
    "weight_decay": ([-0.1], [0]),
    "save_steps": ([-1], [0]),
    "save_total_limit": ([0], [1]),
    "logging_steps": ([0], [1]),
    "threads": ([0], [1]),
    "max_questions": ([0], [1]),
    "max_eval_questions": ([0], [1]),
    "generator_learning_rate": ([-1e-9], [0]),
    "retriever_learning_rate": ([-1e-9], [0]),
    "reranker_learning_rate": ([-1e-9], [0]),
    "seed": ([-1, 2**32], [0, 2**32 - 1]),
}


def values(*arguments, own=OWN):
    return parse_settings([*own, *map(str, arguments)]).to_dict()


def refusal(*arguments):
    with pytest.raises(InputError) as caught:
        values(*arguments)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    """A YAML file with the given content; returns its path."""

    def writer(content, name="my.yaml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return writer


# ---- --help


@pytest.fixture
def help_text(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "10000")  # one line for each setting
    with pytest.raises(SystemExit) as caught:
        parse_settings(["--help-all"], description="First line.\n\n    second line")
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_setting_with_its_words_and_default_in_its_group(help_text):
    for group in GROUPS:
        title = group.__doc__.rstrip(".")
        section = help_text.split(f"\n{title}:\n")[1].split("\n\n")[0]
        for f in dataclasses.fields(group):
            entry = re.search(rf"^  --{f.name}\b.*(?:\n {{8,}}.*)*", section, flags=re.MULTILINE)
            assert entry, f.name
            words = " ".join(entry.group().split())
            assert " ".join(f.metadata["help"].split()) in words
            assert words.endswith(f"(default: {DEFAULTS[f.name]})"), words


def test_help_texts_are_sentences():
    for name, f in FIELDS.items():
        assert f.metadata["help"].endswith(".") and len(f.metadata["help"].split()) > 1, name


def test_help_shows_the_first_settings_and_names_the_way_to_the_others(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    shown = capsys.readouterr().out
    assert len(FIRST) == len(set(FIRST) & set(NAMES)) == 20
    assert {name for name in NAMES if re.search(rf"^  --{name}[ ,]", shown, re.MULTILINE)} == set(FIRST)
    assert f"{len(FIRST)} of {len(NAMES)} settings; --help-all shows all" in shown


def test_the_docs_give_the_default_and_the_reason_of_every_setting():
    page = (Path(config.__file__).parents[1] / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--(\w+)` \| (.*?) \| (.+) \|$", page, re.MULTILINE)
    shown = {name: default for name, default, _ in rows}
    assert list(shown) == NAMES
    for name, default in DEFAULTS.items():
        assert shown[name] == (" ".join(default) or "(none)" if isinstance(default, list) else str(default)), name


# ---- names of earlier versions


@pytest.mark.parametrize(
    ("old", "name", "value"),
    [
        (["--gate", "off"], "rollback", "off"),
        (["--gate=off"], "rollback", "off"),
        (["--query-side-only"], "freeze_document_encoder", True),
        (["--resume_anyway"], "allow_changed_settings", True),
        (["--max_bad_steps", "3"], "max_skipped_steps", 3),
        (["--context_filter", "both"], "context_filter", "hybrid"),
        (["--context_filter=overlap"], "context_filter", "sparse"),
        (["--question_column", "q", "--answer_column=a"], "columns", ["question=q", "answer=a"]),
    ],
)
def test_names_of_an_earlier_version_are_accepted_with_a_note(old, name, value, capsys, tmp_path):
    assert parse_settings([*OWN, *old]).to_dict()[name] == value
    noted = capsys.readouterr().err
    assert "context_filter" in old[0] or f"is now --{name}" in noted
    words = [word for each in old for word in each.removeprefix("--").split("=")]
    pairs = dict(zip(words[::2], [*words[1::2], "true"], strict=False))
    path = tmp_path / "old.yaml"
    path.write_text("".join(f"{key.replace('-', '_')}: '{each}'\n" for key, each in pairs.items()))
    assert parse_settings([*OWN, "--config", str(path)]).to_dict()[name] == value


def test_columns_are_checked():
    assert parse_settings([*OWN, "--columns", "question=q", "text=a=b"]).data.columns == ["question=q", "text=a=b"]
    for wrong in ("question", "question=", "query=q", "=q"):
        with pytest.raises(InputError, match="--columns: expected name=column with a name among question, answer"):
            parse_settings([*OWN, "--columns", wrong])


def test_help_keeps_the_lines_of_the_description_and_names_config(help_text):
    assert "First line.\n\n    second line\n" in help_text
    assert "--config FILE.yaml" in help_text


def test_no_setting_stands_in_two_groups():
    assert len(NAMES) == len(set(NAMES)) == sum(len(dataclasses.fields(group)) for group in GROUPS)


# ---- defaults, command line


def test_without_arguments_every_setting_has_its_default():
    assert values() == DEFAULTS | {"questions": "own.tsv"}


def test_no_list_is_shared_between_settings():
    settings = parse_settings(OWN)
    settings.to_dict()["report_to"].append("wandb")
    assert settings.output.report_to == ["none"]
    settings.output.report_to.append("mlflow")
    assert parse_settings(OWN).output.report_to == OutputSettings().report_to == ["none"]


def test_command_line_values_reach_their_group():
    settings = parse_settings(
        [
            *OWN,
            "--rounds",
            "3",
            "--top_k=2",
            "--use_cpu",
            "--report_to",
            "mlflow",
            "wandb",
            "--generator_learning_rate",
            "1e-3",
        ]
    )
    assert (settings.training.rounds, settings.contexts.top_k, settings.training.use_cpu) == (3, 2, True)
    assert settings.output.report_to == ["mlflow", "wandb"]
    assert settings.training.generator_learning_rate == 0.001


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--use_cpu"], True), (["--use_cpu", "true"], True), (["--use_cpu", "false"], False), ([], False)],
)
def test_switches(arguments, expected):
    assert values(*arguments)["use_cpu"] is expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--genrator", "x"], ["'--genrator'", "did you mean 'generator'?", "--help"]),
        (["--genrator=x"], ["--genrator", "did you mean 'generator'?"]),
        (["--zzzzzz", "1"], ["'--zzzzzz'. See --help"]),
        (["--rounds", "1", "stray"], ["unknown setting 'stray'"]),
        (["--generator_epoch", "1"], ["did you mean 'generator_epochs'?"]),  # no abbreviations
        (["--rounds", "two"], ["--rounds", "'two'", "int"]),
        (["--rounds", "2.5"], ["--rounds", "'2.5'", "int"]),
        (["--dropout", "much"], ["--dropout", "'much'", "float"]),
        (["--use_cpu", "maybe"], ["--use_cpu", "maybe"]),
        (["--lr_scheduler_type", "sawtooth"], ["--lr_scheduler_type", "'sawtooth'", "cosine"]),
        (["--mixed_precision", "fp8"], ["--mixed_precision", "'fp8'", "bf16"]),
        (["--rounds"], ["--rounds", "expected one argument"]),
        (["--config"], ["--config", "expected one argument"]),
        (["--report_to", "mlflow", "clearml"], ["--report_to", "'clearml'", "mlflow, wandb, tensorboard"]),
        (["--push_to_hub"], ["--push_to_hub", "--hub_model_id user/name"]),
        (["--resume", "--overwrite_output_dir"], ["--resume", "--overwrite_output_dir", "only one of them"]),
    ],
)
def test_refused_on_the_command_line(arguments, words):
    message = refusal(*arguments)
    assert all(word in message for word in words), message


def test_a_file_beside_the_script_is_no_hidden_source_of_settings(tmp_path, monkeypatch):
    (tmp_path / "train.args").write_text("--rounds 7")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "train.py"), *OWN])
    assert parse_settings().training.rounds == DEFAULTS["rounds"]


# ---- ranges


def test_every_number_has_a_range():
    numbers = {name for name, f in FIELDS.items() if {int, float} & {f.type, *get_args(f.type)}}
    assert numbers == set(RANGES)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (refused, _) in RANGES.items() for value in refused]
)
def test_out_of_range_is_refused_naming_setting_and_value(name, value):
    found = FIELDS[name].type if FIELDS[name].type in (int, float) else int
    message = refusal(f"--{name}={value}")
    assert f"--{name}:" in message and f"found {found(value)}." in message and "at least" in message


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_, accepted) in RANGES.items() for value in accepted]
)
def test_the_ends_of_the_range_are_accepted(name, value):
    assert values(f"--{name}={value}")[name] == value


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TrainingSettings) if f.type is float])
def test_nan_is_refused(name):
    assert f"--{name}:" in refusal(f"--{name}=nan")


# ---- YAML


def test_yaml_values_of_every_kind(write):
    path = write(
        "rounds: 3\ngenerator_learning_rate: 1e-3\ndropout: 0.25\nuse_cpu: true\nskip_bad_rows: no\n"
        "report_to: [mlflow, wandb]\neval_questions: null\nmax_eval_questions:\nmixed_precision: no\n"
        "lr_scheduler_type: 'cosine'\nrun_name: \"null\"\nproject_name: 7\n"
    )
    found = values("--config", path)
    assert found == DEFAULTS | {
        "questions": "own.tsv",
        "rounds": 3,
        "generator_learning_rate": 0.001,
        "dropout": 0.25,
        "use_cpu": True,
        "skip_bad_rows": False,
        "report_to": ["mlflow", "wandb"],
        "max_eval_questions": None,
        "mixed_precision": "no",
        "lr_scheduler_type": "cosine",
        "run_name": "null",
        "project_name": "7",
    }
    assert type(found["generator_learning_rate"]) is float and type(found["rounds"]) is int


@pytest.mark.parametrize("text", ["report_to: wandb\n", "report_to: [wandb]\n", "report_to:\n  - wandb\n"])
def test_a_list_may_be_written_in_three_ways(write, text):
    assert values("--config", write(text))["report_to"] == ["wandb"]


def test_command_line_wins_over_yaml_whatever_the_order(write):
    path = write("rounds: 3\ntop_k: 9\nreport_to: [mlflow]\nuse_cpu: true\n")
    given = ["--rounds", 1, "--report_to", "wandb", "--use_cpu=false"]
    for arguments in (["--config", path, *given], [*given, "--config", path]):
        found = values(*arguments)
        assert (found["rounds"], found["top_k"], found["report_to"], found["use_cpu"]) == (1, 9, ["wandb"], False)


def test_command_line_wins_over_yaml_even_with_the_default_value(write):
    assert values("--config", write("rounds: 3\n"), "--rounds", DEFAULTS["rounds"])["rounds"] == DEFAULTS["rounds"]


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n"])
def test_an_empty_file_changes_nothing(write, content):
    assert values("--config", write(content)) == values()


def test_a_byte_order_mark_is_no_part_of_a_name(write):
    assert values("--config", write("\ufeffrounds: 3\n"))["rounds"] == 3


def test_the_flat_dictionary_of_a_run_can_be_given_back_as_yaml(write):
    before = values("--rounds", 5, "--report_to", "mlflow", "--retriever_learning_rate", "3e-7")
    assert parse_settings(["--config", write(yaml.safe_dump(before))]).to_dict() == before


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("rounds: 3\ngenrator: x\n", 2, ["'genrator'", "did you mean 'generator'?"]),
        ("config: other.yaml\n", 1, ["unknown setting 'config'"]),
        ("1: 2\n", 1, ["unknown setting '1'"]),
        ("rounds: 3\ntop_k: 1\nrounds: 4\n", 3, ["'rounds'", "twice"]),
        ("\n\nrounds: two\n", 3, ["--rounds", "'two'", "int"]),
        ("dropout: much\n", 1, ["--dropout", "'much'", "float"]),
        ("use_cpu: perhaps\n", 1, ["--use_cpu", "perhaps"]),
        ("mixed_precision: fp8\n", 1, ["--mixed_precision", "'fp8'"]),
        ("questions: {path: a.tsv}\n", 1, ["questions", "one value", "mapping"]),
        ("rounds: [1, 2]\n", 1, ["rounds", "one value", "sequence"]),
        ("questions: [a.tsv, [b.tsv]]\n", 1, ["questions", "one value or a list", "sequence"]),
        ("top_k: 2\nreport_to: [mlflow, [wandb]]\n", 2, ["report_to", "sequence"]),
        ("rounds: null\n", 1, ["rounds", "nothing"]),
        ("top_k: 2\nquestions:\n", 2, ["questions", "nothing"]),
        ("report_to: ~\n", 1, ["report_to", "nothing"]),
    ],
)
def test_refused_in_yaml_with_file_and_line(write, content, line, words):
    path = write(content)
    message = refusal("--config", path)
    assert message.startswith(f"{path}, line {line}: "), message
    assert all(word in message for word in words), message
    assert "Command line" not in message


@pytest.mark.parametrize(("content", "found"), [("- rounds\n", "seq"), ("rounds\n", "str"), ("7\n", "int")])
def test_a_file_that_is_no_mapping_is_refused(write, content, found):
    path = write(content)
    message = refusal("--config", path)
    assert path in message and "setting: value" in message and found in message


@pytest.mark.parametrize(
    "content", ["rounds: [1\n", "a: b: c\n", "rounds: 1\n--- \ntop_k: 2\n", b"run_name: caf\xe9\n"]
)
def test_broken_yaml_is_refused_naming_the_file(write, content):
    path = write(content)
    message = refusal("--config", path)
    assert path in message and "not valid YAML" in message and "\n" not in message


def test_broken_yaml_is_refused_naming_the_line(write):
    assert "line 2" in refusal("--config", write("rounds: 1\na: b: c\n"))


def test_a_missing_file_is_refused_with_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal("--config", "none.yaml")
    assert str(tmp_path / "none.yaml") in message and "No such file" in message


def test_a_folder_is_no_yaml_file(tmp_path):
    assert str(tmp_path) in refusal("--config", tmp_path)


def test_out_of_range_in_yaml_is_refused(write):
    assert "--rounds: expected a value of at least 0, found -1." in refusal("--config", write("rounds: -1\n"))


def test_python_tags_are_not_obeyed(write, tmp_path):
    target = tmp_path / "made"
    message = refusal("--config", write(f"rounds: !!python/object/apply:pathlib.Path.touch [{target}]\n"))
    assert "line 1" in message and not target.exists()


# ---- the quickstart set


@pytest.fixture
def quickstart_settings(write, monkeypatch):
    path = write("rounds: 7\ntop_k: 3\ngenerator_learning_rate: 1e-2\n", "quickstart.yaml")
    monkeypatch.setattr(config, "QUICKSTART_SETTINGS", Path(path))


def of(settings):
    return tuple(settings[name] for name in ("rounds", "top_k", "generator_learning_rate"))


def test_quickstart_brings_settings_that_everything_else_wins_over(quickstart_settings, write):
    assert of(values(own=[])) == (7, 3, 0.01)
    assert of(values("--rounds", 1, own=[])) == (1, 3, 0.01)
    assert of(values("--config", write("top_k: 9\n"), own=[])) == (7, 9, 0.01)
    assert of(values("--config", write("top_k: 9\n"), "--top_k", 2, own=[])) == (7, 2, 0.01)


def test_own_questions_do_not_get_the_settings_of_the_quickstart_set(quickstart_settings, write):
    assert values() == DEFAULTS | {"questions": "own.tsv"}
    assert values("--config", write("questions: own.tsv\n"), own=[]) == DEFAULTS | {"questions": "own.tsv"}


def test_the_settings_shipped_with_the_quickstart_set_are_accepted():
    assert values(own=[])["questions"] == "quickstart"


@pytest.mark.parametrize("name", ["a b/c", "user/", "one/two/three", "user/na--me"])
def test_a_hub_name_that_cannot_be_one_is_refused_before_anything_is_trained(name):
    with pytest.raises(InputError, match="--hub_model_id: expected user/name"):
        parse_settings(["--push_to_hub", "--hub_model_id", name])


def test_an_answer_cannot_have_to_be_longer_than_it_may_be():
    assert "--min_answer_tokens: expected at most --answer_tokens, 5, found 6" in refusal(
        "--answer_tokens=5", "--min_answer_tokens=6"
    )
    assert values("--answer_tokens=6", "--min_answer_tokens=6")["min_answer_tokens"] == 6


def test_an_extractive_answer_may_repeat_what_the_text_repeats():
    assert "--extractive: expected --no_repeat_ngram_size 0" in refusal("--extractive", "--no_repeat_ngram_size=3")
    assert values("--extractive")["extractive"] is True


# ---- several files


@pytest.mark.parametrize("name", ["questions", "eval_questions", "passages"])
def test_one_or_several_files(name, write):
    own = [] if name == "questions" else OWN
    assert values(f"--{name}", "a.tsv", own=own)[name] == "a.tsv"  # as in settings.json of earlier versions
    assert values(f"--{name}=a.tsv", own=own)[name] == "a.tsv"
    assert values(f"--{name}", "a.tsv", "b*.tsv", "--rounds", 1, own=own)[name] == ["a.tsv", "b*.tsv"]
    for content, expected in {"a.tsv": "a.tsv", "[a.tsv]": "a.tsv", "[a.tsv, b*.tsv]": ["a.tsv", "b*.tsv"]}.items():
        assert values("--config", write(f"{name}: {content}\n"), own=own)[name] == expected
    both = values("--config", write(f"{name}: [a.tsv, b.tsv]\n"), f"--{name}", "c.tsv", own=own)
    assert both[name] == "c.tsv"


def test_several_files_are_not_the_quickstart_set(quickstart_settings):
    assert of(values("--questions", "a.tsv", "b.tsv", own=[])) == of(DEFAULTS)
    assert of(values("--questions", "quickstart", own=[])) == (7, 3, 0.01)


@pytest.mark.parametrize(
    ("given", "accepted"), [(";", True), ("tab", True), ("::", False), ("", False), ("words", False)]
)
def test_the_delimiter_is_one_character(given, accepted):
    if accepted:
        assert values("--delimiter", given)["delimiter"] == given
    else:
        assert "--delimiter: expected one character" in refusal("--delimiter", given)


def test_settings_of_a_run_with_several_files_are_read_again(tmp_path):
    from cozyrag.commands.audit import saved_settings

    before = parse_settings(["--questions", "a.tsv", "b [1].tsv", "--passages", "p*.jsonl", "--delimiter", "|"])
    (tmp_path / "settings.json").write_text(json.dumps(before.to_dict()))
    assert saved_settings(tmp_path) == before
    assert parse_settings(["--config", str(tmp_path / "settings.json")]) == before
