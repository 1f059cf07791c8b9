"""LoRA adapters as inputs of a merge: peft merges each into its base model first, in fp32."""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoModelForCausalLM

from smolpost.errors import UserError
from smolpost.merging.checkpoint import HEAD, Checkpoint
from smolpost.merging.files import DONATED, copy_files
from smolpost.merging.shards import PART

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether the folder holds an adapter and no model of its own."""
    folder = checkpoint.folder
    return (folder / CONFIG).exists() and not any(folder.glob("model*.safetensors*"))


def base_of(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint that an adapter was trained on.

    Raises:
        UserError: It is not a folder here, or the adapter is not in a safetensors file.
    """
    file = checkpoint.folder / CONFIG
    if not (checkpoint.folder / ADAPTER).exists():
        raise UserError(
            f"merge input '{checkpoint.name}' is a LoRA adapter without {ADAPTER} ({checkpoint.folder}); "
            "only safetensors are read: save it with save_pretrained"
        )
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise UserError(f"merge input '{checkpoint.name}': {file} cannot be read ({error}); save it anew") from error
    base = checkpoint.adapts or base
    if not base or not (Path(base) / "config.json").exists():
        raise UserError(
            f"merge input '{checkpoint.name}' is a LoRA adapter of base_model_name_or_path={base!r}, which is not a "
            f"checkpoint folder here; download it and name its folder in {file}"
        )
    return Checkpoint(f"base model of {checkpoint.name}", Path(base))


def merge_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Write the adapter's model as a full fp32 checkpoint, so that the merge's rounding stays the only one."""
    from peft import PeftModel

    base = base_of(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        base.folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    try:
        model = PeftModel.from_pretrained(model, str(checkpoint.folder), local_files_only=True).merge_and_unload()
    except (ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"merge input '{checkpoint.name}': peft cannot merge the adapter into {base.folder} ({reason}); "
            "check that it was trained on this model"
        ) from error
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop(HEAD, None)
    folder.mkdir(parents=True)
    save_torch_state_dict(state, folder)
    config = f"config.json{PART}"
    shutil.copyfile(base.folder / base.config_file, folder / config)
    # The tokenizer it was trained with, where it has one.
    tokenizer = checkpoint.folder if (checkpoint.folder / "tokenizer.json").exists() else base.folder
    copy_files(base.folder, folder, ("generation_config.json",))
    copy_files(tokenizer, folder, DONATED)
    files = (checkpoint.folder / CONFIG, checkpoint.folder / ADAPTER, *base.weight_files)
    return Checkpoint(checkpoint.name, folder, checkpoint.weight, files, config)
