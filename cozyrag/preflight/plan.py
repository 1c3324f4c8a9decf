"""The plan of a run: seconds, memory and disk of each part, before anything is trained, and what would make it shorter.

Measured costs (probe.py) are multiplied by how often a run needs them. Left out: loading, the self-test, trackers and
uploads; the second search after a rollback; and that a trained generator ends its answers earlier.
"""

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator

from cozyrag.config import Settings
from cozyrag.data.corpus import Corpus
from cozyrag.models.fsdp import held_bytes, is_split
from cozyrag.models.generator import Generator
from cozyrag.models.reranker import Reranker
from cozyrag.models.retriever import Retriever
from cozyrag.preflight.probe import Costs, Probe
from cozyrag.retrieval.contexts import SEARCH_DEPTH
from cozyrag.runtime.atomic_files import folder_bytes
from cozyrag.training.generator_phase import generator_steps
from cozyrag.training.index_refresh import RefreshPolicy
from cozyrag.training.reranker_phase import reranker_steps
from cozyrag.training.retriever_phase import retriever_steps
from cozyrag.training.run_retrieval import fusion_questions
from cozyrag.training.trainer import trainable

FLOAT = 4  # bytes
HIT = 72  # bytes of a row number and its score in Python lists
# Resident bytes of a phase on a CPU over those in use: the C allocator keeps and splits what each step frees. Two real
# runs had 1.14 (SmolLM2) and 0.92 (the small generator, whose retriever phase is estimated by its upper limit).
RESIDENT = 1.17
SHARE_OF_PEAK = 0.7  # training reaches this share of the rate of matrix products on a CPU
KEPT_IN_MEMORY = ("index", "retrieve")  # parts whose memory stays in use
SHORTER = {  # settings that make a part shorter
    "index": "--passage_tokens, --freeze_document_encoder, --rounds, or fewer --passages",
    "fit fusion weights": "--retrieval dense, --rounds",
    "retrieve": "--max_questions, --retrieval dense, --rerank_passages, --rounds",
    "generator phase": "--generator_steps, --max_questions, --context_tokens, --rounds",
    "feedback": "--feedback_passages, --max_questions, --context_tokens, --rounds",
    "fit reranker weight": "--rerank_passages, --rounds",
    "reranker phase": "--reranker_steps, --max_questions, --rounds",
    "retriever phase": "--retriever_steps, --max_questions, --passage_tokens, --hard_negatives, --rounds",
    "evaluation": "--max_eval_questions, --answer_tokens, --rollback off, --rounds",
    "save": "--save_steps, --save_minutes, --rounds",
}


@dataclass(frozen=True)
class PhaseSize:
    """A training phase of a round: steps, rows of all steps, usable questions, and bytes of trained weights."""

    steps: int
    rows: int
    usable: int
    trained: int


@dataclass(frozen=True)
class Sizes:
    """Rows of the tables, the phases, and bytes of the saved pair.

    answered: questions with an answer. fitted: questions for fitting the weights of the search. reranker: None without
    one. reranks_first: whether the reranker has been trained before the run.
    """

    questions: int
    answered: int
    fitted: int
    eval_questions: int
    passages: int
    pair: int
    generator: PhaseSize
    retriever: PhaseSize
    processes: int = 1
    device: str = "cpu"
    reranker: PhaseSize | None = None
    reranks_first: bool = False


@dataclass(frozen=True)
class Part:
    """A part of the run: seconds before training and in each round, bytes of memory and disk."""

    name: str
    work: str
    seconds: tuple[float, ...]
    memory: int = 0
    disk: int = 0


