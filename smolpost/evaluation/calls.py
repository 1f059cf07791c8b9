"""Function calls in a reply: JSON within <tool_call> tags, or Python within <code> tags. Nothing is ever executed."""

import ast
import json
import warnings
from typing import Any, NamedTuple

from smolpost.chat.calls import TAGS, call_blocks
from smolpost.data.rows import kind_of, parse_json
from smolpost.errors import UserError


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

    def __str__(self):
        values = [*map(repr, self.positional), *(f"{name}={value!r}" for name, value in self.arguments.items())]
        return f"{self.name}({', '.join(values)})"


class Malformed(ValueError):
    """A block is no call; the text says why."""


def read_calls(text: str, style: str) -> tuple[list[Call], list[str]]:
    """The calls of a reply.

    Args:
        text: What follows its think block.
        style: A key of TAGS.
    Returns:
        The calls of all blocks that stand as calls in order, and what is wrong with each one that cannot be read.
    """
    calls, faults = [], []
    for block in call_blocks(text, (TAGS[style],)):
        inner = text[block.inner_start : block.inner_end]
        try:
            calls += _read_json(inner) if style == "xml" else _read_python(inner)
        except Malformed as error:
            faults.append(str(error))
    return calls, faults


def _read_json(block: str) -> list[Call]:
    """One call, or a list of them."""
    try:
        content = parse_json(block, "the block")
    except UserError as error:
        raise Malformed(str(error)) from error
    calls = content if isinstance(content, list) else [content]
    for call in calls:
        if not isinstance(call, dict):
            raise Malformed(f"a call is {kind_of(call)}; expected an object with name and arguments")
        if not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), dict):
            raise Malformed(f"a call has the keys {', '.join(call) or 'none'}; expected a name and an arguments object")
    return [Call(call["name"], call["arguments"]) for call in calls]


def _read_python(block: str) -> list[Call]:
    """The calls of a block whose every statement is a call, or a list of calls."""
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


def _literal(node: ast.AST):
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
