"""Push round after round to a local Hub that fails at random, and see after each what from_pretrained makes of it.

    python tests/push_under_faults.py --pushes 100

Each round has weights, vectors and a cozyrag.json of its own. A push may fail, be cut short like a killed process, or
get through; whatever it left, main and every tag must load as one whole round or be refused. Exit code 1 if one is a
mix.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import pytest  # noqa: E402
import tiny  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from local_hub import LocalHub, point_client_at  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from cozyrag.data.passages import read_passages  # noqa: E402
from cozyrag.errors import InputError  # noqa: E402
from cozyrag.hub.push import push_pair  # noqa: E402
from cozyrag.models.generator import Generator  # noqa: E402
from cozyrag.models.retriever import Retriever  # noqa: E402
from cozyrag.pair_file import describe_pair  # noqa: E402
from cozyrag.pipeline import CozyRAG  # noqa: E402
from cozyrag.retrieval.passage_index import PassageIndex, passage_text  # noqa: E402
from cozyrag.runtime.fingerprints import weights_fingerprint  # noqa: E402

REPO = "me/rag"
FAULTS = ("500", "503", "429", "cut", "lost", "half", "slow", "401", "403")
HOW = {
    "retrieval": {"mode": "dense", "stemmer": "none", "weights": {"vectors": 15.0, "sentence_words": 0.0}},
    "top_k": 2,
    "context_tokens": 40,
    "answer_tokens": 4,
}


class Killed(BaseException):
    """What a push meets when its process is killed: nothing after this request happens."""


@dataclass
class Found:
    """What the pushes came to."""

    pushed: int = 0
    failed: int = 0
    killed: int = 0
    looked: int = 0
    loaded: int = 0  # revisions that loaded, of main and all tags after each push
    refused: int = 0
    mixed: list[str] = field(default_factory=list)
    faults: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        faults = ", ".join(f"{count} × {name}" for name, count in self.faults.most_common())
        return (
            f"{self.pushed + self.failed + self.killed} pushes: {self.pushed} got through, {self.failed} failed, "
            f"{self.killed} were killed.\n"
            f"Faults met: {faults}.\n"
            f"{self.loaded} loads of main and tags gave one whole round, {self.refused} were refused, "
            f"{len(self.mixed)} were a mix."
        )


def make_round(folder: Path, number: int, passages: Path) -> dict[str, str]:
    """A pair that no other round shares a byte of its weights with; gives the fingerprints of its three pieces."""
    generator = Generator.load(str(tiny.make_generator(folder / "made" / "generator", seed=number)))
    retriever = Retriever.load(str(tiny.make_retriever(folder / "made" / "retriever", seed=number)))
    generator.save(folder / "generator")
    retriever.save(folder / "retriever")
    table = read_passages(str(passages))[0]
    texts = [passage_text(row["title"], row["text"]) for row in table]
    vectors = retriever.encode(texts, kind="document", batch_size=16)
    PassageIndex(table, vectors, fingerprint=retriever.fingerprint()).save(folder / "index")
    told = describe_pair(fingerprint=retriever.fingerprint(), **HOW) | {"note": f"round {number}"}
    (folder / "cozyrag.json").write_text(json.dumps(told))
    return {"generator": weights_fingerprint(generator.model), "retriever": retriever.fingerprint()}


def push_rounds(root: Path, *, pushes: int, seed: int, rounds: int = 4, bar: bool = False) -> Found:
    """Push rounds in turn under random faults, and load what is there after each push."""
    draw, found = random.Random(seed), Found()
    passages = tiny.write_jsonl(root / "passages.jsonl", tiny.corpus(12)[0])
    made = [make_round(root / f"round-{number}", number, passages) for number in range(rounds)]
    with LocalHub(root / "large") as hub, pytest.MonkeyPatch.context() as patches:
        point_client_at(hub, patches, cache=root / "cache")
        for push in tqdm(range(pushes), unit="push", disable=not bar):
            number = push % rounds
            hub.fail_at_random(seed + push, draw.choice((0.02, 0.1, 0.3)), FAULTS)
            kill_after = len(hub.requests) + draw.randrange(5, 120) if draw.random() < 0.3 else None
            _push(hub, root / f"round-{number}", f"round-{number}", kill_after, found)
            hub.heal()
            patches.setattr(
                constants, "HF_HUB_CACHE", str(root / f"cache-{push}")
            )  # nothing comes from an earlier look
            found.looked += 1
            for revision in ("main", *dict(hub.repo(REPO).tags if ("models", REPO) in hub.repos else {})):
                _look(revision, made, found)
        found.faults = Counter(status for _, _, status in hub.requests if status in FAULTS)
    return found


def _push(hub: LocalHub, folder: Path, tag: str, kill_after: int | None, found: Found) -> None:
    """One push; killed once the Hub has seen so many requests."""
    drawn = hub.fault_of

    def fault_of(method: str, path: str) -> str | None:
        return "cut" if kill_after is not None and len(hub.requests) >= kill_after else drawn(method, path)

    def no_more(state) -> None:
        if kill_after is not None and len(hub.requests) >= kill_after:
            raise Killed

    hub.fault_of = fault_of
    try:
        push_pair(folder, REPO, tag=tag, info=no_more)
        found.pushed += 1
    except InputError:
        found.failed += 1
    except Killed:
        found.killed += 1
    finally:
        hub.fault_of = drawn


def _look(revision: str, made: list[dict[str, str]], found: Found) -> None:
    """Load a revision and see whether all of it is of one round, and of the one that a tag names."""
    try:
        pair = CozyRAG.from_pretrained(REPO, revision=revision)
    except InputError:
        found.refused += 1
        return
    held = {"generator": weights_fingerprint(pair.generator.model), "retriever": pair.retriever.fingerprint()}
    right = made if revision == "main" else [made[int(revision.removeprefix("round-"))]]
    if held in right and pair.index.fingerprint == held["retriever"]:
        found.loaded += 1
    else:
        found.mixed.append(f"{revision}: {held}, index of {pair.index.fingerprint}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pushes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    import logging

    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    logging.disable(logging.WARNING)
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        outcome = push_rounds(Path(scratch), pushes=given.pushes, seed=given.seed, bar=True)
    print(outcome)
    sys.exit(1 if outcome.mixed else 0)
