"""Synthetic tasks with checkable answers, as SmolTalk2 rows: what a miniature learns to retrieve and to reason.

Symbols: keys and nodes are uppercase letters, values lowercase letters, noise digits; one character is one token of a
character tokenizer.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits

import numpy as np

from smolpost.errors import UserError
from smolpost.schema import choice, count, number

VERSION = 1  # raised when the same settings and seed give other rows
KEYS = np.array(list(ascii_uppercase))
VALUES = np.array(list(ascii_lowercase))
NOISE = np.array(list(digits))
CYCLE_NODES = 8
SYSTEM = {"role": "system", "content": "/system_override"}  # the smollm3 template drops its header for it


@dataclass
class TaskBlock:
    """Rows of one synthetic task at one difficulty."""

    task: str = choice("recall", "copy", "chase")
    rows: int = count()
    length: int = count(64)  # characters of the user turn: copy the longest, recall exactly; chase ignores it
    pairs: int = count(8)  # recall: key-value pairs in the context
    queries: int = count(8)  # recall: keys asked for, drawn with replacement
    hops: int = count(4)  # chase: edges to follow
    think: bool = False  # chase: the reply writes the visited nodes in a think block
    verbose: float = number("[0, 1]", 0.0)  # chase: share of replies whose answer names the start as well


@dataclass
class TaskFile:
    blocks: dict[str, TaskBlock] = field(default_factory=dict)  # in file order
    replay: float = number("[0, 1)", 0.0)  # share of a block's text that is drawn from earlier blocks instead


# ---------------------------------------------------------------- one row of each task


def copy_row(rng: np.random.Generator, length: int) -> dict:
    """Go on repeating a random string of length / 2 to `length` distinct letters, up to 3 x length characters in all.

    Many possible periods cannot be learned from positions alone, and short ones could: that grows the induction heads
    that recall is built on.
    """
    size = rng.integers((length + 1) // 2, length + 1)
    text = "".join(rng.choice(np.concatenate((KEYS, VALUES)), size, replace=False))
    reply = (text * (3 * length // len(text) + 1))[: 3 * length - len(text)]
    return task_row(text, reply, f"copy_{length}")


def recall_row(rng: np.random.Generator, length: int, pairs: int, queries: int, *, distinct: bool = False) -> dict:
    """Find values by their keys in noise: user `40#Kv77#Qa1?QKQ`, reply `QaKvQa`.

    Args:
        rng: Source of all randomness.
        length: Characters of the user turn, at least 3 * pairs + 1 + queries.
        pairs: Distinct keys in the context, 1 to 26.
        queries: Keys asked for, drawn with replacement: no answer follows from what was not yet asked.
        distinct: Ask for each key once at most, as a measurement does: after a key that is asked for twice, which one
            comes next is a question of counting, not of recall.
    """
    context = length - 1 - queries
    text = rng.choice(NOISE, context)
    keys, values = rng.choice(KEYS, pairs, replace=False), rng.choice(VALUES, pairs)
    # Places in the context with each pair shrunk to one character, then widened again: every layout is equally likely.
    places = np.sort(rng.choice(context - 2 * pairs, pairs, replace=False)) + 2 * np.arange(pairs)
    text[places], text[places + 1], text[places + 2] = "#", keys, values
    asked = rng.permutation(pairs)[:queries] if distinct else rng.integers(pairs, size=queries)
    answer = "".join(keys[i] + values[i] for i in asked)
    return task_row("".join(text) + "?" + "".join(keys[asked]), answer, f"recall_{length}")


def chase_row(rng: np.random.Generator, hops: int, think: bool, *, verbose: bool = False) -> dict:
    """Follow `hops` edges of a random cycle of 8 nodes: user `>AC>SA...@S`, reply the node reached.

    With think, the reply first writes the visited nodes, the start included, in a think block. A verbose answer names
    the start after it, `D>S`: which of the two to write is a matter of style, so of preference.
    """
    cycle = rng.choice(KEYS, CYCLE_NODES, replace=False)
    edges = [f">{cycle[i]}{cycle[(i + 1) % CYCLE_NODES]}" for i in rng.permutation(CYCLE_NODES)]
    visited = "".join(cycle[(rng.integers(CYCLE_NODES) + np.arange(hops + 1)) % CYCLE_NODES])
    said = f"{visited[-1]}>{visited[0]}" if verbose else visited[-1]
    answer = f"<think>\n{visited}\n</think>\n{said}" if think else said
    mode = "think" if think else "no_think"
    return task_row("".join(edges) + f"@{visited[0]}", answer, f"chase_{hops}_{mode}", think=think)


def task_row(user: str, assistant: str, source: str, *, think: bool = False) -> dict:
    return {
        "messages": [SYSTEM, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}],
        "chat_template_kwargs": {
            "custom_instructions": "",
            "enable_thinking": think,
            "python_tools": [],
            "xml_tools": [],
        },
        "source": source,
    }


# ---------------------------------------------------------------- files of rows


def write_tasks(files: dict[str, TaskFile], seed: int, folder: Path) -> dict[str, int]:
    """Write `NAME.jsonl` into the folder for each file, blocks in order.

    A file depends on the seed and its own name and settings, not on the other files.

    Returns:
        Rows of each file.
    Raises:
        UserError: A setting is infeasible; nothing is written.
    """
    if seed < 0:
        raise UserError(f"seed={seed} is below 0; use 0 or more")
    for name, file in files.items():
        check_file(f"files.{name}", file)
    num_rows = {}
    for name, file in files.items():
        lines = [json.dumps(row) for row in file_rows(file, np.random.default_rng([seed, *name.encode()]))]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        num_rows[name] = len(lines)
    return num_rows


def file_rows(file: TaskFile, rng: np.random.Generator):
    """The rows of a file, one by one; a replayed row is a new one of an earlier block's task.

    `replay` is a share of the text, equally over the earlier blocks, so shorter rows are drawn more often.
    """
    blocks = list(file.blocks.values())
    for i, block in enumerate(blocks):
        share = np.full(i + 1, file.replay / max(i, 1))
        share[i] = 1 - file.replay if i else 1
        odds = share / [row_size(b) for b in blocks[: i + 1]]
        for chosen in rng.choice(i + 1, size=block.rows, p=odds / odds.sum()):
            yield block_row(blocks[chosen], rng)


def row_size(block: TaskBlock) -> int:
    """Characters of a block's row with its chat markup, on average."""
    markup = 10
    if block.task == "copy":
        return markup + 3 * block.length
    if block.task == "recall":
        return markup + block.length + 2 * block.queries
    return markup + 3 * CYCLE_NODES + 2 + (block.hops + 5 if block.think else 1)


