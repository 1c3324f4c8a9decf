"""Texts to tokens: the only module that knows what a prompt looks like.

A prompt is the context, the question and the cue for the answer, after BOS if the tokenizer begins texts with it; in
training, the answer and an end token follow. With a chat template, context and question are the user's message and the
answer is the assistant's. Only the context is ever truncated: a question or an answer without its end would train the
wrong thing. Left out: which passages and sentences form the context (contexts.py), padding and tensors (batching.py).
"""

import multiprocessing
import re
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import psutil
from transformers import PreTrainedTokenizerBase

from cozyrag.errors import InputError

QUESTION_CUE = "\nQuestion: "
ANSWER_CUE = "\nAnswer:"
WORD = re.compile(r"\w+")
COMMON = 50  # a word in more than one of so many questions ("what", "the", "of") is no keyword ...
RARE = 5  # ... unless at most this many questions contain it

START = "start_of_text"  # of cozyrag.json: the tokens that begin every prompt, such as BOS; missing if there are none
SAMPLE = "a"  # any text: what a tokenizer puts before it does not depend on it
MARKS = "QUESTIONPLACE", "ANSWERPLACE"  # the messages with which a chat template is rendered
SECONDS, PATIENCE = 2, 20  # of the processor, and on the clock, to render a chat template; a usual one takes 0.01
MEMORY, LONGEST = 1 << 30, 100_000  # more bytes that this may take, and characters of the result
TODAY = "26 Jul 2024"  # for templates that state the date: a prompt must not change from day to day
CLOCK = f"{{% macro strftime_now(format) %}}{TODAY}{{% endmacro %}}"


@dataclass(frozen=True)
class Layout:
    """What surrounds context, question and answer; without arguments, the plain layout.

    Args:
        head, tail: token ids before the context and after the question. cue: text after the question; lead: text before
            a non-empty answer. end: the token that ends an answer; None: the tokenizer's EOS.
        start: how many ids of the head stand there because the tokenizer begins every text with them, such as BOS.
        characters: read a special token that is spelled out in a text as ordinary characters, so that no text can
            imitate a part of the prompt.
    """

    head: tuple[int, ...] = ()
    cue: str = ANSWER_CUE
    tail: tuple[int, ...] = ()
    lead: str = " "
    end: int | None = None
    start: int = 0
    characters: bool = False

    def starting_with(self, ids: tuple[int, ...]) -> "Layout":
        """This layout with these ids in front, unless it begins with them already, as a chat template may."""
        if self.head[: len(ids)] == ids:
            return self
        return replace(self, head=ids + self.head, start=len(ids), characters=True)


PLAIN = Layout()


