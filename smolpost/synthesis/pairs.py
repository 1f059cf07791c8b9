"""Preference pairs from two checkpoints: the stronger one's reply is chosen, the weaker one's rejected.

Replies are kept batch by batch in `replies.partial.jsonl`, one line each behind a first line that names what they
answer; `pairs.jsonl` appears whole, at the end.
"""

import hashlib
import json
import os
from copy import copy
from itertools import takewhile

from smolpost.chat.masks import encode_prompt
from smolpost.chat.reasoning import split_reasoning
from smolpost.chat.render import load_template, render
from smolpost.chat.turn_end import endless_replies
from smolpost.data.prompts import conversation, named, split_last_reply, where
from smolpost.errors import UserError
from smolpost.files import write_text
from smolpost.model.generation import derive_seed, generate, padding_token_id, reply_text, stop_token_ids
from smolpost.progress import Progress

SIDES = ("chosen", "rejected")

REMEDIES = {
    "chosen_cut": "raise max_new_tokens",
    "identical": "take a weaker rejected_from or raise temperature",
    "no_reference": "set keep to different, or give prompts whose reply has an answer",
    "chosen_wrong": "take a stronger chosen_from or set keep to different",
    "rejected_right": "take a weaker rejected_from or set keep to chosen_right",
}


def sample_pairs(stage, rows, chosen, rejected, folder):
    """Write `folder/pairs.jsonl`, SmolTalk2 Preference rows, in the order of the rows they answer.

    A prompt is a row's messages before its last assistant turn, in the row's own mode. A pair is dropped where the
    chosen reply is cut, where both replies read the same under the chat template, or where `stage.keep` says so;
    answers are compared as texts after the think block. Run again after an interruption, it goes on from the last whole
    batch and writes the same bytes; replies in the folder to other prompts or settings are discarded. That the weights
    are the same is up to the caller: the folder belongs to one pair of checkpoints.

    Args:
        stage: A `smolpost.schema.PairsStage`; its template renders both sides, whatever the tokenizers carry.
        rows: SmolTalk2 conversations, each with a user turn.
        chosen: (model, tokenizer) of the stronger checkpoint.
        rejected: (model, tokenizer) of the weaker one.
        folder: An existing folder (Path).
    Returns:
        {"rows": rows read, "pairs": pairs written, "dropped": {reason: rows}, "cut": {"chosen": replies without a stop
        token, "rejected": alike}, "mean_tokens": {"chosen": per reply, the stop token included, "rejected": alike}}.
    Raises:
        UserError: A row is no conversation with a user turn, the template is unknown or refuses a row, or no pair is
            left; `pairs.jsonl` is not written then, and replies stay for another `keep`.
    """
    template = load_template(stage.template)
    checkpoints = {
        side: (model, _with_template(tokenizer, template))
        for side, (model, tokenizer) in zip(SIDES, (chosen, rejected), strict=True)
    }
    conversations = [_asked(row) for row in rows]
    prompts = {
        side: [
            _prompt_ids(tokenizer, row, messages, stage) for row, (messages, _) in zip(rows, conversations, strict=True)
        ]
        for side, (_, tokenizer) in checkpoints.items()
    }
    partial = folder / "replies.partial.jsonl"
    for side, stops in _stop_tokens(checkpoints).items():
        if line := endless_replies(checkpoints[side][1], stops, getattr(stage, f"{side}_from")):
            print(line, flush=True)
    replies = _all_replies(stage, prompts, checkpoints, partial)
    lines, report = _paired(stage, rows, conversations, checkpoints, replies)
    write_text(folder / "pairs.jsonl", "".join(lines))
    partial.unlink()
    return report


def _with_template(tokenizer, template):
    """A tokenizer like the given one, which stays as it is, but for the chat template."""
    tokenizer = copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def _paired(stage, rows, conversations, checkpoints, replies):
    """The lines of `pairs.jsonl` and the report of `sample_pairs`."""
    chosen_tokenizer = checkpoints["chosen"][1]
    stop_tokens = _stop_tokens(checkpoints)
    report = {"rows": len(rows), "pairs": 0, "dropped": {}, "cut": dict.fromkeys(SIDES, 0), "mean_tokens": {}}
    lines = []
    for i, (row, (messages, reference)) in enumerate(zip(rows, conversations, strict=True)):
        texts = {side: reply_text(checkpoints[side][1], replies[side][i], stop_tokens[side]) for side in SIDES}
        pair = {side: [*messages, {"role": "assistant", "content": texts[side]}] for side in SIDES}
        cut = {side: replies[side][i][-1] not in stop_tokens[side] for side in SIDES}
        if cut["chosen"]:
            reason = "chosen_cut"
        elif len({_rendered(chosen_tokenizer, row, pair[side], stage) for side in SIDES}) == 1:
            reason = "identical"
        else:
            reason = _reason_to_drop(stage.keep, texts, reference)
        if reason:
            report["dropped"][reason] = report["dropped"].get(reason, 0) + 1
        else:
            lines.append(json.dumps(_preference_row(row, messages, pair), ensure_ascii=False) + "\n")
        for side in SIDES:
            report["cut"][side] += cut[side]
    if not lines:
        raise UserError(_nothing_left(report))

    report["pairs"] = len(lines)
    report["mean_tokens"] = {side: sum(map(len, replies[side])) / len(rows) for side in SIDES}
    return lines, report


# ---------------------------------------------------------------- replies


