"""What a run will take before it is begun: seconds, memory and disk of each part, and which settings would make it shorter.

It counts how often every part comes up in a round, as rounds.py walks through it, and multiplies by what the probe
measured. Left out: measuring (probe.py, phase_probe.py), loading, the self-test, trackers and uploads; what the gate takes back, which
brings another search or two; and that answers get shorter, and batches of them faster, when a generator has learnt to end.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from cozyrag.config import Settings
from cozyrag.data.corpus import Corpus
from cozyrag.models.fsdp import is_split
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.preflight.cost_model import Costs, Phase
from cozyrag.preflight.gauges import memory_now
from cozyrag.preflight.probe import Probe
from cozyrag.retrieval.contexts import SEARCH_DEPTH
from cozyrag.training.run_retrieval import fusion_limit

NUMBER = 4  # bytes of a weight, of a gradient and of each of AdamW's two states
PYTHON = 72  # bytes of a row number and its score, once they stand in Python lists
SHARE_OF_PEAK = 0.7  # of the rate of products of matrices that training reaches on a CPU
SHORTER = {  # settings that make a part shorter
    "index": "--passage_tokens, --query_side_only, --rounds, or fewer --passages",
    "fit fusion weights": "--retrieval dense, --rounds",
    "retrieve": "--max_questions, --retrieval dense, --rounds",
    "generator phase": "--generator_steps, --max_questions, --context_tokens, --rounds",
    "feedback": "--feedback_passages, --max_questions, --context_tokens, --rounds",
    "retriever phase": "--retriever_steps, --max_questions, --passage_tokens, --hard_negatives, --rounds",
    "evaluation": "--max_eval_questions, --answer_tokens, --rollback off, --rounds",
    "save": "--save_steps, --save_minutes, --rounds",
}


@dataclass(frozen=True)
class Sizes:
    """What is given before the probe. Rows of the tables; weights in bytes, all of them and those that are trained.

    answered: training questions with an answer; known: those with a gold passage. text: bytes of the passages. tokenizer: bytes
    of both tokenizers' files. held: bytes of the process with models and tables loaded.
    """

    questions: int
    answered: int
    known: int
    eval_questions: int
    passages: int
    text: int
    dimensions: int
    generator: int
    retriever: int
    generator_trained: int
    retriever_trained: int
    tokenizer: int
    held: int
    processes: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Part:
    """A part of the run: seconds of each round from round 0 (the examination before the first), bytes of memory and disk.

    lasting: whether the memory stays taken until the end of the run; else only while the part lasts.
    """

    name: str
    work: str
    seconds: tuple[float, ...]
    memory: int = 0
    disk: int = 0
    lasting: bool = False


@dataclass(frozen=True)
class Plan:
    """The prediction for a whole run."""

    parts: tuple[Part, ...]
    sizes: Sizes
    costs: Costs

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(sum(part.seconds) for part in self.parts)

    @property
    def memory(self) -> int:
        """Most bytes one process will hold: what stays, and the part that needs most on top of it; on a CPU no less than
        what the probe held, which did the same on a small scale."""
        stays = self.sizes.held + sum(part.memory for part in self.parts if part.lasting)
        most = stays + max(part.memory for part in self.parts if not part.lasting)
        return max(most, self.costs.peak) if self.sizes.device == "cpu" else most

    @property
    def disk(self) -> int:
        """Most bytes the output folder will hold."""
        return sum(part.disk for part in self.parts)


def make_plan(
    accelerator: Accelerator, settings: Settings, corpus: Corpus, generator: Generator, retriever: Retriever
) -> Plan:
    """Probe and predict; models are left as they were and nothing is written but temporary files."""
    sizes = measure_sizes(accelerator, corpus, generator, retriever)
    costs = Probe(accelerator, settings, corpus, generator, retriever).measure()
    return Plan(tuple(predict(settings, sizes, costs)), sizes, costs)


def measure_sizes(accelerator: Accelerator, corpus: Corpus, generator: Generator, retriever: Retriever) -> Sizes:
    """Sizes of what is loaded."""
    asked, texts = corpus.questions.select_columns(["answers", "passage_id"])[:], corpus.passages[:]["text"]
    with tempfile.TemporaryDirectory() as folder:
        generator.tokenizer.save_pretrained(folder)
        retriever.model.tokenizer.save_pretrained(str(Path(folder) / "retriever"))
        tokenizer = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    weights = [[p for p in model.parameters()] for model in (generator.model, retriever.model)]
    whole = [sum(p.numel() * p.element_size() for p in each) for each in weights]
    trained = [sum(p.numel() * p.element_size() for p in each if p.requires_grad) for each in weights]
    return Sizes(
        questions=len(corpus.questions),
        answered=sum(map(bool, asked["answers"])),
        known=sum(name is not None for name in asked["passage_id"]),
        eval_questions=len(corpus.eval_questions),
        passages=len(texts),
        text=sum(len(text.encode()) for text in texts),
        dimensions=retriever.model.get_embedding_dimension(),
        generator=whole[0],
        retriever=whole[1],
        generator_trained=trained[0],
        retriever_trained=trained[1],
        tokenizer=tokenizer,
        held=memory_now(),
        processes=accelerator.num_processes,
        device=accelerator.device.type,
    )


# ---- how often a part comes up, and what it takes


def refreshes(settings: Settings, steps: int) -> int:
    """How often the index is made anew within a retriever phase; with "drift", at most."""
    training = settings.training
    return 0 if training.index_refresh == "phase" else max(0, steps - 1) // training.refresh_steps


def predict(settings: Settings, sizes: Sizes, costs: Costs) -> list[Part]:
    """The parts of a run in their order. What a refresh of the index within a phase takes is counted as index and search."""
    training, rounds = settings.training, settings.training.rounds
    moves = costs.retriever.steps > 0  # the retriever changes, so its searches do
    again = refreshes(settings, costs.retriever.steps)
    made = 1 + again if moves else 0  # searches made anew in a round
    indexed = 0 if training.freeze_document_encoder else made
    looks = 2 if training.rollback == "on" and costs.generator.steps else 1  # examinations of a round
    parts = [_index(settings, sizes, costs, indexed)]
    if costs.weigh:
        known = min(sizes.known, fusion_limit(sizes.questions, settings))
        weighed = costs.weigh * known
        parts.append(Part("fit fusion weights", f"{known} questions", (weighed, *[weighed * made] * rounds)))
    parts += [_retrieve(settings, sizes, costs, again, looks), _generator_phase(settings, sizes, costs)]
    if training.feedback_weight and moves:
        asked = math.ceil(sizes.answered / sizes.processes)
        work = f"{sizes.answered * training.feedback_passages} passages judged"
        kept = sizes.questions * training.feedback_passages * NUMBER
        parts.append(Part("feedback", work, (0.0, *[costs.feedback * asked] * rounds), kept, kept * rounds))
    trains = costs.generator.steps > 0
    written = (
        trains + moves if training.rollback == "on" else int(trains or moves)
    )  # answers of the same weights and contexts are kept
    parts += [_retriever_phase(settings, sizes, costs), _evaluate(settings, sizes, costs, written)]
    return [*parts, _save(settings, sizes, costs)]


def _index(settings: Settings, sizes: Sizes, costs: Costs, made: int) -> Part:
    encoded = costs.encode.seconds(costs.batches, costs.tokens)
    words = costs.lexical if settings.contexts.retrieval != "dense" else 0.0
    kept = settings.contexts.keep_sentence_vectors
    vectors, sentences = _vectors(sizes), _sentences(sizes, costs) if kept else 0
    return Part(
        "index", f"{sizes.passages} passages", (encoded + words, *[encoded * made] * settings.training.rounds),
        memory=round(2 * vectors + sentences + costs.lexical_bytes), disk=2 * vectors + sentences + sizes.text, lasting=True,
    )  # fmt: skip


def _vectors(sizes: Sizes) -> int:
    return sizes.passages * sizes.dimensions * NUMBER


def _sentences(sizes: Sizes, costs: Costs) -> int:
    """Bytes of the sentence vectors, in half precision, and of where they end."""
    return round(costs.sentences) * sizes.dimensions * NUMBER // 2 + sizes.passages * 8


def _retrieve(settings: Settings, sizes: Sizes, costs: Costs, again: int, looks: int) -> Part:
    """Questions of the first round meet most passages for the first time, which costs once more."""
    training = settings.training
    answerless = int(training.no_answer)  # each examination that chooses a threshold searches once more
    before = sizes.eval_questions * (1 + answerless)
    each = sizes.questions * (1 + again) + sizes.eval_questions * (1 + answerless * looks)
    asked = [before, *[each] * training.rounds]
    mine = [math.ceil(count / sizes.processes) for count in asked]
    reached, seconds = 0.0, []
    for so_far, count in zip((sum(mine[: number + 1]) for number in range(len(mine))), mine, strict=True):
        now = sizes.passages * (1 - math.exp(-costs.reach * so_far / sizes.passages))
        seconds.append(costs.search * count + costs.first * (now - reached))
        reached = now
    table = sizes.questions * costs.row_bytes
    found = min(SEARCH_DEPTH, sizes.passages) * PYTHON * sizes.questions
    return Part(
        "retrieve", f"{each if training.rounds else before} questions a round", tuple(seconds),
        memory=round(table + found), disk=round(table * training.rounds * (1 + again)), lasting=True,
    )  # fmt: skip


def _trained(phase: Phase, trained: int) -> int:
    """Bytes of gradients, of AdamW's two states and of activations."""
    return 3 * trained + phase.activations if phase.steps else 0


