"""Function calls in a reply: JSON within <tool_call> tags, or Python within <code> tags. Nothing is ever executed."""

from smolpost.chat.calls import TAGS, call_blocks
from smolpost.chat.python_calls import Call, Malformed, python_calls
from smolpost.data.rows import kind_of, parse_json
from smolpost.errors import UserError


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
            calls += _read_json(inner) if style == "xml" else python_calls(inner)
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