@dataclass(frozen=True)
class Plan:
    """The prediction for a whole run."""

    parts: tuple[Part, ...]
    sizes: Sizes
    costs: Costs

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return sum(sum(part.seconds) for part in self.parts)

    @property
    def memory(self) -> int:
        """Peak bytes of one process: index, contexts and the largest other part; on a CPU at least the probe's peak."""
        lasting, passing = (
            [p.memory for p in self.parts if (p.name in KEPT_IN_MEMORY) is kind] for kind in (True, False)
        )
        most = self.costs.before + sum(lasting) + max(passing)
        return max(most, self.costs.peak) if self.sizes.device == "cpu" else most

    @property
    def disk(self) -> int:
        """Most bytes of the output folder."""
        return sum(part.disk for part in self.parts)


def make_plan(
    accelerator: Accelerator,
    settings: Settings,
    corpus: Corpus,
    generator: Generator,
    retriever: Retriever,
    reranker: Reranker | None = None,
) -> Plan:
    """Probe and predict. The models are left as they were; only temporary files are written."""
    training, questions, rounds = settings.training, corpus.questions, bool(settings.training.rounds)
    costs = Probe(accelerator, settings, corpus, generator, retriever, reranker).measure()
    fusion, answered = fusion_questions(questions, settings)["passage_id"], sum(map(bool, questions["answers"]))
    usable = len(questions) if training.no_answer else answered
    pairs = round(costs.usable * (len(questions) - len(fusion)))
    phases = [
        PhaseSize(len(steps), sum(map(len, steps)), count, held_bytes(trainable(each.model)))
        for steps, count, each in (
            (generator_steps([1] * usable * rounds, training, 1), usable, generator),
            (retriever_steps([1] * pairs * rounds, training, 1), pairs, retriever),
            (reranker_steps([1] * pairs * rounds, training, 1), pairs, reranker),
        )
        if each is not None
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, tokenizer in ("generator", generator.tokenizer), ("retriever", retriever.model.tokenizer):
            tokenizer.save_pretrained(str(Path(folder) / name))
        pair = folder_bytes(Path(folder)) + phases[0].trained + held_bytes(retriever.model.parameters())
        pair += held_bytes(reranker.model.parameters()) if reranker is not None else 0
    sizes = Sizes(
        len(questions), answered, sum(name is not None for name in fusion), len(corpus.eval_questions),
        len(corpus.passages), pair, phases[0], phases[1], accelerator.num_processes, accelerator.device.type,
        *((phases[2], reranker.is_trained) if reranker is not None else ()),
    )  # fmt: skip
    return Plan(tuple(predict(settings, sizes, costs)), sizes, costs)


def predict(settings: Settings, sizes: Sizes, costs: Costs) -> list[Part]:
    """The parts of a run in their order. A refresh of the index within a phase counts as index and retrieval."""
    training, seconds, rounds, questions = settings.training, costs.seconds, settings.training.rounds, sizes.questions
    trains, moves, rollback = sizes.generator.steps > 0, sizes.retriever.steps > 0, training.rollback == "on"
    policy = RefreshPolicy(training.index_refresh, training.refresh_steps, training.refresh_overlap)
    total = sizes.retriever.steps
    refreshed = sum(policy.due(done=done, total=total, overlap=lambda: -1.0) for done in range(total))
    made = (1 + refreshed) * moves  # indexes of a round
    written = trains + moves if rollback else int(trains or moves)  # evaluations of a round with new prompts or weights
    tables = 2 if training.no_answer else 1  # the threshold needs contexts without the answer, too
    asked = questions * (1 + refreshed) + sizes.eval_questions * (1 + (tables - 1) * (1 + (rollback and trains)))
    batches = math.ceil(sizes.eval_questions / (settings.contexts.answer_batch_size * sizes.processes))
    index, words = seconds("index", 1, sizes.passages), seconds("words", 1, sizes.passages)
    fit, answers = seconds("fit", 1, sizes.fitted), tables * seconds("evaluation", batches, sizes.eval_questions)
    table, scores = questions * costs.row, questions * training.feedback_passages * FLOAT
    found, shards = (
        questions * min(SEARCH_DEPTH, sizes.passages) * HIT,
        sizes.processes if is_split(training.generator_sharding) else 1,
    )

    def part(name: str, work: str, before: float, each: float, memory: float = 0, disk: float = 0) -> Part:
        return Part(name, work, (before, *[each] * rounds), round(memory), round(disk))

    def phase(name: str, phase: PhaseSize, what: str, shards: int = 1) -> Part:
        memory = _phase_bytes(name, phase, sizes, costs, shards)
        work = f"{phase.steps} steps a round, {phase.usable} {what}"
        return part(f"{name} phase", work, 0, seconds(name, phase.steps, phase.rows), memory)

    again, held, stored = (
        index * made * (not training.freeze_document_encoder),
        sizes.passages * costs.held,
        sizes.passages * costs.stored,
    )
    parts = [
        part("index", f"{sizes.passages} passages", index + words, again, held, stored),
        part("fit fusion weights", f"{sizes.fitted} questions", fit, fit * made),
        part("retrieve", f"{asked} questions a round", seconds("retrieve", 1, tables * sizes.eval_questions),
             seconds("retrieve", 1, asked), table + found, table * rounds * (1 + refreshed)),
        phase("generator", sizes.generator, "questions", shards),
        part("feedback", f"{sizes.answered * training.feedback_passages} passages scored", 0,
             seconds("feedback", 1, sizes.answered), scores, scores * rounds),
        phase("retriever", sizes.retriever, f"pairs{'' if costs.usable in (0, 1) else ', about'}"),
        part("evaluation", f"{sizes.eval_questions} questions, {written} times a round", answers, answers * written,
             costs.answers),
        _save(settings, sizes, costs),
    ]  # fmt: skip
    absent = {"fit fusion weights": not sizes.fitted, "feedback": not (training.feedback_weight and moves)}
    return _with_reranker([each for each in parts if not absent.get(each.name)], settings, sizes, costs)


def _phase_bytes(name: str, phase: PhaseSize, sizes: Sizes, costs: Costs, shards: int = 1) -> float:
    """Memory of a training phase: gradients, AdamW's moments and activations."""
    used = 3 * phase.trained / shards + costs.activations.get(name, 0) if phase.steps else 0
    return used * (RESIDENT if sizes.device == "cpu" else 1)


def _with_reranker(parts: list[Part], settings: Settings, sizes: Sizes, costs: Costs) -> list[Part]:
    """The parts of a run with what its reranker adds, if it has one: time of retrieving, two parts of its own."""
    own = sizes.reranker
    if own is None:
        return parts

    def reading(questions: int) -> float:
        return costs.seconds("rerank", 1, questions) if questions else 0.0

    asked, to_fit = _reranked(settings, sizes)
    found, fitted = ([reading(count) for count in counts] for counts in (asked, to_fit))
    spent = costs.seconds("reranker", own.steps, own.rows)
    times = (0.0, *[spent] * settings.training.rounds)
    work = f"{own.steps} steps a round, about {own.usable} questions"
    more = [Part("reranker phase", work, times, round(_phase_bytes("reranker", own, sizes, costs)))]
    more += [Part("fit reranker weight", f"{sizes.fitted} questions", tuple(fitted))] if any(to_fit) else []
    at = [part.name for part in parts].index("retriever phase")
    parts = [*parts[:at], *more, *parts[at:]]
    return [
        replace(part, seconds=tuple(map(sum, zip(part.seconds, found, strict=True))))
        if part.name == "retrieve"
        else part
        for part in parts
    ]


def _reranked(settings: Settings, sizes: Sizes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many questions the reranker reads before the rounds and in each: while retrieving, and to fit its weight.

    It reads the training questions of a round that it begins trained, and the validation questions after its phase
    and at the evaluation, unless nothing has changed in between.
    """
    rounds, training = range(settings.training.rounds), settings.training
    trains, moves, first = bool(sizes.reranker and sizes.reranker.steps), sizes.retriever.steps > 0, sizes.reranks_first
    checked = trains and training.rollback == "on"
    evaluated, fitted = checked + (moves or not checked), checked + (moves or (trains and not checked))
    found = [
        sizes.questions * (first or (trains and number > 0)) + sizes.eval_questions * evaluated * (first or trains)
        for number in rounds
    ]
    return (sizes.eval_questions * first, *found), (sizes.fitted * first, *(sizes.fitted * fitted for _ in rounds))


def _save(settings: Settings, sizes: Sizes, costs: Costs) -> Part:
    """The pair after each evaluation, a checkpoint after each part of a round, and those inside the phases.

    The disk holds the checkpoints that are kept and the one being written, or a new pair beside the old one.
    """
    output, rounds, pair, index = settings.output, settings.training.rounds, sizes.pair, sizes.passages * costs.stored
    states = []  # of both phases: checkpoints inside, and bytes of AdamW states in each
    phases = {"generator": sizes.generator, "retriever": sizes.retriever, "reranker": sizes.reranker}
    for name, phase in ((name, phase) for name, phase in phases.items() if phase is not None):
        minutes = costs.seconds(name, phase.steps, phase.rows) / 60
        by_steps = max(0, phase.steps - 1) // output.save_steps if output.save_steps else 0
        states.append((max(by_steps, int(minutes / (output.save_minutes or math.inf))), 2 * phase.trained))
    parts = 3 + (sizes.reranker is not None)  # of a round
    written = (1 + parts) * pair + index + sum(count * (pair + state) for count, state in states)
    total = 1 + rounds * (parts + sum(count for count, _ in states))
    kept, most = min(output.save_total_limit, total), min(output.save_total_limit + 1, total)
    with_states = max(min(most, count) * state for count, state in states) if rounds else 0
    seconds = tuple(costs.seconds("write", 1, size) for size in (2 * pair + index, *[written] * rounds))
    disk = pair + max(most * pair + with_states, (kept + 1) * pair + index)
    return Part("save", f"{total} checkpoints, {kept} kept", seconds, disk=round(disk))


def rough_generator_seconds(weights: int, *, trained: int, asked: int, tokens: int, rate: float) -> float:
    """Seconds of training the generator and answering, estimated from the rate of matrix products alone.

    Args:
        weights: those that multiply every token, so without the embeddings. trained, asked: examples of training, and
            questions to answer. tokens: of each. rate: of matrix products, in GFLOP/s.
    """
    passes = 3 * trained + asked  # forward and backward; forward
    return 2 * weights * tokens * passes / (SHARE_OF_PEAK * rate * 1e9)


def format_time(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def format_bytes(count: float) -> str:
    """MB or GB, in powers of ten."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def plan_table(plan: Plan) -> str:
    """The parts as columns. All rounds take the same time."""
    rounds = len(plan.parts[0].seconds) - 1
    totals = tuple(map(sum, zip(*(part.seconds for part in plan.parts), strict=True)))
    whole = Part("whole run", "memory: peak, with models and libraries", totals, plan.memory, plan.disk)
    lines = [("part", "before", *["each round"][:rounds], "whole run", "memory", "disk", "work")]
    for part in (*plan.parts, whole):
        times = map(format_time, (*part.seconds[:2], sum(part.seconds)))
        lines.append((part.name, *times, format_bytes(part.memory), format_bytes(part.disk), part.work))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ((cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def verdict(plan: Plan) -> str:
    """What dominates the time, and what would make the run shorter."""
    first = max(plan.parts, key=lambda part: sum(part.seconds))
    share = sum(first.seconds) / max(plan.seconds, 1e-9)
    where = "for each process" if plan.sizes.device == "cpu" else "on the GPU or beside it"
    sentence = (
        f"About {format_time(plan.seconds)}, {format_bytes(plan.memory)} of memory {where} and "
        f"{format_bytes(plan.disk)} on disk. "
        f"Most of the time, {share:.0%}, goes into {first.name!r}; shorter with {SHORTER[first.name]}."
    )
    if len(first.seconds) > 2:
        sentence += f" One round less saves {format_time(sum(part.seconds[-1] for part in plan.parts))}."
    return sentence
