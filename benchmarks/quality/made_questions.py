"""What are made questions worth? Pairs trained on them, on people's questions and on none answer people's questions.

    python -m benchmarks.quality.made_questions --train train-v1.1.json --dev dev-v1.1.json --folder study \\
        --paragraphs 2000 --questions 2000 --generator question-writer --base "--generator smollm2 --rounds 1"

Questions are drafted about a sample of the paragraphs of --train, once, and checked twice. Then pairs are trained, all
on as many questions about these paragraphs, and asked a sample of --dev; every paragraph of both files is searched.

  untuned  nothing is trained
  real     questions that people asked about these paragraphs
  made     made questions, checked as `cozyrag questions` does
  unread   the same drafts without the check of the reader (no round trip), drawn to the same number
  noise    as made; a share of the contexts lacks the passage (--context_noise)

Each stage is kept in --folder, so a stopped command resumes when it is given again; stages.jsonl has the seconds of
each, and of its processor time, and the questions a minute. report.json holds the scores, scores/ those of each
question. A pair that training made worse on its own validation questions, which are of its own kind, is rolled back, as
for a user. Left out: whether the questions are good (read the pages of samples, made.html and unread.html), seeds of
training (give another --seed and --folder).
"""

import argparse
import random
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from time import perf_counter, process_time

from datasets import Dataset

from benchmarks.shared.scoring import paired_tests, test_table
from cozyrag import cli
from cozyrag.commands.options import at_least, share
from cozyrag.config import Settings, parse_settings
from cozyrag.data.passages import merge_passages
from cozyrag.data.questions import read_questions, take
from cozyrag.errors import InputError
from cozyrag.evaluation.scoring import score_table, scores_of
from cozyrag.pipeline import CozyRAG
from cozyrag.run import run
from cozyrag.runtime.atomic_files import write_json, write_jsonl
from cozyrag.runtime.contents import read_object
from cozyrag.runtime.distributed import own_state
from cozyrag.runtime.folder_lock import LOCK, held
from cozyrag.runtime.json_lines import append_json_line, end_last_line, read_json_lines
from cozyrag.runtime.terminal import say
from cozyrag.synthesis.making import check
from cozyrag.synthesis.request import WAYS, Making, Places, Request
from cozyrag.synthesis.results import facts_of, lines_of, write_results
from cozyrag.synthesis.running import Drafted, drafted, passages_of
from cozyrag.training.output_dir import FINISHED

METRICS = ("em", "f1", "recall@5")
VARIANTS = ("made", "untuned", "real", "unread", "noise")  # the first one is compared with the others
MADE = ("made", "unread")  # and how they are checked: with the reader, without
AGAIN = "Give another --folder, or delete this one and start again."


