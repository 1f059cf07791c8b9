"""Tiny models, prepared rows and the trainers of both engines on them, in this process."""

import copy
from pathlib import Path

import pytest
import torch
import transformers

from smolpost.chat.tokenizer import build_tokenizer
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage
from smolpost.training import reference
from smolpost.training.environment import Environment
from smolpost.training.reference_cache import ReferenceCache
from smolpost.training.trainer import Run
from smolpost.training.with_trl.preference import Reference
from tests.prepared import prepared

CPU = Environment(rank=0, world_size=1, local_world_size=1, use_cpu=True, bf16=False)
ASK = {"role": "user", "content": "6*7?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "mul", "arguments": {"a": 6}}}]}
NO_THINK = {"enable_thinking": False}
SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "bos_token_id": 0,
}  # fmt: skip
REPLIES = [
    ("42", "7"), ("it is 42", "it is 48, I think"), ("yes " * 9, "no"), ("a", "b"), ("x" * 30, "y"),
    ("forty two", "forty"), ("q", "q" * 40),
]  # fmt: skip


# ---------------------------------------------------------------- models


def char_tokenizer(template="smollm3"):
    return build_tokenizer(["abc"], kind="char", vocab_size=256, template=template)


def build(tokenizer, seed=0, **changes):
    torch.manual_seed(seed)
    config = SmolLM3Config(**SHAPE, **_tokens(tokenizer), **changes)
    config._attn_implementation = "packed"
    return SmolLM3ForCausalLM(config)


def build_windowed(tokenizer, seed=0):
    """A Mistral whose tokens see 16 positions; most documents, and the prompts of pairs, are longer."""
    return _transformers(transformers.MistralConfig(**SHAPE, **_tokens(tokenizer), sliding_window=16), seed)


def build_qwen3(tokenizer, seed=0):
    return _transformers(transformers.Qwen3Config(**SHAPE, **_tokens(tokenizer), head_dim=8), seed)


def build_llama(tokenizer, seed=0):
    return _transformers(transformers.LlamaConfig(**SHAPE, **_tokens(tokenizer)), seed)


def _tokens(tokenizer):
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _transformers(config, seed):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="packed")


def stock(model, attention="sdpa"):
    """transformers' model with the same weights and its own masks."""
    if not isinstance(model, SmolLM3ForCausalLM):
        peer = copy.deepcopy(model)
        peer.set_attn_implementation(attention)
        return peer
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    peer = transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**fields, attn_implementation=attention))
    peer.load_state_dict(model.state_dict())
    return peer


# ---------------------------------------------------------------- rows and trainers


def settings(**changes):
    shared = dict(init_from="x", data="y", max_seq_len=400, learning_rate=1e-3, global_batch_size=2, max_grad_norm=1.0)
    return {
        **shared,
        "num_workers": 1,
        "report_to": [],
        "activation_checkpointing": "none",
        "logging_steps": 1,
        **changes,
    }


def in_trls_words(stage, folder, **more):
    """A stage's settings for a trainer of TRL that is called directly."""
    return dict(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, max_steps=stage.max_steps, logging_steps=1,
        learning_rate=stage.learning_rate, lr_scheduler_type="cosine_with_min_lr", warmup_steps=stage.warmup_ratio,
        lr_scheduler_kwargs={"min_lr_rate": stage.min_lr_ratio}, weight_decay=stage.weight_decay,
        adam_beta1=stage.adam_beta1, adam_beta2=stage.adam_beta2, max_grad_norm=stage.max_grad_norm,
        save_strategy="no", gradient_checkpointing=False, **more,
    )  # fmt: skip


def conversation(reply):
    return [ASK, {"role": "assistant", "content": reply}]


def text_rows():
    rows = [{"messages": conversation("x" * n), "chat_template_kwargs": NO_THINK} for n in range(1, 13)]
    return [("a", row) for row in rows]


def tool_pair():
    chosen = [ASK, CALL, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "forty-two"}]
    rejected = [ASK, CALL, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "forty"}]
    return {"chosen": chosen, "rejected": rejected, "chat_template_kwargs": NO_THINK}


def pair_rows():
    rows = [tool_pair()]
    for good, bad in REPLIES:
        rows.append({"chosen": conversation(good), "rejected": conversation(bad), "chat_template_kwargs": NO_THINK})
    return [("a", row) for row in rows]


def trainer_of(stage, rows, tokenizer, folder: Path, model, ref=None) -> Run:
    """The stage's trainer as `training.train` makes it, whichever its engine; its folder is `out`."""
    method = stage.method()
    method.check("stage", stage, rows, CPU)
    arguments = method.arguments(stage, 1, len(rows), folder / "out", CPU)
    return method.trainer(stage, model, tokenizer, rows, ref, arguments, 1, CPU)


def sft_trainer(tokenizer, folder, model, rows=None, **changes):
    stage = SFTStage(**settings(**changes))
    (folder / "rows").mkdir(parents=True)
    found, _ = prepared(stage, rows or text_rows(), tokenizer, folder / "rows")
    return trainer_of(stage, found, tokenizer, folder, model), found, stage


def pair_trainer(tokenizer, folder, model, ref_model, rows=None, **changes):
    stage = APOStage(**settings(**{"global_batch_size": 4} | changes))
    folder.mkdir(exist_ok=True)
    found, _ = prepared(stage, rows or pair_rows(), tokenizer, folder)
    if stage.engine == "trl":
        beside = Reference(lambda: ref_model)
    else:
        beside = ReferenceCache(folder / "cache", "k", reference.scored_tokens(found))
        reference.fill(beside, found, lambda: copy.deepcopy(ref_model), 150, CPU)
    return trainer_of(stage, found, tokenizer, folder, model, beside), found, stage


# ---------------------------------------------------------------- comparisons


def logged(trainer, keys):
    return [{key: entry[key] for key in keys} for entry in trainer.state.log_history if "loss" in entry]


def assert_logs_equal(found, expected):
    assert len(found) == len(expected) > 2
    for step, wanted in zip(found, expected, strict=True):
        for key, value in wanted.items():
            assert step[key] == pytest.approx(value, abs=1e-5, rel=1e-5), key


def assert_weights_equal(found, expected):
    """Of models."""
    weights = found.state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
