"""The tensors of a micro-batch of examples. Left out: tokenizing (prompts.py), and which rows form a step."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from cozyrag.models.prompts import Example


def collate(examples: Sequence[Example], *, pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors of one micro-batch, with the positions that predict answer tokens.

    Returns:
        input_ids, attention_mask: (batch, length) int64;
        positions: (n_answer_tokens,) int64, indices into the flattened (batch * length) hidden states;
        targets: (n_answer_tokens,) int64, the token that each position must predict, which is the one after it;
        rows, columns: (n_answer_tokens,) int64, the example a target belongs to and its index in that answer;
        keywords: (batch, k) int64, padded with -1.
    """
    ids = [torch.tensor(example.input_ids, dtype=torch.long) for example in examples]
    answers = [each[example.prompt_length :] for each, example in zip(ids, examples, strict=True)]
    columns = [torch.arange(len(answer)) for answer in answers]
    length = max(map(len, ids))
    firsts = [row * length + example.prompt_length - 1 for row, example in enumerate(examples)]
    keywords = [torch.tensor(example.keywords or (-1,), dtype=torch.long) for example in examples]
    return {
        "rows": torch.repeat_interleave(torch.arange(len(examples)), torch.tensor([len(each) for each in answers])),
        "columns": torch.cat(columns),
        "keywords": pad_sequence(keywords, batch_first=True, padding_value=-1),
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
        "positions": torch.cat([first + each for first, each in zip(firsts, columns, strict=True)]),
        "targets": torch.cat(answers),
    }


def answer_tokens(examples: Sequence[Example]) -> int:
    """Number of tokens of these examples that carry loss."""
    return sum(len(example.input_ids) - example.prompt_length for example in examples)
