"""Held-out preference pairs: which side the model finds likelier, and by how much."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode_pair
from smolpost.data.prompts import mode_of, named, where
from smolpost.data.validate import validate_row
from smolpost.errors import UserError
from smolpost.evaluation.task import MODES, Context, EvaluationTask, Item, Measurement, Sample, check_counts, measures
from smolpost.inference.engine import Engine
from smolpost.schema import count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("chosen", "rejected")
DETAILS = {*MODES, *SIDES, "per_token"}


class Side(NamedTuple):
    """One conversation of a pair: token ids, and the indices of those that are scored."""

    ids: list[int]
    places: list[int]


class Pair(NamedTuple):
    """An encoded row.

    Attributes:
        where: File and row.
        source: Name of its source.
        by_source: Whether other pairs come from other sources.
        mode: think or no_think.
        chosen, rejected: The prompt and what each side continues it with.
    """

    where: str
    source: str
    by_source: bool
    mode: str
    chosen: Side
    rejected: Side


@dataclass
class PreferenceTask(EvaluationTask):
    """Held-out pairs: which side the model finds likelier, and by how much."""

    VERSION = 1

    kind: str = "preference"
    data: str = "heldout_pairs"  # mixture name
    max_rows: int | None = count(200)  # the first ones; null: all


@measures(PreferenceTask)
class Preference(Measurement):
    """Accuracy and margin on pairs, encoded as training encodes them.

    With log p the log-probability of a side's scored tokens after the prompt, summed, in nats, a pair's margin is
    log p(chosen) - log p(rejected). The reward margin of DPO and APO is beta times the policy's margin less the
    reference's, so the difference between two checkpoints' margins is what training moved.

    Metrics:
        accuracy: Share of pairs with a margin above 0; a margin of 0 counts half.
        margin: Mean margin, nats.
        accuracy/per_token, margin/per_token: With log p divided by the number of its tokens: long sides lose nothing.
        margin/chosen, margin/rejected: Mean log p of that side: whether a margin grew at the chosen side's cost.
        accuracy/MODE, margin/MODE: Pairs with that `enable_thinking`; pairs that do not say are think pairs.
        accuracy/SOURCE, margin/SOURCE: Per source, where there are several.

    Attributes:
        notes: "pairs_without_trained_token": pairs passed over as a side has nothing to score; "pairs_equal": pairs
            passed over as both sides have the same tokens.
    """

    def __init__(self, name: str, config: PreferenceTask, context: Context):
        super().__init__(name, config, context)
        check_counts(self.key, config, "max_rows")

    def items(self, tokenizer: "PreTrainedTokenizerBase") -> list[Item]:
        self.notes = {"pairs_without_trained_token": 0, "pairs_equal": 0}
        taken = []
        for i, (source, row) in enumerate(self.context.rows(self.config.data)):
            if len(taken) == self.config.max_rows:
                break
            chosen, rejected = self._sides(tokenizer, row)
            if not chosen.places or not rejected.places:
                self.notes["pairs_without_trained_token"] += 1
            elif chosen.ids == rejected.ids:
                self.notes["pairs_equal"] += 1
            else:
                taken.append((i, source, row, chosen, rejected))
        sources = {source for _, source, *_ in taken}
        if len(sources) > 1 and (clash := sorted(DETAILS & sources)):
            raise UserError(
                f"{self.key}.data={self.config.data}: the source {clash[0]!r} has the name of a metric; rename it in "
                f"data.{self.config.data}.sources"
            )
        # The model holds one side of each pair at a time, so the longer one is what an item costs.
        return [
            Item(
                str(i),
                max(chosen.ids, rejected.ids, key=len),
                about=Pair(where(row), source, len(sources) > 1, mode_of(row), chosen, rejected),
            )
            for i, source, row, chosen, rejected in taken
        ]

    def measure(self, engine: Engine, items: list[Item]) -> list[Sample]:
        chosen, rejected = (engine.logps([getattr(item.about, side) for item in items]) for side in SIDES)
        return [_sample(engine.tokenizer, *both) for both in zip(items, chosen, rejected, strict=True)]

    def _sides(self, tokenizer: "PreTrainedTokenizerBase", row: dict) -> tuple[Side, Side]:
        if validate_row(row, where(row), pairs=True) != "preference":
            raise UserError(
                f"{where(row)}: has the columns {', '.join(row)}; expected chosen and rejected; take its source out "
                f"of data.{self.config.data}"
            )
        with named(row):
            pair = encode_pair(
                tokenizer,
                row["chosen"],
                row["rejected"],
                template_kwargs=row.get("chat_template_kwargs"),
                tools=row.get("tools"),
                today=self.context.today,
            )
        chosen = _side(pair.prompt_ids, pair.chosen_ids, pair.chosen_fates)
        return chosen, _side(pair.prompt_ids, pair.rejected_ids, pair.rejected_fates)


def _side(prompt_ids: list[int], ids: list[int], fates: list[int]) -> Side:
    return Side(prompt_ids + ids, [len(prompt_ids) + i for i, fate in enumerate(fates) if fate == Fate.TRAINED])


def _sample(tokenizer: "PreTrainedTokenizerBase", item: Item, chosen: list[float], rejected: list[float]) -> Sample:
    pair: Pair = item.about
    margin = sum(chosen) - sum(rejected)
    margin_per_token = sum(chosen) / len(chosen) - sum(rejected) / len(rejected)
    metrics = {
        "accuracy": _likelier(margin),
        "margin": margin,
        "accuracy/per_token": _likelier(margin_per_token),
        "margin/per_token": margin_per_token,
        "margin/chosen": sum(chosen),
        "margin/rejected": sum(rejected),
    }
    for group in (pair.mode, pair.source) if pair.by_source else (pair.mode,):
        metrics |= {f"accuracy/{group}": metrics["accuracy"], f"margin/{group}": margin}
    record = {"row": pair.where, "source": pair.source, "mode": pair.mode}
    for name, side, logps in (("chosen", pair.chosen, chosen), ("rejected", pair.rejected, rejected)):
        text = tokenizer.decode([side.ids[place] for place in side.places])
        record[name] = {"scored_text": text, "scored_tokens": len(logps), "logp": sum(logps)}
    record["prompt"] = tokenizer.decode(pair.chosen.ids[: pair.chosen.places[0]])
    return Sample(item.id, metrics, record=record)


def _likelier(margin: float) -> float:
    """1 above 0, 0 below, and a half between."""
    return ((margin > 0) + (margin >= 0)) / 2
