"""Evaluate a pair: let it answer, compare with the references, and report what went wrong where.

Left out: retrieval (contexts.py), the arithmetic of the metrics (metrics.py), plots and reports.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from datasets import Dataset

from cozyrag.data.matching import contains_answer, matching_form
from cozyrag.data.sentences import split_sentences
from cozyrag.evaluation import metrics
from cozyrag.models.generator import Decoding, Generator, Written
from cozyrag.runtime.terminal import one_line

RECALL_DEPTHS = (1, 5, 20)
SHOWN = ("em", "f1", "recall@1", "recall@5", "recall@20", "mrr@10", "answer_in_context")
BY = {  # what a search goes by
    "dense": "the retriever's vectors alone",
    "sparse": "BM25 alone",
    "hybrid": "both",
    "reranked": "the reranker over the first of them",
}
SEARCHES = tuple(BY)
RETRIEVAL = ("recall@1", "recall@5", "recall@20", "mrr@10", "ndcg@10")
# Retrieval metrics without a prefix are of the pair's own search; "dense_recall@1" is of the vectors alone.
APART = tuple(f"{search}_{metric}" for search in SEARCHES for metric in RETRIEVAL)
DENSE_INDEXED = ("dense_recall@1", "dense_recall@5", "dense_mrr@10")
COMPARED = (*SHOWN, *DENSE_INDEXED[:2])
SUMMED = (*SHOWN, "ndcg@10", *APART)
INTERVALS = ("em", "f1", *DENSE_INDEXED)
FEW = 50  # below it the 95 % interval of a share near one half reaches more than 14 points to each side
UNANSWERABLE = "answered an unanswerable question"
VERDICTS = ("correct", "format mismatch", "reader error", "abstained", "context miss", "retrieval miss", UNANSWERABLE)


def evaluate_pair(
    accelerator: Accelerator,
    generator: Generator,
    contexts: Dataset,
    *,
    top_k: int,
    decoding: Decoding,
    batch_size: int,
    no_answer_threshold: float | None = None,
    known: dict[str, Written] | None = None,
    desc: str | None = None,
) -> tuple[dict, list[dict]]:
    """Greedy answers to all questions, with scores. Processes share the questions, and all get the same result.

    Args:
        known: answers of this generator with this decoding, by `prompt_key`. They are reused, and new ones are added.

    Returns:
        a summary (`summarize`), and one row per question with its prediction, scores and verdict.
    """
    columns = contexts[:]
    known = {} if known is None else known
    pairs = list(zip(columns["question"], columns["context"], strict=True))
    keys = [prompt_key(*pair) for pair in pairs]
    prompts = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
    limits = decoding.limits(no_answer_threshold is None)
    known |= _written(accelerator, generator, prompts, limits=limits, batch_size=batch_size, desc=desc)
    questions = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows = [
        _scored(question, known[key].kept_above(no_answer_threshold), top_k)
        for question, key in zip(questions, keys, strict=True)
    ]
    return summarize(rows), rows


def prompt_key(question: str, context: str) -> str:
    """A hash of what the generator reads."""
    return hashlib.sha256(f"{question}\0{context}".encode()).hexdigest()[:32]


def _written(
    accelerator: Accelerator,
    generator: Generator,
    prompts: Mapping[str, tuple[str, str]],
    *,
    limits: dict,
    batch_size: int,
    desc: str | None,
) -> dict[str, Written]:
    """The answers to (question, context) pairs, by key: every process computes a share, and all get the whole.

    Batches hold prompts of similar length, longest first. They are the same for any number of processes, because the
    other rows of a batch can change the last bits of a result, and so, rarely, a word of an answer.
    """
    if not prompts:  # do not copy the model for nothing
        return {}
    keys = sorted(prompts, key=lambda key: -sum(map(len, prompts[key])))
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    answers: list[tuple[str, Written]] = []
    with generator.reading():
        for batch in tqdm(batches[accelerator.process_index :: accelerator.num_processes], desc=desc, unit="batch"):
            questions, contexts = zip(*(prompts[key] for key in batch), strict=True)
            answers += zip(batch, generator.write(questions, contexts, **limits, batch_size=batch_size), strict=True)
    return dict(gather_object(answers))


def _scored(question: dict, written: Written, top_k: int) -> dict:
    """Scores of one prediction, 0 to 1, and its verdict."""
    prediction, answers = written.text, question["answers"]
    ranks = metrics.ranks_of(question["rows"], {question["positive"]})
    apart = {search: rank for search, rank in (question.get("ranks") or {}).items() if rank is not None}
    row = {
        "id": question["id"],
        "question": question["question"],
        "answers": answers,
        "prediction": prediction,
        "score": written.score,
        "silence": written.silence,
        "em": metrics.exact_match(prediction, answers),
        "f1": metrics.f1(prediction, answers),
        **_retrieval_scores(ranks),
        "answer_in_context": float(question["answer_in_context"]),
        "context": question["context"],
    }
    for search, rank in apart.items():
        scores = _retrieval_scores([rank] if rank else [])
        row |= {f"{search}_{metric}": value for metric, value in scores.items()}
    return row | {"verdict": _verdict(row, found=metrics.hit_at(ranks, top_k) > 0)}


def _retrieval_scores(ranks: Sequence[int]) -> dict[str, float]:
    """RETRIEVAL from the ranks of the positive."""
    values = [metrics.recall_at(ranks, depth) for depth in RECALL_DEPTHS]
    values += [metrics.reciprocal_rank(ranks, cutoff=10), metrics.ndcg_at(ranks, 10)]
    return dict(zip(RETRIEVAL, values, strict=True))


def _verdict(row: dict, *, found: bool) -> str:
    if row["em"]:
        return "correct"
    if not row["answers"]:
        return UNANSWERABLE
    if metrics.same_letters(row["prediction"], row["answers"]):
        return "format mismatch"
    if row["answer_in_context"]:
        return "reader error" if row["prediction"] else "abstained"
    return "context miss" if found else "retrieval miss"


def choose_threshold(
    nothing: np.ndarray, gain: np.ndarray, answerable: np.ndarray, weights: np.ndarray
) -> tuple[float, float]:
    """The threshold of the no-answer probability with the best weighted mean score, and that score, 0 to 1.

    A question that is answered scores its `gain`; an empty answer scores 1 if the question has no answer, else 0.

    Args:
        nothing: (n,) probabilities of an empty answer; gain: (n,) scores of the answers; answerable: (n,) bool;
        weights: (n,).
    """
    order = np.argsort(-nothing, kind="stable")
    silence = np.where(answerable, 0.0, 1.0)
    steps = np.concatenate([[0.0], np.cumsum((weights * (silence - gain))[order])])
    # The first n of the order can only be separated from the next if their probabilities differ.
    levels = np.concatenate([[1.0], nothing[order]])
    possible = np.append(levels[:-1] > levels[1:], levels[-1] > 0)
    possible[0] = True
    best = int(np.flatnonzero(possible)[np.argmax(steps[possible])])
    threshold = 1.0 if best == 0 else float((levels[best] + (levels[best + 1] if best < len(order) else 0.0)) / 2)
    return threshold, float((np.sum(weights * gain) + steps[best]) / np.sum(weights))


def summarize(rows: Sequence[dict]) -> dict:
    """Means in percent over the questions, with 95 % intervals of INTERVALS (percentile bootstrap)."""
    summary: dict = {"questions": len(rows)}
    for name in (each for each in SUMMED if each in rows[0]):  # rows of an older version lack some
        values = np.array([row[name] for row in rows])
        summary[name] = round(100 * float(values.mean()), 2)
        if name in INTERVALS:
            summary[f"{name}_interval"] = [round(100 * float(end), 2) for end in metrics.bootstrap_interval(values)]
    return summary


def table(summaries: Sequence[tuple[str, dict]]) -> str:
    """A Markdown table, one line per (name, summary), with the change from the first line to the last."""
    (_, first), (_, last) = summaries[0], summaries[-1]
    lines = ["| | " + " | ".join(SHOWN) + " |", "|---|" + "---:|" * len(SHOWN)]
    for name, summary in summaries:
        lines.append(f"| {name} | " + " | ".join(f"{summary[metric]:.1f}" for metric in SHOWN) + " |")
    if len(summaries) > 1:
        lines.append("| change | " + " | ".join(f"{last[metric] - first[metric]:+.1f}" for metric in SHOWN) + " |")
    em, f1 = ("{:.1f} to {:.1f}".format(*last[f"{name}_interval"]) for name in ("em", "f1"))
    foot = f"Percent of {last['questions']} questions; 95 % intervals of the last line: EM {em}, F1 {f1}."
    return "\n".join([*lines, "", foot])


def retrieval_table(summaries: Sequence[tuple[str, dict]]) -> str:
    """A Markdown table of recall@1 and @5 of each search alone; "" unless two or more searches were measured."""
    known = [(name, summary) for name, summary in summaries if "dense_recall@1" in summary]
    searches = [search for search in SEARCHES if known and all(f"{search}_recall@1" in each for _, each in known)]
    if len(searches) < 2:
        return ""
    metrics_shown = [f"{search}_recall@{depth}" for search in searches for depth in (1, 5)]
    heads = [name.replace("_recall", "") for name in metrics_shown]
    lines = ["| recall | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name, summary in known:
        lines.append(f"| {name} | " + " | ".join(f"{summary[metric]:.1f}" for metric in metrics_shown) + " |")
    if len(known) > 1:
        (_, first), (_, last) = known[0], known[-1]
        changes = (f"{last[metric] - first[metric]:+.1f}" for metric in metrics_shown)
        lines.append("| change | " + " | ".join(changes) + " |")
    foot = "; ".join(f"{search}: {BY[search]}" for search in searches)
    return "\n".join([*lines, "", f"{foot}, which is how the pair searches."])


def few_questions(questions: int) -> str:
    """What it means that there are fewer than FEW questions, as a clause; "" if there are more."""
    if questions >= FEW:
        return ""
    reach = min(50, round(98 / questions**0.5))  # 1.96 standard errors of a share of one half, in percent
    subject = f"{questions} validation questions are" if questions > 1 else "1 validation question is"
    return (
        f"{subject} few: the scores are uncertain by up to {reach} points to each side, and one question moves them by "
        f"{100 / questions:.3g}"
    )


def examples(rows: Sequence[dict], count: int = 3) -> str:
    """A few answers from the better half, each with its verdict and the sentence of the context that contains it."""
    better = sorted(rows, key=lambda row: -row["f1"])[: len(rows) // 2 or 1]
    lines = []
    for row in better[:: max(1, len(better) // count)][:count]:
        sentences = [text for part in row["context"].split("\n") for text in split_sentences(part)]
        prediction, reference = row["prediction"], row["answers"][0] if row["answers"] else "none"
        source = next((s for s in sentences if contains_answer(matching_form(s), [prediction])), "(not in the context)")
        answer = f"{prediction}   [{row['verdict']}; reference: {reference}]"
        lines.append(f"  Q: {one_line(row['question'])}\n  A: {one_line(answer)}\n  source: {one_line(source)}")
    return "\n\n".join(lines)
