"""What a row shape is, and what shapes share."""

from collections.abc import Callable

from smolpost.data.rows import Row, kind_of
from smolpost.errors import UserError
from smolpost.registry import ROW_SHAPES
from smolpost.schema import Source

RowShape = Callable[[Row, Source], dict]


def row_shape(name: str, version: int = 1) -> Callable[[RowShape], RowShape]:
    """A decorator that registers a row shape under the name that a source's `columns` has in recipes.

    The function gets a row under the names that the source's `rename` gives, with JSON in its list columns read, and
    the source. It returns the row's content in our columns: `messages`, or `chosen` and `rejected`, or `text`, beside
    whatever other columns it keeps. It raises UserError, with `row.where`, for a row that is not of its shape.

    Args:
        version: Raised when the same row gives other content: rows are tokenized again then.
    """

    def register(shape: RowShape) -> RowShape:
        shape.VERSION = version
        return ROW_SHAPES.add(name, shape)

    return register


def is_turns(value) -> bool:
    return isinstance(value, list) and any(isinstance(turn, dict) and "role" in turn for turn in value)


def text_of(row: dict, key: str, where: str) -> str:
    """The column's text, "" where it is missing."""
    text = row.get(key)
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {key} is {kind_of(text)}; expected a string or null")
    return text or ""


def without(row: dict, *keys: str) -> dict:
    return {key: value for key, value in row.items() if key not in keys}
