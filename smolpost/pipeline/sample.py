"""The same prompts through several models, each in its think and its no-think mode.

One model is in memory at a time. Every reply has a seed of its own, and is kept in a file as it comes. So a run that
was killed goes on with what is missing, and gives the replies that it would have given without the kill.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from transformers import AutoConfig, AutoTokenizer

from smolpost.chat.masks import encode_prompt
from smolpost.chat.render import load_template, text_of
from smolpost.chat.shown import modes_of
from smolpost.errors import UserError
from smolpost.files import digest, hashes, verify
from smolpost.inference.seeds import derive_seed
from smolpost.model.loading import check_usable, load_for_inference
from smolpost.pipeline import manifest
from smolpost.pipeline.models import NamedModel
from smolpost.pipeline.sample_prompts import Prompt
from smolpost.progress import Progress
from smolpost.report.replies import MODES, Column, Given
from smolpost.schema import RELEASE_DAY
from smolpost.screen import shown
from smolpost.synthesis.client import ChatEngine
from smolpost.synthesis.connection import Connection
from smolpost.synthesis.identity import server_kind
from smolpost.synthesis.local import LocalTeacher
from smolpost.synthesis.profiles import PROFILES
from smolpost.synthesis.records import Reply, Request, RequestFailed, TeacherEngine
from smolpost.synthesis.settings import Teacher

VERSION = 1  # of what a kept reply is
WIDTH = 256  # requests under way
KEY = "sample"  # before the names of settings in messages of the engines, which become flags
START = b'{"key": "'  # of a line that keeps a reply
PLAIN = "{{ messages[0]['content'] }}"  # template of a model that has none: it continues the text


class Settings(NamedTuple):
    """How the models are asked.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_p: In (0, 1].
        max_new_tokens: Longest reply; a model with a shorter context gets what is left of it.
        num_samples: Replies to each prompt in each mode.
        template: Name or file of the chat template for the models of this process; None: each model's own.
        batch_size: Prompts that a model of this process answers at once.
        model: What a server is asked for, where it serves several models.
        server: Kind of the servers; None: found out.
        api_key_env: Environment variable that holds the servers' key.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 1024
    num_samples: int = 1
    seed: int = 0
    template: str | None = None
    batch_size: int = 32
    model: str | None = None
    server: str | None = None
    api_key_env: str | None = None

    def shown(self) -> dict[str, Any]:
        """What decides the replies, for a reader."""
        names = ("temperature", "top_p", "max_new_tokens", "num_samples", "seed", "template")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def teacher(self, **more: Any) -> Teacher:
        fields = ("temperature", "top_p", "max_new_tokens", "batch_size", "api_key_env")
        return Teacher(**{name: getattr(self, name) for name in fields}, concurrency=WIDTH, **more)


class Asked(NamedTuple):
    """One reply that is asked of one model.

    Attributes:
        place: Number of the prompt, mode and number of the sample.
        prompt: The prompt's name.
        key: Stands for all that decides the reply; "" where nothing can be asked.
        request: What to ask, or why the model cannot be asked.
    """

    place: tuple[int, str, int]
    prompt: str
    key: str
    request: Request | str


def sample(models: Sequence[NamedModel], prompts: Sequence[Prompt], settings: Settings, file: Path) -> list[Column]:
    """Ask every model for every reply that the file does not hold.

    Args:
        file: JSONL, where replies are kept; its folder exists.
    Returns:
        A column for each model.
    Raises:
        UserError: A model or a server cannot be used, or the file is not one of kept replies, or is in use.
    """
    with _as_flags():
        sources = [_source(model, settings) for model in models]
        with _kept(file) as kept:
            return [
                _column(source, prompts, settings, kept, f"sample {source.name} (model {i} of {len(sources)})")
                for i, source in enumerate(sources, 1)
            ]


