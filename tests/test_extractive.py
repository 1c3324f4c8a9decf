"""Spans: the allowed tokens are those of a plain search through the context, for any text and tokenizer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Tokenizer

from cozyrag.models.constrained_decoding import Spans

END = 0


@pytest.fixture(scope="module", params=[260, 300])
def tokenizer(request):
    """Byte-level BPE: with bytes alone, and with merges that split words at unusual places."""
    texts = ["the cat sat on the mat", "Ünïcode wörds, and marks: (a) b-c!"] * 20
    return GPT2Tokenizer().train_new_from_iterator(texts, vocab_size=request.param, show_progress=False)


def walk(spans, choose, longest):
    """Tokens of an answer when `choose` selects among the allowed ones."""
    written = []
    for _ in range(longest):
        token = choose(spans.next_tokens(np.array(written, dtype=int)))
        if token == END:
            break
        written.append(token)
    return written


@given(text=st.text(alphabet="ab é,.(1\n", max_size=40), seed=st.integers(0, 2**16))
def test_every_walk_is_a_span_of_whole_words(tokenizer, text, seed):
    spans = Spans(tokenizer, text, lead=" ", end=END, longest=60)
    choice = np.random.default_rng(seed).choice
    if not spans:
        assert not any(map(str.isalnum, text))
        return
    answer = tokenizer.decode(walk(spans, choice, 60), clean_up_tokenization_spaces=False)
    assert answer.startswith(" ")
    place = text.find(answer[1:])
    assert place >= 0
    ends = {text[place + len(answer) - 2 : place + len(answer)] for place in find_all(text, answer[1:])}
    assert not all(len(end) == 2 and end.isalnum() for end in ends)


def find_all(text, part):
    return [place for place in range(len(text)) if text.startswith(part, place)]


def test_any_span_of_whole_words_can_be_written(tokenizer):
    words = "the cat (a) sat, on b-c".split()
    text = " ".join(words)
    spans = Spans(tokenizer, text, lead=" ", end=END, longest=60)
    for first in range(len(words)):
        for last in range(first, len(words)):
            wanted = tokenizer.encode(" " + " ".join(words[first : last + 1]), add_special_tokens=False)
            for count, token in enumerate([*wanted, END]):
                assert token in spans.next_tokens(np.array(wanted[:count], dtype=int))


def test_after_tokens_that_are_no_span_only_the_end_is_allowed(tokenizer):
    spans = Spans(tokenizer, "the cat", lead=" ", end=END, longest=8)
    assert spans.next_tokens(np.array(tokenizer.encode(" dog"))) == [END]
    assert spans.next_tokens(np.arange(1, 20)) == [END]


def test_shortest_keeps_only_spans_of_that_length(tokenizer):
    whole = tokenizer.encode(" the cat sat", add_special_tokens=False)
    spans = Spans(tokenizer, "the cat sat", lead=" ", end=END, longest=60, shortest=len(whole))
    for count, token in enumerate(whole):
        assert {token} == set(spans.next_tokens(np.array(whole[:count], dtype=int))) - {END}
    assert not Spans(tokenizer, "the cat sat", lead=" ", end=END, longest=60, shortest=len(whole) + 1)
