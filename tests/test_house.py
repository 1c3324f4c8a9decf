"""The house rules that no single test would notice being broken: who may import, train, launch, and how files open."""

import ast
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

import cozyrag

PACKAGE = Path(cozyrag.__file__).parent
ROOT = PACKAGE.parent


def _name(path):
    """models.generator for cozyrag/models/generator.py; an __init__ has its package's name, the top one __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


TREES = {_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
ROOMS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
MODULES = sorted(set(TREES) - ROOMS - {"__init__"})
# Rooms and top-level modules, ground floor first: each imports those before it, never those after it.
FLOORS = (
    "errors",
    "runtime",
    "data",
    "models",
    "evaluation",
    "retrieval",
    "pair_file",
    "pair_evaluation",
    "hub",
    "pipeline",
    "serving",
    "reporting",
    "synthesis",
    "config_checks",
    "config",
    "training",
    "preflight",
    "run",
    "api",
    "commands",
    "cli",
    "__main__",
)
FOREIGN_BYTES = {
    "data.ingest_worker",  # where anything that a parser raises becomes a bad row
    "models.loading",  # where anything that a library raises for a model's files becomes one sentence
    "training.tracking",  # where anything that a tracker raises, of its server or its files, becomes one sentence
    "models.prompts",  # the same for a chat template, in a process of its own
}
KNOW_SETTINGS = {"training", "preflight", "run", "api", "commands"}
FORBIDDEN_NAMES = {
    "evaluate.py",
    "datasets.py",
    "utils.py",
    "common.py",
    "helpers.py",
}  # the first two would hide packages


def imported(tree):
    """Modules of the package that a module imports, wherever in it; names of the package itself are "__init__"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                alias.name.partition(".")[2] or "__init__"
                for alias in node.names
                if alias.name.split(".")[0] == "cozyrag"
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cozyrag":
            place = node.module.partition(".")[2]
            names = {f"{place}.{alias.name}".lstrip(".") for alias in node.names}
            found |= names & set(TREES) or {place or "__init__"}
    return found


def room_of(module):
    """The room of a module, or a top-level module itself."""
    return module.split(".")[0]


def calls(tree):
    """What is called: ("name",) for f(), ("owner", "name") for a.b.owner.name() or name().name()."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield (node.func.id,)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            yield (
                owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else "",
                node.func.attr,
            )


def calling(wanted):
    """Modules with a call that `wanted` recognises."""
    return {name for name, tree in TREES.items() if any(wanted(call) for call in calls(tree))}


# ---- imports


def test_the_floors_name_every_room_and_top_level_module_once():
    assert sorted(FLOORS) == sorted({room_of(name) for name in MODULES})


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_only(name):
    own = FLOORS.index(room_of(name))
    others = {other for other in imported(TREES[name]) - {"__init__"} if room_of(other) != room_of(name)}
    assert {other for other in others if FLOORS.index(room_of(other)) >= own} == set()


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_modules_of_a_room_do_not_import_each_other_in_a_circle(room):
    left = {name: imported(TREES[name]) for name in MODULES if room_of(name) == room}
    while ready := [name for name, others in left.items() if not others & set(left)]:
        for name in ready:
            del left[name]
    assert left == {}


def test_rooms_import_nothing_by_themselves():
    assert [room for room in ROOMS if TREES[room].body] == []


def test_no_import_is_relative():
    assert [
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ] == []


def test_the_package_itself_imports_its_modules_only_when_asked():
    at_once = [node for node in TREES["__init__"].body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {alias.name for node in at_once for alias in node.names} == {"os", "sys"}
    assert imported(TREES["__init__"]) == {"pipeline", "api"}


def test_from_the_package_itself_only_the_version_is_taken():
    taken = {
        alias.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "cozyrag"
        for alias in node.names
        if alias.name not in set(TREES) | ROOMS
    }
    assert taken <= {"__version__"}


def test_settings_are_known_to_the_few_who_run_things():
    knowing = {room_of(name) for name, tree in TREES.items() if "config" in imported(tree)}
    assert knowing <= KNOW_SETTINGS


def test_the_script_is_an_entry_point_and_nothing_more():
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    assert imported(tree) == {"cli", "commands.train"}
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


# ---- who may do what


def test_only_the_phases_call_backward():
    phases = {f"training.{model}_phase" for model in ("generator", "retriever", "reranker")}
    assert calling(lambda call: call[-1] == "backward") == phases


def test_only_the_self_tests_take_gradients_aside():
    assert calling(lambda call: call[-1] == "grad") == {"preflight.loss_check", "preflight.environment"}


def test_only_the_trainer_steps_an_optimizer_or_makes_one():
    assert calling(
        lambda call: len(call) == 2 and call[-1] == "step" and any(word in call[0] for word in ("optim", "sched"))
    ) == {"training.trainer"}
    assert calling(lambda call: call[-1] in ("AdamW", "Adam", "SGD", "get_scheduler")) == {"training.trainer"}


def test_only_the_setup_constructs_an_accelerator():
    assert calling(lambda call: call[-1] == "Accelerator") == {"training.setup"}


def test_only_the_index_attaches_faiss():
    attaching = ("search_batch", "add_faiss_index_from_external_arrays", "add_faiss_index")
    assert calling(lambda call: call[-1] in attaching) == {"retrieval.passage_index"}


def test_kinds_of_faiss_indexes_are_made_in_one_place_and_never_read_from_files():
    assert calling(lambda call: call[-1] in ("IndexFlatIP", "IndexIVFPQ", "index_factory")) == {"retrieval.faiss_index"}
    assert calling(lambda call: call[-1] == "read_index") == set()


def test_only_the_uploader_talks_to_the_hub_to_write():
    assert calling(
        lambda call: (
            call[-1]
            in (
                "create_repo",
                "create_commit",
                "upload_folder",
                "upload_file",
                "push_to_hub",
                "create_tag",
                "delete_tag",
            )
        )
    ) == {"hub.push"}


def test_only_the_command_line_ends_the_process():
    assert calling(lambda call: call[-1] in ("exit", "_exit", "quit")) == {"cli"}


def test_no_pickles_are_read_or_written():
    assert (
        calling(lambda call: call in {("torch", "load"), ("torch", "save")} or call[0] in ("pickle", "joblib")) == set()
    )


LOADERS = ("from_pretrained", "from_config", "SentenceTransformer")
OURS = ("CozyRAG", "PeftModel", "cls")  # ours passes it on; PEFT loads only weights, into a model that is there
PLACES = [*(path for name in ("cozyrag", "scripts", "benchmarks") for path in sorted((ROOT / name).rglob("*.py")))]


def trusting(tree):
    """Lines of calls that load a model, a tokenizer or a configuration without the words trust_remote_code=False."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func).rpartition(".")[0]
        said = {word.arg: ast.unparse(word.value) for word in node.keywords}
        from_files = name != "SentenceTransformer" or "modules" not in said
        if name in LOADERS and owner not in OURS and from_files and said.get("trust_remote_code") != "False":
            yield f"line {node.lineno}: {ast.unparse(node.func)}"


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_load_of_a_model_says_that_it_trusts_no_code(path):
    # Left out, it is None for transformers: then a `y` on standard input runs the code.
    assert list(trusting(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    ("line", "faults"),
    [
        ("AutoConfig.from_pretrained(name)", 1),
        ("AutoTokenizer.from_pretrained(name, **source)", 1),
        ("SentenceTransformer(name, trust_remote_code=True)", 1),
        ("SentenceTransformer(modules=parts)", 0),
        ("AutoModel.from_pretrained(name, trust_remote_code=False)", 0),
    ],
)
def test_a_load_that_trusts_code_is_found(line, faults):
    assert len(list(trusting(ast.parse(line)))) == faults


# ---- how files are written


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_split_at_more_than_newlines(path):
    # A text may hold U+2028: `splitlines` would cut its row of JSON in two.
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "splitlines"
    ] == []


