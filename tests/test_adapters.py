"""LoRA: what is trained and saved, loading, and that merging does not change answers."""

import json

import pytest
import torch
from accelerate import Accelerator
from test_trainer import weights

pytest.importorskip("peft")

from peft import AutoPeftModelForCausalLM  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from cozyrag.commands import merge
from cozyrag.config import parse_settings  # noqa: E402
from cozyrag.data.corpus import Corpus  # noqa: E402
from cozyrag.errors import InputError  # noqa: E402
from cozyrag.hub.push import push_pair  # noqa: E402
from cozyrag.models import lora  # noqa: E402
from cozyrag.models.generator import Generator  # noqa: E402
from cozyrag.pipeline import CozyRAG  # noqa: E402
from cozyrag.preflight.loss_check import check_terms  # noqa: E402
from cozyrag.reporting.run_reader import FinishedRun  # noqa: E402
from cozyrag.run import train  # noqa: E402
from cozyrag.runtime.fingerprints import weights_fingerprint  # noqa: E402
from cozyrag.training.checkpointing import Checkpoints  # noqa: E402
from cozyrag.training.setup import load_tables  # noqa: E402

ADAPTER = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": [], "revision": None, "seed": 1}
ASKED = ["What colour is the fox 0?", "In which year was the river 1 made?"]
BUDGETS = {"context_tokens": 40, "max_new_tokens": 5}


def with_adapter(path, *, moved=False, **options):
    """The tiny generator with an adapter, whose second factors are zero unless `moved`."""
    generator = Generator.load(str(path))
    generator.add_adapter(str(path), **ADAPTER | options)
    if moved:
        with torch.no_grad():
            for name, parameter in generator.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    return generator


@pytest.fixture
def arguments(corpus_files, generator_path, retriever_path):
    files = [part for name, path in corpus_files.items() for part in (f"--{name}", str(path))]
    return [
        *files, "--generator", str(generator_path), "--retriever", str(retriever_path), "--generator_batch_size", "16",
        "--retriever_steps", "1", "--context_tokens", "40", "--answer_tokens", "4", "--threads", "1",
        "--use_cpu", "True", "--lora_rank", "4", "--generator_learning_rate", "1e-2",
    ]  # fmt: skip


def test_a_peft_that_transformers_refuses_is_told_with_both_versions(generator_path, monkeypatch):
    monkeypatch.setattr(lora.transformers_peft, "MIN_PEFT_VERSION", "99.0")
    with pytest.raises(InputError, match=r"--lora_rank: expected PEFT 99.0 or newer.*found \d.*cozyrag\[lora\]"):
        with_adapter(generator_path)


def test_a_new_adapter_changes_no_answer_and_only_it_is_trainable(generator_path):
    plain, generator = Generator.load(str(generator_path)), with_adapter(generator_path)
    assert generator.answer(ASKED, ["The fox 0 is red.", ""], **BUDGETS) == plain.answer(
        ASKED, ["The fox 0 is red.", ""], **BUDGETS
    )
    trained = [name for name, parameter in generator.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4 and all("c_attn.lora_" in name for name in trained)  # two factors in each of two layers
    assert generator.is_adapter and not plain.is_adapter
    assert generator.saved_bytes() == 4 * 2 * (4 * 32 + 4 * 96) < plain.saved_bytes() / 10


def test_processes_draw_the_same_adapter_and_keep_the_random_state(generator_path):
    torch.manual_seed(5)
    first = with_adapter(generator_path)
    after = torch.rand(3)
    torch.manual_seed(9)
    assert weights_fingerprint(with_adapter(generator_path).model) == weights_fingerprint(first.model)
    torch.manual_seed(5)
    Generator.load(str(generator_path))
    assert torch.equal(after, torch.rand(3))


def test_an_adapter_is_saved_alone_and_loaded_exactly(generator_path, tmp_path):
    generator = with_adapter(generator_path, moved=True)
    generator.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("model*.safetensors"))
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(generator_path) and config["r"] == 4
    again = Generator.load(str(tmp_path / "saved"))
    assert weights_fingerprint(again.model) == weights_fingerprint(generator.model)
    assert [p.requires_grad for p in again.model.parameters()] == [
        p.requires_grad for p in generator.model.parameters()
    ]
    fresh = with_adapter(generator_path)
    fresh.restore(tmp_path / "saved")  # as a rollback does
    assert weights_fingerprint(fresh.model) == weights_fingerprint(generator.model)
    again.save(tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        generator_path
    )


def test_transformers_and_peft_load_it(generator_path, tmp_path):
    generator = with_adapter(generator_path, moved=True)
    generator.save(tmp_path / "saved")
    ids = torch.arange(8).unsqueeze(0)
    expected = generator.model.eval()(ids).logits
    for library in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        assert torch.allclose(library.from_pretrained(tmp_path / "saved").eval()(ids).logits, expected, atol=1e-4)


