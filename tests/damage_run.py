"""Load pairs that somebody malformed, and pairs with a flipped bit, and ask them a question.

    python tests/damage_run.py --pairs 200
    python tests/damage_run.py --flips 300 --seed 4

A malformed pair must answer or be refused with one sentence and exit code 2: a traceback, another exit code, or more
than LONGEST seconds of the processor is a failure. Each is damaged as it is, or forged: without the hashes that would
show the change, so that the checks behind them are reached. After a flipped bit a pair must answer as before or be
refused. Children are forked from a process with loaded libraries; all is drawn from --seed. test_damage.py runs a few
of each kind in every test run. Left out: damage while a pair is written (kill_run.py).
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}.items():
    os.environ.setdefault(name, value)
for folder in (Path(__file__).parents[1], Path(__file__).parent):
    sys.path.insert(0, str(folder))

import faiss  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from forked import start  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from cozyrag.data.passages import read_passages  # noqa: E402
from cozyrag.models.generator import Generator  # noqa: E402
from cozyrag.models.retriever import Retriever  # noqa: E402
from cozyrag.pair_file import describe_pair, write_pair  # noqa: E402
from cozyrag.retrieval.passage_index import PassageIndex, Passages  # noqa: E402
from cozyrag.runtime.fingerprints import weights_fingerprint  # noqa: E402

LONGEST, WAITED = 10, 120  # seconds of the processor for one pair, and on the clock: the machine may be busy
QUESTIONS = ("What colour is the fox 0?", "In which year was the river 13 made?", "Who keeps the tower 2?")
SEALS = {"cozyrag.json": ("checksum",), "index/index.json": ("checksum", "files", "bytes")}
CHAT = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"


def make_pair(root: Path) -> Path:
    """A tiny pair as a run leaves it, with sentence vectors and hybrid search."""
    folder, passages = root / "pair", tiny.write_jsonl(root / "passages.jsonl", tiny.corpus()[0])
    generator = Generator.load(str(tiny.make_generator(root / "generator")))
    retriever = Retriever.load(str(tiny.make_retriever(root / "retriever")))
    rows = read_passages(str(passages))[0]
    read = Passages.of(rows)
    vectors, sentences = retriever.encode_passages(read.to_read(), read.spans(range(len(rows))), batch_size=40)
    index = PassageIndex(rows, vectors, fingerprint=retriever.fingerprint(), sentences=sentences)
    generator.save(folder / "generator")
    retriever.save(folder / "retriever")
    index.save(folder / "index")
    facts = describe_pair(
        fingerprint=index.fingerprint,
        generator=weights_fingerprint(generator.model),
        retrieval={"mode": "hybrid", "stemmer": "english", "weights": {"vectors": 45.0, "sentence_words": 1.0}},
        top_k=3,
        context_tokens=60,
        answer_tokens=4,
        context_filter="hybrid",
    )
    write_pair(folder, facts)
    return folder


# ---- asking, in a child


def ask(folder: Path, log: Path) -> tuple[int | None, str, str]:
    """(exit code, None for a child that had to be killed; standard output; standard error) of `cozyrag ask`."""
    child = start(["ask", str(folder), *QUESTIONS], log.with_suffix(".out"), _bounded, errors=log.with_suffix(".err"))
    until = time.monotonic() + WAITED
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(ended[1]) if ended[0] else None
    said = [log.with_suffix(end).read_text("utf-8", "replace") for end in (".out", ".err")]
    return None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code, said[0], said[1]


def _bounded() -> None:
    """End this process when it has used the processor for too long."""
    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + LONGEST, used + LONGEST))


def verdict(code: int | None, said: str, errors: str) -> str:
    """How an attempt ended; what begins with "FAILED" may not happen."""
    if code is None:
        return "FAILED: too long"
    if "Traceback" in errors or code not in (0, 2):
        return (
            f"FAILED: exit code {code}, {errors.strip().splitlines()[-1][:150] if errors.strip() else 'nothing said'}"
        )
    if code == 0:
        return "answered"
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    return "refused" if len(told) == 1 and len(told[0]) < 1500 else f"FAILED: {len(told)} sentences"


# ---- malformed pairs

VALUES = (
    None, "", "x", -1, 0, 10**9, 10**30, -(10**30), 0.5, float("nan"), float("inf"), True, [], {}, [[]],
    {"a": {}}, "\x1b[2J",
)  # fmt: skip


def _places(content: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of every entry of a JSON document."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def change_entry(folder: Path, chance: random.Random) -> str:
    """An entry of a JSON file is missing or holds something else."""
    files = sorted(path for path in folder.rglob("*.json") if path.name != "tokenizer.json")
    weights = [4 if path.name in ("cozyrag.json", "index.json") else 1 for path in files]
    path = chance.choices(files, weights)[0]
    content = json.loads(path.read_text())
    places = [each for each in _places(content) if each[0] not in ("checksum", "files")]
    if not places:
        return f"{path.name}: nothing to change"
    *way, last = chance.choice(places)
    inner = content
    for key in way:
        inner = inner[key]
    if chance.random() < 0.2:
        del inner[last]
        said = "missing"
    else:
        inner[last] = chance.choice(VALUES)
        said = f"{inner[last]!r:.20}"
    path.write_text(json.dumps(content))
    return f"{path.relative_to(folder)}: {'.'.join(map(str, (*way, last)))} {said}"


def change_file(folder: Path, chance: random.Random) -> str:
    """A file is missing, empty, cut, of other bytes, swapped, or no file at all."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "index.faiss")
    path, other = chance.sample(files, 2)
    content = path.read_bytes()
    ways: dict[str, Callable[[], object]] = {
        "missing": lambda: path.unlink(),
        "empty": lambda: path.write_bytes(b""),
        "cut": lambda: path.write_bytes(content[: chance.randrange(len(content))]),
        "zeros": lambda: path.write_bytes(bytes(len(content))),
        "random": lambda: path.write_bytes(chance.randbytes(len(content))),
        "swapped": lambda: (path.write_bytes(other.read_bytes()), other.write_bytes(content)),
        "a folder": lambda: (path.unlink(), path.mkdir()),
        "a pipe": lambda: (path.unlink(), os.mkfifo(path)),
        "a device": lambda: (path.unlink(), path.symlink_to("/dev/zero")),
        "a link to nothing": lambda: (path.unlink(), path.symlink_to("nothing")),
        "a link to itself": lambda: (path.unlink(), path.symlink_to(path)),
        "deep JSON": lambda: path.write_bytes(b"[" * 100_000),
    }
    way = chance.choice(sorted(ways))
    ways[way]()
    return f"{path.relative_to(folder)}: {way}"


