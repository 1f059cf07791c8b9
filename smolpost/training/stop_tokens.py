"""The tokens at which a trained model stops: those that ended its trained turns in the prepared rows.

The start checkpoint's own say nothing of that: a base model that is trained on ChatML still names <|endoftext|>, and
stock `generate` would run past the end of every reply.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smolpost.chat.fates import Fate
from smolpost.chat.turn_end import is_blank
from smolpost.errors import UserError
from smolpost.inference.generation import REPLY_TOKENS, stored_stop_token_ids
from smolpost.training.settings import Training

FATES = np.array(sorted(Fate))
#: Layout of rows -> its columns of tokens and fates, and the column of the tokens before them, if any.
COLUMNS = {
    "documents": ("input_ids", "fates"),
    "pairs": ("chosen_ids", "chosen_fates", "prompt_ids"),
    "completions": ("completion_ids", "completion_fates", "prompt_ids"),
    "labelled": ("completion_ids", "completion_fates", "prompt_ids"),
}
GOES_ON = (Fate.TRAINED, Fate.TEMPLATE, Fate.REASONING)  # of the tokens inside a turn


@dataclass(frozen=True)
class StopTokens:
    """The stop tokens that the written model records.

    Attributes:
        end: The token that ends a reply, the config's eos_token_id; None where no turn trains, which changes nothing.
        generation: eos_token_id of the generation config, ids in order: the end of a reply, what else ended trained
            turns and texts, and what the start checkpoint stops at. That one stays, as a model still ends a plain
            text with it.
        eos_token: The tokenizer's.
        report: For the manifest.
    """

    end: int | None
    generation: list[int]
    eos_token: str | None
    report: dict[str, Any]

    def give(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set them in a model's config and generation config and in its tokenizer, before these are written."""
        if self.end is not None:
            model.config.eos_token_id = self.end
        settings = model.generation_config
        settings.eos_token_id = self.generation[0] if len(self.generation) == 1 else self.generation or None
        settings._from_model_config = False  # otherwise a loader may build it again from the config
        tokenizer.eos_token = self.eos_token


def stop_tokens(
    name: str, stage: Training, rows: Dataset, start: Path, tokenizer: PreTrainedTokenizerBase
) -> StopTokens:
    """The tokens at which the stage's model will stop.

    Args:
        name: The stage, for messages.
        rows: Prepared ones.
        start: Folder of the start checkpoint.
        tokenizer: Its own, with the stage's template.
    Raises:
        UserError: No trained turn ends with a control token, though none of them was cut: nothing could stop the
            model.
    """
    turns, texts = trained_ends(stage, rows, tokenizer)
    others = turns.pop(None, 0) + texts.pop(None, 0)
    if others and not turns and not texts and not _may_be_cut(stage):
        raise UserError(
            f"stages.{name}: none of the {others} trained turns ends with a control token of the tokenizer, so the "
            f"model could not learn to stop; use a template that ends them with one (stages.{name}.template="
            f"{stage.template}), or add its token to the tokenizer and the model"
        )
    before = stored_stop_token_ids(start)
    kept = [i for i in before if tokenizer.convert_ids_to_tokens(i) is not None]
    trained = [i for found in (turns, texts) for i, _ in found.most_common()]
    end = trained[0] if turns else None
    generation = list(dict.fromkeys([*trained, *kept] if turns else [*kept, *trained]))
    eos_token = tokenizer.eos_token if end is None else tokenizer.convert_ids_to_tokens(end)
    if "eos_token" in (tokenizer.chat_template or ""):
        eos_token = tokenizer.eos_token  # the template writes it, so another one would change the rendering
    counts = turns + texts
    report = {
        "trained": {tokenizer.convert_ids_to_tokens(i): counts[i] for i in dict.fromkeys(trained)},
        "without": others,
        "eos_token": {"before": tokenizer.eos_token, "after": eos_token},
        "generation": {"before": before, "after": generation},
    }
    return StopTokens(end, generation, eos_token, report)


