"""What is published of a model: weights, configuration, tokenizer, the card, and the manifest without local paths."""

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from smolpost.files import MANIFEST, read_json
from smolpost.publish.model_card import model_card
from smolpost.publish.package import CARD, Content, Package, as_bytes, own_card, packed, with_license

CONFIG = "config.json"
# Of the files that the manifest lists at the top of the folder. Not: evaluations, checkpoints, pickles, code.
PUBLISHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
KEPT_HERE = ("merge_manifest.json", "trainer_state.json")  # the first repeats the manifest, with this machine's paths
MOST_JSON = 10**6  # bytes of a JSON file that is searched for paths: settings, not vocabularies
LOCAL_PATH = re.compile(r"(?<![\w:/.<])(?:~|/)(?:[\w.@+~=-]+/)+[\w.@+~=-]*")


def model_package(
    folder: Path,
    manifest: dict[str, Any],
    *,
    target: str | None = None,
    license_id: str | None = None,
    card_file: Path | None = None,
) -> Package:
    """
    Args:
        folder: Of a checkpoint.
        manifest: Of the folder.
        target: Where the card says that the model lies.
        card_file: The owner's card; None: `model_card`'s.
    Raises:
        UserError: The card cannot be read.
    """
    names = sorted(name for name in manifest["files"] if _is_published(name))
    text = own_card(card_file) if card_file else model_card(folder, manifest, target)
    files: dict[str, Content] = {
        CARD: with_license(text, license_id).encode(),
        MANIFEST: as_bytes(published_manifest(manifest, names)),
    }
    # Nothing loads a model without its configuration, so that comes last.
    files |= {name: folder / name for name in sorted(names, key=lambda name: name == CONFIG)}
    stage, key = manifest.get("stage", "checkpoint"), manifest["key"]
    return packed(
        "model", f"model {stage} of key {key}", folder, manifest, files, {"key": key, "stage": stage},
        [f"{name} names a path of this machine: {path}" for name in names for path in _paths_in(folder / name)],
    )  # fmt: skip


def _is_published(name: str) -> bool:
    return "/" not in name and name not in KEPT_HERE and any(fnmatch(name, pattern) for pattern in PUBLISHED)


def published_manifest(manifest: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The manifest with the entries of these files alone, and of each absolute path only its last part.

    A folder that is fetched from there is a checkpoint of the same key, whose files smolpost verifies.
    """
    return without_paths(manifest) | {"files": {name: manifest["files"][name] for name in names}}


def without_paths(value: Any) -> Any:
    """JSON-able, with .../NAME for each absolute path in its texts and names."""
    if isinstance(value, dict):
        return {without_paths(name): without_paths(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if _is_path(value):
        return f".../{Path(value).name}"
    return LOCAL_PATH.sub(lambda found: f".../{Path(found[0]).name}", value)


def _is_path(text: str) -> bool:
    """Of a file or folder, whatever characters its names have; `/think` is a word of a prompt."""
    return text.startswith(("/", "~/")) and "/" in text[1:].rstrip("/") and "\n" not in text


def _paths_in(file: Path) -> list[str]:
    if file.suffix != ".json" or file.stat().st_size > MOST_JSON:
        return []
    return sorted(set(_texts_with_paths(read_json(file))))


def _texts_with_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _texts_with_paths(entry)
    elif isinstance(value, str) and _is_path(value):
        yield value
