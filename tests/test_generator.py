"""The generator: losses, greedy answers, confidence, and the models it refuses.

TokenLosses is compared with the full forward pass and labels of -100, values and gradients; greedy answers with a loop
that has no padding, no batch and no cache; confidence with products of probabilities set by hand.
"""

import copy
import inspect
import math

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
)

import cozyrag.generator
from cozyrag.batches import collate
from cozyrag.config import parse_settings
from cozyrag.errors import InputError
from cozyrag.generator import DROPOUT_FIELDS, AnswerRepeats, Decoding, Generator, TokenLosses
from cozyrag.prompts import ANSWER_CUE, QUESTION_CUE, Example, encode_examples

PASSAGES, QUESTIONS = tiny.corpus(12)
ASKED = [row["question"] for row in QUESTIONS]
CONTEXTS = [PASSAGES[i // 2]["text"][: 7 * i] for i in range(len(QUESTIONS))]  # of many lengths, the first empty
BUDGETS = {"context_tokens": 60, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def generator(generator_path):
    """The tiny GPT-2 with larger weights and a head of its own: its answers differ, and some end before others."""
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
    """The loss as transformers computes it: all logits, labels -100 everywhere but on the answer."""
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
def test_padding_changes_no_loss(generator, examples, pad_id):
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
    """One prompt, one token at a time, the whole input each time."""
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


def test_answer_reads_no_more_context_than_allowed(generator):
    words = " ".join(CONTEXTS[-1:] * 9)
    tokens = generator.tokenizer.encode(words)
    cut = generator.tokenizer.decode(tokens[:30])
    answers = [generator.answer(ASKED[:1], [text], context_tokens=30, max_new_tokens=6) for text in (words, cut)]
    assert answers[0] == answers[1]
    assert generator.answer(ASKED, [words] * 24, context_tokens=9999, max_new_tokens=6)  # cut to what the model can see


def test_a_question_that_leaves_no_room_is_refused(generator):
    room = generator.max_length - generator.count_tokens([f"{QUESTION_CUE}{ASKED[0]}{ANSWER_CUE}"])[0]
    assert generator.max_length == 160
    assert len(generator.answer(ASKED[:1], ["context"], context_tokens=9, max_new_tokens=room)) == 1
    with pytest.raises(InputError, match="160 tokens"):
        generator.answer(ASKED[:1], ["context"], context_tokens=9, max_new_tokens=room + 1)


def test_no_questions_no_answers(generator):
    assert generator.answer([], [], **BUDGETS) == []
    assert generator.confidence([], [], [], context_tokens=9) == []
    assert generator.count_tokens([]) == []


def test_progress_is_told_of_every_batch(generator):
    seen = []
    generator.answer(
        ASKED[:7], CONTEXTS[:7], batch_size=3, progress=lambda batches: seen.extend(batches) or batches, **BUDGETS
    )
    assert len(seen) == 3


@pytest.mark.parametrize("training", [True, False])
def test_answering_uses_no_dropout_and_leaves_the_mode_alone(generator_path, training):
    generator = Generator.load(str(generator_path), dropout=0.9)
    generator.model.train(training)
    sure = [generator.confidence(ASKED[:2], CONTEXTS[:2], ["red", "blue"], context_tokens=9) for _ in range(2)]
    texts = [generator.answer(ASKED, CONTEXTS, **BUDGETS) for _ in range(2)]
    assert generator.model.training is training
    assert sure[0] == sure[1]
    assert texts[0] == texts[1]


# ---- confidence ----


@pytest.fixture
def rigged(generator):
    """A generator whose every next token has the probabilities given, whatever it reads."""
    vocabulary = generator.model.config.vocab_size

    def rig(probabilities):
        rest = (1 - sum(probabilities.values())) / (vocabulary - len(probabilities))
        model = copy.deepcopy(generator.model)
        model.lm_head.weight.data.zero_()
        model.lm_head.bias.data.fill_(math.log(rest))
        for token, probability in probabilities.items():
            model.lm_head.bias.data[token] = math.log(probability)
        return Generator(model, generator.tokenizer)

    return rig


def test_confidence_is_the_geometric_mean_of_the_token_probabilities(generator, rigged):
    (one,) = generator.tokenizer.encode(" a")
    eos = generator.tokenizer.eos_token_id
    sure = rigged({one: 0.16, eos: 0.25}).confidence(
        ["Who?"] * 3, ["", "some context", ""], ["a", "a a", ""], context_tokens=9
    )
    assert sure == pytest.approx([(0.16 * 0.25) ** (1 / 2), (0.16 * 0.16 * 0.25) ** (1 / 3), 0.25], rel=1e-5)


def test_confidence_belongs_to_its_question_and_context(generator):
    answers = [row["answers"][0] for row in QUESTIONS]
    together = generator.confidence(ASKED, CONTEXTS, answers, context_tokens=40)
    examples = encode_examples(
        generator.tokenizer,
        questions=ASKED,
        contexts=CONTEXTS,
        answers=answers,
        context_tokens=40,
        max_length=generator.max_length,
    )
    with torch.no_grad():
        losses = [full_forward(generator.model, [example], pad_id=0).item() for example in examples]
    assert together == pytest.approx([math.exp(-loss) for loss in losses], rel=1e-4)
    assert all(0 < sure < 1 for sure in together)


# ---- loading and refusing ----


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
    """A GPT-2 that does something to its logits behind the head."""

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
    monkeypatch.setattr(cozyrag.generator.AutoModelForCausalLM, "from_pretrained", family.from_pretrained)
    if family is PlainGPT2:
        assert isinstance(Generator.load(sharp_path).model, PlainGPT2)
        return
    with pytest.raises(InputError, match=rf"{family.__name__} does something more.*Choose another --generator"):
        Generator.load(sharp_path)


def test_a_checkpoint_of_nan_is_refused_for_what_it_is(generator_path, tmp_path):
    generator = Generator.load(str(generator_path))
    with torch.no_grad():
        generator.model.transformer.ln_f.bias.fill_(float("nan"))
    generator.save(tmp_path)
    with pytest.raises(InputError, match="found NaN: its weights are spoilt"):
        Generator.load(str(tmp_path))


@pytest.mark.parametrize(("scaling", "refused"), [(8.0, True), (1.0, False)])
def test_granite_is_refused_for_its_scaled_logits_only(generator_path, tmp_path, scaling, refused):
    torch.manual_seed(0)
    GraniteForCausalLM(llama_config(GraniteConfig, logits_scaling=scaling, initializer_range=0.3)).save_pretrained(
        tmp_path
    )
    Generator.load(str(generator_path)).tokenizer.save_pretrained(tmp_path)
    if refused:
        with pytest.raises(InputError, match="GraniteForCausalLM does something more"):
            Generator.load(str(tmp_path))
    else:
        assert Generator.load(str(tmp_path)).max_length == 160


def test_a_model_that_cannot_be_had_names_the_ways_out(tmp_path):
    T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9).save_pretrained(tmp_path / "t5")
    for name in (str(tmp_path / "none"), "no-one/no-such-model", str(tmp_path / "t5")):
        with pytest.raises(InputError) as error:
            Generator.load(name)
        for word in ("--generator", repr(name), "spelling", "network", "local folder", "--generator scratch"):
            assert word in str(error.value)


def test_weights_are_loaded_in_float32(generator_path, tmp_path):
    generator = Generator.load(str(generator_path))
    generator.model.to(torch.bfloat16)
    generator.save(tmp_path)
    assert {parameter.dtype for parameter in Generator.load(str(tmp_path)).model.parameters()} == {torch.float32}


def test_dropout_is_what_was_asked_for(generator_path):
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


def test_from_scratch_reads_any_text_and_ends_with_eos():
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


def test_count_tokens_counts_what_a_prompt_takes(generator):
    texts = ["The fox 0 is red.", "", " a"]
    assert generator.count_tokens(texts) == [
        len(generator.tokenizer.encode(text, add_special_tokens=False)) for text in texts
    ]
    assert generator.count_tokens(texts)[1:] == [0, 1]


def test_example_with_a_one_token_prompt(generator):
    """The first position there is may carry loss."""
    losses = TokenLosses(generator.model)(**collate([Example([5, 6], 1)], pad_id=0))
    with torch.no_grad():
        logs = generator.model(torch.tensor([[5, 6]])).logits[0, 0].log_softmax(-1)
    assert losses.item() == pytest.approx(-logs[6].item(), rel=1e-5)


def test_the_limits_of_decoding_reach_the_model(generator_path, monkeypatch):
    generator = Generator.load(str(generator_path))
    generate, seen = generator.model.generate, []
    monkeypatch.setattr(generator.model, "generate", lambda **options: seen.append(options) or generate(**options))
    asked = {"context_tokens": 16, "max_new_tokens": 8}
    plain = generator.answer(["What is it?"], ["A fox."], **asked)
    limited = generator.answer(["What is it?"], ["A fox."], **asked, min_new_tokens=3, no_repeat_ngram_size=1)
    assert (seen[0]["min_new_tokens"], seen[0]["logits_processor"]) == (None, [])
    assert (seen[1]["min_new_tokens"], seen[1]["max_new_tokens"]) == (3, 8)
    (repeats,) = seen[1]["logits_processor"]
    assert (repeats.ngram_size, repeats.start) == (1, seen[1]["input_ids"].shape[1])
    words = limited[0].split()
    assert len(words) == len(set(words)) and plain != limited


def test_what_the_context_says_may_be_said_once_more():
    """transformers' own control takes the prompt for a part of the answer, and so forbids to copy from it."""
    repeats, scores = AnswerRepeats(2, start=4), torch.zeros(1, 10)
    for answer, forbidden in (([], []), ([1], []), ([1, 2], []), ([1, 2, 1], [2]), ([1, 2, 1, 3, 1], [2, 3])):
        found = repeats(torch.tensor([[1, 2, 3, 9, *answer]]), scores.clone())
        assert torch.isinf(found[0]).nonzero().flatten().tolist() == forbidden


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


def test_extractive_answers_end_with_a_word_and_have_the_length_asked_for(generator):
    text = "Unquestionably extraordinary circumstances"
    for longest, shortest in ((40, 0), (40, 9)):
        made = {"context_tokens": 60, "max_new_tokens": longest, "min_new_tokens": shortest}
        (answer,) = generator.answer(["What?"], [text], **made, extractive=True)
        assert set(answer.split()) <= set(text.split())
        assert len(generator.tokenizer.encode(f" {answer}", add_special_tokens=False)) >= shortest


def test_extractive_answers_to_nothing_are_empty(generator):
    assert generator.answer(["What?", "Who?"], ["", "  "], **BUDGETS, extractive=True) == ["", ""]
    answers = generator.answer(["What?", "Who?"], ["", "A fox."], **BUDGETS, extractive=True, no_answer_threshold=1.0)
    assert answers[0] == "" and answers[1] in "A fox."


def test_extractive_answers_read_only_what_the_budget_leaves(generator):
    text = "one two three four five six seven eight nine ten"
    kept = generator.tokenizer.decode(generator.tokenizer.encode(text, add_special_tokens=False)[:4])
    answers = generator.answer(ASKED, [text] * len(ASKED), context_tokens=4, max_new_tokens=9, extractive=True)
    assert all(answer in kept for answer in answers)


def test_extractive_answers_need_a_tokenizer_that_knows_places(generator, monkeypatch):
    monkeypatch.setattr(type(generator.tokenizer), "is_fast", False)
    with pytest.raises(InputError, match="--extractive: expected.*found GPT2Tokenizer"):
        generator.answer(["What?"], ["A fox."], **BUDGETS, extractive=True)


def test_decoding_is_taken_from_settings_and_told_as_answer_calls_it():
    chosen = parse_settings(["--answer_tokens=9", "--min_answer_tokens=2", "--extractive"]).contexts
    made = Decoding.of(chosen)
    assert made == Decoding(context_tokens=chosen.context_tokens, answer_tokens=9, min_answer_tokens=2, extractive=True)
    told = made.limits()
    assert told == {
        "context_tokens": chosen.context_tokens, "max_new_tokens": 9, "min_new_tokens": 2, "no_repeat_ngram_size": 0, "extractive": True,
    }  # fmt: skip
    assert set(told) < set(inspect.signature(Generator.answer).parameters)
