"""How far the questions that a pair is examined with are known from training, and how it does on those that are not.

Overlap flatters: a question that was trained on in other words, an answer heard before, a gold passage that was a gold
passage in training. Each is counted as Lewis et al. 2021 do ("Question and Answer Test-Train Overlap in Open-Domain
Question Answering Datasets", arXiv:2008.02637), and scores are given apart for the questions without any of them. Left
out: paraphrases that share few words, and what the base models read before, of which only a note can be given.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from cozyrag.data.corpus import Corpus
from cozyrag.evaluation.evaluation import summarize
from cozyrag.evaluation.metrics import normalize_answer
from cozyrag.models.smollm2 import hub_name

SIMILARITY = 0.6  # a word added to or left out of a short question still counts as the same one
KINDS = ("question", "passage", "answer")
PARTS = ("all", "question or passage seen", "answer seen", "nothing seen")
EXAMPLES = 20
SHOWN = ("em", "f1", "recall@5")
_SBERT_ALL = (
    "1.1 billion sentence pairs, among them question-paragraph pairs of SQuAD 2.0 (87,599), Natural Questions (100,231) "
    "and TriviaQA (73,346), MS MARCO, PAQ and WikiAnswers"
)
_SBERT_QA = (
    "215 million question-answer pairs, among them those of SQuAD 2.0, Natural Questions, TriviaQA, MS MARCO and PAQ"
)
SMOLLM2_SOURCE = "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"
_SMOLLM2 = (
    "2 trillion tokens of FineWeb-Edu, DCLM, The Stack and filtered sets of its makers, in which any public text may be; then fine-tuned on public "
    "sets and sets of its makers (smol-smoltalk) and by preference on UltraFeedback"
)
# model (last part of its name) -> what it is known to have been trained on, and where that is said
TRAINED_ON = {
    "all-MiniLM-L6-v2": (_SBERT_ALL, "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2"),
    "all-MiniLM-L12-v2": (_SBERT_ALL, "https://huggingface.co/sentence-transformers/all-MiniLM-L12-v2"),
    "all-mpnet-base-v2": (_SBERT_ALL, "https://huggingface.co/sentence-transformers/all-mpnet-base-v2"),
    "multi-qa-MiniLM-L6-cos-v1": (_SBERT_QA, "https://huggingface.co/sentence-transformers/multi-qa-MiniLM-L6-cos-v1"),
    "multi-qa-mpnet-base-dot-v1": (
        _SBERT_QA,
        "https://huggingface.co/sentence-transformers/multi-qa-mpnet-base-dot-v1",
    ),
    "distilgpt2": (
        "OpenWebText, pages that Reddit linked to; any public text may be in it",
        "https://huggingface.co/distilbert/distilgpt2",
    ),
    "gpt2": (
        "WebText, pages that Reddit linked to, Wikipedia left out",
        "https://huggingface.co/openai-community/gpt2",
    ),
    "SmolLM2-135M-Instruct": (_SMOLLM2, SMOLLM2_SOURCE),
    "SmolLM2-135M": (_SMOLLM2.partition(";")[0], SMOLLM2_SOURCE),
}
EMBEDDED = {
    "retriever": ("all-MiniLM-L6-v2", *TRAINED_ON["all-MiniLM-L6-v2"]),
    "generator": (
        "the small GPT-2 of the package",
        "SQuAD 1.1 train and Wikipedia articles of 2015, without SQuAD dev and the articles of its titles",
        "cozyrag/assets/generator/README.md",
    ),
}


def base_notes(retriever: str, generator: str) -> dict[str, dict]:
    """For each of the two base models, as the settings name them, what it is known to have been trained on, and the source."""
    notes = {}
    for role, name in (("retriever", retriever), ("generator", generator)):
        short = Path(hub_name(name)).name
        known = EMBEDDED[role] if name == "embedded" else (short, *TRAINED_ON.get(short, ()))
        if len(known) > 1:
            notes[role] = dict(zip(("model", "trained_on", "source"), known, strict=True))
    return notes


def audit(
    train: Mapping[str, Sequence],
    asked: Mapping[str, Sequence],
    texts: Mapping[str, str],
    *,
    similarity: float = SIMILARITY,
    bases: Mapping[str, dict] | None = None,
) -> dict:
    """What of the asked questions is known from training; exact, some seconds for 90,000 against 10,000 questions.

    Args:
        train, asked: columns id, question, answers, passage_id of the questions tables.
        texts: texts of passages by id: equal texts under two ids are one passage.
        similarity: Jaccard similarity of the sets of word pairs from which on two questions count as the same.
        bases: see `base_notes`.

    Returns:
        a dictionary fit for JSON: numbers of questions, `counts` for each of KINDS and "nothing seen", `overlaps` (id of an
        asked question -> the kinds that hold for it), up to EXAMPLES `near_duplicates`, the most alike first, and `bases`.
    """
    near = dict(near_duplicates(train["question"], asked["question"], similarity))
    answers = {normalize_answer(text) for each in train["answers"] for text in each} - {""}
    content = cache(lambda key: _content(key, texts))
    gold = {content(key) for key in train["passage_id"] if key is not None}
    overlaps = {}
    for row, key in enumerate(asked["id"]):
        kinds = {
            "question": row in near,
            "passage": asked["passage_id"][row] is not None and content(asked["passage_id"][row]) in gold,
            "answer": any(normalize_answer(text) in answers for text in asked["answers"][row]),
        }
        overlaps[key] = [kind for kind in KINDS if kinds[kind]]
    most_alike = sorted(near, key=lambda row: (-near[row][1], row))[:EXAMPLES]
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
            for row in most_alike
        ],
        "bases": dict(bases or {}),
    }


def audit_corpus(corpus: Corpus, *, retriever: str, generator: str) -> dict:
    """The audit of the tables of a run, with notes on the base models named."""
    passages = corpus.passages[:]
    return audit(
        corpus.questions[:],
        corpus.eval_questions[:],
        dict(zip(passages["id"], passages["text"], strict=True)),
        bases=base_notes(retriever, generator),
    )


def _content(key: str, texts: Mapping[str, str]) -> str:
    """What makes a passage the same: its words; its id where the text is not known."""
    return normalize_answer(texts[key]) if key in texts else key


def near_duplicates(
    train: Sequence[str], asked: Sequence[str], similarity: float
) -> Iterator[tuple[int, tuple[int, float]]]:
    """(row of an asked question, (row of the most similar training question, Jaccard similarity)) from `similarity` on.

    Compared are the sets of neighbouring words after SQuAD's normalisation, beginning and end included. Two sets as similar
    as that share at least one of their rarest pairs, so only these are looked up (prefix filtering: Chaudhuri et al. 2006,
    "A Primitive Operator for Similarity Joins in Data Cleaning"); what is found is then compared in full.
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
        alike = ((len(own.intersection(coded[other])), other) for other in sorted(candidates))
        best = max(
            ((shared / (len(own) + len(coded[other]) - shared), -other) for shared, other in alike), default=(0.0, 0)
        )
        if best[0] >= similarity:
            yield row, (-best[1], best[0])


