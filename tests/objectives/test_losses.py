"""Preference losses: hand values, invariants, and loss and gradient of TRL's own DPOTrainer on one padded batch."""

import math
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from smolpost.errors import UserError
from smolpost.objectives.losses import Loss, SideLengths, configured
from smolpost.objectives.sides import summed_logps
from smolpost.registry import LOSSES

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


def loss_of(name, chosen, rejected, *, beta=0.1, smoothing=0.1, dtype=torch.float64):
    """Our loss of one pair, 5 and 4 tokens long; 0.1 of the labels swapped where the loss knows of that."""
    ratios = [r if torch.is_tensor(r) else torch.tensor([r], dtype=dtype) for r in (chosen, rejected)]
    lengths = SideLengths(torch.tensor([5]), torch.tensor([4]))
    return configured(name, smoothed(name, smoothing))(*ratios, beta, lengths)


def smoothed(name, smoothing):
    return {"label_smoothing": smoothing} if name == "robust" else {}


@pytest.mark.parametrize("name", HAND)
def test_losses_match_hand_values(name):
    assert_close(loss_of(name, 10.0, -10.0), torch.tensor([HAND[name]], dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", HAND)
def test_losses_where_policy_equals_reference(name):
    exact = {"rtol": 0, "atol": 0} if name.startswith("apo") else {}
    assert_close(loss_of(name, 0.0, 0.0, dtype=torch.float32), torch.tensor([AT_REFERENCE[name]]), **exact)


def test_robust_is_the_unbiased_estimate():
    """The mean over the flip, weighted by its probability, is DPO's loss on the clean pair."""
    clean = 0.8 * loss_of("robust", 7.0, -2.0, smoothing=0.2) + 0.2 * loss_of("robust", -2.0, 7.0, smoothing=0.2)
    assert_close(clean, loss_of("sigmoid", 7.0, -2.0))


def test_every_registered_loss_has_a_hand_value():
    assert {*LOSSES} == {*HAND}


def test_a_loss_gives_one_value_per_pair():
    class Mean(Loss):
        def values(self, chosen, rejected, beta, lengths):
            return (chosen - rejected).mean()

    with pytest.raises(UserError, match=r"Mean.values gives shape \(\) for 3 pairs; return one value per pair"):
        Mean()(torch.zeros(3), torch.zeros(3), 0.1, SideLengths(torch.ones(3), torch.ones(3)))


def test_losses_import_no_torch():
    """Planning checks a recipe's loss; torch alone would take a second of its two."""
    code = "import sys; import smolpost.objectives.losses; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", HAND)
def test_nothing_waits_for_the_device(name):
    """Meta tensors have no values: whatever would bring one to the host raises."""
    logps, side = torch.empty(9, device="meta"), torch.empty(9, dtype=torch.int64, device="meta")
    ratios = summed_logps(logps, side, 6, ld_alpha=0.5).view(-1, 2)
    lengths = torch.empty(3, dtype=torch.int64, device="meta")
    losses = configured(name, {})(*ratios.unbind(1), 0.1, SideLengths(lengths, lengths))
    assert losses.shape == (3,) and losses.dtype == torch.float32


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


@pytest.mark.parametrize("name", HAND)
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
    loss = configured(name, smoothed(name, smoothing))
    losses = loss(chosen, rejected, 0.1, SideLengths(counts[::2], counts[1::2]))
    assert losses.shape == (num_pairs,)
    losses.mean().backward()
    return losses.mean().detach(), [p.grad.clone() for p in trainer.model.parameters()]


CASES = [(name, 0.0, ld_alpha) for name in HAND for ld_alpha in (None, 0.5)]
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


@pytest.mark.parametrize("name", [name for name in HAND if name != "robust"])
def test_trl_ignores_smoothing_where_we_refuse_it(trainer, name):
    batch = trainer.data_collator(list(trainer.train_dataset))
    plain, _ = trl_loss_and_gradients(trainer, batch, name, 0.0, None)
    smoothed, _ = trl_loss_and_gradients(trainer, batch, name, 0.3, None)
    assert_close(smoothed, plain, rtol=0, atol=0)
