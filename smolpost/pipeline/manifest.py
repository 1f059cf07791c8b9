"""What a finished folder says of itself, and how a folder becomes finished.

A stage's folder is finished when it holds `manifest.json`, which is written last and atomically. Folders that are
made in one go are built beside their place and renamed into it; folders that can be resumed (training, pairs) grow in
place and get their manifest at the end.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

from smolpost.errors import UserError
from smolpost.files import MANIFEST, hashes, stamp, write_json
from smolpost.pipeline.code import versions


def read(folder: Path) -> dict | None:
    """The folder's manifest, or None where it has none: the folder is unfinished.

    Raises:
        UserError: The file is there and cannot be read as a manifest.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text())
        manifest["key"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not a manifest; remove {folder} and run its stage again") from None
    return manifest


def write(folder: Path, files: dict[str, dict] | None = None, **fields) -> dict:
    """Finish the folder: the manifest is complete on disk or not there at all.

    Args:
        files: `hashes` of the folder, where they are known.
    """
    files = hashes(folder) if files is None else files
    manifest = {
        **fields,
        "files": files,
        "versions": versions(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    stamp(folder, files)
    write_json(folder / MANIFEST, manifest)
    return manifest
