"""The generator: a causal language model that reads a context and a question and writes the answer.

Left out: loading (loading.py), losses (token_losses.py), training, processes, moving the model between devices.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cozyrag.errors import InputError
from cozyrag.models import lora
from cozyrag.models.batching import collate
from cozyrag.models.constrained_decoding import Spans
from cozyrag.models.fsdp import Sharded
from cozyrag.models.greedy_decoding import Limits, reads_past_padding, write_greedily
from cozyrag.models.int8_encoding import BF16, FLOAT32
from cozyrag.models.loading import ALTERNATIVES, load_causal_lm, loading, training_config
from cozyrag.models.prompts import (
    ANSWER_CUE,
    PLAIN,
    QUESTION_CUE,
    START,
    Layout,
    chat_layout,
    context_tokens_of,
    encode_examples,
    encode_prompts,
    start_of_text,
    tokenize,
)
from cozyrag.models.token_losses import TokenLosses
from cozyrag.models.tokenizer_checks import check_embeddings, check_end, outside

QUESTION_TOKENS = 40  # of a question with the prompt's own words, in the advice for a context that does not fit
UNLIMITED = 2048  # maximum tokens for a model that has no limit of its own


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded, under the names that settings, pairs and `cozyrag.json` use."""

    context_tokens: int
    answer_tokens: int
    min_answer_tokens: int = 0
    no_repeat_ngram_size: int = 0
    extractive: bool = False

    @classmethod
    def of(cls, source: object) -> "Decoding":
        """The decoding of settings or of a pair, which have these names among their own."""
        return cls(**{each.name: getattr(source, each.name) for each in fields(cls)})

    def limits(self, may_be_empty: bool = True) -> dict:
        """As arguments of `Generator.write`; an answer that may not be empty has at least one token."""
        return {
            "context_tokens": self.context_tokens,
            "max_new_tokens": self.answer_tokens,
            "min_new_tokens": self.min_answer_tokens if may_be_empty else max(1, self.min_answer_tokens),
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "extractive": self.extractive,
        }


@dataclass(frozen=True)
class Written:
    """An answer. score: its confidence, 0 to 1, the geometric mean of the probabilities of its tokens and, if reached,
    of the end token. silence: the probability of an empty answer."""

    text: str
    score: float
    silence: float

    def kept_above(self, threshold: float | None) -> "Written":
        """This answer, or the empty one if `silence` exceeds the threshold (None: never)."""
        quiet = threshold is not None and self.silence > threshold
        return Written("", self.silence, self.silence) if quiet else self


