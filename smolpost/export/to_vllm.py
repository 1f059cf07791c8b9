"""A checkpoint folder that vLLM, SGLang, transformers 4 and transformers 5 read in the same way.

vLLM and SGLang run SmolLM3 through transformers' own model, in the version that they install. The weights do not
change; config and tokenizer are written in both spellings.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.models.smollm3 import SmolLM3Config, SmolLM3ForCausalLM

from smolpost.errors import UserError
from smolpost.export.folder import ExportSource
from smolpost.export.session import TorchSession
from smolpost.inference.generation import stored_stop_token_ids
from smolpost.merging.checkpoint import HEAD
from smolpost.merging.placed import place_weights

TOOLS = ("safetensors", "tokenizers")


def obstacle(source: ExportSource) -> str:
    """What vLLM would run in another way, whatever its folder says; "" for nothing."""
    if source.config.rope_parameters["rope_type"] == "longrope":
        return "rope_type=longrope changes with the length, and cached keys do not (yarn, linear and llama3 work)"
    return ""


def convert(source: ExportSource, out: Path) -> str:
    """Copy the weights into the folder `out`; returns their dtype."""
    place_weights(source.folder, out, link=False)
    return source.dtype


class VllmSession(TorchSession):
    """Transformers' own model as vLLM builds and fills it, which transformers 5 would do otherwise.

    The new spelling is hidden from it. A tied head is the embedding, whatever else the files hold; every parameter
    comes from a tensor of its own name.
    """

    def __init__(self, folder: Path, config: Any, max_tokens: int):
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        old = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
        dtype = getattr(torch, old.pop("torch_dtype"))
        config = SmolLM3Config(**old)
        state = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        if config.tie_word_embeddings:
            state.pop(HEAD, None)
        model, loading = SmolLM3ForCausalLM.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
        if missing := sorted(loading["missing_keys"]):
            raise UserError(f"{folder} holds no {missing[0]} ({len(missing)} such), and vLLM does not start without it")
        own = AutoTokenizer.from_pretrained(folder).eos_token_id
        super().__init__(model, {*stored_stop_token_ids(folder), own} - {None})