def start_of_text(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that a tokenizer puts before any text by itself, such as BOS; the model has seen no text without them."""
    whole, (bare,) = tokenizer(SAMPLE)["input_ids"], tokenize(tokenizer, [SAMPLE])
    places = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return tuple(whole[: next(places, 0)])


def chat_layout(tokenizer: PreTrainedTokenizerBase) -> Layout:
    """The layout that a tokenizer's chat template gives one user's message and the assistant's answer.

    The template is rendered once with marks and split at them, so that the tokens of the template are known exactly
    whatever it does.

    Raises:
        InputError: the template fails, or does not contain each message exactly once.
    """
    messages = [{"role": "user", "content": MARKS[0]}, {"role": "assistant", "content": MARKS[1]}]
    rendered = in_time(lambda: [_render(tokenizer, messages[:1], True), _render(tokenizer, messages, False)])
    if isinstance(rendered, str):
        raise InputError(
            f"Expected the generator's chat template to accept a user's message and an answer, it fails with: "
            f"{rendered}. Use --chat_template off."
        )
    asked, answered = rendered
    if asked.count(MARKS[0]) != 1 or answered.count(MARKS[1]) != 1:
        raise InputError(
            "Expected the generator's chat template to contain a user's message and an answer unchanged and once each; "
            "it changes, omits or repeats one. Use --chat_template off."
        )
    head, tail, closing = tokenize(tokenizer, [*asked.split(MARKS[0]), answered.split(MARKS[1])[1]])
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = closing[0] if closing and closing[0] in special else tokenizer.eos_token_id
    return Layout(tuple(head), "", tuple(tail), lead="", end=end, characters=True)


def in_time(render: Callable[[], list[str]]) -> list[str] | str:
    """The texts that `render` returns, or why there are none; computed by another process, within limits.

    A template is a program: sandboxed, it can still loop for ever or fill the memory, in one operation that nothing in
    this process could stop. Only Linux forks safely beside threads; elsewhere there is no limit.
    """
    if sys.platform != "linux":
        return _rendered(render)
    reading, writing = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_render_beside, args=(render, writing), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child calls no library
        child.start()
    writing.close()
    try:
        return reading.recv() if reading.poll(PATIENCE) else f"more than {PATIENCE} seconds"
    except EOFError:
        return f"more than {SECONDS} seconds, or too much memory"
    finally:
        child.kill()
        child.join()
        reading.close()


def _render_beside(render: Callable[[], list[str]], writing: Connection) -> None:
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    writing.send(_rendered(render))


def _rendered(render: Callable[[], list[str]]) -> list[str] | str:
    """What `render` returns, or its error in words: a template may raise anything."""
    try:
        texts = render()
    except Exception as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    longest = max(map(len, texts))
    return texts if longest <= LONGEST else f"{longest:,} characters, expected at most {LONGEST:,}"


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], cue: bool) -> str:
    """The template filled with messages, on a fixed date and without thinking."""
    return str(
        tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=cue,
            enable_thinking=False,
            date_string=TODAY,
            chat_template=CLOCK + tokenizer.get_chat_template(),
        )
    )


@dataclass(frozen=True)
class Example:
    """A tokenized training example: `input_ids[prompt_length:]` are the answer and the end token.

    `keywords`: first tokens of the question's rare words that the answer does not use.
    """

    input_ids: list[int]
    prompt_length: int
    keywords: tuple[int, ...] = ()


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    *,
    questions: Sequence[str],
    contexts: Sequence[str],
    context_tokens: int,
    max_length: int,
    reserve: Sequence[int] | int,
    layout: Layout = PLAIN,
) -> list[list[int]]:
    """Token ids of the prompts, the context truncated to `context_tokens` and to what `max_length` leaves.

    Args:
        context_tokens: maximum tokens of a context. max_length: of prompt and answer together.
        reserve: tokens to leave free after each prompt for its answer (one number, or one per prompt).

    Raises:
        InputError: a question and its reserve alone are longer than `max_length`; they are never truncated.
    """
    reserve = [reserve] * len(questions) if isinstance(reserve, int) else reserve
    questions_ids = _encode_questions(tokenizer, questions, layout)
    contexts_ids = tokenize(tokenizer, contexts, layout.characters)
    prompts = []
    for question, question_ids, context_ids, kept in zip(questions, questions_ids, contexts_ids, reserve, strict=True):
        fixed = len(layout.head) + len(question_ids)
        room = max_length - fixed - kept
        if room < 0:
            raise InputError(
                f"A question and its answer must fit into the generator's {max_length} tokens together; "
                f"{question[:80]!r} takes {fixed} and its answer {kept}. "
                "Shorten it, remove the row, or choose a generator with a longer input."
            )
        prompts.append([*layout.head, *context_ids[: max(min(context_tokens, room), 0)], *question_ids])
    return prompts


def _encode_questions(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], layout: Layout) -> list[list[int]]:
    """What follows the context in each prompt."""
    texts = [f"{QUESTION_CUE}{question}{layout.cue}" for question in questions]
    return [[*ids, *layout.tail] for ids in tokenize(tokenizer, texts, layout.characters)]


def context_tokens_of(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], question: str, layout: Layout = PLAIN
) -> list[int]:
    """The tokens of the context in a prompt that `encode_prompts` made."""
    (asked,) = _encode_questions(tokenizer, [question], layout)
    return list(prompt[len(layout.head) : len(prompt) - len(asked)])


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    *,
    questions: Sequence[str],
    contexts: Sequence[str],
    answers: Sequence[str],
    context_tokens: int,
    max_length: int,
    layout: Layout = PLAIN,
) -> list[Example]:
    """Training examples: prompt, answer, end token. Raises InputError as `encode_prompts` does."""
    end = tokenizer.eos_token_id if layout.end is None else layout.end
    answers = [layout.lead + answer if answer else "" for answer in answers]  # an empty answer is the end token alone
    answers_ids = [[*ids, end] for ids in tokenize(tokenizer, answers, layout.characters)]
    prompts = encode_prompts(
        tokenizer,
        questions=questions,
        contexts=contexts,
        context_tokens=context_tokens,
        max_length=max_length,
        reserve=[len(ids) for ids in answers_ids],
        layout=layout,
    )
    return [Example(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers_ids, strict=True)]


def with_keywords(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], questions: Sequence[str]
) -> list[Example]:
    """The examples with their keywords: words of the question that few other questions contain."""
    words = [list(dict.fromkeys(WORD.findall(question))) for question in questions]
    counts = Counter(word.lower() for each in words for word in set(each))
    limit = max(len(questions) / COMMON, RARE)
    rare = [[word for word in each if counts[word.lower()] <= limit] for each in words]
    vocabulary = sorted({word for each in rare for word in each})
    ids = tokenize(tokenizer, [f" {word}" for word in vocabulary])
    first = {word: own[0] for word, own in zip(vocabulary, ids, strict=True)}
    found = []
    for example, each in zip(examples, rare, strict=True):
        used = set(example.input_ids[example.prompt_length :])
        keywords = tuple(dict.fromkeys(first[word] for word in each if first[word] not in used))
        found.append(replace(example, keywords=keywords))
    return found


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], characters: bool = False) -> list[list[int]]:
    """Ids without special tokens: a prompt consists of several parts, and none may have its own BOS or EOS.

    `characters`: as of `Layout`.
    """
    if not texts:
        return []
    how = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(list(texts), **how, **({"split_special_tokens": True} if characters else {}))["input_ids"]
