"""What a benchmark asks: questions, the passages searched, and the questions trained on. Named suites, or files of one's own.

    --suite quickstart                   the test questions that come with the package
    --suite squad --data FOLDER          SQuAD-corpus: the dev questions of SQuAD 1.1, 20,958 paragraphs of train and dev
    --suite squad-wiki --data FOLDER     those questions whose paragraph is in Wikipedia articles of 2015, cut into passages

FOLDER holds squad11_dev.jsonl.gz and squad11_train.jsonl.gz (or the official dev-v1.1.json and train-v1.1.json) and, for
squad-wiki, wiki2015_small.jsonl.gz (articles: id, title, text) and squad11_in_wiki2015.jsonl.gz (for the SHA-1 of a
paragraph: corpus_id, the article that holds it, and coverage, the share of its 8-word runs found there). Left out:
downloading any of them.
"""

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import Dataset
from pairs import settings_of
from searching import fewer, gold_ids
from wiki import COVERAGE, RUN, Articles

from cozyrag.data.passages import FEATURES, merge_passages, read_passages
from cozyrag.data.questions import Questions, read_questions, take
from cozyrag.errors import InputError
from cozyrag.retrieval.passage_index import PassageIndex
from cozyrag.runtime.assets import QUICKSTART, QUICKSTART_FOLDER

SUITES = ("quickstart", "squad", "squad-wiki")
SQUAD_FILES = {"dev": ("squad11_dev.jsonl.gz", "dev-v1.1.json"), "train": ("squad11_train.jsonl.gz", "train-v1.1.json")}
WIKI_FILES = ("wiki2015_small.jsonl.gz", "squad11_in_wiki2015.jsonl.gz")
WEIGHT_QUESTIONS = 1000
PUBLISHED = (
    {"name": "RAG, passage encoder frozen (published)", "em": 28.12},
    {"name": "RAG-end2end (published)", "em": 40.02},
)
PUBLISHED_NOTE = (
    "The published rows: Siriwardhana et al. 2021, arXiv:2106.11517, and the README of rag-end2end-retriever in Hugging Face "
    "transformers (RAG-original and RAG-end2end with DPR). There the generator is BART-large (400 M parameters) and the retriever DPR (two "
    "BERT-base encoders, 220 M), trained for 10 epochs on GPUs; here 82 M or 10 M and 23 M parameters, on a CPU if need be. There passages "
    "were found by vectors alone; here words help (hybrid). The questions are those of SQuAD 1.1's dev set in both; the passages are "
    "SQuAD's paragraphs in both, but how they were cut there is not said to the last detail. No intervals were published; +-0.9 points "
    "would be those of 10,570 questions."
)


