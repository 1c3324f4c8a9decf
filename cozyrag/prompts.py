"""Text in, tokens out: the one place that knows what a prompt looks like.

A prompt is the context, then the question, then the cue for the answer; the answer and an end-of-text token follow in
training. Only the context is ever shortened: a question or an answer that lost its tail would teach the wrong thing.
Left out: which passages and sentences make the context (contexts.py), padding and tensors (batches.py).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from cozyrag.errors import InputError

QUESTION_CUE = "\nQuestion: "
ANSWER_CUE = "\nAnswer:"
WORD = re.compile(r"\w+")
COMMON = 50  # a word that stands in more than one in so many questions ("what", "the", "of") is no keyword ...
RARE = 5  # ... unless the questions are few and it stands in no more than this


@dataclass(frozen=True)
class Example:
    """One tokenized training example: `input_ids[prompt_length:]` are the answer tokens, the last of them EOS.

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
) -> list[list[int]]:
    """Token ids of the prompts, the context cut to `context_tokens` and to what `max_length` leaves.

    Args:
        context_tokens: most tokens a context may take.
        max_length: most tokens the model can see, prompt and answer together.
        reserve: tokens to leave free behind each prompt for its answer (one number, or one for each prompt).

    Raises:
        InputError: a question and its reserve alone are longer than `max_length`; they are never cut.
    """
    reserve = [reserve] * len(questions) if isinstance(reserve, int) else reserve
    questions_ids = _tokenize(tokenizer, [f"{QUESTION_CUE}{question}{ANSWER_CUE}" for question in questions])
    contexts_ids = _tokenize(tokenizer, contexts)
    prompts = []
    for question, question_ids, context_ids, kept in zip(questions, questions_ids, contexts_ids, reserve, strict=True):
        room = max_length - len(question_ids) - kept
        if room < 0:
            raise InputError(
                f"A question and its answer must fit into the generator's {max_length} tokens together; "
                f"{question[:80]!r} takes {len(question_ids)} and its answer {kept}. "
                "Shorten it, remove the row, or choose a generator with a longer input."
            )
        prompts.append(context_ids[: max(min(context_tokens, room), 0)] + question_ids)
    return prompts


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    *,
    questions: Sequence[str],
    contexts: Sequence[str],
    answers: Sequence[str],
    context_tokens: int,
    max_length: int,
) -> list[Example]:
    """Training examples: prompt, answer, EOS. Raises InputError as `encode_prompts` does."""
    answers = [f" {answer}" if answer else "" for answer in answers]  # an empty answer is EOS alone, as it is written
    answers_ids = [ids + [tokenizer.eos_token_id] for ids in _tokenize(tokenizer, answers)]
    prompts = encode_prompts(
        tokenizer,
        questions=questions,
        contexts=contexts,
        context_tokens=context_tokens,
        max_length=max_length,
        reserve=[len(ids) for ids in answers_ids],
    )
    return [Example(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers_ids, strict=True)]


def with_keywords(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], questions: Sequence[str]
) -> list[Example]:
    """The examples with their keywords: words of the question that few other questions have."""
    words = [list(dict.fromkeys(WORD.findall(question))) for question in questions]
    counts = Counter(word.lower() for each in words for word in set(each))
    limit = max(len(questions) / COMMON, RARE)
    rare = [[word for word in each if counts[word.lower()] <= limit] for each in words]
    vocabulary = sorted({word for each in rare for word in each})
    first = dict(
        zip(vocabulary, (ids[0] for ids in _tokenize(tokenizer, [f" {word}" for word in vocabulary])), strict=True)
    )
    found = []
    for example, each in zip(examples, rare, strict=True):
        used = set(example.input_ids[example.prompt_length :])
        keywords = tuple(dict.fromkeys(first[word] for word in each if first[word] not in used))
        found.append(replace(example, keywords=keywords))
    return found


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids without special tokens: the pieces of a prompt are joined by us, so none may carry its own BOS or EOS."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
