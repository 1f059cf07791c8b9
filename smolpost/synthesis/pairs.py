"""Preference pairs from two checkpoints: the stronger one's reply is chosen, the weaker one's rejected.

Replies are kept batch by batch in `replies.partial.jsonl`. Its first line names the prompts and settings they answer,
and each line after it holds one batch. `pairs.jsonl` is written at the end, in one step.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smolpost.chat.masks import encode_prompt
from smolpost.chat.reasoning import split_reasoning
from smolpost.chat.render import load_template, render
from smolpost.chat.turn_end import endless_replies
from smolpost.data.prompts import conversation, named, split_last_reply, where
from smolpost.errors import UserError
from smolpost.files import write_text
from smolpost.inference.generation import generate, padding_token_id, reply_text, stop_token_ids
from smolpost.inference.seeds import derive_seed
from smolpost.progress import Progress

SIDES = ("chosen", "rejected")

REMEDIES = {
    "chosen_cut": "raise max_new_tokens",
    "identical": "take a weaker rejected_from or raise temperature",
    "no_reference": "set keep to different, or give prompts whose reply has an answer",
    "chosen_wrong": "take a stronger chosen_from or set keep to different",
    "rejected_right": "take a weaker rejected_from or set keep to chosen_right",
}

Message = dict[str, Any]
Replies = dict[str, list[list[int]]]  # side -> token ids of each row's reply, the stop token included


class Settings(Protocol):
    """What is read of a pairs stage; the recipe's schema says what each field means."""

    chosen_from: str
    rejected_from: str
    template: str
    today: str
    max_new_tokens: int
    temperature: float
    top_p: float
    keep: str
    seed: int
    batch_size: int


class Speaker(NamedTuple):
    """A checkpoint that replies.

    Attributes:
        model: Any causal LM of transformers.
        tokenizer: With the stage's chat template.
        stop_tokens: Ids at which its replies end.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_tokens: list[int]


class PromptRow(NamedTuple):
    """A row to be answered.

    Attributes:
        row: As it was read.
        messages: Its messages before the last assistant turn.
        answer: The answer in that turn; "" where it has none.
    """

    row: dict[str, Any]
    messages: list[Message]
    answer: str


def sample_pairs(
    stage: Settings,
    rows: Sequence[dict[str, Any]],
    chosen: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    rejected: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    folder: Path,
) -> dict[str, Any]:
    """Write `folder/pairs.jsonl`, SmolTalk2 Preference rows, in the order of the rows they answer.

    A prompt is a row's messages before its last assistant turn, in the row's own mode. A pair is dropped where the
    chosen reply is cut, where both replies read the same under the chat template, or where `stage.keep` says so.
    Answers are the texts after the think block.

    After an interruption the same call goes on from the last whole batch and writes the same bytes. Replies in the
    folder to other prompts or settings are discarded. The caller has to give each pair of checkpoints a folder of its
    own: their weights are not compared.

    Args:
        stage: Its template renders both sides, whatever template the tokenizers have.
        rows: SmolTalk2 conversations, each with a user turn.
        chosen: The stronger checkpoint.
        rejected: The weaker one.
        folder: Exists.
    Returns:
        "rows" (number read), "pairs" (number written), "dropped" (reason -> number of rows), and by side "cut" (number
        of replies without a stop token) and "mean_tokens" (of a reply, the stop token included).
    Raises:
        UserError: A row is not a conversation with a user turn, the template is unknown or refuses a row, or no pair is
            left. `pairs.jsonl` is not written then; replies stay for a run with another `keep`.
    """
    template = load_template(stage.template)
    speakers = {
        side: Speaker(model, _with_template(tokenizer, template), stop_token_ids(model.generation_config))
        for side, (model, tokenizer) in zip(SIDES, (chosen, rejected), strict=True)
    }
    asked = [_asked(row) for row in rows]
    prompts = {
        side: [_prompt_ids(speaker.tokenizer, entry, stage) for entry in asked] for side, speaker in speakers.items()
    }
    for side, speaker in speakers.items():
        if line := endless_replies(speaker.tokenizer, speaker.stop_tokens, getattr(stage, f"{side}_from")):
            print(line, flush=True)
    partial = folder / "replies.partial.jsonl"
    replies = _all_replies(stage, prompts, speakers, partial)
    lines, report = _paired(stage, asked, speakers, replies)
    write_text(folder / "pairs.jsonl", "".join(lines))
    partial.unlink()
    return report


def _with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer with another chat template."""
    tokenizer = copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def _paired(
    stage: Settings, asked: Sequence[PromptRow], speakers: Mapping[str, Speaker], replies: Replies
) -> tuple[list[str], dict[str, Any]]:
    """The lines of `pairs.jsonl` and the report of `sample_pairs`.

    Raises:
        UserError: No pair is left.
    """
    report: dict[str, Any] = {
        "rows": len(asked), "pairs": 0, "dropped": {}, "cut": dict.fromkeys(SIDES, 0), "mean_tokens": {},
    }  # fmt: skip
    lines = []
    for i, entry in enumerate(asked):
        reply = {side: replies[side][i] for side in SIDES}
        texts = {side: reply_text(speakers[side].tokenizer, reply[side], speakers[side].stop_tokens) for side in SIDES}
        pair = {side: [*entry.messages, {"role": "assistant", "content": texts[side]}] for side in SIDES}
        cut = {side: reply[side][-1] not in speakers[side].stop_tokens for side in SIDES}
        if cut["chosen"]:
            reason = "chosen_cut"
        elif len({_rendered(speakers["chosen"].tokenizer, entry.row, pair[side], stage) for side in SIDES}) == 1:
            reason = "identical"
        else:
            reason = _reason_to_drop(stage.keep, texts, entry.answer)
        if reason:
            report["dropped"][reason] = report["dropped"].get(reason, 0) + 1
        else:
            lines.append(json.dumps(_preference_row(entry, pair), ensure_ascii=False) + "\n")
        for side in SIDES:
            report["cut"][side] += cut[side]
    if not lines:
        raise UserError(_nothing_left(report))

    report["pairs"] = len(lines)
    report["mean_tokens"] = {side: sum(map(len, replies[side])) / len(asked) for side in SIDES}
    return lines, report


