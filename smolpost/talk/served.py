"""A model behind a server with OpenAI's chat API, whose replies come as server-sent events."""

import json
import signal
from collections.abc import Iterator
from typing import Any

import httpx2

from smolpost.chat.reasoning import split_reasoning
from smolpost.chat.render import Message
from smolpost.errors import UserError
from smolpost.inference.served import listed, served_as
from smolpost.signals import Stopped
from smolpost.synthesis.connection import LONGEST, checked_url, message_of, proxy_for, secret
from smolpost.synthesis.identity import OWN_PAGES, UNLISTED
from smolpost.synthesis.profiles import PROFILES, unsupported
from smolpost.synthesis.records import Request, RequestFailed
from smolpost.synthesis.replies import FIELDS, canonical, reply_of, texts_of
from smolpost.synthesis.settings import Teacher
from smolpost.talk.conversation import CUT, INTERRUPTED, STOP, Conversation, Said
from smolpost.talk.settings import Settings
from smolpost.talk.speaker import Heard, Show, cut_at
from smolpost.talk.splitter import ANSWER, THINKING, Splitter

CONNECT, READ = 10.0, 3600.0  # seconds; a long prompt may take minutes before its first token, and ctrl-C ends the wait
KEY = "chat"  # in messages of the teachers' connection


