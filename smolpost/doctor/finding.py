"""What a look at the environment found, line by line."""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

Status = Literal["ok", "note", "slow", "fail"]


class Finding(NamedTuple):
    """
    Attributes:
        status: ok; note: worth knowing; slow: it runs, slowly; fail: it does not run.
        name: What was looked at.
        value: What is there, with numbers.
        remedy: What to do; "" where nothing has to be done.
    """

    status: Status
    name: str
    value: str
    remedy: str = ""


def looked_at(name: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of one look; where it breaks, that is a finding too."""
    try:
        yield from list(look())
    except Exception as error:  # a broken installation raises anything
        text = " ".join(str(error).split())[:300]
        yield Finding("fail", name, f"cannot be looked at ({type(error).__name__}: {text})", "reinstall what it names")