# ---------------------------------------------------------------- replies


def _all_replies(
    stage: Settings, prompts: Mapping[str, list[list[int]]], speakers: Mapping[str, Speaker], partial: Path
) -> Replies:
    """Both sides' replies to all rows, sampled or read back from the partial file."""
    num_rows = len(prompts["chosen"])
    # Rows of like length share a batch; rows of equal length keep their order, so the batches are the same every time.
    by_length = sorted(range(num_rows), key=lambda i: len(prompts["chosen"][i]), reverse=True)
    batches = [by_length[start : start + stage.batch_size] for start in range(0, num_rows, stage.batch_size)]
    replies: Replies = {side: [[] for _ in range(num_rows)] for side in SIDES}
    done = _recovered(partial, _fingerprint(stage, prompts, speakers))
    with (
        partial.open("a", encoding="utf-8") as file,
        Progress("preference pairs", num_rows, "row", done=sum(map(len, batches[: len(done)]))) as progress,
    ):
        for index, batch in enumerate(batches):
            if index < len(done):
                sampled = done[index]
            else:
                sampled = {side: _sample(stage, speakers[side], prompts[side], side, index, batch) for side in SIDES}
                _append(file, sampled)
                progress.update(len(batch))
            for side in SIDES:
                for i, reply in zip(batch, sampled[side], strict=True):
                    replies[side][i] = reply
    return replies


def _sample(
    stage: Settings, speaker: Speaker, prompts: list[list[int]], side: str, index: int, batch: list[int]
) -> list[list[int]]:
    """One side's replies to one batch of rows; side and index of the batch decide its random numbers."""
    return generate(
        speaker.model,
        [prompts[i] for i in batch],
        max_new_tokens=stage.max_new_tokens,
        temperature=stage.temperature,
        top_p=stage.top_p,
        seed=derive_seed(stage.seed, side, index),
        eos_token_ids=speaker.stop_tokens,
        pad_token_id=padding_token_id(speaker.tokenizer),
        batch_size=len(batch),
    )


