"""Held-out conversations: loss of the reference replies, and answers checked against them, with and without thinking.

Shapes: B rows, L tokens of the longest one, T trained tokens, V vocabulary, H hidden.
"""

import math
import re

import torch
from tqdm import tqdm

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode, encode_prompt
from smolpost.chat.reasoning import split_reasoning
from smolpost.data.prompts import conversation, named, split_last_reply
from smolpost.errors import UserError
from smolpost.model.generation import generate, inference, padding_token_id, reply_text, stop_token_ids
from smolpost.objectives.head import head_of
from smolpost.objectives.logprobs import token_scores

MODES = {"think": True, "no_think": False}


def heldout_loss(model, tokenizer, rows, *, today, batch_size, max_rows):
    """Mean negative log-likelihood of the reference replies, think rows and no-think rows apart.

    Args:
        model: A causal LM with a decoder `model` and a head `lm_head`.
        tokenizer: The checkpoint's, with its chat template.
        rows: SmolTalk2 conversations. `chat_template_kwargs.enable_thinking` says a row's mode; think where it is not
            given.
        today: Date rendered into the header.
        batch_size: Rows per forward pass.
        max_rows: At most this many rows of each mode, the first ones.
    Returns:
        {"think": {"loss": nats per trained token or None without one, "tokens": trained tokens, "rows": rows},
        "no_think": alike}.
    Raises:
        UserError: A row is no conversation, the template refuses it, or the loss is not finite.
    """
    of_mode = {mode: [row for row in rows if _thinks(row) is thinking][:max_rows] for mode, thinking in MODES.items()}
    result = {}
    with (
        inference(model),
        tqdm(total=sum(map(len, of_mode.values())), desc="held-out loss", unit="row", disable=None) as bar,
    ):
        for mode, mode_rows in of_mode.items():
            encoded = [_encode(tokenizer, row, today) for row in mode_rows]
            encoded.sort(key=lambda row: len(row.input_ids), reverse=True)
            nats, num_tokens = 0.0, 0
            for start in range(0, len(encoded), batch_size):
                batch = encoded[start : start + batch_size]
                batch_nats, batch_tokens = _summed_loss(model, batch, padding_token_id(tokenizer))
                nats, num_tokens = nats + batch_nats, num_tokens + batch_tokens
                bar.update(len(batch))
            if not math.isfinite(nats):
                raise UserError(
                    f"the held-out loss of {mode} rows is {nats}: the checkpoint's weights or activations are not "
                    "finite; train it again with a lower learning_rate"
                )
            loss = nats / num_tokens if num_tokens else None
            result[mode] = {"loss": loss, "tokens": num_tokens, "rows": len(mode_rows)}
    return result


def accuracy(model, tokenizer, rows, *, today, answer_pattern, max_new_tokens, batch_size, max_rows):
    """Share of prompts answered like the reference, each asked in both modes and answered greedily.

    A prompt is a row's messages before its last assistant turn, with the row's other template variables. The answer is
    what `final_answer` finds in a reply, compared with what it finds in that assistant turn.

    Args:
        model, tokenizer, rows, today: As `heldout_loss`.
        answer_pattern: Regular expression with a group, as `final_answer` takes it.
        max_new_tokens: Longest reply.
        batch_size: Prompts per generate call.
        max_rows: At most this many prompts, of the first rows that can be scored.
    Returns:
        {"think": share right in [0, 1] or None without a prompt, "no_think": alike, "cut": {"think": share of replies
        that reached max_new_tokens without a stop token, "no_think": alike}, "prompts": number of prompts,
        "unscored": rows passed over because their reference holds no answer}.
    Raises:
        UserError: A row is no conversation, the template refuses it, or the pattern is no regular expression with a
            group.
    """
    pattern = _compiled(answer_pattern)
    asked, unscored = [], 0
    for row in rows:
        if len(asked) == max_rows:
            break
        prompt, reference = split_last_reply(conversation(row, "evaluation.heldout"))
        answer = final_answer(reference, pattern)
        if answer:
            asked.append((row, prompt, answer))
        else:
            unscored += 1

    result = {"cut": {}, "prompts": len(asked), "unscored": unscored}
    stop_tokens = stop_token_ids(tokenizer)
    with tqdm(total=2 * len(asked), desc="held-out accuracy", unit="reply", disable=None) as bar:
        for mode, thinking in MODES.items():
            replies = generate(
                model,
                [_prompt_ids(tokenizer, row, prompt, thinking, today) for row, prompt, _ in asked],
                max_new_tokens=max_new_tokens,
                temperature=0,
                top_p=1.0,
                seed=0,
                eos_token_ids=stop_tokens,
                pad_token_id=padding_token_id(tokenizer),
                batch_size=batch_size,
                progress=bar.update,
            )
            answers = [final_answer(reply_text(tokenizer, reply), pattern) for reply in replies]
            right = [answer == expected for answer, (_, _, expected) in zip(answers, asked, strict=True)]
            result[mode] = _share(right)
            result["cut"][mode] = _share([reply[-1] not in stop_tokens for reply in replies])
    return result


