"""Key-value recall by context length and depth, in the miniature's alphabet."""

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from smolpost.chat.masks import encode_prompt
from smolpost.chat.reasoning import split_reasoning
from smolpost.data.tasks import KEYS, recall_row
from smolpost.errors import UserError
from smolpost.evaluation.fit_length import largest
from smolpost.evaluation.task import (
    Context,
    EvaluationTask,
    Item,
    Measurement,
    Sample,
    check_choices,
    check_counts,
    greedy_replies,
    measures,
)
from smolpost.inference.engine import Engine, Reply
from smolpost.schema import count, numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_DEPTHS = 10  # bins


class RecallPrompt(NamedTuple):
    """What `measure` needs to know of an item."""

    length: int
    user: str
    answer: str


@dataclass
class RecallTask(EvaluationTask):
    """Key-value recall in the miniature's alphabet, by context length and depth."""

    VERSION = 1

    kind: str = "recall"
    lengths: list[int] = numbers("[1, inf)", 64, 256, 1024)  # tokens of prompt and answer together
    num_prompts: int = count(16)  # per length
    pairs: int = count(8)  # keys and values in each context
    queries: int = count(8)  # of them asked for


@measures(RecallTask)
class Recall(Measurement):
    """Metrics: `LENGTH`, the share of asked pairs in the reply; `LENGTH/depth_D`, the same of the pairs at a depth.

    A depth is a pair's place in its context, 0 first and 1 last, in bins of a tenth named by their lower ends.
    """

    def __init__(self, name: str, config: RecallTask, context: Context):
        """
        Raises:
            UserError: A setting is out of range.
        """
        super().__init__(name, config, context)
        check_choices(self.key, config, "lengths")
        check_counts(self.key, config, "num_prompts", "pairs", "queries")
        for field, limit, what in (("pairs", len(KEYS), "the number of keys"), ("queries", config.pairs, "pairs")):
            value = getattr(config, field)
            if value > limit:
                raise UserError(f"{self.key}.{field}={value} is above {limit}, {what}; lower it")

    def items(self, tokenizer: "PreTrainedTokenizerBase") -> list[Item]:
        """Prompts whose tokens, with those of the answer and its stop token, would with one symbol more be too many.

        Prompt i starts from the same random numbers at every length. Lengths above the model's
        `max_position_embeddings` are asked too: they measure extrapolation.

        Raises:
            UserError: A length cannot hold the pairs.
        """
        return [
            self._item(tokenizer, length, i)
            for length in sorted(self.config.lengths)
            for i in range(self.config.num_prompts)
        ]

    def measure(self, engine: Engine, items: list[Item]) -> list[Sample]:
        return [_sample(item, reply) for item, reply in zip(items, greedy_replies(engine, items), strict=True)]

    def _item(self, tokenizer: "PreTrainedTokenizerBase", length: int, i: int) -> Item:
        smallest = 3 * self.config.pairs + 1 + self.config.queries
        found = largest(lambda size: self._ids(tokenizer, self._row(i, size)), length, smallest, smallest + length)
        if found is None:
            least = max(len(self._ids(tokenizer, self._row(j, smallest))) for j in range(self.config.num_prompts))
            raise UserError(
                f"{self.key}.lengths={length} is too short for {self.config.pairs} pairs and {self.config.queries} "
                f"queries: prompt and answer have {least} tokens at least; use {least} or more, or lower pairs or "
                "queries"
            )
        size, ids = found
        row = self._row(i, size)
        room = len(_reply_ids(tokenizer, row))
        _, user, answer = (message["content"] for message in row["messages"])
        return Item(f"{length}/{i}", ids[:-room], room, about=RecallPrompt(length, user, answer))

    def _row(self, i: int, size: int) -> dict:
        rng = np.random.default_rng([self.context.seed, i])
        return recall_row(rng, size, self.config.pairs, self.config.queries, distinct=True)

    def _ids(self, tokenizer: "PreTrainedTokenizerBase", row: dict) -> list[int]:
        """Prompt, answer and stop token."""
        kwargs = row["chat_template_kwargs"]
        prompt = encode_prompt(tokenizer, row["messages"][:-1], template_kwargs=kwargs, today=self.context.today)
        return prompt + _reply_ids(tokenizer, row)


def _reply_ids(tokenizer: "PreTrainedTokenizerBase", row: dict) -> list[int]:
    """Answer and stop token."""
    answer = row["messages"][-1]["content"]
    return [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]


def _sample(item: Item, reply: Reply) -> Sample:
    asked: RecallPrompt = item.about
    answer = split_reasoning(reply.text)[1]
    pairs = [asked.answer[i : i + 2] for i in range(0, len(asked.answer), 2)]
    context = asked.user.partition("?")[0]
    found: dict[str, list[bool]] = defaultdict(list)
    for pair in pairs:
        depth = context.index("#" + pair) / max(1, len(context) - 3)  # a pair is three symbols
        bin_ = min(int(depth * NUM_DEPTHS), NUM_DEPTHS - 1)
        found[f"{asked.length}/depth_{bin_ / NUM_DEPTHS:.2f}"].append(pair in answer)
    hits = [pair in answer for pair in pairs]
    metrics = {f"{asked.length}": sum(hits) / len(hits)}
    metrics |= {name: sum(found[name]) / len(found[name]) for name in sorted(found)}
    weights = {name: float(len(found[name])) for name in found}
    record = {
        "question": asked.user,
        "expected": asked.answer,
        "reply": reply.text,
        "answer": answer,
        "prompt_tokens": len(item.ids),
        "cut": reply.cut,
    }
    return Sample(item.id, metrics, weights, record=record)
