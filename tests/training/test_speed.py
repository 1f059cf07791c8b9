"""Speed in log lines and manifests: needed operations by hand and by torch's counter, rates, the kept matmul rate."""

import json

import datasets
import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from smolpost.chat.fates import Fate
from smolpost.data.collate import PARTS
from smolpost.training import matmul_rate, speed, train
from smolpost.training.adapters import add_adapters
from smolpost.training.batches import GlobalBatches
from smolpost.training.flops import attended_pairs, row_flops, weight_flops
from smolpost.training.settings import LoRA
from tests.training.tiny_trainers import CPU, SHAPE, build, build_windowed, char_tokenizer, sft_trainer

# Of SHAPE: queries and outputs 16 x 16, keys and values 16 x 8 (one head of two), gate, up and down 16 x 32.
LAYER = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32
LAYERS = SHAPE["num_hidden_layers"]
TRAINED, USER = int(Fate.TRAINED), int(Fate.USER)


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


def packs():
    """Documents of 3 and 2 tokens with 2 trained, and one of 4 with 1."""
    fates = [[USER, TRAINED, USER, USER, TRAINED], [USER, USER, USER, TRAINED]]
    return datasets.Dataset.from_dict(
        {"input_ids": [[1] * 5, [1] * 4], "fates": fates, "seq_lengths": [[3, 2], [4]]},
    )


def pairs(prompt, chosen, rejected):
    columns = {}
    for part, length in zip(PARTS, (prompt, chosen, rejected), strict=True):
        columns |= {f"{part}_ids": [[1] * length], f"{part}_mask": [[int(part != "prompt")] * length]}
    return datasets.Dataset.from_dict(columns)


def test_needed_operations_of_packs_by_hand(tokenizer):
    model = build(tokenizer)
    head = 16 * len(tokenizer)
    attended = (6 + 3, 10)  # 1 + 2 + 3 and 1 + 2; 1 + 2 + 3 + 4
    expected = [
        6 * LAYER * LAYERS * tokens + 6 * head * scored + 12 * 16 * LAYERS * seen
        for tokens, scored, seen in ((5, 2, attended[0]), (4, 1, attended[1]))
    ]
    np.testing.assert_array_equal(row_flops(model, packs()), expected)


def test_a_pairs_prompt_counts_once(tokenizer):
    rows = pairs(3, 2, 4)
    # 5 + 4 tokens; both sides see the prompt: 1..5, then 4..7
    assert attended_pairs(rows, None).tolist() == [sum(range(1, 6)) + sum(range(4, 8))]
    assert attended_pairs(rows, 4).tolist() == [1 + 2 + 3 + 4 + 4 + 4 * 4]
    expected = 6 * LAYER * LAYERS * 9 + 6 * 16 * len(tokenizer) * 6 + 12 * 16 * LAYERS * 37
    assert row_flops(build(tokenizer), rows).tolist() == [expected]


def test_a_sliding_window_limits_what_a_token_sees(tokenizer):
    rows = datasets.Dataset.from_dict({"input_ids": [[1] * 40], "fates": [[USER] * 40], "seq_lengths": [[40]]})
    assert attended_pairs(rows, 16).tolist() == [sum(min(i, 16) for i in range(1, 41))]
    full, windowed = row_flops(build(tokenizer), rows), row_flops(build_windowed(tokenizer), rows)
    assert full - windowed == 12 * 16 * LAYERS * sum(i - 16 for i in range(17, 41))


