"""The stop tokens of a merge's inputs; the result has those of its base."""

import json

from transformers import AutoTokenizer

from smolpost.files import write_json
from smolpost.merging.checkpoint import Checkpoint

SETTINGS = "generation_config.json"


def stop_token_ids(checkpoint: Checkpoint) -> list[int]:
    """Ids at which generation stops by the folder's generation_config.json, else by its config."""
    file = checkpoint.folder / SETTINGS
    ids = (json.loads(file.read_text(encoding="utf-8")) if file.exists() else checkpoint.config).get("eos_token_id")
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def differing(checkpoints: list[Checkpoint], base: Checkpoint) -> str:
    """A line about inputs that stop at different tokens; "" if all stop at the same."""
    found = {checkpoint.name: stop_token_ids(checkpoint) for checkpoint in checkpoints}
    if all(set(ids) == set(found[base.name]) for ids in found.values()):
        return ""
    stated = ", ".join(f"'{name}' at {ids}" for name, ids in found.items())
    return (
        f"merge inputs stop at different tokens: {stated}; the result stops where its base '{base.name}' does: choose "
        f"another base, or change eos_token_id in the result's {SETTINGS}, if that is not meant"
    )


def take_eos_token(adapter: Checkpoint, merged: Checkpoint) -> None:
    """Have a merged adapter stop at its own tokenizer's eos_token, too: it was trained to end its turns with it.

    Args:
        merged: The adapter in its base model, whose generation config says where the base stops.
    """
    if not (adapter.folder / "tokenizer.json").exists():
        return
    eos, before = AutoTokenizer.from_pretrained(adapter.folder).eos_token_id, stop_token_ids(merged)
    if eos is None or eos in before:
        return
    for name, ids in ((SETTINGS, [eos, *before]), (merged.config_file, eos)):
        file = merged.folder / name
        written = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        write_json(file, written | {"eos_token_id": ids})
