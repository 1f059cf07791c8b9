"""Checkpoints of other architectures than SmolLM3's, from packed rows to evaluation, against stock transformers."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from smolpost import recipe
from smolpost.chat.fates import Fate
from smolpost.chat.tokenizer import build_tokenizer
from smolpost.data.collate import IGNORE_INDEX
from smolpost.data.rows import Row
from smolpost.doctor.checks import diagnose
from smolpost.doctor.two_engines import compare_engines
from smolpost.errors import UserError
from smolpost.evaluation.scores import aggregate
from smolpost.evaluation.task import Context
from smolpost.evaluation.tasks.perplexity import Perplexity, PerplexityTask
from smolpost.evaluation.tasks.preference import Preference, PreferenceTask
from smolpost.evaluation.tasks.reasoning import Reasoning, ReasoningTask
from smolpost.evaluation.tasks.recall import Recall, RecallTask
from smolpost.inference.generation import reply_text
from smolpost.inference.local import LocalEngine
from smolpost.merging.linear import merge
from smolpost.model.loading import load_model
from smolpost.objectives.head import head_of
from smolpost.objectives.logprobs import token_scores
from smolpost.pipeline.lineage import Lineage
from smolpost.pipeline.steps import adopt
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage
from smolpost.training.environment import Environment
from smolpost.training.train import train
from tests.model.packed_rows import assert_equal, document_positions, gradients
from tests.prepared import prepared
from tests.small import Small, sum_rows

CPU = Environment(rank=0, world_size=1, local_world_size=1, use_cpu=True, bf16=False)
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=512, bos_token_id=None,
)  # fmt: skip
WINDOW = 16  # most documents are longer
CONFIGS = {
    "qwen3": lambda **ids: transformers.Qwen3Config(**SIZES, **ids, tie_word_embeddings=True),
    "llama": lambda **ids: transformers.LlamaConfig(**SIZES, **ids, attention_bias=True),
    "gemma3": lambda **ids: transformers.Gemma3TextConfig(
        **SIZES, **ids, sliding_window=WINDOW, query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "mistral": lambda **ids: transformers.MistralConfig(**SIZES, **ids, sliding_window=WINDOW),
    "gpt2": lambda **ids: transformers.GPT2Config(
        n_embd=32, n_layer=4, n_head=4, n_positions=512, bos_token_id=None, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        **ids,
    ),
}  # fmt: skip
NEAR = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Two threads that wait for each other take ten times as long on a busy machine."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["abc"], kind="char", vocab_size=256, template="smollm3")


class Family(NamedTuple):
    """A checkpoint with random weights, and a folder for what is made from it."""

    start: Path
    folder: Path


@pytest.fixture(scope="module", params=CONFIGS)
def family(request, tokenizer, tmp_path_factory) -> Family:
    torch.manual_seed(0)
    ids = dict(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param](**ids))
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for attention, norms and biases to matter
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    adopt(folder / "start")
    return Family(folder / "start", folder)


def stock(folder: Path, attention: str = "eager") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)


# ---------------------------------------------------------------- packed rows


def test_packed_rows_equal_documents_alone(family):
    """Logits, loss and gradients of one packed row, and of stock attention on a row for each document."""
    packed, peer = load_model(family.start, attn_implementation="packed").double(), stock(family.start).double()
    lengths = [WINDOW - 1, 3 * WINDOW, 1, WINDOW + 1, 9]
    ids = torch.randint(3, packed.config.vocab_size, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, np.cumsum([0, *lengths[:-1]])] = IGNORE_INDEX  # nothing predicts a first token
    found = packed(
        ids, position_ids=document_positions(lengths), document_lengths=lengths, use_cache=False, labels=labels
    )
    found.loss.backward()
    logits = torch.cat([peer(part, use_cache=False).logits for part in ids.split(lengths, dim=1)], dim=1)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    loss.backward()
    torch.testing.assert_close(found.logits, logits, **NEAR)
    torch.testing.assert_close(found.loss, loss, check_dtype=False, **NEAR)
    assert_equal(gradients(packed), gradients(peer))


def test_tiles_of_the_head_equal_the_models_own_logits(family):
    model = stock(family.start)
    ids = torch.randint(3, model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    hidden = model.base_model(ids).last_hidden_state[0, :-1]
    torch.testing.assert_close(token_scores(hidden, ids[0, 1:], head_of(model)).logps, expected, **NEAR)


# ---------------------------------------------------------------- training

NO_THINK = {"enable_thinking": False}


def stage_of(kind: type, **settings):
    shared = dict(init_from="x", data="y", max_seq_len=500, learning_rate=1e-3, global_batch_size=4, max_grad_norm=1.0)
    return kind(
        **shared,
        num_workers=1,
        report_to=[],
        logging_steps=1,
        max_steps=3,
        max_dropped=1.0,
        precision="fp32",
        **settings,
    )


def trained(family: Family, stage, rows: list[dict], tokenizer) -> tuple[dict, Path, list[dict]]:
    """(the training's report, the folder of its model, the prepared rows of its first step in order)."""
    folder = family.folder / stage.kind
    (folder / "model").mkdir(parents=True)
    dataset, _ = prepared(stage, rows, tokenizer, folder)
    report = train(
        stage.kind, stage, stage.method(), seed=1, start=family.start, prepared=folder / "rows", out=folder / "model",
        references=folder / "references", attn_implementation="packed", environment=CPU,
    )  # fmt: skip
    return report, folder / "model", dataset.to_list()


def assert_first_step(report: dict, loss: torch.Tensor, model: PreTrainedModel) -> None:
    """Loss and gradient norm of the first step."""
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
    assert report["log"][0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert report["log"][0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.fixture(scope="module")
def sft(family, tokenizer) -> tuple[dict, Path, list[dict]]:
    rows = [{"messages": row["chosen"], "chat_template_kwargs": NO_THINK} for row in sum_rows(16, 0)]
    return trained(family, stage_of(SFTStage, shuffle_packs=False), rows, tokenizer)


def test_sft_trains_on_transformers_own_loss_of_unpacked_rows(family, sft):
    report, _, rows = sft
    peer, nats, num_tokens = stock(family.start), 0.0, 0
    for row in rows[:4]:
        ends = np.cumsum(row["seq_lengths"])[:-1]
        for ids, fates in zip(np.split(row["input_ids"], ends), np.split(row["fates"], ends), strict=True):
            labels = np.where(fates == Fate.TRAINED, ids, IGNORE_INDEX)
            num = int((labels[1:] != IGNORE_INDEX).sum())
            nats += peer(torch.tensor(ids)[None], labels=torch.tensor(labels)[None].long()).loss * num
            num_tokens += num
    assert len(rows[0]["seq_lengths"]) > 1  # else nothing is packed
    assert_first_step(report, nats / num_tokens, peer)
    losses = [entry["loss"] for entry in report["log"] if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_apo_trains_on_the_loss_of_pairs_as_sequences(family, tokenizer):
    stage = stage_of(APOStage, beta=0.5, sft_weight=0.5, pack_tokens=1000)
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in sum_rows(4, 1)]
    report, _, pairs = trained(family, stage, rows, tokenizer)
    peer, loss, nats, num_tokens = stock(family.start), 0.0, 0.0, 0
    for pair in pairs:
        ratios = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
            mask = torch.tensor(pair["prompt_mask"] + pair[f"{side}_mask"])[1:] != 0
            logps = peer(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0][mask]
            ratios.append(logps.sum() - logps.detach().sum())  # the reference is the policy
            if side == "chosen":
                nats, num_tokens = nats - logps.sum(), num_tokens + len(logps)
        loss = loss + 1 - (0.5 * ratios[0]).sigmoid() + (0.5 * ratios[1]).sigmoid()
    assert_first_step(report, loss / len(pairs) + 0.5 * nats / num_tokens, peer)


def test_the_trained_checkpoint_is_stock_transformers_own(family, sft):
    folder = sft[1]
    ids = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = (
            model(ids).logits for model in (load_model(folder, attn_implementation="packed"), stock(folder))
        )
        start = stock(family.start)(ids).logits
    torch.testing.assert_close(ours, theirs, **NEAR)
    assert (theirs - start).abs().max() > 0.01  # it has learnt


# ---------------------------------------------------------------- evaluation, merging

TODAY = "08 July 2025"


def measured(task, engine: LocalEngine) -> list:
    return task.measure(engine, task.items(engine.tokenizer))


def nats_of(model: PreTrainedModel, ids: list[int], first: int) -> float:
    """Negative log-likelihood of the tokens from place `first` on, by transformers' own loss."""
    labels = torch.tensor([[IGNORE_INDEX] * first + ids[first:]])
    return model(torch.tensor([ids]), labels=labels).loss.item() * (len(ids) - first)


def rendered(tokenizer, messages: list[dict], thinking: bool) -> tuple[list[int], int]:
    """Token ids of a conversation up to its last stop token, and how many of them are the prompt."""
    options = {"enable_thinking": thinking, "today": TODAY, "tokenize": False}
    text = tokenizer.apply_chat_template(messages, **options).removesuffix("\n")
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    return tokenizer.encode(text), len(tokenizer.encode(prompt))


@torch.no_grad()
def test_scores_are_those_of_the_stock_model(family, tokenizer):
    """Perplexity and margins from stock log-probabilities, replies from stock greedy generation, prompt by prompt."""
    sums = sum_rows(6, 2)[1::2]  # those without thinking
    rows = [("sums", Row({"messages": row["chosen"], "chat_template_kwargs": NO_THINK}, "f", 1)) for row in sums]
    pairs = [
        ("sums", Row({key: row[key] for key in ("chosen", "rejected")} | {"chat_template_kwargs": NO_THINK}, "f", 1))
        for row in sums
    ]
    context = Context(TODAY, 0, {"rows": rows, "pairs": pairs}.__getitem__)
    engine, peer = LocalEngine(load_model(family.start, attn_implementation="packed"), tokenizer), stock(family.start)
    sides = {
        side: [nats_of(peer, *rendered(tokenizer, row[side], False)) for row in sums] for side in ("chosen", "rejected")
    }
    lengths = [len(ids) - first for ids, first in (rendered(tokenizer, row["chosen"], False) for row in sums)]

    found = measured(Perplexity("loss", PerplexityTask(data="rows"), context), engine)
    assert aggregate(found)["no_think"]["value"] == pytest.approx(sum(sides["chosen"]) / sum(lengths), rel=1e-5)
    found = measured(Preference("pairs", PreferenceTask(data="pairs"), context), engine)
    margins = [r - c for c, r in zip(sides["chosen"], sides["rejected"], strict=True)]
    assert [sample.metrics["margin"] for sample in found] == pytest.approx(margins, abs=1e-3)

    config = ReasoningTask(data="rows", answer_pattern=r"(\d+)", max_new_tokens=5)
    for task in (
        Reasoning("sums", config, context), Recall("recall", RecallTask(lengths=[200], num_prompts=2), context)
    ):  # fmt: skip
        items = task.items(tokenizer)
        for item in items:
            assert engine.generate([item.ids], max_new_tokens=5)[0][0].text == greedy(peer, tokenizer, item.ids, 5)
        assert [sample.id for sample in task.measure(engine, items)] == [item.id for item in items]


def greedy(model: PreTrainedModel, tokenizer, prompt: list[int], most: int) -> str:
    """The reply without a cache, token by token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most and ids[-1] != model.config.eos_token_id:
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return reply_text(tokenizer, ids[len(prompt) :], [model.config.eos_token_id])


def test_batched_replies_equal_single_ones(family, tokenizer):
    engine = LocalEngine(load_model(family.start, attn_implementation="packed"), tokenizer)
    prompts = [tokenizer.encode(text) for text in ("ab", "a longer prompt, beyond a window of sixteen", "c?")]
    together = engine.generate(prompts, max_new_tokens=20)
    assert together == [engine.generate([prompt], max_new_tokens=20)[0] for prompt in prompts]


def test_what_is_longer_than_learned_positions_is_refused(family, tokenizer):
    """The other architectures go beyond: what they make of it is measured."""
    engine = LocalEngine(load_model(family.start, attn_implementation="packed"), tokenizer)
    ids = [5] * 513
    if "gpt2" not in str(family.start):
        assert len(engine.logps([(ids, [512])])[0]) == 1
        return
    learned = "but GPT2LMHeadModel has a learned embedding for each of its 512 positions; shorten what is asked"
    with pytest.raises(UserError, match=f"the longest row has 513 tokens, {learned}"):
        engine.logps([(ids, [512])])
    with pytest.raises(UserError, match=f"the longest prompt and reply has 515 tokens, {learned}"):
        engine.generate([ids[:510]], max_new_tokens=5)


def test_a_merge_is_the_mean_of_two_checkpoints(family, sft):
    out = family.folder / "merged"
    merge([("start", family.start, 0.25), ("sft", sft[1], 0.75)], "sft", out, "float32")
    found, start, end = (load_file(folder / "model.safetensors") for folder in (out, family.start, sft[1]))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.25 * start[name] + 0.75 * end[name], atol=1e-7, rtol=1e-6)
    ids = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(out, attn_implementation="packed")(ids).logits, stock(out)(ids).logits, **NEAR
        )


# ---------------------------------------------------------------- doctor


@pytest.mark.parametrize("kind", ["sft", "apo"])
def test_doctor_passes(family, kind, tmp_path):
    small = Small(tmp_path)
    small.write_data()
    words = [
        f"model.checkpoint={family.start}",
        f"stages.{kind}.init_from=checkpoint",
        f"stages.{kind}.max_seq_len=500",
    ]
    lineage = Lineage(recipe.load([*small.words, *words]))
    checks = {check.name: check for check in diagnose(lineage, lineage.stages[kind], rows=4)}
    assert {check.status for check in checks.values()} == {"pass"}, checks
    assert {"packing", "accumulation"} <= {*checks} or {"pairs", "reference loss", "accumulation"} <= {*checks}
    found = compare_engines(lineage, lineage.stages[kind], rows=4)
    assert len(found.numbers) == {"sft": 7, "apo": 13}[kind] and max(number.off for number in found.numbers) < 1e-5
