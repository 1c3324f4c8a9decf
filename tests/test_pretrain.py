"""The pretraining script on a handful of articles: what is left out, what a made-up question looks like, resuming."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import corpus, write_jsonl
from transformers import AutoTokenizer

from cozyrag.generator import Generator
from cozyrag.prompts import ANSWER_CUE, QUESTION_CUE

pytest.importorskip("bm25s")
SCRIPT = Path(__file__).parents[1] / "scripts" / "pretrain_generator.py"


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    found = importlib.util.spec_from_file_location("pretrain_generator", SCRIPT)
    module = importlib.util.module_from_spec(found)
    sys.modules["pretrain_generator"] = module
    found.loader.exec_module(module)
    return module


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pretrain_generator.py", *map(str, arguments)])
    script.main()


@pytest.fixture(scope="module")
def prepared(script, tmp_path_factory):
    """Token arrays of 40 articles and 120 questions; three titles are left out."""
    folder = tmp_path_factory.mktemp("pretrain")
    passages, questions = corpus(40)
    text = " ".join(
        f"In the year {1200 + i}, Count Robert of Burgundy gave {i} silver coins to the old monastery near Dijon."
        for i in range(5)
    )
    articles = [{"id": p["id"], "title": p["title"], "text": f"{p['text']} {text}"} for p in passages]
    rows = [
        {
            "id": q["id"],
            "question": q["question"],
            "answers": q["answers"],
            "title": passages[n // 2]["title"],
            "context": passages[n // 2]["text"],
        }
        for n, q in enumerate(questions)
    ]
    left_out = [{"title": passages[n]["title"].replace(" ", "_").upper()} for n in (3, 4, 5)]
    files = [
        write_jsonl(folder / f"{name}.jsonl", data)
        for name, data in (("text", articles), ("questions", rows), ("left_out", left_out))
    ]
    with pytest.MonkeyPatch.context() as patch:
        run(
            script,
            patch,
            "prepare",
            "--text",
            files[0],
            "--questions",
            files[1],
            "--leave_out",
            files[2],
            "--folder",
            folder / "prepared",
            "--vocab_size",
            600,
        )
    return folder / "prepared", [passages[n] for n in (3, 4, 5)]


def test_titles_left_out_are_nowhere_in_the_arrays(prepared):
    folder, left_out = prepared
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text, questions = np.load(folder / "text.npz"), np.load(folder / "questions.npz")
    everything = [
        tokenizer.decode(array.tolist())
        for array in (
            text["tokens"],
            text["titles"],
            *(questions[n] for n in ("question", "gold", "found", "without", "sentence")),
        )
    ]
    assert "Fox 0:" in everything[1]
    for passage in left_out:
        assert not any(
            passage["title"].lower() + end in part.lower() for part in everything for end in (":", " is", "?")
        )


def test_a_made_up_question_has_its_answer_in_its_context_and_not_in_itself(script, prepared):
    folder, _ = prepared
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    cloze = script.Cloze(folder, tokenizer, lm_share=0.0)
    examples = [cloze.example(np.random.default_rng([1, i])) for i in range(200)]
    examples = [example for example in examples if example is not None]
    assert len(examples) > 100
    for example in examples:
        prompt = tokenizer.decode(example.input_ids[: example.prompt_length])
        answer = tokenizer.decode(example.input_ids[example.prompt_length :])
        assert answer.endswith(tokenizer.eos_token) and answer.startswith(" ")
        context, asked = prompt.split(QUESTION_CUE)
        assert asked.endswith(f"?{ANSWER_CUE}")
        assert answer.removesuffix(tokenizer.eos_token).strip() in context


def test_example_tokens_are_those_the_package_would_make(script, prepared):
    folder, _ = prepared
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for source in (script.Cloze(folder, tokenizer, lm_share=0.0), script.Questions(folder, tokenizer, mixed=True)):
        for i in range(50):
            example = source.example(np.random.default_rng([2, i]))
            if example is None:
                continue
            text = tokenizer.decode(example.input_ids[:-1])
            context, rest = text.split(QUESTION_CUE)
            question, answer = rest.split(ANSWER_CUE)
            pieces = [context, f"{QUESTION_CUE}{question}{ANSWER_CUE}", answer]
            assert [i for piece in pieces for i in tokenizer(piece)["input_ids"]] == example.input_ids[:-1]


def test_weights_of_targets_sum_to_one_for_answers_and_one_for_plain_text(script):
    examples = [
        script.Example(list(range(10)), 1),
        script.Example(list(range(10)), 7),
        script.Example(list(range(12)), 10),
    ]
    weights = script.target_weights(examples)
    assert weights.shape == (9 + 3 + 2,)
    torch.testing.assert_close(weights[:9].sum(), torch.tensor(1.0))
    torch.testing.assert_close(weights[9:].sum(), torch.tensor(1.0))


SMALL = ["--rows", 2, "--row_tokens", 256, "--width", 64, "--layers", 1, "--logging_steps", 1, "--threads", 1]


def test_both_stages_train_and_a_resumed_run_ends_bit_equal(script, prepared, tmp_path, monkeypatch):
    folder, _ = prepared
    steps = ["--stage1_steps", 6, "--stage2_steps", 4]
    run(script, monkeypatch, "train", "--folder", folder, "--output_dir", tmp_path / "whole", *steps, *SMALL)
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row and row["stage"] == 1]
    assert losses[-1] < losses[0]
    assert all(0 <= row["validation_f1"] <= 100 for row in log if "validation_f1" in row)

    # stopped inside stage 2: the state that stage 2 saves after step 2 of 4 is what a stop there would leave
    save = script.save_state

    def save_then_stop(output, generator, optimizer, stage, step):
        save(output, generator, optimizer, stage, step)
        if (stage, step) == (2, 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(script, "save_state", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        run(
            script,
            monkeypatch,
            "train",
            "--folder",
            folder,
            "--output_dir",
            tmp_path / "halves",
            *steps,
            *SMALL,
            "--validate_minutes",
            0,
        )
    monkeypatch.setattr(script, "save_state", save)
    run(
        script,
        monkeypatch,
        "train",
        "--folder",
        folder,
        "--output_dir",
        tmp_path / "halves",
        *steps,
        *SMALL,
        "--resume",
    )
    whole, halves = (load_file(tmp_path / name / "generator" / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_the_result_is_an_ordinary_checkpoint_in_half_precision(script, prepared, tmp_path, monkeypatch):
    folder, _ = prepared
    run(
        script,
        monkeypatch,
        "train",
        "--folder",
        folder,
        "--output_dir",
        tmp_path,
        "--stage1_steps",
        1,
        "--stage2_steps",
        1,
        *SMALL,
    )
    assert {tensor.dtype for tensor in load_file(tmp_path / "generator" / "model.safetensors").values()} == {
        torch.float16
    }
    generator = Generator.load(str(tmp_path / "generator"))
    assert generator.model.dtype == torch.float32
    assert isinstance(generator.answer(["What is it?"], ["A fox."], context_tokens=32, max_new_tokens=3)[0], str)
