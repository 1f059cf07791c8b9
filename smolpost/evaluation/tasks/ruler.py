"""RULER (Hsieh et al. 2024, arXiv:2404.06654): contexts filled up to a length in the model's own tokens.

Everything is made from a seed, without a network; `ruler_problems.py` has the problems. As in RULER, a length holds
the prompt and room for the reply.
"""

import itertools
import random
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from smolpost.chat.answers import opens_thinking, parts_of
from smolpost.chat.masks import encode_prompt
from smolpost.data.sources import read_rows
from smolpost.errors import UserError
from smolpost.evaluation.fit_length import fitted
from smolpost.evaluation.haystack import text_pieces
from smolpost.evaluation.ruler_problems import PROBLEMS, Material, Problem, Question
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
from smolpost.inference.seeds import derive_seed
from smolpost.progress import Progress
from smolpost.schema import Source, count, numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION_TASKS = ("qa_1", "qa_2")

# What RULER leaves for a needle's reply, its longest.
ANSWER_TOKENS = 128

# Rows of a heat map; more prompts share them.
MAX_DEPTHS = 11

_REPEATED = "prompts_with_repeated_text"


class RulerPrompt(NamedTuple):
    """What `measure` needs to know of an item."""

    task: str
    length: int
    depth: float | None
    question: str
    references: list[str]
    size: int  # of the context, in the problem's units
    opened: bool  # the prompt ends inside a think block


@dataclass
class RulerTask(EvaluationTask):
    """RULER's tasks (arXiv:2404.06654) at given lengths, from text of our own or the user's."""

    VERSION = 1

    kind: str = "ruler"
    tasks: list[str] = field(
        default_factory=lambda: [
            "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
            "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe",
        ]
    )  # fmt: skip
    lengths: list[int] = numbers("[1, inf)", 4096, 8192, 16384)  # tokens of prompt and answer together
    num_prompts: int = count(20)  # per task and length
    text: str | None = None  # text file that haystacks are cut from; null: generated prose
    questions: str | None = None  # for qa: JSONL of {"question", "context", "answers"}; contexts of qa_2 are lists
    thinking: bool = False  # ask in think mode
    think_tokens: int = count(1024)  # of each length, left free for the think block

    def files(self) -> list[tuple[str, str]]:
        return [(key, getattr(self, key)) for key in ("text", "questions") if getattr(self, key)]


@measures(RulerTask)
class Ruler(Measurement):
    """Metrics: `LENGTH`, the mean over tasks; `LENGTH/TASK`; `LENGTH/depth_D` over tasks with a single asked needle.

    Attributes:
        notes: "prompts_with_repeated_text": those that the user's text or documents were too short for, and began
            again in.
    """

    def __init__(self, name: str, config: RulerTask, context: Context):
        """
        Raises:
            UserError: A setting is out of range.
        """
        super().__init__(name, config, context)
        check_choices(self.key, config, "tasks", PROBLEMS)
        check_choices(self.key, config, "lengths")
        check_counts(self.key, config, "num_prompts", "think_tokens")
        for task in config.tasks:
            if task in QUESTION_TASKS and not config.questions:
                raise UserError(f"{self.key}.questions is not given; {task} needs it: give it, or take {task} out")

    def items(self, tokenizer: "PreTrainedTokenizerBase") -> list[Item]:
        """Prompts that would, with one unit more (a sentence, a needle, a word, a document), be too long.

        Prompt i of a task begins with the same random numbers at every length and beside any other tasks.

        Raises:
            UserError: A file cannot be used, or a length cannot hold a task.
        """
        config = self.config
        places = list(itertools.product(sorted(config.lengths), config.tasks, range(config.num_prompts)))
        self.notes = {_REPEATED: 0}
        known: dict[int, int] = {}  # one object for each token id: long prompts take a quarter of the memory
        items = []
        with Progress(f"{self.key}: prompts", len(places), "prompt", aside=True) as progress:
            for length, task, i in places:
                problem = self.problem(task, i, length)
                room = self._room(tokenizer, problem)
                found = fitted(problem.message, partial(self.encode, tokenizer), length - room, problem.smallest)
                if found is None:
                    self._refuse(tokenizer, length)
                size, ids = found
                self.notes[_REPEATED] += problem.supply is not None and size > problem.supply
                opened = opens_thinking(tokenizer, ids)
                about = RulerPrompt(task, length, problem.depth, problem.question, problem.references, size, opened)
                items.append(Item(f"{length}/{task}/{i}", [known.setdefault(t, t) for t in ids], room, about=about))
                progress.update()
        return items

    def measure(self, engine: Engine, items: list[Item]) -> list[Sample]:
        return [_sample(item, reply) for item, reply in zip(items, greedy_replies(engine, items), strict=True)]

    def problem(self, task: str, i: int, length: int) -> Problem:
        """The i-th problem of a task, for prompts of a length."""
        material = Material(
            length=length,
            depth=depth_of(i, self.config.num_prompts),
            pieces=self._pieces,
            question=self._questions[task][i] if task in QUESTION_TASKS else None,
            documents=self._documents,
        )
        return PROBLEMS[task](random.Random(derive_seed(self.context.seed, "ruler", task, i)), material)

    def encode(self, tokenizer: "PreTrainedTokenizerBase", message: str) -> list[int]:
        """Token ids of the prompt with a user's message."""
        return encode_prompt(
            tokenizer,
            [{"role": "user", "content": message}],
            template_kwargs={"enable_thinking": self.config.thinking},
            today=self.context.today,
        )

    def _room(self, tokenizer: "PreTrainedTokenizerBase", problem: Problem) -> int:
        """Tokens of the longest reply: RULER's number, or twice a longer answer, and the think block's."""
        num_tokens = len(tokenizer.encode(", ".join(problem.references), add_special_tokens=False))
        return max(ANSWER_TOKENS, 2 * num_tokens) + (self.config.think_tokens if self.config.thinking else 0)

    @cached_property
    def _pieces(self) -> list[str] | None:
        return text_pieces(self.config.text) if self.config.text else None

    @cached_property
    def _questions(self) -> dict[str, list[Question]]:
        """qa task -> its questions."""
        file, questions = self.config.questions, read_questions(self.config.questions)
        for task in QUESTION_TASKS:
            if task in self.config.tasks and len(questions[task]) < self.config.num_prompts:
                raise UserError(
                    f"{self.key}.questions: {file} has {len(questions[task])} rows for {task}, fewer than "
                    f"num_prompts={self.config.num_prompts}; lower it, add rows, or take {task} out of tasks"
                )
        return questions

    @cached_property
    def _documents(self) -> tuple[str, ...]:
        """All documents of the questions, each once; none where no task needs them."""
        if not set(QUESTION_TASKS) & set(self.config.tasks):
            return ()
        asked = itertools.chain.from_iterable(self._questions.values())
        return tuple(dict.fromkeys(document for question in asked for document in question.documents))

    def _refuse(self, tokenizer: "PreTrainedTokenizerBase", length: int) -> NoReturn:
        """Raise, with the least length of every task that this one cannot hold."""
        least: dict[str, int] = defaultdict(int)
        for task, i in itertools.product(self.config.tasks, range(self.config.num_prompts)):
            problem = self.problem(task, i, length)
            shortest = len(self.encode(tokenizer, problem.message(problem.smallest)))
            least[task] = max(least[task], shortest + self._room(tokenizer, problem))
        short = {task: tokens for task, tokens in least.items() if tokens > length}
        raise UserError(
            f"{self.key}.lengths={length} is too short: prompt and reply have at least "
            f"{', '.join(f'{tokens} tokens in {task}' for task, tokens in short.items())}; "
            f"use {max(short.values())} or more, or take {', '.join(short)} out of tasks"
        )