def counted(model, length):
    """By torch: all tokens scored, eager attention, which multiplies whole squares."""
    ids = torch.randint(0, 50, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    return counter.get_total_flops()


def eager_llama(tokenizer):
    config = transformers.LlamaConfig(**SHAPE, vocab_size=len(tokenizer), attn_implementation="eager")
    return transformers.LlamaForCausalLM(config)


def all_scored(length):
    fates = [[TRAINED] * length]
    return datasets.Dataset.from_dict({"input_ids": [[1] * length], "fates": fates, "seq_lengths": [[length]]})


def test_torch_counts_the_same(tokenizer):
    length = 24
    masked = 12 * 16 * LAYERS * (length * (length - 1) // 2)  # eager attention multiplies these, too
    found = row_flops(eager_llama(tokenizer), all_scored(length))[0]
    assert counted(eager_llama(tokenizer), length) == found + masked


def test_torch_counts_the_same_with_adapters(tokenizer):
    length, rank = 24, 4
    model = add_adapters(eager_llama(tokenizer), LoRA(r=rank), seed=0)
    masked = 12 * 16 * LAYERS * (length * (length - 1) // 2)
    # Nothing trains before the first layer's queries, keys and values: no gradient of their input.
    unneeded = 2 * length * (16 * 16 + 2 * 16 * 8 + 3 * rank * 16)
    found = row_flops(model, all_scored(length))[0]
    assert counted(model, length) == found + masked - unneeded


def test_experts_and_unknown_rows_have_no_number(tokenizer):
    config = transformers.Qwen3MoeConfig(
        **SHAPE, vocab_size=len(tokenizer), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8
    )
    assert row_flops(transformers.Qwen3MoeForCausalLM(config), packs()) is None
    assert weight_flops(transformers.Qwen3MoeForCausalLM(config)) is None
    assert row_flops(build(tokenizer), packs().rename_column("seq_lengths", "other")) is None


# ---------------------------------------------------------------- the meter


def test_a_meter_counts_from_log_line_to_log_line(monkeypatch):
    clock = iter((10.0, 12.0, 17.0))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    batches = GlobalBatches(np.full(5, 7), 2, lambda rows: [rows], seed=3)
    meter = speed.Meter(batches, 2, torch.device("cpu"), row_flops=np.arange(1.0, 6.0) * 1e12, matmul_tflops=8.0)
    assert set(meter.read(1, 100)) == {"peak_gb"} and set(meter.summary()) == {"peak_gb"}
    first, second = (order + 1 for order in (batches.order(0), batches.order(1)))
    found = meter.read(2, 150)  # step 1 of 0 to 2 in the first epoch
    assert found["tokens_per_second"] == 25
    assert found["tflops"] == first[2:4].sum() / 2 / 2  # in 2 seconds, on 2 devices
    assert found["matmul_share"] == found["tflops"] / 8
    meter.read(4, 250)  # the first epoch's last step, of one row, and the second's first
    summary = meter.summary()
    assert summary["tokens_per_second"] == pytest.approx(150 / 7)
    assert summary["tflops"] == pytest.approx((first[2:].sum() + second[:2].sum()) / 7 / 2)


@pytest.mark.parametrize("engine", ["smolpost", "trl"])
def test_log_lines_carry_the_speed(tokenizer, tmp_path, engine):
    trainer, rows, stage = sft_trainer(tokenizer, tmp_path, build(tokenizer), max_steps=4, engine=engine)
    trainer.meter.row_flops, trainer.meter.matmul_tflops = row_flops(trainer.model, rows), 0.1
    trainer.train()
    first, *others = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["peak_gb"] > 0.05 and "tokens_per_second" not in first
    assert len(others) == 3
    for entry in others:
        assert entry["tokens_per_second"] > 0 and entry["matmul_share"] == entry["tflops"] / 0.1
        assert "idle_share" not in entry  # one rank
    meter = trainer.meter
    assert meter.steps == 3
    order = [row for epoch in (0, 1, 2, 3) for row in trainer.batches.order(epoch)]
    taken = order[: 4 * stage.global_batch_size]
    assert trainer.state.num_input_tokens_seen == sum(len(rows[int(row)]["input_ids"]) for row in taken)
    assert meter.tokens == trainer.state.num_input_tokens_seen - first["num_tokens"]
    assert train._report(trainer, None, CPU)["speed"] == meter.summary() | {"idle_share": 0, "matmul_tflops": 0.1}


# ---------------------------------------------------------------- the matmul rate


def test_the_matmul_rate_is_measured_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    rate = matmul_rate.matmul_tflops(CPU)
    assert torch.equal(torch.get_rng_state(), state)
    file = tmp_path / "smolpost" / "matmul.json"
    assert capsys.readouterr().out.endswith(f"kept in {file}\n")
    ((what, kept),) = json.loads(file.read_text()).items()
    assert kept == rate > 0 and "float32" in what and torch.__version__ in what and "threads" in what
    monkeypatch.setattr(matmul_rate, "measure", lambda *_: 1e9)
    assert matmul_rate.matmul_tflops(CPU) == rate and capsys.readouterr().out == ""


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": "fast"}'])
def test_a_cache_that_is_not_ours_is_measured_again(monkeypatch, tmp_path, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(matmul_rate, "measure", lambda *_: 3.0)
    (tmp_path / "smolpost").mkdir()
    (tmp_path / "smolpost" / "matmul.json").write_text(content)
    assert matmul_rate.matmul_tflops(CPU) == 3
    assert list(json.loads((tmp_path / "smolpost" / "matmul.json").read_text()).values()) == [3]


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(matmul_rate, "measure", lambda *_: 3.0)
    assert matmul_rate.matmul_tflops(CPU) == 3
    assert "3 TFLOP/s" in (line := capsys.readouterr().out) and "not kept" in line
