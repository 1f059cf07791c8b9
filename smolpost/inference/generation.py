"""Replies to tokenized prompts of any lengths, in batches.

Shapes: B prompts of one batch, L tokens of its longest prompt.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer

from smolpost.inference.decoding import Decoder, cuda_graphs, fits
from smolpost.inference.sampling import RowSampling, Sampling
from smolpost.inference.seeds import derive_seed

# Part of a reply that a reader or a parser needs, even where a tokenizer calls them special.
REPLY_TOKENS = frozenset(
    f"<{slash}{name}>" for name in ("think", "tool_call", "tool_response", "code") for slash in ("", "/")
)


def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    batch_size: int,
    top_k: int | None = None,
    progress: Callable[[int], object] | None = None,
    stream: Callable[[list[int]], object] | None = None,
) -> list[list[int]]:
    """Reply to each prompt; the same arguments give the same replies.

    The model's own `generation_config`, training mode and `use_cache` have no effect and stay as they are.

    Args:
        model: A causal LM of transformers, on any device.
        prompts: Token ids of each, none empty.
        max_new_tokens: Longest reply, the stop token included; > 0.
        temperature: Divisor of the logits; 0 takes the likeliest token each time.
        top_p: Share of the probability mass sampled from, in (0, 1]; of no effect at temperature 0.
        seed: With a batch's index, decides that batch's random numbers; the caller's generators stay as they were.
        eos_token_ids: Tokens that end a reply; none: every reply is as long as it may be.
        pad_token_id: Fills prompts on the left up to their batch's longest; may be a stop token too.
        batch_size: Prompts per call of the model, longest prompts first: what needs too much memory fails at once.
        top_k: Number of likeliest tokens sampled from; None: all.
        progress: Called with the number of prompts done since the last call.
        stream: Called with the tokens of the reply that are new, one or a few at a time; for a single prompt. What it
            raises ends the reply.
    Returns:
        A list of token ids per prompt, in the order given: the reply without the prompt, and with the stop token as
        its last one unless it was cut at max_new_tokens.
    Raises:
        ValueError: A prompt is empty, or there are several to stream.
    """
    if not all(prompts):
        raise ValueError("a prompt without tokens cannot be replied to")
    if stream is not None and len(prompts) != 1:
        raise ValueError(f"one prompt can be streamed, not {len(prompts)}")
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k or 0} if temperature > 0 else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=pad_token_id,
        use_cache=True,
        **sampling,
    )
    nucleus = Sampling(temperature, top_p, top_k)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    replies: list[list[int]] = [[] for _ in prompts]
    with inference(model):
        num_rows, decoder = 0, None
        for index, start in enumerate(range(0, len(prompts), batch_size)):
            rows = by_length[start : start + batch_size]
            if len(rows) != num_rows:  # the first and the last batch
                num_rows, decoder = len(rows), None  # frees the cache before another is made
                decoder = _decoder(model, num_rows, len(prompts[rows[0]]), config, nucleus)
            batch_prompts = [prompts[i] for i in rows]
            batch = _generate_batch(model, batch_prompts, config, derive_seed(seed, index), decoder, stream)
            for i, reply in zip(rows, batch, strict=True):
                replies[i] = reply
            if progress is not None:
                progress(len(rows))
    return replies


def generate_each(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    check: Callable[[], object] = lambda: None,
) -> list[list[int]]:
    """Reply to B prompts as one batch; each reply follows from its own prompt and seed and the settings.

    It does not depend on the other rows of the batch, up to rounding: where two tokens are equally good to the last
    bits, another batch may take the other one. In bf16 this happens more often than in fp32.

    Args:
        model, prompts, max_new_tokens, eos_token_ids, pad_token_id: As for `generate`.
        seeds: [B], each in [0, 2^63).
        check: Called before each token, or now and then; what it raises ends the batch.
    Returns: As `generate`.
    Raises:
        NotFinite: A logit is NaN.
    """
    stops = list(eos_token_ids)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops or None, pad_token_id=pad_token_id
    )
    longest = max(map(len, prompts))
    with inference(model):
        decoder = None if sampling.has_penalties else _decoder(model, len(prompts), longest, config, sampling)
        input_ids, attention_mask = _padded(prompts, pad_token_id, model.device)
        row_seeds = torch.tensor(seeds, device=model.device)
        if decoder is not None:
            rows = decoder.reply(input_ids, attention_mask, max_new_tokens, row_seeds, check)
            return [_until_stop(row, stops) for row in rows]
        choose = LogitsProcessorList([RowSampling(sampling, row_seeds, attention_mask.bool(), check)])
        with _own_generation_config(model, config):
            output = model.generate(
                input_ids, attention_mask=attention_mask, generation_config=config, logits_processor=choose
            )
    return [_until_stop(row, stops) for row in output[:, longest:].tolist()]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode comes back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def stop_token_ids(settings: GenerationConfig) -> list[int]:
    """Tokens at which transformers' `generate` stops with these settings, in their order; none where they name none.

    The chat template has no say: a model is measured as its users will run it.
    """
    ids = settings.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def stored_stop_token_ids(folder: Path) -> list[int]:
    """`stop_token_ids` of a checkpoint's generation_config.json, or of its config.json where there is none.

    Raises:
        OSError: The folder has neither file.
    """
    try:
        settings = GenerationConfig.from_pretrained(folder)
    except OSError:
        settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))
    return stop_token_ids(settings)


def padding_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token; token 0 where there is none, as the attention mask hides it."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def reply_text(tokenizer: PreTrainedTokenizerBase, reply: Sequence[int], stop_tokens: Collection[int]) -> str:
    """Text of a reply without its stop token and other special tokens; think and tool tags stay.

    Args:
        reply: Token ids, as `generate` returns them.
        stop_tokens: Never part of the text, whether the tokenizer calls them special or not.
    """
    dropped = silent_tokens(tokenizer, stop_tokens)
    return tokenizer.decode([i for i in reply if i not in dropped], clean_up_tokenization_spaces=False)


def silent_tokens(tokenizer: PreTrainedTokenizerBase, stop_tokens: Collection[int]) -> set[int]:
    """Ids that are no part of a reply's text; arguments as `reply_text`."""
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special and token.content not in REPLY_TOKENS}
    return special.union(stop_tokens)


