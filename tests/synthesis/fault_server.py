"""An OpenAI-compatible chat server on loopback that misbehaves as it is told, in a process of its own.

    with start_fault_server(tmp_path, latency=0.05, share=0.1, actions=("429@1", "drop")) as server:
        ...  # server.url, server.requests(), server.kill(), server.start()

A reply is decided by the last user turn, `enable_thinking` and the seed, so it is the same each time. What goes wrong
is a list of actions, one for each request with the same last user turn; requests after them are answered. They stand
in the turn itself ("<<429|drop>> What is 2 + 2?"), or `actions` gives them to a share of all turns. `*` after an action
repeats it for ever.

    ok              the reply
    say:TEXT        TEXT as the answer; with <think> in it, TEXT as the content, without a field for the reasoning
    CODE[@SECONDS]  an error of this status; @ adds Retry-After in seconds, @@ as an HTTP date
    reset           closed before the first byte
    drop            closed in the middle of the body
    half            the server's side closed after the headers; its other side stays open
    hang            no byte, ever
    slow            the reply, in pieces over a second
    sleep:SECONDS   the reply, later
    refuse:SECONDS  all connections are dropped, and none is accepted for so long
    garbage, html, text              a cut JSON body; a web page; the reply, labelled text/plain
    empty, error, no_choices, no_message, blank, no_reason   {}; an error with status 200; parts of the reply missing
    cut, filtered, tool              finish_reason length (inside the reasoning), content_filter, tool_calls
"""

import asyncio
import contextlib
import email.utils
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

SCRIPT = re.compile(r"<<(.*?)>>", re.DOTALL)


class Faults(NamedTuple):
    """How the server behaves.

    Attributes:
        latency: Seconds before every reply; each prompt's own is between 0.5 and 1.5 times it.
        share: Of the prompts without a script, those that get the actions; decided by a hash of the text.
        actions: In turn, for requests with the same last user turn.
        key: That every request must bring; "" for none.
        unauthorized_after: Chat requests that are answered before all others get 401; None: all are.
        loading: So many first looks at /models get 503.
        capacity: Chat requests worked on at a time; more get 429. None: any number.
        models: Ids that it serves; requests for others get 404.
        max_model_len: Tokens that the models take, as /models says.
        kind: vllm | sglang | llama_cpp | transformers | hosted: which further endpoints it has.
        reasoning: Where the reasoning goes: reasoning | reasoning_content | inline.
        thinking: None: as enable_thinking, reasoning_effort or /no_think says; True and False: whatever is asked.
        refused: Keys of a request that get 422.
        fsync: Whether each line of the log is on disk before the reply is sent; off for measurements.
    """

    latency: float = 0.0
    share: float = 0.0
    actions: tuple[str, ...] = ()
    key: str = ""
    unauthorized_after: int | None = None
    loading: int = 0
    capacity: int | None = None
    models: tuple[str, ...] = ("teacher",)
    max_model_len: int = 131072
    kind: str = "vllm"
    reasoning: str = "reasoning"
    thinking: bool | None = None
    refused: tuple[str, ...] = ()
    fsync: bool = True


# ---------------------------------------------------------------- for tests


class FaultServer:
    """A server process on a port of its own, which it keeps when it is started again.

    Attributes:
        url: Of its API, with /v1.
        log: One JSON line per answered request: path, status, action, prompt, seed, thinking, count (requests with
            this prompt so far), authorization, body.
    """

    def __init__(self, folder: Path, **faults: Any):
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.log, self.faults, self.process = folder / f"requests-{self.port}.jsonl", Faults(**faults), None

    def start(self, **changed: Any) -> None:
        """Start the process, with other faults where they are given, and wait until it listens."""
        self.faults = self.faults._replace(**changed)
        words = [sys.executable, __file__, str(self.port), str(self.log), json.dumps(self.faults._asdict())]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE)
        if not self.process.stdout.readline():
            raise RuntimeError(f"the fault server ended with exit code {self.process.wait()}")

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def requests(self, status: int | None = None) -> list[dict[str, Any]]:
        """Logged chat requests, in order, of one status where it is given."""
        lines = map(json.loads, self.log.read_text().splitlines()) if self.log.exists() else ()
        return [line for line in lines if line["path"] == "/v1/chat/completions" and status in (None, line["status"])]