def depth_of(i: int, num_prompts: int) -> float:
    """Depth of prompt i, in [0, 1]: i / (num_prompts - 1), on a grid of `MAX_DEPTHS` where there are more prompts."""
    rows = min(num_prompts, MAX_DEPTHS)
    return (i * rows // num_prompts) / (rows - 1) if rows > 1 else 0.5


def read_questions(file: str) -> dict[str, list[Question]]:
    """The rows of a JSONL file by task: a text as context is for qa_1 (one hop), a list of texts for qa_2 (several).

    Raises:
        UserError: A row is of another shape, or a question's documents are all there are.
    """
    questions: dict[str, list[Question]] = {task: [] for task in QUESTION_TASKS}
    for _, row in read_rows(Source(path=file)):
        context, answers = row.get("context"), row.get("answers")
        documents = [context] if isinstance(context, str) else context
        if not (_texts([row.get("question")]) and _texts(documents) and _texts(answers)):
            raise UserError(
                f'{row.where}: expected "question" (text), "context" (text, or list of texts for qa_2) and "answers" '
                "(list of texts), none of them empty"
            )
        task = "qa_1" if isinstance(context, str) else "qa_2"
        questions[task].append(Question(row["question"], documents, answers))
    different = {document for asked in questions.values() for question in asked for document in question.documents}
    if any(set(question.documents) == different for asked in questions.values() for question in asked):
        raise UserError(f"{file}: no context differs from one question's; add rows to hide it among")
    return questions


def _texts(values: object) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) and v.strip() for v in values)


# ---------------------------------------------------------------- scoring


def string_match_all(reply: str, references: list[str]) -> float:
    """Share of the references that occur in the reply in any case of letters, in [0, 1]."""
    return sum(reference.lower() in reply.lower() for reference in references) / len(references)


def string_match_part(reply: str, references: list[str]) -> float:
    """1 where one of the references occurs in the reply in any case of letters, else 0."""
    return float(any(reference.lower() in reply.lower() for reference in references))


def _sample(item: Item, reply: Reply) -> Sample:
    asked: RulerPrompt = item.about
    answer = parts_of(reply.text, opened_in_prompt=asked.opened).answer
    answer = re.sub(r"[\x00-\x1f]", "\n", answer).strip()  # as RULER reads a reply
    match = string_match_part if asked.task in QUESTION_TASKS else string_match_all
    score = match(answer, asked.references)
    names = [f"{asked.length}", f"{asked.length}/{asked.task}"]
    if asked.depth is not None:
        names.append(f"{asked.length}/depth_{asked.depth:.2f}")
    record = {
        "question": asked.question,
        "references": asked.references,
        "reply": reply.text,
        "answer": answer,
        "score": score,
        "depth": asked.depth,
        "prompt_tokens": len(item.ids),
        "reply_tokens": reply.num_tokens,
        "cut": reply.cut,
    }
    return Sample(item.id, dict.fromkeys(names, score), record=record)