def _decoder(
    model: PreTrainedModel, num_rows: int, longest: int, config: GenerationConfig, sampling: Sampling
) -> Decoder | None:
    """What replies faster than transformers' `generate`, where the model, its device and the batch allow it."""
    num_tokens = longest + config.max_new_tokens
    if not fits(model, num_rows, num_tokens):
        return None
    return Decoder(
        model,
        num_rows,
        num_tokens,
        sampling=sampling,
        eos_token_ids=config.eos_token_id or (),
        pad_token_id=config.pad_token_id,
        capture=cuda_graphs(),
    )


class _Streamer(BaseStreamer):
    """Gives tokens to a function as transformers' `generate` chooses them; the prompt, which comes first, is left out.

    Tokens after a stop token are not given: on a GPU `generate` may look for it some steps late.
    """

    def __init__(self, take: Callable[[list[int]], object], stops: Collection[int]):
        self.take, self.stops, self.is_prompt, self.ended = take, stops, True, False

    def put(self, value: torch.Tensor) -> None:
        """A prompt [1, L], or new tokens [N]."""
        if self.is_prompt:
            self.is_prompt = False
            return
        self.give(value.flatten().tolist())

    def give(self, tokens: list[int]) -> None:
        tokens = [] if self.ended else _until_stop(tokens, self.stops)
        if tokens:
            self.ended = tokens[-1] in self.stops
            self.take(tokens)

    def end(self) -> None:
        pass


def _generate_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    config: GenerationConfig,
    seed: int,
    decoder: Decoder | None,
    stream: Callable[[list[int]], object] | None,
) -> list[list[int]]:
    """Replies to B prompts in one call; without a decoder, by transformers' `generate`."""
    device = model.device
    input_ids, attention_mask = _padded(prompts, config.pad_token_id, device)
    stops = config.eos_token_id or ()
    streamer = None if stream is None else _Streamer(stream, stops)
    if decoder is not None:
        give = None if streamer is None else streamer.give
        replies = decoder.reply(input_ids, attention_mask, config.max_new_tokens, seed, stream=give)
        return [_until_stop(row, stops) for row in replies]
    with (
        _own_generation_config(model, config),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        watched = {} if streamer is None else {"streamer": streamer}
        output = model.generate(input_ids, attention_mask=attention_mask, generation_config=config, **watched)
    return [_until_stop(row, stops) for row in output[:, input_ids.shape[1] :].tolist()]


def _padded(prompts: Sequence[list[int]], pad_token_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, L], padded on the left, and their attention mask [B, L]."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    input_ids = [[pad_token_id] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
    attention_mask = [[0] * n + [1] * (longest - n) for n in padding]
    return torch.tensor(input_ids, device=device), torch.tensor(attention_mask, device=device)


@contextmanager
def _own_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Hide the model's generation settings: the library fills what a call leaves open with them."""
    hidden, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = hidden


def _until_stop(tokens: list[int], eos_token_ids: Collection[int]) -> list[int]:
    """Tokens up to the first stop token, with it; padding follows it."""
    end = next((i for i, token in enumerate(tokens) if token in eos_token_ids), len(tokens))
    return tokens[: end + 1]
