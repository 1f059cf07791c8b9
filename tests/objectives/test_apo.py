"""Preference losses: hand values, invariants, and loss and gradient of TRL's own DPOTrainer on one padded batch."""

import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from smolpost.objectives.apo import LOSSES, preference_loss, summed_logps

anywhere = settings(deadline=None)  # a busy CPU is no failure

# Log-ratios +10 (of 5 tokens) and -10 (of 4 tokens) at beta 0.1, so beta r is 1 and -1 and the scaled margin 2.
HAND = {
    "apo_zero": 0.53788284,  # 2 sigmoid(-1)
    "apo_down": 0.85026150,  # sigmoid(1) + sigmoid(-2) = 0.73105858 + 0.11920292
    "sigmoid": 0.12692801,  # ln(1 + e^-2)
    "ipo": 0.25,  # (10 / 5 + 10 / 4 - 1 / 0.2)^2 = (4.5 - 5)^2
    "robust": -0.12307199,  # (0.9 ln(1 + e^-2) - 0.1 ln(1 + e^2)) / 0.8 = (0.11423521 - 0.21269280) / 0.8
}
AT_REFERENCE = {"apo_zero": 1.0, "apo_down": 1.0, "sigmoid": math.log(2), "ipo": 25.0, "robust": math.log(2)}