@dataclass(frozen=True)
class Task:
    """Tables as questions.py and passages.py make them; gold ids are ids of `passages`, or None.

    `train`: questions trained on, for the leak audit; `weigh`: those of them on which the weight of an untuned pair's hybrid
    search is chosen, as a run does; None where unknown.
    """

    name: str
    questions: Dataset
    passages: Dataset
    train: Dataset | None
    weigh: Dataset | None
    published: tuple[dict, ...] = ()
    notes: list[str] = field(default_factory=list)


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `load_task` reads."""
    what = parser.add_argument_group("what is asked")
    what.add_argument("--suite", choices=SUITES, help="questions, passages and training questions by one name")
    what.add_argument("--data", metavar="FOLDER", help="where the files of the suites squad and squad-wiki lie")
    what.add_argument(
        "--questions", metavar="FILE", help="questions with answers, any format of train.py; with a context or passage_id"
    )  # fmt: skip
    what.add_argument(
        "--passages",
        metavar="FILE",
        help="passages to search (default: those of MODEL's own index; for `embedded` the contexts of the questions)",
    )
    what.add_argument(
        "--also_passages", metavar="FILE", nargs="*", default=[], help="question files whose contexts are searched too"
    )
    what.add_argument(
        "--train",
        metavar="FILE",
        help="questions that MODEL was trained on, for the leak audit and the weight of the untuned pair's search "
        "(default: those that the run noted, where they still lie there)",
    )
    what.add_argument("--limit", type=int, metavar="N", help="ask a sample of N questions, the same every time")
    what.add_argument(
        "--max_passages",
        type=int,
        metavar="N",
        help="search N passages only: the gold ones of the questions asked and a sample of the others (for trying out)",
    )


def load_task(options: argparse.Namespace, own: PassageIndex | None) -> Task:
    """What the options ask for.

    Args:
        own: the index that MODEL came with, if it did.

    Raises:
        InputError: a file that is missing or cannot be used; neither --suite nor --questions.
    """
    if (options.suite is None) == (options.questions is None):
        raise InputError("Expected either --suite NAME or --questions FILE. See --help.")
    if options.suite == "quickstart":
        task = _quickstart()
    elif options.suite:
        folder = _data_folder(options)
        task = _squad(folder) if options.suite == "squad" else _squad_wiki(folder, options.limit)
    else:
        task = _own_files(options, own)
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit: expected at least 1, found {options.limit}.")
    questions = take(task.questions, options.limit, 0)
    gold = {key for key in questions["passage_id"][:] if key is not None}
    return replace(task, questions=questions, passages=fewer(task.passages, options.max_passages, gold))


def _quickstart() -> Task:
    passages, _ = read_passages(QUICKSTART["passages"])
    asked, train = (
        read_questions(str(path)).table for path in (QUICKSTART_FOLDER / "test.jsonl", QUICKSTART["questions"])
    )
    return Task("quickstart", asked, passages, train, _sample(train))


def _data_folder(options: argparse.Namespace) -> Path:
    folder = Path(options.data or "")
    if options.data is None or not folder.is_dir():
        raise InputError(
            f"--suite {options.suite}: expected --data FOLDER, the folder that holds its files, found {options.data or 'none'}. "
            "The docstring of benchmarks/suites.py and docs/benchmarks.md say which files."
        )
    return folder


def _present(folder: Path, names: tuple[str, ...]) -> str:
    for name in names:
        if (folder / name).is_file():
            return str(folder / name)
    raise InputError(
        f"--data: expected {' or '.join(names)} in {folder.absolute()}, found neither. See docs/benchmarks.md."
    )


def _squad(folder: Path) -> Task:
    asked, train = (read_questions(_present(folder, SQUAD_FILES[name])) for name in ("dev", "train"))
    passages = merge_passages([train.passages, asked.passages])
    return Task("squad", asked.table, passages, train.table, _sample(train.table), PUBLISHED, [PUBLISHED_NOTE])


def _squad_wiki(folder: Path, limit: int | None) -> Task:
    articles = Articles.read(*(_present(folder, (name,)) for name in WIKI_FILES))
    asked, train = (read_questions(_present(folder, SQUAD_FILES[name])) for name in ("dev", "train"))
    table, there = articles.find(asked, limit)
    known = sum(key is not None for key in table["passage_id"][:])
    note = (
        f"{there} of the {len(asked.table)} dev questions have their paragraph in an article of the file (at least {COVERAGE:.0%} of its "
        f"{RUN}-word runs). Gold is, of the article's passages that hold an answer, the one that shares most with the paragraph: known for "
        f"{known} of the {len(table)} questions asked."
    )
    return Task(
        "squad-wiki", table, articles.passages, train.table, articles.find(train, WEIGHT_QUESTIONS)[0], (), [note]
    )


def _own_files(options: argparse.Namespace, own: PassageIndex | None) -> Task:
    asked = read_questions(options.questions)
    passages = _pool(options, asked, own)
    noted = settings_of(options.model).get("questions")
    noted = QUICKSTART["questions"] if noted == "quickstart" else noted
    source = options.train or (noted if noted and Path(noted).is_file() else None)
    read = read_questions(source) if source else None
    train = gold_ids(read.table, read.passages, passages) if read else None
    return Task(
        Path(options.questions).name,
        gold_ids(asked.table, asked.passages, passages),
        passages,
        train,
        _sample(train) if train else None,
    )


def _sample(train: Dataset) -> Dataset:
    return take(train, WEIGHT_QUESTIONS, 0)


def _pool(options: argparse.Namespace, asked: Questions, own: PassageIndex | None) -> Dataset:
    if options.passages:
        return read_passages(options.passages)[0]
    if own is not None and not options.also_passages:
        columns = own.passages
        return Dataset.from_dict({"id": columns.ids, "title": columns.titles, "text": columns.texts}, features=FEATURES)
    tables = [asked.passages, *(read_questions(path).passages for path in options.also_passages)]
    if not any(tables):
        raise InputError(
            f"Expected passages to search: {options.questions} carries no contexts, and --passages was not given. Give --passages FILE."
        )
    return merge_passages([table for table in tables if table is not None])