def test_the_packaged_model_is_found_at_its_current_path(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/elsewhere/cozyrag/assets/generator"})
    )
    assert lora.read_adapter(str(tmp_path)) == lora.Adapter(str(lora.GENERATOR_FOLDER), None)
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"cozyrag\[lora\]"):
        lora.read_adapter(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[]", b"{}", b"null", b"[" * 100_000, b'{"base_model_name_or_path": null}',
     b'{"base_model_name_or_path": ["a"]}', b'{"base_model_name_or_path": "a", "revision": 1}'],
    ids=range(10),
)  # fmt: skip
def test_a_damaged_config_is_one_sentence(tmp_path, content):
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(InputError, match="expected adapter_config.json to name the base model.*download the adapter"):
        lora.read_adapter(str(tmp_path))


def test_target_layers(generator_path):
    generator = with_adapter(generator_path, targets=["c_fc"])
    assert {name.split(".")[-4] for name, p in generator.model.named_parameters() if p.requires_grad} == {"c_fc"}
    with pytest.raises(InputError, match="--lora_targets"):
        with_adapter(generator_path, targets=["nothing_of_that_name"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--generator", "scratch"], "scratch"),
        (["--lora_rank", "-1"], "lora_rank"),
        (["--push_to_hub", "--hub_model_id", "me/rag"], "nobody else"),
    ],
)
def test_invalid_settings_are_refused(arguments, extra, message):
    with pytest.raises(InputError, match=message):
        parse_settings([*arguments, *extra])


def test_the_loss_check_counts_only_the_adapter(arguments, generator_path, retriever_path):
    from cozyrag.models.retriever import Retriever

    settings = parse_settings(arguments)
    corpus = load_tables(Accelerator(cpu=True), settings)
    assert isinstance(corpus, Corpus)
    found = check_terms(with_adapter(generator_path, moved=True), Retriever.load(str(retriever_path)), corpus, settings)
    assert (found[0].tensors, found[0].moved, found[0].fault) == (4, 4, None)
    fresh = check_terms(with_adapter(generator_path), Retriever.load(str(retriever_path)), corpus, settings)
    assert (fresh[0].tensors, fresh[0].moved, fresh[0].fault) == (4, 2, None)  # while B is zero, A has no gradient


@pytest.mark.slow
def test_a_run_trains_saves_resumes_and_merges_an_adapter(arguments, generator_path, tmp_path):
    before = weights(Generator.load(str(generator_path)).model)
    train(
        [*arguments, "--output_dir", str(tmp_path / "out"), "--rounds", "1", "--rollback", "off", "--report_to", "none"]
    )
    pair = CozyRAG.from_pretrained(tmp_path / "out")
    assert pair.generator.is_adapter
    state = pair.generator.model.state_dict()
    assert all(
        torch.equal(state[name.replace("c_attn.", "c_attn.base_layer.")], value) for name, value in before.items()
    )
    assert any(value.abs().max() > 0 for name, value in state.items() if "lora_B" in name)
    card = (tmp_path / "out" / "generator" / "README.md").read_text()
    assert "LoRA adapter" in card
    # resuming with one more round starts from the saved adapter
    train([*arguments, "--output_dir", str(tmp_path / "out"), "--rounds", "2", "--rollback", "off", "--resume", "True"])
    train([*arguments, "--output_dir", str(tmp_path / "whole"), "--rounds", "2", "--rollback", "off"])
    prints = [
        weights_fingerprint(CozyRAG.from_pretrained(tmp_path / name).generator.model) for name in ("out", "whole")
    ]
    assert prints[0] == prints[1] != weights_fingerprint(pair.generator.model)
    merged = merge.merge(str(tmp_path / "out"), str(tmp_path / "merged"))
    one = CozyRAG.from_pretrained(merged)
    assert not one.generator.is_adapter and not (merged / "checkpoints").exists() and FinishedRun.read(merged)
    assert [a.text for a in one.answers(ASKED)] == [
        a.text for a in CozyRAG.from_pretrained(tmp_path / "out").answers(ASKED)
    ]
    with pytest.raises(InputError, match="nobody else"):
        push_pair(tmp_path / "out", "me/rag")  # refused before any request
    assert "LoRA adapter" not in (merged / "generator" / "README.md").read_text()
    with pytest.raises(InputError, match="new or empty folder"):
        merge.merge(str(tmp_path / "out"), str(merged))
    with pytest.raises(InputError, match="nothing to merge"):
        merge.merge(str(merged), str(tmp_path / "again"))


@pytest.mark.slow
def test_a_run_interrupted_inside_the_generator_phase_ends_at_the_same_adapter(arguments, tmp_path, monkeypatch):
    once = [*arguments, "--rounds", "1", "--retriever_steps", "0", "--rollback", "off", "--save_steps", "2"]
    train([*once, "--output_dir", str(tmp_path / "whole")])
    save = Checkpoints.save

    def interrupted(self, progress, *models):
        save(self, progress, *models)
        if progress.step:
            raise RuntimeError("power failure")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power"):
        patch.setattr(Checkpoints, "save", interrupted)
        train([*once, "--output_dir", str(tmp_path / "out")])
    train([*once, "--output_dir", str(tmp_path / "out")])
    adapters_of = [
        (tmp_path / name / "generator" / "adapter_model.safetensors").read_bytes() for name in ("whole", "out")
    ]
    assert adapters_of[0] == adapters_of[1]
