"""A checkpoint that answers in this process: requests come one by one, and are answered in batches on a thread."""

import queue
import threading
import time
from asyncio import to_thread, wrap_future
from collections.abc import Callable
from concurrent.futures import Future
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smolpost.chat.answers import opens_thinking
from smolpost.chat.masks import encode_prompt
from smolpost.chat.reasoning import ends_thinking, split_reasoning
from smolpost.chat.render import load_template, render, template_hash
from smolpost.chat.turn_end import endless_replies
from smolpost.errors import UserError
from smolpost.inference.generation import generate_each, padding_token_id, reply_text, stop_token_ids
from smolpost.inference.local import check_length, check_weights
from smolpost.inference.sampling import NotFinite, Sampling
from smolpost.synthesis.records import Reply, Request, RequestFailed
from smolpost.synthesis.settings import Teacher

LULL = 0.05  # seconds without another request, after which a batch goes out though it is not full
QUESTION = [{"role": "user", "content": "Hello?"}]


class Asked(NamedTuple):
    """A request that waits for its batch.

    Attributes:
        ids: Tokens of the prompt.
        most: Longest reply, in tokens.
        reply: Where its tokens go, the stop token included.
    """

    ids: list[int]
    most: int
    seed: int
    reply: "Future[list[int]]"


