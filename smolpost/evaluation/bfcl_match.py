"""Calls compared with the accepted ones by the rules of the Berkeley Function-Calling Leaderboard.

Patil et al. 2025 ("The Berkeley Function Calling Leaderboard", ICML), AST evaluation of Python. The rules are kept to
the letter, so verdicts are the same. A call's accepted arguments are {name: [accepted value]}, where "" among the
values says that the argument may be left out; an object's accepted values are given per key in the same way.
"""

import re
from typing import Any

from smolpost.evaluation.parse_calls import Call

# Berkeley's names of types, and JSON schema's; without a type, or with "any", a text is expected.
TYPES = {
    "string": str, "integer": int, "float": float, "number": float, "boolean": bool, "array": list, "tuple": list,
    "dict": dict, "object": dict, "any": str,
}  # fmt: skip


def mismatch(calls: list[Call], functions: dict[str, dict], expected: list[tuple[str, dict[str, list]]]) -> str:
    """Why calls are not the accepted ones; "" where they are.

    Each accepted call in turn takes the first call left that agrees with it, in any order.

    Args:
        calls: The model's.
        functions: Name -> function document, with `parameters`; each accepted call's is among them.
        expected: (name, accepted arguments) of each accepted call.
    """
    if len(calls) != len(expected):
        return f"{len(calls)} calls instead of {len(expected)}"
    left = list(calls)
    for name, accepted in expected:
        reasons = [call_mismatch(call, functions[name], accepted) for call in left]
        if "" not in reasons:
            return "; ".join(dict.fromkeys(reasons))
        left.pop(reasons.index(""))
    return ""


def call_mismatch(call: Call, function: dict, accepted: dict[str, list]) -> str:
    """Why a call is not the accepted one; "" where it is.

    Args:
        call: Positional arguments take the parameters' names in the document's order.
        function: Its document.
        accepted: Argument -> accepted values.
    """
    if call.name != function["name"]:
        return f"calls {call.name} instead of {function['name']}"
    properties = function["parameters"].get("properties") or {}
    if len(call.positional) > len(properties):
        return f"{len(call.positional)} positional arguments for {len(properties)} parameters"
    arguments = dict(zip(properties, call.positional, strict=False))
    if twice := sorted(arguments.keys() & call.arguments):
        return f"{twice[0]} is given twice"
    arguments |= call.arguments
    for name in function["parameters"].get("required") or []:
        if name not in arguments:
            return f"the required {name} is missing"
    for name, value in arguments.items():
        if name not in properties or name not in accepted:
            return f"there is no parameter {name}"
        if reason := value_mismatch(value, accepted[name], properties[name]):
            return f"{name}={value!r} {reason}"
    missing = [name for name, values in accepted.items() if name not in arguments and "" not in values]
    return f"{missing[0]} is missing" if missing else ""


def value_mismatch(value: Any, accepted: list, schema: dict) -> str:
    """Why a value is not accepted; "" where it is.

    The parameter's type is what counts, and a whole number does for a float; within a list it does not. A value may
    also have the type of the first accepted value, and is then compared with the accepted ones as it stands.

    Args:
        value: The argument.
        accepted: Accepted values.
        schema: The parameter's, with `type`, for lists also `items`.
    """
    kind, inner, first = TYPES[schema.get("type", "any")], item_type(schema), type_of_first(accepted)
    if schema.get("type") == "tuple" and type(value) is tuple:
        value = list(value)
    if type(value) is kind or (kind is float and type(value) is int):
        if inner and not any(items_have_type(value, choice, inner) for choice in accepted):
            return f"has an item that is not of type {inner.__name__}"
        as_it_stands = kind not in (str, list, dict) or first not in (None, kind)
    elif type(value) is first:
        as_it_stands = True
    else:
        return f"is of type {type(value).__name__}, not {kind.__name__}"
    if as_it_stands:
        right = value in accepted
    elif kind is dict:
        right = any(object_agrees(value, choice) for choice in accepted if choice != "")
    elif inner is dict:
        right = any(objects_agree(value, choice) for choice in accepted)
    elif kind is list:
        right = list_normal(value) in [list_normal(choice) for choice in accepted]
    else:
        right = normal(value) in map(normal, accepted)
    return "" if right else f"is not one of {accepted}"


def type_of_first(accepted: list) -> type | None:
    """Type of the first accepted value, None where there is none."""
    return next((type(value) for value in accepted if value != ""), None)


def item_type(schema: dict) -> type | None:
    """Type of a list's items, None where the value is not a list or its items may be anything."""
    if TYPES[schema.get("type", "any")] is not list or not isinstance(schema.get("items"), dict):
        return None
    return TYPES[schema["items"].get("type", "any")]


def items_have_type(values: list, choice: Any, inner: type) -> bool:
    """Whether all items have the stated type or that of the accepted list's first item."""
    return not isinstance(choice, list) or all(type(item) in (inner, type_of_first(choice)) for item in values)


def object_agrees(value: dict, accepted: dict[str, list]) -> bool:
    """Whether an object has accepted values at accepted keys, and every key that may not be left out."""
    return all(
        key in accepted and normal(item) in [normal(choice) for choice in accepted[key]] for key, item in value.items()
    ) and all(key in value or "" in choices for key, choices in accepted.items())


def objects_agree(values: list[dict], accepted: list[dict[str, list]]) -> bool:
    """Whether a list of objects agrees, object by object."""
    return len(values) == len(accepted) and all(map(object_agrees, values, accepted))


def list_normal(values: list) -> list:
    """A list with its own texts normal; a list that may be left out ("") may also be empty."""
    return [normal(item) for item in values]


def normal(value: Any) -> Any:
    """A text without what counts as spelling only: case, spaces, some punctuation, the kind of quotes."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if isinstance(value, str) else value
