"""What a kind of evaluation task is: a dataclass with its settings, and a class that measures with them.

A kind is one file, in `evaluation/tasks/` or in a module that a recipe names under `plugins`:

    @dataclass
    class LengthTask(EvaluationTask):
        VERSION = 1
        kind: str = "length"
        max_rows: int = count(100)

    @measures(LengthTask)
    class Length(Measurement):
        def items(self, tokenizer): ...
        def measure(self, engine, items): ...

The runner measures items in batches and keeps one sample each. A metric whose name has no slash is a headline and
becomes a column of the results' table; details follow one, as in `think/pass@4`.

Planning imports these files, so they import torch and transformers inside functions only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from smolpost.errors import UserError
from smolpost.inference.engine import Engine, Reply
from smolpost.registry import TASK_KINDS, check_dataclass
from smolpost.schema import MISSING, tuning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODES = {"think": True, "no_think": False}


@dataclass
class EvaluationTask:
    """The settings that all kinds of task have.

    Attributes:
        VERSION: Part of a measured task's key. Raise it with a change of the code that changes a score.
        measurement: The class that `measures` registered for these settings.
        kind: Name of the kind; a subclass gives it.
        stages: Whose models are measured.
    """

    VERSION: ClassVar[int] = 1
    measurement: ClassVar[type["Measurement"]]

    kind: str = MISSING
    stages: list[str] | None = tuning([])  # whose models it measures; empty: all; null: only what a sweep tries

    def mixtures(self) -> list[tuple[str, str]]:
        """(key, mixture name) of every mixture under `data` this task reads."""
        return [("data", self.data)] if hasattr(self, "data") else []

    def files(self) -> list[tuple[str, str]]:
        """(key, path) of every other file this task reads."""
        return []

    def build(self, name: str, context: "Context") -> "Measurement":
        """The measurement that `evaluation.tasks.NAME` describes.

        Raises:
            UserError: A setting is out of range.
        """
        return self.measurement(name, self, context)


class Context(NamedTuple):
    """What all tasks of an evaluation share.

    Attributes:
        today: Date rendered into prompts.
        seed: Of prompts and of sampled replies.
        rows: Name of a mixture under `data` to its (source, row) pairs, in the mixture's order.
    """

    today: str
    seed: int
    rows: Callable[[str], list[tuple[str, dict]]]


@dataclass(frozen=True)
class Item:
    """One thing to ask of the model.

    Attributes:
        id: Unique in the task; the same in every run.
        ids: Token ids of the prompt up to where the reply begins, or of the whole sequence whose likelihood is asked.
        max_new_tokens: Longest reply; 0 where none is generated.
        num_samples: Replies asked for.
        about: What the task needs when it measures this item.
    """

    id: str
    ids: list[int]
    max_new_tokens: int = 0
    num_samples: int = 1
    about: Any = None

    @property
    def num_tokens(self) -> int:
        """Most tokens that the model holds at once for this item."""
        return (len(self.ids) + self.max_new_tokens) * self.num_samples


@dataclass(frozen=True)
class Sample:
    """The measurement of one item.

    Attributes:
        id: The item's.
        metrics: Metric name -> value.
        weights: Weight of a metric's value in its mean, such as the number of tokens behind a loss; 1 if not given.
        cluster: Samples of one cluster are not independent and are resampled together; "" stands for the id.
        record: What was asked and what came back, for a reader; JSON values. The runner adds the prompt where a reply
            was asked for.
    """

    id: str
    metrics: dict[str, float]
    weights: dict[str, float] = field(default_factory=dict)
    cluster: str = ""
    record: dict[str, Any] = field(default_factory=dict)


class Measurement(ABC):
    """A task at work; a subclass states its metrics, and refuses settings that are out of range when it is made.

    Args:
        name: Of the task under `evaluation.tasks`.
        config: Its settings.
        context: What all tasks share.

    Attributes:
        key: Of the task in the recipe, for messages.
        notes: What `items` counted beside the metrics, such as rows passed over.
    """

    def __init__(self, name: str, config: EvaluationTask, context: Context):
        self.key, self.config, self.context = f"evaluation.tasks.{name}", config, context
        self.notes: dict[str, int] = {}

    @abstractmethod
    def items(self, tokenizer: "PreTrainedTokenizerBase") -> list[Item]:
        """Everything that will be asked; the same list for the same tokenizer, with every model.

        Raises:
            UserError: A setting or a row cannot be used.
        """

    @abstractmethod
    def measure(self, engine: Engine, items: list[Item]) -> list[Sample]:
        """One sample for each item of a batch, in their order."""


def measures(config: type[EvaluationTask]) -> Callable[[type[Measurement]], type[Measurement]]:
    """Decorator of the class that measures a kind of task: registers the kind under the `kind` of its settings.

    Args:
        config: The settings, a dataclass.
    Raises:
        UserError: Another module has registered the kind, or the settings are not a dataclass.
    """
    check_dataclass(config)

    def register(measurement: type[Measurement]) -> type[Measurement]:
        TASK_KINDS.add(config.kind, config).measurement = measurement
        return measurement

    return register


def check_counts(key: str, config: EvaluationTask, *fields: str) -> None:
    """Refuse settings below 1. A setting that is null has no limit.

    Raises:
        UserError: The first such one, named below `key`.
    """
    for name in fields:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{key}.{name}={value} is below 1; raise it")


def check_choices(key: str, config: EvaluationTask, name: str, known: Iterable | None = None) -> None:
    """Refuse a list that is empty, repeats an entry, or has an entry outside `known`.

    Raises:
        UserError: What the list is to hold.
    """
    values = getattr(config, name)
    repeated = not values or len(set(values)) < len(values)
    if repeated or (known is not None and not set(values) <= set(known)):
        remedy = "name one or more, each once" if known is None else f"use some of {', '.join(known)}"
        raise UserError(f"{key}.{name}={values} is not a list of different {name}; {remedy}")


def greedy_replies(engine: Engine, items: list[Item]) -> list[Reply]:
    """The likeliest reply to each item of a batch."""
    longest = max(item.max_new_tokens for item in items)
    return [reply for [reply] in engine.generate([item.ids for item in items], max_new_tokens=longest)]
