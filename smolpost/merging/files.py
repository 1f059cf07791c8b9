"""The other files of a merged folder: the base's config and tokenizer, a manifest and a model card."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smolpost.files import write_json
from smolpost.merging.checkpoint import Checkpoint

# What a tokenizer with its chat templates may consist of, and what generation and images need; what the base has of it
# is copied.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
PROCESSING = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
DONATED = (*TOKENIZER, *PROCESSING)
MANIFEST, CARD = "merge_manifest.json", "README.md"
LIBRARIES = ("smolpost", "torch", "transformers", "safetensors", "mergekit", "peft")


def copy_files(source: Path, out: Path, names: tuple[str, ...]) -> None:
    """Copy those of the files and folders that are there, readable as the umask says."""
    for name in names:
        if (source / name).is_dir():
            (out / name).mkdir(exist_ok=True)
            copy_files(source / name, out / name, tuple(file.name for file in (source / name).iterdir()))
        elif (source / name).exists():
            shutil.copyfile(source / name, out / name)


def write_config(base: Checkpoint, file: Path, dtype: str, changes: dict[str, Any]) -> None:
    """Write the base's configuration with another dtype and with `changes`: dotted key -> value."""
    config = json.loads((base.folder / base.config_file).read_text(encoding="utf-8"))
    # transformers wrote torch_dtype before version 5.
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = dtype
    for key, value in changes.items():
        *parts, last = key.split(".")
        place = config
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
    write_json(file, config)


def versions() -> dict[str, str]:
    """Library -> installed version."""
    return {name: version(name) for name in LIBRARIES}


def write_card(folder: Path, manifest: dict[str, Any]) -> None:
    """A model card: which checkpoints, how they count; no path of this machine."""
    inputs, method, dtype = manifest["inputs"], manifest["method"], manifest["dtype"]
    if "correctly_rounded" in manifest:
        title, first = "Linear merge", f"Weighted mean of {len(inputs)} checkpoints, summed in fp32"
    else:
        title = f"Merge by {method}"
        start = f", from {manifest['base_model']}" if manifest["base_model"] else ""
        drawn = "" if manifest["seed"] is None else f", random seed {manifest['seed']}"
        first = f"{len(inputs)} checkpoints merged by mergekit's {method}{start}{drawn}"
    merges = [entry["name"] for entry in manifest.get("documents", [])]
    if merges:
        first += f" (made by merges before: {', '.join(merges)}; see `documents` in `{MANIFEST}`)"
    rows = [f"| {entry['name']} | {_counts_for(entry)} |" for entry in inputs]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [merge, smolpost]",
        "---",
        f"# {title}",
        "",
        f"{first} and rounded once to {dtype}." if "correctly_rounded" in manifest else f"{first}; written in {dtype}.",
        f"From {manifest['base']}: {', '.join(manifest['donated'])}.",
        "",
        f"| input | {'weight' if 'weight' in inputs[0] else 'parameters'} |",
        "|---|---|",
        *rows,
        "",
        f"`{MANIFEST}` holds the SHA-256 of every input and output file, the checks that were made, and versions.",
    ]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _counts_for(entry: dict[str, Any]) -> str:
    """What the card says of an input: its weight, or its parameters."""
    if "weight" in entry:
        return f"{entry['weight']:.9g}"
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in entry["parameters"].items())
