"""What each part of a run costs on this machine, measured in seconds of work on a sample of the real tables.

It calls the code of the run itself: the steps of the trainer, the encoding of passages, the search, the context maker, the
answering. Every part has a share of the budget, begins small, takes larger bites as far as they fit, and stops when its
share is spent or it is sure enough. Weights, modes and random states are put back. Left out: how often a part comes up in
a run and what that adds up to (plan.py).
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors.numpy import save_file

from cozyrag.batches import share_out
from cozyrag.config import Settings
from cozyrag.contexts import SEARCH_DEPTH, ContextMaker, attach_contexts, sentence_source
from cozyrag.corpus import Corpus
from cozyrag.costs import Costs, Line, Phase, bite, fit, forget_peak, is_sure, memory_now, peak_at, spread
from cozyrag.doctor import left_as_found
from cozyrag.generator import Decoding, Generator
from cozyrag.generator_phase import end_lesson, generator_examples, generator_lesson, generator_steps
from cozyrag.index import PassageIndex, Passages
from cozyrag.lexical import LexicalIndex, SentenceWords
from cozyrag.prompts import Example
from cozyrag.questions import take
from cozyrag.report import peak_memory
from cozyrag.retrieval import RETRIEVE_TOGETHER, context_maker, weighing_questions
from cozyrag.retriever import Retriever
from cozyrag.retriever_phase import retriever_lesson, retriever_steps, retriever_usable, step_passages
from cozyrag.search import Searcher
from cozyrag.sentences import SentenceVectors
from cozyrag.sharding import held_bytes
from cozyrag.trainer import StepReport, Watcher, run_phase, trainable

BUDGET = 18.0  # seconds of all parts together; beginnings and what is begun when they end come on top
SHARES = {"index": 4, "retrieve": 4, "generator": 6, "feedback": 2, "retriever": 5, "answer": 3}
SAMPLE = 512  # questions, at most
CHARACTERS = 4_000_000  # of passages that are searched, at most
COUNTED = 1000  # planned steps whose size is looked at, evenly spread
WRITTEN = 32_000_000  # bytes written to see how fast files are


@contextmanager
def _as_found(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Weights, modes and random states as before, whatever happens between; gradients are gone."""
    kept = [{name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()} for model in models]
    with left_as_found(models):
        try:
            yield
        finally:
            for model, state in zip(models, kept, strict=True):
                model.load_state_dict(state)
                model.zero_grad()


