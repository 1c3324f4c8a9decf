"""Kill commands, cut their unfinished files, fill their disk, write twice at once, and feed them hostile documents.

    python tests/attack_run.py --kills 20 --cuts 40 --full 10 --twice 10 --documents --flips 150 --requests 200

`index`, `passages`, `report`, `push` (to a Hub on loopback) and `train` are disturbed, then given again: what they
leave must equal what an undisturbed one left, or, of a run, a sentence must name what to delete. Files that were
flushed to disk are not cut. All is drawn from --seed; children are forked from a process with loaded libraries. Left
out: kills of a run (kill_run.py), damaged pairs (damage_run.py), what is sent to a server (request_run.py).
"""

import argparse
import gzip
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import damage_run
import evaluated
import kill_run
import pytest
import request_run
import tiny
from forked import start
from local_hub import LocalHub, point_client_at
from short_run import at_step, send
from spawned import Took, measured

from cozyrag import cli
from cozyrag.run import train
from cozyrag.runtime.atomic_files import damage
from cozyrag.runtime.signals import Interrupted

WAITED = 120.0  # seconds on the clock for one command: the machine may be busy
SECONDS, MEMORY = 5.0, 500e6  # of the processor, and bytes, for one hostile document
UNFINISHED = {"work", "out.jsonl.parts"}
TOLD = "told what to delete"
CUTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
}


@dataclass
class Work:
    """A command and what it writes: `words(folder)` gives its words, `left(folder)` what must be equal.

    `may_tell`: given again, it may say in a sentence what to delete. `finished`: how it refuses a whole result.
    """

    words: Callable[[Path], list[str]]
    left: Callable[[Path], object]
    prepare: Callable[[Path], None] = lambda folder: folder.mkdir(parents=True)
    may_tell: bool = False
    finished: str = ""


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of all finished files below a folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if not UNFINISHED & set(path.relative_to(folder).parts) and path.suffix not in (".partial", ".lock")
        if not path.name.endswith(("summary.json", "settings.json"))  # they have seconds, and the name of the folder
    }


def works(root: Path, hub: LocalHub) -> dict[str, Work]:
    """The commands, with their inputs in a folder."""
    rows = tiny.corpus(600)[0]
    source, retriever = tiny.write_jsonl(root / "p.jsonl", rows), tiny.make_retriever(root / "retriever")
    pair = damage_run.make_pair(root)
    scored = [evaluated.row(number, em=number % 2) for number in range(80)]

    (root / "run").mkdir()
    settings = [word for word in kill_run.materials(root / "run") if word not in kill_run.PUSHING]

    def run_folder(folder: Path) -> None:
        folder.mkdir(parents=True)
        evaluated.write_run(folder / "run", [scored, scored])

    def repo(folder: Path) -> str:
        return f"me/{folder.name}"

    def on_hub(folder: Path) -> dict:
        names = [("models", ""), ("models", "-retriever"), ("datasets", "-index")]
        held = {f"{kind}{end}": hub.repos[kind, repo(folder) + end] for kind, end in names}
        skipped = ("README.md", "cozyrag.json")  # they name the repository, and its revisions
        return {
            (name, path): blob.git
            for name, each in held.items()
            for path, blob in each.commits[each.main].items()
            if path not in skipped
        }

    index = [str(source), "--retriever", str(retriever), "--threads", "1", "--shard_size", "64", "--output"]
    return {
        "index": Work(lambda folder: ["index", *index, str(folder / "index")], files_of),
        "passages": Work(
            lambda folder: ["passages", str(source), "--workers", "1", "--output", str(folder / "out.jsonl")], files_of
        ),
        "report": Work(lambda folder: ["report", str(folder / "run"), "--latency", "0"], files_of, run_folder),
        "push": Work(lambda folder: ["push", str(pair), repo(folder)], on_hub),
        "train": Work(
            lambda folder: ["train", *settings, "--output_dir", str(folder / "out"), "--save_steps", "2"],
            lambda folder: kill_run.left(folder / "out"),
            may_tell=True,
            finished="holds a finished run; nothing was changed",
        ),
    }


