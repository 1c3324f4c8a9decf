"""Push a pair with a generator of more than 100 MB to a local Hub, fetch it as a stranger would, and compare.

    python tests/round_trip.py             # the quickstart passages, 50 of its questions, a 110 MB generator
    python tests/round_trip.py --layers 4  # the small generator as it is

The generator is the one that comes with the package, made larger by layers that pass everything through unchanged
(their output matrices are 0), so that it answers like the small one and its weights still travel in full.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
ANSWER = """
import json, sys
from cozyrag import CozyRAG
answers = CozyRAG.from_pretrained(sys.argv[1]).answers(json.load(open(sys.argv[2])))
found = [[a.text, a.score, a.context, [[p.id, p.score] for p in a.passages]] for a in answers]
print(json.dumps(found))
"""
PUSH = """
import json, resource, sys, time
from cozyrag.hub.background_push import push_run
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, started = peak(), time.perf_counter()
push_run(sys.argv[1], sys.argv[2])
print(json.dumps([time.perf_counter() - started, peak() - before]))
"""


def make_pair(folder: Path, layers: int) -> None:
    """An output folder: the embedded generator with this many layers, the embedded retriever, quickstart passages."""
    from transformers import GPT2LMHeadModel

    from cozyrag.data.passages import read_passages
    from cozyrag.models.generator import Generator
    from cozyrag.models.retriever import Retriever
    from cozyrag.pair_file import describe_pair
    from cozyrag.retrieval.passage_index import PassageIndex, Passages
    from cozyrag.runtime.assets import GENERATOR_FOLDER, QUICKSTART

    small = Generator.load(str(GENERATOR_FOLDER))
    config = type(small.model.config)(**small.model.config.to_dict() | {"n_layer": layers, "num_hidden_layers": layers})
    large = GPT2LMHeadModel(config)
    large.load_state_dict(small.model.state_dict(), strict=False)
    for block in large.transformer.h[small.model.config.n_layer :]:
        for part in (block.attn.c_proj, block.mlp.c_proj):
            part.weight.data.zero_()
            part.bias.data.zero_()
    large.generation_config = small.model.generation_config
    Generator(large, small.tokenizer).save(folder / "generator")
    retriever = Retriever.load_embedded(max_tokens=160)
    retriever.save(folder / "retriever")
    table = read_passages(QUICKSTART["passages"])[0]
    passages = Passages.of(table)
    vectors, sentences = retriever.encode_passages(passages.to_read(), passages.spans(range(len(table))), batch_size=16)
    PassageIndex(table, vectors, fingerprint=retriever.fingerprint(), sentences=sentences).save(folder / "index")
    how = {
        "retrieval": {"mode": "hybrid", "stemmer": "english", "weights": {"vectors": 45.0, "sentence_words": 1.0}},
        "top_k": 4,
        "context_tokens": 96,
        "answer_tokens": 16,
    }
    (folder / "cozyrag.json").write_text(json.dumps(describe_pair(fingerprint=retriever.fingerprint(), **how)))


def answers(model: str, asked: Path, environment: dict[str, str]) -> list:
    """Answers with scores, contexts and sources, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, model, str(asked)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout)


def sums(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights and vectors below a folder, by the files' names in it."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".safetensors", ".parquet")
    }


def pushed(folder: Path, environment: dict[str, str]) -> tuple[float, int]:
    """(seconds of a push in a process of its own, bytes by which its peak memory grew)."""
    command = [sys.executable, "-c", PUSH, str(folder), "me/rag"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Make, push, fetch, compare; exit code 1 at the first difference."""
    from local_hub import LocalHub

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14, help="of the generator; 14 give 110 MB")
    parser.add_argument("--questions", type=int, default=50)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        from cozyrag.runtime.assets import QUICKSTART

        lines = Path(QUICKSTART["eval_questions"]).read_text(encoding="utf-8").splitlines()
        asked = root / "asked.json"
        asked.write_text(json.dumps([json.loads(line)["question"] for line in lines[: given.questions]]))
        make_pair(root / "run", given.layers)
        size = (root / "run" / "generator" / "model.safetensors").stat().st_size
        print(f"generator: {size / 1e6:.1f} MB")
        before = answers(str(root / "run"), asked, {"HF_HUB_OFFLINE": "1"})
        with LocalHub(root / "large") as hub:
            environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_right", "HF_HUB_OFFLINE": "0"}
            environment |= {
                "HF_HUB_DISABLE_XET": "1",
                "HF_HOME": str(root / "home"),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            }
            seconds, memory = pushed(root / "run", environment)
            print(
                f"pushed {hub.received / 1e6:.1f} MB in {seconds:.1f} s, "
                f"for which peak memory grew by {memory / 1e6:.0f} MB"
            )
            received = hub.received
            seconds, _ = pushed(root / "run", environment)
            print(f"the same again: {hub.received - received} bytes in {seconds:.1f} s")
            online = answers("me/rag", asked, environment)
        offline = answers("me/rag", asked, environment | {"HF_HUB_OFFLINE": "1"})
        fetched = {}
        for snapshot in (root / "home" / "hub").glob("*/snapshots/*"):
            fetched |= {f"{snapshot.parents[1].name} {name}": digest for name, digest in sums(snapshot).items()}
        given_sums = {
            digest for piece in ("generator", "retriever", "index") for digest in sums(root / "run" / piece).values()
        }
        same = set(fetched.values()) == given_sums
        print(f"{len(fetched)} files of weights, vectors and passages fetched; the same bytes as on disk: {same}")
        print(
            f"{len(before)} answers, equal from the Hub: {online == before}, "
            f"offline from the cache: {offline == before}"
        )
        print(f"for example: {before[0][0]!r}, {before[1][0]!r}, {before[2][0]!r}")
    sys.exit(0 if same and online == before == offline else 1)


if __name__ == "__main__":
    main()
