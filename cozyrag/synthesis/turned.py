"""Questions turned round: what a question writer is taught, and what it is asked.

From a passage it lists answers, and from a passage and an answer it writes the question; it also learns to answer, so
that it can read its own questions. All three have the prompt of the project's generators, with another question.
Left out: training (scripts/train_question_writer.py), writing (writers.py).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from cozyrag.runtime.atomic_files import write_json

MARKER = "question_writer.json"  # in the folder of a model that was taught so
ASK_ANSWERS = "Which short answers does this text give?"
BETWEEN = " | "  # answers in a line
LISTED = 5  # answers in a line, at most


def ask_question(answer: str) -> str:
    """What a writer is asked for the question of an answer."""
    return f"What question has this answer: {answer}"


def split_answers(line: str) -> list[str]:
    """The answers in a line that a writer wrote."""
    return [answer for part in line.split(BETWEEN.strip()) if (answer := part.strip())]


def turned_rows(rows: Iterable[tuple[str, Sequence[str], str]]) -> list[dict]:
    """Rows of training, as train.py reads them, from (question, answers, passage): three kinds, in this order.

    The answer to a question, the question of an answer, and for each passage the first LISTED different answers.
    """
    given, listed = list(rows), dict[str, dict[str, None]]()
    for _, answers, passage in given:
        listed.setdefault(passage, {})[answers[0]] = None
    return [
        *({"question": question, "answers": [answers[0]], "context": passage} for question, answers, passage in given),
        *(
            {"question": ask_question(answers[0]), "answers": [question], "context": passage}
            for question, answers, passage in given
        ),
        *(
            {"question": ASK_ANSWERS, "answers": [BETWEEN.join(list(answers)[:LISTED])], "context": passage}
            for passage, answers in listed.items()
        ),
    ]


def is_trained(folder: Path) -> bool:
    """Whether the folder holds a model that was taught so."""
    return (folder / MARKER).is_file()


def folder_of(name: str) -> str:
    """The folder of the model, for the output folder of the script that taught it; else the name."""
    inner = Path(name) / "generator"
    return str(inner) if is_trained(inner) else name


def mark_trained(folder: Path, **facts: object) -> None:
    """Note in the folder of a model that it was taught so, and on what."""
    write_json(folder / MARKER, {"asks": [ASK_ANSWERS, ask_question("...")]} | facts)