@contextlib.contextmanager
def start_fault_server(folder: Path, **faults: Any) -> Iterator[FaultServer]:
    """A running server; `faults` are fields of `Faults`. The log lies in the folder."""
    server = FaultServer(folder, **faults)
    server.start()
    try:
        yield server
    finally:
        server.kill()


# ---------------------------------------------------------------- the process


class Answer(NamedTuple):
    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[str, ...] = ()

    def streamed(self) -> "Answer":
        """The same chat completion as server-sent events: a word of the reply in each, then the end and the counts."""
        try:
            content = json.loads(self.body)
            choice, usage = content["choices"][0], content.pop("usage")
        except (ValueError, LookupError):  # an error, or what is no chat completion
            return self
        deltas = [
            {name: word}
            for name in ("reasoning", "reasoning_content", "content")
            for word in re.findall(r"\S+\s*|\s+", choice.get("message", {}).get(name) or "")
        ]
        for call in choice.get("message", {}).get("tool_calls") or ():
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            deltas.append({"tool_calls": [call | {"index": 0, "function": {"name": name, "arguments": ""}}]})
            deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in arguments]
        choices = [[{"index": 0, "delta": delta, "finish_reason": None}] for delta in deltas]
        choices.append([{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}])
        chunks = [content | {"object": "chat.completion.chunk", "choices": part} for part in choices]
        chunks.append(content | {"object": "chat.completion.chunk", "choices": [], "usage": usage})
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
        return Answer(200, "".join(lines).encode(), "text/event-stream")

    def head(self) -> bytes:
        lines = [
            f"HTTP/1.1 {self.status} Said", f"Content-Type: {self.content_type}",
            f"Content-Length: {len(self.body)}", *self.headers,
        ]  # fmt: skip
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def as_json(status: int, content: Any, *headers: str) -> Answer:
    return Answer(status, json.dumps(content).encode(), headers=headers)


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())


def share_of(text: str, salt: str = "") -> float:
    """In [0, 1), the same for the same text."""
    return int.from_bytes(hashlib.blake2b((salt + text).encode(), digest_size=4).digest()) / 2**32


class Service:
    """What all connections share."""

    def __init__(self, port: int, log: str, faults: Faults):
        self.port, self.faults, self.log = port, faults, open(log, "a", encoding="utf-8")  # noqa: SIM115
        self.counts: Counter[str] = Counter()
        self.answered = self.under_way = self.looks = 0
        self.connections: set[Connection] = set()
        self.server: asyncio.Server | None = None
        self.restart: asyncio.Task | None = None  # kept, or it would be collected

    async def listen(self) -> None:
        loop = asyncio.get_running_loop()
        make = lambda: Connection(self)  # noqa: E731
        self.server = await loop.create_server(make, "127.0.0.1", self.port, backlog=4096, reuse_address=True)

    async def refuse(self, seconds: float) -> None:
        self.server.close()
        for connection in list(self.connections):
            connection.transport.abort()
        await asyncio.sleep(seconds)
        await self.listen()

    def note(self, path: str, status: int, **what: Any) -> None:
        self.log.write(json.dumps({"path": path, "status": status, "time": time.time(), **what}) + "\n")
        if self.faults.fsync:
            self.log.flush()
            os.fsync(self.log.fileno())

    def look_up(self, path: str) -> Answer:
        """What a GET finds."""
        self.looks += 1
        if self.looks <= self.faults.loading:
            return as_json(503, {"error": {"message": "Loading model"}})
        length = {"max_model_len": self.faults.max_model_len}
        models = [{"id": name, "object": "model", "root": name, **length} for name in self.faults.models]
        pages: dict[str, Any] = {"/v1/models": {"object": "list", "data": models}}
        if self.faults.kind != "vllm":
            pages["/v1/models"]["data"] = [{"id": model["id"], "object": "model"} for model in models]
        if self.faults.kind == "transformers" and path != "/health":  # without a cache to list
            return as_json(500, {"detail": "Cache directory not found"})
        pages |= {
            "vllm": {"/version": {"version": "0.11.0"}, "/health": {}},
            "sglang": {"/get_server_info": {"version": "0.5.3", "model_path": self.faults.models[0]}},
            "transformers": {"/health": {"status": "ok"}},
            "llama_cpp": {"/props": {"build_info": "b6700-abc", "chat_template": "{{ messages }}"}},
        }.get(self.faults.kind, {})
        return as_json(200, pages[path]) if path in pages else as_json(404, {"detail": "Not Found"})

    def plan(self, text: str) -> str:
        """The action for the next request with this text."""
        self.counts[text] += 1
        script = SCRIPT.match(text)
        if script:
            actions = tuple(script[1].split("|"))
        else:
            actions = self.faults.actions if share_of(text) < self.faults.share else ()
        for number, action in enumerate(actions, 1):
            if action.endswith("*") or number == self.counts[text]:
                return action.removesuffix("*")
        return actions[-1] if actions and actions[-1].startswith("say:") else "ok"

    def refusal(self, authorization: str, body: dict[str, Any]) -> Answer | None:
        faults = self.faults
        spent = faults.unauthorized_after is not None and self.answered >= faults.unauthorized_after
        if spent or (faults.key and authorization != f"Bearer {faults.key}"):
            return as_json(401, {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}})
        if body.get("model") not in faults.models:
            return as_json(404, {"error": {"message": f"The model `{body.get('model')}` does not exist.", "code": 404}})
        if found := sorted(set(body) & set(faults.refused)):
            return as_json(422, {"error": f"Unexpected keys in the request: {found}"})
        if faults.capacity is not None and self.under_way > faults.capacity:
            return as_json(429, {"error": {"message": "too many requests"}})
        return None


