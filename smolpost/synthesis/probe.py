"""One question before a run: the teacher answers, thinks where it is asked to, and does not where it is not."""

from collections.abc import Iterable

from smolpost.errors import UserError
from smolpost.synthesis.profiles import PROFILES
from smolpost.synthesis.records import Ask, Reply, Request, RequestFailed
from smolpost.synthesis.settings import Teacher

QUESTION = "What is 7 + 5? Answer with the number alone."
MAX_NEW_TOKENS = 512  # a longer think block is cut, which shows as well that the model thinks
_MODES = {True: "think", False: "no_think", None: "default"}


async def probe(ask: Ask, teacher: Teacher, modes: Iterable[bool | None], *, key: str) -> list[str]:
    """Ask a short question in each of the modes that the run needs.

    Args:
        ask: Of the engine.
        modes: Values of `Request.thinking`; None asks as the template decides, and either way of answering is right.
        key: Of the teacher in the recipe.
    Returns:
        Names of the modes that were tried, sorted: think, no_think, default.
    Raises:
        UserError: The server refuses the request, gives no text, or thinks otherwise than asked.
    """
    for thinking in (tried := dict.fromkeys(modes)):
        reply = await _asked(ask, teacher, thinking, key)
        thinks = bool((reply.reasoning or "").strip())
        if not (thinks or reply.content.strip()):
            raise UserError(
                f"{key}.model={teacher.model} gave an empty reply to {QUESTION!r} (finish_reason "
                f"{reply.finish_reason}); look into the server's log, and at the chat template it uses"
            )
        if thinking and not thinks:
            raise UserError(_does_not_think(teacher, reply, key))
        if thinking is False and thinks:
            raise UserError(_thinks(teacher, reply, key))
    return sorted(_MODES[thinking] for thinking in tried)


async def _asked(ask: Ask, teacher: Teacher, thinking: bool | None, key: str) -> Reply:
    limit = min(MAX_NEW_TOKENS, teacher.max_new_tokens)
    messages = [{"role": "user", "content": QUESTION}]
    try:
        return await ask(Request(messages, thinking, seed=0, max_new_tokens=limit))
    except RequestFailed as error:
        raise UserError(
            f"{key}: {PROFILES[teacher.server].title} (server={teacher.server}) refuses a plain question: "
            f"{error.reason}; set {key}.server and {key}.model to what answers there, and the sampling to what that "
            "takes"
        ) from error


def _does_not_think(teacher: Teacher, reply: Reply, key: str) -> str:
    if teacher.thinking_by == "words":
        remedy = f"set {key}.thinking_by=server, or choose a model that thinks"
    elif PROFILES[teacher.server].templated:
        flag = ", start llama-server with --jinja" if teacher.server == "llama_cpp" else ""
        remedy = (
            f"its chat template may not read enable_thinking: choose a model that thinks{flag}, or set "
            f"{key}.thinking_by=words for a Qwen3"
        )
    else:
        remedy = (
            f"the API may hide reasoning: choose one that gives it, set {key}.server=vllm if it takes vLLM's settings, "
            f"or {key}.thinking_by=words for a Qwen3"
        )
    return f"{key}.model={teacher.model} was asked to think and replied {_shown(reply)} without reasoning; {remedy}"


def _thinks(teacher: Teacher, reply: Reply, key: str) -> str:
    if not reply.content.strip() and reply.finish_reason == "stop":
        return (
            f"{key}.model={teacher.model} was asked not to think, and its whole reply came as reasoning; start the "
            "server with the model's own reasoning parser (`smolpost serve` prints it) or with none"
        )
    other = "server" if teacher.thinking_by == "words" else "words"
    hint = " for a Qwen3" if other == "words" else ""
    return (
        f"{key}.model={teacher.model} was asked not to think and thought {_shown(reply)}; choose a model that can "
        f"answer without, or set {key}.thinking_by={other}{hint}"
    )


def _shown(reply: Reply) -> str:
    """The begin of what it said, in one line."""
    line = " ".join((reply.reasoning or reply.content).split())
    return repr(line if len(line) <= 60 else f"{line[:57]}...")
