"""A finished stage's rows, copied to the Hub or to any file system that fsspec knows.

On the Hub all files come in one commit. Elsewhere they come one by one: first `smolpost.json`, which says that the push
has not ended, then the card, which names the file of the rows, and last the rows. So nothing loads before they are
there, and other people's files are never taken for ours.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from smolpost.errors import UserError
from smolpost.files import MANIFEST, hashed, read_json, replacing, verify
from smolpost.synthesis.card import card, without_provenance
from smolpost.synthesis.results import CARD, FAILED_ROWS, FILTERED_ROWS, REPORT
from smolpost.synthesis.row_table import PROVENANCE_ROWS, ROWS, json_text

PUSHED = "smolpost.json"  # what lies at a target: the stage's key and its files, each with its SHA-256
UNFINISHED = {"unfinished": True}  # what it says until all is there
RAW = (PROVENANCE_ROWS, FILTERED_ROWS, FAILED_ROWS)  # hold replies as the teachers gave them
ORDER = (CARD, REPORT, FAILED_ROWS, FILTERED_ROWS, PROVENANCE_ROWS, ROWS)  # in which they are written
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_URL = "hf://datasets/"


class Package(NamedTuple):
    """What is pushed.

    Attributes:
        files: Name -> a file, or the content.
        stated: What PUSHED says.
    """

    files: dict[str, Path | bytes]
    stated: dict[str, Any]


class Target(NamedTuple):
    """What lies at a target.

    Attributes:
        names: Of all files, with folders.
        stated: What its PUSHED says; {} without one.
    """

    names: list[str]
    stated: dict[str, Any]


def push(
    folder: Path, target: str, *, with_provenance: bool = True, replace: bool = False, public: bool = False
) -> str:
    """Copy rows, card, counts and provenance to the target.

    Args:
        folder: Of a finished stage of synthetic data.
        target: Dataset id on the Hub (OWNER/NAME), or a URL of fsspec (s3://BUCKET/FOLDER, file:///FOLDER).
        with_provenance: Also what the teachers replied, word by word.
        replace: Take the place of other rows that were pushed there.
        public: A new dataset of the Hub is open to all; an existing one has to be open then, and private otherwise.
    Returns:
        What was written and where, in one line.
    Raises:
        UserError: The folder is not finished, the target holds something else, or it cannot be written.
    """
    package = _package(folder, with_provenance)
    if "://" not in target and Path(target).exists():
        raise UserError(
            f"{target} is a file or folder here; write file://{Path(target).absolute()}, or {HUB_URL}{target} for the "
            "dataset of that name on the Hub"
        )
    if "://" not in target or target.startswith(HUB_URL):
        return _to_hub(package, target.removeprefix(HUB_URL), replace, public)
    if public:
        raise UserError(f"--public is for datasets on the Hub; {target} has its own permissions; leave it out")
    return _to_files(package, target.rstrip("/"), replace)


def _package(folder: Path, with_provenance: bool) -> Package:
    """
    Raises:
        UserError: The folder is not finished, or not one of synthetic data, or its files are not those written.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name that of a stage, which `smolpost plan` shows")
    if not (key := read_json(folder / MANIFEST).get("key")):
        raise UserError(f"{folder} is not finished: it has no {MANIFEST}; `smolpost run` finishes its stage")
    report = read_json(folder / REPORT)
    if "facts" not in report or not (folder / ROWS).is_file():
        raise UserError(f"{folder} holds no synthetic data: {ROWS} or {REPORT} is missing; name another stage's folder")
    verify(folder)
    names = [name for name in ORDER if with_provenance or name not in RAW]
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    # As it lies there: its owner may have added a licence.
    text = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else card(report)
    files[CARD] = content = (text if with_provenance else without_provenance(text)).encode()
    listed = hashed((file for file in files.values() if isinstance(file, Path)), folder)
    listed[CARD] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return Package(files, {"key": key, "rows": report["accepted"], "files": listed})


def _is_there(package: Package, found: Target, target: str, replace: bool, ignored: tuple[str, ...] = ()) -> bool:
    """Whether the target holds the package already.

    Args:
        ignored: Files that are there without anyone's doing.
    Raises:
        UserError: It holds something else that may not be replaced.
    """
    ours = {*ORDER, PUSHED} if found.stated else set()
    if others := [name for name in found.names if name not in ours and name not in ignored]:
        more = f" and {len(others) - 1:,} more files" if len(others) > 1 else ""
        raise UserError(f"{target} holds {others[0]}{more}, which `smolpost push` did not write; name an empty target")
    if found.stated == package.stated:
        return True
    if found.stated not in ({}, UNFINISHED) and not replace:
        raise UserError(
            f"{target} holds the rows of key {found.stated.get('key')}; --replace puts these in their place, or name "
            "another target"
        )
    return False


def _line(package: Package, where: str, what: str = "") -> str:
    names = ", ".join(package.files)
    return f"{where}: {package.stated['rows']:,} rows of key {package.stated['key']} ({names}){what}"


# ---------------------------------------------------------------- the Hub


def _to_hub(package: Package, identity: str, replace: bool, public: bool) -> str:
    import httpx2
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not HUB_ID.fullmatch(identity):
        raise UserError(
            f"{identity!r} is not a target; give a dataset id of the Hub (OWNER/NAME) or a URL such as "
            "s3://BUCKET/FOLDER or file:///FOLDER"
        )
    api = HfApi()
    url = f"{api.endpoint}/datasets/{identity}"
    try:
        found = _at_hub(api, identity, public)
        if _is_there(package, found, url, replace, ignored=(".gitattributes",)):
            return _line(package, url, ", as before")
        api.create_repo(identity, repo_type="dataset", private=not public, exist_ok=True)
        content = package.files | {PUSHED: json_text(package.stated).encode()}
        old = [name for name in found.names if name not in content and name != ".gitattributes"]
        operations = [CommitOperationAdd(name, file) for name, file in content.items()]
        operations += [CommitOperationDelete(name) for name in old]
        message = f"smolpost push {package.stated['key']}"
        api.create_commit(identity, operations, commit_message=message, repo_type="dataset")
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError) as error:
        raise UserError(
            f"{url} cannot be written ({' '.join(str(error).split())}); check the name, HF_TOKEN (it needs to write) "
            "and the network; nothing was added"
        ) from None
    return _line(package, url, "; open to all" if public else "; private")


