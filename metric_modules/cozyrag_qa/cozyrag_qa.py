"""Open question answering as a module for the `evaluate` library: EM, F1, ROUGE-L, BLEU and answer-in-context.

The functions are those of cozyrag/evaluation/metrics.py, as in training and the benchmarks. Left out: answering.
"""

import datasets
import evaluate
import numpy as np

from cozyrag.data.matching import contains_answer, matching_form
from cozyrag.evaluation.metrics import (
    bleu,
    bleu_interval,
    bleu_statistics,
    bootstrap_interval,
    computable,
    exact_match,
    f1,
    rouge_l,
)

_DESCRIPTION = """\
Scores of short answers to open questions against one or more reference answers, in percent: exact match and F1 as in
the official SQuAD v1.1 script, ROUGE-L (package rouge-score, no stemming), corpus BLEU (package sacrebleu) and, in the
configuration "contexts", the share of questions whose context contains a reference answer as whole words.
"""

_CITATION = """\
@inproceedings{rajpurkar-etal-2016-squad,
    title = {{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
    author = {Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
    booktitle = {Proceedings of EMNLP}, year = {2016}, url = {https://arxiv.org/abs/1606.05250}
}
@inproceedings{lin-2004-rouge,
    title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
    author = {Lin, Chin-Yew}, booktitle = {Text Summarization Branches Out}, year = {2004}
}
@inproceedings{papineni-etal-2002-bleu,
    title = {{B}leu: a Method for Automatic Evaluation of Machine Translation},
    author = {Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
    booktitle = {Proceedings of ACL}, year = {2002}
}
@inproceedings{post-2018-call,
    title = {A Call for Clarity in Reporting {BLEU} Scores},
    author = {Post, Matt}, booktitle = {Proceedings of WMT}, year = {2018}, url = {https://arxiv.org/abs/1804.08771}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): one answer per question; "" for none.
    references (list of list of str): the accepted answers of each question. An empty list: the question has no answer;
        EM, F1 and ROUGE-L are then 1 for an empty prediction, else 0 (SQuAD 2.0), and BLEU omits the question.
    contexts (list of str, configuration "contexts" only): the context from which each answer was generated.
    intervals (bool): add a 95 % percentile bootstrap interval of each score, [low, high]. Default False.

Returns:
    dict: exact_match, f1, rouge_l, bleu and, in the configuration "contexts", answer_in_context: floats from 0 to 100;
    with intervals each also as NAME_interval; questions: their number. Without the package rouge-score there is no
    rouge_l, without sacrebleu no bleu.

Raises:
    ValueError: no question, or a prediction, reference or context that is not a string.

Examples:
    >>> metric = evaluate.load("metric_modules/cozyrag_qa")
    >>> metric.compute(predictions=["October"], references=[["October 1973", "1973"]])["exact_match"]
    0.0
    >>> reading = evaluate.load("metric_modules/cozyrag_qa", "contexts")
    >>> reading.compute(predictions=["1973"], references=[["1973"]], contexts=["It was 1973."])["answer_in_context"]
    100.0
    >>> round(metric.compute(predictions=["the Red Fox!"], references=[["red fox"]])["f1"], 1)
    100.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CozyragQA(evaluate.Metric):
    """EM, F1, ROUGE-L, BLEU and answer-in-context."""

    def _info(self):
        features = {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
        if self.config_name == "contexts":
            features["contexts"] = datasets.Value("string")
        elif self.config_name != "default":
            raise ValueError(f"expected the configuration 'contexts' or none, found {self.config_name!r}")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(features),
            reference_urls=["https://rajpurkar.github.io/SQuAD-explorer/"],
        )

    def _compute(self, predictions, references, contexts=None, intervals=False):
        _check(predictions, references, contexts)
        pairs = list(zip(predictions, references, strict=True))
        functions = {"exact_match": exact_match, "f1": f1, "rouge_l": rouge_l}
        values = {name: [functions[name](*pair) for pair in pairs] for name in computable(tuple(functions))}
        if contexts is not None:
            values["answer_in_context"] = [
                float(contains_answer(matching_form(context), wanted))
                for context, wanted in zip(contexts, references, strict=True)
            ]
        scores = {name: 100 * float(np.mean(each)) for name, each in values.items()}
        if intervals:
            scores |= {
                f"{name}_interval": [100 * end for end in bootstrap_interval(np.array(each))]
                for name, each in values.items()
            }
        if computable(["bleu"]):
            statistics = np.stack([bleu_statistics(*pair) for pair in pairs])
            scores["bleu"] = bleu(statistics.sum(axis=0))
            scores |= {"bleu_interval": list(bleu_interval(statistics))} if intervals else {}
        return scores | {"questions": len(pairs)}


def _check(predictions, references, contexts):
    """Raise ValueError for inputs that would be scored as something else."""
    if not len(predictions):
        raise ValueError("expected at least one question, found none")
    for row, (prediction, wanted) in enumerate(zip(predictions, references, strict=True)):
        if prediction is None or wanted is None or any(text is None for text in wanted):
            raise ValueError(
                f"question {row}: expected strings, found None; use '' for an empty answer, [] for no answer"
            )
        if contexts is not None and contexts[row] is None:
            raise ValueError(f"question {row}: expected a context, found None; use '' for an empty one")
