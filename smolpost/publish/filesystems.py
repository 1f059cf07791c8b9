"""Folders on any file system that fsspec knows.

Files come one by one: first `smolpost.json`, which says that the push has not ended and which files it writes, then the
package's in their order. So nothing loads before it is whole, and other people's files are never taken for ours.
"""

import shutil
from pathlib import Path

from smolpost.errors import UserError
from smolpost.files import replacing
from smolpost.progress import Progress
from smolpost.publish.package import Content, Package, as_bytes
from smolpost.publish.targets import PUSHED, Target, stated, unfinished


class FolderPlace:
    """A folder.

    Args:
        url: Of fsspec, such as s3://BUCKET/FOLDER or file:///FOLDER.
    Raises:
        UserError: The scheme is not known, or its package is not installed.
    """

    def __init__(self, url: str):
        import fsspec

        self.url, self.what, self.access = url, "folder", ""
        try:
            self._system, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise UserError(f"{url} cannot be opened ({' '.join(str(error).split())})") from None
        self._root = root.rstrip("/")

    def look(self) -> Target:
        try:
            return self._look()
        except UserError:
            raise
        except Exception as error:  # each file system has its own
            raise self._refusal("read", error) from error

    def _look(self) -> Target:
        self._system.invalidate_cache()
        if not self._system.exists(self._root):
            return Target([], {})
        if self._system.isfile(self._root):
            raise UserError(f"{self.url} is a file; name a folder")
        names = [path[len(self._root) :].lstrip("/") for path in self._system.find(self._root)]
        return Target(names, stated(self._system.cat_file(f"{self._root}/{PUSHED}")) if PUSHED in names else {})

    def write(self, package: Package, found: Target) -> None:
        try:
            self._system.makedirs(self._root, exist_ok=True)
            old = list(found.stated.get("files", ()))
            _put(self._system, f"{self._root}/{PUSHED}", as_bytes(unfinished([*old, *package.files])))
            for name in reversed(old):  # what was written last goes first: what remains does not load
                if name in found.names:
                    self._system.rm_file(f"{self._root}/{name}")
            with Progress(f"push to {self.url}", len(package.files), "file") as progress:
                for name, content in package.files.items():
                    _put(self._system, f"{self._root}/{name}", content)
                    progress.update()
            _put(self._system, f"{self._root}/{PUSHED}", as_bytes(package.stated))
        except Exception as error:
            raise self._refusal("written", error) from error

    def _refusal(self, done: str, error: Exception) -> UserError:
        return UserError(
            f"{self.url} cannot be {done} ({type(error).__name__}: {' '.join(str(error).split())}); check its name, "
            "permissions and space, and run the same command again"
        )


def _put(system, path: str, content: Content) -> None:
    """Write a file that is there whole or not at all; object stores show none before all of it has come."""
    from fsspec.implementations.local import LocalFileSystem

    if isinstance(system, LocalFileSystem):
        with replacing(Path(path)) as out:
            if isinstance(content, bytes):
                out.write(content)
            else:
                with open(content, "rb") as file:
                    shutil.copyfileobj(file, out)
    elif isinstance(content, bytes):
        system.pipe_file(path, content)
    else:
        system.put_file(str(content), path)
