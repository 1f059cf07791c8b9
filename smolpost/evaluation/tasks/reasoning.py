"""Problems with one right answer, asked with and without thinking.

Chen et al. 2021 (arXiv:2107.03374) define pass@k: the chance that one of k replies at least is right.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from smolpost.chat.answers import Answers, MathAnswers, PatternAnswers, opens_thinking, parts_of
from smolpost.chat.masks import encode_prompt
from smolpost.chat.render import text_of
from smolpost.data.prompts import conversation, named, split_last_reply
from smolpost.errors import UserError
from smolpost.evaluation.task import (
    MODES,
    Context,
    EvaluationTask,
    Item,
    Measurement,
    Sample,
    check_choices,
    check_counts,
    measures,
)
from smolpost.inference.engine import Engine, Reply
from smolpost.inference.seeds import derive_seed
from smolpost.schema import choice, count, number, numbers, some

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FLAGS = {"/think", "/no_think"}
SHARES = ("tokens", "cut", "unclosed")


class ReasoningPrompt(NamedTuple):
    """A row in one mode.

    Attributes:
        row: Its index among the mixture's rows.
        source: Name of its source.
        by_source: Whether other problems come from other sources.
        mode: think or no_think.
        question: Text of the last turn before the reply.
        expected: The right answer, as the task's answers find it.
        opened: The prompt ends inside a think block.
    """

    row: int
    source: str
    by_source: bool
    mode: str
    question: str
    expected: Any
    opened: bool


@dataclass
class ReasoningTask(EvaluationTask):
    """Problems with one right answer, asked with and without thinking."""

    VERSION = 1

    kind: str = "reasoning"
    data: str = "heldout"  # mixture name; a row's last assistant turn holds the right answer
    max_rows: int | None = count(100)  # the first rows that hold an answer; null: all
    modes: list[str] = some("think", "no_think")
    answer: str = choice("pattern", "math")  # equal as text, or as mathematics (math-verify)
    answer_pattern: str = r"(?s)(.*)"  # first group of the last match in the text after the think block is the answer
    max_new_tokens: int = count(256)
    num_samples: int = count(1)  # replies per problem and mode
    temperature: float = number("[0, inf)", 0.0)  # 0: greedy; above 0 for several samples
    top_p: float = number("(0, 1]", 1.0)
    pass_at: list[int] = numbers("[1, inf)", 1)  # k of pass@k, each at most num_samples


@measures(ReasoningTask)
class Reasoning(Measurement):
    """Share of right answers, per mode.

    Metrics, for each mode of `config.modes`:
        MODE: share of replies with the right answer, which is also the estimate of pass@1.
        MODE/pass@K: for each K above 1 of `config.pass_at`.
        MODE/tokens: mean length of the think block, in tokens, its tags left out.
        MODE/cut: share of replies that reached max_new_tokens.
        MODE/unclosed: share of replies that ended inside their think block; they count as wrong.
        MODE/SOURCE: like MODE, per source, where there are several.

    Attributes:
        notes: "rows_without_answer": rows passed over as their last assistant turn holds no answer; "rows_with_flag":
            rows passed over as their system message sets the mode itself. Rows after the last one needed are not read.
    """

    def __init__(self, name: str, config: ReasoningTask, context: Context):
        super().__init__(name, config, context)
        self._check_settings()
        self.answers = self._answers()

    def items(self, tokenizer: "PreTrainedTokenizerBase") -> list[Item]:
        self.notes = {"rows_without_answer": 0, "rows_with_flag": 0}
        asked = []
        for i, (source, row) in enumerate(self.context.rows(self.config.data)):
            if len(asked) == self.config.max_rows:
                break
            prompt, reference = split_last_reply(conversation(row, self.config.data))
            expected = self.answers.find(parts_of(reference).answer)
            if not expected:
                self.notes["rows_without_answer"] += 1
            elif _sets_mode(prompt):
                self.notes["rows_with_flag"] += 1
            else:
                asked.append((i, source, row, prompt, expected))
        sources = {source for _, source, *_ in asked}
        self._check_sources(sources)
        return [
            self._item(tokenizer, mode, len(sources) > 1, *problem) for problem in asked for mode in self.config.modes
        ]

    def measure(self, engine: Engine, items: list[Item]) -> list[Sample]:
        replies = engine.generate(
            [item.ids for item in items],
            max_new_tokens=max(item.max_new_tokens for item in items),
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            num_samples=self.config.num_samples,
            seed=derive_seed(self.context.seed, items[0].id),
        )
        return [self._sample(engine.tokenizer, item, texts) for item, texts in zip(items, replies, strict=True)]

    def _item(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        mode: str,
        by_source: bool,
        i: int,
        source: str,
        row: dict,
        prompt: list[dict],
        expected: Any,
    ) -> Item:
        kwargs = {**(row.get("chat_template_kwargs") or {}), "enable_thinking": MODES[mode]}
        with named(row):
            ids = encode_prompt(
                tokenizer, prompt, template_kwargs=kwargs, tools=row.get("tools"), today=self.context.today
            )
        question = text_of(prompt[-1].get("content")) if prompt else ""
        problem = ReasoningPrompt(i, source, by_source, mode, question, expected, opens_thinking(tokenizer, ids))
        return Item(f"{i}/{mode}", ids, self.config.max_new_tokens, self.config.num_samples, problem)

    def _sample(self, tokenizer: "PreTrainedTokenizerBase", item: Item, replies: list[Reply]) -> Sample:
        problem: ReasoningPrompt = item.about
        read = [self._read(tokenizer, problem, reply) for reply in replies]
        mode, num_right = problem.mode, sum(entry["right"] for entry in read)
        metrics = {mode: num_right / len(read)}
        for k in self.config.pass_at:
            if k > 1:
                metrics[f"{mode}/pass@{k}"] = pass_at(k, len(read), num_right)
        metrics |= {f"{mode}/{share}": sum(entry[share] for entry in read) / len(read) for share in SHARES}
        if problem.by_source:
            metrics[f"{mode}/{problem.source}"] = metrics[mode]
        record = {
            "mode": mode,
            "source": problem.source,
            "row": problem.row,
            "question": problem.question,
            "expected": self.answers.shown(problem.expected),
            "replies": read,
        }
        return Sample(item.id, metrics, cluster=str(problem.row), record=record)

    def _read(self, tokenizer: "PreTrainedTokenizerBase", problem: ReasoningPrompt, reply: Reply) -> dict[str, Any]:
        """A reply for the reader, with what the metrics count."""
        reasoning, answer, unclosed = parts_of(reply.text, opened_in_prompt=problem.opened)
        found = self.answers.find(answer)
        return {
            "reply": reply.text,
            "answer": self.answers.shown(found),
            "right": bool(found) and self.answers.agree(problem.expected, found),
            "tokens": len(tokenizer.encode(reasoning, add_special_tokens=False)),
            "cut": reply.cut,
            "unclosed": unclosed,
        }

    def _answers(self) -> Answers:
        if self.config.answer == "math":
            return MathAnswers(f"{self.key}.answer")
        return PatternAnswers(self.config.answer_pattern, f"{self.key}.answer_pattern")

    def _check_settings(self) -> None:
        config = self.config
        check_choices(self.key, config, "modes", MODES)
        check_counts(self.key, config, "max_rows", "max_new_tokens", "num_samples")
        wrong = None
        if not config.temperature >= 0 or config.temperature == math.inf:
            wrong = f"temperature={config.temperature} is not a number from 0 on; use 0 for the likeliest tokens"
        elif not 0 < config.top_p <= 1:
            wrong = f"top_p={config.top_p} is outside (0, 1]; use 1 for all tokens"
        elif config.num_samples > 1 and config.temperature == 0:
            wrong = f"num_samples={config.num_samples} replies at temperature=0 are all the same; raise temperature"
        elif any(not 1 <= k <= config.num_samples for k in config.pass_at):
            wrong = f"pass_at={config.pass_at} needs k from 1 to num_samples={config.num_samples}; raise num_samples"
        if wrong:
            raise UserError(f"{self.key}.{wrong}")

    def _check_sources(self, sources: set[str]) -> None:
        details = {*SHARES, *(f"pass@{k}" for k in self.config.pass_at)}
        if len(sources) > 1 and (taken := sorted(details & sources)):
            raise UserError(
                f"{self.key}.data={self.config.data}: the source {taken[0]!r} has the name of a metric; rename it in "
                f"data.{self.config.data}.sources"
            )


def pass_at(k: int, num_samples: int, num_right: int) -> float:
    """The unbiased estimate of pass@k, equation 1 of arXiv:2107.03374, as a product that cannot overflow.

    Args:
        k: From 1 to num_samples.
        num_samples: Replies drawn.
        num_right: How many of them are right.
    """
    if num_samples - num_right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_right + 1, num_samples + 1))


def _sets_mode(prompt: list[dict]) -> bool:
    """Whether the system message holds a mode flag, which goes before the mode that is asked for."""
    first = prompt[0] if prompt else {}
    return first.get("role") == "system" and bool(FLAGS & set(text_of(first.get("content")).split()))
