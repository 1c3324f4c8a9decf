"""`cozyrag merge OUTPUT FOLDER`: a trained pair whose generator is a LoRA adapter becomes one with ordinary weights.

Left out: the arithmetic, which is PEFT's (lora.py), and checkpoints: the copy is a pair to use, not a run to go on with.
"""

import shutil
from pathlib import Path

from cozyrag.errors import InputError
from cozyrag.hub.model_cards import ADAPTER_NOTE, CARD
from cozyrag.models.generator import Generator
from cozyrag.models.lora import merged, read_adapter
from cozyrag.pair_file import PAIR_FILE, read_pair
from cozyrag.runtime.atomic_files import replacing, write_json
from cozyrag.runtime.fingerprints import weights_fingerprint

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LEFT_BEHIND = ("checkpoints", "trackers", ".lock", "*.partial")


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
        _tell_card(coming / "generator" / CARD)
    return target


def _tell_card(path: Path) -> None:
    """The card, if there is one, no longer speaks of an adapter."""
    if path.exists():
        text = path.read_text(encoding="utf-8").replace(ADAPTER_NOTE, "")
        path.write_text(text.replace("base_model_relation: adapter", "base_model_relation: finetune"), encoding="utf-8")
