"""Generation equals stock's, and decoding with a cache equals one full forward pass."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

VARIANTS = {
    "default": {},
    "untied_multi_query": dict(tie_word_embeddings=False, num_key_value_heads=1),
    "yarn": dict(
        rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=8)
    ),
    "sliding": dict(use_sliding_window=True, sliding_window=4, no_rope_layer_interval=2),
}
NEW_TOKENS = dict(max_new_tokens=8, min_new_tokens=8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_and_sampled_generation(make_pair, tokens, variant, attention):
    stock, ours = make_pair(attention, **VARIANTS[variant])
    for sampling in (dict(do_sample=False), dict(do_sample=True, temperature=0.6, top_p=0.95)):
        texts = []
        for model in (stock, ours):
            torch.manual_seed(5)
            texts.append(model.generate(tokens, attention_mask=torch.ones_like(tokens), **NEW_TOKENS, **sampling))
        assert torch.equal(texts[1], texts[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{}, dict(use_cache=False), dict(cache_implementation="static")], ids=str)
def test_left_padding_and_kind_of_cache_do_not_change_greedy_text(make_pair, tokens, variant, options):
    stock, ours = make_pair(**VARIANTS[variant])
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    text = ours.generate(tokens, attention_mask=mask, do_sample=False, **NEW_TOKENS, **options)
    assert torch.equal(text, stock.generate(tokens, attention_mask=mask, do_sample=False, **NEW_TOKENS))
    for row, start in ((0, 0), (1, 5)):
        alone = ours.generate(tokens[row : row + 1, start:], do_sample=False, **NEW_TOKENS)
        assert torch.equal(text[row, start:], alone[0])


@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_steps_equal_full_forward(make_pair, tokens, variant, make_cache):
    _, ours = make_pair(**VARIANTS[variant])
    sizes = {"max_cache_len": 16} if make_cache is StaticCache else {}
    cache = make_cache(config=ours.config, **sizes)
    # A prompt, a second chunk, then token by token.
    steps = [ours(part, past_key_values=cache).logits for part in tokens.split([5, 3, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), ours(tokens).logits, rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("variant", VARIANTS)
def test_cache_made_by_the_model_continues(make_pair, tokens, variant):
    _, ours = make_pair(**VARIANTS[variant])
    prompt = ours(tokens[:, :7], position_ids=torch.arange(7)[None])
    rest = ours(tokens[:, 7:], past_key_values=prompt.past_key_values)
    full = ours(tokens, use_cache=False)
    assert full.past_key_values is None
    torch.testing.assert_close(rest.logits, full.logits[:, 7:], rtol=1e-5, atol=1e-5)
