"""What a teacher is asked, what it replies, and what is kept of it. Plain data that goes into JSON and back."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

Message = dict[str, Any]


class Prompt(NamedTuple):
    """One row of the prompts.

    Attributes:
        id: Unique in the run; it names the row in every file that is written.
        source: Of the row, for counts.
        row: As it was read, fit for JSON.
    """

    id: str
    source: str
    row: dict[str, Any]


class Request(NamedTuple):
    """One request to a teacher.

    Attributes:
        messages: In OpenAI's form; assistant turns may begin with a think block.
        thinking: Whether the teacher is to think; None: as its template decides.
        seed: In [0, 2^63).
        tools: JSON schemas of functions, or None.
        template_kwargs: Further settings of the chat template, such as custom_instructions.
        max_new_tokens: Instead of the teacher's own; None: the teacher's.
    """

    messages: list[Message]
    thinking: bool | None
    seed: int
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None
    max_new_tokens: int | None = None


class Reply(NamedTuple):
    """A teacher's reply in one canonical form, whatever the server calls its parts.

    Attributes:
        content: The answer, without reasoning.
        reasoning: Text of the think block; None without one, "" for an empty one.
        finish_reason: stop | length | tool_calls | content_filter.
        closed: The think block ended; True without one.
        tool_calls: In OpenAI's form, or None.
        prompt_tokens, completion_tokens: As the server counted them; None where it does not say.
        attempts: Number of tries, the successful one included.
        seconds: From the first try to the reply.
        raw: The message as the server gave it.
        seed: Of the request that it answers.
    """

    content: str
    reasoning: str | None
    finish_reason: str
    closed: bool = True
    tool_calls: list[dict[str, Any]] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    attempts: int = 1
    seconds: float = 0.0
    raw: dict[str, Any] | None = None
    seed: int | None = None


class Sample(NamedTuple):
    """One finished conversation.

    Attributes:
        messages: All of it, in canonical form: an assistant turn that thinks begins with its think block.
        replies: The teacher's replies in it, in their order.
    """

    messages: list[Message]
    replies: list[Reply]


class Record(NamedTuple):
    """What a run keeps of one prompt: samples, or the error that it ended in.

    Attributes:
        error: One line, or None.
        attempts: Of the request that failed, as status codes and exceptions; empty without an error.
    """

    id: str
    source: str
    samples: list[Sample]
    error: str | None = None
    attempts: tuple[str, ...] = ()


class RequestFailed(Exception):
    """A request that ended in an error after all its tries. The prompt fails, and the run goes on.

    Args:
        reason: One line.
        attempts: Status codes and exceptions of the tries.
    """

    def __init__(self, reason: str, attempts: tuple[str, ...] = ()):
        super().__init__(reason)
        self.reason, self.attempts = reason, attempts


Ask = Callable[[Request], Awaitable[Reply]]
Converse = Callable[[Prompt, Ask], Awaitable[list[Sample]]]  # what a job does with one prompt


class TeacherEngine(Protocol):
    """A teacher that can be asked, over HTTP or in this process. Used as `async with engine:`."""

    async def __aenter__(self) -> "TeacherEngine": ...

    async def __aexit__(self, *error) -> None: ...

    async def identity(self) -> dict[str, Any]:
        """What the teacher says of itself: model, revision, server, version, template hash. A resumed run compares it.

        Raises:
            UserError: It does not answer, or it is another model, or it does not think when asked.
        """

    async def ask(self, request: Request) -> Reply:
        """
        Raises:
            RequestFailed: This request cannot be answered.
            UserError: No request can: wrong key, wrong model, wrong address.
        """


class Verdict(NamedTuple):
    """What a filter says of a reply.

    Attributes:
        passed: Whether the reply stays.
        reason: Short name of the fault, as counted in reports; "" where it passed.
        score: The measured number, where there is one.
    """

    passed: bool
    reason: str = ""
    score: float | None = None


class Outcome(NamedTuple):
    """What became of one prompt: exactly one of a row, a reason to drop it, or an error.

    Attributes:
        row: The SmolTalk2 row that it became, or None.
        reason: The first filter that dropped it; "" where none did.
        error: Of a record that failed, or None.
        verdicts: Filter -> what it said; those that only label, too.
        records: Role of the teacher (teacher, chosen, rejected) -> what it replied.
    """

    prompt: Prompt
    row: dict[str, Any] | None
    reason: str = ""
    error: str | None = None
    verdicts: Mapping[str, Verdict] = {}
    records: Mapping[str, Record] = {}


class Job(ABC):
    """What one kind of synthetic data needs beside the engine that all of them share.

    Attributes:
        roles: Names of the teachers it asks; each role is a run of its own over the same prompts.
        rows_per_prompt: Number of outcomes of each prompt.
    """

    roles: tuple[str, ...] = ("teacher",)
    rows_per_prompt: int = 1

    @abstractmethod
    def prompts(self) -> Iterator[Prompt]:
        """In the order of the rows; ids are unique."""

    @abstractmethod
    async def converse(self, role: str, prompt: Prompt, ask: Ask) -> list[Sample]:
        """Ask one teacher about one prompt. It depends on its arguments alone, so that it can be asked again."""

    @abstractmethod
    def outcomes(self, prompt: Prompt, records: Mapping[str, Record]) -> list[Outcome]:
        """Filter the replies of all roles and make the row; one for each row where a prompt may become several.

        It is fast, and it runs after all runs, on prompts whose records hold no error.
        """

    def report(self) -> dict[str, Any]:
        """What `outcomes` has counted so far beside the reasons, fit for JSON."""
        return {}

    def lines(self) -> list[str]:
        """What a user should read of the report, in words."""
        return []
