"""A checkpoint folder as a merge reads it: tensors by their safetensors headers and in chunks, config, vocabulary."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from smolpost.model.stored import Tensor, read_config, read_json, renames, stored_tensors, weight_files

# Elements read at a time: small enough for the fp64 temporaries of the verification to stay in the CPU's cache.
CHUNK = 2**17

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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

    @property
    def who(self) -> str:
        """In messages."""
        return f"merge input '{self.name}'"

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Tensor name -> header entry, from the single file or from every shard of the index.

        The head of a tied model, which some trainers write, is left out: `tied_copy`. Names are plain: what
        torch.compile and the like put into them is removed, here and from the result.
        """
        return {name: tensor for name, (_, tensor) in self._stored.items() if name != self.tied_copy}

    @cached_property
    def tied_copy(self) -> str | None:
        """Name of the head where the files hold it though it is tied to the embedding."""
        if self.config.get("tie_word_embeddings") and {HEAD, EMBEDDING} <= self._stored.keys():
            return HEAD
        return None

    @property
    def renamed(self) -> dict[str, str]:
        """Name in the files -> tensor name, where they differ."""
        return {name: plain for plain, (name, _) in self._stored.items() if plain != name}

    @cached_property
    def _stored(self) -> dict[str, tuple[str, Tensor]]:
        """Tensor name -> its name in the file, header entry."""
        found = stored_tensors(self.folder, self.who)
        plain = renames(found)
        return {plain.get(name, name): (name, tensor) for name, tensor in found.items()}

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files that hold the weights."""
        return weight_files(self.folder, self.who)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json with the model class's defaults filled in, so that two spellings of one model are equal."""
        return read_config(self.folder / self.config_file, self.who).to_dict()

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id of tokenizer.json, added tokens included."""
        file = self.folder / "tokenizer.json"
        read_json(file, self.who)
        return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """Name -> text of the chat templates; a single one is named "default"."""
        found = {}
        stored = self.folder / "tokenizer_config.json"
        templates = read_json(stored, self.who).get("chat_template") if stored.exists() else None
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
        name, entry = self._stored[tensor]
        return self._open(entry.file).get_tensor(name).view(-1)

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