def _fingerprint(stage: Settings, prompts: Mapping[str, list[list[int]]], speakers: Mapping[str, Speaker]) -> str:
    """A name for all that decides the replies but the weights: prompts, sampling settings and stop tokens."""
    stop_tokens = {side: speaker.stop_tokens for side, speaker in speakers.items()}
    settings = [stage.max_new_tokens, stage.temperature, stage.top_p, stage.seed, stage.batch_size, stop_tokens]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for side in SIDES:
        for prompt in prompts[side]:
            digest.update(json.dumps(prompt).encode())
    return digest.hexdigest()


def _recovered(partial: Path, fingerprint: str) -> list[Replies]:
    """Whole batches of an earlier run; leaves the file ready to append the next one."""
    header = json.dumps({"fingerprint": fingerprint}).encode() + b"\n"
    lines = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
    whole = list(takewhile(_is_whole, lines))
    if whole[:1] != [header]:
        whole = []
    with partial.open("ab") as file:
        # A kill may come here too, so batches that are there already are never written a second time.
        file.truncate(sum(map(len, whole)))
        if not whole:
            file.write(header)
        file.flush()
        os.fsync(file.fileno())
    return [json.loads(line) for line in whole[1:]]


def _is_whole(line: bytes) -> bool:
    """Whether a line of the partial file was written to its end."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")


def _append(file: TextIO, sampled: Replies) -> None:
    file.write(json.dumps(sampled) + "\n")
    file.flush()
    os.fsync(file.fileno())


# ---------------------------------------------------------------- pairs


def _asked(row: dict[str, Any]) -> PromptRow:
    """
    Raises:
        UserError: There is no user turn to answer.
    """
    messages, reply = split_last_reply(conversation(row, "prompts"))
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{where(row)}: has no user turn before its last reply, so no prompt; leave the row out")
    return PromptRow(row, messages, _answer(reply))


def _answer(text: str) -> str:
    return split_reasoning(text)[1].strip()


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, asked: PromptRow, stage: Settings) -> list[int]:
    """Token ids of the prompt in the row's mode, up to where the reply begins."""
    with named(asked.row):
        return encode_prompt(tokenizer, asked.messages, **_options(asked.row, stage))


def _rendered(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], messages: list[Message], stage: Settings) -> str:
    """Text of messages in the row's mode."""
    with named(row):
        return render(tokenizer, messages, **_options(row, stage))


def _options(row: dict[str, Any], stage: Settings) -> dict[str, Any]:
    return {"template_kwargs": row.get("chat_template_kwargs"), "tools": row.get("tools"), "today": stage.today}


def _reason_to_drop(keep: str, texts: Mapping[str, str], answer: str) -> str | None:
    """Why `keep` drops a pair of different replies, or None.

    Args:
        keep: A value of `PairsStage.keep`.
        texts: Side -> reply.
        answer: The row's right one; "" where it has none.
    """
    if keep == "different":
        return None
    if not answer:
        return "no_reference"
    if _answer(texts["chosen"]) != answer:
        return "chosen_wrong"
    if keep == "right_and_wrong" and _answer(texts["rejected"]) == answer:
        return "rejected_right"
    return None


def _preference_row(asked: PromptRow, pair: Mapping[str, list[Message]]) -> dict[str, Any]:
    row = asked.row
    content = [message["content"] for message in asked.messages if message["role"] == "user"][-1]
    parts = [content] if isinstance(content, str) else [p if isinstance(p, str) else p["text"] for p in content]
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {
        "prompt": "".join(parts),
        **pair,
        "chat_template_kwargs": row.get("chat_template_kwargs") or {},
        "source": f"{row.get('source', 'unknown')}_pairs",
        **tools,
    }


def _nothing_left(report: Mapping[str, Any]) -> str:
    if not report["rows"]:
        return "no pair can be sampled from 0 rows; give the prompts mixture at least one"
    by_count = sorted(report["dropped"].items(), key=lambda item: -item[1])
    counts = ", ".join(f"{reason} {count}" for reason, count in by_count)
    return f"no pair is left of {report['rows']} rows ({counts}); {REMEDIES[by_count[0][0]]}"
