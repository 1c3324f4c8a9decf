"""Copy a pair whose generator is a LoRA adapter, with the adapter added to the weights of its base: the
generator of the copy is an ordinary checkpoint that needs neither PEFT nor the base.
Needs: pip install "cozyrag[lora]"

examples:
  cozyrag merge my-rag my-rag-merged
  cozyrag push my-rag-merged user/my-rag

Left out: the arithmetic, which is PEFT's (lora.py), and checkpoints: the copy cannot be resumed.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from cozyrag.errors import InputError
from cozyrag.runtime.atomic_files import folder_bytes
from cozyrag.runtime.folder_lock import check_new, new_folder
from cozyrag.runtime.terminal import one_line, say

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
NOT_COPIED = ("checkpoints", "trackers", "*.lock", "*.partial")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("model", metavar="OUTPUT", help="output folder of a run with --lora_rank")
    parser.add_argument("folder", metavar="FOLDER", help="new folder to write; checkpoints are not copied")


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Merge, and print the folder of the copy."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    from transformers.utils import logging  # torch: only once the options are correct

    logging.disable_progress_bar()
    say(f"{one_line(merge(options.model, options.folder))} holds the pair with one whole generator.")


def merge(output: str, folder: str) -> Path:
    """Write a copy of a run's output folder whose generator includes the adapter; returns the copy.

    Raises:
        InputError: `output` is not a finished pair or has no adapter, or `folder` exists.
    """
    from cozyrag.hub.model_cards import ADAPTER_NOTE, CARD
    from cozyrag.models.generator import Generator
    from cozyrag.models.loading import load_causal_lm
    from cozyrag.models.lora import merged, read_adapter
    from cozyrag.pair_file import read_pair, write_pair
    from cozyrag.runtime.fingerprints import weights_fingerprint

    source, target = Path(output), Path(folder)
    pair = read_pair(source)
    check_new(target, "the merged pair")
    trained = str(source / "generator")
    adapter = read_adapter(trained)
    if adapter is None:
        raise InputError(
            f"cozyrag merge: expected a LoRA adapter in {trained}, found a whole model. There is nothing to merge."
        )
    tokenizer = Generator.load(trained).tokenizer
    base, _ = load_causal_lm(adapter.base, revision=adapter.revision, dropout=0.0, token=None, chat_template=False)
    generator = Generator(merged(trained, base), tokenizer)
    needed = folder_bytes(source) + generator.saved_bytes()
    with new_folder(target, "the merged pair", needed=needed) as coming:
        shutil.copytree(source, coming, ignore=shutil.ignore_patterns(*NOT_COPIED), dirs_exist_ok=True)
        for name in ADAPTER_FILES:
            (coming / "generator" / name).unlink(missing_ok=True)
        generator.save(coming / "generator")
        pair["generator"]["fingerprint"] = weights_fingerprint(generator.model)
        write_pair(coming, pair)
        card = coming / "generator" / CARD
        if card.exists():
            text = card.read_text(encoding="utf-8").replace(ADAPTER_NOTE, "")
            text = text.replace("base_model_relation: adapter", "base_model_relation: finetune")
            card.write_text(text, encoding="utf-8")
    return target
