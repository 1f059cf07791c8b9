"""A checkpoint folder as it lies on disk: its configuration, read in one way, and what its safetensors headers say."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from smolpost.errors import UserError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What torch.compile, FSDP and activation checkpointing put into a module's name, at any depth.
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What DDP, DeepSpeed and Lightning, and peft without an adapter left, put in front of all names.
_PREFIXES = ("module.", "_forward_module.", "base_model.model.")


@dataclass(frozen=True)
class Tensor:
    """What a safetensors header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, BF16, ...

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_config(file: Path, who: str = "checkpoint") -> PreTrainedConfig:
    """The configuration of a config.json, under any name, with the model class's defaults filled in.

    Args:
        who: The checkpoint in messages.
    Raises:
        UserError: The file is missing or broken, or says one thing in two ways that differ.
    """
    if not file.exists() and (file.parent / ADAPTER_CONFIG).exists():
        raise UserError(f"{who} {_lack_of_weights(file.parent)}")
    check_rope(read_json(file, who), file, who)
    try:
        return AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise unreadable(file, error, who) from error


def read_json(file: Path, who: str = "checkpoint") -> dict[str, Any]:
    """A JSON file of a checkpoint.

    Raises:
        UserError: It is missing or broken.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(file, error, who) from error


def unreadable(file: Path, error: Exception, who: str) -> UserError:
    """The error for a file that is missing or broken."""
    if not file.exists():
        return UserError(f"{who} has no {file.name} ({file.parent}); save it with save_pretrained")
    return UserError(f"{who}: {file} cannot be read ({one_line(error)}); save the checkpoint anew")


def one_line(error: Exception) -> str:
    """What another library's error says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def check_rope(config: dict[str, Any], file: Path, who: str) -> None:
    """Refuse a file whose spellings of RoPE differ: each library reads another one of them."""
    for part in (config, *(value for key, value in config.items() if key.endswith("_config"))):
        if not isinstance(part, dict):
            continue
        rope = part.get("rope_parameters") or {}
        # Some models have parameters for each type of layer; the top-level theta is that of full attention.
        rope = rope.get("full_attention", rope)
        stated = {
            "rope_theta": part.get("rope_theta"),
            "rope_parameters.rope_theta": (rope or {}).get("rope_theta"),
            "rope_scaling.rope_theta": (part.get("rope_scaling") or {}).get("rope_theta"),
        }
        _check_equal({name: value for name, value in stated.items() if value is not None}, file, who)
        if rope and part.get("rope_scaling"):
            forms = {"rope_scaling": part["rope_scaling"], "rope_parameters": rope}
            _check_equal({name: rope_form(form) for name, form in forms.items()}, file, who)


def _check_equal(stated: dict[str, Any], file: Path, who: str) -> None:
    first = next(iter(stated), None)
    for other in stated:
        if stated[other] != stated[first]:
            raise UserError(
                f"{who}: {first}={stated[first]} and {other}={stated[other]} in {file} differ, and each is read by "
                f"some tool; write the same value in both, or leave {first} out"
            )


def rope_form(rope: dict[str, Any]) -> dict[str, Any]:
    """RoPE's parameters without their theta, in one spelling: `type` is the old name of `rope_type`."""
    form = {key: value for key, value in rope.items() if key not in ("type", "rope_theta") and value is not None}
    return form | {"rope_type": rope.get("rope_type") or rope.get("type") or "default"}


def weight_files(folder: Path, who: str = "checkpoint") -> list[Path]:
    """The safetensors files that hold a model's weights.

    Raises:
        UserError: There are none, one that the index names is missing, or it is not clear which are meant.
    """
    single, index, adapter = folder / WEIGHTS, folder / INDEX, folder / ADAPTER_CONFIG
    if single.exists() and index.exists():
        # transformers reads the single file, mergekit the shards.
        raise UserError(
            f"{who} holds both {WEIGHTS} and {INDEX} ({folder}), which may be different weights; delete the stale one"
        )
    if adapter.exists() and (single.exists() or index.exists()):
        # transformers puts the adapter on top of the weights, all else reads them without it.
        raise UserError(
            f"{who} holds both a model and {ADAPTER_CONFIG} ({folder}); delete {ADAPTER_CONFIG} if the adapter is in "
            "the weights, else move the adapter to a folder of its own"
        )
    if single.exists():
        return [single]
    if index.exists():
        files = sorted({folder / shard for shard in shards_of(folder, who).values()})
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{who} lacks {missing[0]}, which {INDEX} names ({folder}); copy the checkpoint again")
        return files
    raise UserError(f"{who} {_lack_of_weights(folder)}")


def _lack_of_weights(folder: Path) -> str:
    """What is there in place of weights, and the remedy."""
    if (folder / ADAPTER_CONFIG).exists():
        return f"is a LoRA adapter ({folder}); merge it into its model first: smolpost merge OUT {folder}=1"
    if shards := list(folder.glob("model-*-of-*.safetensors")):
        return f"has {len(shards)} shards and no {INDEX} ({folder}); copy the index, or the checkpoint again"
    if pickled := sorted(folder.glob("pytorch_model*.bin")):
        return (
            f"has its weights in {pickled[0].name} ({folder}); only safetensors are read: load it where it is trusted "
            "and save it with save_pretrained"
        )
    return f"has neither {WEIGHTS} nor {INDEX} ({folder}); only safetensors are read: save it with save_pretrained"


def shards_of(folder: Path, who: str = "checkpoint") -> dict[str, str]:
    """Tensor name -> shard's file name by the index; empty where the weights are one file."""
    if not (folder / INDEX).exists():
        return {}
    places = read_json(folder / INDEX, who).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{who}: {folder / INDEX} has no weight_map; copy the index, or the checkpoint again")
    return places


def stored_tensors(folder: Path, who: str = "checkpoint") -> dict[str, Tensor]:
    """Tensor name -> header entry, of the single file or of every shard of the index.

    Raises:
        UserError: A file is missing, cut short or not where the index says.
    """
    found = {}
    for file in weight_files(folder, who):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    if name in found:
                        twice = f"{found[name].file.name} and {file.name}"
                        raise UserError(f"{who} holds tensor {name} twice, in {twice} ({folder}); copy it again")
                    entry = opened.get_slice(name)
                    found[name] = Tensor(file, tuple(entry.get_shape()), entry.get_dtype())
        except (OSError, SafetensorError) as error:
            raise unreadable(file, error, who) from error
    index = shards_of(folder, who)
    wrong = sorted(name for name, file in index.items() if name not in found or found[name].file.name != file)
    if wrong:
        raise UserError(
            f"{who}: {INDEX} places tensor {wrong[0]} in {index[wrong[0]]}, which does not hold it ({folder}); copy or "
            "save the checkpoint anew"
        )
    return found


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile, FSDP and activation checkpointing have put into it."""
    return _WRAPPERS.sub("", name)


def renames(stored: Iterable[str]) -> dict[str, str]:
    """Stored name -> plain name, where torch.compile, DDP, FSDP or peft have put something into names by wrapping.

    Empty where two names would become one, or where adapters are among the tensors.
    """
    plain = {name: plain_name(name) for name in stored}
    if any(".lora_" in name for name in plain):
        return {}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in plain.values()):
            plain = {name: shorter.removeprefix(prefix) for name, shorter in plain.items()}
    if len(set(plain.values())) < len(plain):
        return {}
    return {name: shorter for name, shorter in plain.items() if shorter != name}
