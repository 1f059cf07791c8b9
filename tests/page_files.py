"""The files that a reader of the guides has: small checkpoints, conversations, preference pairs, prompts."""

import json
from pathlib import Path

import torch
from transformers.models.smollm3 import SmolLM3Config, SmolLM3ForCausalLM

from smolpost.chat.tokenizer import build_tokenizer
from tests.small import sum_rows

SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=1024,
)  # fmt: skip


def write_inputs(folder: Path) -> None:
    """base/, my-sft/, long/, chats.jsonl, pairs.jsonl and prompts.txt, as the guides name them."""
    chats, pairs = sum_rows(120, seed=0), sum_rows(60, seed=1)
    texts = [turn["content"] for row in chats for turn in row["chosen"]]
    checkpoint(folder / "base", texts, template=None)
    checkpoint(folder / "my-sft", texts, template="smollm3", seed=1)
    checkpoint(folder / "long", texts, template="smollm3", seed=2)
    write_rows(folder / "chats.jsonl", [{"messages": row["chosen"]} for row in chats])
    write_rows(folder / "pairs.jsonl", [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs])
    (folder / "prompts.txt").write_text("What is 2+3?\nWhat is 20+22?\n")


def checkpoint(folder: Path, texts: list[str], *, template: str | None, seed: int = 0) -> None:
    """Random weights; with template=None a base model, which has no chat template."""
    tokenizer = build_tokenizer(texts, kind="bpe", vocab_size=400, template=template or "smollm3")
    if template is None:
        tokenizer.chat_template = None
    torch.manual_seed(seed)
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    model = SmolLM3ForCausalLM(SmolLM3Config(vocab_size=len(tokenizer), **SIZES, **ids))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