def _column(
    source: "Local | Served", prompts: Sequence[Prompt], settings: Settings, kept: "Kept", label: str
) -> Column:
    asked = list(_asked(source, prompts, settings))
    known = [one for one in asked if one.key]
    missing = {one.key: one for one in known if one.key not in kept}  # equal prompts are asked about once
    failed: dict[str, str] = {}
    with Progress(label, len(known), "request", done=len(known) - len(missing)) as progress:

        def keep(one: Asked, reply: Reply | str) -> None:
            if isinstance(reply, str):
                failed[one.key] = reply
            else:
                kept.add(one.key, {"model": source.name, "prompt": one.prompt, "mode": one.place[1]}, reply)
            progress.update()

        if missing:
            asyncio.run(_ask_all(source.engine(), list(missing.values()), keep))

    def given(one: Asked) -> Given:
        error = one.request if isinstance(one.request, str) else failed.get(one.key)
        return Given(None, error) if error is not None else Given(kept[one.key], None)

    return Column(source.name, source.about, {one.place: given(one) for one in asked})


def _asked(source: "Local | Served", prompts: Sequence[Prompt], settings: Settings) -> Iterator[Asked]:
    """All that is asked of a model: mode by mode, as a batch lasts as long as its longest reply."""
    sampling = (settings.temperature, settings.top_p, settings.max_new_tokens)
    for mode, thinking in source.modes.items():
        for index, prompt in enumerate(prompts):
            content = digest([prompt.messages, prompt.tools, dict(prompt.template_kwargs)])
            for number in range(settings.num_samples):
                seed, place = derive_seed(settings.seed, content, mode, number), (index, mode, number)
                try:
                    request = source.request(prompt, thinking, seed)
                except UserError as error:
                    yield Asked(place, prompt.name, "", str(error))
                    continue
                key = digest([VERSION, source.identity, sampling, request._asdict()], 24)
                yield Asked(place, prompt.name, key, request)


async def _ask_all(engine: TeacherEngine, asked: list[Asked], keep: Callable[[Asked, Reply | str], None]) -> None:
    slots = asyncio.Semaphore(WIDTH)

    async def ask(one: Asked) -> None:
        async with slots:
            try:
                reply = await engine.ask(one.request)
            except RequestFailed as error:
                reply = error.reason
            keep(one, reply)

    async with engine:
        await engine.identity()
        tasks = [asyncio.create_task(ask(one)) for one in asked]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise


# ---------------------------------------------------------------- the models


def _source(model: NamedModel, settings: Settings) -> "Local | Served":
    return Local(model, settings) if model.folder is not None else Served(model, settings)


class Local:
    """A checkpoint folder, which is loaded only when it is asked.

    Attributes:
        modes: Name -> `Request.thinking`.
        identity: Fit for JSON; stands for the weights, the tokenizer and how prompts are rendered.
        about: For the page.
    Raises:
        UserError: It is not a checkpoint that loads, or the template is unknown.
    """

    def __init__(self, model: NamedModel, settings: Settings):
        self.name, self.folder, self.settings = model.name, model.folder, settings
        check_usable(model.folder)
        tokenizer = AutoTokenizer.from_pretrained(model.folder)
        own = tokenizer.chat_template
        self.is_plain = settings.template is None and not own
        if settings.template is not None:
            template, source = load_template(settings.template), f"chat template {settings.template}"
        else:
            template, source = (PLAIN, "plain text to continue: it has no chat template") if not own else (own, "")
        self.tokenizer = copy(tokenizer)
        self.tokenizer.chat_template = template
        self.template = self.tokenizer.get_chat_template()
        modes = modes_of(self.tokenizer, RELEASE_DAY)
        has_modes = modes is not None and modes.two
        self.modes = {"think": True, "no_think": False} if has_modes else {"plain" if self.is_plain else "one": None}
        config = AutoConfig.from_pretrained(model.folder).get_text_config(decoder=True)
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.identity = [_content(model.folder), digest(self.template), RELEASE_DAY]
        self.about = "; ".join(filter(None, [shown(model.folder), source or "its own chat template"]))
        if not has_modes and not self.is_plain:
            self.about += " without a think mode"

    def request(self, prompt: Prompt, thinking: bool | None, seed: int) -> Request:
        """
        Raises:
            UserError: The template refuses the prompt, or the context has no room for a reply.
        """
        messages, tools, kwargs = prompt.messages, prompt.tools, dict(prompt.template_kwargs)
        if self.is_plain:
            text = "\n\n".join(filter(None, (text_of(message.get("content")) for message in messages)))
            messages, tools, kwargs = [{"role": "user", "content": text}], None, {}
        mode = {} if thinking is None else {"enable_thinking": thinking}
        ids = encode_prompt(self.tokenizer, messages, template_kwargs=kwargs | mode, tools=tools, today=RELEASE_DAY)
        most = self.settings.max_new_tokens
        if self.context is not None:
            most = min(most, self.context - len(ids))
        if most < 1:
            raise UserError(f"the prompt has {len(ids):,} tokens, and the model's context {self.context:,}")
        return Request(messages, thinking, seed, tools, kwargs or None, most)

    def engine(self) -> LocalTeacher:
        load = partial(load_for_inference, self.folder)
        return LocalTeacher(load, self.settings.teacher(), RELEASE_DAY, key=KEY, template=self.template)


