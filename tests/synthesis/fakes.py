"""A teacher that replies as a function says, in this process."""

from collections.abc import Callable

from smolpost.synthesis.records import Reply, Request


class FakeEngine:
    """A `smolpost.synthesis.records.TeacherEngine`.

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
