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
    progress: Callable[[int], object] | None = None,
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
        progress: Called with the number of prompts done since the last call.
    Returns:
        A list of token ids per prompt, in the order given: the reply without the prompt, and with the stop token as
        its last one unless it was cut at max_new_tokens.
    Raises:
        ValueError: A prompt is empty.
    """
    if not all(prompts):
        raise ValueError("a prompt without tokens cannot be replied to")
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=pad_token_id,
        use_cache=True,
        **sampling,
    )
    nucleus = Sampling(temperature, top_p)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    replies: list[list[int]] = [[] for _ in prompts]
    with inference(model):
        num_rows, decoder = 0, None
        for index, start in enumerate(range(0, len(prompts), batch_size)):
            rows = by_length[start : start + batch_size]
            if len(rows) != num_rows:  # the first and the last batch
                num_rows, decoder = len(rows), None  # frees the cache before another is made
                decoder = _decoder(model, num_rows, len(prompts[rows[0]]), config, nucleus)
            batch = _generate_batch(model, [prompts[i] for i in rows], config, derive_seed(seed, index), decoder)
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
    added = tokenizer.added_tokens_decoder
    dropped = {i for i, token in added.items() if token.special and token.content not in REPLY_TOKENS}
    dropped.update(stop_tokens)
    return tokenizer.decode([i for i in reply if i not in dropped], clean_up_tokenization_spaces=False)


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


def _generate_batch(
    model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig, seed: int, decoder: Decoder | None
) -> list[list[int]]:
    """Replies to B prompts in one call; without a decoder, by transformers' `generate`."""
    device = model.device
    input_ids, attention_mask = _padded(prompts, config.pad_token_id, device)
    if decoder is not None:
        replies = decoder.reply(input_ids, attention_mask, config.max_new_tokens, seed)
        return [_until_stop(row, config.eos_token_id or ()) for row in replies]
    with (
        _own_generation_config(model, config),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        output = model.generate(input_ids, attention_mask=attention_mask, generation_config=config)
    return [_until_stop(row, config.eos_token_id or ()) for row in output[:, input_ids.shape[1] :].tolist()]


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