def _all_replies(stage, prompts, checkpoints, path):
    """Token ids of both sides' replies, {side: [reply per row]}, sampled or read back from the partial file."""
    num_rows = len(prompts["chosen"])
    # Rows of like length share a batch; rows of equal length keep their order, so the batches are the same every time.
    by_length = sorted(range(num_rows), key=lambda i: len(prompts["chosen"][i]), reverse=True)
    batches = [by_length[start : start + stage.batch_size] for start in range(0, num_rows, stage.batch_size)]
    replies = {side: [None] * num_rows for side in SIDES}
    done = _recovered(path, _fingerprint(stage, prompts, _stop_tokens(checkpoints)))
    with (
        path.open("a", encoding="utf-8") as file,
        Progress("preference pairs", num_rows, "row", done=sum(map(len, batches[: len(done)]))) as progress,
    ):
        for index, batch in enumerate(batches):
            if index < len(done):
                sampled = done[index]
            else:
                sampled = {side: _sample(stage, checkpoints[side], prompts[side], side, index, batch) for side in SIDES}
                _append(file, sampled)
                progress.update(len(batch))
            for side in SIDES:
                for i, reply in zip(batch, sampled[side], strict=True):
                    replies[side][i] = reply
    return replies


def _sample(stage, checkpoint, prompts, side, index, batch):
    """One checkpoint's replies to one batch of rows, from random numbers of their own."""
    model, tokenizer = checkpoint
    return generate(
        model,
        [prompts[i] for i in batch],
        max_new_tokens=stage.max_new_tokens,
        temperature=stage.temperature,
        top_p=stage.top_p,
        seed=derive_seed(stage.seed, side, index),
        eos_token_ids=stop_token_ids(model.generation_config),
        pad_token_id=padding_token_id(tokenizer),
        batch_size=len(batch),
    )


def _stop_tokens(checkpoints):
    """Side -> ids at which its checkpoint's own generation stops."""
    return {side: stop_token_ids(model.generation_config) for side, (model, _) in checkpoints.items()}


def _fingerprint(stage, prompts, stop_tokens):
    """A name for what decides the replies, the weights apart: prompts, sampling settings and stop tokens."""
    settings = [stage.max_new_tokens, stage.temperature, stage.top_p, stage.seed, stage.batch_size, stop_tokens]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for side in SIDES:
        for prompt in prompts[side]:
            digest.update(json.dumps(prompt).encode())
    return digest.hexdigest()


def _recovered(path, fingerprint):
    """Whole batches of an earlier run; leaves the file ready to append the next one."""
    header = json.dumps({"fingerprint": fingerprint}).encode() + b"\n"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = list(takewhile(_is_whole, lines))
    if whole[:1] != [header]:
        whole = []
    with path.open("ab") as file:
        # A kill may come here too, so batches that are there already are never written anew.
        file.truncate(sum(map(len, whole)))
        if not whole:
            file.write(header)
        _sync(file)
    return [json.loads(line) for line in whole[1:]]


def _is_whole(line):
    """Whether a line of the partial file was written to its end."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")


def _append(file, sampled):
    file.write(json.dumps(sampled) + "\n")
    _sync(file)


def _sync(file):
    file.flush()
    os.fsync(file.fileno())


# ---------------------------------------------------------------- pairs


def _asked(row):
    """A row's prompt, and the answer in the reply it has; "" where it has none."""
    prompt, reply = split_last_reply(conversation(row, "prompts"))
    if not any(message["role"] == "user" for message in prompt):
        raise UserError(f"{where(row)}: has no user turn before its last reply, so no prompt; leave the row out")
    return prompt, _answer(reply)


def _answer(text):
    return split_reasoning(text)[1].strip()


def _prompt_ids(tokenizer, row, messages, stage):
    """Token ids of messages in a row's mode, up to where the reply begins."""
    with named(row):
        return encode_prompt(tokenizer, messages, **_options(row, stage))


def _rendered(tokenizer, row, messages, stage):
    """Text of messages in a row's mode."""
    with named(row):
        return render(tokenizer, messages, **_options(row, stage))


def _options(row, stage):
    return {"template_kwargs": row.get("chat_template_kwargs"), "tools": row.get("tools"), "today": stage.today}


def _reason_to_drop(keep, texts, reference):
    """Why `keep` drops a pair of different replies, or None."""
    if keep == "different":
        return None
    if not reference:
        return "no_reference"
    if _answer(texts["chosen"]) != reference:
        return "chosen_wrong"
    if keep == "right_and_wrong" and _answer(texts["rejected"]) == reference:
        return "rejected_right"
    return None


def _preference_row(row, messages, pair):
    asked = [message["content"] for message in messages if message["role"] == "user"][-1]
    parts = [asked] if isinstance(asked, str) else [part if isinstance(part, str) else part["text"] for part in asked]
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {
        "prompt": "".join(parts),
        **pair,
        "chat_template_kwargs": row.get("chat_template_kwargs") or {},
        "source": f"{row.get('source', 'unknown')}_pairs",
        **tools,
    }


def _nothing_left(report):
    if not report["rows"]:
        return "no pair can be sampled from 0 rows; give the prompts mixture at least one"
    by_count = sorted(report["dropped"].items(), key=lambda item: -item[1])
    counts = ", ".join(f"{reason} {count}" for reason, count in by_count)
    return f"no pair is left of {report['rows']} rows ({counts}); {REMEDIES[by_count[0][0]]}"
