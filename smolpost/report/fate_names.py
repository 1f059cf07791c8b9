"""How each fate is called in the views: one short word, the reason, and a colour of the Okabe-Ito palette."""

from typing import NamedTuple

from smolpost.chat.fates import MASKED, Fate


class FateName(NamedTuple):
    """
    Attributes:
        word: The mark beside every run of tokens of this fate, so that no view depends on colour alone.
        why: Why the loss counts these tokens or leaves them out.
        colour: Okabe and Ito's palette, which the common kinds of colour blindness leave distinct.
    """

    word: str
    why: str
    colour: str


NAMES = {
    Fate.TRAINED: FateName("trained", "the loss counts it: the policy has to produce it", "#009E73"),
    Fate.SYSTEM: FateName("system", "left out: text of the system turn", "#F0E442"),
    Fate.USER: FateName("user", "left out: text of a user turn", "#56B4E9"),
    Fate.TOOL: FateName("tool", "left out: a tool's result, which no policy writes", "#E69F00"),
    Fate.TEMPLATE: FateName("template", "left out: written by the chat template", "#BBBBBB"),
    Fate.REPLY: FateName("reply", "left out: assistant text that is not to be trained", "#CC79A7"),
    Fate.REASONING: FateName("reasoning", "left out: a think block, and no reasoning is trained here", "#D55E00"),
    Fate.FIRST: FateName("first", "left out: first token of a document, which nothing predicts", "#0072B2"),
}
LEDGER = {Fate.TRAINED: "trained", **MASKED}  # what data_report.json calls them
