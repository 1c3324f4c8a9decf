"""The generator: a causal language model that reads a context and a question and writes the answer.

It loads, computes the loss of answers, writes answers and saves; what to train and when is the trainer's business.
Left out: optimizers, processes, devices beyond "where the model already is".
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cozyrag.errors import InputError
from cozyrag.models import lora
from cozyrag.models.batching import collate
from cozyrag.models.constrained_decoding import Spans
from cozyrag.models.fsdp import Sharded
from cozyrag.models.gpt2_last_block import read_only_at
from cozyrag.models.greedy_decoding import Limits, write_greedily
from cozyrag.models.int8_encoding import BF16, FLOAT32
from cozyrag.models.penalties import Penalties
from cozyrag.models.prompts import PLAIN, chat_layout, context_tokens_of, encode_examples, encode_prompts
from cozyrag.models.smollm2 import HINT, SMOLLM2, load_smollm2

OTHER = f"{HINT} or --generator scratch, a small GPT-2 that has learned nothing yet"
ENDLESS = 2048  # tokens for a model that could read any number
DROPOUT_FIELDS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "dropout")


class TokenLosses(nn.Module):
    """Cross-entropy of each target token, with the LM head computed only where there is a target.

    On GPT-2's vocabulary the head costs more than a transformer layer for every position, and only the few answer
    positions carry loss. Hidden states are picked before the head, a form that every transformers version accepts. Most of
    GPT-2's last block is computed there only, too (gpt2_last_block.py). Families that scale or cap their logits (Granite, Cohere,
    Gemma) say so in their configuration.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.scale, self.cap = logit_scale(model.config), logit_cap(model.config)

    def forward(self, input_ids, positions, targets, attention_mask=None, position_ids=None, **unused) -> torch.Tensor:
        """Losses of shape (n_targets,) in nats; arguments as `batches.collate` or `collate_readings` makes them."""
        logits = self.logits(input_ids, positions, attention_mask, position_ids)
        return F.cross_entropy(logits, targets, reduction="none")

    def logits(self, input_ids, positions, attention_mask, position_ids=None) -> torch.Tensor:
        """Logits (n_positions, vocabulary) in float32 at the positions asked for."""
        model = self.model.base_model
        # torch.compile would trace the change of the block instead of making it
        compiling = torch.compiler.is_compiling()
        with nullcontext() if compiling else read_only_at(model, positions, input_ids.numel()):
            hidden = model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            ).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden.flatten(0, 1)[positions]).float() * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def logit_scale(config: PretrainedConfig) -> float:
    """What a family multiplies its logits by: Cohere's `logit_scale`, one over Granite's `logits_scaling`."""
    known = config.get_text_config().to_dict()
    return float(known.get("logit_scale") or 1.0) / float(known.get("logits_scaling") or 1.0)


def logit_cap(config: PretrainedConfig) -> float | None:
    """The bound c of a family whose logits are c tanh(logits / c), as Gemma 2's; None: there is none."""
    return config.get_text_config().to_dict().get("final_logit_softcapping")


class PenalizedLosses(TokenLosses):
    """Token losses, and the penalties on what the model would write instead."""

    def __init__(self, model: PreTrainedModel, *, penalties: Penalties, eos: int):
        super().__init__(model)
        self.penalties = penalties
        self.eos = eos

    def forward(self, input_ids, positions, targets, attention_mask, rows, columns, keywords):
        """(losses (n_targets,), penalties summed over the answers (n_penalties,)), from one pass."""
        logits = self.logits(input_ids, positions, attention_mask)
        losses = F.cross_entropy(logits, targets, reduction="none")
        lengths = torch.bincount(rows, minlength=len(input_ids)) - 1  # without EOS
        padded = logits.new_zeros(len(input_ids), int(columns.max()) + 1, logits.shape[-1])
        padded = padded.index_put((rows, columns), torch.softmax(logits, dim=-1))
        return losses, self.penalties.values(padded, lengths, keywords, eos=self.eos)