def change_header(folder: Path, chance: random.Random) -> str:
    """The header of a safetensors file lies."""
    path = chance.choice(sorted(folder.rglob("*.safetensors")))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    name = chance.choice(sorted(set(head) - {"__metadata__"}))
    way = chance.choice(["length", "shape", "huge shape", "offsets", "dtype", "gone", "extra", "no JSON", "negative"])
    if way == "length":
        path.write_bytes(chance.choice([2**63, 2**40, 0, 1, len(content) + 1]).to_bytes(8, "little") + content[8:])
        return f"{path.relative_to(folder)}: header length"
    match way:
        case "shape":
            head[name]["shape"] = [*head[name]["shape"], 2]
        case "huge shape":
            head[name]["shape"] = [2**31, 2**31]
        case "offsets":
            head[name]["data_offsets"] = [0, 2**50]
        case "negative":
            head[name]["data_offsets"] = [-8, 8]
        case "dtype":
            head[name]["dtype"] = chance.choice(["F8", "F64", "BOOL", 7, None])
        case "gone":
            del head[name]
        case "extra":
            head[f"{name}.extra"] = head[name]
    text = b"{" * length if way == "no JSON" else json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return f"{path.relative_to(folder)}: {way} of {name}"


TEMPLATES = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "{{ 'a' * 10000000000 }}",
    "{{ 10 ** 10 ** 9 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ messages[0].content * 100000 }}",
    "{{ 'a'|center(100000000000) }}",
    "{% for message in messages %}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages[7].content }}",
    "",
)


