"""What each server takes: names of sampling settings, of the longest reply, and how thinking is switched.

| server | settings of the sampler | what it does with a key that it does not know |
|---|---|---|
| vLLM, SGLang | all | ignores it |
| transformers serve | all but presence_penalty, inside `generation_config` | answers 422, or ignores one of OpenAI's |
| llama.cpp | all; repetition_penalty is called repeat_penalty | ignores it |
| a hosted API | OpenAI's: temperature, top_p, presence_penalty | answers 400, or ignores it |

So a setting that a server does not take is refused before anything is asked. A setting that is null is not sent. The
server's own value holds then: that of the model's generation_config.json (vLLM, SGLang, transformers), or a constant
(llama.cpp: top_k 40, min_p 0.05).

Read in vLLM's and SGLang's protocol.py, llama.cpp's tools/server and transformers 5.23's cli/serving.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from smolpost.errors import Wrong
from smolpost.synthesis.records import Message, Request, RequestFailed
from smolpost.synthesis.settings import SERVERS, Teacher

Body = dict[str, Any]

_SAMPLING = ("top_k", "min_p", "presence_penalty", "repetition_penalty")  # besides temperature and top_p
_WORDS = {True: "/think", False: "/no_think"}
_EFFORT = {True: "medium", False: "none"}


class Profile(NamedTuple):
    """What a server takes.

    Attributes:
        title: As users call it.
        sampling: Field of a teacher -> its name in a request; fields that are not here are refused.
        templated: The request may set variables of the chat template, `enable_thinking` among them.
        num_seeds: Seeds are taken modulo this number.
        finish: Brings the server's own form into a finished body.
    """

    title: str
    sampling: Mapping[str, str]
    templated: bool = True
    num_seeds: int = 2**63
    finish: Callable[[Teacher, Body], Body] = lambda teacher, body: body

    def payload(self, teacher: Teacher, request: Request) -> Body:
        """The body of a request to /chat/completions, without the model's name. `n` is never sent.

        Raises:
            RequestFailed: The request sets variables of a chat template that the server does not let through.
        """
        body = {
            "messages": request.messages,
            "temperature": teacher.temperature,
            "top_p": teacher.top_p,
            **{sent: getattr(teacher, name) for name, sent in self.sampling.items()},
            "max_tokens": request.max_new_tokens or teacher.max_new_tokens,
            "seed": request.seed % self.num_seeds,
            "tools": request.tools or None,
            **self._variables(teacher, request),
        }
        return self.finish(teacher, {name: value for name, value in body.items() if value is not None})

    def _variables(self, teacher: Teacher, request: Request) -> Body:
        """What switches thinking and sets the template's variables."""
        variables = {name: value for name, value in (request.template_kwargs or {}).items() if value not in (None, "")}
        if variables and not self.templated:
            raise RequestFailed(
                f"{self.title} lets no variable of a chat template through, and the row sets {', '.join(variables)}"
            )
        if request.thinking is None:
            switch = {}
        elif teacher.thinking_by == "words":
            switch = {"messages": _with_word(request.messages, _WORDS[request.thinking])}
        elif self.templated:
            variables |= {"enable_thinking": request.thinking}
            switch = {}
        else:
            switch = {"reasoning_effort": _EFFORT[request.thinking]}
        return switch | ({"chat_template_kwargs": variables} if variables else {})


def unsupported(teacher: Teacher, key: str) -> list[Wrong]:
    """A line for each sampling setting of the teacher that its server does not take.

    Args:
        key: Of the teacher in the recipe.
    """
    profile = PROFILES[teacher.server]
    taking = {name: [server for server in SERVERS if name in PROFILES[server].sampling] for name in _SAMPLING}
    return [
        Wrong(
            f"{key}.{name}",
            f"={getattr(teacher, name):g} is not a setting of {profile.title} (server={teacher.server}); set it to "
            f"null, or ask a server that takes it: {', '.join(taking[name])}",
        )
        for name in _SAMPLING
        if getattr(teacher, name) is not None and name not in profile.sampling
    ]


def _with_word(messages: list[Message], word: str) -> list[Message]:
    """The messages, with Qwen3's word for the mode at the end of the last user turn."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        return messages
    content = messages[last].get("content") or ""
    part = {"type": "text", "text": word}
    worded = f"{content} {word}".strip() if isinstance(content, str) else [*content, part]
    return [*messages[:last], {**messages[last], "content": worded}, *messages[last + 1 :]]


def _transformers(teacher: Teacher, body: Body) -> Body:
    """`transformers serve` samples by a GenerationConfig in JSON; what that leaves out is the model's own.

    It has to say `do_sample`: temperature and top_p alone leave a model greedy whose generation_config.json is.
    """
    sampled = teacher.temperature > 0
    config = {name: body.pop(name) for name in _SAMPLING if name in body}
    return body | {"generation_config": json.dumps({"do_sample": sampled} | config)}


def _llama_cpp(teacher: Teacher, body: Body) -> Body:
    """llama.cpp's penalties count the last 64 tokens unless told to count all, as the other servers do."""
    return body | ({"repeat_last_n": -1} if {"repeat_penalty", "presence_penalty"} & set(body) else {})


def _hosted(teacher: Teacher, body: Body) -> Body:
    """OpenAI's newer models refuse `max_tokens`, and many other hosted APIs know no other name."""
    if "openai" in (urlsplit(teacher.url or "").hostname or ""):
        body["max_completion_tokens"] = body.pop("max_tokens")
    return body


_ALL = {name: name for name in _SAMPLING}
PROFILES = {
    "vllm": Profile("vLLM", _ALL),
    "sglang": Profile("SGLang", _ALL),
    "transformers": Profile(
        "transformers serve", {name: name for name in _SAMPLING if name != "presence_penalty"}, finish=_transformers
    ),
    "llama_cpp": Profile(
        "llama.cpp", _ALL | {"repetition_penalty": "repeat_penalty"}, num_seeds=2**32 - 1, finish=_llama_cpp
    ),
    "hosted": Profile("a hosted API", {"presence_penalty": "presence_penalty"}, templated=False, finish=_hosted),
}
