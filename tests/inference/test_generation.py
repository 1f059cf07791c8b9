"""Batched replies equal one-by-one replies of transformers' own model; the caller's state is left alone."""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.smollm3 import SmolLM3Config, SmolLM3ForCausalLM

from smolpost.inference.generation import (
    generate,
    padding_token_id,
    reply_text,
    stop_token_ids,
    stored_stop_token_ids,
)
from smolpost.inference.seeds import derive_seed

EOS, PAD, VOCAB = 2, 0, 64  # more tokens than the library's default top_k of 50
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20, 21], [22] * 12, [23, 5]]


@pytest.fixture(scope="module")
def model():
    """transformers' SmolLM3 with weights large enough that its replies differ and some of them stop."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4)
    config = SmolLM3Config(
        vocab_size=VOCAB, num_key_value_heads=2, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS, **sizes
    )
    model = SmolLM3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def sampled(model, prompts=PROMPTS, **changes):
    options = dict(max_new_tokens=16, temperature=0.8, top_p=0.9, seed=3, batch_size=3)
    ids = dict(eos_token_ids=[EOS], pad_token_id=PAD)
    return generate(model, prompts, **{**options, **ids, **changes})


def one_by_one(model, prompt, num_tokens, stop):
    """Greedy decoding written out: no batch, no cache, no padding."""
    reply = []
    while len(reply) < num_tokens and (not reply or reply[-1] not in stop):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + reply]), use_cache=False).logits
        reply.append(logits[0, -1].argmax().item())
    return reply


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_greedy_batches_equal_one_by_one(model, batch_size):
    # Two stop tokens, so that some replies stop and some are cut.
    expected = [one_by_one(model, prompt, 16, (EOS, 11)) for prompt in PROMPTS]
    assert {len(reply) == 16 for reply in expected} == {True, False}
    replies = sampled(model, temperature=0, eos_token_ids=[EOS, 11], batch_size=batch_size)
    assert replies == expected


def test_a_padding_token_that_is_the_stop_token_changes_nothing(model):
    assert sampled(model, temperature=0, pad_token_id=EOS) == sampled(model, temperature=0)


def test_the_stop_token_ends_a_reply_and_a_cut_reply_has_none(model):
    for reply in sampled(model):
        assert EOS not in reply[:-1]
        assert reply[-1] == EOS or len(reply) == 16


def test_sampling_follows_the_seed_and_not_the_global_state(model):
    torch.manual_seed(1)
    first, state = sampled(model), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert sampled(model) == first
    assert sampled(model, seed=4) != first


def test_batches_draw_different_numbers(model):
    first, second = sampled(model, [[5, 6, 7]] * 2, batch_size=1, max_new_tokens=32, temperature=2.0, top_p=1.0)
    assert first != second


@pytest.mark.parametrize("temperature", [1.3, 8.0])
def test_sampling_has_the_models_probabilities(model, temperature):
    num_prompts = 4000
    options = dict(max_new_tokens=1, temperature=temperature, top_p=1.0, batch_size=num_prompts)
    replies = sampled(model, [[5, 6, 7]] * num_prompts, **options)
    counts = torch.bincount(torch.tensor(replies).flatten(), minlength=VOCAB)
    with torch.no_grad():
        expected = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / temperature).softmax(-1)
    # 0.03 is about four standard deviations of a share near one half.
    torch.testing.assert_close(counts / num_prompts, expected, atol=0.03, rtol=0)
    assert (counts[expected > 0.005] > 0).all()
    assert (expected > 0.005).sum() > (50 if temperature == 8 else 3)


def test_top_p_keeps_the_likeliest_token_alone_when_small(model):
    assert sampled(model, top_p=1e-6) == sampled(model, temperature=0)


def test_settings_of_the_checkpoint_do_not_leak_in(model):
    expected = sampled(model), sampled(model, temperature=0)
    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, repetition_penalty=5.0, no_repeat_ngram_size=1, max_length=4
    )
    try:
        assert (sampled(model), sampled(model, temperature=0)) == expected
        assert model.generation_config.top_k == 1
    finally:
        model.generation_config = before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_training_mode_and_cache_setting_come_back(model, training, use_cache):
    expected = sampled(model, temperature=0)
    before = model.config.use_cache
    try:
        model.config.use_cache = use_cache
        model.train(training)
        assert sampled(model, temperature=0) == expected
        assert model.training is training and model.lm_head.training is training
        assert model.config.use_cache is use_cache
    finally:
        model.config.use_cache = before
        model.eval()


def test_progress_counts_every_prompt_and_no_prompts_give_no_replies(model):
    done = []
    sampled(model, progress=done.append)
    assert done == [3, 3, 1]
    assert sampled(model, []) == []


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="prompt without tokens"):
        sampled(model, [[5], []])


def test_derived_seeds_have_pinned_values():
    # Replies of earlier runs depend on them.
    assert derive_seed(0, 0) == 4440543551817394114
    assert len({derive_seed(a, b) for a in range(20) for b in range(20)}) == 400


def make_tokenizer(**special):
    words = ["hello", "world", "<|end|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "<|reserved|>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(word, special=True) for word in words[2:]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_reply_text_keeps_think_and_tool_tags_and_nothing_else_special():
    tokenizer = make_tokenizer(eos_token="<|end|>")
    assert reply_text(tokenizer, [4, 0, 5, 1, 6, 7, 3], [3]) == "<think> hello </think> world <tool_call>"
    assert reply_text(tokenizer, [0, 1], [1]) == "hello"  # a stop token that is not special


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": [3, 4]}, [3, 4]),
        ({"eos_token_id": 5}, {"eos_token_id": 3}, [3]),
        ({"eos_token_id": 5}, {"max_new_tokens": 9}, []),
        ({"eos_token_id": [5, 6]}, None, [5, 6]),
        ({"eos_token_id": None}, None, []),
    ],
)
def test_stop_tokens_are_those_that_stock_generate_takes_from_the_folder(tmp_path, model, config, settings, expected):
    model.save_pretrained(tmp_path)
    (file := tmp_path / "config.json").write_text(json.dumps(json.loads(file.read_text()) | config))
    (tmp_path / "generation_config.json").unlink()
    if settings is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stored_stop_token_ids(tmp_path) == stop_token_ids(loaded.generation_config) == expected
    loaded.lm_head = model.lm_head
    stock = loaded.generate(torch.tensor([[8]]), max_new_tokens=16, do_sample=False)[0, 1:].tolist()
    assert stock == one_by_one(loaded, [8], 16, expected)


def test_without_a_stop_token_replies_are_as_long_as_they_may_be(model):
    assert {len(reply) for reply in sampled(model, eos_token_ids=[])} == {16}


def test_padding_falls_back_to_any_token():
    assert padding_token_id(make_tokenizer()) == 0
    assert padding_token_id(make_tokenizer(pad_token="<|reserved|>")) == 7
