"""The fate of a token of a prepared row: trained, or left out, and why."""

from enum import IntEnum


class Fate(IntEnum):
    """The one fate of a token; only TRAINED tokens count in the loss."""

    #: Text of a turn that trains, up to and including its stop token.
    TRAINED = 0
    #: Text of the system turn that the row brought: system message, custom instructions, tools.
    SYSTEM = 1
    #: Text of a user turn.
    USER = 2
    #: Text of a tool result.
    TOOL = 3
    #: Written by the template: headers, line breaks, stop tokens of turns that do not train, a pre-filled empty block.
    TEMPLATE = 4
    #: A reply that does not train, with its stop token: `train: false`, or not the last turn.
    REPLY = 5
    #: Reasoning of a trained reply, if reasoning does not train.
    REASONING = 6
    #: First token of a document: nothing predicts it. Packing sets it.
    FIRST = 7


#: The fates of masked tokens, by the names of the report's `masked` entry.
MASKED: dict[Fate, str] = {
    Fate.SYSTEM: "system",
    Fate.USER: "user",
    Fate.TOOL: "tool result",
    Fate.TEMPLATE: "template",
    Fate.REPLY: "reply left out",
    Fate.REASONING: "reasoning left out",
    Fate.FIRST: "first of a document",
}