class LocalTeacher:
    """A TeacherEngine over a model in this process, on the device where it lies.

    A reply follows from the prompt, the teacher's settings and the request's seed. It does not depend on the requests
    that share its batch (`generate_each` says how exactly), so a run that was interrupted gives the replies of one that
    was not. Replies end where the checkpoint's generation config says. Where that is not the end of a turn in the chat
    template, a line says so.

    The checkpoint is in memory only inside `async with`: a run that has all replies loads nothing, and two teachers
    that answer one after the other need the memory of one.

    Args:
        load: Gives the model and its tokenizer.
        teacher: Its template renders the prompts, whatever template the tokenizer has.
        today: Date rendered into prompts.
        key: Of the teacher in the recipe, for messages.
        template: Text of a chat template, in place of the teacher's.
    Raises:
        UserError: The template is unknown.
    """

    def __init__(
        self,
        load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
        teacher: Teacher,
        today: str,
        *,
        key: str,
        template: str | None = None,
    ):
        self.load, self.teacher, self.today, self.key = load, teacher, today, key
        self.template = load_template(teacher.template) if template is None else template
        self.sampling = Sampling(
            teacher.temperature,
            top_p=teacher.top_p,
            top_k=teacher.top_k,
            min_p=teacher.min_p,
            repetition_penalty=teacher.repetition_penalty,
            presence_penalty=teacher.presence_penalty,
        )
        self._waiting: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    async def __aenter__(self) -> "LocalTeacher":
        """
        Raises:
            UserError: A weight is NaN or infinite, or the template has no think mode to switch.
        """
        self.model, tokenizer = self.load()
        self.tokenizer = copy(tokenizer)
        self.tokenizer.chat_template = self.template
        self.name = Path(self.model.name_or_path).name or "the teacher"
        self.stop_tokens = stop_token_ids(self.model.generation_config)
        self.pad_token = padding_token_id(self.tokenizer)
        self._check_thinking()
        check_weights(self.model, f"{self.key}: {self.name}")
        if line := endless_replies(self.tokenizer, self.stop_tokens, self.name):
            print(line, flush=True)
        self._stopped.clear()
        self._thread = threading.Thread(target=self._answer_all, name=f"{self.key} answers", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *error) -> None:
        """End the thread, a batch under way at its next token, and let the model go."""
        self._stopped.set()
        self._waiting.put(None)
        await to_thread(self._thread.join)
        del self.model

    async def identity(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "revision": None,
            "server": "this process",
            "version": f"transformers {transformers.__version__}",
            "template": template_hash(self.template),
            "stop_tokens": self.tokenizer.convert_ids_to_tokens(self.stop_tokens),
        }

    async def ask(self, request: Request) -> Reply:
        """
        Raises:
            RequestFailed: The template refuses the messages, or the model has too few positions.
            UserError: The device's memory is too small for a batch, or the model computes NaN.
        """
        since = time.perf_counter()
        most = request.max_new_tokens or self.teacher.max_new_tokens
        try:
            ids = self._prompt_ids(request)
            check_length(self.model, len(ids) + most, "prompt and reply")
        except UserError as error:
            raise RequestFailed(str(error)) from error
        asked = Asked(ids, most, request.seed, Future())
        self._waiting.put(asked)
        tokens = await wrap_future(asked.reply)
        return self._reply(ids, tokens)._replace(seconds=time.perf_counter() - since)

    def _check_thinking(self) -> None:
        if self.teacher.thinking is None:
            return
        modes = [{"enable_thinking": thinks} for thinks in (True, False)]
        texts = {
            render(self.tokenizer, QUESTION, template_kwargs=mode, today=self.today, add_generation_prompt=True)
            for mode in modes
        }
        if len(texts) == 1:
            raise UserError(
                f"{self.key}.thinking={str(self.teacher.thinking).lower()}, but the chat template "
                f"{self.teacher.template} has no think mode to switch; set {self.key}.thinking=null, or "
                f"{self.key}.template=smollm3"
            )

    def _prompt_ids(self, request: Request) -> list[int]:
        kwargs = dict(request.template_kwargs or {})
        if request.thinking is not None:
            kwargs["enable_thinking"] = request.thinking
        return encode_prompt(
            self.tokenizer, request.messages, template_kwargs=kwargs, tools=request.tools, today=self.today
        )

    def _reply(self, prompt: list[int], tokens: list[int]) -> Reply:
        text = reply_text(self.tokenizer, tokens, self.stop_tokens)
        opened = opens_thinking(self.tokenizer, prompt)
        reasoning, answer = split_reasoning(text, opened_in_prompt=opened)
        return Reply(
            content=answer,
            reasoning=reasoning,
            finish_reason="stop" if tokens[-1] in self.stop_tokens else "length",
            closed=not ends_thinking(text, opened_in_prompt=opened),
            prompt_tokens=len(prompt),
            completion_tokens=len(tokens),
            raw={"role": "assistant", "content": text},
        )

    # ---------------------------------------------------------------- on the thread, without the tokenizer

    def _answer_all(self) -> None:
        while batch := self._next_batch():
            try:
                replies = self._generate(batch)
            except Exception as error:
                for asked in batch:
                    asked.reply.set_exception(error)
            else:
                for asked, reply in zip(batch, replies, strict=True):
                    asked.reply.set_result(reply)
        while not self._waiting.empty():
            if asked := self._waiting.get():
                asked.reply.cancel()

    def _next_batch(self) -> list[Asked]:
        """Requests that were not given up; none at the end."""
        batch: list[Asked] = []
        while len(batch) < self.teacher.batch_size and not self._stopped.is_set():
            try:
                asked = self._waiting.get(timeout=LULL if batch else None)
            except queue.Empty:
                break
            if asked is not None and asked.reply.set_running_or_notify_cancel():
                batch.append(asked)
        return batch

    def _generate(self, batch: list[Asked]) -> list[list[int]]:
        try:
            replies = generate_each(
                self.model,
                [asked.ids for asked in batch],
                [asked.seed for asked in batch],
                self.sampling,
                max_new_tokens=max(asked.most for asked in batch),
                eos_token_ids=self.stop_tokens,
                pad_token_id=self.pad_token,
                check=self._go_on,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(self._too_large(batch)) from error
        except NotFinite as error:
            raise UserError(
                f"{self.key}: {self.name} cannot answer, {error}; train it again with a lower learning_rate"
            ) from error
        return [reply[: asked.most] for asked, reply in zip(batch, replies, strict=True)]

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise InterruptedError("the run ended")

    def _too_large(self, batch: list[Asked]) -> str:
        longest, most = max(len(asked.ids) for asked in batch), max(asked.most for asked in batch)
        half = len(batch) // 2
        remedy = f"set {self.key}.batch_size={half}" if half else f"lower {self.key}.max_new_tokens={most}"
        return (
            f"{self.key}.batch_size={self.teacher.batch_size}: {len(batch)} prompts of up to {longest} tokens, with "
            f"replies of up to {most}, need more memory than {self.model.device} has; {remedy}"
        )
