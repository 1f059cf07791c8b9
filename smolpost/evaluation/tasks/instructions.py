"""Instruction following with verifiable instructions, as IFEval (arXiv:2311.07911) scores it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from smolpost.chat.answers import opens_thinking, parts_of
from smolpost.chat.masks import encode_prompt
from smolpost.errors import UserError
from smolpost.evaluation.constraints import follows, follows_loosely
from smolpost.evaluation.instruction_prompts import Prompt, own_prompts, read_prompts
from smolpost.evaluation.task import (
    MODES,
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
from smolpost.schema import count, some

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class InstructionsPrompt(NamedTuple):
    """A prompt in one mode.

    Attributes:
        number: The prompt's, in order.
        prompt: What is asked, and what has to be followed.
        mode: think or no_think.
        opened: The rendered prompt ends inside a think block.
    """

    number: int
    prompt: Prompt
    mode: str
    opened: bool


@dataclass
class InstructionsTask(EvaluationTask):
    """Instructions whose following a program can verify (IFEval, arXiv:2311.07911)."""

    VERSION = 1

    kind: str = "instructions"
    prompts: str | None = None  # JSONL of {"key", "prompt", "instruction_id_list", "kwargs"}; null: own prompts
    num_prompts: int | None = count(100)  # the first ones, or as many made; null: all of the file
    modes: list[str] = some("think", "no_think")
    max_new_tokens: int = count(1024)

    def files(self) -> list[tuple[str, str]]:
        return [("prompts", self.prompts)] if self.prompts else []


@measures(InstructionsTask)
class Instructions(Measurement):
    """Share of prompts whose instructions are all followed, per mode; replies are greedy.

    Judged is the text after the think block; of a reply that ends inside it, nothing, which follows no instruction.

    Metrics, for each mode of `config.modes`:
        MODE: share of prompts with all instructions followed (IFEval's prompt-level strict accuracy).
        MODE/instruction_strict: share of instructions followed.
        MODE/prompt_loose, MODE/instruction_loose: the same for `constraints.follows_loosely`.
        MODE/FAMILY: like instruction_strict, per family of instructions, which their ids begin with.
        MODE/cut: share of replies that reached max_new_tokens.
        MODE/unclosed: share of replies that ended inside their think block.
    """

    def __init__(self, name: str, config: InstructionsTask, context: Context):
        super().__init__(name, config, context)
        check_choices(self.key, config, "modes", MODES)
        check_counts(self.key, config, "num_prompts", "max_new_tokens")
        if config.num_prompts is None and config.prompts is None:
            raise UserError(
                f"{self.key}.num_prompts=null asks for all prompts of a file, and prompts=null names none; give one"
            )

    def items(self, tokenizer: "PreTrainedTokenizerBase") -> list[Item]:
        if self.config.prompts is None:
            prompts = own_prompts(self.config.num_prompts, self.context.seed)
        else:
            prompts = read_prompts(self.config.prompts, self.config.num_prompts, f"{self.key}.prompts")
        asked = [(mode, i, prompt) for mode in self.config.modes for i, prompt in enumerate(prompts)]
        return [self._item(tokenizer, *entry) for entry in asked]

    def measure(self, engine: Engine, items: list[Item]) -> list[Sample]:
        return [_sample(item, reply) for item, reply in zip(items, greedy_replies(engine, items), strict=True)]

    def _item(self, tokenizer: "PreTrainedTokenizerBase", mode: str, number: int, prompt: Prompt) -> Item:
        messages = [{"role": "user", "content": prompt.text}]
        kwargs = {"enable_thinking": MODES[mode]}
        ids = encode_prompt(tokenizer, messages, template_kwargs=kwargs, today=self.context.today)
        asked = InstructionsPrompt(number, prompt, mode, opens_thinking(tokenizer, ids))
        return Item(f"{number}/{mode}", ids, self.config.max_new_tokens, about=asked)


def _sample(item: Item, reply: Reply) -> Sample:
    asked: InstructionsPrompt = item.about
    parts = parts_of(reply.text, opened_in_prompt=asked.opened)
    judged = [
        {
            "instruction": name,
            "kwargs": kwargs,
            "strict": follows(parts.answer, name, kwargs),
            "loose": follows_loosely(parts.answer, name, kwargs),
        }
        for name, kwargs in asked.prompt.instructions
    ]
    metrics, weights = _metrics(judged, {"/cut": float(reply.cut), "/unclosed": float(parts.unclosed)})
    record = {
        "key": asked.prompt.key,
        "mode": asked.mode,
        "question": asked.prompt.text,
        "instructions": judged,
        "reply": reply.text,
        "answer": parts.answer,
        "tokens": reply.num_tokens,
        "cut": reply.cut,
    }
    return Sample(
        item.id,
        {asked.mode + metric: value for metric, value in metrics.items()},
        {asked.mode + metric: weight for metric, weight in weights.items()},
        cluster=str(asked.number),
        record=record,
    )


def _metrics(judged: list[dict[str, Any]], shares: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Values and weights of one prompt's metrics, without the mode before their names; families come last."""
    metrics = {"": float(all(entry["strict"] for entry in judged))}
    metrics |= {"/prompt_loose": float(all(entry["loose"] for entry in judged))} | shares
    groups = {"/instruction_strict": [entry["strict"] for entry in judged]}
    groups["/instruction_loose"] = [entry["loose"] for entry in judged]
    for entry in judged:
        groups.setdefault("/" + entry["instruction"].partition(":")[0], []).append(entry["strict"])
    metrics |= {metric: sum(followed) / len(followed) for metric, followed in groups.items()}
    return metrics, {metric: float(len(followed)) for metric, followed in groups.items()}