def ended(child: int) -> tuple[int, float]:
    """Exit code and seconds."""
    clock = time.monotonic()
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() - clock > WAITED:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(found[1]), time.monotonic() - clock


def fault_of(code: int, log: Path, *, may_refuse: bool) -> str:
    """What is wrong with the end of a command; empty if nothing is."""
    told = log.read_text("utf-8", "replace")
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    if code == 0 or (may_refuse and code == 2 and len(errors) == 1 and "Traceback" not in told):
        return ""
    return f"exit code {code}: {told.strip().splitlines()[-1][:200] if told.strip() else 'nothing said'}"


def compared(work: Work, folder: Path, expected: object, log: Path) -> str:
    """Give the command (again), and compare what it leaves; returns the fault or nothing."""
    code, _ = ended(start(work.words(folder), log))
    if work.finished and code == 2 and work.finished in log.read_text():
        code = 0  # it had ended before it was killed
    if work.may_tell and code == 2 and not fault_of(code, log, may_refuse=True) and "elete" in log.read_text():
        return TOLD
    if fault := fault_of(code, log, may_refuse=False):
        return fault
    return "" if work.left(folder) == expected else "it left something else"


def undisturbed(work: Work, root: Path, name: str) -> tuple[object, float]:
    """What a command leaves, and its seconds."""
    folder = root / f"{name}-whole"
    work.prepare(folder)
    ended(start(work.words(folder), root / "log"))  # a first one warms caches up
    shutil.rmtree(folder)
    work.prepare(folder)
    code, seconds = ended(start(work.words(folder), root / "log"))
    assert code == 0, (root / "log").read_text()
    return work.left(folder), seconds


