"""Replies to tokenized prompts, in batches, whatever their lengths.

Shapes: B prompts of one batch, L tokens of its longest prompt.
"""

from contextlib import contextmanager

import torch
from transformers import AutoConfig, GenerationConfig

from smolpost.inference.seeds import derive_seed

# Part of a reply that a reader or a parser needs, even where a tokenizer calls them special.
REPLY_TOKENS = frozenset(
    f"<{slash}{name}>" for name in ("think", "tool_call", "tool_response", "code") for slash in ("", "/")
)


def generate(
    model,
    prompts,
    *,
    max_new_tokens,
    temperature,
    top_p,
    seed,
    eos_token_ids,
    pad_token_id,
    batch_size,
    progress=None,
):
    """Reply to each prompt; the same arguments give the same replies.

    The model's own `generation_config`, training mode and `use_cache` neither matter nor change.

    Args:
        model: A causal LM of transformers.
        prompts: Lists of token ids, none empty.
        max_new_tokens: Longest reply, the stop token included; > 0.
        temperature: Divisor of the logits; 0 takes the likeliest token each time.
        top_p: Share of the probability mass sampled from, in (0, 1]; of no effect at temperature 0.
        seed: With a batch's index, decides that batch's random numbers.
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
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    replies = [None] * len(prompts)
    with inference(model):
        for index, start in enumerate(range(0, len(prompts), batch_size)):
            rows = by_length[start : start + batch_size]
            batch = _generate_batch(model, [prompts[i] for i in rows], config, derive_seed(seed, index))
            for i, reply in zip(rows, batch, strict=True):
                replies[i] = reply
            if progress is not None:
                progress(len(rows))
    return replies


@contextmanager
def inference(model):
    """Evaluation mode without gradients; the model's own mode comes back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def stop_token_ids(settings):
    """Tokens at which stock `generate` stops under a `GenerationConfig`: what a checkpoint's folder says, in its order.

    Never what a chat template says: a model is measured as its users will run it.
    """
    ids = settings.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def stored_stop_token_ids(folder):
    """`stop_token_ids` of a checkpoint's folder: of generation_config.json, or of config.json where there is none."""
    try:
        settings = GenerationConfig.from_pretrained(folder)
    except OSError:
        settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))
    return stop_token_ids(settings)


def padding_token_id(tokenizer):
    """The padding token, else any token: what it is never matters, only that there is one."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def reply_text(tokenizer, reply, stop_tokens):
    """Text of a reply (token ids) without its stop token and other special ones; think and tool tags stay."""
    added = tokenizer.added_tokens_decoder
    dropped = {i for i, token in added.items() if token.special and token.content not in REPLY_TOKENS}
    dropped.update(stop_tokens)
    return tokenizer.decode([i for i in reply if i not in dropped], clean_up_tokenization_spaces=False)


def _generate_batch(model, prompts, config, seed):
    """Replies to B prompts in one call; its random numbers leave the caller's as they were."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    input_ids = [[config.pad_token_id] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]  # [B, L]
    attention_mask = [[0] * n + [1] * (longest - n) for n in padding]  # [B, L]
    device = model.device
    with (
        _own_generation_config(model, config),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        output = model.generate(
            torch.tensor(input_ids, device=device),
            attention_mask=torch.tensor(attention_mask, device=device),
            generation_config=config,
        )
    return [_until_stop(row, config.eos_token_id or ()) for row in output[:, longest:].tolist()]


@contextmanager
def _own_generation_config(model, config):
    """Hide the model's generation settings: the library fills what a call leaves open with them."""
    hidden, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = hidden


def _until_stop(tokens, eos_token_ids):
    """Tokens up to and including the first stop token; what follows one is padding."""
    end = next((i for i, token in enumerate(tokens) if token in eos_token_ids), len(tokens))
    return tokens[: end + 1]
