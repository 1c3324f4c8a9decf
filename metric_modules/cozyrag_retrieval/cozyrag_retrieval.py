"""Retrieval as a module for the `evaluate` library: recall@k, hit rate@k, MRR@k and nDCG@k.

The functions are those of cozyrag/evaluation/metrics.py, as in training and the benchmarks. Left out: search.
"""

import datasets
import evaluate
import numpy as np

from cozyrag.evaluation.metrics import bootstrap_interval, hit_at, ndcg_at, ranks_of, recall_at, reciprocal_rank

_DESCRIPTION = """\
Scores of ranked lists of passages (or any other items) against the relevant ones, in percent: recall@k, the share of
the relevant ones among the first k; hit rate@k, whether any is; MRR@k, the reciprocal rank of the first; nDCG@k with
gains 0 and 1.
"""

_CITATION = """\
@inproceedings{voorhees-1999-trec8,
    title = {The {TREC-8} Question Answering Track Report},
    author = {Voorhees, Ellen M.}, booktitle = {Proceedings of TREC-8}, year = {1999}
}
@article{jarvelin-kekalainen-2002,
    title = {Cumulated Gain-Based Evaluation of {IR} Techniques},
    author = {J{\\"a}rvelin, Kalervo and Kek{\\"a}l{\\"a}inen, Jaana},
    journal = {ACM Transactions on Information Systems}, volume = {20}, number = {4}, year = {2002}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of str): for each question the ids of the items found, best first. The order of the list
        is the ranking: break ties before. May be empty, and shorter than k.
    references (list of list of str): for each question the ids of the relevant items; repeats count once. A question
        without any is omitted from the means and counted in `unjudged`.
    ks (list of int): depths of recall, hit rate and nDCG; may exceed the number of items. Default [1, 5, 10, 20].
    mrr_at (int): depth of the mean reciprocal rank. Default 10.
    intervals (bool): add a 95 % percentile bootstrap interval of each score, [low, high]. Default False.

Returns:
    dict: recall@k, hit_rate@k, ndcg@k for each k, and mrr@k: floats from 0 to 100; with intervals each also as
    NAME_interval; questions: the number scored; unjudged: the number omitted.

Raises:
    ValueError: a repeated id in a ranking, an id that is not a string, a depth below 1, no question with a reference.

Examples:
    >>> metric = evaluate.load("metric_modules/cozyrag_retrieval")
    >>> scores = metric.compute(predictions=[["p7", "p1", "p3"]], references=[["p1"]], ks=[1, 5])
    >>> scores["recall@1"], scores["recall@5"], scores["mrr@10"]
    (0.0, 100.0, 50.0)
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CozyragRetrieval(evaluate.Metric):
    """recall@k, hit rate@k, MRR@k and nDCG@k."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("string")),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions, references, ks=(1, 5, 10, 20), mrr_at=10, intervals=False):
        _check(predictions, references, (*ks, mrr_at))
        judged = [(found, set(wanted)) for found, wanted in zip(predictions, references, strict=True) if wanted]
        if not judged:
            raise ValueError(f"expected a question with a relevant item, found none among {len(predictions)}")
        ranked = [(ranks_of(found, wanted), len(wanted)) for found, wanted in judged]
        values = {}
        for k in ks:
            values[f"recall@{k}"] = [recall_at(ranks, k, relevant) for ranks, relevant in ranked]
            values[f"hit_rate@{k}"] = [hit_at(ranks, k) for ranks, _ in ranked]
            values[f"ndcg@{k}"] = [ndcg_at(ranks, k, relevant) for ranks, relevant in ranked]
        values[f"mrr@{mrr_at}"] = [reciprocal_rank(ranks, mrr_at) for ranks, _ in ranked]
        scores = {name: 100 * float(np.mean(each)) for name, each in values.items()}
        if intervals:
            scores |= {
                f"{name}_interval": [100 * end for end in bootstrap_interval(np.array(each))]
                for name, each in values.items()
            }
        return scores | {"questions": len(judged), "unjudged": len(predictions) - len(judged)}


def _check(predictions, references, depths):
    """Raise ValueError for inputs that would be scored as something else."""
    if any(depth < 1 for depth in depths):
        raise ValueError(f"expected depths of at least 1, found {min(depths)}")
    for row, (found, wanted) in enumerate(zip(predictions, references, strict=True)):
        if any(key is None for key in (*found, *wanted)):
            raise ValueError(f"question {row}: expected ids that are strings, found None")
        if len(set(found)) < len(found):
            twice = next(key for place, key in enumerate(found) if key in found[:place])
            raise ValueError(
                f"question {row}: expected each id once in a ranking, found {twice!r} twice; keep its first place"
            )