class Generator:
    """A causal LM with its tokenizer, whose chat template, if it has one, forms the prompts.

    Args:
        start_of_text: begin prompts with what the tokenizer begins every text with, such as BOS. False only for a
            generator that an earlier version trained without it.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, start_of_text: bool = True):
        check_end(model, tokenizer)
        if tokenizer.pad_token_id is None or tokenizer.pad_token in outside(model, tokenizer):
            tokenizer.pad_token = tokenizer.eos_token
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.loss_type = "ForCausalLM"  # silences a warning about the default
        self.model = model
        self.tokenizer = tokenizer
        self.layout = _layout(model, tokenizer, start_of_text)
        self.parts: Sharded | None = None  # while a phase trains it sharded over the processes
        self.precision = FLOAT32  # of inference; weights are trained and saved in float32 in any case
        self._reader: PreTrainedModel | None = None

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        dropout: float = 0.0,
        token: str | None = None,
        chat_template: bool = True,
        start_of_text: bool = True,
    ) -> "Generator":
        """Load a checkpoint folder, a Hub id or "smollm2" in float32; a LoRA adapter together with its base model.

        Without `chat_template` the tokenizer loses its template, also in what is saved, so that prompts stay the same.
        Raises InputError if it cannot be loaded or used; the message names the alternatives.
        """
        loaded = load_causal_lm(name, revision=revision, dropout=dropout, token=token, chat_template=chat_template)
        with loading("--generator", "checkpoint folder", name, ALTERNATIVES):
            generator = cls(*loaded, start_of_text=start_of_text)
            if generator.max_length < 1:
                raise ValueError(f"a maximum of {generator.max_length} tokens")
        return generator

    @classmethod
    def from_scratch(
        cls, texts: Iterable[str], *, config: GPT2Config | None = None, vocab_size: int = 8192
    ) -> "Generator":
        """A small untrained GPT-2 with a byte-level BPE tokenizer trained on `texts`."""
        tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
        config = config or GPT2Config(n_embd=256, n_layer=4, n_head=4, n_positions=512)
        config.vocab_size = len(tokenizer)
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        training_config(config, 0.0)
        return cls(GPT2LMHeadModel(config), tokenizer)

    @property
    def max_length(self) -> int:
        """Maximum tokens of prompt and answer; without position limit the tokenizer's limit, at most 2,048."""
        known = self.model.config.get_text_config().to_dict()
        limits = (known.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"))
        return int(next(filter(None, limits), min(self.tokenizer.model_max_length, UNLIMITED)))

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.eos_token_id if self.layout.end is None else self.layout.end

    @property
    def prompt_facts(self) -> dict:
        """What prompts look like, for cozyrag.json and checkpoints (pair_file.py)."""
        cues = {"chat_template": True} if self.tokenizer.chat_template else {"answer_cue": ANSWER_CUE}
        start = self.tokenizer.convert_ids_to_tokens(list(self.layout.head[: self.layout.start]))
        return {"question_cue": QUESTION_CUE} | cues | ({START: start} if start else {})

    def check_room(self, context_tokens: int, answer_tokens: int) -> None:
        """Raise InputError if a context and an answer of these lengths are longer than the model's input.

        A long question may still shorten a context that fits.
        """
        if self.max_length < context_tokens + answer_tokens:
            spare = self.max_length - answer_tokens - QUESTION_TOKENS
            fitting = f"Give --context_tokens {spare} or less" if spare > 0 else "Lower --answer_tokens"
            raise InputError(
                f"--context_tokens {context_tokens}: expected to fit into the generator's {self.max_length} tokens "
                f"together with --answer_tokens {answer_tokens}; contexts would be cut short. {fitting}, or choose a "
                "--generator with a longer input."
            )

    @cached_property
    def reads_past_padding(self) -> bool:
        """Whether prompts of different lengths can be answered in one batch; measured once."""
        return reads_past_padding(self.model)

    @property
    def is_adapter(self) -> bool:
        """Whether the weights that are trained and saved are those of a LoRA adapter."""
        return lora.has_adapter(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Length of each text in this generator's tokens."""
        return [len(ids) for ids in tokenize(self.tokenizer, texts)]

    def prompt(self, context: str, question: str) -> str:
        """The prompt for a context and a question, as text."""
        length = {"context_tokens": self.max_length, "max_length": self.max_length, "reserve": 0}
        ids = encode_prompts(self.tokenizer, questions=[question], contexts=[context], layout=self.layout, **length)
        return self.tokenizer.batch_decode(ids)[0]

    @contextmanager
    def reading(self) -> Iterator[PreTrainedModel]:
        """The model for inference: in another precision than float32 one copy, shared by all calls inside the context.

        Do not train inside: the copy keeps the weights of the moment it was made.
        """
        outer, was_training = self._reader, self.model.training
        self.only_read()
        try:
            yield self.model if self._reader is None else self._reader
        finally:
            self._reader = outer
            self.model.train(was_training)

    def only_read(self) -> None:
        """From now on infer with one copy of the weights in `precision`: for a pair that is not trained further."""
        self.model.eval()
        if self._reader is None and self.precision == BF16:
            self._reader = copy.deepcopy(self.model).bfloat16()

    def answer(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        *,
        no_answer_threshold: float | None = None,
        min_new_tokens: int = 0,
        **how,
    ) -> list[str]:
        """The texts that `write` returns; with a `no_answer_threshold`, "" exactly where silence is more probable."""
        shortest = min_new_tokens if no_answer_threshold is None else max(1, min_new_tokens)
        written = self.write(questions, contexts, min_new_tokens=shortest, **how)
        return [each.kept_above(no_answer_threshold).text for each in written]

    def write(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        *,
        context_tokens: int,
        max_new_tokens: int,
        batch_size: int = 32,
        min_new_tokens: int = 0,
        no_repeat_ngram_size: int = 0,
        extractive: bool = False,
        progress: Callable[[range], Iterable[int]] = iter,
    ) -> list[Written]:
        """Greedy answers with their confidence, in the order of the questions, from one pass.

        Args:
            batch_size: prompts per batch, which are of similar length.
            min_new_tokens, no_repeat_ngram_size: for the answer alone; 0 = off. transformers' `no_repeat_ngram_size`
                counts the prompt, too, and so forbids copying from the context: four points of EM (docs/results.md).
            extractive: an answer is a word sequence of the context, "" if there is no context.
            progress: wraps the iteration over batches, for example tqdm.

        Raises:
            InputError: a question does not fit, or `extractive` with a slow tokenizer.
        """
        if extractive and not self.tokenizer.is_fast:
            raise InputError(
                "--extractive: expected a generator with a fast tokenizer, which gives the positions of tokens, "
                f"found {type(self.tokenizer).__name__}. Omit --extractive, or choose another --generator."
            )
        limits = Limits(max_new_tokens, self.end, min_new_tokens, no_repeat_ngram_size)
        prompts = encode_prompts(
            self.tokenizer,
            questions=questions,
            contexts=contexts,
            context_tokens=context_tokens,
            max_length=self.max_length,
            reserve=max_new_tokens,
            layout=self.layout,
        )
        answers: dict[int, Written] = {}
        with self.reading() as model:
            batches = self._batches([len(prompt) for prompt in prompts], batch_size)
            for number in progress(range(len(batches))):
                rows = batches[number]
                spans = [self._spans(prompts[row], questions[row], limits) for row in rows] if extractive else None
                written = self._complete(model, [prompts[row] for row in rows], limits, spans)
                answers |= zip(rows, (replace(each, text=" ".join(each.text.split())) for each in written), strict=True)
        return [answers[row] for row in range(len(prompts))]

    def continue_lines(self, texts: Sequence[str], *, max_new_tokens: int, batch_size: int = 32) -> list[Written]:
        """The rest of the line that each text begins, written greedily: for prompts that are no context and question.

        Each text keeps its end if it is longer than the model's input.
        """
        (newline,) = tokenize(self.tokenizer, ["\n"])
        end = newline[-1] if newline and self.tokenizer.decode(newline[-1:]) == "\n" else self.end
        limits = Limits(max_new_tokens, end, 1)
        start, room = self.layout.head[: self.layout.start], self.max_length - max_new_tokens
        ids = tokenize(self.tokenizer, texts, self.layout.characters)
        prompts = [[*start, *each[-(room - len(start)) :]] for each in ids]
        lines: dict[int, Written] = {}
        with self.reading() as model:
            for rows in self._batches([len(prompt) for prompt in prompts], batch_size):
                lines |= zip(rows, self._complete(model, [prompts[row] for row in rows], limits, None), strict=True)
        return [replace(lines[row], text=lines[row].text.strip().partition("\n")[0]) for row in range(len(prompts))]

    def _batches(self, lengths: Sequence[int], size: int) -> list[list[int]]:
        """Rows of similar length together; of the same length, if the model would read the padding."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        alike = [order]
        if size > 1 and len(set(lengths)) > 1 and not self.reads_past_padding:
            alike = [list(rows) for _, rows in groupby(order, key=lengths.__getitem__)]
        return [rows[start : start + size] for rows in alike for start in range(0, len(rows), size)]

    def _spans(self, prompt: list[int], question: str, limits: Limits) -> Spans:
        """The spans of the context in a prompt."""
        ids = context_tokens_of(self.tokenizer, prompt, question, self.layout)
        (context,) = self.tokenizer.batch_decode([ids], clean_up_tokenization_spaces=False)
        length = {"longest": limits.longest, "shortest": limits.shortest}
        return Spans(self.tokenizer, context, lead=self.layout.lead, end=limits.end, **length)

    def _complete(
        self, model: PreTrainedModel, prompts: list[list[int]], limits: Limits, spans: list[Spans] | None
    ) -> list[Written]:
        """What follows each prompt. Prompts are padded on the left, so that all answers start at the same position."""
        batch = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(self.device)
        decoded = write_greedily(model, batch["input_ids"], batch["attention_mask"], limits, spans)
        texts = self.tokenizer.batch_decode([each.tokens for each in decoded], skip_special_tokens=True)
        return [Written(text, each.score, each.silence) for text, each in zip(texts, decoded, strict=True)]

    @torch.inference_mode()
    def log_likelihoods(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        answers: Sequence[str],
        *,
        context_tokens: int,
        batch_size: int = 32,
        progress: Callable[[int], object] = lambda count: None,
    ) -> np.ndarray:
        """(n,) float64: mean log-likelihood, in nats, of the tokens of each answer and its EOS; longest prompts first.

        `progress` is called after each batch with its number of questions.
        """
        examples = encode_examples(
            self.tokenizer,
            questions=questions,
            contexts=contexts,
            answers=answers,
            context_tokens=context_tokens,
            max_length=self.max_length,
            layout=self.layout,
        )
        likelihoods = np.zeros(len(examples))
        order = sorted(range(len(examples)), key=lambda row: -len(examples[row].input_ids))
        with self.reading() as model:
            losses = TokenLosses(model)
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = collate([examples[row] for row in rows], pad_id=self.tokenizer.pad_token_id)
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                sums = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
                sums.index_add_(0, batch["rows"], losses(**batch).double())
                likelihoods[rows] = -(sums / torch.bincount(batch["rows"], minlength=len(rows))).cpu().numpy()
                progress(len(rows))
        return likelihoods

    def add_adapter(self, base: str, **options) -> None:
        """Freeze the model and train a LoRA adapter instead; arguments as of `lora.add_adapter`."""
        lora.add_adapter(self.model, base, **options)

    def gather(self) -> None:
        """Update the weights from a phase that trains them sharded; all processes must then call it."""
        if self.parts is not None:
            self.parts.gather()

    def saved_bytes(self) -> int:
        """About how many bytes `save` writes: of a model with an adapter, those of the adapter."""
        tensors = self.model.parameters() if self.is_adapter else self.model.state_dict().values()
        return sum(t.numel() * t.element_size() for t in tensors if t.requires_grad or not self.is_adapter)

    def save(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face checkpoint (safetensors), or an adapter in PEFT's format."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def restore(self, folder: str | Path) -> None:
        """Take the weights of a checkpoint that `save` wrote."""
        self.model.load_state_dict(Generator.load(str(folder)).model.state_dict())


def _layout(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, starting: bool) -> Layout:
    """The layout of a tokenizer's prompts. A special token that the model does not know must not come from a text."""
    layout = chat_layout(tokenizer) if tokenizer.chat_template else PLAIN
    if starting:
        layout = layout.starting_with(start_of_text(tokenizer))
    end = tokenizer.eos_token_id if layout.end is None else layout.end
    check_embeddings(model, tokenizer, {*layout.head, *layout.tail, end, tokenizer.unk_token_id})
    return replace(layout, characters=True) if outside(model, tokenizer) else layout