def loss_of(name, chosen, rejected, *, beta=0.1, smoothing=None, dtype=torch.float64):
    """Our loss of one pair, 5 and 4 tokens long; 0.1 of the labels swapped where the loss knows of that."""
    ratios = [r if torch.is_tensor(r) else torch.tensor([r], dtype=dtype) for r in (chosen, rejected)]
    if smoothing is None:
        smoothing = 0.1 if name == "robust" else 0.0
    lengths = {"num_chosen": torch.tensor([5]), "num_rejected": torch.tensor([4])}
    return preference_loss(name, *ratios, beta=beta, label_smoothing=smoothing, **lengths)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_match_hand_values(name):
    assert_close(loss_of(name, 10.0, -10.0), torch.tensor([HAND[name]], dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_where_policy_equals_reference(name):
    exact = {"rtol": 0, "atol": 0} if name.startswith("apo") else {}
    assert_close(loss_of(name, 0.0, 0.0, dtype=torch.float32), torch.tensor([AT_REFERENCE[name]]), **exact)


def test_robust_is_the_unbiased_estimate():
    """The mean over the flip, weighted by its probability, is DPO's loss on the clean pair."""
    clean = 0.8 * loss_of("robust", 7.0, -2.0, smoothing=0.2) + 0.2 * loss_of("robust", -2.0, 7.0, smoothing=0.2)
    assert_close(clean, loss_of("sigmoid", 7.0, -2.0))


def test_refusals():
    pair = [torch.zeros(1)] * 2
    given = {"beta": 0.1, "label_smoothing": 0.0, "num_chosen": torch.ones(1), "num_rejected": torch.ones(1)}
    with pytest.raises(ValueError, match="unknown preference loss 'dpo'; choose one of apo_zero, apo_down, sigmoid,"):
        preference_loss("dpo", *pair, **given)
    with pytest.raises(ValueError, match="beta=0 is not above 0"):
        preference_loss("sigmoid", *pair, **given | {"beta": 0})
    with pytest.raises(ValueError, match=r"label_smoothing=0.5 is outside \[0, 0.5\)"):
        preference_loss("robust", *pair, **given | {"label_smoothing": 0.5})
    with pytest.raises(ValueError, match=r"label_smoothing=0.1 has no part in sigmoid; set it to 0 or choose robust"):
        preference_loss("sigmoid", *pair, **given | {"label_smoothing": 0.1})
    with pytest.raises(ValueError, match=r"shapes differ: \(1,\) chosen and \(2,\) rejected"):
        preference_loss("sigmoid", pair[0], torch.zeros(2), **given)
    with pytest.raises(ValueError, match=r"ld_alpha=1.5 is outside \[0, 1\]"):
        summed_logps(torch.zeros(2), torch.tensor([0, 1]), 2, ld_alpha=1.5)
    with pytest.raises(ValueError, match="num_sides=3 is odd"):
        summed_logps(torch.zeros(2), torch.tensor([0, 1]), 3)


# ---------------------------------------------------------------- sums


def test_summed_logps_matches_hand_value():
    logps = torch.tensor([-1.0, -2.0, -4.0, -3.0, -5.0, -6.0], requires_grad=True)
    side = torch.tensor([0, 0, 0, 1, 1, 2])  # 3 and 2 tokens; 1 token and none
    assert summed_logps(logps, side, 4).tolist() == [-7.0, -8.0, -6.0, 0.0]
    sums = summed_logps(logps, side, 4, ld_alpha=0.5)
    assert sums.tolist() == [-5.0, -8.0, -3.0, 0.0]  # -4 of the third chosen token and -6 (its rival is empty) by half
    sums.sum().backward()
    assert logps.grad.tolist() == [1.0, 1.0, 0.5, 1.0, 1.0, 0.5]


def test_long_sides_are_summed_finely():
    """fp32 accumulation, token by token, is off by about a nat here."""
    logps = -2 * torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    total = summed_logps(logps, torch.zeros(len(logps), dtype=torch.int64), 2)[0]
    assert abs(total.item() - logps.double().sum().item()) <= 2**-8  # half of fp32's spacing at 100,000
    assert total.dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_the_device(name):
    """Meta tensors have no values: whatever would bring one to the host raises."""
    logps, side = torch.empty(9, device="meta"), torch.empty(9, dtype=torch.int64, device="meta")
    ratios = summed_logps(logps, side, 6, ld_alpha=0.5).view(-1, 2)
    lengths = torch.empty(3, dtype=torch.int64, device="meta")
    losses = preference_loss(
        name, *ratios.unbind(1), beta=0.1, label_smoothing=0.0, num_chosen=lengths, num_rejected=lengths
    )
    assert losses.shape == (3,) and losses.dtype == torch.float32


sides = st.lists(st.tuples(st.integers(0, 5), st.floats(-20, 0, width=32)), max_size=60)


@anywhere
@given(sides)
def test_ld_alpha_one_is_the_plain_sum(tokens):
    logps, side = torch.tensor([t[1] for t in tokens]), torch.tensor([t[0] for t in tokens], dtype=torch.int64)
    assert_close(summed_logps(logps, side, 6, ld_alpha=1.0), summed_logps(logps, side, 6), rtol=0, atol=0)


@anywhere
@given(st.integers(0, 30), st.floats(0, 1), st.randoms())
def test_ld_alpha_has_no_part_in_pairs_of_equal_lengths(length, alpha, random):
    side = torch.tensor([0, 1] * length, dtype=torch.int64)
    logps = torch.tensor([-random.random() for _ in side])
    assert_close(summed_logps(logps, side, 2, ld_alpha=alpha), summed_logps(logps, side, 2), rtol=0, atol=0)


@anywhere
@given(sides, st.floats(0, 1), st.randoms())
def test_ld_alpha_does_not_see_how_sides_are_mixed(tokens, alpha, random):
    """Sides one after another, or interleaved in any way that keeps each side's order: the same sums and gradients."""
    queues = {s: [t[1] for t in tokens if t[0] == s] for s in range(6)}
    mixed = [t[0] for t in tokens]
    random.shuffle(mixed)
    orders = sorted(mixed), mixed
    found = []
    for order in orders:
        left = {s: iter(q) for s, q in queues.items()}
        logps = torch.tensor([next(left[s]) for s in order], dtype=torch.float32, requires_grad=True)
        side = torch.tensor(order, dtype=torch.int64)
        sums = summed_logps(logps, side, 6, ld_alpha=alpha)
        sums.sum().backward()
        found.append((sums, torch.cat([logps.grad[side == s] for s in range(6)])))
    expected = []
    for s in range(6):  # the definition, side by side
        shorter = min(len(queues[s]), len(queues[s ^ 1]))
        expected.append(sum(queues[s][:shorter]) + alpha * sum(queues[s][shorter:]))
    for sums, grad in found:
        assert_close(sums, torch.tensor(expected), atol=1e-4, rtol=1e-6)
        assert_close(grad, found[0][1], rtol=0, atol=0)


# ---------------------------------------------------------------- invariants

ratios = st.floats(-50, 50)
betas = st.floats(0.01, 2)


@anywhere
@given(ratios, ratios, betas)
def test_sigmoid_swap_symmetry(chosen, rejected, beta):
    """-log p and -log (1 - p): swapping the sides shifts the loss by the scaled margin."""
    difference = loss_of("sigmoid", rejected, chosen, beta=beta) - loss_of("sigmoid", chosen, rejected, beta=beta)
    assert_close(difference.item(), beta * (chosen - rejected), atol=1e-9, rtol=1e-9)


@anywhere
@given(ratios, ratios, betas)
def test_apo_zero_swap_symmetry(chosen, rejected, beta):
    both = loss_of("apo_zero", chosen, rejected, beta=beta) + loss_of("apo_zero", rejected, chosen, beta=beta)
    assert_close(both.item(), 2.0)


@anywhere
@given(ratios, ratios, betas)
def test_robust_without_smoothing_is_sigmoid(chosen, rejected, beta):
    robust = loss_of("robust", chosen, rejected, beta=beta, smoothing=0.0)
    assert_close(robust, loss_of("sigmoid", chosen, rejected, beta=beta), rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
@anywhere
@given(chosen=ratios, rejected=ratios)
def test_extreme_log_ratios_stay_finite(name, chosen, rejected):
    pair = [torch.tensor([v * 1e4], requires_grad=True) for v in (chosen, rejected)]
    loss = loss_of(name, *pair)
    loss.sum().backward()
    assert loss.isfinite().all() and all(p.grad.isfinite().all() for p in pair)


# ---------------------------------------------------------------- TRL

WORDS = list("abcdefghijklmnop")
PAIRS = [  # of unequal lengths, so that padding, ipo's lengths and ld_alpha's tails all matter
    {"prompt": "a b c", "chosen": " d e f g h i j", "rejected": " k l"},
    {"prompt": "b", "chosen": " c", "rejected": " d a f g h"},
    {"prompt": "c a b d e f", "chosen": " m n o", "rejected": " p a b"},
]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """TRL's trainer on a tiny model, with a reference of other weights."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<pad>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    shape = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(shape), LlamaForCausalLM(shape)
    with torch.no_grad():
        for model in (policy, reference):
            for weight in model.parameters():
                weight += 0.3 * torch.randn_like(weight)  # far from uniform, so log-ratios are several nats
    config = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("dpo")), use_cpu=True, bf16=False, report_to=[], max_length=None,
        per_device_train_batch_size=len(PAIRS), gradient_checkpointing=False,
    )  # fmt: skip
    return DPOTrainer(
        model=policy, ref_model=reference, args=config, train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )  # fmt: skip


def trl_loss_and_gradients(trainer, batch, name, smoothing, ld_alpha):
    trainer.loss_types, trainer.beta = [name], 0.1
    trainer.label_smoothing, trainer.ld_alpha = smoothing, ld_alpha
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch, False)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in trainer.model.parameters()]


def our_loss_and_gradients(trainer, batch, name, smoothing, ld_alpha):
    """The same log-probabilities packed side after side, through our functions."""
    scored = batch["completion_mask"].bool()
    labels = batch["input_ids"].masked_fill(~scored, -100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    num_pairs = len(labels) // 2
    rows = torch.arange(2 * num_pairs).view(2, num_pairs).T.flatten()  # TRL's rows in our order of sides
    counts = scored.sum(dim=1)[rows]
    side = torch.arange(2 * num_pairs).repeat_interleave(counts)

    def token_logps(model):
        logps = model(**inputs, use_cache=False, fused_lm_head=True).log_probs
        return logps[rows][scored[rows, 1:]]

    trainer.model.zero_grad()
    ratios = token_logps(trainer.model) - token_logps(trainer.ref_model).detach()
    chosen, rejected = summed_logps(ratios, side, 2 * num_pairs, ld_alpha=ld_alpha).view(-1, 2).unbind(1)
    losses = preference_loss(
        name, chosen, rejected, beta=0.1, label_smoothing=smoothing,
        num_chosen=counts[::2], num_rejected=counts[1::2],
    )  # fmt: skip
    assert losses.shape == (num_pairs,)
    losses.mean().backward()
    return losses.mean().detach(), [p.grad.clone() for p in trainer.model.parameters()]


CASES = [(name, 0.0, ld_alpha) for name in LOSSES for ld_alpha in (None, 0.5)]
CASES += [("robust", 0.1, None), ("robust", 0.1, 0.5), ("sigmoid", 0.0, 0.0), ("sigmoid", 0.0, 1.0)]


@pytest.mark.parametrize(("name", "smoothing", "ld_alpha"), CASES)
def test_loss_and_gradients_equal_trl(trainer, name, smoothing, ld_alpha):
    batch = trainer.data_collator(list(trainer.train_dataset))
    theirs, their_gradients = trl_loss_and_gradients(trainer, batch, name, smoothing, ld_alpha)
    ours, our_gradients = our_loss_and_gradients(trainer, batch, name, smoothing, ld_alpha)
    assert_close(ours, theirs, rtol=2e-6, atol=1e-6)
    assert max(g.abs().max() for g in their_gradients) > 1e-3
    for our, their in zip(our_gradients, their_gradients, strict=True):
        assert_close(our, their, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "robust"])
def test_trl_ignores_smoothing_where_we_refuse_it(trainer, name):
    batch = trainer.data_collator(list(trainer.train_dataset))
    plain, _ = trl_loss_and_gradients(trainer, batch, name, 0.0, None)
    smoothed, _ = trl_loss_and_gradients(trainer, batch, name, 0.3, None)
    assert_close(smoothed, plain, rtol=0, atol=0)
