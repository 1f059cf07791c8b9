"""A finished stage to a target: first what would be written, then all of it or nothing that loads."""

from collections.abc import Iterator
from pathlib import Path

import smolpost.stages  # noqa: F401  registers the kinds
from smolpost.errors import UserError
from smolpost.publish.dataset import dataset_package, is_dataset
from smolpost.publish.filesystems import FolderPlace
from smolpost.publish.hub import URLS, HubPlace
from smolpost.publish.model import CONFIG, model_package
from smolpost.publish.package import Package, manifest_of
from smolpost.publish.targets import Place, is_there
from smolpost.registry import STAGE_KINDS


def package(
    folder: Path,
    target: str | None = None,
    *,
    with_provenance: bool = True,
    license_id: str | None = None,
    card_file: Path | None = None,
) -> Package:
    """What is published of a finished folder.

    Args:
        target: Where it will lie; None where that is not known.
        with_provenance: For synthetic data: also what the teachers replied, word by word.
        license_id: For the card's header; None: what the card says.
        card_file: A card to take the place of the one that smolpost writes.
    Raises:
        UserError: The folder is not finished, its files have changed, or it holds nothing to publish.
    """
    manifest = manifest_of(folder)
    settings = {"license_id": license_id, "card_file": card_file}
    if is_dataset(folder):
        return dataset_package(folder, manifest, with_provenance=with_provenance, **settings)
    kind = STAGE_KINDS.get(manifest.get("kind"))
    if not (folder / CONFIG).is_file() or (kind and not kind.MAKES_MODEL):
        raise UserError(
            f"{folder} is of kind {manifest.get('kind')}, which makes neither a trained model nor synthetic data; name "
            "another stage's folder"
        )
    if not with_provenance:
        raise UserError(f"--no-provenance is for synthetic data, and {folder} holds a model; leave it out")
    return model_package(folder, manifest, target=_hub_id(target), **settings)


def place_of(target: str, package: Package, *, public: bool = False) -> Place:
    """Where the package goes.

    Args:
        target: A name on the Hub (OWNER/NAME), or a URL of fsspec (s3://BUCKET/FOLDER, file:///FOLDER).
        public: A new repository of the Hub is open to all.
    Raises:
        UserError: It cannot be a target, or not one of this package.
    """
    prefix = URLS[package.repo_type]
    if "://" not in target and Path(target).exists():
        raise UserError(
            f"{target} is a file or folder here; write file://{Path(target).absolute()}, or {prefix}{target} for the "
            f"{package.repo_type} of that name on the Hub"
        )
    identity = _hub_id(target)
    if identity is None:
        if public:
            raise UserError(f"--public is for the Hub; {target} has its own permissions; leave it out")
        return FolderPlace(target.rstrip("/"))
    if "://" in target and target != f"{prefix}{identity}":
        raise UserError(f"{target} is not for a {package.repo_type}; write {prefix}{identity}")
    return HubPlace(identity, package.repo_type, public)


def _hub_id(target: str | None) -> str | None:
    """OWNER/NAME of a target on the Hub."""
    if target is None or ("://" in target and not target.startswith("hf://")):
        return None
    return target.removeprefix("hf://").removeprefix("datasets/" if "://" in target else "")


def push(package: Package, place: Place, *, replace: bool = False) -> str:
    """Put the package there.

    Args:
        replace: In the place of another one that was pushed there.
    Returns:
        What was written and where, in one line.
    Raises:
        UserError: The place holds something else, or it cannot be written.
    """
    found = place.look()
    line = f"{place.url}: {package.summary} ({', '.join(package.files)})"
    if is_there(package, found, place.url, replace):
        return f"{line}, as before"
    place.write(package, found)
    return f"{line}; {place.access}" if place.access else line


def check(package: Package, place: Place, *, replace: bool = False) -> str:
    """What a push would do there, in one line; nothing is written.

    Raises:
        UserError: As `push`.
    """
    found = place.look()
    if is_there(package, found, place.url, replace):
        return f"{place.url} holds this already; --yes would write nothing"
    return f"{place.url} {'holds another push, which --yes would replace' if found.names else 'is empty'}"


def described(folder: Path, package: Package, place: Place) -> Iterator[str]:
    """What a push would write, line by line."""
    yield f"what      {package.summary}"
    yield f"from      {folder}"
    yield f"to        {place.what} {place.url}{f', {place.access}' if place.access else ''}"
    sizes = {name: entry["bytes"] for name, entry in package.stated["files"].items()}
    for name, size in sizes.items():
        yield f"{'file' if name == next(iter(sizes)) else '':10}{size:>15,} bytes  {name}"
    yield f"{'in all':10}{sum(sizes.values()):>15,} bytes in {len(sizes)} files"
    if package.left_out:
        yield f"left out  {', '.join(package.left_out)}"
    for note in package.notes:
        yield f"note      {note}"
    yield ""
    yield package.card.rstrip("\n")
    yield ""
