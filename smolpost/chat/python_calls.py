"""Calls written as Python, read without executing anything."""

import ast
import json
import warnings
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A call as it was written.

    Attributes:
        name: Of the function, with its dots.
        arguments: By name; values are JSON's, or tuples of them.
        positional: Those without a name, in order.
    """

    name: str
    arguments: dict[str, Any]
    positional: tuple = ()

    def __str__(self) -> str:
        values = [*map(repr, self.positional), *(f"{name}={value!r}" for name, value in self.arguments.items())]
        return f"{self.name}({', '.join(values)})"


class Malformed(ValueError):
    """A block is no call; the text says why."""


def python_calls(block: str) -> list[Call]:
    """The calls of a block whose every statement is a call, or a list of calls.

    Raises:
        Malformed: It is something else, or an argument is no literal of JSON's types or a tuple.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model's escapes are no fault of this program
            statements = ast.parse(block.strip()).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise Malformed(f"the block is no Python ({' '.join(str(error).split())})") from error
    calls = []
    for statement in statements:
        value = statement.value if isinstance(statement, ast.Expr) else statement
        nodes = value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
        calls += [_python_call(node) for node in nodes]
    return calls


def _python_call(node: ast.AST) -> Call:
    if not isinstance(node, ast.Call):
        raise Malformed(f"{_source(node)} is no call")
    names = [keyword.arg for keyword in node.keywords]
    if None in names or len(set(names)) < len(names):
        raise Malformed(f"{_source(node)} has ** or one name twice in its arguments")
    positional = tuple(_literal(value) for value in node.args)
    return Call(_dotted(node.func), {k.arg: _literal(k.value) for k in node.keywords}, positional)


def _dotted(function: ast.AST) -> str:
    node, names = function, []
    while isinstance(node, ast.Attribute):  # a loop, as a model may repeat itself beyond Python's recursion limit
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise Malformed(f"{_source(function)} is no name of a function")
    return ".".join([node.id, *reversed(names)])


def _literal(node: ast.AST) -> Any:
    """The value of an expression that is a literal such as JSON has, or a tuple."""
    try:
        value = ast.literal_eval(node)
        # Python has literals that JSON has not: sets, bytes, complex numbers, infinity, halves of surrogate pairs.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, MemoryError, RecursionError) as error:
        raise Malformed(f"the argument {_source(node)} is no literal of JSON's types or a tuple") from error
    return value


def _source(node: ast.AST) -> str:
    """The code of a node, cut for a message."""
    try:
        return f"{ast.unparse(node):.80}"
    except (ValueError, RecursionError):
        return "something too long or too deep"
