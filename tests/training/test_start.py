"""Start checkpoints that a stage cannot train are refused before its rows are prepared."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    Llama4TextConfig,
    MistralConfig,
)

from smolpost.errors import UserError
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage
from smolpost.training.start import check_start

SIZES = dict(
    vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ELSEWHERE = "start from a checkpoint of another architecture"
EAGER = f"{ELSEWHERE}, or set model.attn_implementation=eager in a pipeline without apo stages, which need packed$"


def saved(config, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def check(folder, attention="packed", stage=SFTStage, **settings):
    return check_start(
        "x", stage(init_from="checkpoint", data="y", **{"max_seq_len": 64} | settings), folder, attention
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**SIZES), "Gemma2ForCausalLM has attention that SDPA cannot compute, e.g. with a softcap or "),
        (
            GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1),
            "GptOssForCausalLM has attention that SDPA cannot compute, e.g. with a softcap or sinks",
        ),
        (
            Gemma3TextConfig(**SIZES, use_bidirectional_attention=True),
            r"Gemma3ForCausalLM attends to later tokens \(use_bidirectional_attention in its config.json\)",
        ),
        (
            Llama4TextConfig(**SIZES, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=4),
            r"Llama4ForCausalLM attends in chunks \(layer_types in its config.json has chunked_attention\)",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_attention_that_packed_does_not_know_is_refused(tmp_path, config, reason):
    folder = saved(config, tmp_path)
    for stage in (SFTStage, APOStage):
        with pytest.raises(UserError, match=f"^stages.x.init_from=checkpoint: {reason}.*=packed does not.*: {EAGER}"):
            check(folder, stage=stage)
    check(folder, "eager")


def test_a_model_with_attention_of_its_own_is_refused(tmp_path):
    config = GPTJConfig(vocab_size=40, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, bos_token_id=1, eos_token_id=2)
    with pytest.raises(UserError, match=f"GPTJForCausalLM has attention .*: {ELSEWHERE}$"):
        check(saved(config, tmp_path))


@pytest.mark.parametrize("config", [MistralConfig(**SIZES), Gemma3TextConfig(**SIZES)], ids=lambda c: c.model_type)
def test_sliding_windows_start(tmp_path, config):
    assert config.sliding_window
    for stage in (SFTStage, APOStage):
        assert check(saved(config, tmp_path), stage=stage) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_seq_len": 65},
            "stages.x.max_seq_len=65, but GPT2LMHeadModel has a learned embedding for each of its 64 positions; "
            "set it to 64 or less",
        ),
        (
            {"max_position_embeddings": 128},
            "stages.x.max_position_embeddings=128, but GPT2LMHeadModel has a learned embedding for each of its 64 "
            "positions; set it to null",
        ),
        ({"rope_theta": 5e6}, "stages.x.rope_theta=5e+06, but GPT2LMHeadModel has no RoPE; set it to null"),
    ],
)
def test_learned_positions_cannot_be_stretched(tmp_path, settings, message):
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    folder = saved(config, tmp_path)
    assert check(folder) == {}
    with pytest.raises(UserError) as refused:
        check(folder, **settings)
    assert str(refused.value) == message


def test_a_rope_base_for_each_kind_of_layer_is_not_one(tmp_path):
    with pytest.raises(UserError) as refused:
        check(saved(Gemma3TextConfig(**SIZES), tmp_path), rope_theta=5e6)
    assert str(refused.value) == (
        "stages.x.rope_theta=5e+06, but Gemma3ForCausalLM has a RoPE base for each kind of layer; set it to null; "
        "change its rope_parameters in config.json instead"
    )
