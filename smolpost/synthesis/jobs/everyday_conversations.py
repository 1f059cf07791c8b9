"""Everyday conversations: a teacher writes both sides, the user's side in the role of a persona."""

import random
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from smolpost.chat.reasoning import split_reasoning
from smolpost.inference.seeds import derive_seed
from smolpost.synthesis.filters import first_fault, judge_sample
from smolpost.synthesis.jobs.asking import Asker, has_answer, row_of
from smolpost.synthesis.records import Ask, Job, Message, Outcome, Prompt, Record, Reply, Sample
from smolpost.synthesis.settings import Filters, Teacher

LANGUAGES = {
    "en": "English", "fr": "French", "es": "Spanish", "de": "German", "it": "Italian", "pt": "Portuguese",
}  # fmt: skip
USER_TOKENS = 512  # of a user's message, at most
QUOTES = "\"'“”„«»‹›"

FIRST = """Play a person who chats with an AI assistant.
The person: {persona}.
What the person wants to talk about: {topic}.

Write the person's first message in {language}: one to three sentences, as people type them in a chat. Write nothing \
but the message."""
NEXT = """Play a person who chats with an AI assistant.
The person: {persona}.
What the person wants to talk about: {topic}.

The chat so far:

{chat}

Write the person's next message in {language}: one to three sentences that take up the assistant's last reply, such as \
a further question, a detail, a doubt or a change of plan. Write nothing but the message."""


class Settings(Protocol):
    """What is read of a stage; `stages.everyday_conversations` says what each field means."""

    teacher: Teacher
    num_conversations: int
    min_turns: int
    max_turns: int
    languages: dict[str, float]
    filters: Filters
    seed: int


class EverydayConversations(Job):
    """
    Args:
        personas, topics: A line for each.
    """

    def __init__(self, settings: Settings, personas: list[str], topics: list[str]):
        self.settings, self.personas, self.topics = settings, personas, topics
        self.asker = Asker("teacher", settings.teacher, settings.seed)

    def prompts(self) -> Iterator[Prompt]:
        """A larger number keeps the earlier ones as they are. A persona meets a topic again when all have met."""
        shares = {code: share for code, share in self.settings.languages.items() if share}
        meetings = [(persona, topic) for persona in self.personas for topic in self.topics]
        random.Random(derive_seed(self.settings.seed, "meetings")).shuffle(meetings)
        counts = dict.fromkeys(shares, 0)
        for number in range(self.settings.num_conversations):
            # The language that is furthest behind its share.
            code = max(shares, key=lambda c: shares[c] / sum(shares.values()) * (number + 1) - counts[c])
            counts[code] += 1
            persona, topic = meetings[number % len(meetings)]
            draw = random.Random(derive_seed(self.settings.seed, "turns", number))
            turns = draw.randint(self.settings.min_turns, self.settings.max_turns)
            row = {"persona": persona, "topic": topic, "language": code, "turns": turns}
            yield Prompt(f"everyday-{number:06d}", f"everyday_{code}", row)

    async def converse(self, role: str, prompt: Prompt, ask: Ask) -> list[Sample]:
        """User and assistant in turn, up to a message that is empty or cut."""
        thinking, messages, replies = bool(self.settings.teacher.thinking), [], []
        for turn in range(prompt.row["turns"]):
            question = [{"role": "user", "content": _instruction(prompt.row, messages)}]
            request = self.asker.request(prompt, question, False, turn=f"user {turn}")
            said = await ask(request._replace(max_new_tokens=USER_TOKENS))
            replies.append(said)
            if not _goes_on(said):
                break
            messages.append({"role": "user", "content": _unquoted(said.content)})
            reply = await ask(self.asker.request(prompt, messages, thinking, turn=turn))
            replies.append(reply)
            messages.append(self.asker.turn(reply))
            if not _goes_on(reply):
                break
        return [Sample(messages, replies)]

    def outcomes(self, prompt: Prompt, records: Mapping[str, Record]) -> list[Outcome]:
        [sample] = records["teacher"].samples
        thinking = bool(self.settings.teacher.thinking)
        modes = [thinking if number % 2 else False for number in range(len(sample.replies))]
        language = prompt.row["language"]
        verdicts = judge_sample(sample, prompt, self.settings.filters, thinking=modes, language=language)
        reason = first_fault(verdicts)
        if not reason and len(sample.replies) < 2 * prompt.row["turns"]:
            reason = "unanswered"
        row = None if reason else row_of(prompt, thinking, "", {"messages": sample.messages})
        return [Outcome(prompt, row, reason, verdicts=verdicts, records=records)]


def _instruction(row: dict[str, Any], messages: list[Message]) -> str:
    """What the teacher is told that plays the user."""
    asked = {"persona": row["persona"], "topic": row["topic"], "language": LANGUAGES[row["language"]]}
    if not messages:
        return FIRST.format(**asked)
    # The assistant's reasoning is not what the user saw.
    answers = {"user": "Person", "assistant": "Assistant"}
    chat = "\n\n".join(f"{answers[turn['role']]}: {split_reasoning(turn['content'])[1]}" for turn in messages)
    return NEXT.format(**asked, chat=chat)


def _goes_on(reply: Reply) -> bool:
    return has_answer(reply) and reply.finish_reason == "stop" and not reply.tool_calls


def _unquoted(text: str) -> str:
    """The message without the quotation marks around it that some models add."""
    text = text.strip()
    is_quoted = len(text) > 1 and text[0] in QUOTES and text[-1] in QUOTES and not set(text[1:-1]) & set(QUOTES)
    return text[1:-1].strip() if is_quoted else text
