"""What is published of a finished folder, whatever the stage made."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from smolpost.errors import UserError
from smolpost.files import MANIFEST, hashed, read_json, verify
from smolpost.markdown import header, replace_section, split_header

CARD = "README.md"

Content = Path | bytes
RepoType = Literal["model", "dataset"]


class Package(NamedTuple):
    """
    Attributes:
        repo_type: What it is on the Hub.
        summary: What it is, for people: "2 rows of key 1f2e".
        files: Name -> a file, or the content, in the order in which they are written: nothing loads before the last.
        stated: What lies beside the files: their key, and SHA-256 and bytes of each.
        left_out: Names in the folder that are not published.
        notes: What its owner should look at before it is published, a line each.
    """

    repo_type: RepoType
    summary: str
    files: dict[str, Content]
    stated: dict[str, Any]
    left_out: list[str]
    notes: list[str]

    @property
    def card(self) -> str:
        content = self.files[CARD]
        return content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8")


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder, whose files are those that were written.

    Raises:
        UserError: The folder is not finished, or a file is missing or has changed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name that of a stage, which `smolpost plan` shows")
    manifest = read_json(folder / MANIFEST)
    if not manifest.get("key"):
        adopt = f", or `smolpost adopt {folder}` if it is a checkpoint from elsewhere"
        remedy = f"`smolpost run` finishes its stage{adopt if (folder / 'config.json').is_file() else ''}"
        raise UserError(f"{folder} is not finished: it has no {MANIFEST}; {remedy}")
    verify(folder)
    return manifest


def packed(
    repo_type: RepoType,
    summary: str,
    folder: Path,
    manifest: dict[str, Any],
    files: Mapping[str, Content],
    facts: dict[str, Any],
    notes: Iterable[str] = (),
) -> Package:
    """The package of these files of the folder, each with its hash.

    Args:
        manifest: Of the folder: its hashes were verified, so what it lists is not read again.
        facts: What is stated beside the hashes.
    """
    listed = {name: _entry(folder, manifest["files"].get(name), content) for name, content in files.items()}
    left_out = sorted(p.name for p in folder.iterdir() if p.name not in files and not p.name.startswith("."))
    return Package(repo_type, summary, dict(files), facts | {"files": listed}, left_out, list(notes))


def as_bytes(value: dict[str, Any]) -> bytes:
    """JSON, as the files that smolpost writes."""
    return (json.dumps(value, indent=2) + "\n").encode()


def _entry(folder: Path, known: dict[str, Any] | None, content: Content) -> dict[str, Any]:
    """SHA-256 and bytes."""
    if isinstance(content, bytes):
        return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return known or next(iter(hashed([content], folder).values()))


def own_card(file: Path) -> str:
    """The card that its owner wrote.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--card {file} is not a text file in UTF-8 ({error}); `smolpost card` writes one") from None


def with_license(text: str, license_id: str | None) -> str:
    """The card with a licence in its header, by the Hub's identifier for it, such as apache-2.0."""
    if license_id is None:
        return text
    content, body = split_header(text)
    body = replace_section(body, "Licence", f"`{license_id}`, as stated by whoever published this.")
    return header({"license": license_id} | content | {"license": license_id}) + body
