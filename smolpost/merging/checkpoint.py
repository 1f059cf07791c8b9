"""A checkpoint folder as a merge reads it: tensors by their safetensors headers and in chunks, config, vocabulary."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig

from smolpost.errors import UserError

# Elements read at a time: small enough for the fp64 temporaries of the verification to stay in the CPU's cache.
CHUNK = 2**17

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    """What a safetensors header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, BF16, ...


@dataclass(frozen=True)
class Checkpoint:
    """A named checkpoint folder; each part is read when first asked for.

    Every property raises UserError where the part is missing or cannot be read.
    """

    name: str  # in messages and reports
    folder: Path
    weight: float = 1.0  # in the merge

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Tensor name -> header entry, from the single file or from every shard of the index."""
        found = {}
        for file in self._weight_files():
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - not a dict
                        entry = opened.get_slice(name)
                        found[name] = Tensor(file, tuple(entry.get_shape()), entry.get_dtype())
            except (OSError, SafetensorError) as error:
                raise self._unreadable(file, error) from error
        if self._index:
            wrong = sorted(n for n, f in self._index.items() if n not in found or found[n].file.name != f)
            if wrong:
                raise UserError(
                    f"merge input '{self.name}': {INDEX} places tensor {wrong[0]} in {self._index[wrong[0]]}, which "
                    f"does not hold it ({self.folder}); copy or save the checkpoint anew"
                )
        return found

    @cached_property
    def _index(self) -> dict[str, str]:
        """Tensor name -> shard's file name; empty where the weights are one file."""
        single, index = self.folder / WEIGHTS, self.folder / INDEX
        if single.exists() and index.exists():
            # transformers reads the single file, mergekit the shards.
            raise UserError(
                f"merge input '{self.name}' holds both {WEIGHTS} and {INDEX} ({self.folder}), which may be different "
                "weights; delete the stale one"
            )
        return self._json(index)["weight_map"] if index.exists() else {}

    def _weight_files(self) -> list[Path]:
        if self._index:
            return sorted({self.folder / shard for shard in self._index.values()})
        if (self.folder / WEIGHTS).exists():
            return [self.folder / WEIGHTS]
        if (self.folder / "adapter_config.json").exists():
            raise UserError(
                f"merge input '{self.name}' is a LoRA adapter ({self.folder}); "
                "merge it into its model first (peft's merge_and_unload, then save_pretrained)"
            )
        raise UserError(
            f"merge input '{self.name}' has neither {WEIGHTS} nor {INDEX} ({self.folder}); "
            "only safetensors are read: save it with save_pretrained"
        )

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json with the model class's defaults filled in, so that two spellings of one model are equal."""
        file = self.folder / "config.json"
        self._json(file)
        try:
            return AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False).to_dict()
        except (OSError, ValueError, StrictDataclassError) as error:
            raise self._unreadable(file, error) from error

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id of tokenizer.json, added tokens included."""
        file = self.folder / "tokenizer.json"
        self._json(file)
        return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)

    def chunks(self, tensor: str) -> Iterator[torch.Tensor]:
        """The flattened values of one tensor, at most CHUNK of them at a time, in the stored dtype."""
        with safe_open(self.tensors[tensor].file, "pt") as opened:
            yield from opened.get_tensor(tensor).flatten().split(CHUNK)

    def _json(self, file: Path) -> dict[str, Any]:
        """A JSON file of this folder."""
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._unreadable(file, error) from error

    def _unreadable(self, file: Path, error: Exception) -> UserError:
        """The error for a file that is missing or broken."""
        if not file.exists():
            return UserError(
                f"merge input '{self.name}' has no {file.name} ({self.folder}); save it with save_pretrained"
            )
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return UserError(f"merge input '{self.name}': {file} cannot be read ({reason}); save the checkpoint anew")


def is_finite(values: torch.Tensor) -> bool:
    """Whether no element of a non-empty tensor is NaN or infinite."""
    # aminmax passes NaN on and is an order of magnitude faster than isfinite.
    low, high = values.aminmax()
    return bool(low.isfinite() & high.isfinite())
