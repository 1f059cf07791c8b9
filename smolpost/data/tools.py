"""Tools and calls as people write them: function documents become JSON schemas, calls take OpenAI's form."""

import re

from smolpost.data.keys import CALL, FUNCTION, is_empty
from smolpost.data.rows import kind_of, parse_json
from smolpost.errors import UserError

#: Where a call's arguments may stand: OpenAI's, Llama's, Anthropic's, and names that people use.
ARGUMENTS = ("arguments", "parameters", "input", "args", "kwargs")

# Berkeley's function documents name Python's types; "any" is a JSON schema without a type.
SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}
# xLAM's name a parameter's type as Python code does: "str, optional", "List[int]".
PYTHON_TYPES = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "tuple": "array",
    "set": "array", "dict": "object",
}  # fmt: skip


def own_calls(calls, where: str, unread: set[str]):
    """Calls as {"id", "type", "function": {"name", "arguments"}}; `validate_row` refuses anything else.

    Raises:
        UserError: A call has its arguments twice.
    """
    if not isinstance(calls, list):
        return calls
    return [own_call(call, f"{where}[{i}]", unread) for i, call in enumerate(calls)]


def own_call(call, where: str, unread: set[str]):
    if not isinstance(call, dict):
        return call
    inner = call["function"] if isinstance(call.get("function"), dict) else call
    if not isinstance(inner.get("name"), str):
        return call
    given = [key for key in ARGUMENTS if key in inner]
    if len(given) > 1:
        raise UserError(f"{where} has {' and '.join(given)}; expected the arguments in one of them")
    function = {"name": inner["name"]} | ({"arguments": inner[given[0]]} if given else {})
    rest = {**call, **inner}
    unread |= {f"messages.tool_calls.{key}" for key in rest.keys() - {*CALL, *FUNCTION, *given} if rest[key]}
    return {**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": function}


# ---------------------------------------------------------------- tools


def own_tools(tools, where: str):
    """The tools with parameters in JSON schema; texts of JSON among them are read."""
    if not isinstance(tools, list):
        return tools
    parsed = [
        parse_json(tool, f"{where}[{i}]") if isinstance(tool, str) and tool.lstrip()[:1] == "{" else tool
        for i, tool in enumerate(tools)
    ]
    return [json_schema_tool(tool) for tool in parsed]


def json_schema_tool(tool):
    """The function document with parameters in JSON schema's types; what is standard already stays equal."""
    if not isinstance(tool, dict):
        return tool
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": json_schema_tool(tool["function"])}
    return {key: json_schema(by_name(value)) if key == "parameters" else value for key, value in tool.items()}


def by_name(parameters):
    """xLAM's parameters, which are {name: {"type", "description", "default"}}, as a JSON schema; others as they are."""
    if not isinstance(parameters, dict) or not parameters or not parameters.keys().isdisjoint({"type", "properties"}):
        return parameters
    if not all(isinstance(value, dict) and isinstance(value.get("type"), str) for value in parameters.values()):
        return parameters
    properties, required = {}, []
    for name, parameter in parameters.items():
        kind, *flags = [word.strip() for word in re.split(r",(?![^\[]*\])", parameter["type"])]
        if "optional" not in flags and "default" not in parameter:
            required.append(name)
        base = re.match(r"\w*", kind)[0].lower()
        kind = PYTHON_TYPES.get(base, kind)
        properties[name] = {**parameter, "type": kind}
    return {"type": "object", "properties": properties, "required": required}


def json_schema(schema):
    if isinstance(schema, list):
        return [json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    standard = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            value = SCHEMA_TYPES.get(value, value)
            if value is None:
                continue
        elif key == "properties" and isinstance(value, dict):  # its keys are names, "type" may be one
            value = {name: json_schema(inner) for name, inner in value.items()}
        elif key in ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf", "not"):
            value = json_schema(value)
        standard[key] = value
    return standard


def check_arguments(function: dict, where: str, tools: list | None) -> None:
    """Refuse a call whose arguments are missing or no object.

    Args:
        tools: The row's, by which a call may need none.
    """
    arguments = function.get("arguments")
    if arguments is None:
        documents = [tool.get("function") or tool for tool in tools or []]
        document = next((document for document in documents if document.get("name") == function["name"]), None)
        if document is None or not is_empty((document.get("parameters") or {}).get("properties")):
            raise UserError(
                f'{where} calls {function["name"]} without arguments; expected "arguments": {{...}}; write '
                '"arguments": {} where the function takes none'
            )
        return
    if isinstance(arguments, str) and arguments:  # "" is how servers write a call without arguments
        arguments = parse_json(arguments, f"{where}.arguments", "expected a JSON object")
    if arguments != "" and not isinstance(arguments, dict):
        raise UserError(f"{where}.arguments is {kind_of(arguments)}; expected a JSON object of names and values")
