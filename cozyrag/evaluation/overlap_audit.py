"""Train-test overlap: how many validation questions are known from training, and the scores on those that are not.

A question that was trained on in other words, an answer or a gold passage that occurred in training: each raises the
scores. They are counted as in Lewis et al. 2021 ("Question and Answer Test-Train Overlap in Open-Domain Question
Answering Datasets", arXiv:2008.02637). Left out: paraphrases that share few words; the training data of the base models
is only noted.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import compress
from pathlib import Path

from cozyrag.data.corpus import Corpus
from cozyrag.data.matching import comparable
from cozyrag.data.passages import read_column, rows_of
from cozyrag.evaluation.evaluation import summarize
from cozyrag.models.smollm2 import BASE as SMOLLM2
from cozyrag.models.smollm2 import hub_name
from cozyrag.runtime.terminal import one_line

SIMILARITY = 0.6  # a word added to or removed from a short question still counts as the same one
KINDS = ("question", "passage", "answer")
PARTS = ("all", "question or passage seen", "answer seen", "nothing seen")
EXAMPLES = 20
SHOWN = ("em", "f1", "recall@5")
_SBERT_ALL = (
    "1.1 billion sentence pairs, among them question-paragraph pairs of SQuAD 2.0 (87,599), Natural Questions "
    "(100,231) and TriviaQA (73,346), MS MARCO, PAQ and WikiAnswers"
)
_SBERT_QA = (
    "215 million question-answer pairs, among them those of SQuAD 2.0, Natural Questions, TriviaQA, MS MARCO and PAQ"
)
_SMOLLM2 = (
    "2 trillion tokens of FineWeb-Edu, DCLM, The Stack and filtered sets of its makers, in which any public text may be"
)
_SMOLLM2_INSTRUCT = (
    "; then fine-tuned on public sets and sets of its makers (smol-smoltalk) and by preference on UltraFeedback"
)
# model -> the page on the Hub that names its training data, and these data
TRAINED_ON = {
    "all-MiniLM-L6-v2": ("sentence-transformers/all-MiniLM-L6-v2", _SBERT_ALL),
    "all-MiniLM-L12-v2": ("sentence-transformers/all-MiniLM-L12-v2", _SBERT_ALL),
    "all-mpnet-base-v2": ("sentence-transformers/all-mpnet-base-v2", _SBERT_ALL),
    "multi-qa-MiniLM-L6-cos-v1": ("sentence-transformers/multi-qa-MiniLM-L6-cos-v1", _SBERT_QA),
    "multi-qa-mpnet-base-dot-v1": ("sentence-transformers/multi-qa-mpnet-base-dot-v1", _SBERT_QA),
    "distilgpt2": ("distilbert/distilgpt2", "OpenWebText, pages that Reddit linked to; any public text may be in it"),
    "gpt2": ("openai-community/gpt2", "WebText, pages that Reddit linked to, Wikipedia left out"),
    "SmolLM2-135M-Instruct": (SMOLLM2, _SMOLLM2 + _SMOLLM2_INSTRUCT),
    "SmolLM2-135M": (SMOLLM2, _SMOLLM2),
}
PACKAGED_GENERATOR = {
    "model": "the small GPT-2 of the package",
    "trained_on": "SQuAD 1.1 train and Wikipedia articles of 2015, without SQuAD dev and the articles of its titles",
    "source": "cozyrag/assets/generator/README.md",
}


def base_notes(retriever: str, generator: str) -> dict[str, dict]:
    """The known training data of the two base models, as named in the settings, with the source."""
    retriever = "all-MiniLM-L6-v2" if retriever == "embedded" else retriever
    notes = {}
    for role, name in (("retriever", retriever), ("generator", generator)):
        short = Path(hub_name(name)).name
        if short in TRAINED_ON:
            page, data = TRAINED_ON[short]
            notes[role] = {"model": short, "trained_on": data, "source": f"https://huggingface.co/{page}"}
    return notes | ({"generator": PACKAGED_GENERATOR} if generator == "embedded" else {})


def audit(
    train: Mapping[str, Sequence],
    asked: Mapping[str, Sequence],
    texts: Mapping[str, str],
    *,
    similarity: float = SIMILARITY,
    bases: Mapping[str, dict] | None = None,
) -> dict:
    """What of the `asked` questions is known from training; exact, some seconds for 90,000 against 10,000 questions.

    Args:
        train, asked: columns id, question, answers, passage_id of the questions tables.
        texts: texts of passages by id: equal texts with different ids are one passage.
        similarity: Jaccard similarity of the sets of word pairs from which two questions count as the same.
        bases: see `base_notes`.

    Returns:
        a dictionary for JSON: numbers of questions, `counts` for each of KINDS and "nothing seen", `overlaps` (id of an
        asked question -> its kinds), up to EXAMPLES `near_duplicates`, most similar first, and `bases`.
    """
    near = dict(near_duplicates(train["question"], asked["question"], similarity))
    answers = {comparable(text) for each in train["answers"] for text in each} - {""}
    # a passage is identified by its words, or by its id if its text is unknown
    content = cache(lambda key: comparable(texts[key]) if key in texts else key)
    gold = {content(key) for key in train["passage_id"] if key is not None}
    overlaps = {}
    for row, key in enumerate(asked["id"]):
        passage = asked["passage_id"][row]
        seen = (
            row in near,
            passage is not None and content(passage) in gold,
            any(comparable(text) in answers for text in asked["answers"][row]),
        )
        overlaps[key] = list(compress(KINDS, seen))
    most_similar = sorted(near, key=lambda row: (-near[row][1], row))[:EXAMPLES]
    return {
        "train_questions": len(train["id"]),
        "questions": len(asked["id"]),
        "similarity": similarity,
        "counts": {kind: sum(kind in kinds for kinds in overlaps.values()) for kind in KINDS}
        | {"nothing seen": sum(not kinds for kinds in overlaps.values())},
        "overlaps": {key: kinds for key, kinds in overlaps.items() if kinds},
        "near_duplicates": [
            {
                "id": asked["id"][row],
                "question": asked["question"][row],
                "train_id": train["id"][near[row][0]],
                "train_question": train["question"][near[row][0]],
                "similarity": round(near[row][1], 3),
            }
            for row in most_similar
        ],
        "bases": dict(bases or {}),
    }


def audit_corpus(corpus: Corpus, *, retriever: str, generator: str) -> dict:
    """The audit of the tables of a run, with notes on the base models."""
    train, asked = corpus.questions[:], corpus.eval_questions[:]
    row_of = rows_of(read_column(corpus.passages, "id"), train["passage_id"] + asked["passage_id"])
    texts = dict(zip(row_of, corpus.passages.select(list(row_of.values()))["text"][:], strict=True))
    return audit(train, asked, texts, bases=base_notes(retriever, generator))


def near_duplicates(
    train: Sequence[str], asked: Sequence[str], similarity: float
) -> Iterator[tuple[int, tuple[int, float]]]:
    """(row of an asked question, (row of the most similar training question, Jaccard similarity)), from `similarity`.

    Compared are the sets of neighbouring words of matching.py, including beginning and end. Two sets of
    that similarity share at least one of their rarest pairs, so only candidates with a shared rare pair are compared in
    full (prefix filtering: Chaudhuri et al. 2006, "A Primitive Operator for Similarity Joins in Data Cleaning").
    """
    pairs = [_word_pairs(text) for text in (*train, *asked)]
    counts = Counter(pair for each in pairs for pair in each)
    number = {pair: rank for rank, pair in enumerate(sorted(counts, key=lambda pair: (counts[pair], pair)))}
    coded = [sorted(number[pair] for pair in each) for each in pairs]
    rare: dict[int, list[int]] = {}
    for row, codes in enumerate(coded[: len(train)]):
        for code in _rarest(codes, similarity):
            rare.setdefault(code, []).append(row)
    for row, codes in enumerate(coded[len(train) :]):
        own = set(codes)
        candidates = {other for code in _rarest(codes, similarity) for other in rare.get(code, ())}
        shared = ((len(own.intersection(coded[other])), other) for other in candidates)
        found = ((count / (len(own) + len(coded[other]) - count), -other) for count, other in shared)
        best, other = max(found, default=(0.0, 0))
        if best >= similarity:
            yield row, (-other, best)


def _word_pairs(text: str) -> set[str]:
    words = ["", *comparable(text).split(), ""]
    return {f"{left} {right}" for left, right in zip(words, words[1:], strict=False)}


def _rarest(codes: Sequence[int], similarity: float) -> Sequence[int]:
    return codes[: len(codes) - math.ceil(similarity * len(codes)) + 1]


def part_of(kinds: Sequence[str]) -> str:
    """Which of PARTS a question with these kinds of overlap belongs to."""
    if "question" in kinds or "passage" in kinds:
        return PARTS[1]
    return PARTS[2] if kinds else PARTS[3]


def part_scores(found: Mapping, rows: Sequence[dict]) -> dict[str, dict]:
    """Scores of evaluated rows (of `evaluate_pair`) for each of PARTS that has questions."""
    parts: dict[str, list] = {name: [] for name in PARTS}
    for row in rows:
        parts["all"].append(row)
        parts[part_of(found["overlaps"].get(row["id"], ()))].append(row)
    return {name: summarize(members) for name, members in parts.items() if members}


def brief(found: Mapping) -> str:
    """The audit in a line or two."""
    total = found["questions"]
    share = {kind: f"{count} ({_percent(count, total)})" for kind, count in found["counts"].items()}
    lines = [
        f"Leak audit of {total} questions against {found['train_questions']} of training: {share['question']} have "
        f"nearly the same question (word pairs {100 * found['similarity']:.0f} % similar), {share['passage']} the same "
        f"gold passage, {share['answer']} an answer seen in training; {share['nothing seen']} share nothing."
    ]
    lines += [
        f"  Note: the {role}, {note['model']}, was itself trained on {note['trained_on']} ({note['source']})."
        for role, note in found["bases"].items()
    ]
    return "\n".join(lines)


def audit_list(found: Mapping, role: str) -> str:
    """The audit as a Markdown list, with the note on the base of one model, "generator" or "retriever"."""
    labels = {
        "question": f"nearly a question of training (word pairs {100 * found['similarity']:.0f} % similar)",
        "passage": "the same gold passage as a question of training",
        "answer": "an answer seen in training",
        "nothing seen": "none of these",
    }
    total = found["questions"]
    lines = [f"Of the {total} questions, compared with the {found['train_questions']} of training:", ""]
    lines += [
        f"- {label}: {found['counts'][kind]} ({_percent(found['counts'][kind], total)})"
        for kind, label in labels.items()
    ]
    if note := found["bases"].get(role):
        lines.append(f"- The base, {note['model']}, was itself trained on {note['trained_on']} ({note['source']}).")
    return "\n".join(lines)


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %"


def audit_table(scores: Mapping[str, Mapping], shown: Sequence[str] = SHOWN) -> str:
    """The result of `part_scores` as a Markdown table, with the 95 % intervals that it carries."""
    heads = " | ".join(shown)
    lines = [f"| part of the questions | questions | {heads} |", "|---|" + "---:|" * (len(shown) + 1)]
    for part, summary in scores.items():
        intervals = {name: summary.get(f"{name}_interval") for name in shown}
        cells = [
            f"{summary[name]:.1f}" + (" ({:.1f} to {:.1f})".format(*ends) if ends else "")
            for name, ends in intervals.items()
        ]
        lines.append(f"| {part} | {summary['questions']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def examples_alike(found: Mapping, count: int = 5) -> str:
    """The most similar near-duplicates, a line each; "" if there are none."""
    return "\n".join(
        f"  {each['similarity']:.2f}  {one_line(each['question'])}  |  trained on: {one_line(each['train_question'])}"
        for each in found["near_duplicates"][:count]
    )
