"""What lies at a place that takes packages, and whether a package may be put there."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from smolpost.errors import UserError
from smolpost.publish.package import Package

PUSHED = "smolpost.json"  # what lies at a target: the stage's key and its files, each with its SHA-256


class Target(NamedTuple):
    """
    Attributes:
        names: Of all files, with folders.
        stated: What its PUSHED says; {} without one.
    """

    names: list[str]
    stated: dict[str, Any]

    @property
    def own(self) -> set[str]:
        """Names that `smolpost push` writes or has written there."""
        return {PUSHED, *self.stated["files"]} if "files" in self.stated else set()


class Place(Protocol):
    """Somewhere on the Hub or on a file system.

    Attributes:
        url: For people.
        what: What it is, such as "folder".
        access: Who can read what is pushed there; "" where the place itself decides.
    """

    url: str
    what: str
    access: str

    def look(self) -> Target:
        """
        Raises:
            UserError: It cannot be read, or is not what the push asks for.
        """

    def write(self, package: Package, found: Target) -> None:
        """Put the package in the place of what was found.

        Raises:
            UserError: It cannot be written.
        """


def is_there(package: Package, found: Target, url: str, replace: bool) -> bool:
    """Whether the target holds the package already.

    Raises:
        UserError: It holds something else that may not be replaced.
    """
    if others := [name for name in found.names if name not in found.own]:
        more = f" and {len(others) - 1:,} more files" if len(others) > 1 else ""
        raise UserError(f"{url} holds {others[0]}{more}, which `smolpost push` did not write; name an empty target")
    if found.stated == package.stated:
        return True
    if "key" in found.stated and not replace:
        raise UserError(
            f"{url} holds what was pushed of key {found.stated['key']}; --replace puts this in its place, or name "
            "another target"
        )
    return False


def unfinished(names: Iterable[str]) -> dict[str, Any]:
    """What PUSHED says while a push writes these files, or removes them."""
    return {"unfinished": True, "files": list(dict.fromkeys(names))}


def stated(content: bytes) -> dict[str, Any]:
    """What a PUSHED says; {} where it is another's file of that name."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