class Probe:
    """Measures one run's parts; `measure` is all that is called."""

    def __init__(
        self, accelerator: Accelerator, settings: Settings, corpus: Corpus, generator: Generator, retriever: Retriever
    ):
        self.accelerator, self.settings, self.corpus = accelerator, settings, corpus
        self.generator, self.retriever = generator, retriever
        self.begun_with = self.peak = 0
        training = settings.training
        self.passages = Passages.of(corpus.passages)
        self.row_of = {name: row for row, name in enumerate(self.passages.ids)}
        self.feeds = bool(training.feedback_weight and training.rounds and training.retriever_steps != 0)
        wanted = {"feedback": self.feeds, "generator": training.rounds, "retriever": training.rounds}
        shares = {name: share for name, share in SHARES.items() if wanted.get(name, True)}
        self.share = {name: BUDGET * share / sum(shares.values()) for name, share in shares.items()}
        self.questions = corpus.questions[:]
        self.gold = [self.row_of.get(name, -1) for name in self.questions["passage_id"]]
        texts = self.passages.select(self._some(64))
        counts = [len(ids) for ids in self.retriever.model.tokenizer(texts, verbose=False)["input_ids"]]
        self.tokens_per_character = sum(counts) / max(1, sum(map(len, texts)))

    def measure(self) -> Costs:
        """All costs, the same on every process."""
        started = time.perf_counter()
        with _as_found([self.generator.model, self.retriever.model]):
            cuda = self.accelerator.device.type == "cuda"
            self.begun_with = torch.cuda.memory_allocated(self.accelerator.device) if cuda else memory_now()
            encode, vectors, sentences, order = self._encoding()
            found = self._searching(vectors, sentences)
            columns = broadcast_object_list([found.columns])[0]
            asked, places = self._stand_ins(columns)
            generator = self._generator_phase(asked, places)
            retriever = self._retriever_phase(asked, places)
            answer, likelihood, writing = self._answering(columns)
            feedback = self._feeding(columns, found.maker) if self.feeds else 0.0
        size = self.settings.contexts.encode_batch_size
        costs = Costs(
            encode=encode, batches=-(-len(order) // size), tokens=self._batch_tokens(order, size), lexical=found.lexical,
            search=found.search, first=found.first, reach=found.reach, weigh=found.weigh, generator=generator, retriever=retriever,
            feedback=feedback, likelihood=likelihood, answer=answer, write=self._writing(), row_bytes=found.row_bytes,
            sentences=sum(map(len, sentences)) / len(sentences) * len(self.passages.ids), lexical_bytes=found.lexical_bytes,
            writing=writing, exact=min(self.gold, default=0) >= 0 or len(columns["id"]) == len(self.gold),
        )  # fmt: skip
        costs = replace(costs, peak=max(self.peak, peak_memory()), spent=time.perf_counter() - started)
        return broadcast_object_list([costs])[0]

    # ---- sizes

    def _some(self, count: int) -> list[int]:
        """Rows of passages, evenly spread."""
        total = len(self.passages.ids)
        return sorted({round(row) for row in np.linspace(0, total - 1, min(count, total))})

    def _tokens(self, text: str) -> float:
        """About how many tokens the retriever reads of a text."""
        return min(len(text) * self.tokens_per_character + 2, self.retriever.model.max_seq_length or math.inf)

    def _batch_tokens(self, rows: Sequence[int], size: int) -> float:
        """Tokens, with padding, of passages encoded in this order."""
        longest = [self._tokens(self.passages.texts[rows[at]]) for at in range(0, len(rows), size)]
        return sum(each * min(size, len(rows) - at * size) for at, each in enumerate(longest))

    # ---- index

    def _encoding(self) -> tuple[Line, np.ndarray, list[np.ndarray], list[int]]:
        """The cost of a batch, the vectors made on the way, the vectors of their sentences, and this process's rows in order."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size, share = self.settings.contexts.encode_batch_size, self.share["index"]
        order = sorted(range(len(self.passages.ids))[rank::world], key=lambda row: -len(self.passages.texts[row]))
        order = order or [0]
        vectors, sentences, measured = [], [], []
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        warm = batches[len(batches) // 2][:4]
        with self.retriever.reading_in(self.settings.contexts.index_precision):
            self._encode(warm)
            begun = time.perf_counter()
            self._encode(warm)
            most = bite(size, len(warm), time.perf_counter() - begun, share)
            begun = time.perf_counter()
            for place in spread(len(batches)):
                rows = batches[place][:most]
                clock = time.perf_counter()
                made, own = self._encode(rows)
                now = time.perf_counter()
                measured.append((self._batch_tokens(rows, len(rows)), now - clock))
                vectors.append(made)
                sentences += own.of(range(len(rows)))
                if now - begun > share or is_sure(measured):
                    break
        return fit(measured), np.concatenate(vectors), sentences, order

    def _encode(self, rows: Sequence[int]) -> tuple[np.ndarray, SentenceVectors]:
        return self.retriever.encode_passages(
            self.passages.select(rows), self.passages.spans(rows), batch_size=len(rows)
        )

    # ---- search and contexts

    def _searching(self, vectors: np.ndarray, sentences: list[np.ndarray]) -> "_Found":
        """Search the passages, or as many as the probe can hold, for a sample of the questions."""
        sample = take(self.corpus.questions, SAMPLE, self.settings.training.seed)
        chosen = self._searched(sample)
        table, scale = self.corpus.passages.select(chosen), len(self.passages.ids) / len(chosen)
        passages = Passages.of(table)
        part = sum(map(len, passages.texts)) / max(1, sum(map(len, self.passages.texts)))
        mode, lexical, clock = self.settings.contexts.retrieval, None, time.perf_counter()
        if mode != "dense":
            lexical = LexicalIndex(passages.to_read(), stemmer=self.settings.contexts.stemmer)
        words = SentenceWords(passages.titles, passages.sentences(), stemmer=self.settings.contexts.stemmer)
        built = time.perf_counter() - clock
        maker = context_maker(passages, self.settings, self.generator, self.retriever)
        keep = self.settings.contexts.keep_sentence_vectors and maker.score_by != "overlap"
        index = PassageIndex(
            table, vectors[np.arange(len(table)) % len(vectors)], fingerprint="probe",
            sentences=_borrowed(passages, sentences) if keep else None,
        )  # fmt: skip
        maker.sentence_vectors, maker.words = sentence_source(index, self.retriever), words
        searcher = Searcher(index, lexical, encode=self._encode_questions, mode=mode, words=words)
        share = self.share["retrieve"]
        first = sample.select(range(min(32, len(sample))))
        searcher.search(first["question"][:4], SEARCH_DEPTH)  # warm up
        seconds = _timed(lambda: self._attach(first, searcher, maker))[0]
        sample = sample.select(range(bite(len(sample), len(first), seconds, share)))
        cold, _ = _timed(lambda: self._attach(sample, searcher, maker))
        warm, contexts = _timed(lambda: self._attach(sample, searcher, maker))
        grown = (scale - 1) * self._search_seconds(searcher, sample["question"])
        touched = len({row for rows in contexts["rows"] for row in rows})
        columns = contexts[:]
        for name in ("rows", "negatives"):
            columns[name] = [[chosen[row] for row in rows] for rows in columns[name]]
        columns["positive"] = [chosen[row] if row >= 0 else -1 for row in columns["positive"]]
        known = [(text, row) for text, row in zip(columns["question"], contexts["gold_row"], strict=True) if row >= 0]
        weigh = 0.0
        if mode == "hybrid" and known:
            weigh = _timed(lambda: searcher.choose_weights(*map(list, zip(*known, strict=True))))[0] / len(known)
            weigh += grown / len(sample)
        return _Found(
            maker=maker, columns=columns, lexical=built / part, search=(warm + grown) / len(sample),
            first=max(0.0, cold - warm) / max(1, touched - len(first)), reach=-math.log(1 - min(touched / len(table), 0.999)) * len(table) / len(sample),
            weigh=weigh, row_bytes=contexts.data.nbytes / len(contexts), lexical_bytes=((lexical.nbytes if lexical else 0) + words.nbytes) / part,
        )  # fmt: skip

    def _searched(self, sample: Dataset) -> list[int]:
        """Rows of the passages that are searched: the gold ones of the sample, then evenly spread ones up to the limit."""
        total = len(self.passages.ids)
        count = max(100, int(total * CHARACTERS / max(1, sum(map(len, self.passages.texts)))))
        if count >= total:
            return list(range(total))
        gold = [self.row_of[name] for name in sample["passage_id"] if name in self.row_of]
        return sorted({*gold, *self._some(count)})

    def _attach(self, questions: Dataset, searcher: Searcher, maker: ContextMaker) -> Dataset:
        return attach_contexts(
            questions,
            search=lambda texts: searcher.search(texts, SEARCH_DEPTH),
            maker=maker,
            fingerprint=f"probe{time.perf_counter_ns()}",
            noise=self.settings.training.context_noise,
            batch_size=RETRIEVE_TOGETHER,
        )

    def _search_seconds(self, searcher: Searcher, texts: list[str]) -> float:
        """The part of the search that grows with the number of passages."""
        vectors = self._encode_questions(texts)
        seconds = _timed(lambda: searcher.index.search(vectors, SEARCH_DEPTH))[0] if searcher.mode != "bm25" else 0.0
        return seconds + (_timed(lambda: searcher.lexical.search(texts, SEARCH_DEPTH))[0] if searcher.lexical else 0.0)

    def _encode_questions(self, texts: Sequence[str]) -> np.ndarray:
        return self.retriever.encode(texts, kind="query", batch_size=self.settings.contexts.encode_batch_size)

    # ---- training

    def _stand_ins(self, columns: dict[str, list]) -> tuple[dict[str, list], list[int]]:
        """The contexts table of all training questions, as far as the probe knows it, and for each the row of the sample that
        stands in for it: itself, else one with a gold passage and an answer where it has them."""
        place = {name: row for row, name in enumerate(columns["id"])}
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for row, answers in enumerate(columns["answers"]):
            kinds.setdefault((columns["gold_row"][row] >= 0, bool(answers)), []).append(row)
        everyone, places = list(range(len(place))), []
        for number, name in enumerate(self.questions["id"]):
            kind = kinds.get((self.gold[number] >= 0, bool(self.questions["answers"][number])), everyone)
            places.append(place.get(name, kind[number % len(kind)]))
        asked = {name: [columns[name][row] for row in places] for name in ("negatives", "rows", "context", "noised")}
        asked |= {name: self.questions[name] for name in ("id", "question", "answers")}
        asked["positive"] = [
            gold if gold >= 0 else columns["positive"][row] for gold, row in zip(self.gold, places, strict=True)
        ]
        return asked, places

    def _generator_phase(self, asked: dict[str, list], places: list[int]) -> Phase:
        """Steps of examples; each question's is its stand-in's, so that only the sample is tokenized."""
        training = self.settings.training
        teaches = [bool(answers) or training.no_answer for answers in asked["answers"]]
        own = {}  # of the sample: the last question that each row stands in for shows what it holds
        for number, row in enumerate(places):
            if teaches[number]:
                own.setdefault(row, number)
        numbers = list(own.values())
        examples = generator_examples(
            self.generator,
            {
                name: [asked[name][number] for number in numbers]
                for name in ("question", "answers", "context", "noised")
            },
            settings=training,
            context_tokens=self.settings.contexts.context_tokens,
        )
        example_of = dict(zip(own, range(len(own)), strict=True))
        usable = [example_of[row] for number, row in enumerate(places) if teaches[number]]
        steps = generator_steps([len(examples[at].input_ids) for at in usable], training, 1) if training.rounds else []
        steps = [[usable[row] for row in step] for step in steps]
        if not steps:
            return Phase(0, 0, 0, Line(0, 0), len(usable), 0)
        module, take_rows = generator_lesson(self.accelerator, self.generator, examples, training)

        def units(rows: Sequence[int]) -> float:
            return self._padded([examples[row] for row in rows])

        phase = self._phase("generator", trainable(module), steps, take_rows, units, training.generator_learning_rate)
        end_lesson(self.accelerator, self.generator, module)
        return replace(phase, rows=len(usable))

    def _padded(self, examples: Sequence[Example]) -> int:
        """Tokens of a step with their padding."""
        parts = self.accelerator.num_processes * self.settings.training.gradient_accumulation_steps
        shares = share_out(range(len(examples)), parts=parts)
        return sum(len(rows) * max(len(examples[row].input_ids) for row in rows) for rows in shares if rows)

    def _retriever_phase(self, asked: dict[str, list], places: list[int]) -> Phase:
        """Steps of pairs: the questions with their own gold passages, and the negatives of their stand-ins."""
        training = self.settings.training
        likelihoods = None
        if self.feeds:
            judged = min([training.feedback_passages, *map(len, asked["rows"])])
            likelihoods = np.zeros((len(places), judged), dtype=np.float32)
            likelihoods[[not answers for answers in asked["answers"]]] = np.nan
        left_out = weighing_questions(self.corpus.questions, self.settings)["id"][:]
        usable = retriever_usable(asked, training, likelihoods, left_out)
        at = [asked["positive"][row] if asked["positive"][row] >= 0 else asked["rows"][row][0] for row in usable]
        lengths = [len(text) for text in self.passages.select(at)]
        steps = retriever_steps(lengths, training, 1) if training.rounds else []
        if not steps:
            return Phase(0, 0, 0, Line(0, 0), len(usable), 0)

        def units(rows: Sequence[int]) -> float:
            found = step_passages(asked, rows, 0 if likelihoods is None else likelihoods.shape[1])
            read = [asked["question"][row] for row in rows] + self.passages.select(found)
            return sum(map(self._tokens, read))

        def take_rows(rows: Sequence[int]) -> dict[str, float]:
            return retriever_lesson(self.accelerator, self.retriever, asked, self.passages, rows, training, likelihoods)

        self.retriever.model.eval()
        steps = [[usable[row] for row in step] for step in steps]
        parameters = trainable(self.retriever.model)
        phase = self._phase("retriever", parameters, steps, take_rows, units, training.retriever_learning_rate)
        return replace(phase, rows=len(usable))

    def _phase(
        self,
        name: str,
        parameters: list[torch.nn.Parameter],
        steps: list[list[int]],
        take_rows: Callable[[Sequence[int]], dict[str, float]],
        units: Callable[[Sequence[int]], float],
        rate: float,
    ) -> Phase:
        """Time steps of the plan, small pieces of steps first, then whole ones if they fit; the longest is one of them."""
        looked = [
            steps[place]
            for place in sorted({round(at) for at in np.linspace(0, len(steps) - 1, min(COUNTED, len(steps)))})
        ]
        looked.sort(key=lambda rows: -units(rows))
        sizes = [units(rows) for rows in looked]
        ends = time.perf_counter() + self.share[name]
        self._grown(reset=True)

        def timed(tried: list[list[int]]) -> tuple[list[tuple[float, float]], float]:
            watch = _Stopwatch([(len(rows), units(rows)) for rows in tried], ends)
            run_phase(
                self.accelerator, name, parameters, [np.array(rows) for rows in tried], lambda number, pieces: take_rows(tried[number]),
                settings=self.settings.training, learning_rate=rate, round_number=1, watcher=watch, quiet=True,
            )  # fmt: skip
            return watch.measured, _timed(self.accelerator.free_memory)[0]

        whole, few = max(map(len, looked)), min(len(looked[0]), max(4, self.accelerator.num_processes))
        middle = looked[len(looked) // 2][:few]
        small, held = timed([middle, middle])[0], self._grown(reset=True)
        most = broadcast_object_list([bite(whole, few, small[-1][1], max(1.0, ends - time.perf_counter()))])[0]
        tried = [
            looked[place][: most if turn % 3 or most == whole else max(1, most // 2)]
            for turn, place in enumerate(_again(len(looked)))
        ]
        if most < whole:
            tried.insert(0, looked[0][:most])
        measured, ending = timed([tried[0], *tried])
        measured = measured[1:] or measured  # the first step sets memory up
        peak = peak_at(sizes[0], (small[0][0], held), (max(size for size, _ in measured), self._grown(reset=False)))
        states = 3 * held_bytes(parameters)
        return Phase(len(steps), float(np.mean(sizes)), sizes[0], fit(measured), 0, max(0, peak - states), ending)

    def _grown(self, *, reset: bool) -> int:
        """Bytes that the peak on the device lies above what was held when the probe began; `reset` counts anew from here."""
        device = self.accelerator.device
        if device.type == "cuda":
            found = max(0, torch.cuda.max_memory_allocated(device) - self.begun_with)
            if reset:
                torch.cuda.reset_peak_memory_stats(device)
            return found
        self.peak = max(self.peak, peak_memory())
        found = max(0, peak_memory() - self.begun_with)
        if reset:
            forget_peak()
        return found

    # ---- the generator at work

    def _answering(self, columns: dict[str, list]) -> tuple[Line, float, int]:
        """A batch of answers by its questions, the likelihood of one, and the bytes that writing takes."""
        chosen, share = self.settings.contexts, self.share["answer"]
        limits = Decoding.of(chosen).limits()
        limits["min_new_tokens"] = max(chosen.min_answer_tokens, int(self.settings.training.no_answer))
        self._grown(reset=True)
        rows = sorted(range(len(columns["id"])), key=lambda row: len(columns["context"][row]))
        rows = [rows[place] for place in spread(len(rows))]

        def write(count: int, at: int = 0) -> float:
            mine = [rows[(at + each) % len(rows)] for each in range(count)]
            return _timed(
                lambda: self.generator.answer(
                    [columns["question"][row] for row in mine],
                    [columns["context"][row] for row in mine],
                    **limits,
                    batch_size=count,
                )
            )[0]

        first = min(4, chosen.answer_batch_size)
        write(first)
        most = bite(chosen.answer_batch_size, first, write(first), share)
        measured, begun = [], time.perf_counter()
        while not measured or (time.perf_counter() - begun < share and not is_sure(measured)):
            count = max(1, most // 2) if len(measured) % 3 == 2 else most
            measured.append((count, write(count, at=len(measured) * most)))
        likelihood = 0.0
        if self.settings.training.no_answer:
            mine = rows[: min(len(rows), most)]
            asked, read = ([columns[name][row] for row in mine] for name in ("question", "context"))
            likelihood = _timed(
                lambda: self.generator.no_answer_probabilities(
                    asked, read, context_tokens=chosen.context_tokens, batch_size=chosen.answer_batch_size
                )
            )[0] / len(mine)
        return fit(measured), likelihood, self._grown(reset=False)

    def _feeding(self, columns: dict[str, list], maker: ContextMaker) -> float:
        """Seconds of the generator's feedback for a question."""
        chosen, judged = self.settings.contexts, self.settings.training.feedback_passages
        sub = maker.row_of
        rows = [row for row, answers in enumerate(columns["answers"]) if answers]
        if not rows:
            return 0.0

        def feed(count: int) -> float:
            pairs = [
                (row, sub[self.passages.ids[each]]) for row in rows[:count] for each in columns["rows"][row][:judged]
            ]
            asked = [columns["question"][row] for row, _ in pairs]
            vectors = self._encode_questions([columns["question"][row] for row in rows[:count]])
            repeated = np.repeat(vectors, [len(columns["rows"][row][:judged]) for row in rows[:count]], axis=0)
            self.generator.log_likelihoods(
                asked,
                maker.contexts(asked, [[passage] for _, passage in pairs], repeated),
                [columns["answers"][row][0] for row, _ in pairs],
                context_tokens=chosen.context_tokens,
                batch_size=chosen.answer_batch_size,
            )
            return min(count, len(rows))

        feed(2)
        seconds, count = _timed(lambda: feed(4))
        seconds, count = _timed(lambda: feed(bite(len(rows), count, seconds, 2 * self.share["feedback"])))
        return seconds / count

    def _writing(self) -> float:
        """Seconds of writing one byte of weights, to the folder for temporary files."""
        with tempfile.TemporaryDirectory() as folder:
            block = np.zeros(WRITTEN // 4, dtype=np.float32)
            return _timed(lambda: save_file({"block": block}, Path(folder) / "block.safetensors"))[0] / WRITTEN


@dataclass(frozen=True)
class _Found:
    """What searching told; see Costs. `columns`: the contexts table of the sample, rows of passages as in the whole table."""

    maker: ContextMaker
    columns: dict[str, list]
    lexical: float
    search: float
    first: float
    reach: float
    weigh: float
    row_bytes: float
    lexical_bytes: float


class _Stopwatch(Watcher):
    """A watcher that notes the seconds of every step and ends the phase when its time is over or it is sure."""

    def __init__(self, sizes: list[tuple[int, float]], ends: float):
        self.sizes, self.ends = sizes, ends
        self.measured: list[tuple[float, float]] = []

    def after_step(self, report: StepReport) -> bool:
        """All processes end together: the first one decides."""
        rows, units = self.sizes[report.step - 1]
        self.measured.append((units, rows / report.rate))
        spent = time.perf_counter() > self.ends
        return broadcast_object_list([spent or is_sure(self.measured[1:])])[0]


def _timed(act: Callable) -> tuple[float, object]:
    clock = time.perf_counter()
    made = act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - clock, made


def _again(count: int) -> list[int]:
    """Places as `spread` gives them, over and over: a table may have fewer steps than the probe has time for."""
    order = list(spread(count))[:200]
    return (order * (200 // len(order) + 1))[:200]


def _borrowed(passages: Passages, sentences: list[np.ndarray]) -> SentenceVectors:
    """Sentence vectors for all passages, as many as each has sentences, lent by the passages that were encoded."""
    pool = np.concatenate([np.zeros((1, sentences[0].shape[1])), *sentences]).astype(np.float16)
    ends = np.cumsum([len(own) for own in passages.sentences()], dtype=np.int64)
    return SentenceVectors(pool[np.arange(ends[-1]) % len(pool)], ends)