def _content(folder: Path) -> str:
    """Stands for the content of a checkpoint's files."""
    verify(folder)
    files = (manifest.read(folder) or {}).get("files") or hashes(folder)
    return digest({name: entry["sha256"] for name, entry in files.items()}, 24)


class Served:
    """A model behind a server's OpenAI-compatible API; the server renders the prompts. Attributes as `Local`.

    Raises:
        UserError: The server does not answer, or serves another model than the one that is asked for.
    """

    def __init__(self, model: NamedModel, settings: Settings):
        self.name, self.settings = model.name, settings
        self.teacher = settings.teacher(url=model.url, model=settings.model)
        self.modes = dict(MODES)
        said = asyncio.run(self._identify())
        self.identity = [model.url, said]
        self.about = f"{said['model']}, {PROFILES[self.teacher.server].title}; the server's own chat template"

    async def _identify(self) -> dict[str, Any]:
        async with Connection(self.teacher.url, self.teacher.api_key_env, key=KEY) as connection:
            self.teacher.server = self.settings.server or await server_kind(connection)
        async with self.engine() as engine:
            return await engine.identity()

    def request(self, prompt: Prompt, thinking: bool | None, seed: int) -> Request:
        # The date of the models in this process; a template that does not read it is not changed by it.
        date = {"today": RELEASE_DAY} if PROFILES[self.teacher.server].templated else {}
        return Request(prompt.messages, thinking, seed, prompt.tools, {**date, **prompt.template_kwargs} or None)

    def engine(self) -> ChatEngine:
        return ChatEngine(self.teacher, key=KEY, modes=())


@contextlib.contextmanager
def _as_flags() -> Iterator[None]:
    """Name settings in the engines' messages as the command line does."""
    try:
        yield
    except UserError as error:
        text = re.sub(rf"\b{KEY}\.url=", "", str(error))
        flags = re.sub(rf"\b{KEY}\.(\w+)", lambda found: "--" + found[1].replace("_", "-"), text)
        raise UserError(flags) from error


# ---------------------------------------------------------------- what is kept


class Kept(dict[str, Reply]):
    """Replies by their keys, as they stand in a file."""

    def __init__(self, file: BinaryIO, name: Path):
        super().__init__()
        self.file, good = file, 0
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and line[: len(START)] == START[: len(line)]:  # a kill cut it
                break
            try:
                found = json.loads(line)
                self[found["key"]] = Reply(**found["reply"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{name}:{number} is not a kept reply; remove {name}, or give --html another name"
                ) from None
            good += len(line)
        file.truncate(good)

    def add(self, key: str, about: dict[str, str], reply: Reply) -> None:
        """Keep a reply, on the disk as well."""
        line = json.dumps({"key": key, **about, "reply": reply._asdict()})  # ASCII: a reply may end in half a character
        self.file.write(line.encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self[key] = reply


@contextlib.contextmanager
def _kept(file: Path) -> Iterator[Kept]:
    """The kept replies of a file, for this process alone; a file without any does not stay."""
    with open(file, "a+b") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process writes {file}; wait for its end, or give --html another name") from None
        try:
            yield Kept(opened, file)
        finally:
            if not os.fstat(opened.fileno()).st_size:
                file.unlink()
