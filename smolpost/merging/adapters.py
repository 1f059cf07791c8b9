"""LoRA adapters as inputs of a merge: peft merges each into its base model first, in fp32."""

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from smolpost.errors import UserError
from smolpost.files import write_json
from smolpost.merging.checkpoint import Checkpoint
from smolpost.merging.files import DONATED, copy_files
from smolpost.merging.shards import PART
from smolpost.merging.stop_tokens import take_eos_token
from smolpost.model.loading import load_model
from smolpost.model.stored import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_config, read_json, unreadable


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether the folder holds an adapter and no model of its own."""
    folder = checkpoint.folder
    return (folder / ADAPTER_CONFIG).exists() and not any(folder.glob("model*.safetensors*"))


def base_of(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint that an adapter was trained on: a folder, or a Hub id that is in the Hub's cache.

    Raises:
        UserError: It is not here, or the adapter is not in a safetensors file.
    """
    file = checkpoint.folder / ADAPTER_CONFIG
    if not (checkpoint.folder / ADAPTER_WEIGHTS).exists():
        pickled = sorted(found.name for found in checkpoint.folder.glob("adapter_model*.bin"))
        found = f"has its weights in {pickled[0]}" if pickled else f"has no {ADAPTER_WEIGHTS}"
        raise UserError(
            f"{checkpoint.who} is a LoRA adapter that {found} ({checkpoint.folder}); only safetensors are read: "
            "if you trust it, load it with peft and save it with save_pretrained"
        )
    stated = read_json(file, checkpoint.who)
    base = checkpoint.adapts or stated.get("base_model_name_or_path")
    folder = _folder_of(str(base), stated.get("revision")) if base else None
    if folder is None:
        raise UserError(
            f"{checkpoint.who} is a LoRA adapter of base_model_name_or_path={base!r}, which is neither a checkpoint "
            f"folder nor in the Hub's cache here; download it (`hf download ID --local-dir FOLDER`) and name its "
            f"folder in {file}"
        )
    return Checkpoint(f"base model of {checkpoint.name}", folder)


def _folder_of(base: str, revision: str | None) -> Path | None:
    if (Path(base) / "config.json").exists():
        return Path(base)
    try:  # no network: the user did not ask for a download
        folder = Path(snapshot_download(base, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
    return folder if (folder / "config.json").exists() else None


def merge_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Write the adapter's model as a full fp32 checkpoint, so that only the merge rounds.

    Raises:
        UserError: The adapter does not fit its base model, or merging it changes logits.
    """
    from peft import PeftConfig

    from smolpost.model.adapters import attach, merge

    base = base_of(checkpoint)
    model = load_model(base.folder, who=base.who, dtype=torch.float32)
    who = f"{checkpoint.who} ({checkpoint.folder})"
    try:
        config = PeftConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
    except (ValueError, TypeError, KeyError) as error:
        raise unreadable(checkpoint.folder / ADAPTER_CONFIG, error, checkpoint.who) from error
    try:
        state = load_file(checkpoint.folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise unreadable(checkpoint.folder / ADAPTER_WEIGHTS, error, checkpoint.who) from error
    model = merge(attach(model, config, state, who), who)
    tied = model.all_tied_weights_keys
    folder.mkdir(parents=True)
    save_torch_state_dict({name: tensor for name, tensor in model.state_dict().items() if name not in tied}, folder)
    # The base's file, with the adapter's changes.
    stated = json.loads((base.folder / base.config_file).read_text(encoding="utf-8"))
    if bool(tied) != read_config(base.folder / base.config_file).tie_word_embeddings:
        stated["tie_word_embeddings"] = bool(tied)
    own = f"config.json{PART}"
    write_json(folder / own, stated)
    # The tokenizer it was trained with, if there is one.
    tokenizer = checkpoint.folder if (checkpoint.folder / "tokenizer.json").exists() else base.folder
    copy_files(base.folder, folder, ("generation_config.json",))
    copy_files(tokenizer, folder, DONATED)
    files = (checkpoint.folder / ADAPTER_CONFIG, checkpoint.folder / ADAPTER_WEIGHTS, *base.weight_files)
    take_eos_token(checkpoint, Checkpoint(checkpoint.name, folder, config_file=own))
    return Checkpoint(checkpoint.name, folder, checkpoint.weight, files, own)
