"""Examine a pair: let it answer, compare with the references, and say what went wrong where.

Left out: retrieval itself (contexts.py), the arithmetic of the metrics (metrics.py), drawing and tables for the web.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from datasets import Dataset

from cozyrag.data.sentences import split_sentences
from cozyrag.evaluation.metrics import (
    bootstrap_interval,
    exact_match,
    f1,
    ndcg_at,
    ranks_of,
    recall_at,
    reciprocal_rank,
    same_letters,
)
from cozyrag.models.generator import Decoding, Generator, Written

RECALL_DEPTHS = (1, 5, 20)
SHOWN = ("em", "f1", "recall@1", "recall@5", "recall@20", "mrr@10", "answer_in_context")
SUMMED = (*SHOWN, "ndcg@10")
VERDICTS = (
    "correct",
    "format mismatch",
    "reader error",
    "abstained",
    "context miss",
    "retrieval miss",
    "answered an unanswerable question",
)


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
    """Greedy answers to all questions, scored.

    Args:
        known: what this generator has written with this decoding, by `prompt_key`. It is not asked these questions again, and
            what it writes now is added.

    Returns:
        a summary (means in percent, 95 % bootstrap intervals of EM and F1), and one row for each question with its
        prediction, scores and verdict. Every process answers its share and all get the same result.
    """
    columns = contexts[:]
    known = {} if known is None else known
    keys = [prompt_key(*each) for each in zip(columns["question"], columns["context"], strict=True)]
    prompts = dict(zip(keys, zip(columns["question"], columns["context"], strict=True), strict=True))
    known |= _written(
        accelerator,
        generator,
        {key: prompt for key, prompt in prompts.items() if key not in known},
        limits=decoding.limits(no_answer_threshold is None),
        batch_size=batch_size,
        desc=desc,
    )
    rows = [
        _scored(
            {name: column[row] for name, column in columns.items()},
            known[key].kept_above(no_answer_threshold),
            top_k,
        )
        for row, key in enumerate(keys)
    ]
    return summarize(rows), rows


def prompt_key(question: str, context: str) -> str:
    """A short name for what the generator reads."""
    return hashlib.sha256(f"{question}\0{context}".encode()).hexdigest()[:32]


def _written(
    accelerator: Accelerator,
    generator: Generator,
    prompts: dict[str, tuple[str, str]],
    *,
    limits: dict,
    batch_size: int,
    desc: str | None,
) -> dict[str, Written]:
    """What the generator writes for (question, context) pairs; every process answers its share and all get the whole."""
    if not prompts:  # nor is a copy made to read with
        return {}
    names, pairs = list(prompts), list(prompts.values())
    batches = _batches([question for question, _ in pairs], [context for _, context in pairs], batch_size)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    answers = []
    with generator.reading():
        for batch in tqdm(mine, desc=desc, unit="batch"):
            questions, contexts = zip(*(pairs[row] for row in batch), strict=True)
            written = generator.write(questions, contexts, **limits, batch_size=batch_size)
            answers += zip([names[row] for row in batch], written, strict=True)
    return dict(gather_object(answers))


def _batches(questions: Sequence[str], contexts: Sequence[str], size: int) -> list[list[int]]:
    """Rows in batches of like length, longest first.

    They are the same for any number of processes, which take them in turn: what stands beside a question in its batch
    can move its last bits, and with them, once in a while, a word of its answer.
    """
    order = sorted(range(len(questions)), key=lambda row: -len(questions[row]) - len(contexts[row]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _scored(question: dict, written: Written, top_k: int) -> dict:
    """Scores of one prediction, 0 to 1, and where it went wrong."""
    prediction = written.text
    ranks = ranks_of(question["rows"], {question["positive"]})
    row = {
        "id": question["id"],
        "question": question["question"],
        "answers": question["answers"],
        "prediction": prediction,
        "score": written.score,
        "silence": written.silence,
        "em": exact_match(prediction, question["answers"]),
        "f1": f1(prediction, question["answers"]),
        **{f"recall@{depth}": recall_at(ranks, depth) for depth in RECALL_DEPTHS},
        "mrr@10": reciprocal_rank(ranks, cutoff=10),
        "ndcg@10": ndcg_at(ranks, 10),
        "answer_in_context": float(question["answer_in_context"]),
        "context": question["context"],
    }
    return row | {"verdict": _verdict(row, found=bool(recall_at(ranks, top_k)))}


def choose_threshold(
    nothing: np.ndarray, gain: np.ndarray, answerable: np.ndarray, weights: np.ndarray
) -> tuple[float, float]:
    """The probability of writing nothing above which silence pays best, and the weighted mean score there, 0 to 1.

    A question that is answered scores its `gain`; one that is met with silence scores 1 if it has no answer, else 0.

    Args:
        nothing: (n,) probabilities; gain: (n,) scores of the answers if given; answerable: (n,) bool; weights: (n,).
    """
    order = np.argsort(-nothing, kind="stable")
    silence = np.where(answerable, 0.0, 1.0)
    steps = np.concatenate([[0.0], np.cumsum((weights * (silence - gain))[order])])
    # silence for the first n of the order is only possible where a threshold can tell them from the next
    levels = np.concatenate([[1.0], nothing[order]])
    possible = np.append(levels[:-1] > levels[1:], levels[-1] > 0)
    possible[0] = True
    best = int(np.flatnonzero(possible)[np.argmax(steps[possible])])
    threshold = 1.0 if best == 0 else float((levels[best] + (levels[best + 1] if best < len(order) else 0.0)) / 2)
    return threshold, float((np.sum(weights * gain) + steps[best]) / np.sum(weights))


def _verdict(row: dict, *, found: bool) -> str:
    if row["em"]:
        return "correct"
    if not row["answers"]:
        return "answered an unanswerable question"
    if same_letters(row["prediction"], row["answers"]):
        return "format mismatch"
    if row["answer_in_context"]:
        return "reader error" if row["prediction"] else "abstained"
    return "context miss" if found else "retrieval miss"


def summarize(rows: Sequence[dict]) -> dict:
    """Means in percent over the questions, with 95 % intervals of EM and F1 (percentile bootstrap)."""
    summary: dict = {"questions": len(rows)}
    for name in (each for each in SUMMED if each in rows[0]):  # rows of an older version hold fewer
        values = np.array([row[name] for row in rows])
        summary[name] = round(100 * float(values.mean()), 2)
        if name in ("em", "f1"):
            summary[f"{name}_interval"] = [round(100 * float(end), 2) for end in bootstrap_interval(values)]
    return summary


def table(summaries: Sequence[tuple[str, dict]]) -> str:
    """A Markdown table, one line for each (name, summary), with the change from the first line to the last."""
    lines = ["| | " + " | ".join(SHOWN) + " |", "|---|" + "---:|" * len(SHOWN)]
    for name, summary in summaries:
        lines.append(f"| {name} | " + " | ".join(f"{summary[metric]:.1f}" for metric in SHOWN) + " |")
    if len(summaries) > 1:
        first, last = summaries[0][1], summaries[-1][1]
        lines.append("| change | " + " | ".join(f"{last[metric] - first[metric]:+.1f}" for metric in SHOWN) + " |")
    last = summaries[-1][1]
    intervals = ", ".join(
        f"{name.upper()} {last[f'{name}_interval'][0]:.1f} to {last[f'{name}_interval'][1]:.1f}"
        for name in ("em", "f1")
    )
    return (
        "\n".join(lines)
        + f"\n\nPercent of {last['questions']} questions; 95 % intervals of the last line: {intervals}."
    )


def examples(rows: Sequence[dict], count: int = 3) -> str:
    """A few answers from the better half, each with its verdict and the sentence of the context it stands in."""
    better = sorted(rows, key=lambda row: -row["f1"])[: len(rows) // 2 or 1]
    lines = []
    for row in better[:: max(1, len(better) // count)][:count]:
        sentences = [text for part in row["context"].split("\n") for text in split_sentences(part)]
        prediction, reference = row["prediction"], row["answers"][0] if row["answers"] else "none"
        source = next((text for text in sentences if prediction and prediction in text), "(not in the context)")
        lines.append(
            f"  Q: {row['question']}\n  A: {prediction}   [{row['verdict']}; reference: {reference}]\n  source: {source}"
        )
    return "\n\n".join(lines)