def reply(text: str, body: dict[str, Any], action: str, faults: Faults) -> dict[str, Any]:
    """The body of a chat completion; always one choice, whatever `n` asks for."""
    question = SCRIPT.sub("", text).strip()
    asked_not_to = (
        (body.get("chat_template_kwargs") or {}).get("enable_thinking") is False
        or body.get("reasoning_effort") == "none"
        or text.endswith("/no_think")
    )
    thinks = not asked_not_to if faults.thinking is None else faults.thinking
    content, reasoning = f"answer to {question}", f"reasoning about {question}, seed {body.get('seed')}"
    message: dict[str, Any] = {"role": "assistant", "content": content}
    reason = {"cut": "length", "filtered": "content_filter", "tool": "tool_calls"}.get(action, "stop")
    if action.startswith("say:"):
        message["content"] = action.removeprefix("say:")
        thinks = thinks and "<think>" not in message["content"]
    if action == "cut":
        message["content"] = None if thinks else content[:5]
    if action == "tool":
        call = {"name": "look_up", "arguments": json.dumps({"words": question})}
        message |= {"content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": call}]}
    if thinks and faults.reasoning == "inline":
        end = "" if action == "cut" else f"\n</think>\n\n{message['content'] or ''}"
        message["content"] = f"<think>\n{reasoning}{end}"
    elif thinks:
        message[faults.reasoning] = reasoning
    if action == "blank":
        message |= {"content": ""}
        message.pop(faults.reasoning, None)
    choice = {"index": 0, "message": message, "finish_reason": None if action == "no_reason" else reason}
    if action == "no_message":
        del choice["message"]
    asked_tokens = sum(len(text_of(m.get("content")).split()) for m in body["messages"])
    told_tokens = len(content.split()) + (len(reasoning.split()) if thinks else 0)
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"],
        "choices": [] if action == "no_choices" else [choice],
        "usage": {"prompt_tokens": asked_tokens, "completion_tokens": told_tokens},
    }  # fmt: skip


