"""Repositories of the Hub. All files of a push come in one commit."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from smolpost.errors import UserError
from smolpost.publish.package import Package, RepoType, as_bytes
from smolpost.publish.targets import PUSHED, Target, stated

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
URLS: dict[RepoType, str] = {"model": "hf://", "dataset": "hf://datasets/"}
OWN = ".gitattributes"  # of the Hub: it is there without anyone's doing


class HubPlace:
    """A model or dataset repository.

    Args:
        identity: OWNER/NAME.
        public: A new repository is open to all; an existing one has to be open then, and private otherwise.
    Raises:
        UserError: The name cannot be one.
    """

    def __init__(self, identity: str, repo_type: RepoType, public: bool):
        from huggingface_hub import HfApi

        if not HUB_ID.fullmatch(identity):
            raise UserError(
                f"{identity!r} is not a target; give a {repo_type} id of the Hub (OWNER/NAME) or a URL such as "
                "s3://BUCKET/FOLDER or file:///FOLDER"
            )
        self.identity, self.repo_type, self.public, self._api = identity, repo_type, public, HfApi()
        self.url = f"{self._api.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{identity}"
        self.what, self.access = f"{repo_type} repository", "open to all" if public else "private"
        self._commit: str | None = None  # that was looked at

    def look(self) -> Target:
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._one_line("read"):
            try:
                info = self._api.repo_info(self.identity, repo_type=self.repo_type)
            except RepositoryNotFoundError:
                return Target([], {})
            if info.private == self.public:
                raise UserError(
                    f"{self.identity} is {'private' if info.private else 'open to all'} on the Hub; "
                    + ("leave --public out" if self.public else "--public writes to it all the same")
                    + ", or name another repository"
                )
            self._commit = info.sha
            names = [file.rfilename for file in info.siblings or [] if file.rfilename != OWN]
            if PUSHED not in names:
                return Target(names, {})
            file = self._api.hf_hub_download(self.identity, PUSHED, repo_type=self.repo_type, revision=info.sha)
            return Target(names, stated(Path(file).read_bytes()))

    def write(self, package: Package, found: Target) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        content = package.files | {PUSHED: as_bytes(package.stated)}
        operations = [CommitOperationAdd(name, file) for name, file in content.items()]
        operations += [CommitOperationDelete(name) for name in found.names if name not in content]
        with self._one_line("written"):
            self._api.create_repo(self.identity, repo_type=self.repo_type, private=not self.public, exist_ok=True)
            self._api.create_commit(
                self.identity,
                operations,
                commit_message=f"smolpost push {package.stated['key']}",
                repo_type=self.repo_type,
                parent_commit=self._commit,  # what somebody else has committed since is not written over
            )

    @contextlib.contextmanager
    def _one_line(self, done: str) -> Iterator[None]:
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            yield
        except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError) as error:
            raise UserError(
                f"{self.url} cannot be {done} ({' '.join(str(error).split())}); check the name, HF_TOKEN (it needs to "
                "write) and the network; nothing was added"
            ) from None