def _generator_phase(settings: Settings, sizes: Sizes, costs: Costs) -> Part:
    phase, rounds = costs.generator, settings.training.rounds
    work = f"{phase.steps} steps a round, {phase.rows} questions"
    shared = sizes.processes if is_split(settings.training.generator_sharding) else 1
    trained = sizes.generator_trained // shared
    return Part("generator phase", work, (0.0, *[phase.seconds] * rounds), _trained(phase, trained))


def _retriever_phase(settings: Settings, sizes: Sizes, costs: Costs) -> Part:
    phase, rounds = costs.retriever, settings.training.rounds
    work = f"{'' if costs.exact else 'about '}{phase.steps} steps a round, {phase.rows} pairs"
    return Part("retriever phase", work, (0.0, *[phase.seconds] * rounds), _trained(phase, sizes.retriever_trained))


def _evaluate(settings: Settings, sizes: Sizes, costs: Costs, written: int) -> Part:
    """`written`: how often a round writes answers. With --no_answer it does so for the contexts as found, and for those without the answer.

    What is written again after the retriever's phase, of questions whose context has changed, is counted in full.
    """
    tables = 2 if settings.training.no_answer else 1
    asked = math.ceil(sizes.eval_questions / sizes.processes)
    batches = math.ceil(asked / settings.contexts.answer_batch_size)
    once = tables * costs.answer.seconds(batches, asked)
    seconds = (once, *[once * written] * settings.training.rounds)
    return Part(
        "evaluation", f"{sizes.eval_questions} questions, {written} times a round", seconds, memory=costs.writing
    )


