"""Names on the Hub as commits: looked up when a run first uses them, kept with it, and used by all its later commands.

A branch moves. Without this, a stage that goes on tomorrow would read other rows than it read today, under one key.
"""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from smolpost.errors import UserError
from smolpost.files import lock, read_json, write_json

TIMEOUT = 30  # seconds
COMMIT = re.compile(r"[0-9a-f]{40}")

Kind = Literal["dataset", "model"]


class Commits:
    """The commits of one pipeline folder.

    Args:
        file: Where they are kept; need not be there. Several processes may use one: what one of them has looked up
            holds for all.
    """

    def __init__(self, file: Path):
        self.file = file

    def known(self, kind: Kind, name: str, revision: str | None = None) -> str | None:
        """The commit that the pipeline uses, or None where it has not been looked up.

        Args:
            name: Hub id, e.g. "HuggingFaceTB/smoltalk2".
            revision: Branch, tag or commit; None: main. A commit of 40 hex digits stands for itself.
        """
        if revision and COMMIT.fullmatch(revision):
            return revision
        kept = read_json(self.file).get(_entry(kind, name, revision))
        return kept and kept["commit"]

    def resolve(self, kind: Kind, name: str, revision: str | None = None) -> str:
        """The commit that the pipeline uses; looked up and kept where it is not known.

        Where the Hub cannot be reached, it is the one that the Hub's cache on this machine has for the revision.

        Raises:
            UserError: The Hub has no such name or revision, or cannot be reached and the cache has none.
        """
        if commit := self.known(kind, name, revision):
            return commit
        with lock(self.file):
            commit = self.known(kind, name, revision)  # by another process meanwhile
            if commit is None:
                commit = _looked_up(kind, name, revision or "main")
                entry = {"commit": commit, "looked_up": datetime.now(UTC).isoformat(timespec="seconds")}
                write_json(self.file, read_json(self.file) | {_entry(kind, name, revision): entry})
        return commit

    def shown(self, kind: Kind, name: str, revision: str | None = None) -> str:
        """For `plan`: "ID@REVISION = COMMIT", shortened as git does it."""
        commit = self.known(kind, name, revision)
        if commit and commit == revision:
            return f"{name}@{commit}"
        return f"{name}@{revision or 'main'} = {commit[:7] if commit else '(looked up when first used)'}"


def _entry(kind: Kind, name: str, revision: str | None) -> str:
    return f"{kind} {name}@{revision or 'main'}"


def _looked_up(kind: Kind, name: str, revision: str) -> str:
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{kind} {name}@{revision} is not on the Hub for this user ({_one_line(error)}); check its name and "
            "revision, and HF_TOKEN where it is private or gated"
        ) from None
    except (OSError, httpx2.HTTPError) as error:  # no network, HF_HUB_OFFLINE, or a Hub that is out of order
        if commit := _cached(kind, name, revision):
            return commit
        raise UserError(
            f"{kind} {name}@{revision}: its commit is not known here, and the Hub does not answer ({_one_line(error)}"
            "); run this once where there is a network, or give a commit of 40 hex digits as its revision"
        ) from None


def _cached(kind: Kind, name: str, revision: str) -> str | None:
    """The commit of the files in the Hub's cache, which are used where there is no network."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    file = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "refs" / revision
    return file.read_text().strip() if file.is_file() else None


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
