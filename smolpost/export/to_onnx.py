"""ONNX through torch's exporter: one graph with a key-value cache, for onnxruntime and what builds on it.

Names and layout of inputs and outputs are those that Optimum and transformers.js give a decoder.
Shapes: B rows, L new tokens, P past ones, S = P + L, K key heads, D head size, V vocabulary.
"""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from smolpost.export.folder import ExportSource
from smolpost.inference.generation import stored_stop_token_ids
from smolpost.model.layers_smollm3 import head_size
from smolpost.model.loading import load_model

FILE = "model.onnx"
TOOLS = ("onnx", "onnxscript", "onnxruntime")
# Weights of more bytes go to a file beside the graph: a protobuf message ends at 2 GiB.
INLINE_BYTES = 2**30


def obstacle(source: ExportSource) -> str:
    """What the exported graph would leave out of the model; "" for nothing."""
    if source.config.use_sliding_window:
        return "use_sliding_window=true is not carried to ONNX"
    if (rope := source.config.rope_parameters["rope_type"]) in ("dynamic", "longrope"):
        return f"rope_type={rope} changes with the length, which an ONNX graph cannot (yarn, linear and llama3 work)"
    return ""


def convert(source: ExportSource, out: Path) -> str:
    """Write the graph into the folder `out`; returns the dtype of its weights, fp32 whatever the checkpoint's."""
    model = load_model(source.folder, dtype=torch.float32, attn_implementation="eager").eval()
    config = model.config
    rows, new, past = 2, 3, 4  # any sizes except 0 and 1, which the exporter treats as constants
    caches = [
        torch.zeros(rows, config.num_key_value_heads, past, head_size(config))
        for _ in range(2 * config.num_hidden_layers)
    ]
    ids = torch.zeros(rows, new, dtype=torch.long)
    mask = torch.ones(rows, past + new, dtype=torch.long)
    places = torch.arange(past, past + new).expand(rows, -1)
    row, step = {0: "batch_size"}, {0: "batch_size", 1: "sequence_length"}
    inputs = cache_names(config.num_hidden_layers, "past_key_values")
    # The exporter prints its progress, deprecations inside torch, and missing packages.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Decoder(model),
            (ids, mask, places, caches),
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask", "position_ids", *inputs],
            output_names=["logits", *cache_names(config.num_hidden_layers, "present")],
            dynamic_shapes=(
                step,
                row | {1: "total_sequence_length"},
                step,
                [row | {2: "past_sequence_length"}] * len(caches),
            ),
        )
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    program.save(out / FILE, external_data=size > INLINE_BYTES)
    return "float32"


def cache_names(num_layers: int, stem: str) -> list[str]:
    return [f"{stem}.{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")]


class _Decoder(nn.Module):
    """The model with a cache of plain tensors, and a mask that is arithmetic rather than a choice in Python."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """input_ids, position_ids [B, L]; attention_mask [B, S]; past [B, K, P, D] each -> logits [B, L, V], caches."""
        cache = DynamicCache(config=self.model.config)
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        num_new, total = input_ids.shape[1], attention_mask.shape[1]
        places = torch.arange(num_new)[:, None] + (total - num_new)
        visible = (torch.arange(total)[None] <= places) & attention_mask[:, None, None].bool()  # [B, 1, L, S]
        bias = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
        output = self.model(
            input_ids=input_ids,
            attention_mask=bias,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, *(part for layer in cache.layers for part in (layer.keys, layer.values))


class OnnxSession:
    """The graph in onnxruntime on a CPU."""

    def __init__(self, folder: Path, config: Any, max_tokens: int):
        import onnxruntime

        self.stop_tokens = set(stored_stop_token_ids(folder))
        self._run = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"]).run
        self._names = cache_names(config.num_hidden_layers, "past_key_values")
        self._empty = np.zeros((1, config.num_key_value_heads, 0, head_size(config)), np.float32)
        self.reset()

    def reset(self) -> None:
        self._cache, self._seen = [self._empty] * len(self._names), 0

    def feed(self, ids: list[int]) -> np.ndarray:
        end = self._seen + len(ids)
        logits, *self._cache = self._run(
            None,
            {
                "input_ids": np.array([ids], np.int64),
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(self._seen, end, dtype=np.int64)[None],
                **dict(zip(self._names, self._cache, strict=True)),
            },
        )
        self._seen = end
        return logits[0]
