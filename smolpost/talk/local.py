"""A checkpoint that talks in this process."""

import signal
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from smolpost.chat.answers import opens_thinking, parts_of
from smolpost.chat.masks import encode_prompt
from smolpost.chat.reasoning import OPEN
from smolpost.chat.render import load_template, render
from smolpost.chat.turn_end import endless_replies
from smolpost.errors import UserError
from smolpost.inference.generation import generate, padding_token_id, reply_text, stop_token_ids
from smolpost.inference.local import check_weights
from smolpost.inference.sampling import NotFinite
from smolpost.inference.streaming import TextStream
from smolpost.model.loading import load_for_inference
from smolpost.model.stored import one_line
from smolpost.schema import RELEASE_DAY
from smolpost.signals import Stopped
from smolpost.talk.conversation import CUT, INTERRUPTED, STOP, Conversation, Said
from smolpost.talk.settings import Settings, of_generation_config
from smolpost.talk.speaker import Heard, Show, cut_at
from smolpost.talk.splitter import Splitter


def load(name: str, folder: Path, template: str | None) -> "LocalSpeaker":
    """A checkpoint as a speaker.

    Args:
        template: Name or path of a chat template, instead of the checkpoint's own.
    Raises:
        UserError: It cannot be loaded, or has no chat template.
    """
    text = load_template(template) if template else None
    logging.disable_progress_bar()  # of weights: a chat says itself that it loads a model
    try:
        model, tokenizer = load_for_inference(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: {folder} cannot be loaded ({one_line(error)}); name a folder with weights and tokenizer"
        ) from error
    if text:
        tokenizer.chat_template = text
    return LocalSpeaker(name, model, tokenizer)


class LocalSpeaker:
    """A `Speaker` that renders, masks and samples as training and evaluation do.

    A prompt has the token ids that precede its reply in the prepared row of the same conversation. So the date in it is
    that of training. A reply is that of `LocalEngine.generate` with the same seed.

    Raises:
        UserError: There is no chat template, or a weight is NaN or infinite.
    """

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.chat_template:
            raise UserError(
                f"{name} has no chat template, so it cannot be talked to; add --template smollm3, --template chatml or "
                "--template FILE.jinja"
            )
        check_weights(model, name)
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.stops = stop_token_ids(model.generation_config)
        self.settings, ignored = of_generation_config(model.generation_config.to_dict())
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        size = sum(parameter.numel() for parameter in model.parameters())
        lines = [
            f"{name}: {_short(size)} parameters on {model.device}"
            + (f", context {self.context:,} tokens" if self.context else "")
        ]
        if ignored:
            lines.append(f"{name}: its generation_config.json sets {', '.join(ignored)}, which chat does not use")
        if line := endless_replies(tokenizer, self.stops, name):
            lines.append(line)
        self.about = "\n".join(lines)

    def mode(self, conversation: Conversation, wanted: bool | None) -> bool | None:
        frame, kwargs = conversation.frame, conversation.frame.template_kwargs(None)
        messages = frame.messages([{"role": "user", "content": "?"}])

        def prompt(**mode: bool) -> str:
            options = {"template_kwargs": kwargs | mode, "tools": frame.schemas, "today": RELEASE_DAY}
            return render(self.tokenizer, messages, **options, add_generation_prompt=True)

        thinking, direct = prompt(enable_thinking=True), prompt(enable_thinking=False)
        if thinking == direct:
            return None
        return prompt() == thinking if wanted is None else wanted

    def prompt_ids(self, conversation: Conversation, mode: bool | None) -> list[int]:
        """Token ids up to the start of the reply."""
        frame = conversation.frame
        return encode_prompt(
            self.tokenizer,
            conversation.messages,
            template_kwargs=frame.template_kwargs(mode),
            tools=frame.schemas,
            today=RELEASE_DAY,
        )

    def reply(self, conversation: Conversation, settings: Settings, wanted: bool | None, seed: int, show: Show) -> Said:
        mode = self.mode(conversation, wanted)
        prompt = self.prompt_ids(conversation, mode)
        room = self._room(len(prompt))
        most, opened = settings.longest(room), opens_thinking(self.tokenizer, prompt)
        heard, text, splitter = Heard(show), TextStream(self.tokenizer, self.stops), Splitter(opened=opened)
        tokens: list[int] = []

        def take(new: list[int]) -> None:
            tokens.extend(new)
            heard.take(splitter.add(text.text(new)), len(new))

        finish = STOP
        try:
            self._generate(prompt, settings, most, seed, take)
        except Stopped as stop:
            if stop.signum != signal.SIGINT:
                raise
            finish = INTERRUPTED
        heard.take([*splitter.add(text.rest()), *splitter.end()], 0)
        if finish == STOP and (not tokens or tokens[-1] not in self.stops):
            finish = CUT
        return self._said(tokens, opened, finish, mode, _end(finish, most, room), heard, seed)

    def _room(self, num_tokens: int) -> int | None:
        if self.context is None:
            return None
        if num_tokens >= self.context:
            raise UserError(
                f"{self.name}: the conversation has {num_tokens:,} tokens, and the model's context is "
                f"{self.context:,}; nothing is left out in silence: /undo takes the last exchange back, /clear begins "
                "a new conversation"
            )
        return self.context - num_tokens

    def _generate(self, prompt: list[int], settings: Settings, most: int, seed: int, take) -> None:
        try:
            generate(
                self.model,
                [prompt],
                max_new_tokens=most,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                seed=seed,
                eos_token_ids=self.stops,
                pad_token_id=padding_token_id(self.tokenizer),
                batch_size=1,
                stream=take,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.name}: {len(prompt):,} tokens and a reply of up to {most:,} need more memory than "
                f"{self.model.device} has; /set max_new_tokens={max(1, most // 2)}, or /clear"
            ) from error
        except RuntimeError as error:
            # A Decoder says so itself, and transformers' `generate` draws from the numbers as they are.
            if not isinstance(error, NotFinite) and "probability tensor" not in str(error):
                raise
            raise UserError(
                f"{self.name} cannot answer: its activations are not finite; train it again with a lower learning_rate"
            ) from error

    def _said(
        self, tokens: list[int], opened: bool, finish: str, mode: bool | None, note: str, heard: Heard, seed: int
    ) -> Said:
        content = reply_text(self.tokenizer, tokens, self.stops)
        if opened and tokens and not content.lstrip().startswith(OPEN):
            content = f"{OPEN}\n{content}"  # rows hold the complete block
        parts = parts_of(content)
        return Said(
            {"role": "assistant", "content": content}, parts.reasoning, parts.answer, finish, mode, note,
            len(tokens), heard.thinking_tokens, heard.seconds, heard.thinking_seconds, seed,
        )  # fmt: skip


def _end(finish: str, most: int, room: int | None) -> str:
    if finish != CUT:
        return ""
    if most == room:
        return "cut: the conversation fills the model's context; /clear begins a new one"
    return cut_at(most)


def _short(number: int) -> str:
    """A number of parameters: 3.08B, 12.4M, 940K."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)
