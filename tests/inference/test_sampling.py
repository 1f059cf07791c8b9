"""Each row draws from its own numbers: exact distributions, and replies that no other row of the batch changes."""

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import smolpost.inference.generation as generation
from smolpost.inference.decoding import supports
from smolpost.inference.generation import generate, generate_each
from smolpost.inference.sampling import GOLDEN, RowSampling, Sampling, _mixed, exponentials, truncated
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from tests.inference.random_models import EOS, PAD, random_model

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20, 21], [22] * 12, [23, 5], [24]]
SEEDS = [11, 2**63 - 1, 0, 4440543551817394114, 12, 13, 14, 15]
LOGITS = torch.tensor([2.0, -0.5, 1.0, 0.3, -3.0, 1.7])
NUCLEUS = Sampling(0.8, top_p=0.9)
QWEN = Sampling(0.6, top_p=0.95, top_k=20, min_p=0.02)


def test_the_bits_are_splitmix64():
    """The published first five numbers of seed 1234567."""
    found = _mixed(torch.tensor([1234567]) + GOLDEN * torch.arange(1, 6))
    assert [x % 2**64 for x in found.tolist()] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_random_numbers_are_exponential_and_belong_to_seed_step_and_token():
    numbers = torch.stack([exponentials(torch.arange(300), step, 100) for step in range(10)])
    edges = -torch.log1p(-torch.arange(0, 1, 0.05))  # twenty ranges of equal probability
    assert chisquare(torch.bucketize(numbers, edges).flatten().bincount()[1:].numpy()).pvalue > 0.01
    # Neighbours in step, seed and token know nothing of each other: 2.7e5 pairs, so 0.01 is five deviations.
    for axis in range(3):
        one, other = numbers.narrow(axis, 1, numbers.shape[axis] - 1), numbers.narrow(axis, 0, numbers.shape[axis] - 1)
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.01
    assert torch.equal(exponentials(torch.tensor([7, 5]), 3, 40)[1], exponentials(torch.tensor([5]), 3, 50)[0, :40])
    assert numbers.isfinite().all() and (numbers > 0).all()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.6),
        Sampling(3.0),
        Sampling(0.8, top_p=0.8),
        Sampling(1.0, top_k=3),
        Sampling(1.2, min_p=0.2),
        Sampling(1.0, top_p=0.9, top_k=4, min_p=0.1),
        Sampling(1.0, repetition_penalty=1.5, presence_penalty=0.7),
    ],
)
def test_samples_have_the_probabilities_of_the_warped_logits(sampling):
    """Tokens of 20,000 rows against the softmax of the logits, warped here by transformers' own classes."""
    num_rows = 20_000
    prompts = torch.tensor([[3, 0, 5]]).expand(num_rows, -1)  # token 3 is padding
    mask = torch.tensor([[False, True, True]]).expand(num_rows, -1)
    ids = torch.cat([prompts, torch.tensor([[2, 4]]).expand(num_rows, -1)], dim=1)
    choose = RowSampling(sampling, torch.arange(num_rows), mask, check=lambda: None)
    tokens = choose(ids, LOGITS.expand(num_rows, -1)).argmax(dim=-1)

    scores = LOGITS[None]
    if sampling.repetition_penalty:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(torch.tensor([[0, 5, 2, 4]]), scores)
        scores = scores - sampling.presence_penalty * torch.tensor([0, 0, 1, 0, 1, 0])
    scores = scores / sampling.temperature
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    expected = scores.softmax(-1)[0]
    counts = tokens.bincount(minlength=len(LOGITS))
    kept = expected > 0
    assert counts[~kept].sum() == 0
    if sampling.top_p < 1 or sampling.top_k or sampling.min_p:
        assert 1 < kept.sum() < len(LOGITS)
    share = expected[kept].double()
    assert chisquare(counts[kept].numpy(), (share / share.sum() * num_rows).numpy()).pvalue > 0.01


