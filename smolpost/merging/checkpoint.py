"""A checkpoint folder as a merge reads it: tensors by their safetensors headers and in chunks, config, vocabulary."""

import json
import math
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
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Tensor:
    """What a safetensors header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, BF16, ...

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A named checkpoint folder; each part is read when first asked for.

    Every property raises UserError where the part is missing or cannot be read.
    """

    name: str  # in messages and reports
    folder: Path
    weight: float = 1.0  # in the merge
    sources: tuple[Path, ...] = ()  # the files it was made of, where it is a merged adapter
    config_file: str = "config.json"  # another name keeps loaders off a draft
    adapts: Path | None = None  # the model that an adapter is put on; None: the one that its own config names

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Tensor name -> header entry, from the single file or from every shard of the index.

        The head of a tied model, which some trainers write, is left out: `tied_copy`.
        """
        return {name: tensor for name, tensor in self._stored.items() if name != self.tied_copy}

    @cached_property
    def tied_copy(self) -> str | None:
        """Name of the head where the files hold it though it is tied to the embedding."""
        if self.config.get("tie_word_embeddings") and {HEAD, EMBEDDING} <= self._stored.keys():
            return HEAD
        return None

    @cached_property
    def _stored(self) -> dict[str, Tensor]:
        found = {}
        for file in self.weight_files:
            try:
                opened = self._open(file)
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

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files that hold the weights."""
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
        file = self.folder / self.config_file
        self._json(file)
        try:
            return AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False).to_dict()
        except (OSError, ValueError, StrictDataclassError) as error:
            raise self._unreadable(file, error) from error

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id of tokenizer.json, added tokens included."""
        file = self.folder / "tokenizer.json"
        self._json(file)
        return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """Name -> text of the chat templates; a single one is named "default"."""
        found = {}
        stored = self.folder / "tokenizer_config.json"
        templates = self._json(stored).get("chat_template") if stored.exists() else None
        if isinstance(templates, str):
            found["default"] = templates
        elif templates:
            found |= {template["name"]: template["template"] for template in templates}
        single = self.folder / "chat_template.jinja"
        if single.exists():
            found["default"] = single.read_text(encoding="utf-8")
        more = sorted((self.folder / "additional_chat_templates").glob("*.jinja"))
        return found | {file.stem: file.read_text(encoding="utf-8") for file in more}

    def values(self, tensor: str) -> torch.Tensor:
        """The flattened values of one tensor in the stored dtype, mapped: read from the disk where touched."""
        return self._open(self._stored[tensor].file).get_tensor(tensor).view(-1)

    def chunks(self, tensor: str) -> Iterator[torch.Tensor]:
        """The values of one tensor, at most CHUNK of them at a time."""
        yield from self.values(tensor).split(CHUNK)

    def _open(self, file: Path) -> safe_open:
        """The mapping of a weight file, kept as long as this checkpoint."""
        if file not in self._mappings:
            self._mappings[file] = safe_open(file, "pt")
        return self._mappings[file]

    @cached_property
    def _mappings(self) -> dict[Path, safe_open]:
        return {}

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
