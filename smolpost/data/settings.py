"""How a training stage renders, masks and fits its rows: the fields, and the versions of the steps that do it.

Apart from that code, as a plan is made without its libraries.
"""

from dataclasses import dataclass
from typing import ClassVar

from smolpost.schema import MISSING, RELEASE_DAY, choice, number, some, tuning

TOKENIZE_VERSION = 1  # of `tokenize` and `hygiene`: raised when a row gets other token ids, fates or features
PREPARE_VERSION = 1  # of all that makes prepared rows of tokenized ones
# Settings of a source that choose among its tokenized rows and do not change them.
SELECTING = ("max_tokens", "weight", "share", "loss_weight", "think_share")


@dataclass
class Rows:
    """
    Attributes:
        layout: documents: conversations and texts, packed; pairs: prompt, chosen and rejected; completions: prompt and
            completion; labelled: prompt, completion and whether it is desired.
    """

    data: str = MISSING  # mixture name under data
    template: str = "smollm3"  # chat template: a name under smolpost/chat/templates or a .jinja file
    today: str = RELEASE_DAY  # date rendered into training text; frozen, or prepared data would change daily
    train_roles: list[str] = some("assistant")  # whose turns train; [all]: every token
    train_reasoning: bool = True  # false: think blocks are context, the reply after them trains
    last_turn_only: bool = False  # train the last of those turns alone
    max_dropped: float = tuning(0.2, "[0, 1]")  # share of a source's rows; more dropped ones are refused
    max_seq_len: int = number("[2, inf)")  # tokens per row
    overlong: str = choice("refuse", "truncate", "split", "drop")  # samples longer than a row; only documents split
    num_workers: int | None = tuning(None, "[1, inf)")  # processes that tokenize; null: one per core

    layout: ClassVar[str] = MISSING


@dataclass
class DocumentRows(Rows):
    packing: str = choice("bfd", "wrapped", "none")

    layout: ClassVar[str] = "documents"


@dataclass
class PairRows(Rows):
    layout: ClassVar[str] = "pairs"


@dataclass
class CompletionRows(Rows):
    layout: ClassVar[str] = "completions"


@dataclass
class LabelledRows(Rows):
    layout: ClassVar[str] = "labelled"
