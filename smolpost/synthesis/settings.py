"""The fields of a stage that samples preference pairs. Apart from that code, as a plan is made without torch."""

from dataclasses import dataclass

from smolpost.schema import MISSING, RELEASE_DAY, choice, count, number, seeded


@dataclass
class PairSettings:
    prompts: str = MISSING  # mixture name; each row's messages up to its last assistant turn
    chosen_from: str = MISSING  # stage of the stronger checkpoint
    rejected_from: str = MISSING  # stage of the weaker checkpoint
    template: str = "smollm3"  # of both checkpoints' prompts
    today: str = RELEASE_DAY
    max_new_tokens: int = count(256)
    temperature: float = number("[0, inf)", 0.6)
    top_p: float = number("(0, 1]", 0.95)
    keep: str = choice("different", "chosen_right", "right_and_wrong")  # the last two compare with the row's answer
    seed: int = seeded(0)
    batch_size: int = count(64)  # prompts per generate call; in the key, as it decides each batch's random numbers
