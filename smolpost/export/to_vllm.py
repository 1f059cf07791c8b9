"""A checkpoint folder that every loader of the family reads alike: vLLM, SGLang, transformers 4 and 5.

vLLM and SGLang run SmolLM3 through transformers' own model, of whichever version they came with. The weights stay as
they are; config and tokenizer are written in both spellings.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.models.smollm3 import SmolLM3Config, SmolLM3ForCausalLM

from smolpost.export.folder import Source
from smolpost.export.session import TorchSession
from smolpost.model.stored import INDEX

TOOLS = ("safetensors", "tokenizers")


def convert(source: Source, out: Path) -> str:
    """Copy the weights into the folder `out`; returns their dtype."""
    index = [source.folder / INDEX] if (source.folder / INDEX).is_file() else []
    for file in [*source.weight_files, *index]:
        shutil.copyfile(file, out / file.name)
    return source.dtype


class VllmSession(TorchSession):
    """Transformers' own model, built from what an older loader understands: the new spelling is hidden from it."""

    def __init__(self, folder: Path, config: Any, max_tokens: int):
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        old = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
        dtype = getattr(torch, old.pop("torch_dtype"))
        super().__init__(SmolLM3ForCausalLM.from_pretrained(folder, config=SmolLM3Config(**old), dtype=dtype))
