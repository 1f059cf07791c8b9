"""Decoding by a step with a fixed cache gives the tokens of transformers' `generate`, greedy and sampled."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

import smolpost.inference.decoding as decoding
import smolpost.inference.generation as generation
from smolpost.inference.decoding import Decoder, cache_bytes, supports
from smolpost.inference.generation import generate
from smolpost.inference.sampling import Sampling
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from tests.inference.random_models import EOS, MODELS, PAD, VOCAB, random_model

OTHER_STOP = 11
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20, 21], [22] * 12, [23, 5]]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return random_model(*MODELS[request.param])


@pytest.fixture
def decoded(monkeypatch):
    """`generate` as a GPU runs it, steps called instead of captured; what it captured, by window."""
    captured = []

    def capture(step):
        captured.append(step.args[0])
        return step

    def replies(model, prompts=PROMPTS, **options):
        with monkeypatch.context() as patch:
            patch.setattr(generation, "fits", lambda model, *_: supports(model))
            patch.setattr(generation, "cuda_graphs", lambda: capture)
            patch.setattr(model, "generate", None)
            return stock(model, prompts, **options)

    replies.captured = captured
    return replies


def stock(model, prompts=PROMPTS, **changes):
    options = dict(
        max_new_tokens=40, temperature=0.8, top_p=0.9, seed=3, batch_size=3, eos_token_ids=[EOS, OTHER_STOP],
        pad_token_id=PAD,
    )  # fmt: skip
    return generate(model, prompts, **{**options, **changes})


SETTINGS = {
    "greedy": dict(temperature=0),
    "sampled": dict(),
    "all of the mass": dict(top_p=1.0, temperature=1.7),
    "one row": dict(batch_size=1),
    "one batch": dict(batch_size=100),
    "never stops": dict(eos_token_ids=[]),
    "one token": dict(max_new_tokens=1),
    "padding stops": dict(pad_token_id=EOS, temperature=0),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_are_those_of_generate(model, decoded, settings):
    expected = stock(model, **settings)
    assert decoded(model, **settings) == expected
    if not settings:
        assert {len(reply) == 40 for reply in expected} == {True, False}


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_replies_cross_windows_and_batches_share_their_graphs(model, decoded, monkeypatch, temperature):
    monkeypatch.setattr(decoding, "WINDOW", 32)
    settings = dict(eos_token_ids=[], max_new_tokens=90, temperature=temperature)
    assert decoded(model, **settings) == stock(model, **settings)
    # Batches of 3, 3 and 1: the first has the longest prompt, 12 tokens, and fills the cache up to token 101; the
    # second reuses its graphs.
    assert decoded.captured == [32, 64, 96, 32, 64, 96]


def test_rows_that_all_stop_early_end_the_batch(model, monkeypatch):
    # Any token is a stop token, so the first is the last: no step is run.
    monkeypatch.setattr(Decoder, "_step", None)
    decoder = Decoder(model, 2, 50, sampling=Sampling(0), eos_token_ids=range(VOCAB), pad_token_id=PAD, capture=None)
    with torch.no_grad():
        replies = decoder.reply(torch.tensor([[5, 6], [0, 7]]), torch.tensor([[1, 1], [0, 1]]), 40, 0)
    assert [len(reply) for reply in replies] == [1, 1]


def test_a_batch_does_not_see_the_one_before_and_the_cache_has_the_size_reckoned(model):
    def decoder():
        return Decoder(
            model, 2, 60, sampling=Sampling(1, 0.9), eos_token_ids=[EOS], pad_token_id=PAD, capture=lambda step: step
        )

    batches = [(torch.full((2, 30), 7), torch.ones(2, 30, dtype=torch.long))]
    batches += [(torch.tensor([[0, 9], [5, 6]]), torch.tensor([[0, 1], [1, 1]]))]
    one = decoder()
    with torch.no_grad():
        together = [one.reply(*batch, 30, seed) for seed, batch in enumerate(batches)]
        assert cache_bytes(model, 2, 60) == sum(x.keys.nbytes + x.values.nbytes for x in one.cache.layers)
        assert together == [decoder().reply(*batch, 30, seed) for seed, batch in enumerate(batches)]


def test_a_failed_capture_is_said_once_and_changes_no_token(model, monkeypatch, capsys):
    def capture(step):
        raise RuntimeError("operation not permitted when stream is capturing\n\nmore")

    expected = stock(model, eos_token_ids=[])
    decoding._say_once.cache_clear()
    monkeypatch.setattr(generation, "fits", lambda *_: True)
    monkeypatch.setattr(generation, "cuda_graphs", lambda: capture)
    assert stock(model, eos_token_ids=[]) == expected
    assert capsys.readouterr().out == (
        f"{type(model).__name__} generates without CUDA graphs, which is slower: operation not permitted when stream "
        "is capturing more\n"
    )


def test_the_callers_generator_stays_as_it_was(model, decoded):
    state = torch.get_rng_state()
    decoded(model)
    assert torch.equal(state, torch.get_rng_state())


def test_sampling_from_nan_is_refused_as_generate_refuses_it(decoded):
    model = random_model(*MODELS["ours packed"])
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="nan"):
        stock(model)
    with pytest.raises(RuntimeError, match="NaN"):
        decoded(model)


class NoWaiting(TorchDispatchMode):
    """Refuses what a capture refuses: to look at a value, or to bring one from the host."""

    REFUSED = ("local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0].lstrip("_")
        assert name not in self.REFUSED, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [dict(temperature=0), dict()], ids=["greedy", "sampled"])
def test_a_step_asks_the_device_nothing_and_keeps_its_buffers(model, monkeypatch, settings):
    places = []

    def capture(step):
        def replay():
            decoder = step.func.__self__
            buffers = [value for value in vars(decoder).values() if isinstance(value, torch.Tensor)]
            buffers += [x for layer in decoder.cache.layers for x in (layer.keys, layer.values)]
            places.append([x.data_ptr() for x in buffers])
            with NoWaiting():
                step()

        return replay

    monkeypatch.setattr(generation, "fits", lambda *_: True)
    monkeypatch.setattr(generation, "cuda_graphs", lambda: capture)
    stock(model, PROMPTS[:6], eos_token_ids=[], batch_size=3, **settings)
    # Two batches of 40 tokens: the first comes from the prompt, the second from the step before the capture.
    assert len(places) == 38 + 39
    assert all(place == places[0] for place in places)


def test_models_with_other_caches_or_attention_keep_generate():
    assert not supports(random_model(SmolLM3ForCausalLM, SmolLM3Config, "eager"))
    window = dict(use_sliding_window=True, sliding_window=8)
    assert not supports(random_model(SmolLM3ForCausalLM, SmolLM3Config, "sdpa", **window))
    assert not supports(random_model(MistralForCausalLM, MistralConfig, "sdpa", sliding_window=8))