def change_template(folder: Path, chance: random.Random) -> str:
    """A chat template that never ends, fails, or takes all memory."""
    template = chance.choice(TEMPLATES)
    (folder / "generator" / "chat_template.jinja").write_text(template)
    return f"chat template {template[:40]}"


def change_tokenizer(folder: Path, chance: random.Random) -> str:
    """tokenizer.json of one of the models with other numbers, parts or names."""
    path = folder / chance.choice(["generator", "retriever"]) / "tokenizer.json"
    content = json.loads(path.read_text())
    way = chance.choice(["numbers", "vocab", "part", "added", "model", "cut"])
    if way == "numbers":
        content["model"]["vocab"] = {token: number * 1000 for token, number in content["model"]["vocab"].items()}
    elif way == "vocab":
        content["model"]["vocab"] = chance.choice([{}, [], {"a": -1}, {"a": 2**40}, None])
    elif way == "part":
        content[chance.choice(["pre_tokenizer", "post_processor", "normalizer", "decoder"])] = {"type": "Nothing"}
    elif way == "added":
        content["added_tokens"] = chance.choice([[{"id": 10**9, "content": "x"}], {}, "x", [{}]])
    elif way == "model":
        content["model"] = chance.choice([{}, {"type": "BPE"}, None, {"type": "WordLevel", "vocab": {"a": 0}}])
    text = json.dumps(content)
    path.write_text(text[: len(text) // 2] if way == "cut" else text)
    return f"{path.relative_to(folder)}: {way}"


def change_passages(folder: Path, chance: random.Random) -> str:
    """passages.parquet with other columns, types, numbers of rows, or a gigabyte in a kilobyte."""
    path = folder / "index" / "passages.parquet"
    table = pq.read_table(path)
    way = chance.choice(
        ["column gone", "numbers", "missing texts", "fewer", "more", "bomb", "repeats", "nested", "bytes"]
    )
    count, texts = len(table), table["text"].to_pylist()
    held = {
        "column gone": lambda: table.drop(["title"]),
        "numbers": lambda: table.set_column(1, "title", pa.array(range(count))),
        "missing texts": lambda: table.set_column(2, "text", pa.array([None, *texts[1:]], pa.string())),
        "fewer": lambda: table.slice(1),
        "more": lambda: pa.concat_tables([table, table]),
        "bomb": lambda: table.set_column(2, "text", pa.array(["a" * 400_000_000, *texts[1:]])),
        "repeats": lambda: table.set_column(2, "text", pa.array(["a" * 50_000_000] * count)),
        "nested": lambda: table.set_column(2, "text", pa.array([[text] for text in texts])),
        "bytes": lambda: table.set_column(2, "text", pa.array([b"\xff\xfe"] * count)),
    }[way]()
    pq.write_table(held, path, compression="zstd")
    return f"passages: {way}"


def change_vectors(folder: Path, chance: random.Random) -> str:
    """vectors.safetensors with numbers that no retriever makes, or of another shape or type."""
    path = folder / "index" / "vectors.safetensors"
    tensors = load_file(path)
    name = chance.choice(sorted(tensors))
    way = chance.choice(["NaN", "zero", "long", "narrow", "fewer", "float64", "flat", "gone"])
    array = tensors.pop(name)
    filled = {"NaN": np.nan, "zero": 0, "long": 3}
    if way in filled:
        array[:1] = filled[way] if array.dtype.kind == "f" else -1
    shaped = {"narrow": lambda: array[..., :-1], "fewer": lambda: array[:-1], "flat": lambda: array.ravel()}
    array = shaped[way]() if way in shaped else array.astype(np.float64) if way == "float64" else array
    save_file(tensors | ({} if way == "gone" else {name: np.ascontiguousarray(array)}), path)
    return f"vectors: {name} {way}"


CHANGES = {
    "an entry of a JSON file": (change_entry, 8),
    "a file": (change_file, 5),
    "header of safetensors": (change_header, 2),
    "chat template": (change_template, 1),
    "tokenizer.json": (change_tokenizer, 2),
    "passages": (change_passages, 1),
    "vectors": (change_vectors, 1),
}


def forge(folder: Path) -> None:
    """Take the hashes out, as in a pair of an earlier version or by somebody who means harm."""
    for name, keys in SEALS.items():
        path = folder / name
        content = json.loads(path.read_text())
        for role in ("generator", "retriever"):
            if role in content:
                content[role].pop("files")
                content[role].pop("fingerprint" if role == "generator" else "", None)
        path.write_text(json.dumps({key: value for key, value in content.items() if key not in keys}))


def malformed(pair: Path, root: Path, number: int, seed: int) -> tuple[str, str, str]:
    """(kind, what was changed, how it ended) of one malformed pair."""
    chance = random.Random(f"{seed} {number}")
    kinds = [kind for kind, (_, weight) in CHANGES.items() for _ in range(weight)]
    kind, forged, folder = kinds[number % len(kinds)], chance.random() < 0.7, root / "changed"
    shutil.copytree(pair, folder)
    if forged:
        forge(folder)
    said = CHANGES[kind][0](folder, chance)
    ended = verdict(*ask(folder, root / "log"))
    shutil.rmtree(folder)
    return kind, f"{said}{' (forged)' if forged else ''}", ended


def run_malformed(pairs: int, seed: int, root: Path, info: Callable = print) -> list[str]:
    """Ask so many malformed pairs; returns the failures."""
    pair, table, failures = make_pair(root), Counter(), []
    for number in range(pairs):
        kind, said, ended = malformed(pair, root, number, seed)
        table[kind, ended.partition(":")[0]] += 1
        if ended.startswith("FAILED"):
            failures.append(f"pair {number}: {said}: {ended}")
            info(failures[-1])
    info(as_table(table, CHANGES, ("answered", "refused", "FAILED")))
    return failures


# ---- flipped bits


def run_flips(flips: int, seed: int, root: Path, info: Callable = print) -> list[str]:
    """Flip one bit after another, in a file drawn first; returns those that nobody noticed, and other failures."""
    pair, table, failures = make_pair(root), Counter(), []
    code, expected, errors = ask(pair, root / "log")
    assert code == 0, errors
    files = sorted(path for path in pair.rglob("*") if path.is_file() and path.name not in ("README.md", "index.faiss"))
    for number in range(flips):
        chance = random.Random(f"{seed} {number}")
        path = chance.choice(files)
        content = path.read_bytes()
        at, bit = chance.randrange(len(content)), chance.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        code, said, errors = ask(pair, root / "log")
        path.write_bytes(content)
        ended = verdict(code, said, errors)
        if ended == "answered":
            ended = "same answers" if said == expected else "FAILED: other answers, unnoticed"
        table[path.name, ended.partition(":")[0]] += 1
        if ended.startswith("FAILED"):
            failures.append(f"flip {number}: {path.relative_to(pair)}, byte {at}, bit {bit}: {ended}")
            info(failures[-1])
    info(as_table(table, sorted({path.name for path in files}), ("same answers", "refused", "FAILED")))
    return failures


def as_table(counts: Counter, kinds, ends: tuple[str, ...]) -> str:
    """Counts as a Markdown table."""
    lines = [f"| changed | {' | '.join(ends)} |", "|---|" + "---:|" * len(ends)]
    lines += [f"| {kind} | {' | '.join(str(counts[kind, end]) for end in ends)} |" for kind in kinds]
    sums = [sum(count for (_, ended), count in counts.items() if ended == end) for end in ends]
    return "\n".join([*lines, f"| all {sum(sums)} | {' | '.join(map(str, sums))} |"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=0, help="malformed pairs to ask")
    parser.add_argument("--flips", type=int, default=0, help="bits to flip, one at a time")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    failed = []
    for run, count in ((run_malformed, chosen.pairs), (run_flips, chosen.flips)):
        if count:
            with tempfile.TemporaryDirectory() as temporary:
                failed += run(count, chosen.seed, Path(temporary))
    sys.exit(bool(failed))