class ServedSpeaker:
    """A `Speaker` behind a URL. The server renders the prompts, so the date and the default mode are its own.

    Args:
        url: Of the API, with its version.
        model: The server's name for it; None: the only one that it lists.
        server: A key of PROFILES; None: found out by its pages.
        api_key_env: Environment variable that holds the key.
    Raises:
        UserError: There is no such server or model, or the key is not set.
    """

    settings = None  # the server has the model's files, and does not tell them

    def __init__(self, url: str, model: str | None, server: str | None, api_key_env: str | None):
        self.url = checked_url(url, KEY)
        key = secret(api_key_env, KEY) if api_key_env else ""
        self._client = httpx2.Client(
            timeout=httpx2.Timeout(READ, connect=CONNECT),
            proxy=proxy_for(self.url, KEY),
            trust_env=False,
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        models = self._models(server)
        self.server, page = (server, {}) if server else self._kind()
        entry = self._chosen(models, model)
        self.model, self.name = entry["id"], entry["id"].rstrip("/").rpartition("/")[2]
        self.context = entry.get("max_model_len") or (page.get("default_generation_settings") or {}).get("n_ctx")
        context = f", context {self.context:,} tokens" if self.context else ""
        self.about = f"{self.name}: {self.model} on {self.url} ({PROFILES[self.server].title}){context}"

    # ------------------------------------------------------------ who is there

    def _models(self, server: str | None) -> list[dict[str, Any]]:
        response = self._get(f"{self.url}/models")
        try:
            models = response.json()["data"] if response.status_code == 200 else None
            if models is not None and all(isinstance(entry["id"], str) for entry in models):
                return models
        except (ValueError, KeyError, TypeError):
            pass
        if response.status_code in (401, 403):
            raise UserError(f"{self.url} wants a key ({_said_by(response)}); name its variable with --api-key-env NAME")
        if response.status_code >= 500 and server in (None, *UNLISTED):  # transformers lists its cache, if any
            return []
        if self.url.endswith("/v1"):
            remedy = "give the address of an OpenAI-compatible API"
        else:
            remedy = f"give the address of the API with its version, such as {self.url}/v1"
        raise UserError(f"{self.url}/models lists no models ({_said_by(response)}); {remedy}")

    def _kind(self) -> tuple[str, dict[str, Any]]:
        """The server by its pages, and the page that told it; else transformers on this machine, and a hosted API."""
        for server, (path, field) in OWN_PAGES.items():
            response = self._get(f"{self.url.rpartition('/')[0]}/{path}")
            try:
                if response.status_code == 200 and field in (page := response.json()):
                    return server, page
            except (ValueError, TypeError):
                continue
        local = httpx2.URL(self.url).host in ("localhost", "127.0.0.1", "::1")
        return ("transformers" if local else "hosted"), {}

    def _chosen(self, models: list[dict[str, Any]], wanted: str | None) -> dict[str, Any]:
        if wanted is None and len(models) == 1:
            return models[0]
        if wanted is None:
            raise UserError(f"{self.url} serves {listed(models)}; choose a model with --model NAME")
        if found := served_as(models, wanted):
            return found
        if self.server in UNLISTED:  # they do not list all that they serve
            return {"id": wanted}
        raise UserError(f"--model {wanted} is not served by {self.url}; name one of: {listed(models)}")

    def _get(self, url: str) -> httpx2.Response:
        try:
            return self._client.get(url)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise UserError(_silent(self.url, error)) from error

    # ------------------------------------------------------------ talking

    def mode(self, conversation: Conversation, wanted: bool | None) -> bool | None:
        return wanted

    def reply(self, conversation: Conversation, settings: Settings, wanted: bool | None, seed: int, show: Show) -> Said:
        most = settings.longest(self.context // 2 if self.context else None)
        body = self._body(conversation, settings, most, wanted, seed)
        heard, incoming = Heard(show), _Incoming()
        try:
            with self._client.stream("POST", f"{self.url}/chat/completions", json=body) as response:
                for chunk in self._chunks(response):
                    incoming.take(chunk, heard)
        except httpx2.HTTPError as error:
            raise UserError(_silent(self.url, error) if not heard.num_tokens else self._broken(heard, error)) from error
        except Stopped as stop:
            if stop.signum != signal.SIGINT:
                raise
            incoming.finish = INTERRUPTED
        if incoming.finish is None:
            raise UserError(self._broken(heard, "no finish_reason came"))
        heard.take(incoming.splitter.end(), 0)
        return incoming.said(wanted, heard, most, seed)

    def _body(
        self, conversation: Conversation, settings: Settings, most: int, wanted: bool | None, seed: int
    ) -> dict[str, Any]:
        profile = PROFILES[self.server]
        teacher = Teacher(
            model=self.model, server=self.server, url=self.url, temperature=settings.temperature, top_p=settings.top_p,
            top_k=settings.top_k, max_new_tokens=most,
        )  # fmt: skip
        if faults := unsupported(teacher, KEY):
            raise UserError(str(faults[0]))
        frame = conversation.frame
        kwargs = {name: value for name, value in frame.template_kwargs(None).items() if value}
        messages = conversation.messages if profile.templated else list(map(_without_thoughts, conversation.messages))
        try:
            body = profile.payload(teacher, Request(messages, wanted, seed, frame.schemas, kwargs))
        except RequestFailed as error:
            raise UserError(f"{error.reason}; give /tools a list of JSON schemas instead") from error
        usage = {} if self.server == "transformers" else {"stream_options": {"include_usage": True}}
        return {"model": self.model} | body | {"stream": True} | usage

    def _chunks(self, response: httpx2.Response) -> Iterator[dict[str, Any]]:
        """The events of a reply; a server that does not stream sends it as one."""
        if response.status_code != 200:
            response.read()
            raise UserError(self._refused(response))
        if "json" in response.headers.get("content-type", ""):
            yield self._chunk(response.read().decode("utf-8", "replace"))
            return
        for line in response.iter_lines():
            field, _, data = line.partition(":")
            if data.strip() == "[DONE]":
                return
            if line.strip() and field not in ("data", "event", "id", "retry", ""):  # fields of server-sent events
                raise UserError(self._strange(line))
            if field == "data" and data.strip():
                yield self._chunk(data)

    def _chunk(self, text: str) -> dict[str, Any]:
        """
        Raises:
            UserError: The server reports an error inside its stream, or sends something else.
        """
        try:
            chunk = json.loads(text)
        except ValueError:
            raise UserError(self._strange(text)) from None
        if isinstance(chunk, dict) and isinstance(chunk.get("choices"), list):
            return chunk
        raise UserError(self._strange(message_of(chunk) or text))

    def _strange(self, said: str) -> str:
        return (
            f"{self.url} sent {' '.join(said.split())[:LONGEST]!r} instead of a reply; /retry asks again, and its log "
            "may say more"
        )

    def _refused(self, response: httpx2.Response) -> str:
        said = _said_by(response)
        if any(word in said.lower() for word in ("context", "too long", "maximum length", "max_model_len")):
            remedy = "/set max_new_tokens=256 leaves more room, /undo takes the last exchange back, /clear begins again"
        elif response.status_code in (401, 403):
            remedy = "name the variable of a valid key with --api-key-env NAME"
        elif response.status_code in (429, 503):
            remedy = "it is busy: /retry asks again"
        else:
            remedy = "look into its log; --server NAME says which server it is, where that was not found out"
        return f"{self.url} refuses ({said}); {remedy}"

    def _broken(self, heard: Heard, error: object) -> str:
        begin = f"{self.url}: the reply broke off after {heard.num_tokens} tokens"
        return f"{begin} ({error}) and is not kept; /retry asks again"


class _Incoming:
    """A message put together from its deltas."""

    def __init__(self):
        self.message: dict[str, Any] = {"role": "assistant", "content": ""}
        self.calls: dict[int, dict[str, Any]] = {}
        self.finish: str | None = None
        self.usage: dict[str, Any] = {}
        self.splitter = Splitter()

    def take(self, chunk: dict[str, Any], heard: Heard) -> None:
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or choice.get("message") or {}
            text, inside = texts_of(delta.get("content"))
            name = next((name for name in FIELDS if isinstance(delta.get(name), str) and delta[name]), None)
            thought = delta[name] if name else inside
            if thought:
                self.message["reasoning"] = self.message.get("reasoning", "") + thought
                heard.take([(THINKING, thought)], 1)
            if text:
                self.message["content"] += text
                pieces = [(ANSWER, text)] if "reasoning" in self.message else self.splitter.add(text)
                heard.take(pieces, 1)
            for number, call in enumerate(delta.get("tool_calls") or ()):
                self._take_call(call.get("index", number), call)
                heard.take([], 1)
            self.finish = choice.get("finish_reason") or self.finish

    def _take_call(self, index: int, delta: dict[str, Any]) -> None:
        """The name comes whole, and the arguments in pieces of their JSON."""
        call = self.calls.setdefault(index, {"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
        call["id"] = delta.get("id") or call["id"]
        function = delta.get("function") or {}
        call["function"]["name"] += function.get("name") or ""
        arguments = function.get("arguments") or ""
        call["function"]["arguments"] += arguments if isinstance(arguments, str) else json.dumps(arguments)

    def said(self, wanted: bool | None, heard: Heard, most: int, seed: int) -> Said:
        stopped = self.finish == INTERRUPTED
        cut = self.finish == "length" or stopped
        calls = [] if cut else [self.calls[index] for index in sorted(self.calls)]
        choice = {
            "message": self.message | {"tool_calls": calls or None}, "finish_reason": "length" if cut else self.finish,
        }  # fmt: skip
        reply = reply_of(choice, asked_to_think=wanted)
        message: Message = {"role": "assistant", "content": canonical(reply)}
        thought = (reply.reasoning or "").strip()
        finish = INTERRUPTED if stopped else CUT if self.finish in ("length", "content_filter") else STOP
        notes = {"length": cut_at(most), "content_filter": "cut by the server's content filter"}
        return Said(
            message | ({"tool_calls": calls} if calls else {}),
            reply.reasoning or "",
            reply.content if reply.closed else "",
            finish,
            bool(thought) if wanted is None else wanted,
            notes.get(self.finish, ""),
            self.usage.get("completion_tokens") or heard.num_tokens,
            heard.thinking_tokens,
            heard.seconds,
            heard.thinking_seconds,
            seed,
        )


def _without_thoughts(message: Message) -> Message:
    """A turn as hosted APIs take them back: without its think block."""
    if message["role"] != "assistant":
        return message
    return message | {"content": split_reasoning(message["content"] or "")[1]}


def _said_by(response: httpx2.Response) -> str:
    try:
        said = message_of(response.json())
    except ValueError:
        said = ""
    return f"{response.status_code}: {' '.join((said or response.text).split())[:LONGEST]}"


def _silent(url: str, error: Exception) -> str:
    return (
        f"{url} does not answer ({' '.join(str(error).split()) or type(error).__name__}); start the server "
        "(`smolpost serve` prints how), or mend the address"
    )
