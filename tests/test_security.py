"""Nothing pickled is loaded, no foreign code is run, and no secret is left behind."""

import ast
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_house import ROOT, TREES

from cozyrag.config import parse_settings
from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.pipeline import CozyRAG
from cozyrag.retrieval.passage_index import PassageIndex
from cozyrag.run import train

SECRETS = {
    "HF_TOKEN": "hf_PlantedTokenThatNobodyMayFind01",
    "WANDB_API_KEY": "0123456789abcdefplantedwandb0123456789ab",
    "MLFLOW_TRACKING_TOKEN": "planted-mlflow-token-7f3a",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password-7f3a",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/secret/key/0123456789",
}


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def planted(folder: Path, *names: str) -> Path:
    """A trap under each of these names; gives back the file that would be made."""
    sprung = folder / "sprung"
    for name in names:
        torch.save({"weight": Trap(sprung)}, folder / name)
    return sprung


def without_safetensors(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    for weights in folder.rglob("*.safetensors*"):
        weights.unlink()
    return folder


# ---- pickles


@pytest.mark.parametrize("load", [Generator.load, Retriever.load], ids=["generator", "retriever"])
@pytest.mark.parametrize("honest", [True, False], ids=["weights", "trap"])
def test_a_model_folder_with_pickled_weights_alone_is_refused(load, honest, request, tmp_path):
    name = "generator_path" if load == Generator.load else "retriever_path"
    folder = without_safetensors(request.getfixturevalue(name), tmp_path / "model")
    sprung = planted(folder, "pytorch_model.bin")
    if honest:
        model = load(str(request.getfixturevalue(name))).model
        torch.save(
            (model if load == Generator.load else model[0].auto_model).state_dict(), folder / "pytorch_model.bin"
        )
    with pytest.raises(InputError, match="safetensors"):
        load(str(folder))
    assert not sprung.exists()


def test_a_part_of_a_retriever_that_is_pickled_is_refused(retriever_path, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(retriever_path, folder)
    modules = json.loads((folder / "modules.json").read_text())
    kind = "sentence_transformers.models.Dense"
    modules.insert(2, {"idx": 2, "name": "dense", "path": "2_Dense", "type": kind})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    width = {"in_features": 32, "out_features": 8, "bias": False, "activation_function": "torch.nn.Tanh"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(width))
    torch.save({"linear.weight": torch.zeros(8, 32)}, folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        Retriever.load(str(folder))


def test_pickles_beside_the_weights_are_not_touched(pair_folder, tmp_path):
    folder = tmp_path / "pair"
    shutil.copytree(pair_folder, folder)
    names = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl")
    sprung = [planted(folder / part, *names) for part in ("generator", "retriever", "index")]
    size = (folder / "index" / "index.faiss").stat().st_size
    (folder / "index" / "index.faiss").write_bytes(os.urandom(size))  # FAISS would refuse it, or worse
    found = CozyRAG.from_pretrained(folder).answer("What colour is the fox 0?")
    assert found.passages and not any(path.exists() for path in sprung)


def test_a_poisoned_faiss_file_is_not_read(pair_folder, tmp_path):
    shutil.copytree(pair_folder / "index", tmp_path / "index")
    sprung, size = tmp_path / "sprung", (tmp_path / "index" / "index.faiss").stat().st_size
    (tmp_path / "index" / "index.faiss").write_bytes(pickle.dumps(Trap(sprung)).ljust(size, b"\0"))
    fingerprint = json.loads((tmp_path / "index" / "index.json").read_text())["retriever_fingerprint"]
    assert len(PassageIndex.load(tmp_path / "index", fingerprint=fingerprint)) == 40 and not sprung.exists()


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
def test_a_trap_in_the_state_to_resume_from_does_not_spring(name, tmp_path):
    accelerator = Accelerator(cpu=True)
    weights = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(weights.parameters())
    parts = accelerator.prepare(weights, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    assert len(parts) == 3
    accelerator.save_state(str(tmp_path / "state"))
    sprung = planted(tmp_path / "state", name)
    try:
        accelerator.load_state(str(tmp_path / "state"))
    except pickle.UnpicklingError as refused:
        assert "mkdir" in str(refused)
    assert not sprung.exists()


# ---- code


FOLDERS = ("cozyrag", "metric_modules", "scripts", "benchmarks")
SOURCES = [*(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")), ROOT / "train.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nobody_trusts_remote_code_or_loads_pickles(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    faults = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        named, options = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        risky = [word for word in ("trust_remote_code", "allow_pickle") if options.get(word, "False") != "False"]
        faults += [(call.lineno, word) for word in risky]
        if named == "torch.load" and options.get("weights_only") != "True":
            faults.append((call.lineno, named))
        if named in ("pickle.load", "pickle.loads", "joblib.load", "faiss.read_index", "yaml.load", "eval", "exec"):
            faults.append((call.lineno, named))
    words = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value == "trust_remote_code"]
    faults += [(node.lineno, node.value) for node in words]
    assert faults == []


def test_models_are_loaded_from_safetensors_alone():
    loading = ("SentenceTransformer", "AutoModelForCausalLM.from_pretrained", "AutoModel.from_pretrained")
    asked = [
        (name, ast.unparse(call))
        for name, tree in TREES.items()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func) in loading and call.args
    ]
    assert len(asked) == 3 and all("use_safetensors" in call or "gguf_file" in call for _, call in asked)


def test_a_model_that_brings_code_of_its_own_is_refused(generator_path, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(generator_path, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'sprung')!r})")
    with pytest.raises(InputError):
        Generator.load(str(folder))
    assert not (tmp_path / "sprung").exists()


OWN = {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoModel": "own.Own"}}


def rewrite(path: Path, **changed) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def own_code(folder: Path, sprung: Path) -> Path:
    """Code in a model's folder that makes a file as soon as it is imported."""
    (folder / "own.py").write_text(f"import os; os.mkdir({str(sprung)!r})\nclass Own: pass\n")
    return sprung


def in_config(folder: Path) -> None:
    rewrite(folder / "config.json", model_type="own", **OWN)


def in_tokenizer(folder: Path) -> None:
    own = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    rewrite(folder / "tokenizer_config.json", **own)


def in_generation(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "own.py", folder / "custom_generate" / "generate.py")


def as_module(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "own.Own"
    (folder / "modules.json").write_text(json.dumps(modules))


def as_module_on_the_path(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "antigravity.Own"  # a module of Python that acts when it is imported
    (folder / "modules.json").write_text(json.dumps(modules))


def in_options_of_a_module(folder: Path) -> None:
    in_config(folder)
    trusting = {"trust_remote_code": True, "weights_only": False, "use_safetensors": False}
    rewrite(folder / "sentence_bert_config.json", model_args=trusting, config_args=trusting, tokenizer_args=trusting)


WAYS = {
    "generator": (in_config, in_tokenizer, in_generation),
    "retriever": (in_config, in_tokenizer, as_module, as_module_on_the_path, in_options_of_a_module),
}


@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, way) for kind in WAYS for way in WAYS[kind]],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_code_in_the_folder_of_a_model_does_not_run_even_if_somebody_says_yes(
    kind, way, request, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(f"{kind}_path"), folder)
    sprung = own_code(folder, tmp_path / "sprung")
    way(folder)
    try:
        (Generator if kind == "generator" else Retriever).load(str(folder))
    except InputError as refused:
        assert str(folder) in str(refused)
    assert not asked and not sprung.exists()
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("where", ["pair", "base"])
def test_a_pair_and_the_base_of_an_adapter_run_no_code(where, pair_folder, generator_path, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    shutil.copytree(pair_folder, tmp_path / "pair")
    folder = tmp_path / "pair" / "generator"
    if where == "base":
        pytest.importorskip("peft")
        shutil.copytree(generator_path, tmp_path / "base")
        generator = Generator.load(str(tmp_path / "base"))
        generator.add_adapter(str(tmp_path / "base"), rank=2, alpha=2.0, dropout=0.0, targets=[], revision=None, seed=0)
        shutil.rmtree(folder)
        generator.save(folder)
        folder = tmp_path / "base"
    sprung = own_code(folder, tmp_path / "sprung")
    in_config(folder)
    with pytest.raises(InputError):
        CozyRAG.from_pretrained(tmp_path / "pair")
    assert not sprung.exists()


@pytest.fixture
def adapter_folder(generator_path, tmp_path):
    """An adapter of the tiny generator."""
    pytest.importorskip("peft")
    generator = Generator.load(str(generator_path))
    generator.add_adapter(str(generator_path), rank=2, alpha=2.0, dropout=0.0, targets=[], revision=None, seed=0)
    generator.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_pickled_weights_of_an_adapter_are_not_loaded(adapter_folder, tmp_path):
    (adapter_folder / "adapter_model.safetensors").unlink()
    sprung = planted(adapter_folder, "adapter_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        Generator.load(str(adapter_folder))
    assert not sprung.exists()


def test_an_adapter_imports_no_module_by_name(adapter_folder):
    rewrite(adapter_folder / "adapter_config.json", megatron_config={}, megatron_core="antigravity")
    with pytest.raises(InputError, match="megatron"):
        Generator.load(str(adapter_folder))
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("kind", ["generator", "retriever"])
@pytest.mark.parametrize("options", [{"attn_implementation": "someone/kernel"}, {"allow_all_kernels": True}], ids=str)
def test_a_model_names_no_kernel_that_would_be_downloaded_and_run(kind, options, request, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(f"{kind}_path"), folder)
    if kind == "generator":
        rewrite(folder / "config.json", **options)
    else:
        rewrite(folder / "sentence_bert_config.json", model_args=options)
    with pytest.raises(InputError, match="kernel"):
        (Generator if kind == "generator" else Retriever).load(str(folder))


HUGE = [{"n_layer": 10**9}, {"n_positions": 10**9}, {"n_embd": 2**20}, {"vocab_size": 10**12}, {"n_layer": -7}]


@pytest.mark.parametrize("changed", HUGE, ids=str)
def test_a_model_is_not_built_larger_than_its_weights(changed, generator_path, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(generator_path, folder)
    rewrite(folder / "config.json", **changed)
    with pytest.raises(InputError, match="config.json"):
        Generator.load(str(folder))


def test_other_numbers_of_a_configuration_may_be_large(generator_path, tmp_path):
    shutil.copytree(generator_path, tmp_path / "model")
    rewrite(tmp_path / "model" / "config.json", block_size=4096, expert_intermediate_size=8192, layer_norm_epsilon=1e-5)
    assert Generator.load(str(tmp_path / "model"))


# ---- secrets


@pytest.mark.slow
def test_no_secret_is_in_anything_that_a_run_leaves_or_says(short_run, tmp_path, monkeypatch, capfd):
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'out' / 'trackers' / 'mlflow.db'}")
    folder = tmp_path / "out"
    (folder / "trackers").mkdir(parents=True)
    shutil.rmtree(folder)
    (tmp_path / "settings.yaml").write_text(f"run_name: tiny\n# {SECRETS['HF_TOKEN']}\n")
    options = ["--config", str(tmp_path / "settings.yaml"), "--report_to", "tensorboard", "wandb", "--save_steps", "2"]
    train([*short_run, *options, "--output_dir", str(folder)])
    said = "".join(capfd.readouterr())
    files = [path for path in folder.rglob("*") if path.is_file()]
    left = {str(path.relative_to(folder)): path.read_bytes() for path in files} | {"the screen": said.encode()}
    assert {"cozyrag.json", "metrics.jsonl", "README.md"} & {path.name for path in files} and len(files) > 15
    secrets = {name: secret.encode() for name, secret in SECRETS.items()}
    found = [(name, place) for place, content in left.items() for name, secret in secrets.items() if secret in content]
    assert found == []


@pytest.mark.parametrize("given", ["--hub_token=hf_secret", "--hub_token hf_secret"])
def test_a_secret_given_as_a_setting_is_refused_without_being_repeated(given):
    with pytest.raises(InputError, match="unknown setting '--hub_token'") as refused:
        parse_settings(given.split())
    assert "hf_secret" not in str(refused.value)


def test_a_secret_in_a_settings_file_is_refused_without_being_repeated(tmp_path):
    (tmp_path / "s.yaml").write_text("token: hf_secret\n")
    with pytest.raises(InputError, match="unknown setting 'token'") as refused:
        parse_settings(["--config", str(tmp_path / "s.yaml")])
    assert "hf_secret" not in str(refused.value)
