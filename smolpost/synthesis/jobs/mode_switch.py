"""Conversations whose turns switch between thinking and not, as the user's words /think and /no_think ask.

Without such rows a hybrid model seldom follows a switch in turns 2 and 3: the SmolLM3 team measured 27% and 6%, and 91%
with them (The Smol Training Playbook).
"""

import random
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from smolpost.chat.render import text_of
from smolpost.files import digest
from smolpost.inference.seeds import derive_seed
from smolpost.synthesis.filters import first_fault, judge_sample
from smolpost.synthesis.jobs.asking import Asker, has_answer, row_of
from smolpost.synthesis.jobs.prompts import conversation_of, has_tool_turns, prompts_of, without_mode_words
from smolpost.synthesis.records import Ask, Job, Message, Outcome, Prompt, Sample
from smolpost.synthesis.settings import Filters, Teacher

WORDS = {True: "/think", False: "/no_think"}


class Settings(Protocol):
    """What is read of a stage; `stages.mode_switch` says what each field means."""

    teacher: Teacher
    turns: int
    suffix: str
    filters: Filters
    seed: int


class ModeSwitch(Job):
    """A prompt's row has one conversation under "messages", and under "rows" the ids of the rows that it is made of.

    Args:
        rows: (name of the source, row) of the prompts mixture.
    """

    def __init__(self, settings: Settings, rows: Iterable[tuple[str, dict[str, Any]]]):
        self.settings, self.rows = settings, rows
        self.asker = Asker("teacher", settings.teacher, settings.seed)

    def prompts(self) -> Iterator[Prompt]:
        return chained(prompts_of(self.rows), self.settings.turns)

    async def converse(self, role: str, prompt: Prompt, ask: Ask) -> list[Sample]:
        """Each turn is asked for in its mode; the teacher sees the user's turns without the words."""
        if cannot_switch(prompt):
            return []
        questions = user_turns(prompt.row)
        messages: list[Message] = [turn for turn in conversation_of(prompt.row)[:1] if turn["role"] == "system"]
        shown, replies = list(messages), []
        modes = modes_of(len(questions), self.settings.seed, prompt.id)
        for number, (question, thinking) in enumerate(zip(questions, modes, strict=True)):
            messages.append({"role": "user", "content": question})
            reply = await ask(self.asker.request(prompt, messages, thinking, turn=number))
            messages.append(self.asker.turn(reply))
            replies.append(reply)
            shown += [{"role": "user", "content": f"{question} {WORDS[thinking]}"}, messages[-1]]
            if not has_answer(reply):
                break
        return [Sample(shown, replies)]

    def outcomes(self, prompt: Prompt, records) -> list[Outcome]:
        if reason := cannot_switch(prompt):
            return [Outcome(prompt, None, reason, records=records)]
        [sample] = records["teacher"].samples
        modes = modes_of(len(user_turns(prompt.row)), self.settings.seed, prompt.id)
        verdicts = judge_sample(sample, prompt, self.settings.filters, thinking=modes[: len(sample.replies)])
        reason = first_fault(verdicts)
        if not reason and len(sample.replies) < len(modes):
            reason = "unanswered"
        # In no-think mode the template would take the reasoning out of all turns.
        row = None if reason else row_of(prompt, True, self.settings.suffix, {"messages": sample.messages})
        return [Outcome(prompt, row, reason, verdicts=verdicts, records=records)]


def modes_of(turns: int, seed: int, name: str) -> list[bool]:
    """Whether each turn thinks: drawn evenly from all sequences with a switch, so that any turn thinks half the time.

    Args:
        turns: At least 2.
        name: Of the conversation.
    """
    draw = random.Random(derive_seed(seed, "modes", name))
    while True:
        modes = [draw.random() < 0.5 for _ in range(turns)]
        if len(set(modes)) == 2:
            return modes


def chained(prompts: Iterable[Prompt], turns: int) -> Iterator[Prompt]:
    """Conversations with several user turns as they are; `turns` rows of one source with a single one become one.

    The rest of a source is a shorter conversation. What cannot be chained (`cannot_chain`) stays alone.
    """
    waiting: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if cannot_chain(prompt):
            yield prompt
            continue
        parts = waiting.setdefault(prompt.source, [])
        parts.append(prompt)
        if len(parts) == turns:
            yield joined(parts)
            parts.clear()
    for parts in filter(None, waiting.values()):
        yield joined(parts)


def cannot_chain(prompt: Prompt) -> bool:
    """Whether a row is a conversation already, or says something that is meant for its own question alone."""
    has_system = conversation_of(prompt.row)[0]["role"] == "system"
    says_more = (
        has_system
        or prompt.row.get("tools")
        or any(
            value for key, value in (prompt.row.get("chat_template_kwargs") or {}).items() if key != "enable_thinking"
        )
    )
    return len(user_turns(prompt.row)) != 1 or bool(says_more)


def joined(parts: list[Prompt]) -> Prompt:
    """One conversation of the user turns of all rows."""
    if len(parts) == 1:
        return parts[0]
    ids = [part.id for part in parts]
    messages = [turn for part in parts for turn in conversation_of(part.row)]
    return Prompt(f"{parts[0].source}-{digest(ids)}", parts[0].source, {"messages": messages, "rows": ids})


def user_turns(row: dict[str, Any]) -> list[str]:
    return [without_mode_words(text_of(turn.get("content"))) for turn in conversation_of(row) if turn["role"] == "user"]


def cannot_switch(prompt: Prompt) -> str:
    """Why a conversation cannot be asked for, as it is counted in reports; "" where it can."""
    if has_tool_turns(prompt.row):
        return "tool_turns"
    return "one_turn" if len(user_turns(prompt.row)) < 2 else ""
