"""Chat templates: the origin of every token of a prompt, the end of an answer, texts that imitate the template.

The tokenizer is the tiny generator's with a ChatML template and its special tokens; expected prompts are written out.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cozyrag.errors import InputError
from cozyrag.models.batching import collate
from cozyrag.models.generator import Generator
from cozyrag.models.prompts import PLAIN, chat_layout, context_tokens_of, encode_examples, encode_prompts
from cozyrag.models.token_losses import TokenLosses

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    ["<|im_end|>", "a<|im_start|>b"]
)


@pytest.fixture(scope="module")
def folder(generator_path, tmp_path_factory):
    """The tiny generator as a chat model whose messages do not end with EOS."""
    generator = Generator.load(str(generator_path))
    generator.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    generator.model.resize_token_embeddings(len(generator.tokenizer))
    generator.tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("chat-model") / "generator"
    generator.save(folder)
    return folder


@pytest.fixture(scope="module")
def generator(folder):
    return Generator.load(str(folder))


def with_template(generator, template):
    tokenizer = Generator.load(generator.tokenizer.name_or_path).tokenizer
    tokenizer.chat_template = template
    return tokenizer


GIVEN = {"questions": ["Who?"], "contexts": ["The fox is red."], "context_tokens": 99, "max_length": 150}


def test_the_prompt_is_the_template_filled_with_context_and_question(generator):
    tokenizer, layout = generator.tokenizer, generator.layout
    ids = encode_prompts(tokenizer, reserve=5, layout=layout, **GIVEN)[0]
    assert (
        tokenizer.decode(ids) == "<|im_start|>user\nThe fox is red.\nQuestion: Who?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(ids) == generator.prompt("The fox is red.", "Who?")
    marks = [ids.count(tokenizer.convert_tokens_to_ids(mark)) for mark in ("<|im_start|>", "<|im_end|>")]
    assert marks == [2, 1]  # as tokens, not as characters


def test_labels_are_the_answer_and_the_token_that_ends_a_message(generator):
    tokenizer = generator.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generator.end == end != tokenizer.eos_token_id
    examples = encode_examples(tokenizer, answers=["red"], layout=generator.layout, **GIVEN)
    example = examples[0]
    assert example.input_ids[example.prompt_length :] == [*tokenizer("red")["input_ids"], end]
    assert (
        example.input_ids[: example.prompt_length]
        == encode_prompts(tokenizer, reserve=5, layout=generator.layout, **GIVEN)[0]
    )
    assert collate(examples, pad_id=0)["targets"].tolist() == example.input_ids[example.prompt_length :]
    nothing = encode_examples(tokenizer, answers=[""], layout=generator.layout, **GIVEN)[0]
    assert nothing.input_ids[nothing.prompt_length :] == [end]


@settings(deadline=None, max_examples=60)
@given(question=TEXT, context=TEXT, answer=TEXT, budget=st.integers(0, 20), room=st.integers(0, 12))
def test_only_the_context_is_truncated_and_no_text_becomes_a_special_token(
    generator, question, context, answer, budget, room
):
    tokenizer, layout = generator.tokenizer, generator.layout

    def plainly(text):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    asked, answer_ids = plainly(f"\nQuestion: {question}"), [*plainly(answer), generator.end]
    fixed = len(layout.head) + len(asked) + len(layout.tail) + len(answer_ids)
    example = encode_examples(
        tokenizer,
        questions=[question],
        contexts=[context],
        answers=[answer],
        context_tokens=budget,
        max_length=fixed + room,
        layout=layout,
    )[0]
    kept = plainly(context)[: min(budget, room)]
    assert example.input_ids == [*layout.head, *kept, *asked, *layout.tail, *answer_ids]
    assert example.prompt_length == len(example.input_ids) - len(answer_ids)
    marks = set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
    assert not marks & set([*kept, *asked, *answer_ids[:-1]])
    with pytest.raises(InputError, match="must fit"):
        encode_examples(
            tokenizer,
            questions=[question],
            contexts=[context],
            answers=[answer],
            context_tokens=9,
            max_length=fixed - 1,
            layout=layout,
        )


def test_writing_stops_at_the_end_of_the_message(generator):
    end, before = generator.end, generator.model.get_output_embeddings().weight.detach().clone()
    target = generator.tokenizer("red")["input_ids"]
    examples = encode_examples(generator.tokenizer, answers=["red"], layout=generator.layout, **GIVEN)
    optimizer = torch.optim.AdamW(generator.model.parameters(), lr=3e-3)
    for _ in range(120):  # 40 larger steps are too few for one start in four
        loss = TokenLosses(generator.model)(**collate(examples, pad_id=0)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    assert generator.answer(["Who?"], ["The fox is red."], context_tokens=99, max_new_tokens=12) == ["red"]
    assert end not in target and not torch.equal(before, generator.model.get_output_embeddings().weight)


def test_the_saved_tokenizer_has_the_template_or_not(folder, tmp_path):
    plain = Generator.load(str(folder), chat_template=False)
    assert plain.layout is PLAIN and plain.end == plain.tokenizer.eos_token_id
    plain.save(tmp_path / "plain")
    assert Generator.load(str(tmp_path / "plain")).layout is PLAIN
    chat = Generator.load(str(folder))
    chat.save(tmp_path / "chat")
    assert Generator.load(str(tmp_path / "chat")).layout == chat.layout != PLAIN


def test_thinking_is_off_and_the_date_is_fixed(generator):
    template = CHATML.replace(
        "assistant\n{% endif", "assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif"
    )
    layout = chat_layout(with_template(generator, "{{ strftime_now('%Y-%m-%d') }} {{ date_string }}" + template))
    decode = generator.tokenizer.decode
    assert decode(layout.head) == "26 Jul 2024 26 Jul 2024<|im_start|>user\n"
    assert decode(layout.tail).endswith("assistant\n<think></think>")


def test_the_beginning_of_the_next_answer_does_not_end_this_one(generator):
    template = CHATML.replace("<|im_end|>\n{% endfor %}", "{% endfor %}").replace("prompt %}", "prompt %}<|im_end|>\n")
    tokenizer = with_template(generator, template)
    layout = chat_layout(tokenizer)
    assert layout.end == tokenizer.eos_token_id
    assert tokenizer.decode(layout.tail) == "<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_ends_messages_with_text_ends_answers_with_eos(generator):
    layout = chat_layout(
        with_template(generator, "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]")
    )
    assert layout.end == generator.tokenizer.eos_token_id


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('only tools') }}", "hello", "{{ messages[0]['content'] * 2 }}", "{% if %}"]
)
def test_unusable_templates_are_refused_with_the_remedy(generator, template):
    with pytest.raises(InputError, match="--chat_template off"):
        chat_layout(with_template(generator, template))


def test_a_layout_is_the_text_around_both_messages(generator):
    strict = (
        "{% for message in messages %}{% if message['role'] not in ('user', 'assistant') %}"
        "{{ raise_exception('who?') }}{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = with_template(generator, strict)
    layout, end = chat_layout(tokenizer), tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode(layout.head) == "<|im_start|>user\n"
    assert tokenizer.decode(layout.tail) == "<|im_end|><|im_start|>assistant\n"
    assert (layout.cue, layout.lead, layout.end) == ("", "", end)
    once = strict.replace(
        "{{ message['content'] }}", "{{ message['content'] * (2 if message['role'] == 'user' else 1) }}"
    )
    with pytest.raises(InputError, match=r"once each.*Use --chat_template off\.$"):
        chat_layout(with_template(generator, once))


def test_the_context_of_a_prompt(generator):
    tokenizer = generator.tokenizer
    for layout, question in (
        (PLAIN, "Who?"),
        (generator.layout, "Who?"),
        (generator.layout, "Is <|im_end|> one mark?"),
    ):
        for context in ("", "The fox is red.", "A longer story about a fox. " * 9):
            asked = {
                "questions": [question],
                "contexts": [context],
                "context_tokens": 20,
                "max_length": 150,
                "reserve": 5,
            }
            (prompt,) = encode_prompts(tokenizer, layout=layout, **asked)
            ids = tokenizer.encode(context, add_special_tokens=False)[:20]
            assert context_tokens_of(tokenizer, prompt, question, layout) == ids
