"""train.py on one of several machines; also writes fingerprints of the weights to NODE_PRINTS, for test_nodes.py."""

import json
import os
import sys
from pathlib import Path

import cozyrag.run
from cozyrag.runtime.fingerprints import weights_fingerprint

whole_run = cozyrag.run.train_rounds


def train_rounds(*arguments):
    """All rounds, then the fingerprints of this process's models."""
    rounds = whole_run(*arguments)
    place = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "GROUP_RANK", "LOCAL_WORLD_SIZE")}
    prints = [weights_fingerprint(model) for model in (rounds.generator.model, rounds.retriever.model)]
    path = Path(os.environ["NODE_PRINTS"]) / f"{place['RANK']}.json"
    path.write_text(json.dumps(place | {"prints": prints}))
    return rounds


if __name__ == "__main__":
    cozyrag.run.train_rounds = train_rounds
    cozyrag.run.train(sys.argv[1:])
