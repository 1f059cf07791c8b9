"""Reads calls written as Python, without executing anything."""

import ast
import json
import warnings
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A call as it was written.

    Attributes:
        name: The function's name, with its dots.
        arguments: Name -> value; values have JSON's types, or are tuples of them.
        positional: Arguments without a name, in order.
    """

    name: str
    arguments: dict[str, Any]
    positional: tuple = ()

    def __str__(self) -> str:
        values = [*map(repr, self.positional), *(f"{name}={value!r}" for name, value in self.arguments.items())]
        return f"{self.name}({', '.join(values)})"


class Malformed(ValueError):
    """A block is not a call; the text says why."""


def python_calls(block: str) -> list[Call]:
    """The calls of a block in which every statement is a call or a list of calls.

    Raises:
        Malformed: A statement is something else, or an argument is not a literal of JSON's types or a tuple.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the model's text are not our warnings
            statements = ast.parse(block.strip()).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise Malformed(f"the block is not Python ({' '.join(str(error).split())})") from error
    calls = []
    for statement in statements:
        value = statement.value if isinstance(statement, ast.Expr) else statement
        nodes = value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
        calls += [_python_call(node) for node in nodes]
    return calls


def _python_call(node: ast.AST) -> Call:
    if not isinstance(node, ast.Call):
        raise Malformed(f"{_source(node)} is not a call")
    names = [keyword.arg for keyword in node.keywords]
    if None in names or len(set(names)) < len(names):
        raise Malformed(f"{_source(node)} has ** or a repeated name in its arguments")
    positional = tuple(_literal(value) for value in node.args)
    return Call(_dotted(node.func), {k.arg: _literal(k.value) for k in node.keywords}, positional)


def _dotted(function: ast.AST) -> str:
    node, names = function, []
    while isinstance(node, ast.Attribute):  # a loop, as a model may repeat itself beyond Python's recursion limit
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise Malformed(f"{_source(function)} is not the name of a function")
    return ".".join([node.id, *reversed(names)])


def _literal(node: ast.AST) -> Any:
    """The value of an expression that is a literal of JSON's types, or a tuple."""
    try:
        value = ast.literal_eval(node)
        # JSON has no sets, bytes, complex numbers, infinity and halves of surrogate pairs; Python's literals do.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, MemoryError, RecursionError) as error:
        raise Malformed(f"the argument {_source(node)} is not a literal of JSON's types or a tuple") from error
    return value


def _source(node: ast.AST) -> str:
    """The code of a node, at most 80 characters of it."""
    try:
        return f"{ast.unparse(node):.80}"
    except (ValueError, RecursionError):
        return "something too long or too deep"
