"""MLX through mlx-lm's converter; runs on Apple machines, and with `mlx[cpu]` on Linux."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from smolpost.export.folder import ExportSource, stage

TOOLS = ("mlx", "mlx-lm")


def obstacle(source: ExportSource) -> str:
    """What mlx-lm would run in another way, whatever its folder says; "" for nothing."""
    if source.config.rope_parameters["rope_type"] == "longrope":
        return "rope_type=longrope has mlx-lm stretch short contexts, too (yarn, linear and llama3 work)"
    if "full_attention" not in source.config.layer_types:
        return "layer_types has no layer with full attention, without which mlx-lm does not start"
    return ""


def convert(source: ExportSource, out: Path) -> str:
    """Write weights in mlx-lm's layout into `out`, which it makes; returns their dtype, the checkpoint's."""
    from mlx_lm.convert import convert as mlx_convert

    out.rmdir()
    with contextlib.redirect_stdout(io.StringIO()):
        # What it is given must hold the old spelling of RoPE already: it converts the model that it reads.
        mlx_convert(str(stage(source, out.parent / "source")), str(out))
    (out / "README.md").unlink(missing_ok=True)  # a card that calls every model English
    return source.dtype


class MlxSession:
    """The folder as mlx-lm loads it."""

    def __init__(self, folder: Path, config: Any, max_tokens: int):
        from mlx_lm.utils import load

        self._model, tokenizer = load(str(folder))
        self.stop_tokens = set(tokenizer.eos_token_ids)
        self.reset()

    def reset(self) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self._cache = make_prompt_cache(self._model)

    def feed(self, ids: list[int]) -> np.ndarray:
        import mlx.core as mx

        return np.array(self._model(mx.array([ids]), cache=self._cache)[0].astype(mx.float32))