def test_json_lines_are_written_and_read_in_one_place():
    joined = [
        f"{name}, line {node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and ast.unparse(node).endswith("+ '\\n'")
        if "dumps" in ast.unparse(node) and "indent" not in ast.unparse(node)
    ]
    assert [place for place in joined if not place.startswith("runtime.json_lines")] == []


def test_no_file_has_a_name_that_says_nothing_or_hides_a_package():
    sources = [
        path
        for folder in (PACKAGE, ROOT / "tests", ROOT / "benchmarks", ROOT / "scripts")
        for path in folder.rglob("*.py")
    ]
    sources += ROOT.glob("*.py")
    named_by_users = PACKAGE / "commands"  # as they are called, in a package, so that they hide nothing
    assert [str(path) for path in sources if path.name in FORBIDDEN_NAMES and path.parent != named_by_users] == []
    assert not {name.split(".")[-1] for name in MODULES if "." not in name} & (
        set(sys.stdlib_module_names) | {"torch", "faiss", "datasets", "evaluate", "accelerate", "transformers"}
    )


@pytest.mark.parametrize("name", MODULES)
def test_every_module_opens_with_a_docstring(name):
    assert len((ast.get_docstring(TREES[name]) or "").split()) >= 5


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.name)
def test_every_test_file_opens_with_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_and_classes_say_what_they_do(name):
    silent = [
        node.name
        for node in TREES[name].body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


@pytest.mark.parametrize("name", MODULES)
def test_no_broad_except_no_mutable_default_no_guessing(name):
    faults = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            faults += [
                f"line {node.lineno}: broad except"
                for kind in caught
                if kind is None or ast.unparse(kind) in ("Exception", "BaseException")
                if name not in FOREIGN_BYTES
            ]
        elif isinstance(node, (ast.FunctionDef, ast.Lambda)):
            defaults = [*node.args.defaults, *node.args.kw_defaults]
            faults += [
                f"line {node.lineno}: mutable default"
                for value in defaults
                if isinstance(value, (ast.List, ast.Dict, ast.Set))
            ]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            faults.append(f"line {node.lineno}: hasattr")
    assert faults == []


# ---- the accelerate configs


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_each_config_and_it_says_what_it_is_for(path):
    config = load_config_from_file(str(path))
    processes = {
        "cpu": 1,
        "cpu_ddp": 2,
        "single_gpu": 1,
        "multi_gpu": 2,
        "multi_node": 4,
        "fsdp": 2,
        "zero2": 2,
    }
    assert config.num_processes == processes[path.stem]
    assert config.use_cpu is path.stem.startswith("cpu")
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_all_seven_configs_are_there():
    names = {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert names == {"cpu", "cpu_ddp", "single_gpu", "multi_gpu", "multi_node", "fsdp", "zero2"}


def test_ci_runs_the_second_command_of_the_readme():
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```bash\n")
    second = blocks[2].split("\n```")[0]
    assert second.startswith("python3 -m venv") and "pytest" in second and "\n" not in second
    assert second in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