def _word_pairs(text: str) -> set[str]:
    words = ["", *normalize_answer(text).split(), ""]
    return {f"{left} {right}" for left, right in zip(words, words[1:], strict=False)}


def _rarest(codes: Sequence[int], similarity: float) -> Sequence[int]:
    return codes[: len(codes) - math.ceil(similarity * len(codes)) + 1]


def part_of(kinds: Sequence[str]) -> str:
    """Which of PARTS a question with these kinds of overlap belongs to."""
    if "question" in kinds or "passage" in kinds:
        return PARTS[1]
    return PARTS[2] if kinds else PARTS[3]


def part_scores(found: Mapping, rows: Sequence[Mapping]) -> dict[str, dict]:
    """Scores of examined rows (as `evaluation.examine` gives them) for each of PARTS that has questions."""
    parts: dict[str, list] = {name: [] for name in PARTS}
    for row in rows:
        parts["all"].append(row)
        parts[part_of(found["overlaps"].get(row["id"], ()))].append(row)
    return {name: summarize(members) for name, members in parts.items() if members}


def brief(found: Mapping) -> str:
    """The audit in a line or two."""
    total = found["questions"]
    share = {kind: f"{count} ({100 * count / total:.1f} %)" for kind, count in found["counts"].items()}
    lines = [
        f"Leak audit of {total} questions against {found['train_questions']} trained on: {share['question']} nearly the same "
        f"question (word pairs {100 * found['similarity']:.0f} % alike), {share['passage']} the same gold passage, "
        f"{share['answer']} an answer heard in training; {share['nothing seen']} share nothing."
    ]
    lines += [
        f"  Note: the {role}, {note['model']}, was itself trained on {note['trained_on']} ({note['source']})."
        for role, note in found["bases"].items()
    ]
    return "\n".join(lines)


def audit_table(scores: Mapping[str, Mapping]) -> str:
    """What `part_scores` gives as a Markdown table, with 95 % intervals of EM and F1."""
    lines = ["| part of the questions | questions | " + " | ".join(SHOWN) + " |", "|---|" + "---:|" * (len(SHOWN) + 1)]
    for part, summary in scores.items():
        cells = [
            f"{summary[name]:.1f}"
            + ("" if f"{name}_interval" not in summary else " ({:.1f} to {:.1f})".format(*summary[f"{name}_interval"]))
            for name in SHOWN
        ]
        lines.append(f"| {part} | {summary['questions']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def examples_alike(found: Mapping, count: int = 5) -> str:
    """The near-duplicates most alike, a line each; "" if there are none."""
    return "\n".join(
        f"  {each['similarity']:.2f}  {each['question']}  |  trained on: {each['train_question']}"
        for each in found["near_duplicates"][:count]
    )