def test_the_likeliest_token_always_stays():
    tight = Sampling(1.0, top_p=1e-6, top_k=1, min_p=0.999)
    assert truncated(LOGITS[None], tight).isfinite().tolist() == [[True] + [False] * 5]
    assert truncated(LOGITS[None], Sampling(1.0, top_k=100)).isfinite().all()


@pytest.fixture(scope="module")
def model():
    return random_model(SmolLM3ForCausalLM, SmolLM3Config, "packed")


@pytest.fixture(params=["generate", "decoder"])
def way(request, monkeypatch):
    """By transformers' `generate`, or as a GPU does it."""
    if request.param == "decoder":
        monkeypatch.setattr(generation, "fits", lambda model, *_: supports(model))
        monkeypatch.setattr(generation, "cuda_graphs", lambda: lambda step: step)
    return request.param


def replies(model, rows, sampling=NUCLEUS, seeds=None, **changes):
    options = dict(max_new_tokens=24, eos_token_ids=[EOS], pad_token_id=PAD)
    seeds = [SEEDS[i] for i in rows] if seeds is None else seeds
    return generate_each(model, [PROMPTS[i] for i in rows], seeds, sampling, **options | changes)


@pytest.mark.parametrize("sampling", [NUCLEUS, QWEN, QWEN._replace(repetition_penalty=1.3)])
def test_a_reply_is_the_same_alone_and_beside_any_others(model, way, sampling):
    alone = [replies(model, [i], sampling)[0] for i in range(8)]
    assert replies(model, range(8), sampling) == alone
    for batch in ([0, 5, 2], [7, 1, 0], [3, 4, 6], [6, 0], [5, 5, 1]):
        assert replies(model, batch, sampling) == [alone[i] for i in batch]
    if sampling == QWEN:
        assert {len(reply) == 24 for reply in alone} == {True, False}


def test_both_ways_choose_the_same_tokens(model, monkeypatch):
    expected = replies(model, range(8), QWEN)
    monkeypatch.setattr(generation, "fits", lambda *_: True)
    monkeypatch.setattr(generation, "cuda_graphs", lambda: lambda step: step)
    monkeypatch.setattr(model, "generate", None)
    assert replies(model, range(8), QWEN) == expected


def test_each_seed_is_another_reply_and_comes_back(model, way):
    options = dict(sampling=Sampling(1.5), eos_token_ids=[])
    state = torch.get_rng_state()
    first = replies(model, [1] * 20, seeds=range(20), **options)
    assert len({tuple(reply) for reply in first}) == 20
    assert replies(model, [1] * 20, seeds=range(20), **options) == first
    assert torch.equal(state, torch.get_rng_state())


def test_temperature_0_is_greedy(model, way):
    options = dict(max_new_tokens=24, eos_token_ids=[EOS], pad_token_id=PAD)
    greedy = generate(model, PROMPTS, temperature=0, top_p=1, seed=0, batch_size=8, **options)
    assert replies(model, range(8), Sampling(0, top_p=0.5, top_k=3)) == greedy


def test_penalties_count_the_rows_own_tokens_and_not_its_padding(model):
    """Padding of a prompt is the stop token here, which a penalty on it would put off."""
    sampling = Sampling(0, repetition_penalty=50.0, presence_penalty=2.0)
    alone = [replies(model, [i], sampling, pad_token_id=EOS)[0] for i in range(8)]
    assert replies(model, range(8), sampling, pad_token_id=EOS) == alone
    for prompt, reply in zip(PROMPTS, alone, strict=True):
        assert len(set(reply)) == len(reply) and not set(prompt) & set(reply)


def test_nan_is_refused(way):
    broken = random_model(SmolLM3ForCausalLM, SmolLM3Config, "packed")
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="a probability is NaN"):
        replies(broken, [0, 1])


def test_a_check_that_raises_ends_the_batch(model, way):
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        replies(model, [0, 1], max_new_tokens=40, eos_token_ids=[], check=check)
    assert len(calls) == 2
