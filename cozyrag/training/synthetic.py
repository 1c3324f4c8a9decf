"""The questions of a run that has none: made from its passages into the output folder, then read like any others.

They are made once, before the run, and kept with its passages in OUTPUT/given, which no run clears; a stopped command
resumes. Left out: how they are made (synthesis/), choosing writer and checks in detail (`cozyrag questions --from`).
"""

import shutil
from pathlib import Path

from accelerate import Accelerator

from cozyrag.config import Settings
from cozyrag.config_checks import SYNTHETIC, column_names
from cozyrag.data import beir
from cozyrag.data.delimited import delimiter_of
from cozyrag.data.documents import find_sources
from cozyrag.data.ingest import gather
from cozyrag.data.ingest_assemble import Summary, assemble
from cozyrag.data.ingest_worker import Cutting
from cozyrag.data.passages import read_passages
from cozyrag.data.rows import BadRows, Columns
from cozyrag.errors import InputError
from cozyrag.runtime.contents import read_object
from cozyrag.runtime.distributed import main_decides
from cozyrag.runtime.fingerprints import tables_fingerprint
from cozyrag.runtime.terminal import one_line, say
from cozyrag.synthesis.request import Making, Places, Request
from cozyrag.synthesis.results import lines_of
from cozyrag.synthesis.running import fulfil, passages_of
from cozyrag.training.output_dir import GIVEN

DATASET_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")  # of a folder of save_to_disk
AGAIN = "Delete it and give the same command again."


def is_synthetic(settings: Settings) -> bool:
    """Whether the questions of a run are to be made."""
    return settings.data.questions == SYNTHETIC


def make_questions(accelerator: Accelerator, settings: Settings) -> None:
    """Make the questions of a run, unless they are there. Raises InputError as `fulfil`, or in several processes."""
    if not is_synthetic(settings):
        return
    if accelerator.num_processes > 1 and not _places(settings).training.is_file():
        raise InputError(
            "--questions synthetic: expected one process to write the questions, found "
            f"{accelerator.num_processes}, which would wait for it too long. Make them with `cozyrag questions --from "
            "PASSAGES --output qa.jsonl` and give --questions qa.jsonl --eval_questions qa.validation.jsonl."
        )
    main_decides(accelerator, lambda: _make(settings))


def synthetic_files(settings: Settings) -> dict:
    """The files of a run for --questions, --eval_questions and --passages. Raises InputError if they are not made."""
    places, given = _places(settings), settings.data.eval_questions
    if not places.training.is_file():
        raise InputError(
            "--questions synthetic: expected the questions that a run makes first, found none in "
            f"{places.training.parent.absolute()}. Make them with `cozyrag questions --from PASSAGES --output "
            "qa.jsonl` and give --questions qa.jsonl."
        )
    made = str(places.validation) if places.validation.stat().st_size else None
    return {"questions": str(places.training), "eval_questions": given or made, "passages": _passages(settings)}


def synthetic_facts(settings: Settings) -> dict:
    """What the cards say of the questions: {"synthetic": {...}}, or {} if people wrote them."""
    if not is_synthetic(settings):
        return {}
    facts = read_object(_places(settings).summary, AGAIN)
    return {
        "synthetic": {name: facts[name] for name in ("writer", "reader", "passages", "written", "kept", "rejected")}
    }


def _make(settings: Settings) -> None:
    data, places = settings.data, _places(settings)
    if _notes(settings):
        _gather(settings)
    table, _ = read_passages(
        _passages(settings),
        split=data.passages_split,
        columns=Columns(**column_names(data.columns)),
        skip_bad_rows=data.skip_bad_rows,
        delimiter=delimiter_of(data.delimiter) if data.delimiter else None,
    )
    columns = {name: table[name][:] for name in ("id", "title", "text")}
    how = Making(eval_share=data.eval_share, seed=settings.training.seed)
    asked = {"passages": tables_fingerprint(columns), "writer": data.question_writer, "how": vars(how)}
    if places.training.is_file() and read_object(places.summary, AGAIN).get("settings") == asked:
        return
    places.training.unlink(missing_ok=True)
    facts = fulfil(Request(generator=data.question_writer, how=how), passages_of(columns), places, asked)
    say("\n".join([*map(one_line, lines_of(facts)), f"Some of them: {one_line(places.page)}"]))


def _places(settings: Settings) -> Places:
    return Places.of(_given(settings) / "synthetic.jsonl")


def _given(settings: Settings) -> Path:
    return Path(settings.output.output_dir) / GIVEN


def _notes(settings: Settings) -> list[str]:
    """The passages of the settings if they are folders of documents, which have to be split first."""
    named = settings.data.passages or []
    folders = [named] if isinstance(named, str) else named
    return folders if all(map(_is_of_documents, folders)) else []


def _is_of_documents(name: str) -> bool:
    folder = Path(name).expanduser()
    is_table = beir.part_of(name, "corpus") or any((folder / each).exists() for each in DATASET_FILES)
    return folder.is_dir() and not is_table


def _passages(settings: Settings) -> str | list[str]:
    return str(_given(settings) / "passages.jsonl") if _notes(settings) else settings.data.passages or []


def _gather(settings: Settings) -> None:
    """Split the documents into passages, as `cozyrag passages` does without options."""
    output = _given(settings) / "passages.jsonl"
    if output.is_file():
        return
    parts, bad = Path(f"{output}.parts"), BadRows()
    sources, unknown = find_sources(_notes(settings), format=None, ignore=[settings.output.output_dir])
    output.parent.mkdir(parents=True, exist_ok=True)
    made = gather(sources, parts, Cutting(), workers=1, bad=bad)
    report = bad.finish("These passages", settings.data.skip_bad_rows)
    summary = Summary(files=len(sources), unknown_files=len(unknown), unknown_files_first=unknown[:10])
    assemble(made, str(output), near=None, keep_repeats=False, summary=summary)
    shutil.rmtree(parts)
    say(summary.lines(one_line(output)) + (f"\n{report}" if report else ""))
