"""The losses of the retriever and of the reranker: tensors in, a scalar out.

Left out: embedding and scoring texts (models/), backward passes (retriever_phase.py, reranker_phase.py), the
generator's loss (token_losses.py).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def contrastive_loss(
    queries: torch.Tensor, passages: torch.Tensor, *, positives: torch.Tensor, temperature: float
) -> torch.Tensor:
    """InfoNCE: each query must score its own passage above all others of the batch.

    Van den Oord et al. 2018 (arXiv:1807.03748, eq. 4) with cosine / temperature as the score and in-batch negatives as
    in Karpukhin et al. 2020 (DPR). A passage occurs once in the batch, however many queries share it, so no query is
    pushed away from a copy of its own positive.

    Args:
        queries: (n_queries, dim), passages: (n_passages, dim), both L2-normalised.
        positives: (n_queries,) int64, the passage that answers each query; -1 if unknown.

    Returns:
        scalar, the mean in nats over the queries with a known positive (0 if there are none).
    """
    known = positives >= 0
    scores = queries[known] @ passages.T / temperature
    return F.cross_entropy(scores, positives[known], reduction="sum") / max(1, int(known.sum()))


def sentence_loss(
    queries: torch.Tensor, sentences: torch.Tensor, *, own: torch.Tensor, right: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Each query must score a sentence that holds the answer above the other sentences of its own passage.

    The negative log of the softmax mass on all such sentences, so the intended one need not be known (the summed
    objective of Clark & Gardner 2018, arXiv:1710.10723, eq. 1, for spans there).

    Args:
        queries: (n_queries, dim), sentences: (n_sentences, dim), both L2-normalised; zero for a truncated sentence.
        own: (n_queries, n_sentences) bool, the sentences of the query's passage. right: those with the answer.

    Returns:
        scalar, the mean in nats over the queries with such a sentence that is not truncated (0 if there are none).
    """
    read = sentences.detach().any(dim=1)
    own, right = own & read, right & read
    known = right.any(dim=1)
    scores = queries[known] @ sentences.T / temperature
    every, correct = (scores.masked_fill(~mask[known], -torch.inf).logsumexp(dim=1) for mask in (own, right))
    return (every - correct).sum() / max(1, int(known.sum()))


def ranking_loss(scores: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Each list of scores must have its first element on top.

    The negative log of the softmax over a list at its first element: the localized contrastive loss of Gao et al. 2021
    (arXiv:2101.08751, eq. 6), and ListNet's top-one loss (Cao et al. 2007) with one relevant element.

    Args:
        scores: (n_scores,) of all lists, one after the other. counts: the length of each list.

    Returns:
        scalar, the mean in nats over the lists.
    """
    lists = torch.nn.utils.rnn.pad_sequence(scores.split(list(counts)), batch_first=True, padding_value=-torch.inf)
    return F.cross_entropy(lists, torch.zeros(len(lists), dtype=torch.int64, device=scores.device))


def feedback_loss(
    queries: torch.Tensor,
    passages: torch.Tensor,
    *,
    candidates: torch.Tensor,
    likelihoods: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """LM-supervised retrieval: the retriever must rank each query's candidates as the generator does.

    KL(G || R) over the candidates: G is the softmax of the log-likelihood of the answer given each passage, R that of
    the cosines, both over one temperature. Perplexity distillation of Izacard et al. 2022 (Atlas, arXiv:2208.03299,
    section 2.2) and the likelihood supervision of Shi et al. 2023 (REPLUG LSR, arXiv:2301.12652, eq. 5).

    Args:
        queries: (n_queries, dim), passages: (n_passages, dim), both L2-normalised.
        candidates: (n_queries, k) int64, rows of `passages`.
        likelihoods: (n_queries, k), mean log-likelihood of an answer token in nats given each candidate; a row with NaN
            (no answer) is left out.

    Returns:
        scalar, the mean in nats over the other rows (0 if there are none). Gradients reach the vectors only.
    """
    known = ~likelihoods.isnan().any(dim=1)
    scores = torch.einsum("qd,qkd->qk", queries[known], passages[candidates[known]])
    target = torch.log_softmax(likelihoods[known].detach() / temperature, dim=1)
    found = torch.log_softmax(scores / temperature, dim=1)
    return F.kl_div(found, target, log_target=True, reduction="sum") / max(1, int(known.sum()))
