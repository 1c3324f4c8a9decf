"""The tasks of a benchmark: questions, passages, and training questions. Named suites, or the user's files.

    --suite quickstart                   the test split of the quickstart set
    --suite squad --data FOLDER          dev questions of SQuAD 1.1, the 20,958 paragraphs of train and dev
    --suite squad-wiki --data FOLDER     those of the questions whose paragraph is in Wikipedia articles of 2015

docs/benchmarks.md lists the files of FOLDER. Left out: downloading them.
"""

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import Dataset

from benchmarks.shared.corpus import fewer
from benchmarks.shared.pairs import UNTUNED, run_settings
from benchmarks.shared.wiki import COVERAGE, RUN, Articles
from cozyrag.data.corpus import gold_ids
from cozyrag.data.passages import features, merge_passages, read_passages
from cozyrag.data.questions import Questions, read_questions, take
from cozyrag.errors import InputError
from cozyrag.retrieval.passage_index import PassageIndex
from cozyrag.runtime.assets import QUICKSTART, QUICKSTART_FOLDER

SUITES = ("quickstart", "squad", "squad-wiki")
SQUAD_FILES = {"dev": ("squad11_dev.jsonl.gz", "dev-v1.1.json"), "train": ("squad11_train.jsonl.gz", "train-v1.1.json")}
WIKI_FILES = ("wiki2015_small.jsonl.gz", "squad11_in_wiki2015.jsonl.gz")
FUSION_QUESTIONS = 1000
PUBLISHED = (
    {"name": "RAG, passage encoder frozen (published)", "em": 28.12},
    {"name": "RAG-end2end (published)", "em": 40.02},
)
PUBLISHED_NOTE = (
    "The published rows: Siriwardhana et al. 2021, arXiv:2106.11517, and the README of rag-end2end-retriever in "
    "Hugging Face transformers (RAG-original and RAG-end2end with DPR). Their generator is BART-large (400 M "
    "parameters) and their retriever DPR (two BERT-base encoders, 220 M), trained for 10 epochs on GPUs; ours have 82 "
    "M or 10 M and 23 M parameters, on a CPU if need be. They use dense search; ours is hybrid. The questions are "
    "those of SQuAD 1.1's dev set in both, and the passages are SQuAD's paragraphs in both, but their splitting is "
    "not fully specified. They give no intervals; for 10,570 questions they would be about +-0.9 points."
)


@dataclass(frozen=True)
class Task:
    """Tables with the columns of cozyrag/data/questions.py and passages.py. Gold ids are ids of `passages`, or None.

    `train`: training questions for the leak audit; `fusion`: those on which fusion weights are fitted; None: unknown.
    `published`: results of other systems, as rows of the answer table.
    """

    name: str
    questions: Dataset
    passages: Dataset
    train: Dataset | None
    fusion: Dataset | None
    published: tuple[dict, ...] = ()
    notes: list[str] = field(default_factory=list)


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `load_task` reads."""
    add = parser.add_argument_group("questions and passages").add_argument
    add("--suite", choices=SUITES, help="questions, passages, and training questions by one name")
    add("--data", metavar="FOLDER", help="folder with the files of the suites squad and squad-wiki")
    add(
        "--questions", metavar="FILE", help="questions with answers and a context or passage_id, any format of train.py"
    )
    add(
        "--passages",
        metavar="FILE",
        help="passages to search (default: those of MODEL's own index; for `embedded` the contexts of the questions)",
    )
    add("--also_passages", metavar="FILE", nargs="*", default=[], help="question files whose contexts are searched too")
    add(
        "--train",
        metavar="FILE",
        help=f"training questions of MODEL, for the leak audit and the fusion weights of the {UNTUNED} (default: those "
        "in settings.json, if the file still exists)",
    )
    add("--limit", type=int, metavar="N", help="use a fixed sample of N questions")
    add(
        "--max_passages",
        type=int,
        metavar="N",
        help="search N passages only, for a trial: the gold ones of the questions and a sample of the others",
    )


def load_task(options: argparse.Namespace, own: PassageIndex | None) -> Task:
    """Load the task that the options name.

    Args:
        own: the index that MODEL came with, if any.

    Raises:
        InputError: a file is missing or unusable, or there is neither --suite nor --questions.
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
            f"--suite {options.suite}: expected --data FOLDER with its files, found {options.data or 'none'}. "
            "docs/benchmarks.md lists the files."
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
        f"{there} of the {len(asked.table)} dev questions have their paragraph in an article of the file (at least "
        f"{COVERAGE:.0%} of its {RUN}-word runs). The gold passage is the passage of the article that contains an "
        f"answer and shares most runs with the paragraph. It is known for {known} of the {len(table)} questions used."
    )
    return Task(
        "squad-wiki", table, articles.passages, train.table, articles.find(train, FUSION_QUESTIONS)[0], (), [note]
    )


def _own_files(options: argparse.Namespace, own: PassageIndex | None) -> Task:
    asked = read_questions(options.questions)
    passages = _pool(options, asked, own)
    noted = run_settings(options.model).get("questions")
    noted = QUICKSTART["questions"] if noted == "quickstart" else noted
    source = options.train or (noted if noted and Path(noted).is_file() else None)
    read = read_questions(source) if source else None
    known = (passages["id"][:], passages["text"][:])
    train = gold_ids(read.table, read.passages, *known) if read else None
    questions = gold_ids(asked.table, asked.passages, *known)
    return Task(Path(options.questions).name, questions, passages, train, _sample(train) if train else None)


def _sample(train: Dataset) -> Dataset:
    return take(train, FUSION_QUESTIONS, 0)


def _pool(options: argparse.Namespace, asked: Questions, own: PassageIndex | None) -> Dataset:
    if options.passages:
        return read_passages(options.passages)[0]
    if own is not None and not options.also_passages:
        columns = own.passages
        return Dataset.from_dict(
            {"id": columns.ids, "title": columns.titles, "text": columns.texts}, features=features()
        )
    tables = [asked.passages, *(read_questions(path).passages for path in options.also_passages)]
    if not any(tables):
        raise InputError(
            f"Expected passages to search, found none: {options.questions} contains no contexts. Give --passages FILE."
        )
    return merge_passages([table for table in tables if table is not None])