def _at_hub(api, identity: str, public: bool) -> Target:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.dataset_info(identity)
    except RepositoryNotFoundError:
        return Target([], {})
    if info.private == public:
        raise UserError(
            f"{identity} is {'private' if info.private else 'open to all'} on the Hub; "
            + ("leave --public out" if public else "--public writes to it all the same, or name another dataset")
        )
    names = [file.rfilename for file in info.siblings or []]
    stated = {}
    if PUSHED in names:
        file = api.hf_hub_download(identity, PUSHED, repo_type="dataset", revision=info.sha)
        stated = read_json(Path(file))
    return Target(names, stated)


# ---------------------------------------------------------------- file systems


def _to_files(package: Package, target: str, replace: bool) -> str:
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(target)
    except (ValueError, ImportError) as error:  # an unknown scheme, or its package is not installed
        raise UserError(f"{target} cannot be opened ({' '.join(str(error).split())})") from None
    root = root.rstrip("/")
    try:
        found = _at_files(system, root, target)
        if _is_there(package, found, target, replace):
            return _line(package, target, ", as before")
        system.makedirs(root, exist_ok=True)
        _put(system, f"{root}/{PUSHED}", json_text(UNFINISHED).encode())
        for name in reversed(ORDER):
            if name in found.names:
                system.rm_file(f"{root}/{name}")
        for name, file in package.files.items():
            _put(system, f"{root}/{name}", file)
        _put(system, f"{root}/{PUSHED}", json_text(package.stated).encode())
    except UserError:
        raise
    except Exception as error:  # each file system has its own
        raise UserError(
            f"{target} cannot be written ({type(error).__name__}: {' '.join(str(error).split())}); check its name, "
            "permissions and space, and run the same command again"
        ) from error
    return _line(package, target)


def _at_files(system, root: str, target: str) -> Target:
    system.invalidate_cache()
    if not system.exists(root):
        return Target([], {})
    if system.isfile(root):
        raise UserError(f"{target} is a file; name a folder")
    names = [path[len(root) :].lstrip("/") for path in system.find(root)]
    return Target(names, _stated(system.cat_file(f"{root}/{PUSHED}")) if PUSHED in names else {})


def _stated(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _put(system, path: str, file: Path | bytes) -> None:
    """Write a file that is there whole or not at all; object stores show none before all of it has come."""
    from fsspec.implementations.local import LocalFileSystem

    if isinstance(system, LocalFileSystem):
        with replacing(Path(path)) as out:
            if isinstance(file, bytes):
                out.write(file)
            else:
                with open(file, "rb") as content:
                    shutil.copyfileobj(content, out)
    elif isinstance(file, bytes):
        system.pipe_file(path, file)
    else:
        system.put_file(str(file), path)