def checkpoints(settings: Settings, phase: Phase) -> int:
    """How many checkpoints with the optimizer's states are written inside a phase."""
    every, minutes = settings.output.save_steps, settings.output.save_minutes
    if not phase.steps:
        return 0
    by_steps = (phase.steps - 1) // every if every else 0
    return max(by_steps, int(phase.seconds // (60 * minutes)) if minutes else 0)


def _save(settings: Settings, sizes: Sizes, costs: Costs) -> Part:
    """The pair after each examination, a checkpoint after each act and every --save_steps or --save_minutes within a phase.

    On disk are at most as many as are kept, and the one that is being written before the oldest goes; or, at another time, a
    new pair beside the old one, which takes no more unless the index is large.
    """
    rounds, limit = settings.training.rounds, settings.output.save_total_limit
    pair = sizes.generator_trained + sizes.retriever + sizes.tokenizer  # all of the generator, or its adapter
    index = 2 * _vectors(sizes) + sizes.text
    index += _sentences(sizes, costs) if settings.contexts.keep_sentence_vectors else 0
    phases = [(costs.generator, sizes.generator_trained), (costs.retriever, sizes.retriever_trained)]
    states = [(checkpoints(settings, phase), 2 * trained) for phase, trained in phases]
    inside = sum(count * (pair + state) for count, state in states)
    before = 2 * pair + index  # the pair and a checkpoint
    each = 3 * pair + inside + pair + index
    total = 1 + rounds * (3 + sum(count for count, _ in states))
    kept = min(limit + 1, total)
    with_states = max(min(kept, count) * state for count, state in states) if rounds else 0
    return Part(
        "save", f"{total} checkpoints, {min(limit, total)} kept", tuple(costs.write * b for b in (before, *[each] * rounds)),
        disk=pair + max(kept * pair + with_states, min(limit, total) * pair + pair + index),
    )  # fmt: skip


def rough_generator_seconds(weights: int, *, trained: int, asked: int, tokens: int, rate: float) -> float:
    """Seconds that a generator takes to learn and to answer, from nothing but a product of matrices; see `make_plan` for more.

    Args:
        weights: those that multiply every token, without the embeddings. trained, asked: examples that it learns from, and
            questions that it answers. tokens: of each. rate: of matrix products, in GFLOP/s.
    """
    passes = 3 * trained + asked  # forward and backward; forward
    return 2 * weights * tokens * passes / (SHARE_OF_PEAK * rate * 1e9)


# ---- how it is told


def format_time(seconds: float) -> str:
    """Seconds, minutes or hours, whichever suits."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def format_bytes(count: float) -> str:
    """MB below one GB, else GB, in powers of ten."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def plan_table(plan: Plan) -> str:
    """The parts as columns; rounds after the first are alike and share one."""
    rounds = len(plan.parts[0].seconds) - 1
    heads = ["before", "round 1", "each later round"][: 1 + min(rounds, 2)]
    lines = [("part", *heads, "whole run", "memory", "disk", "work")]
    for part in plan.parts:
        lines.append(_line(part.name, part.seconds, len(heads), part.memory, part.disk, part.work))
    totals = [sum(part.seconds[number] for part in plan.parts) for number in range(rounds + 1)]
    lines.append(
        _line("whole run", totals, len(heads), plan.memory, plan.disk, "memory: peak, with models and libraries")
    )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _line(name: str, seconds: Sequence[float], columns: int, memory: int, disk: int, work: str) -> tuple[str, ...]:
    shown = [*seconds[: min(columns, 2)], *([sum(seconds[2:]) / len(seconds[2:])] if columns > 2 else [])]
    return (name, *map(format_time, shown), format_time(sum(seconds)), format_bytes(memory), format_bytes(disk), work)


def verdict(plan: Plan) -> str:
    """What dominates the time, and what would make the run shorter."""
    first = max(plan.parts, key=lambda part: sum(part.seconds))
    share = sum(first.seconds) / max(plan.seconds, 1e-9)
    sentence = (
        f"About {format_time(plan.seconds)}, {format_bytes(plan.memory)} of memory {'on the GPU or beside it' if plan.sizes.device != 'cpu' else 'for each process'} and "
        f"{format_bytes(plan.disk)} on disk. Most of the time, {share:.0%}, goes into the part {first.name!r}; it would be shorter with {SHORTER[first.name]}."
    )
    rounds = len(first.seconds) - 1
    if rounds > 1:
        saved = sum(part.seconds[-1] for part in plan.parts)
        sentence += f" One round less would save {format_time(saved)}."
    return sentence
