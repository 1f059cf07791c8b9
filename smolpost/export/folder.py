"""What every export shares: the checkpoint in a form that all readers accept, the new folder, its manifest.

An export appears in one rename, scored and complete, or not at all. Until then it is in a hidden folder beside it.
The next export into the same folder removes what a killed export left.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from smolpost.errors import UserError
from smolpost.files import hashed, sync, verify, workplace, write_json
from smolpost.merging.files import DONATED, copy_files
from smolpost.merging.placed import place_weights
from smolpost.model import SmolLM3Config
from smolpost.model.loading import check_plain
from smolpost.model.stored import read_config, weight_files

MANIFEST = "export_manifest.json"
LIBRARIES = ("smolpost", "torch", "transformers")


@dataclass(frozen=True)
class ExportSource:
    """A checkpoint folder to export; parts are read when first asked for."""

    folder: Path

    @cached_property
    def config(self) -> SmolLM3Config:
        """
        Raises:
            UserError: There is no readable SmolLM3 configuration.
        """
        file = self.folder / "config.json"
        config = read_config(file)
        if not isinstance(config, SmolLM3Config):
            raise UserError(
                f"{file}: model_type={config.model_type} is not exported; only smollm3 is; vLLM, SGLang and "
                "transformers serve the folder as it is"
            )
        return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """
        Raises:
            UserError: The folder has none; without it the export could not be scored.
        """
        if not (self.folder / "tokenizer.json").is_file():
            raise UserError(f"{self.folder} has no tokenizer.json; save the tokenizer beside the weights")
        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files, from which the model loads completely and under its own names.

        Raises:
            UserError: Files are missing, do not have all of the model, or differ from those that were written.
        """
        verify(self.folder)
        files = weight_files(self.folder)
        check_plain(self.folder, self.config)
        return files

    @property
    def dtype(self) -> str:
        """dtype of the weights, such as "bfloat16"."""
        return str(self.config.dtype or "float32").removeprefix("torch.")

    @property
    def nope_layers(self) -> list[int]:
        """Numbers of the layers without RoPE, from 0."""
        return [i for i in range(self.config.num_hidden_layers) if not self.config.no_rope_layers[i]]


def portable_config(source: ExportSource) -> dict[str, Any]:
    """config.json for readers of either generation.

    transformers 5 writes `rope_parameters` alone. Older versions, mlx-lm and others read `rope_theta` and
    `rope_scaling`; where those are missing, mlx-lm takes 10000 and no scaling without a word. So both spellings are
    written, `dtype` too in both, and one `no_rope_layers` entry per layer, as mlx-lm wants. It and vLLM take a sliding
    window from `layer_types` alone.
    """
    config = source.config
    rope = dict(config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    written = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    return written | {
        "dtype": source.dtype,
        "torch_dtype": source.dtype,
        "no_rope_layers": config.no_rope_layers[: config.num_hidden_layers],
        "layer_types": config.layer_types,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }


def portable_tokenizer_config(source: ExportSource) -> dict[str, Any]:
    """tokenizer_config.json for readers of either generation.

    transformers 4 does not know the class that transformers 5 writes, and older ones no chat template outside of this
    file; both versions know the class and the key written here.
    """
    file = source.folder / "tokenizer_config.json"
    written = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if written.get("tokenizer_class") in (None, "TokenizersBackend"):
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
    # transformers 4 calls the list by its old name; under the new one it expects a mapping.
    if isinstance(written.get("extra_special_tokens"), list):
        written["additional_special_tokens"] = written.pop("extra_special_tokens")
    if isinstance(source.tokenizer.chat_template, str):  # several are carried as files
        written["chat_template"] = source.tokenizer.chat_template
    return written


def carry(source: ExportSource, out: Path) -> None:
    """Write config, tokenizer, chat template and generation defaults into a folder, over what is there.

    Called last, after any converter: what converters write of these files follows their own ideas.
    """
    copy_files(source.folder, out, DONATED)
    write_json(out / "tokenizer_config.json", portable_tokenizer_config(source))
    write_json(out / "config.json", portable_config(source))


def stage(source: ExportSource, folder: Path) -> Path:
    """The checkpoint under `folder` as a converter shall read it: our config and tokenizer, the weights."""
    folder.mkdir()
    carry(source, folder)
    place_weights(source.folder, folder, link=True)
    return folder


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """A hidden work folder beside `out`; its subfolder "out" takes the place of `out` when the block ends well.

    Raises:
        UserError: `out` is a file, or a folder with something in it, or another process is making it.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; remove it or name another")
    with workplace(out) as work:
        yield work
        for file in (work / "out").rglob("*"):
            # safetensors writes for the owner only.
            file.chmod(0o755 if file.is_dir() else 0o644)
            sync(file)
        sync(work / "out")
        os.replace(work / "out", out)
        sync(out.parent)


def write_manifest(source: ExportSource, out: Path, kind: str, tools: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """export_manifest.json: what was made of what, by which tools; files by name, so that it tells no path.

    Args:
        kind: The format.
        tools: Names of the packages that converted and scored.
        more: Further entries, e.g. the check's numbers.
    Returns:
        What was written.
    """

    inputs = [source.folder / name for name in ("config.json", *DONATED) if (source.folder / name).is_file()]
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    manifest = {
        "format": kind,
        "rope_theta": config["rope_theta"],
        "rope_parameters": config["rope_parameters"],
        "no_rope_layers": config["no_rope_layers"],
        **more,
        "inputs": hashed([*inputs, *source.weight_files], source.folder),
        "files": hashed(sorted(file for file in out.rglob("*") if file.is_file()), out),
        "versions": {name: _version(name) for name in (*LIBRARIES, *tools)},
    }
    write_json(out / MANIFEST, manifest)
    return manifest


def _version(package: str) -> str | None:
    """None for a tool that is a folder and not an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
