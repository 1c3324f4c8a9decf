"""The house rules that no single test would notice being broken: who may import, train, launch, and how files open."""

import ast
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

import cozyrag

PACKAGE = Path(cozyrag.__file__).parent
ROOT = PACKAGE.parent
TREES = {
    path.stem: ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__" or path.parent == PACKAGE
}
# A module may import modules of the tiers above its own line, never of its own line or below.
TIERS = (
    (
        "errors",
        "assets",
        "losses",
        "metrics",
        "fingerprints",
        "sentences",
        "penalties",
        "constrained_decoding",
        "gpt2_last_block",
        "index_refresh",
        "deduplication",
        "hub_retry",
        "hardware",
        "curves",
        "signals",
    ),
    (
        "atomic_files",
        "distributed",
        "rows",
        "streams",
        "bm25",
        "faiss_index",
        "fsdp",
        "int8_encoding",
        "greedy_decoding",
        "smollm2",
        "precision",
    ),
    (
        "readers",
        "prompts",
        "passage_index",
        "tracking",
        "retriever",
        "run_reader",
        "templates",
        "plots",
        "chunking",
        "parsers",
        "config_checks",
    ),
    ("passages", "batching", "hybrid", "documents", "model_cards"),
    ("lora", "micro_batches"),
    ("questions", "generator", "contexts", "ingest_worker"),
    (
        "corpus",
        "evaluation",
        "lm_feedback",
        "pipeline",
        "rollback",
        "ingest_assemble",
        "check_questions",
        "vector_shards",
    ),
    ("config", "push", "compare", "ingest", "overlap_audit", "output_dir"),
    ("trainer", "checkpointing", "html_report", "background_push"),
    ("generator_phase", "retriever_phase"),
    ("run_log", "loss_check", "environment", "pair_check"),
    ("cost_model",),
    ("gauges",),
    ("callbacks", "run_retrieval"),
    ("round_cache",),
    ("rounds",),
    ("phase_probe",),
    ("probe",),
    ("plan", "demo_app"),
    ("run", "hf_space", "merge_adapter"),
    ("build_index", "audit"),
    ("cli",),
)
TIER = {name: number for number, tier in enumerate(TIERS) for name in tier}
MAY_KNOW_SETTINGS = {
    "run",
    "trainer",
    "generator_phase",
    "retriever_phase",
    "callbacks",
    "loss_check",
    "run_retrieval",
    "round_cache",
    "rounds",
    "phase_probe",
    "probe",
    "plan",
    "build_index",
    "audit",
    "cli",
}
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
                alias.name.rpartition(".")[2] if "." in alias.name else "__init__"
                for alias in node.names
                if alias.name.split(".")[0] == "cozyrag"
            }
        elif isinstance(node, ast.ImportFrom) and node.module == "cozyrag":
            found |= {alias.name if alias.name in TREES else "__init__" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cozyrag."):
            modules = {alias.name for alias in node.names} & set(TREES)
            found |= modules or {node.module.rpartition(".")[2]}
    return found


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


def test_the_table_of_tiers_names_every_module_once():
    named = [name for tier in TIERS for name in tier]
    assert len(named) == len(set(named)) and set(named) == set(TREES) - {"__init__"}


@pytest.mark.parametrize("name", sorted(set(TREES) - {"__init__"}))
def test_imports_go_to_earlier_tiers_only(name):
    assert {other for other in imported(TREES[name]) - {"__init__"} if TIER[other] >= TIER[name]} == set()


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
    assert imported(TREES["__init__"]) == {"pipeline"}


def test_from_the_package_itself_only_the_version_is_taken():
    taken = {
        alias.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "cozyrag"
        for alias in node.names
        if alias.name not in TREES
    }
    assert taken <= {"__version__"}


def test_settings_are_known_to_the_few_who_run_things():
    assert {name for name, tree in TREES.items() if "config" in imported(tree)} <= MAY_KNOW_SETTINGS


def test_the_script_is_a_door_and_nothing_more():
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    assert imported(tree) == {"cli", "run"}
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


# ---- who may do what


def test_only_the_phases_call_backward():
    assert calling(lambda call: call[-1] == "backward") == {"generator_phase", "retriever_phase"}


def test_only_the_self_tests_take_gradients_aside():
    assert calling(lambda call: call[-1] == "grad") == {"loss_check", "environment"}


def test_only_the_trainer_steps_an_optimizer_or_makes_one():
    assert calling(
        lambda call: len(call) == 2 and call[-1] == "step" and any(word in call[0] for word in ("optim", "sched"))
    ) == {"trainer"}
    assert calling(lambda call: call[-1] in ("AdamW", "Adam", "SGD", "get_scheduler")) == {"trainer"}


def test_only_run_constructs_an_accelerator():
    assert calling(lambda call: call[-1] == "Accelerator") == {"run"}


def test_only_the_index_attaches_faiss():
    attaching = ("search_batch", "add_faiss_index_from_external_arrays", "add_faiss_index")
    assert calling(lambda call: call[-1] in attaching) == {"passage_index"}


def test_kinds_of_faiss_indexes_are_made_in_one_place_and_never_read_from_files():
    assert calling(lambda call: call[-1] in ("IndexFlatIP", "IndexIVFPQ", "index_factory")) == {"faiss_index"}
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
    ) == {"push"}


def test_only_the_doors_end_the_process():
    assert calling(lambda call: call[-1] in ("exit", "_exit", "quit")) == {"cli"}


def test_no_pickles_are_read_or_written():
    assert (
        calling(lambda call: call in {("torch", "load"), ("torch", "save")} or call[0] in ("pickle", "joblib")) == set()
    )


# ---- how files are written


def test_no_file_has_a_name_that_says_nothing_or_hides_a_package():
    sources = [
        path
        for folder in (PACKAGE, ROOT / "tests", ROOT / "benchmarks", ROOT / "scripts")
        for path in folder.rglob("*.py")
    ]
    sources += ROOT.glob("*.py")
    assert [str(path) for path in sources if path.name in FORBIDDEN_NAMES] == []
    assert not set(TREES) & (
        set(sys.stdlib_module_names) | {"torch", "faiss", "datasets", "evaluate", "accelerate", "transformers"}
    )


@pytest.mark.parametrize("name", sorted(TREES))
def test_every_module_opens_with_a_docstring(name):
    assert len((ast.get_docstring(TREES[name]) or "").split()) >= 5


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.name)
def test_every_test_file_opens_with_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", sorted(TREES))
def test_public_functions_and_classes_say_what_they_do(name):
    silent = [
        node.name
        for node in TREES[name].body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


@pytest.mark.parametrize("name", sorted(TREES))
def test_no_broad_except_no_mutable_default_no_guessing(name):
    faults = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            faults += [
                f"line {node.lineno}: broad except"
                for kind in caught
                if kind is None or ast.unparse(kind) in ("Exception", "BaseException")
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
