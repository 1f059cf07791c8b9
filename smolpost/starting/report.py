"""What was found, for the terminal."""

from collections.abc import Sequence

import numpy as np

from smolpost.screen import Blocks
from smolpost.starting.checkpoint import Checkpoint, Template
from smolpost.starting.choices import Data, Setting, sized
from smolpost.starting.rows import SAMPLE, WHAT, File, Tokens


def checkpoint_lines(checkpoint: Checkpoint, template: Template) -> list[str]:
    """Size, context, vocabulary and template."""
    context = f"{checkpoint.context:,} tokens" if checkpoint.context else "not stated"
    return [
        f"checkpoint {checkpoint.place}: {checkpoint.model_type}, {sized(checkpoint.parameters)} parameters, context "
        f"{context}, vocabulary {len(checkpoint.tokenizer):,}",
        f"template: {template.name or 'a file beside the pipeline'} ({template.why})",
    ]


def rows_table(data: Sequence[Data]) -> Blocks:
    """A line for each file: rows, shape, thinking, lengths and refusals of its sample."""
    heads = (
        "file", "rows", "refused", "think", "tokens\nmedian", "tokens\n99%", "tokens\nmost", "trained", "held out",
    )  # fmt: skip
    pairs = [(file, tokens) for some in data for file, tokens in zip(some.files, some.tokens, strict=True)]
    title = f"Rows: a sample of up to {SAMPLE:,} of each file, by the checkpoint's tokenizer"
    return Blocks(heads, [_row(file, tokens) for file, tokens in pairs], title=title)


def file_line(file: File) -> str:
    """The shape of the rows, and whose turns they have."""
    kinds = " and ".join(WHAT[kind] for kind in file.kinds)
    renamed = "".join(f", {theirs} as {ours}" for theirs, ours in file.source.rename.items())
    turns = ", ".join(f"{role} {number:,}" for role, number in file.roles.most_common())
    return (
        f"{file.source.path}: {kinds} (columns: {file.source.columns}{renamed}){f'; turns: {turns}' if turns else ''}"
    )


def _row(file: File, tokens: Tokens) -> list[str]:
    median, most_of, most = (int(n) for n in np.percentile(tokens.lengths, [50, 99, 100], method="inverted_cdf"))
    return [
        file.source.path,
        f"{file.num_rows:,}",
        f"{len(tokens.faults):,}",
        f"{tokens.thinks.mean():.0%}",
        f"{median:,}",
        f"{most_of:,}",
        f"{most:,}",
        f"{tokens.trained.sum() / tokens.total.sum():.0%}",
        f"{tokens.held_out:,}",
    ]


def settings_lines(prefix: str, settings: Sequence[Setting]) -> list[str]:
    """The values with their reasons, in columns."""
    shown = [f"{setting.key}={setting.value}" for setting in settings]
    width = max(map(len, shown))
    return [f"{prefix}:"] + [f"  {text:<{width}}  {setting.why}" for text, setting in zip(shown, settings, strict=True)]
