"""Which of the answers that people chose are among the spans that a question writer asks for? Without a model.

    python -m benchmarks.quality.answer_spans --questions train-v1.1.json --paragraphs 300

An answer counts as found if a span equals it after the normalisation of SQuAD. Spans that only repeat the title are
counted apart: nobody is asked for them. Left out: whether a model writes good questions for them.
"""

import argparse
import random
from collections import defaultdict

import numpy as np

from cozyrag.cli import entry_point
from cozyrag.data.questions import read_questions
from cozyrag.errors import InputError
from cozyrag.evaluation.metrics import normalize_answer
from cozyrag.synthesis.answer_spans import propose

DRAWN = (3, 10)  # spans of a passage; 3 is the default of `cozyrag questions --pairs`


def measure(rows: list[tuple[str, str, list[str]]]) -> list[str]:
    """Lines with the numbers, from (title, text, answers of people) of each paragraph."""
    found: dict[str, list[bool]] = defaultdict(list)
    chosen: dict[str, list[bool]] = defaultdict(list)
    counts, dropped = [], 0
    for number, (title, text, answers) in enumerate(rows):
        spans, repeating = propose(text, None, str(number), title=title)
        counts.append(len(spans))
        dropped += len(repeating)
        for name, count in (("all", None), *((f"{count} drawn", count) for count in DRAWN)):
            drawn, _ = propose(text, count, str(number), title=title)
            known = {normalize_answer(span) for span, _ in drawn}
            found[name] += [normalize_answer(answer) in known for answer in answers]
            chosen[name] += [span in set(map(normalize_answer, answers)) for span in known]
    asked = len(found["all"])
    return [
        f"{len(rows)} paragraphs, {asked} answers; {np.mean(counts):.1f} spans a paragraph "
        f"(median {np.median(counts):.0f}), {dropped} more repeat the title",
        *(
            f"{name}: {sum(hits)} of the answers found, {100 * sum(hits) / asked:.1f} %; "
            f"{100 * np.mean(chosen[name]):.1f} % of the spans are such an answer"
            for name, hits in found.items()
        ),
    ]


def paragraphs(path: str, count: int, seed: int) -> list[tuple[str, str, list[str]]]:
    """A sample of the paragraphs with their title, and the first answer to each of their questions."""
    read = read_questions(path)
    if read.passages is None:
        raise InputError(f"{path}: expected questions with their passage (column 'context'), found none.")
    answers = defaultdict(list)
    for key, given in zip(read.table["passage_id"], read.table["answers"], strict=True):
        answers[key] += given[:1]
    columns = read.passages[:]
    rows = zip(columns["id"], columns["title"], columns["text"], strict=True)
    asked = [(title, text, answers[key]) for key, title, text in rows if answers[key]]
    return random.Random(seed).sample(asked, min(count, len(asked)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--questions", required=True, help="questions with their passages, in any layout of train.py")
    add("--paragraphs", type=int, default=300, help="size of the sample (default: 300)")
    add("--seed", type=int, default=42, help="of the sample (default: 42)")
    options = parser.parse_args()
    entry_point(lambda: print("\n".join(measure(paragraphs(options.questions, options.paragraphs, options.seed)))))


if __name__ == "__main__":
    main()