def kills(work: Work, name: str, root: Path, number: int, chance: random.Random, expected, seconds: float) -> str:
    """Kill a command at a random moment, and give it again."""
    folder = root / f"{name}-{number}"
    work.prepare(folder)
    child = start(work.words(folder), root / "log")
    time.sleep(chance.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    ended(child)
    return compared(work, folder, expected, root / "log")


def flushes_to(note: Path) -> Callable[[], None]:
    """In the child: note the inode of every file that is flushed."""

    def patch() -> None:
        real = os.fsync

        def fsync(handle: int) -> None:
            real(handle)
            with note.open("a") as file:
                file.write(f"{os.fstat(handle).st_ino}\n")

        os.fsync = fsync

    return patch


def cuts(work: Work, name: str, root: Path, number: int, chance: random.Random, expected, seconds: float) -> str:
    """A power cut: kill a command, and cut, empty or zero some files that were not flushed."""
    folder, note = root / f"{name}-{number}", root / "flushed"
    note.write_text("")
    work.prepare(folder)
    given = {path.stat().st_ino for path in folder.rglob("*")}
    child = start(work.words(folder), root / "log", flushes_to(note))
    time.sleep(chance.uniform(0.2, 1) * seconds)
    os.kill(child, signal.SIGKILL)
    ended(child)
    safe = given | set(map(int, note.read_text().split()))
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_ino not in safe and chance.random() < 0.5:
            path.write_bytes(CUTS[chance.choice(sorted(CUTS))](path.read_bytes()))
    return compared(work, folder, expected, root / "log")


def full(work: Work, name: str, root: Path, number: int, chance: random.Random, expected, seconds: float) -> str | None:
    """A disk that is full: a small tmpfs if this user may mount one, else a limit for the size of files.

    None if it has no room for the input.
    """
    folder, before = root / f"{name}-{number}", lambda: None
    folder.mkdir()
    size = int(10 ** chance.uniform(4.1, 5.6))
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode
    inner = folder / "in"
    try:
        try:
            work.prepare(inner)
        except OSError:
            return None  # not even the input fits, so nothing was tried
        if not mounted:
            before = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
        code, _ = ended(start(work.words(inner), root / "log", before))
        if fault := fault_of(code, root / "log", may_refuse=True):
            return fault
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=100m", str(folder)], check=True)
        return compared(work, inner, expected, root / "log")
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def twice(work: Work, name: str, root: Path, number: int, chance: random.Random, expected, seconds: float) -> str:
    """Two of the same command at once: one may be refused, the other must leave the whole."""
    folder, logs = root / f"{name}-{number}", [root / "log", root / "log2"]
    work.prepare(folder)
    children = [start(work.words(folder), logs[0])]
    time.sleep(chance.choice([0, chance.uniform(0, seconds)]))
    children.append(start(work.words(folder), logs[1]))
    codes = [ended(child)[0] for child in children]
    faults = [fault_of(code, log, may_refuse=True) for code, log in zip(codes, logs, strict=True)]
    if any(faults) or 0 not in codes:
        return f"{codes}: {faults}"
    return "" if work.left(folder) == expected else "they left something else"


def verdict_of(fault: str | None) -> str:
    """How an attack ended: with a fault, with none (an empty one), with what to delete, or without a try (None)."""
    return "not tried" if fault is None else TOLD if fault == TOLD else "FAILED" if fault else "as undisturbed"


def counted(table: Counter, attack: str, name: str) -> str:
    """How many of the attacks that were tried ended as undisturbed, and how many were not tried."""
    ends = ("as undisturbed", TOLD, "FAILED", "not tried")
    done, told, failed, untried = (table[attack, name, each] for each in ends)
    apart = f", {told} {TOLD}" if told else ""
    apart += f", {untried} more not tried, since not even the input fits" if untried else ""
    return f"{done} of {done + told + failed} ended as undisturbed{apart}"


def run_attack(attack, names, count: int, seed: int, root: Path, table: Counter) -> list[str]:
    """An attack on each of these commands, so many times; returns the failures."""
    failures = []
    with LocalHub(root / "large") as hub, pytest.MonkeyPatch.context() as patches:
        sleep = time.sleep
        point_client_at(hub, patches, cache=root / "cache")
        patches.setattr(time, "sleep", sleep)
        patches.setattr("cozyrag.run.refusal", lambda *_, **__: None)
        made = works(root, hub)
        for name in names:
            expected, seconds = undisturbed(made[name], root, name)
            for number in range(count):
                chance = random.Random(f"{seed} {attack.__name__} {name} {number}")
                fault = attack(made[name], name, root, number, chance, expected, seconds)
                table[attack.__name__, name, verdict_of(fault)] += 1
                if fault and fault != TOLD:
                    failures.append(f"{attack.__name__} {name} {number}: {fault}")
                    print(failures[-1], flush=True)
                shutil.rmtree(root / f"{name}-{number}", ignore_errors=True)
            print(f"{attack.__name__}: {name}: {counted(table, attack.__name__, name)} ({seconds:.1f} s)", flush=True)
    return failures


def run_flips(count: int, seed: int, root: Path) -> list[str]:
    """Flip a bit in a checkpoint of an interrupted run: each must be noticed."""
    settings, failures = kill_run.materials(root), []
    with pytest.MonkeyPatch.context() as patches:
        at_step(patches, 2, send(signal.SIGTERM), "generator_step")
        patches.setattr(cli, "say", lambda *_, **__: None)
        patches.setattr("cozyrag.run.refusal", lambda *_, **__: None)
        try:
            train([*settings, "--output_dir", str(root / "out")])
        except Interrupted:
            pass
    newest = max((root / "out" / "checkpoints").glob("round-*"))
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert damage(newest) is None
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        path = chance.choice(files)
        content = path.read_bytes()
        at, bit = chance.randrange(len(content)), chance.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        if damage(newest) is None:
            failures.append(f"flip {number}: {path.relative_to(newest)}, byte {at}, bit {bit} is not noticed")
            print(failures[-1], flush=True)
        path.write_bytes(content)
    print(f"flips: {count - len(failures)} of {count} in {len(files)} files of {newest.name} noticed", flush=True)
    return failures


# ---- hostile documents


def pdf(operators: int) -> bytes:
    """A PDF of one page with so many operators."""
    stream = b"BT /F1 12 Tf 10 10 Td (a) Tj ET\n" * (operators // 5)
    parts = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 99 99] /Contents 4 0 R /Resources << >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]
    content, places = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, part)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    tail = b"trailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(content)
    return content + b"xref\n0 5\n0000000000 65535 f \n" + table + tail