class Connection(asyncio.Protocol):
    """One connection: requests one after the other, each with a Content-Length."""

    def __init__(self, service: Service):
        self.service, self.buffer, self.task = service, b"", None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.service.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.service.connections.discard(self)
        if self.task:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = int(headers.get("content-length", 0))
        if len(rest) < size:
            return
        self.buffer = rest[size:]
        method, path, _ = first.split(" ")
        path = urlsplit(path).path  # a client that takes this for its proxy sends all of a URL
        self.task = asyncio.ensure_future(self.respond(method, path, headers.get("authorization", ""), rest[:size]))

    async def respond(self, method: str, path: str, authorization: str, data: bytes) -> None:
        service = self.service
        if method == "GET":
            answer = service.look_up(path)
            if service.faults.key and authorization != f"Bearer {service.faults.key}":
                answer = as_json(401, {"error": {"message": "Incorrect API key provided"}})
            service.note(path, answer.status, authorization=authorization)
            self.send(answer)
        elif path != "/v1/chat/completions":
            service.note(path, 404, authorization=authorization)
            self.send(as_json(404, {"detail": "Not Found"}))
        else:
            service.under_way += 1
            try:
                await self.chat(authorization, json.loads(data))
            finally:
                service.under_way -= 1

    async def chat(self, authorization: str, body: dict[str, Any]) -> None:
        service = self.service
        text = text_of([m for m in body["messages"] if m["role"] == "user"][-1]["content"])
        kwargs = body.get("chat_template_kwargs") or {}
        noted = {
            "prompt": text, "seed": body.get("seed"), "thinking": kwargs.get("enable_thinking"),
            "authorization": authorization, "body": body if service.faults.fsync else None,
        }  # fmt: skip
        if refused := service.refusal(authorization, body):
            service.note("/v1/chat/completions", refused.status, action="refused", count=0, **noted)
            return self.send(refused)
        action = service.plan(text)
        noted |= {"action": action, "count": service.counts[text]}
        if service.faults.latency:
            await asyncio.sleep(service.faults.latency * (0.5 + share_of(text, "latency")))
        if action.startswith("sleep:"):
            await asyncio.sleep(float(action.removeprefix("sleep:")))
        if await self.broken(action, noted):
            return None
        answer = answer_of(action, reply(text, body, action, service.faults))
        if body.get("stream"):
            answer = answer.streamed()
        service.answered += answer.status == 200
        service.note("/v1/chat/completions", answer.status, **noted)
        if action == "drop":
            self.transport.write(answer.head() + answer.body[: len(answer.body) // 2])
            return self.transport.close()
        if action == "half":
            self.transport.write(answer.head())
            return self.transport.write_eof()
        if action == "slow":
            self.transport.write(answer.head())
            for start in range(0, len(answer.body), step := len(answer.body) // 10 + 1):
                await asyncio.sleep(0.1)
                self.transport.write(answer.body[start : start + step])
            return None
        return self.send(answer)

    async def broken(self, action: str, noted: dict[str, Any]) -> bool:
        """Whether the action gives no answer at all."""
        if action == "hang":
            self.service.note("/v1/chat/completions", 0, **noted)
            await asyncio.sleep(3600)
        elif action == "reset":
            self.service.note("/v1/chat/completions", 0, **noted)
            self.transport.abort()
        elif action.startswith("refuse:"):
            self.service.note("/v1/chat/completions", 0, **noted)
            self.service.restart = asyncio.ensure_future(self.service.refuse(float(action.split(":")[1])))
        else:
            return False
        return True

    def send(self, answer: Answer) -> None:
        self.transport.write(answer.head() + answer.body)


def answer_of(action: str, content: dict[str, Any]) -> Answer:
    if found := re.fullmatch(r"(\d{3})(@@?)?([\d.]+)?", action):
        headers = ()
        if found[2]:
            until = email.utils.formatdate(time.time() + float(found[3]), usegmt=True)
            headers = (f"Retry-After: {found[3] if found[2] == '@' else until}",)
        return as_json(int(found[1]), {"error": {"message": f"injected {found[1]}"}}, *headers)
    if action == "garbage":
        return Answer(200, b'{"id": "chatcmpl-1", "choices": [{"mess')
    if action == "html":
        return Answer(200, b"<html><body>Please sign in to the network</body></html>", "text/html")
    if action == "text":
        return Answer(200, json.dumps(content).encode(), "text/plain")
    if action == "error":
        return as_json(200, {"error": {"message": "upstream failed"}})
    return as_json(200, {} if action == "empty" else content)


async def serve(port: int, log: str, faults: Faults) -> None:
    service = Service(port, log, faults)
    await service.listen()
    print("listening", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    settings = json.loads(sys.argv[3])
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2], Faults(**settings)))
