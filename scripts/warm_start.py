"""A GPT-2 that starts with the word vectors and the first layers of a small BERT encoder.

Initialising a decoder from an encoder is known to help (Rothe et al. 2020, arXiv:1907.12461), with equal layers. GPT-2
normalises before each sublayer and BERT after it, so weights cannot simply be copied. But the output of BERT's
sublayers can nearly be kept: the residual stream of GPT-2 is BERT's, up to a scale for each dimension, and that scale
is fitted on sample text, sublayer by sublayer. Words that are several pieces in BERT's vocabulary get the mean of their
pieces. Left out: training, in which the model learns causal attention, copying, and writing.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# BERT's word vectors are about ten times longer than GPT-2's: with a scale of 1 the first losses would be near 50.
LOGIT_SCALE = 0.15


def gpt2_config(tokenizer: PreTrainedTokenizerBase, *, width: int, layers: int, heads: int) -> GPT2Config:
    """The config of a small GPT-2 without dropout."""
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=512,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@torch.no_grad()
def from_encoder(
    encoder: str, tokenizer: PreTrainedTokenizerBase, sample: torch.Tensor, *, config: GPT2Config
) -> tuple[GPT2LMHeadModel, list[float]]:
    """A GPT2LMHeadModel whose layers compute the same as the first layers of a BERT encoder under a causal mask.

    Args:
        encoder: folder or Hub id of a BERT model.
        tokenizer: tokenizer of the new model, byte-level BPE.
        sample: (n_texts, length) int64, tokens of running text on which the scales are fitted.
        config: config of the new model, with the width and heads of the encoder and at most as many layers.

    Returns:
        the model, and for each of its norms the share of the variance of BERT's hidden states that it reproduces (R2).
    """
    bert = AutoModel.from_pretrained(encoder, dtype=torch.float32, trust_remote_code=False).eval()
    model = GPT2LMHeadModel(config)
    new = model.transformer
    length = sample.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    hidden = _embeddings(bert, AutoTokenizer.from_pretrained(encoder, trust_remote_code=False), tokenizer, new, sample)
    stream = new.wte(sample) + new.wpe.weight[:length]
    quality = []
    for old, block in zip(bert.encoder.layer, new.h, strict=False):
        quality.append(_fit_norm(block.ln_1, stream, hidden))
        attention, scale = old.attention.self, _scale(stream, hidden)
        _copy(block.attn.c_attn, [attention.query, attention.key, attention.value])
        _copy(block.attn.c_proj, [old.attention.output.dense], scale)
        added = old.attention.output.dense(_attend(attention, hidden, causal, config.n_head))
        stream = stream + block.attn.c_proj(_attend_gpt2(block.attn, block.ln_1(stream), causal, config.n_head))
        hidden = old.attention.output.LayerNorm(hidden + added)
        quality.append(_fit_norm(block.ln_2, stream, hidden))
        _copy(block.mlp.c_fc, [old.intermediate.dense])
        _copy(block.mlp.c_proj, [old.output.dense], _scale(stream, hidden))
        stream = stream + block.mlp(block.ln_2(stream))
        hidden = old.output.LayerNorm(hidden + old.output.dense(F.gelu(old.intermediate.dense(hidden))))
    nn.init.constant_(new.ln_f.weight, LOGIT_SCALE)
    return model, quality


def _embeddings(
    bert: PreTrainedModel,
    old: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
    new: nn.Module,
    sample: torch.Tensor,
) -> torch.Tensor:
    """Fit word and position vectors to BERT's first hidden state. Returns that state of the sample."""
    parts = bert.embeddings
    words = torch.stack([parts.word_embeddings.weight[ids].mean(0) for ids in _pieces(old, tokenizer)])
    places = parts.position_embeddings.weight[: len(new.wpe.weight)] + parts.token_type_embeddings.weight[0]
    raw = words[sample] + places[: sample.shape[1]]
    gain = parts.LayerNorm.weight / raw.std(-1, unbiased=False).mean()
    new.wte.weight.copy_(words * gain)
    # BERT has no capitals: one direction, the same for all words, marks them.
    capital = torch.tensor([tokenizer.decode([i]).strip()[:1].isupper() for i in range(len(tokenizer))])
    direction = torch.randn(words.shape[1], generator=torch.Generator().manual_seed(0))
    new.wte.weight[capital] += 0.3 * new.wte.weight.std() * direction
    new.wpe.weight[: len(places)] = (places - raw.mean()) * gain + parts.LayerNorm.bias
    return parts.LayerNorm(raw)


def _pieces(old: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The entries of BERT's vocabulary that spell each entry of the new one; inside words a ## piece if possible."""
    vocabulary, pieces = old.get_vocab(), []
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        text = tokenizer.decode([number]).strip().lower()
        inside = vocabulary.get(f"##{text}") if not token.startswith("Ġ") and text.isalnum() else None
        spelled = [inside] if inside is not None else old(text, add_special_tokens=False)["input_ids"]
        pieces.append(spelled or [old.sep_token_id])
    return pieces


def _copy(into: nn.Module, linears: list[nn.Linear], scale: torch.Tensor | float = 1.0) -> None:
    """Copy linear layers, side by side, into a Conv1D of GPT-2 (whose matrix is transposed), and scale the outputs."""
    into.weight.copy_(torch.cat([linear.weight for linear in linears]).T * scale)
    into.bias.copy_(torch.cat([linear.bias for linear in linears]) * scale)


def _attend(attention: nn.Module, hidden: torch.Tensor, causal: torch.Tensor, heads: int) -> torch.Tensor:
    return _mix(attention.query(hidden), attention.key(hidden), attention.value(hidden), causal, heads)


def _attend_gpt2(attention: nn.Module, hidden: torch.Tensor, causal: torch.Tensor, heads: int) -> torch.Tensor:
    return _mix(*attention.c_attn(hidden).chunk(3, dim=-1), causal, heads)


def _mix(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: torch.Tensor, heads: int) -> torch.Tensor:
    split = [each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value)]
    return F.scaled_dot_product_attention(*split, attn_mask=causal).transpose(1, 2).flatten(2)


def _fit_norm(norm: nn.LayerNorm, stream: torch.Tensor, wanted: torch.Tensor) -> float:
    """Fit weight and bias of a norm of the stream to BERT's hidden state by least squares. Returns R2."""
    normed = F.layer_norm(stream, stream.shape[-1:], eps=norm.eps).flatten(0, 1)
    wanted = wanted.flatten(0, 1)
    norm.weight.copy_(_slope(normed, wanted))
    norm.bias.copy_(wanted.mean(0) - norm.weight * normed.mean(0))
    left = (normed * norm.weight + norm.bias - wanted).var(0).sum()
    return 1 - (left / wanted.var(0).sum()).item()


def _scale(stream: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The scale of the stream relative to BERT's hidden state, for each dimension."""
    return _slope(hidden.flatten(0, 1), stream.flatten(0, 1))


def _slope(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(0)
    return (x * (y - y.mean(0))).mean(0) / x.pow(2).mean(0)
