"""What the two phases of training cost: steps of the plan, on stand-ins for the questions that the probe has not searched for.

Steps are those of the run itself (generator_phase.py, retriever_phase.py): small parts of them first, larger ones as far as
they fit into the time. Left out: everything that is not training (probe.py), instruments (gauges.py).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from cozyrag.config import Settings
from cozyrag.data.corpus import Corpus
from cozyrag.models.fsdp import held_bytes
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.preflight.cost_model import Line, Phase, bite, fit, peak_at, spread
from cozyrag.preflight.gauges import Growth, Stopwatch, timed
from cozyrag.retrieval.passage_index import Passages
from cozyrag.training.generator_phase import (
    generator_cut,
    generator_examples,
    generator_gradients,
    generator_steps,
    tear_down,
)
from cozyrag.training.micro_batches import Cut, micro_batches, padded
from cozyrag.training.retriever_phase import retriever_cut, retriever_step, retriever_steps, retriever_usable
from cozyrag.training.run_retrieval import fusion_questions
from cozyrag.training.trainer import Phase as TrainingPhase
from cozyrag.training.trainer import PhaseCallback, first_cut, run_phase, trainable
from cozyrag.training.training_pairs import RetrieverBatch, retriever_batch, training_pairs

BUDGET = 18.0  # seconds of all parts together; beginnings and what is begun when they end come on top
SHARES = {"index": 4, "retrieve": 4, "generator": 6, "feedback": 2, "retriever": 5, "answer": 3}
COUNTED = 1000  # planned steps whose size is looked at, evenly spread


class Subject:
    """A run that is to be measured: what it works with, and the seconds that each of its parts may take of the probe."""

    def __init__(
        self, accelerator: Accelerator, settings: Settings, corpus: Corpus, generator: Generator, retriever: Retriever
    ):
        self.accelerator, self.settings, self.corpus = accelerator, settings, corpus
        self.generator, self.retriever = generator, retriever
        self.growth = Growth(accelerator.device)
        training = settings.training
        self.passages = Passages.of(corpus.passages)
        self.row_of = {name: row for row, name in enumerate(self.passages.ids)}
        self.feeds = bool(training.feedback_weight and training.rounds and training.retriever_steps != 0)
        wanted = {"feedback": self.feeds, "generator": training.rounds, "retriever": training.rounds}
        shares = {name: share for name, share in SHARES.items() if wanted.get(name, True)}
        self.share = {name: BUDGET * share / sum(shares.values()) for name, share in shares.items()}
        self.questions = corpus.questions[:]
        self.gold = [self.row_of.get(name, -1) for name in self.questions["passage_id"]]
        texts = self.passages.select(self.some(64))
        counts = [len(ids) for ids in self.retriever.model.tokenizer(texts, verbose=False)["input_ids"]]
        self.tokens_per_character = sum(counts) / max(1, sum(map(len, texts)))

    def some(self, count: int) -> list[int]:
        """Rows of passages, evenly spread."""
        total = len(self.passages.ids)
        return sorted({round(row) for row in np.linspace(0, total - 1, min(count, total))})

    def tokens(self, text: str) -> float:
        """About how many tokens the retriever reads of a text."""
        return min(len(text) * self.tokens_per_character + 2, self.retriever.model.max_seq_length or math.inf)


def stand_ins(subject: Subject, columns: dict[str, list]) -> tuple[dict[str, list], list[int]]:
    """The contexts table of all training questions, as far as the probe knows it, and for each the row of the sample that
    stands in for it: itself, else one with a gold passage and an answer where it has them."""
    place = {name: row for row, name in enumerate(columns["id"])}
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for row, answers in enumerate(columns["answers"]):
        kinds.setdefault((columns["gold_row"][row] >= 0, bool(answers)), []).append(row)
    everyone, places = list(range(len(place))), []
    for number, name in enumerate(subject.questions["id"]):
        kind = kinds.get((subject.gold[number] >= 0, bool(subject.questions["answers"][number])), everyone)
        places.append(place.get(name, kind[number % len(kind)]))
    asked = {name: [columns[name][row] for row in places] for name in ("negatives", "rows", "context", "noised")}
    asked |= {name: subject.questions[name] for name in ("id", "question", "answers")}
    asked["positive"] = [
        gold if gold >= 0 else columns["positive"][row] for gold, row in zip(subject.gold, places, strict=True)
    ]
    return asked, places


def generator_cost(subject: Subject, asked: dict[str, list], places: list[int]) -> Phase:
    """Steps of examples; each question's is its stand-in's, so that only the sample is tokenized."""
    training = subject.settings.training
    teaches = [bool(answers) or training.no_answer for answers in asked["answers"]]
    own = {}  # of the sample: the last question that each row stands in for shows what it holds
    for number, row in enumerate(places):
        if teaches[number]:
            own.setdefault(row, number)
    numbers = list(own.values())
    examples = generator_examples(
        subject.generator,
        {name: [asked[name][number] for number in numbers] for name in ("question", "answers", "context", "noised")},
        settings=training,
        context_tokens=subject.settings.contexts.context_tokens,
    )
    example_of = dict(zip(own, range(len(own)), strict=True))
    usable = [example_of[row] for number, row in enumerate(places) if teaches[number]]
    steps = generator_steps([len(examples[at].input_ids) for at in usable], training, 1) if training.rounds else []
    steps = [[usable[row] for row in step] for step in steps]
    if not steps:
        return Phase(0, 0, 0, Line(0, 0), len(usable), 0)
    context_tokens = subject.settings.contexts.context_tokens
    choose = partial(generator_cut, subject.accelerator, subject.generator, training, context_tokens)
    cut = first_cut(training, PhaseCallback(), choose)
    module, take_rows = generator_gradients(subject.accelerator, subject.generator, examples, training)

    def groups(rows: Sequence[int]) -> list[float]:
        lengths = [len(examples[row].input_ids) for row in rows]
        made = micro_batches(lengths, cut, processes=subject.accelerator.num_processes)
        return [padded(lengths, group) for group in made]

    steps = _Steps("generator", steps, lambda rows: sum(groups(rows)), lambda rows: max(groups(rows)))
    phase = _phase(subject, steps, trainable(module), take_rows, cut, training.generator_learning_rate)
    tear_down(subject.accelerator, subject.generator, module)
    return replace(phase, rows=len(usable))


def retriever_cost(subject: Subject, asked: dict[str, list], places: list[int]) -> Phase:
    """Steps of pairs: the questions with their own gold passages, and the negatives of their stand-ins."""
    training = subject.settings.training
    likelihoods = None
    if subject.feeds:
        judged = min([training.feedback_passages, *map(len, asked["rows"])])
        likelihoods = np.zeros((len(places), judged), dtype=np.float32)
        likelihoods[[not answers for answers in asked["answers"]]] = np.nan
    left_out = fusion_questions(subject.corpus.questions, subject.settings)["id"][:]
    usable = retriever_usable(asked, training, likelihoods, left_out)
    at = [asked["positive"][row] if asked["positive"][row] >= 0 else asked["rows"][row][0] for row in usable]
    lengths = [len(text) for text in subject.passages.select(at)]
    steps = retriever_steps(lengths, training, 1) if training.rounds else []
    if not steps:
        return Phase(0, 0, 0, Line(0, 0), len(usable), 0)

    def batch(rows: Sequence[int]) -> RetrieverBatch:
        return retriever_batch(training_pairs(asked, rows, likelihoods), subject.passages, training)

    def units(rows: Sequence[int]) -> float:
        step = batch(rows)
        return sum(map(subject.tokens, [*step.questions, *step.passages]))

    cut = first_cut(training, PhaseCallback(), partial(retriever_cut, subject.accelerator, subject.retriever))

    def take_rows(rows: Sequence[int], cut: Cut) -> dict[str, float]:
        return retriever_step(subject.accelerator, subject.retriever, batch(rows), cut=cut)

    def held(rows: Sequence[int]) -> float:
        """Tokens at the peak: those of its largest micro-batch, by the same estimate."""
        mine = units(rows) / subject.accelerator.num_processes
        return mine / cut.micro_batches if cut.tokens is None else min(mine, cut.tokens)

    subject.retriever.model.eval()
    steps = _Steps("retriever", [[usable[row] for row in step] for step in steps], units, held)
    parameters = trainable(subject.retriever.model)
    phase = _phase(subject, steps, parameters, take_rows, cut, training.retriever_learning_rate)
    return replace(phase, rows=len(usable))


@dataclass(frozen=True)
class _Steps:
    """The steps of a phase as rows, the units that decide how long one takes, and those that decide how much memory."""

    phase: str
    rows: list[list[int]]
    units: Callable[[Sequence[int]], float]
    held: Callable[[Sequence[int]], float]


def _phase(
    subject: Subject,
    planned: _Steps,
    parameters: list[torch.nn.Parameter],
    take_rows: Callable[[Sequence[int], Cut], dict[str, float]],
    cut: Cut,
    rate: float,
) -> Phase:
    """Time steps of the plan, small parts of steps first, then whole ones if they fit; the longest is one of them."""
    name, steps, units = planned.phase, planned.rows, planned.units
    looked = [
        steps[place] for place in sorted({round(at) for at in np.linspace(0, len(steps) - 1, min(COUNTED, len(steps)))})
    ]
    looked.sort(key=lambda rows: -units(rows))
    sizes = [units(rows) for rows in looked]
    ends = time.perf_counter() + subject.share[name]
    most_held = max(map(planned.held, looked))
    subject.growth.bytes(reset=True)

    def take(tried: list[list[int]]) -> tuple[list[tuple[float, float]], float]:
        watch = Stopwatch([(len(rows), units(rows)) for rows in tried], ends)
        phase, training = TrainingPhase(name, parameters, tried, rate, take_rows), subject.settings.training
        run_phase(subject.accelerator, phase, cut, settings=training, round_number=1, callback=watch, quiet=True)
        return watch.measured, timed(subject.accelerator.free_memory)[0]

    whole, few = max(map(len, looked)), min(len(looked[0]), max(4, subject.accelerator.num_processes))
    middle = looked[len(looked) // 2][:few]
    small, held = take([middle, middle])[0], subject.growth.bytes(reset=True)
    most = broadcast_object_list([bite(whole, few, small[-1][1], max(1.0, ends - time.perf_counter()))])[0]
    tried = [
        looked[place][: most if turn % 3 or most == whole else max(1, most // 2)]
        for turn, place in enumerate(_again(len(looked)))
    ]
    if most < whole:
        tried.insert(0, looked[0][:most])
    measured, ending = take([tried[0], *tried])
    measured = measured[1:] or measured  # the first step sets memory up
    large = max(map(planned.held, tried[: max(1, len(measured))]))
    peak = peak_at(most_held, (planned.held(middle), held), (large, subject.growth.bytes(reset=False)))
    states = 3 * held_bytes(parameters)
    return Phase(len(steps), float(np.mean(sizes)), sizes[0], fit(measured), 0, max(0, peak - states), ending)


def _again(count: int) -> list[int]:
    """Places as `spread` gives them, over and over: a table may have fewer steps than the probe has time for."""
    order = list(spread(count))[:200]
    return (order * (200 // len(order) + 1))[:200]