class Study:
    """The stages of a study and where each is kept."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.folder = options, Path(options.folder)
        self.how = Making(pairs=options.pairs, batch_size=options.batch_size, seed=options.seed)
        self.texts, self.asked, self.dev = (self.folder / f"{name}.jsonl" for name in ("passages", "asked", "dev"))

    def run(self) -> None:
        """All stages that are not done yet, and the tables."""
        self._check_same()
        self._stage("sample", self.dev, self._sample)
        self._stage("draft", self.folder / "drafts.json", self._draft)
        for name in MADE:
            self._stage(f"check: {name}", self._places(name).training, lambda name=name: self._check(name))
        self._stage("training questions", self._questions("real")[0], self._choose)
        self._stage("index", self.folder / "index" / "index.json", self._index)
        for name in self.options.variants:
            self._stage(f"train: {name}", self._pair(name) / FINISHED, lambda name=name: self._train(name))
            self._stage(f"answer: {name}", self._scores(name), lambda name=name: self._answer(name))
        self._report()

    def _check_same(self) -> None:
        """Raise InputError if the folder is of a study with other options."""
        path, free = self.folder / "study.json", ("variants", "folder")
        own = {name: value for name, value in vars(self.options).items() if name not in free}
        if not path.exists():
            return write_json(path, own)
        before = read_object(path, AGAIN)
        changed = [
            f"{name} (was {before.get(name)!r}, now {own[name]!r})" for name in own if before.get(name) != own[name]
        ]
        if changed:
            raise InputError(
                f"--folder: expected the study in {self.folder}, found other options: {', '.join(changed)}. {AGAIN}"
            )
        return None

    def _stage(self, name: str, output: Path, work: Callable[[], Mapping | None]) -> None:
        """Do the work unless its output is there, which it writes last; log its seconds."""
        if output.exists():
            return say(f"{name}: done before")
        say(f"{name} ...")
        wall, processor = perf_counter(), process_time()
        facts = dict(work() or {})
        spent = {"seconds": round(perf_counter() - wall, 1), "processor_seconds": round(process_time() - processor, 1)}
        if "questions" in facts:
            facts["questions_a_minute"] = round(60 * facts["questions"] / max(spent["seconds"], 0.1), 1)
        end_last_line(self.folder / "stages.jsonl")
        append_json_line(self.folder / "stages.jsonl", {"stage": name} | spent | facts)
        told = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in (spent | facts).items())
        return say(f"{name}: {told}")

    # ---- questions

    def _sample(self) -> dict:
        """The paragraphs to search, those to ask about, and the questions that all pairs are asked."""
        options = self.options
        read = {name: _with_passages(vars(options)[name]) for name in ("train", "dev")}
        (learnt, known), (asked, others) = read["train"], read["dev"]
        strange = set(others["id"][:])
        own = [row for row, key in enumerate(known["id"]) if key not in strange]
        chosen = take(known.select(own), options.paragraphs, options.seed)
        questions = take(asked, options.questions, options.seed)
        write_jsonl(self.texts, merge_passages([known, others]).to_list())
        write_jsonl(self.asked, chosen.to_list())
        write_jsonl(self.folder / "people.jsonl", _about(learnt, set(chosen["id"][:])))
        write_jsonl(self.dev, _about(questions, set(questions["passage_id"][:])))
        return {"paragraphs": len(chosen), "asked": len(questions)}

    @cached_property
    def _drafts(self) -> Drafted:
        options = self.options
        request = Request(generator=options.generator, way=options.prompt, reader=options.reader, how=self.how)
        rows = read_json_lines(self.asked)
        asked = passages_of({name: [row[name] for row in rows] for name in ("id", "title", "text")})
        return drafted(request, asked, self._parts)

    def _draft(self) -> dict:
        before = set(self._parts.glob("*.jsonl"))
        drafts = len(self._drafts.pairs)
        new = [row for path in set(self._parts.glob("*.jsonl")) - before for row in read_json_lines(path)]
        # Those of an earlier, stopped command took none of these seconds.
        facts = {"drafts": drafts, "questions": sum(bool(row["draft"]["question"]) for row in new)}
        write_json(self.folder / "drafts.json", facts)
        return facts

    def _check(self, name: str) -> dict:
        """The drafts as they are checked with the reader, or without."""
        drafts, rows = self._drafts, read_json_lines(self.texts)
        passages = passages_of({name: [row[name] for row in rows] for name in ("id", "title", "text")})
        how = replace(self.how, least_f1=self.how.least_f1 if name == MADE[0] else 0.0)
        made = check(drafts.pairs, drafts.asked, passages, how)
        read = drafts.reader if how.least_f1 else "nobody"
        facts = facts_of(made, writer=drafts.writer, reader=read, settings=vars(how))
        if len(made.kept) < 2:
            raise InputError(
                f"Expected made questions to train on, of {made.written} that were written {len(made.kept)} passed the "
                f"checks of {name!r}. Ask about more --paragraphs, or give another --generator."
            )
        write_results(made, self._places(name), facts)
        say("\n".join(lines_of(facts)))
        return {name: facts[name] for name in ("written", "kept")}

    def _choose(self) -> dict:
        """As many questions of each kind, for training and for validation; the real ones are of the same paragraphs."""
        found = {name: [read_json_lines(path) for path in self._made(name)] for name in MADE}
        split = {row["passage_id"] for row in found["made"][1]}
        people = read_json_lines(self.folder / "people.jsonl")
        found["real"] = [[row for row in people if (row["passage_id"] in split) == held] for held in (False, True)]
        counts = [min(len(kinds[side]) for kinds in found.values()) for side in (0, 1)]
        for name in ("unread", "made", "real"):  # the last file stands for all
            for side in (1, 0):
                rows = found[name][side]
                places = sorted(random.Random(self.options.seed).sample(range(len(rows)), counts[side]))
                write_jsonl(self._questions(name)[side], [rows[place] for place in places])
        return {"training": counts[0], "validation": counts[1]}

    # ---- pairs

    def _index(self) -> None:
        models, contexts = self._settings("untuned").models, self._settings("untuned").contexts
        words = [str(self.texts), "--output", str(self.folder / "index"), "--retriever", models.retriever]
        words += ["--passage_tokens", str(contexts.passage_tokens), "--index_precision", contexts.index_precision]
        with own_state():
            cli.run("index", words)

    def _settings(self, name: str) -> Settings:
        """The settings of the run of a variant. Raises InputError for a mistake in --base."""
        kind = name if name in ("real", "unread") else "made"
        files = dict(zip(("questions", "eval_questions"), self._questions(kind), strict=True))
        if files["eval_questions"].exists() and not files["eval_questions"].stat().st_size:
            del files["eval_questions"]  # too few: the run holds some out
        given = files | {"passages": self.texts, "index": self.folder / "index", "output_dir": self._pair(name)}
        words = [word for option, value in given.items() for word in (f"--{option}", str(value))]
        own = {"untuned": ["--rounds", "0"], "noise": ["--context_noise", str(self.options.context_noise)]}
        return parse_settings(
            ["--seed", str(self.options.seed), *shlex.split(self.options.base), *own.get(name, []), *words]
        )

    def _train(self, name: str) -> None:
        with own_state():
            run(self._settings(name))

    def _answer(self, name: str) -> dict:
        found = CozyRAG.from_pretrained(str(self._pair(name))).evaluate(str(self.dev))
        rows = [{metric: row[metric] for metric in ("id", *METRICS, "prediction", "verdict")} for row in found.rows]
        write_jsonl(self._scores(name), rows)
        return {"asked": len(rows)}

    def _report(self) -> None:
        rows = {name: read_json_lines(self._scores(name)) for name in VARIANTS if self._scores(name).exists()}
        scores = {name: scores_of(own, METRICS) for name, own in rows.items()}
        tests = paired_tests(rows, METRICS)
        certain = [
            test["metric"]
            for test in tests
            if (test["first"], test["second"]) == ("untuned", "real") and test["interval"][1] < 0
        ]
        gains = gain_lines(scores, certain)
        write_json(self.folder / "report.json", {"scores": scores, "tests": tests, "gains": gains})
        first = next(iter(rows))
        parts = [score_table(scores, METRICS), test_table(tests, first), *gains]
        say("\n" + "\n\n".join(part for part in parts if part))

    # ---- where things are

    @property
    def _parts(self) -> Path:
        return self.folder / "drafts"

    def _places(self, name: str) -> Places:
        return Places.of(self.folder / f"{name}.jsonl")

    def _made(self, name: str) -> tuple[Path, Path]:
        return self._places(name).training, self._places(name).validation

    def _questions(self, name: str) -> tuple[Path, Path]:
        """The files for training and for validation."""
        places = Places.of(self.folder / "questions" / f"{name}.jsonl")
        return places.training, places.validation

    def _pair(self, name: str) -> Path:
        return self.folder / "pairs" / name

    def _scores(self, name: str) -> Path:
        return self.folder / "scores" / f"{name}.jsonl"


def _with_passages(path: str) -> tuple[Dataset, Dataset]:
    """The questions of a file and their passages. Raises InputError if it has none."""
    read = read_questions(path)
    if read.passages is None:
        raise InputError(f"{path}: expected questions with their passage (column 'context'), found none. Give others.")
    return read.table, read.passages


def _about(table: Dataset, passages: set[str]) -> list[dict]:
    """The questions about these passages as rows of a file."""
    names = ("id", "question", "answers", "passage_id")
    return [{name: row[name] for name in names} for row in table.to_list() if row["passage_id"] in passages]


def gain_lines(scores: Mapping[str, Mapping], certain: Sequence[str]) -> list[str]:
    """How much of the gain of people's questions over no training each kind of made questions has, in EM and F1.

    certain: metrics of which that gain is more than noise; of another one, a share would say nothing.
    """
    if not {"untuned", "real"} <= set(scores):
        return []
    lines = []
    for metric in METRICS[:2]:
        base, best = (scores[name][metric]["mean"] for name in ("untuned", "real"))
        own = {name: scores[name][metric]["mean"] - base for name in VARIANTS if name not in ("untuned", "real")}
        told = [f"{name} {100 * gain / (best - base):.0f} %" for name, gain in own.items() if metric in certain]
        lines.append(
            f"{metric}: real questions gain {best - base:+.1f} points over untuned"
            + (f"; of that {', '.join(told)}." if told else ", no more than noise.")
        )
    return lines


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", required=True, metavar="FILE", help="questions with their passages, which are asked about")
    add("--dev", required=True, metavar="FILE", help="questions with other passages, which all pairs are asked")
    add("--folder", required=True, help="everything is kept here; give it again to resume")
    add("--paragraphs", type=at_least(2), default=2000, metavar="N", help="to ask about (default: 2000)")
    add("--questions", type=at_least(1), default=2000, metavar="N", help="of --dev to ask (default: 2000)")
    add("--generator", metavar="MODEL", help="who writes, as for `cozyrag questions --from` (default: smollm2)")
    add("--prompt", choices=WAYS, default="auto", help="how it is asked, as there")
    add("--reader", metavar="MODEL", help="who reads again, as there (default: the writer)")
    add("--pairs", type=at_least(1), default=3, metavar="N", help="drafts of a paragraph, at most (default: 3)")
    add("--batch_size", type=at_least(1), default=8, metavar="N", help="paragraphs drafted at once (default: 8)")
    add("--base", default="", help='settings of all pairs, as one text: "--generator smollm2 --rounds 1"')
    help = "share of the contexts without the passage, of the variant noise (default: 0.2)"
    add("--context_noise", type=share, default=0.2, metavar="SHARE", help=help)
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="pairs to train (default: all)")
    add("--seed", type=at_least(0), default=42, metavar="N", help="of every random choice (default: 42)")
    return parser.parse_args(arguments)


def main() -> None:
    """The command line."""
    options = parse()

    def study() -> None:
        with held(Path(options.folder) / LOCK, f"--folder: another process is writing {options.folder}"):
            Study(options).run()

    cli.entry_point(study)


if __name__ == "__main__":
    main()
