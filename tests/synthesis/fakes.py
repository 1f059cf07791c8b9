"""Teachers without a server, and conversations with them."""

import asyncio
from collections import Counter
from collections.abc import Callable

from smolpost.synthesis.records import Prompt, Reply, Request, RequestFailed, Sample


class FakeEngine:
    """A `smolpost.synthesis.records.TeacherEngine` that replies as a function says.

    Args:
        reply: Request -> the reply, or the exception that asking raises.
    Attributes:
        asked: All requests so far.
    """

    under_way, width = 0, 1

    def __init__(self, reply: Callable[[Request], Reply | Exception], model: str = "fake"):
        self.reply, self.model = reply, model
        self.asked: list[Request] = []

    async def __aenter__(self) -> "FakeEngine":
        return self

    async def __aexit__(self, *error) -> None:
        pass

    async def identity(self) -> dict:
        return {"model": self.model, "revision": None, "server": "fake", "version": "1", "template": None}

    async def ask(self, request: Request) -> Reply:
        self.asked.append(request)
        reply = self.reply(request)
        if isinstance(reply, Exception):
            raise reply
        return reply


def thinking_reply(request: Request) -> Reply:
    """Repeats the last turn, after a thought where it is asked to think."""
    text = request.messages[-1]["content"]
    thought = f"They say {text}" if request.thinking else None
    return Reply(f"You said {text}", thought, "stop", prompt_tokens=10, completion_tokens=5)


class FakeTeacher:
    """Answers "re: " and the last turn; what goes wrong stands in `failures` and `errors`.

    Attributes:
        failures: Last turn -> reason: the request fails.
        error: Raised by the request with number `error_after`.
        asked: Last turn -> number of requests so far.
    """

    def __init__(self, *, failures=(), error=None, error_after=None, delay=0.0, **identity):
        self.failures, self.error, self.error_after, self.delay = dict(failures), error, error_after, delay
        self.said = {"model": "fake", "server": "vllm", "version": "0.11"} | identity
        self.asked, self.opened, self.under_way, self.most = Counter(), 0, 0, 0

    async def __aenter__(self):
        self.opened += 1
        return self

    async def __aexit__(self, *error):
        self.opened -= 1

    async def identity(self):
        return self.said

    async def ask(self, request: Request) -> Reply:
        text = request.messages[-1]["content"]
        if self.error and self.asked.total() == self.error_after:
            raise self.error
        self.asked[text] += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(self.delay * (1 + hash(text) % 3))
        self.under_way -= 1
        if text in self.failures:
            raise RequestFailed(self.failures[text], ("500", "ReadTimeout"))
        return Reply(f"re: {text}", None, "stop", prompt_tokens=len(text), completion_tokens=len(text) + 4)


def make_prompts(number, source="sums"):
    return [Prompt(f"p{i}", source, {"messages": [{"role": "user", "content": f"{i}+{i}?"}]}) for i in range(number)]


async def once(prompt, ask):
    """Ask the prompt's turn."""
    messages = prompt.row["messages"]
    reply = await ask(Request(messages, None, seed=0))
    return [Sample([*messages, {"role": "assistant", "content": reply.content}], [reply])]


async def three_turns(prompt, ask):
    """Ask the prompt's turn, and then twice about the reply."""
    messages, replies = list(prompt.row["messages"]), []
    for turn in range(3):
        if turn:
            messages.append({"role": "user", "content": f"{turn} {prompt.id}"})
        replies.append(await ask(Request(list(messages), None, seed=turn)))
        messages.append({"role": "assistant", "content": replies[-1].content})
    return [Sample(messages, replies)]