@dataclass(frozen=True)
class Decoding:
    """How answers are read for and written, under the names that settings, pairs and `cozyrag.json` use."""

    context_tokens: int
    answer_tokens: int
    min_answer_tokens: int = 0
    no_repeat_ngram_size: int = 0
    extractive: bool = False

    @classmethod
    def of(cls, source: object) -> "Decoding":
        """That of settings, or of a pair, which have these names among their own."""
        return cls(**{each.name: getattr(source, each.name) for each in fields(cls)})

    def limits(self, may_be_empty: bool = True) -> dict[str, int | bool]:
        """The same as `Generator.write` calls it; an answer that must not be empty has a token at least."""
        return {
            "context_tokens": self.context_tokens,
            "max_new_tokens": self.answer_tokens,
            "min_new_tokens": self.min_answer_tokens if may_be_empty else max(1, self.min_answer_tokens),
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "extractive": self.extractive,
        }


@contextmanager
def recomputing(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Within it, if wanted, a layer keeps only its input and computes its activations again on the way back, with the same
    gradients: less memory for a quarter more time. For a model in training mode that `supports_gradient_checkpointing`."""
    if not wanted:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its coming name is not there in all versions yet
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()


@dataclass(frozen=True)
class Written:
    """An answer (`text`), how sure the generator is of it (`score`, 0 to 1: geometric mean of the probabilities of its tokens, the
    end token included where it was reached), and how probable it is that nothing is written (`silence`)."""

    text: str
    score: float
    silence: float

    def kept_above(self, threshold: float | None) -> "Written":
        """This answer, or silence where silence is more probable than the threshold (None: never)."""
        quiet = threshold is not None and self.silence > threshold
        return Written("", self.silence, self.silence) if quiet else self


class Generator:
    """A causal LM with its tokenizer, whose chat template, if it has one, makes the prompts."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.loss_type = "ForCausalLM"  # silences a warning about the default being used
        self.model = model
        self.tokenizer = tokenizer
        self.layout = chat_layout(tokenizer) if tokenizer.chat_template else PLAIN
        self.parts: Sharded | None = None  # of a phase that trains it split over the processes
        self.precision = FLOAT32  # in which it reads; the weights that are trained and saved are float32 in any case
        self._reader: PreTrainedModel | None = None

    @property
    def max_length(self) -> int:
        """Most tokens the model can see at once; for a model without a last position, what its tokenizer says, at most 2,048."""
        known = self.model.config.get_text_config().to_dict()
        limits = (known.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"))
        return int(next(filter(None, limits), min(self.tokenizer.model_max_length, ENDLESS)))

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.eos_token_id if self.layout.end is None else self.layout.end

    @property
    def is_adapter(self) -> bool:
        """Whether the weights that are trained and saved are a LoRA adapter's."""
        return lora.has_adapter(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Length of each text in this generator's tokens."""
        return (
            [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]
            if texts
            else []
        )

    def prompt(self, context: str, question: str) -> str:
        """What the generator reads of a context and a question, as text."""
        length = {"context_tokens": self.max_length, "max_length": self.max_length, "reserve": 0}
        ids = encode_prompts(self.tokenizer, questions=[question], contexts=[context], layout=self.layout, **length)[0]
        return self.tokenizer.decode(ids)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        dropout: float = 0.0,
        token: str | None = None,
        chat_template: bool = True,
    ) -> "Generator":
        """Load a checkpoint folder, a Hub id or "smollm2", weights in float32; a LoRA adapter with the model that it names.

        Without `chat_template` the tokenizer's is taken away, also from what is saved, so that whoever loads it does the same.

        Raises:
            InputError: nothing can be had under that name; the message names the ways out.
        """
        if name == SMOLLM2:
            return cls._load_smollm2(dropout, chat_template)
        try:
            adapter = lora.read_adapter(name, revision=revision, token=token)
        except (OSError, ValueError) as error:
            raise InputError(_not_to_be_had("generator", name, error, OTHER)) from error
        if adapter:
            how = {"revision": adapter.revision, "dropout": dropout, "token": token, "chat_template": False}
            found = cls.load(adapter.base, **how)
            found = cls(found.model, _load_tokenizer(name, revision, token, chat_template))
            lora.load_adapter(found.model, name, adapter, revision=revision, token=token)
            return found
        try:
            config = AutoConfig.from_pretrained(name, revision=revision, token=token)
            tokenizer = _load_tokenizer(name, revision, token, chat_template)
            model = AutoModelForCausalLM.from_pretrained(
                name,
                config=_training_config(config, dropout),
                revision=revision,
                token=token,
                dtype=torch.float32,
                use_safetensors=True,  # a pytorch_model.bin is a pickle
            )
        except (OSError, ValueError, SafetensorError) as error:  # the last of them: a file cut short
            raise InputError(_not_to_be_had("generator", name, error, OTHER)) from error
        _check_head(model)
        return cls(model, tokenizer)

    @classmethod
    def _load_smollm2(cls, dropout: float, chat_template: bool) -> "Generator":
        model, tokenizer = load_smollm2()
        _training_config(model.config, dropout)
        if not chat_template:
            tokenizer.chat_template = None
        return cls(model, tokenizer)

    @classmethod
    def from_scratch(
        cls, texts: Iterable[str], *, config: GPT2Config | None = None, vocab_size: int = 8192
    ) -> "Generator":
        """A small untrained GPT-2 with a byte-level BPE tokenizer of its own, trained on `texts`."""
        tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
        config = config or GPT2Config(n_embd=256, n_layer=4, n_head=4, n_positions=512)
        config.vocab_size = len(tokenizer)
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        return cls(GPT2LMHeadModel(_training_config(config, 0.0)), tokenizer)

    @contextmanager
    def reading(self) -> Iterator[PreTrainedModel]:
        """The model to read with: in another precision than float32 one copy, made once for all that is read within.

        What trains the weights must not run inside: the copy would stay what it was.
        """
        outer, was_training = self._reader, self.model.training
        self.only_read()
        try:
            yield self.model if self._reader is None else self._reader
        finally:
            self._reader = outer
            self.model.train(was_training)

    def only_read(self) -> None:
        """From now on read with one copy of the weights, in the precision that is wanted: for a pair that trains no more."""
        self.model.eval()
        if self._reader is None and self.precision == BF16:
            self._reader = copy.deepcopy(self.model).to(torch.bfloat16)

    def answer(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        *,
        no_answer_threshold: float | None = None,
        min_new_tokens: int = 0,
        **how,
    ) -> list[str]:
        """The texts of what `write` gives. With a `no_answer_threshold` an answer is "" where silence is more probable than
        that, and never empty elsewhere."""
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
        progress=iter,
    ) -> list[Written]:
        """Greedy answers, in the order of the questions, each with its certainty, from one pass.

        Batches are made of prompts of like length. `min_new_tokens` and `no_repeat_ngram_size` hold within an answer; 0 = off.
        transformers' `no_repeat_ngram_size` counts the prompt, too, and so forbids copying from the context, which costs four
        points of EM (docs/results.md). An `extractive` answer is a word sequence of the context, "" where there is no context.

        Raises:
            InputError: a question does not fit, or `extractive` with a slow tokenizer.
        """
        if extractive and not self.tokenizer.is_fast:
            raise InputError(
                f"--extractive: expected a generator whose tokenizer tells where its tokens stand in a text (a fast one), found "
                f"{type(self.tokenizer).__name__}. Leave --extractive out, or choose another --generator."
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
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        answers: list[Written | None] = [None] * len(prompts)
        with self.reading() as model:
            for start in progress(range(0, len(order), batch_size)):
                rows = order[start : start + batch_size]
                spans = [self._spans(prompts[row], questions[row], limits) for row in rows] if extractive else None
                for row, each in zip(
                    rows, self._complete(model, [prompts[row] for row in rows], limits, spans), strict=True
                ):
                    answers[row] = each
        return answers

    def _spans(self, prompt: list[int], question: str, limits: Limits) -> Spans:
        """The spans of the context that a prompt holds."""
        context = context_tokens_of(self.tokenizer, prompt, question, self.layout)
        return Spans(
            self.tokenizer,
            self.tokenizer.decode(context, clean_up_tokenization_spaces=False),
            lead=self.layout.lead,
            end=self.end,
            longest=limits.longest,
            shortest=limits.shortest,
        )

    def _complete(
        self, model: PreTrainedModel, prompts: list[list[int]], limits: Limits, spans: list[Spans] | None
    ) -> list[Written]:
        """What the model writes behind each prompt. Prompts are padded on the left, so all answers start together."""
        batch = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(self.device)
        decoded = write_greedily(model, batch["input_ids"], batch["attention_mask"], limits, spans)
        texts = self.tokenizer.decode([each.tokens for each in decoded], skip_special_tokens=True)
        return [
            Written(" ".join(text.split()), each.score, each.silence) for text, each in zip(texts, decoded, strict=True)
        ]

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
        """(n,) float64: mean log-likelihood, in nats, of the tokens of each answer with its EOS; longest prompts first.

        `progress` is told after each batch how many questions it had.
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

    def restore(self, folder: str | Path) -> None:
        """Take the weights of a checkpoint that `save` wrote."""
        self.model.load_state_dict(Generator.load(str(folder)).model.state_dict())

    def add_adapter(
        self,
        base: str,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        targets: Sequence[str],
        revision: str | None,
        seed: int,
    ) -> None:
        """Freeze the model and train a LoRA adapter of it instead; see `adapters.add_adapter`."""
        lora.add_adapter(
            self.model, base, rank=rank, alpha=alpha, dropout=dropout, targets=targets, revision=revision, seed=seed
        )

    def gather(self) -> None:
        """Bring the weights up to date if a phase trains them in parts; then all processes must call it."""
        if self.parts is not None:
            self.parts.gather()

    def saved_bytes(self) -> int:
        """About how many bytes `save` writes: of a model with an adapter, those of the adapter."""
        tensors = self.model.parameters() if self.is_adapter else self.model.state_dict().values()
        return sum(t.numel() * t.element_size() for t in tensors if t.requires_grad or not self.is_adapter)

    def save(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face checkpoint (safetensors), or PEFT's form of an adapter."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _load_tokenizer(name: str, revision: str | None, token: str | None, chat_template: bool) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, token=token)
    if not chat_template:
        tokenizer.chat_template = None
    return tokenizer


def _training_config(config, dropout: float):
    """Dropout as asked, and GPT-2's activation as one fused kernel (the same formula, half the time on a CPU)."""
    for field in DROPOUT_FIELDS:
        if field in config.to_dict():
            setattr(config, field, dropout)
    if config.to_dict().get("activation_function") == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"
    return config


@torch.inference_mode()
def _check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are more than its output embeddings applied to its hidden states.

    Some families scale or cap their logits after the head; `TokenLosses` would silently train another model.
    """
    ids = torch.arange(1, 9).unsqueeze(0) % model.config.vocab_size
    mask = torch.ones_like(ids)
    model.eval()
    ours = TokenLosses(model).logits(ids, torch.arange(ids.numel()), mask)
    theirs = model(input_ids=ids, attention_mask=mask).logits[0]
    if theirs.isnan().any():
        raise InputError(
            "Expected a generator whose logits are numbers, found NaN: its weights are spoilt, as by a training that diverged. "
            "Go on from an earlier checkpoint, or choose another --generator."
        )
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4):
        raise InputError(
            f"Expected a generator whose logits are its output embeddings applied to its last hidden states, scaled or capped as its "
            f"configuration says; {type(model).__name__} does something more, so its loss would be wrong. Choose another --generator."
        )


def _not_to_be_had(what: str, name: str, error: Exception, other: str) -> str:
    """One sentence for a model that cannot be loaded, with the ways out."""
    cause = " ".join(str(error).split())[:200]
    return (
        f"Expected --{what} to be a checkpoint folder or a model on the Hub that can be reached; {name!r} could not be loaded "
        f"({type(error).__name__}: {cause}). Check the spelling and the network, give a local folder, or {other}."
    )
