"""Control tokens that a row's own texts spell out: they must reach the model as text.

Users and tools may write none of the tokenizer's added tokens. The system's and the assistant's texts may hold
<think>, <tool_call> and the like, which are the reply's own syntax, but none of the special tokens.
"""

from smolpost.chat.render import text_of

_INSIDERS = ("system", "developer", "assistant")


def controls(conversation, vocabulary):
    """The control tokens in a row's own texts, before rendering.

    Args:
        conversation: A `smolpost.chat.render.Conversation`.
        vocabulary: `smolpost.chat.pieces.Vocabulary`.
    Yields:
        (place, token): the first one of each text, by the name of its message or variable.
    """
    for i, message in enumerate(conversation.messages):
        matcher = vocabulary.special if message.get("role") in _INSIDERS else vocabulary.added
        values = [value for key, value in message.items() if key != "role"]
        if isinstance(message.get("content"), list | tuple):
            values.append(text_of(message["content"]))
        yield from ((f"messages[{i}]", found) for found in _matches(values, matcher))
    variables = {f"chat_template_kwargs.{name}": value for name, value in conversation.variables.items()}
    for place, value in {**variables, "tools": conversation.tools}.items():
        yield from ((place, found) for found in _matches(value, vocabulary.special))


def _matches(value, matcher):
    if isinstance(value, str):
        match = matcher.search(value)
        if match:
            yield match[0]
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _matches(key, matcher)
            yield from _matches(part, matcher)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _matches(part, matcher)
