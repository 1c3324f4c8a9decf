"""The losses of the retriever as plain tensor maths: vectors in, a scalar out.

Embedding texts is the retriever's business, backward the trainer's; so each loss can be proved on hand-written vectors.
The generator's loss is plain cross-entropy and stands with its model in generator.py.
"""

import torch
import torch.nn.functional as F


def contrastive_loss(
    queries: torch.Tensor, passages: torch.Tensor, *, positives: torch.Tensor, temperature: float
) -> torch.Tensor:
    """InfoNCE: each query must score its own passage above all others of the batch.

    Van den Oord et al. 2018 (arXiv:1807.03748, eq. 4) with the cosine over a temperature as score, and in-batch
    negatives as in Karpukhin et al. 2020 (DPR). Each passage stands in the batch once, however many queries share it,
    so no query is ever pushed away from a copy of its own positive.

    Args:
        queries: (n_queries, dim), passages: (n_passages, dim), both L2-normalised.
        positives: (n_queries,) int64, the passage row that answers each query; -1 where none is known.

    Returns:
        scalar mean over the queries with a known positive (0 without any), in nats.
    """
    known = positives >= 0
    scores = queries[known] @ passages.T / temperature
    return F.cross_entropy(scores, positives[known], reduction="sum") / max(1, int(known.sum()))


def sentence_loss(
    queries: torch.Tensor, sentences: torch.Tensor, *, own: torch.Tensor, right: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Of the sentences of its own passage, each query must score one that holds the answer highest.

    The negative log of the softmax mass on all such sentences: which of several places is meant need not be known (the
    summed objective of Clark & Gardner 2018, arXiv:1710.10723, eq. 1, for spans there).

    Args:
        queries: (n_queries, dim), sentences: (n_sentences, dim), both L2-normalised; zero for a sentence that was not read.
        own: (n_queries, n_sentences) bool, the sentences of the query's passage; right: those of them with the answer.

    Returns:
        scalar mean over the queries with such a sentence among those read (0 without any), in nats.
    """
    read = sentences.detach().any(dim=1)
    own, right = own & read, right & read
    known = right.any(dim=1)
    scores = queries[known] @ sentences.T / temperature
    every, wanted = (scores.masked_fill(~mask[known], -torch.inf).logsumexp(dim=1) for mask in (own, right))
    return (every - wanted).sum() / max(1, int(known.sum()))


def feedback_loss(
    queries: torch.Tensor,
    passages: torch.Tensor,
    *,
    candidates: torch.Tensor,
    likelihoods: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Generator feedback: the retriever's preferences among some passages shall be the generator's.

    KL(G || R) over each query's candidates: G is the softmax of the log-likelihood of the answer given each passage, R
    that of the cosines, both over one temperature. Perplexity distillation of Izacard et al. 2022 (Atlas,
    arXiv:2208.03299, section 2.2) and the likelihood supervision of Shi et al. 2023 (REPLUG LSR, arXiv:2301.12652, eq. 5).

    Args:
        queries: (n_queries, dim), passages: (n_passages, dim), both L2-normalised.
        candidates: (n_queries, k) int64, rows of `passages`.
        likelihoods: (n_queries, k), mean log-likelihood of an answer token in nats, in the order of `candidates`; NaN in
            a row that has no answer, which is left out.

    Returns:
        scalar mean over the queries that count (0 without any), in nats. Gradients reach the vectors only.
    """
    known = ~likelihoods.isnan().any(dim=1)
    scores = torch.einsum("qd,qkd->qk", queries[known], passages[candidates[known]])
    wanted = torch.log_softmax(likelihoods[known].detach() / temperature, dim=1)
    found = torch.log_softmax(scores / temperature, dim=1)
    return F.kl_div(found, wanted, log_target=True, reduction="sum") / max(1, int(known.sum()))
