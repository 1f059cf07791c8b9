"""What the rows and the settings make doubtful, in the words of the team's playbook (docs/recipe.md)."""

import numpy as np

from smolpost.data.rendering import NOTES
from smolpost.starting.choices import Data, counted
from smolpost.starting.rows import File, Tokens

FEW_STEPS = 50
FEW_PAIRS = 500
MOST_REFUSED = 0.2  # share of a source's rows, above which preparation stops: max_dropped
LONGER = 1.5  # times, from which a difference in length may be all that preference training learns


def cautions(data: Data, batch: int, steps: int, has_modes: bool) -> list[str]:
    """Lines about the files of one layout; each says what to do.

    Args:
        batch: Packs or pairs of an optimizer step.
        steps: Optimizer steps of the stage.
        has_modes: Whether the chat template has a mode with thinking and one without.
    """
    pairs = data.files[0].layout == "pairs"
    lines = [line for file, tokens in zip(data.files, data.tokens, strict=True) for line in _of_file(file, tokens)]
    if steps < FEW_STEPS:
        unit = "pairs" if pairs else "packs"
        lines.append(
            f"{'preference' if pairs else 'sft'}: about {counted(steps)} of {batch} {unit} is little training; "
            "add rows, or raise num_epochs"
        )
    if pairs and data.num_rows < FEW_PAIRS:
        lines.append(f"preference: {data.num_rows:,} pairs are few; the playbook's best run had 17,000")
    if not pairs:
        lines += _of_modes(data.thinking(), has_modes)
    return lines


def _of_file(file: File, tokens: Tokens) -> list[str]:
    path, seen = file.source.path, len(file.rows)
    lines = []
    if tokens.faults:
        share = len(tokens.faults) / seen
        stops = f"; above {MOST_REFUSED:.0%} preparation stops, so mend them first" if share > MOST_REFUSED else ""
        lines.append(
            f"{path}: {len(tokens.faults):,} of {seen:,} rows are refused{stops}; the first: {tokens.faults[0]}"
        )
    lines += [f"{path}: {number:,} of {seen:,} rows {NOTES[note]}" for note, number in tokens.notes.items()]
    if untrained := int((tokens.trained == 0).sum()):
        lines.append(f"{path}: {untrained:,} of {seen:,} rows have nothing that trains, and are dropped")
    if file.source.last_user_is_reply:
        lines.append(f"{path}: rows end in two user turns, and the last one trains as a reply (last_user_is_reply)")
    if file.kinds["text"]:
        lines.append(f"{path}: {file.kinds['text']:,} of {seen:,} rows are plain text, of which every token trains")
    if file.layout == "pairs":
        chosen, rejected = np.median(tokens.sides, axis=0)
        if max(chosen, rejected) > LONGER * min(chosen, rejected):
            longer = "longer" if chosen > rejected else "shorter"
            lines.append(
                f"{path}: chosen replies have {chosen:,.0f} tokens and rejected ones {rejected:,.0f} (medians); the "
                f"model may learn no more than to be {longer}"
            )
    return lines


def _of_modes(share: float, has_modes: bool) -> list[str]:
    """Which modes train, by the share of the rows that think."""
    if 0 < share < 1 and not has_modes:
        return [f"sft: {share:.0%} of the rows think, and the template has no modes that tell the model when"]
    if 0 < share < 1:
        return [f"sft: {share:.0%} of the rows think; think_share of a source sets another share, as think_share: 0.5"]
    if not has_modes:
        return []
    missing = "without thinking (/no_think)" if share else "with thinking (/think)"
    return [
        f"sft: {'every' if share else 'no'} row thinks, so replies {missing} are not trained; add rows of both modes"
    ]
