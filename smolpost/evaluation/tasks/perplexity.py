"""Loss of held-out rows, by source and mode."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from smolpost.chat.fates import Fate
from smolpost.chat.masks import Encoded, encode
from smolpost.data.prompts import mode_of, named, where
from smolpost.data.validate import validate_row
from smolpost.errors import UserError
from smolpost.evaluation.task import MODES, Context, EvaluationTask, Item, Measurement, Sample, check_counts, measures
from smolpost.inference.engine import Engine
from smolpost.schema import count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Passage(NamedTuple):
    """An encoded row.

    Attributes:
        where: File and row.
        source: Name of its source.
        by_source: Whether other rows come from other sources.
        mode: think, no_think or text.
        places: Indices of its trained tokens.
    """

    where: str
    source: str
    by_source: bool
    mode: str
    places: list[int]


@dataclass
class PerplexityTask(EvaluationTask):
    """Loss of the reference replies' trained tokens, by source and mode."""

    VERSION = 1

    kind: str = "perplexity"
    data: str = "heldout"  # mixture name
    max_rows: int | None = count(200)  # per source and mode, the first ones; null: all


@measures(PerplexityTask)
class Perplexity(Measurement):
    """Mean negative log-likelihood of the trained tokens, in nats per token; its exponential is the perplexity.

    The mean is over tokens, as in training: a row counts by its number of trained tokens. Those are what training
    with the default policy trains: all assistant turns, and of a plain text all tokens but the first. Losses compare
    between models with one tokenizer only.

    Metrics:
        think, no_think: Rows with that `enable_thinking`; rows that do not say are think rows.
        text: Rows with plain text.
        MODE/SOURCE: like MODE, per source, where there are several.

    Attributes:
        notes: "rows_without_trained_token": rows passed over.
    """

    def __init__(self, name: str, config: PerplexityTask, context: Context):
        super().__init__(name, config, context)
        check_counts(self.key, config, "max_rows")

    def items(self, tokenizer: "PreTrainedTokenizerBase") -> list[Item]:
        self.notes = {"rows_without_trained_token": 0}
        taken = {mode: {} for mode in (*MODES, "text")}
        for source, row in self.context.rows(self.config.data):
            mode = self._mode(row)
            rows = taken[mode].setdefault(source, [])
            if len(rows) == self.config.max_rows:
                continue
            encoded = self._encoded(tokenizer, row)
            places = [i for i, fate in enumerate(encoded.fates) if fate == Fate.TRAINED and i > 0]
            if places:
                rows.append((where(row), encoded.input_ids, places))
            else:
                self.notes["rows_without_trained_token"] += 1
        several = len({source for rows in taken.values() for source in rows}) > 1
        return [
            Item(f"{mode}/{source}/{i}", ids, about=Passage(place, source, several, mode, places))
            for mode, sources in taken.items()
            for source, rows in sources.items()
            for i, (place, ids, places) in enumerate(rows)
        ]

    def measure(self, engine: Engine, items: list[Item]) -> list[Sample]:
        logps = engine.logps([(item.ids, item.about.places) for item in items])
        return [_sample(engine.tokenizer, *pair) for pair in zip(items, logps, strict=True)]

    def _mode(self, row: dict) -> str:
        shape = validate_row(row, where(row))
        if shape == "preference":
            raise UserError(
                f"{where(row)}: is a preference row; expected messages or text; take its source out of "
                f"data.{self.config.data}, or ask with a preference task"
            )
        return mode_of(row)

    def _encoded(self, tokenizer: "PreTrainedTokenizerBase", row: dict) -> Encoded:
        if row.get("messages") is None:
            from smolpost.data.tokenize import encode_texts

            return encode_texts([row["text"]], tokenizer)[0]
        with named(row):
            return encode(
                tokenizer,
                row["messages"],
                template_kwargs=row.get("chat_template_kwargs"),
                tools=row.get("tools"),
                today=self.context.today,
            )


def _sample(tokenizer: "PreTrainedTokenizerBase", item: Item, logps: list[float]) -> Sample:
    passage: Passage = item.about
    metrics = {passage.mode: -sum(logps) / len(logps)}
    if passage.by_source:
        metrics[f"{passage.mode}/{passage.source}"] = metrics[passage.mode]
    record = {
        "row": passage.where,
        "source": passage.source,
        "mode": passage.mode,
        "trained_tokens": len(logps),
        "prompt": tokenizer.decode(item.ids[: passage.places[0]]),
        "trained_text": tokenizer.decode([item.ids[place] for place in passage.places]),
    }
    return Sample(item.id, metrics, dict.fromkeys(metrics, len(logps)), record=record)