def change(name: str, stops: StopTokens) -> str:
    """What the stage's folder will say other than its start checkpoint, in a line; "" where it is the same."""
    found, tokens, ids = (stops.report[key] for key in ("trained", "eos_token", "generation"))
    if not found:
        return f"stages.{name}: no trained turn has an end; its model stops at its start checkpoint's {ids['before']}"
    if tokens["before"] == tokens["after"] and set(ids["before"]) == set(ids["after"]):
        return ""
    return (
        f"stages.{name}: its rows train {', '.join(found)} as the end; the written model's generation config has "
        f"eos_token_id={ids['after']} (start checkpoint: {ids['before']}), its tokenizer eos_token={tokens['after']} "
        f"(start checkpoint: {tokens['before']})"
    )


def _may_be_cut(stage: Training) -> bool:
    """Whether turns may lack their ends because rows were cut."""
    return stage.overlong in ("truncate", "split") or getattr(stage, "packing", None) == "wrapped"


def trained_ends(
    stage: Training, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[Counter[int | None], Counter[int | None]]:
    """How many trained turns, and plain texts, end with which control token; None: with another token.

    White space after a control token does not count, nor do turns that a row's longest length may have cut. Of a
    preference pair only the chosen side counts.
    """
    turns, texts = Counter(), Counter()
    added = tokenizer.added_tokens_decoder
    controls = {i for i, t in added.items() if t.content.strip() and t.content not in REPLY_TOKENS}
    for ids, trained, ends, are_texts in _ends(stage, rows):
        while len(ends):
            found = ids[ends]
            others = set(np.unique(found).tolist()) - controls
            blank = np.isin(found, [i for i in others if is_blank(tokenizer, i)])
            for counter, chosen in ((turns, ~blank & ~are_texts), (texts, ~blank & are_texts)):
                for i, number in zip(*np.unique(found[chosen], return_counts=True), strict=True):
                    counter[int(i) if int(i) in controls else None] += int(number)
            goes_on = blank & (ends > 0)
            goes_on[goes_on] = trained[ends[goes_on] - 1]
            ends, are_texts = ends[goes_on] - 1, are_texts[goes_on]
    return turns, texts


def _ends(stage: Training, rows: Dataset) -> Iterator[tuple[np.ndarray, ...]]:
    """Where turns end, in chunks of rows with T tokens.

    Yields:
        [T] ids, [T] whether they train, [E] places of the last token of each turn, [E] whether it is a plain text's.
    """
    names = COLUMNS[stage.layout]
    for columns in zip(*(rows.data.column(name).chunks for name in names), strict=True):
        ids, fates = (column.flatten().to_numpy() for column in columns[:2])
        own, *before = (column.value_lengths().to_numpy(zero_copy_only=False) for column in columns[1:])
        stops, is_full = np.cumsum(own, dtype=np.int64), sum(before, own) == stage.max_seq_len
        starts, ends, is_turn = _runs(fates, stops)
        if _may_be_cut(stage):
            is_turn &= ~np.isin(ends, stops[is_full] - 1)
        # In a text all tokens except the first train; a chat begins with a header.
        is_text = (fates[starts - 1] == Fate.FIRST) & (np.append(fates, Fate.FIRST)[ends + 1] == Fate.FIRST)
        is_text &= stage.layout == "documents" and "all" not in stage.train_roles
        yield ids, fates == Fate.TRAINED, ends[is_turn], is_text[is_turn]


def _runs(fates: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[R] first and last positions of the runs that train, and [R] whether a turn ends there.

    A turn goes on where only the template's own text, or reasoning that does not train, stands before the next stretch:
    formats that close their reasoning with a token of its own.

    Args:
        fates: [T]
        stops: Ends of the rows in it.
    """
    trained = fates == Fate.TRAINED
    begins = fates == Fate.FIRST  # of documents
    begins[stops[:-1][stops[:-1] < len(fates)]] = True
    before, after = np.append(False, trained[:-1] & ~begins[1:]), np.append(trained[1:] & ~begins[1:], False)
    starts, ends = np.flatnonzero(trained & ~before), np.flatnonzero(trained & ~after)
    others = np.cumsum(np.isin(FATES, GOES_ON, invert=True)[fates] | begins, dtype=np.int32)
    is_turn = np.append(others[starts[1:]] > others[ends[:-1]], True)[: len(ends)]
    return starts, ends, is_turn