LAUGHS = "\n".join(["a0: &a0 [lol]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))])
ENTITIES = '<!DOCTYPE x [<!ENTITY a "ha">%s]>' % "".join(  # noqa: UP031
    f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(12)
)
MARKDOWN = {
    "emphasis": "**a ", "emphasis2": "*a _b ", "nested lists": "- ", "quotes": "> ", "brackets": "[", "links": "[a](",
    "images": "![a](<", "tables": "|a", "code": "`a ``b ", "html": "<a ", "autolinks": "<http://",
    "references": "[a]: <",
    "strike": "~~a ", "headings": "# ", "entities": "&amp", "escapes": "\\", "comments": "<!--", "tags": "</",
    "footnotes": "[^a]: ", "math": "$a ", "block tags": "<div\n", "block quotes": "<div a='",
}  # fmt: skip
BLOCKS = {  # of HTML within Markdown, behind a line that begins one
    "tag": "<a ", "end tag": "</a ", "attribute": "<a b=", "quote": "<a b='", "comment": "<!--", "section": "<![CDATA[",
    "cells": "<tr><td>", "doctype": "<!DOCTYPE ", "instruction": "<?", "character": "&#", "less": "<", "slash": "</",
    "script": "<script>", "raised": "<sup>1",
    "script end": "</script ", "empty": "<style></style ", "wrong end": "<b></i>",
}  # fmt: skip
HTML = {
    "div": "<div>", "table": "<table><tr><td>", "list": "<ul><li>", "b": "<b>", "font": "<font a=1>", "a": "<a href=x>",
    "p in p": "<p><span>", "svg": "<svg><g>", "template": "<template>", "select": "<select><option>",
}  # fmt: skip


def documents() -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files."""
    for name, text in MARKDOWN.items():
        for count in (2_000, 40_000):
            yield f"{name}-{count}.md", (text * count).encode()
    for name, text in BLOCKS.items():
        yield f"block-{name}.md", f"<div>\n{text * 40_000}".encode()
    for name, text in {"tags": "<", "formulas": "formula_1", "parentheses": " (,"}.items():
        yield f"{name}.wikiextractor", f'<doc id="1" url="u" title="t">\n{text}{" " * 400_000}x\n</doc>\n'.encode()
    for name, text in HTML.items():
        yield f"{name}.html", f"<html><body>{text * 30_000}end".encode()
    yield "laughs.md", f"---\n{LAUGHS}\n---\nSome text that is long enough to be kept as a passage.".encode()
    yield "operators.pdf", pdf(400_000)
    yield "line.jsonl.gz", gzip.compress(b'{"title": "a", "text": "' + b"word " * 24_000_000 + b'"}', 1)
    for name, text in {"words": "word ", "sentences": "A b. ", "ideographs": "\u7ef4\u4e5f", "lines": "a\n"}.items():
        yield f"{name}.csv", f'title,text\na,"{text * (10_000_000 // len(text.encode()))}"\n'.encode()
    yield "runs.jsonl", b'{"text": "%s %s"}' % (b"word " * 1_000_000, b"%01200d " % 1 * 4_000)
    yield "deep.json", b"[" * 200_000
    for ending, inner in (("docx", "word/document.xml"), ("odt", "content.xml"), ("epub", "META-INF/container.xml")):
        for what, content in (("bomb", b"<a>" + b" " * 1_200_000_000), ("entities", f"{ENTITIES}<a>&m;</a>".encode())):
            with tempfile.TemporaryFile() as file:
                with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
                    packed.writestr(inner, content)
                file.seek(0)
                yield f"{what}.{ending}", file.read()


@dataclass(frozen=True)
class Cost:
    """What a document took beyond a plain text: seconds of the processor, and bytes."""

    name: str
    seconds: float
    bytes: float

    @property
    def kind(self) -> str:
        """The end of the file's name."""
        return self.name.partition(".")[2]


def cost_table(costs: list[Cost]) -> str:
    """The worst of each kind of document, as a Markdown table."""
    lines = ["| kind | documents | most CPU seconds | of | most MB | of |", "|---|---:|---:|---|---:|---|"]
    for kind in sorted({cost.kind for cost in costs}):
        own = [cost for cost in costs if cost.kind == kind]
        slow, large = max(own, key=lambda cost: cost.seconds), max(own, key=lambda cost: cost.bytes)
        lines.append(
            f"| {kind} | {len(own)} | {max(0, slow.seconds):.1f} | {slow.name} | {max(0, large.bytes) / 1e6:.0f} | "
            f"{large.name} |"
        )
    return "\n".join(lines)


def passages_of(name: str, content: bytes, root: Path, *, others: bool) -> Took:
    """Give a document to `cozyrag passages`. `others`: a pipe and a device lie beside it."""
    (folder := root / name.replace(".", "-")).mkdir()
    (folder / name).write_bytes(content)
    if others:
        os.mkfifo(folder / "pipe.md")
        (folder / "zero.md").symlink_to("/dev/zero")
    words = ["passages", str(folder), "--workers", "1", "--skip_bad_rows", "--output", str(root / "out.jsonl")]
    end = measured(["-m", "cozyrag.cli", *words], root / "log", waited=WAITED)
    shutil.rmtree(folder)
    return end


def run_documents(root: Path) -> list[str]:
    """Give each document to `cozyrag passages`; returns those that took too much or were no bad row."""
    failures: list[str] = []
    plain = passages_of("plain.md", b"A text that is long enough to be kept as a passage.", root, others=False)
    costs: list[Cost] = []
    for name, content in documents():
        end = passages_of(name, content, root, others=not costs)
        costs.append(Cost(name, end.seconds - plain.seconds, float(end.bytes - plain.bytes)))
        fault = fault_of(end.code, root / "log", may_refuse=True)
        if costs[-1].seconds > SECONDS or costs[-1].bytes > MEMORY:
            fault = f"{costs[-1].seconds:.1f} s, {costs[-1].bytes / 1e6:.0f} MB {fault}"
        if fault:
            failures.append(f"document {name}: {fault}")
            print(failures[-1], flush=True)
    print(
        f"documents: {len(costs) - len(failures)} of {len(costs)} read or refused in bounds; what each took beyond a "
        f"plain text with {plain.seconds:.1f} s and {plain.bytes / 1e6:.0f} MB:\n\n{cost_table(costs)}"
    )
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="of each command")
    parser.add_argument("--cuts", type=int, default=0, help="power cuts of each of index, passages and train")
    parser.add_argument("--full", type=int, default=0, help="full disks, for each command that writes files")
    parser.add_argument("--twice", type=int, default=0, help="pairs of each of index and passages")
    parser.add_argument("--only", nargs="+", metavar="COMMAND", help="only these commands")
    parser.add_argument("--flips", type=int, default=0, help="bits to flip in a checkpoint")
    parser.add_argument("--documents", action="store_true", help="hostile documents")
    parser.add_argument("--requests", type=int, default=0, help="to a served pair, from several clients")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    chosen = parser.parse_args()
    failed: list[str] = []
    attacks = (
        (kills, ("index", "passages", "report", "push"), chosen.kills),
        (cuts, ("index", "passages", "train"), chosen.cuts),
        (full, ("index", "passages", "report"), chosen.full),
        (twice, ("index", "passages"), chosen.twice),
    )
    for attack, names, count in attacks:
        names = tuple(name for name in names if name in (chosen.only or names))
        if count and names:
            with tempfile.TemporaryDirectory() as temporary:
                failed += run_attack(attack, names, count, chosen.seed, Path(temporary), Counter())
    for wanted, run in (
        (chosen.flips, lambda root: run_flips(chosen.flips, chosen.seed, root)),
        (chosen.documents, run_documents),
        (chosen.requests, lambda root: request_run.run_requests(chosen.requests, chosen.seed, root)),
    ):
        if wanted:
            with tempfile.TemporaryDirectory() as temporary:
                failed += run(Path(temporary))
    sys.exit(bool(failed))
