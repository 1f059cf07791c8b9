"""Key-value recall by context length: prompts filled up to a number of tokens, values asked for by their keys."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from smolpost.chat.masks import encode_prompt
from smolpost.chat.reasoning import split_reasoning
from smolpost.data.tasks import CITIES, KEYS, needle_row, recall_row, share_found
from smolpost.errors import UserError
from smolpost.model.generation import generate, padding_token_id, reply_text, stop_token_ids

# Chat models wrap a code into a sentence: room for a reply, as a multiple of the reference's tokens.
_SENTENCE_ROOM = 4

# Units added by the first probe of a size: enough to see how many tokens a unit costs.
_PROBE = 16


class Style(NamedTuple):
    """One way to write keys and values.

    Attributes:
        row: (rng, size) to a row of `smolpost.data.tasks`; the size is in the units the context is filled with.
        smallest: Size of the shortest context.
        score: (reply, row) to the share of asked values found, in [0, 1].
        room: Longest reply, as a multiple of the reference answer's tokens.
    """

    row: Callable
    smallest: int
    score: Callable
    room: int


class Prompt(NamedTuple):
    row: dict
    ids: list[int]
    answer_tokens: int  # of the reference answer and its stop token

    @property
    def num_tokens(self):
        return len(self.ids) + self.answer_tokens


def retrieval(model, tokenizer, spec, *, today, seed, batch_size=16):
    """Ask for values hidden in contexts of given lengths, greedily, in no-think mode.

    A prompt, rendered with the tokenizer's chat template, and its reference answer with the stop token together have at
    most the stated number of tokens, and would have more with one more symbol or filler sentence. Lengths above the
    model's `max_position_embeddings` are asked too: they measure extrapolation.

    Args:
        model: A causal LM.
        tokenizer: The checkpoint's, with its chat template.
        spec: A `smolpost.schema.Retrieval`. Scored is the share of the asked values that the reply contains (RULER's
            string_match_all, arXiv:2404.06654), with their keys where they are symbols.
        today: Date rendered into the header.
        seed: Of the prompts; >= 0. Prompt i starts from the same random numbers at every length.
        batch_size: Prompts per generate call at the shortest length; fewer at longer ones, for as many tokens.
    Returns:
        {length: {"found": share of asked values found, in [0, 1], "prompt_tokens": mean tokens of a prompt}}.
    Raises:
        UserError: A setting is out of range, or a length cannot hold the pairs.
    """
    style = _style(spec)
    options = {"tokenizer": tokenizer, "style": style, "today": today, "seed": seed}
    least = max(_prompt(i, style.smallest, **options).num_tokens for i in range(spec.num_prompts))
    if min(spec.lengths) < least:
        raise UserError(
            f"evaluation.retrieval.lengths={min(spec.lengths)} is too short for {spec.pairs} pairs and {spec.queries} "
            f"queries: prompt and answer have {least} tokens at least; use {least} or more, or lower pairs or queries"
        )
    result = {}
    with tqdm(total=len(spec.lengths) * spec.num_prompts, desc="retrieval", unit="reply", disable=None) as bar:
        for length in spec.lengths:
            prompts = [_fitted(partial(_prompt, i, **options), style.smallest, length) for i in range(spec.num_prompts)]
            replies = generate(
                model,
                [prompt.ids for prompt in prompts],
                max_new_tokens=style.room * max(prompt.answer_tokens for prompt in prompts),
                temperature=0,
                top_p=1.0,
                seed=seed,
                eos_token_ids=stop_token_ids(tokenizer),
                pad_token_id=padding_token_id(tokenizer),
                batch_size=max(1, batch_size * min(spec.lengths) // length),
                progress=bar.update,
            )
            answers = [split_reasoning(reply_text(tokenizer, reply))[1].strip() for reply in replies]
            scores = [style.score(answer, prompt.row) for answer, prompt in zip(answers, prompts, strict=True)]
            prompt_tokens = [len(prompt.ids) for prompt in prompts]
            result[length] = {"found": float(np.mean(scores)), "prompt_tokens": float(np.mean(prompt_tokens))}
    return result


def _style(spec):
    """The style a spec names, with its numbers of pairs and queries filled in."""
    limits = {"symbols": len(KEYS), "sentences": len(CITIES)}
    if spec.style not in limits:
        raise UserError(f"evaluation.retrieval.style={spec.style} is unknown; use {' or '.join(limits)}")
    if not spec.lengths:
        raise UserError("evaluation.retrieval.lengths is empty; give at least one, or set evaluation.retrieval to null")
    for key, limit in {"num_prompts": None, "pairs": limits[spec.style], "queries": spec.pairs}.items():
        value = getattr(spec, key)
        if value < 1:
            raise UserError(f"evaluation.retrieval.{key}={value} is below 1; raise it")
        if limit is not None and value > limit:
            raise UserError(f"evaluation.retrieval.{key}={value} is above {limit} of style {spec.style}; lower it")
    asked = {"pairs": spec.pairs, "queries": spec.queries}
    if spec.style == "symbols":
        smallest = 3 * spec.pairs + 1 + spec.queries
        return Style(
            lambda rng, size: recall_row(rng, length=size, distinct=True, **asked), smallest, share_of_pairs, 1
        )
    return Style(
        lambda rng, size: needle_row(rng, num_fillers=size, **asked),
        0,
        lambda reply, row: share_found(reply, row["references"]),
        _SENTENCE_ROOM,
    )


def share_of_pairs(reply, row):
    """Share of a recall row's pairs `Kv` that occur in the reply, in [0, 1]; uppercase then lowercase is a pair."""
    expected = row["messages"][-1]["content"]
    pairs = [expected[i : i + 2] for i in range(0, len(expected), 2)]
    return sum(pair in reply for pair in pairs) / len(pairs)


def _prompt(i, size, *, tokenizer, style, today, seed):
    """The i-th prompt at a size, tokenized."""
    row = style.row(np.random.default_rng([seed, i]), size)
    *messages, answer = row["messages"]
    kwargs = {**row["chat_template_kwargs"], "enable_thinking": False}
    ids = encode_prompt(tokenizer, messages, template_kwargs=kwargs, today=today)
    answer_tokens = len(tokenizer.encode(answer["content"], add_special_tokens=False)) + 1
    return Prompt(row, ids, answer_tokens)


def _fitted(prompt_of_size, smallest, limit):
    """The prompt of at most `limit` tokens whose next larger size has more.

    The search keeps a size that fits and one that does not, and goes on from the first by what a unit costs in tokens,
    so a few prompts are rendered, whatever the limit.
    """
    best = shortest = prompt_of_size(smallest)
    low, high, size = smallest, None, smallest + _PROBE
    while high is None or high - low > 1:
        prompt = prompt_of_size(size)
        if prompt.num_tokens <= limit:
            low, best = size, prompt
        else:
            high = size
        tokens_per_unit = max(1, prompt.num_tokens - shortest.num_tokens) / (size - smallest)
        size = low + max(1, int((limit - best.num_tokens) / tokens_per_unit))
        size = size if high is None else min(size, high - 1)
    return best
