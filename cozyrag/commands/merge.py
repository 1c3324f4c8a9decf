"""`cozyrag merge OUTPUT FOLDER`: a trained pair whose generator is a LoRA adapter becomes one with ordinary weights.

Left out: the arithmetic, which is PEFT's (lora.py), and checkpoints: the copy is a pair to use, not a run to go on with.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from cozyrag.errors import InputError
from cozyrag.hub.model_cards import ADAPTER_NOTE, CARD
from cozyrag.models.generator import Generator
from cozyrag.models.lora import merged, read_adapter
from cozyrag.pair_file import PAIR_FILE, read_pair
from cozyrag.runtime.atomic_files import replacing, write_json
from cozyrag.runtime.fingerprints import weights_fingerprint

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LEFT_BEHIND = ("checkpoints", "trackers", ".lock", "*.partial")


DESCRIPTION = (
    "Copy a pair whose generator is a LoRA adapter, adding the adapter to the weights of its base: the copy's generator is an "
    'ordinary checkpoint and needs neither PEFT nor the base. Needs: pip install "cozyrag[lora]".'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.description = DESCRIPTION
    parser.add_argument("model", metavar="OUTPUT", help="output folder of a run with --lora_rank")
    parser.add_argument("folder", metavar="FOLDER", help="new folder to write; checkpoints are not copied")


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Merge, and print where the copy is."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    print(f"{merge(options.model, options.folder)} holds the pair with one whole generator.")


def merge(output: str, folder: str) -> Path:
    """Write a copy of a run's output folder whose generator holds the adapter's weights; returns it.

    Raises:
        InputError: `output` is no finished pair or has no adapter, or `folder` exists.
    """
    source, target = Path(output), Path(folder)
    pair = read_pair(source)
    if target.exists():
        raise InputError(f"cozyrag merge: expected a new FOLDER, {target.absolute()} exists. Give another name.")
    adapter = read_adapter(str(source / "generator"))
    if adapter is None:
        raise InputError(
            f"cozyrag merge: expected a LoRA adapter in {source / 'generator'}, found a whole model. There is nothing to merge."
        )
    tokenizer = Generator.load(str(source / "generator")).tokenizer
    base = Generator.load(adapter.base, revision=adapter.revision, chat_template=False).model
    generator = Generator(merged(str(source / "generator"), base), tokenizer)
    with replacing(target, needed=2 * generator.saved_bytes()) as coming:
        shutil.copytree(source, coming, ignore=shutil.ignore_patterns(*LEFT_BEHIND), dirs_exist_ok=True)
        for name in ADAPTER_FILES:
            (coming / "generator" / name).unlink(missing_ok=True)
        generator.save(coming / "generator")
        pair["generator"]["fingerprint"] = weights_fingerprint(generator.model)
        write_json(coming / PAIR_FILE, pair)
        _update_card(coming / "generator" / CARD)
    return target


def _update_card(path: Path) -> None:
    """The card, if there is one, no longer speaks of an adapter."""
    if path.exists():
        text = path.read_text(encoding="utf-8").replace(ADAPTER_NOTE, "")
        path.write_text(text.replace("base_model_relation: adapter", "base_model_relation: finetune"), encoding="utf-8")
