"""Our subclasses of TRL's trainers: the rows go in as prepared, and the losses are the formulas."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import load_from_disk

from smolpost.chat.tokenizer import build_tokenizer
from smolpost.data.prepare import prepare_apo, prepare_sft
from smolpost.errors import UserError
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.schema import APOStage, SFTStage
from smolpost.training import apo, sft
from smolpost.training.arguments import shared_arguments
from smolpost.training.batch_size import grad_accum_steps
from smolpost.training.environment import Environment
from smolpost.training.optimizer import decayed_parameters
from smolpost.training.train import check_space

CPU = Environment(rank=0, world_size=1, local_world_size=1, use_cpu=True, bf16=False)
ASK = {"role": "user", "content": "6*7?"}
TOOL = [
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "mul", "arguments": {"a": 6, "b": 7}}}],
    },
    {"role": "tool", "content": "42"},
]
NO_THINK = {"enable_thinking": False}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["abc"], kind="char", vocab_size=256, template="smollm3")


def build(tokenizer, seed=0, **changes):
    torch.manual_seed(seed)
    config = SmolLM3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=0,
        **changes,
    )  # fmt: skip
    return SmolLM3ForCausalLM(config)


def settings(**changes):
    shared = dict(init_from="x", data="y", max_seq_len=400, learning_rate=1e-3, global_batch_size=2, micro_batch_size=2)
    return {**shared, "report_to": [], "gradient_checkpointing": False, **changes}


def conversation(reply):
    return [ASK, {"role": "assistant", "content": reply}]


def sft_trainer(tokenizer, folder, **changes):
    stage = SFTStage(**settings(**changes))
    rows = [("a", {"messages": conversation("x" * n), "chat_template_kwargs": NO_THINK}) for n in range(1, 13)]
    prepare_sft(stage, rows, tokenizer, folder)
    dataset = load_from_disk(str(folder))
    arguments = sft.config(stage, shared_arguments("s", stage, 1, len(dataset), folder / "out", CPU))
    return sft.trainer(build(tokenizer), tokenizer, dataset, arguments, []), dataset


def test_batches_are_the_prepared_packs(tokenizer, tmp_path):
    trainer, packs = sft_trainer(tokenizer, tmp_path, shuffle_packs=False)
    batches = list(trainer.get_train_dataloader())
    assert sum(batch["input_ids"].shape[0] for batch in batches) == len(batches)
    for key in ("input_ids", "labels"):
        assert torch.cat([batch[key][0] for batch in batches]).tolist() == [t for pack in packs for t in pack[key]]
    assert set(batches[0]) == {"input_ids", "labels", "position_ids"}


def test_sft_loss_is_the_mean_over_trained_tokens(tokenizer, tmp_path):
    trainer, _ = sft_trainer(tokenizer, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    plain = build(tokenizer)
    logits = plain(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    expected = F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], ignore_index=-100)
    found = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=(batch["labels"] != -100).sum())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def logps(model, tokenizer, ids, mask):
    """Summed log-probability of the masked tokens of one conversation, from plain logits."""
    row = torch.tensor([ids])
    logprobs = model(input_ids=row).logits[0, :-1].log_softmax(-1)
    return (logprobs.gather(-1, row[0, 1:, None])[:, 0] * torch.tensor(mask)[1:]).sum()


@pytest.mark.parametrize("loss", ["apo_zero", "apo_down", "sigmoid"])
def test_preference_loss_is_the_formula_and_skips_tool_turns(tokenizer, tmp_path, loss):
    beta = 0.3
    stage = APOStage(**settings(loss=loss, beta=beta))
    final = [{"role": "assistant", "content": "forty-two"}]
    rows = [
        (
            "a",
            {"chosen": [ASK, *TOOL, *final], "rejected": conversation("I think 48"), "chat_template_kwargs": NO_THINK},
        ),
        ("a", {"chosen": conversation("42"), "rejected": conversation("7"), "chat_template_kwargs": NO_THINK}),
    ]
    prepare_apo(stage, rows, tokenizer, tmp_path)
    pairs = load_from_disk(str(tmp_path))
    arguments = apo.config(stage, shared_arguments("a", stage, 1, len(pairs), tmp_path / "out", CPU))
    policy, reference = build(tokenizer), build(tokenizer, seed=7)
    plain = copy.deepcopy(policy)
    trainer = apo.trainer(policy, reference, tokenizer, pairs, arguments, [])
    assert trainer.train_dataset is pairs

    expected = []
    for pair in pairs:
        ratio = {}
        for side in ("chosen", "rejected"):
            ids = pair["prompt_ids"] + pair[f"{side}_ids"]
            mask = [0] * len(pair["prompt_ids"]) + pair[f"{side}_mask"]
            text = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
            assert "tool_response" not in text and text.endswith("<|im_end|>")
            ratio[side] = logps(plain, tokenizer, ids, mask) - logps(build(tokenizer, seed=7), tokenizer, ids, mask)
        chosen, rejected = beta * ratio["chosen"], beta * ratio["rejected"]
        expected.append(
            {
                "apo_zero": 1 - chosen.sigmoid() + rejected.sigmoid(),
                "apo_down": chosen.sigmoid() + 1 - (chosen - rejected).sigmoid(),
                "sigmoid": -F.logsigmoid(chosen - rejected),
            }[loss]
        )
    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(found, torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


def test_weight_decay_spares_embeddings_norms_and_biases(tokenizer):
    names = set(decayed_parameters(build(tokenizer, attention_bias=True, tie_word_embeddings=False)))
    layers = {f"model.layers.{i}." for i in range(4)}
    matrices = {f"self_attn.{p}_proj.weight" for p in "qkvo"} | {f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert names == {layer + matrix for layer in layers for matrix in matrices} | {"lm_head.weight"}
    tied = build(tokenizer, tie_word_embeddings=True)
    assert not any("embed" in name or "lm_head" in name for name in decayed_parameters(tied))


def test_trainers_use_these_parameter_groups(tokenizer, tmp_path):
    trainer, _ = sft_trainer(tokenizer, tmp_path, weight_decay=0.1)
    decayed, spared = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    embedding = trainer.model.model.embed_tokens.weight
    assert any(p is embedding for p in spared["params"]) and not any(p is embedding for p in decayed["params"])


def test_global_batch_is_divided_over_ranks():
    assert grad_accum_steps("s", 128, 1, 8) == 16
    assert grad_accum_steps("s", 128, 4, 8) == 4


def test_wsd_decays_over_its_share_of_the_steps():
    stage = SFTStage(
        **settings(lr_scheduler="wsd", decay_ratio=0.25, num_epochs=2, global_batch_size=3, micro_batch_size=3)
    )
    kwargs = shared_arguments("s", stage, 0, 10, None, CPU)["lr_scheduler_kwargs"]
    assert kwargs == {"num_decay_steps": 2, "min_lr_ratio": 0.1, "decay_type": "linear"}  # 2 x ceil(10 / 3) steps


def test_a_disk_without_room_for_the_checkpoints_is_refused(tokenizer, tmp_path, monkeypatch):
    model, stage = build(tokenizer), SFTStage(**settings())
    needed = 4 * sum(p.numel() for p in model.parameters()) * (3 * 3 + 1)  # two checkpoints and one in the making
    usage = lambda free: lambda path: SimpleNamespace(free=free)  # noqa: E731
    monkeypatch.setattr("shutil.disk_usage", usage(needed))
    check_space("sft", stage, model, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", usage(needed - 1))
    with pytest.raises(UserError, match=r"GB free; free some, lower stages.sft.save_total_limit=2, or set run_dir="):
        check_space("sft", stage, model, tmp_path)
