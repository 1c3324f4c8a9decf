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
        positives: (n_queries,) int64, the passage row that answers each query.

    Returns:
        scalar mean over the queries, in nats.
    """
    scores = queries @ passages.T / temperature
    return F.cross_entropy(scores, positives)