def block_row(block: TaskBlock, rng: np.random.Generator) -> dict:
    if block.task == "copy":
        return copy_row(rng, length=block.length)
    if block.task == "recall":
        return recall_row(rng, length=block.length, pairs=block.pairs, queries=block.queries)
    verbose = block.verbose > 0 and rng.random() < block.verbose
    return chase_row(rng, hops=block.hops, think=block.think, verbose=verbose)


def check_file(key: str, file: TaskFile) -> None:
    if not file.blocks:
        raise UserError(f"{key}.blocks is empty; give at least one block")
    if not 0 <= file.replay < 1:
        raise UserError(f"{key}.replay={file.replay} is outside [0, 1); use a share such as 0.2")
    for name, block in file.blocks.items():
        check_block(f"{key}.blocks.{name}", block)


def check_block(key: str, block: TaskBlock) -> None:
    if block.task not in ("copy", "recall", "chase"):
        raise UserError(f"{key}.task={block.task} is unknown; use copy, recall or chase")
    counts = {"copy": ("rows",), "recall": ("rows", "pairs", "queries"), "chase": ("rows", "hops")}[block.task]
    for name in counts:
        if getattr(block, name) < 1:
            raise UserError(f"{key}.{name}={getattr(block, name)} is below 1; raise it")
    if not 0 <= block.verbose <= 1:
        raise UserError(f"{key}.verbose={block.verbose} is outside [0, 1]; it is the share of verbose answers")
    if block.task == "copy" and block.length < 3:
        raise UserError(f"{key}.length={block.length} is below 3, too short a string to copy; raise it")
    num_letters = len(KEYS) + len(VALUES)
    if block.task == "copy" and block.length > num_letters:
        raise UserError(f"{key}.length={block.length} is above {num_letters}, the number of letters; lower it")
    if block.task == "recall":
        if block.pairs > len(KEYS):
            raise UserError(f"{key}.pairs={block.pairs} is above {len(KEYS)}, the number of keys; lower it")
        shortest = 3 * block.pairs + 1 + block.queries
        if block.length < shortest:
            raise UserError(
                f"{key}.length={block.length} is below 3 x pairs + 1 + queries = {shortest}; "
                "raise it, or lower pairs or queries"
            )
