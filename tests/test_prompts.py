"""Prompts: their exact layout, and that only the context is ever truncated, for any limits.

The layout is written out by hand with a tokenizer of one token per character; truncation is tested by hypothesis on
the byte-level tokenizer of the tiny generator, and read back from the decoded tokens.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.models.prompts import Example, encode_examples, encode_prompts, with_keywords
from cozyrag.models.retriever import Retriever

EOS = 0
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


class Letters:
    """A tokenizer whose tokens are the code points of a text."""

    eos_token_id = EOS

    def __call__(self, texts, *, add_special_tokens, **_):
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def letters(ids):
    return "".join(chr(number) for number in ids)


@pytest.fixture(scope="module")
def tokenizer(generator_path):
    return Generator.load(str(generator_path)).tokenizer


def test_layout_is_context_question_cue_answer_eos():
    examples = encode_examples(
        Letters(),
        questions=["Who?", "Why?"],
        contexts=["ab", ""],
        answers=["Ada", "so"],
        context_tokens=9,
        max_length=99,
    )
    assert letters(examples[0].input_ids[:-1]) == "ab\nQuestion: Who?\nAnswer: Ada"
    assert letters(examples[1].input_ids[:-1]) == "\nQuestion: Why?\nAnswer: so"
    assert [example.input_ids[-1] for example in examples] == [EOS, EOS]
    assert [letters(e.input_ids[e.prompt_length : -1]) for e in examples] == [" Ada", " so"]


def test_prompt_of_an_example_is_the_prompt_that_is_answered():
    given_texts = {"questions": ["Who?"], "contexts": ["abc"], "context_tokens": 2, "max_length": 99}
    example = encode_examples(Letters(), answers=["Ada"], **given_texts)[0]
    prompt = encode_prompts(Letters(), reserve=5, **given_texts)[0]
    assert example.input_ids[: example.prompt_length] == prompt
    assert letters(prompt) == "ab\nQuestion: Who?\nAnswer:"


# "\nQuestion: Q\nAnswer:" takes 20 letters, " A" and EOS 3
@pytest.mark.parametrize(
    ("context_tokens", "max_length", "kept"),
    [
        (6, 99, "abcdef"),
        (7, 99, "abcdef"),
        (5, 99, "abcde"),
        (0, 99, ""),
        (6, 29, "abcdef"),
        (6, 28, "abcde"),
        (6, 24, "a"),
        (6, 23, ""),
    ],
)
def test_the_context_is_truncated_at_its_end_to_the_smaller_of_two_limits(context_tokens, max_length, kept):
    example = encode_examples(
        Letters(),
        questions=["Q"],
        contexts=["abcdef"],
        answers=["A"],
        context_tokens=context_tokens,
        max_length=max_length,
    )[0]
    assert letters(example.input_ids[:-1]) == kept + "\nQuestion: Q\nAnswer: A"
    assert example.prompt_length == len(kept) + 20


def test_an_empty_answer_is_eos_alone():
    example = encode_examples(
        Letters(), questions=["Q"], contexts=["c"], answers=[""], context_tokens=9, max_length=99
    )[0]
    assert example.input_ids[example.prompt_length :] == [EOS]


@pytest.mark.parametrize(("reserve", "contexts"), [(4, ["abcd", "abcd"]), ([4, 7], ["abcd", "a"])])
def test_reserve_is_one_number_or_one_for_each_prompt(reserve, contexts):
    prompts = encode_prompts(
        Letters(), questions=["Q", "Q"], contexts=["abcdef"] * 2, context_tokens=9, max_length=28, reserve=reserve
    )
    assert [letters(prompt) for prompt in prompts] == [f"{context}\nQuestion: Q\nAnswer:" for context in contexts]


def test_a_question_that_is_too_long_is_refused_with_its_numbers():
    question = "x" * 100
    with pytest.raises(InputError) as error:
        encode_examples(Letters(), questions=[question], contexts=[""], answers=["A"], context_tokens=9, max_length=121)
    for word in ("generator's 121 tokens", repr("x" * 80), "takes 119", "its answer 3", "Shorten it", "longer input"):
        assert word in str(error.value)
    assert "x" * 81 not in str(error.value)


def test_empty_input_gives_empty_output():
    options = {"questions": [], "contexts": [], "context_tokens": 9, "max_length": 99}
    assert encode_prompts(Letters(), reserve=3, **options) == []
    assert encode_examples(Letters(), answers=[], **options) == []


@pytest.mark.parametrize("short", ["contexts", "reserve", "questions"])
def test_columns_of_unequal_length_are_an_error(short):
    columns = {"questions": ["a", "b"], "contexts": ["c", "d"], "reserve": [1, 1]}
    columns[short] = columns[short][:1]
    with pytest.raises(ValueError, match="zip"):
        encode_prompts(Letters(), context_tokens=9, max_length=99, **columns)


def test_no_special_token_inside_a_prompt(retriever_path):
    tokenizer = Retriever.load(str(retriever_path)).model.tokenizer
    assert tokenizer("The fox 0")["input_ids"][0] == tokenizer.cls_token_id  # it has special tokens
    prompt = encode_prompts(
        tokenizer,
        questions=["What colour is the fox 0?"],
        contexts=["The fox 0 is red."],
        context_tokens=99,
        max_length=99,
        reserve=1,
    )[0]
    assert not {tokenizer.cls_token_id, tokenizer.sep_token_id} & set(prompt)


@settings(deadline=None, max_examples=200)  # the machine may be busy
@given(
    TEXT,
    TEXT.map(str.strip),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=60),
    st.integers(0, 40),
    st.integers(0, 90),
)
def test_question_and_answer_are_never_truncated(tokenizer, question, answer, context, context_tokens, max_length):
    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False)

    prompt_end, answer_ids = (
        ids(f"\nQuestion: {question}\nAnswer:"),
        (ids(f" {answer}") if answer else []) + [tokenizer.eos_token_id],
    )

    def encode() -> Example:
        return encode_examples(
            tokenizer,
            questions=[question],
            contexts=[context],
            answers=[answer],
            context_tokens=context_tokens,
            max_length=max_length,
        )[0]

    if len(prompt_end) + len(answer_ids) > max_length:
        with pytest.raises(InputError, match="must fit"):
            encode()
        return
    example = encode()
    cut = len(example.input_ids) - len(prompt_end) - len(answer_ids)
    assert example.input_ids == ids(context)[:cut] + prompt_end + answer_ids
    assert cut == min(len(ids(context)), context_tokens, max_length - len(prompt_end) - len(answer_ids))
    assert example.prompt_length == cut + len(prompt_end)
    text = tokenizer.decode(example.input_ids[:-1])
    assert text.endswith(f"\nQuestion: {question}\nAnswer:" + (f" {answer}" if answer else ""))


def test_keywords_are_the_first_tokens_of_rare_question_words_that_the_answer_does_not_use(generator_path):
    tokenizer = Generator.load(str(generator_path)).tokenizer
    questions = [f"What colour is the fox {number}?" for number in range(60)] + ["Which falcon keeps a lamp?"]
    examples = [Example(tokenizer(" lamp")["input_ids"] + [tokenizer.eos_token_id], 0)] * 61
    found = with_keywords(tokenizer, examples, questions)
    first = {word: tokenizer(f" {word}")["input_ids"][0] for word in ("Which", "falcon", "keeps", "a", "lamp", "7")}
    assert set(found[-1].keywords) == {first[word] for word in ("Which", "falcon", "keeps", "a")} - {first["lamp"]}
    assert found[7].keywords == (first["7"],)  # nearly every question contains what, colour, is, the and fox
    assert [example.input_ids for example in found] == [example.input_ids for example in examples]


@pytest.mark.parametrize(("questions", "others"), [(10, 5), (400, 8)])
def test_a_keyword_occurs_in_at_most_a_fiftieth_of_the_questions_or_in_five(generator_path, questions, others):
    """`others`: how many questions may contain a rare word."""
    tokenizer = Generator.load(str(generator_path)).tokenizer
    for count, rare in ((others, True), (others + 1, False)):
        asked = ["falcon"] * count + ["lamp"] * (questions - count)
        found = with_keywords(tokenizer, [Example([tokenizer.eos_token_id], 0)] * questions, asked)
        assert bool(found[0].keywords) is rare