def final_answer(text, pattern):
    """The answer within a reply.

    Args:
        text: The reply, as text.
        pattern: Compiled regular expression. The first group of its last match in the text after the think block is
            the answer; empty matches do not count, as `.*` has one at the end of any text.
    Returns:
        The answer without white space around it; "" where there is none.
    """
    _, answer = split_reasoning(text)
    matches = [match for match in pattern.finditer(answer) if match.group()]
    return (matches[-1].group(1) or "").strip() if matches else ""


def _compiled(answer_pattern):
    try:
        pattern = re.compile(answer_pattern)
    except re.error as error:
        raise UserError(
            f"evaluation.answer_pattern={answer_pattern!r} is not a regular expression ({error}); mend it, "
            r"or use '(?s)(.*)' for the whole text after the think block"
        ) from error
    if pattern.groups == 0:
        raise UserError(
            f"evaluation.answer_pattern={answer_pattern!r} has no group to hold the answer; "
            "put parentheses around the part that is the answer"
        )
    return pattern


def _template_kwargs(row):
    return row.get("chat_template_kwargs") or {}


def _thinks(row):
    return _template_kwargs(row).get("enable_thinking") is not False


def _encode(tokenizer, row, today):
    options = {"template_kwargs": _template_kwargs(row), "tools": row.get("tools"), "today": today}
    messages = conversation(row, "evaluation.heldout")
    with named(row):
        return encode(tokenizer, messages, **options)


def _prompt_ids(tokenizer, row, prompt, thinking, today):
    """Token ids of a row's prompt in one mode, up to where the reply begins."""
    kwargs = {**_template_kwargs(row), "enable_thinking": thinking}
    with named(row):
        return encode_prompt(tokenizer, prompt, template_kwargs=kwargs, tools=row.get("tools"), today=today)


def _summed_loss(model, batch, padding):
    """(nats summed over the trained tokens of B encoded rows, their number)."""
    longest = max(len(row.input_ids) for row in batch)
    input_ids = [row.input_ids + [padding] * (longest - len(row.input_ids)) for row in batch]
    fates = [row.fates + [Fate.TEMPLATE] * (longest - len(row.fates)) for row in batch]
    input_ids = torch.tensor(input_ids, device=model.device)  # [B, L]
    trained = (
        torch.tensor(fates, device=model.device)[:, 1:] == Fate.TRAINED
    )  # [B, L - 1]; no position predicts the first token

    # Padding is on the right, where causality hides it from every real token: no mask needed.
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    hidden, targets = hidden[:, :-1][trained], input_ids[:, 1:][trained]  # [T, H], [T]

    scores = token_scores(hidden, targets, head_of(model), metrics=False)
    return -scores.logps.double().sum().item(), len(targets)


def _share(flags):
    return sum(flags) / len(flags) if flags else None
