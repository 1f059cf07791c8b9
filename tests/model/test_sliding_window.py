"""In layers with a sliding window, packed rows equal transformers' masked SDPA: documents and the sides of pairs."""

from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from smolpost.inference.generation import generate
from smolpost.model import attention_kernels as kernels
from smolpost.model.attention import packed_attention, packed_mask
from smolpost.model.attention_segments import find_segments, tiles
from tests.model.packed_rows import (
    VOCAB,
    Work,
    assert_equal,
    build,
    document_positions,
    inputs,
    on_cuda,
    pair_positions,
    pair_step,
    reference_varlen_attn,
    run,
    step,
)

WINDOW = 8
ALTERNATING = ["sliding_attention", "full_attention"] * 2
MODELS = {
    "smollm3": dict(use_sliding_window=True, sliding_window=WINDOW, no_rope_layer_interval=2),
    "mistral": dict(model=MistralForCausalLM, config=MistralConfig, sliding_window=WINDOW),
    "qwen3": dict(
        model=Qwen3ForCausalLM, config=Qwen3Config, head_dim=8, use_sliding_window=True, sliding_window=WINDOW,
        max_window_layers=2,
    ),
    "gemma3": dict(
        model=Gemma3ForCausalLM, config=Gemma3TextConfig, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=20,
        layer_types=ALTERNATING,
    ),
    # It tells only its mask of the window.
    "qwen2_moe": dict(
        model=Qwen2MoeForCausalLM, config=Qwen2MoeConfig, use_sliding_window=True, sliding_window=WINDOW,
        layer_types=ALTERNATING, num_experts=2, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
}  # fmt: skip
LENGTHS = [WINDOW - 1, 3 * WINDOW, WINDOW, 1, WINDOW + 1, 2 * WINDOW + 3]
# Sides within the window of the prompt's last token, across it and beyond; prompts shorter, as long and longer.
WIDE_PAIRS = [(5, 9, 20), (WINDOW, 7, 8), (19, 3, 17), (0, 9, 10), (12, 0, 9), (3, 2, 1), (9, 1, 0)]


def masked_attention(query, key, value, segments, scale, window):
    """The definition, written out: query i sees key j of its own sequence where i - window < j <= i."""
    outputs = []
    for own, prefix in segments:
        sequence = torch.tensor([*prefix, *own])
        q, k, v = query[0, :, own.start : own.stop], key[0][:, sequence], value[0][:, sequence]
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
        i = torch.arange(len(prefix), len(sequence))[:, None]
        j = torch.arange(len(sequence))
        scores = (q @ k.mT * scale).masked_fill((j > i) | (j <= i - window), float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)[None]


def around(window):
    """Lengths at which a tile more or less is needed, and 0."""
    return st.sampled_from(sorted({0, 1, window - 1, window, window + 1, 2 * window, 2 * window + 1, 3 * window - 1}))


@st.composite
def windows_and_pairs(draw):
    window = draw(st.sampled_from([1, 2, 3, 8, 13, 100]))
    pairs = draw(st.lists(st.tuples(*[around(min(window, 20))] * 3), min_size=1, max_size=4))
    return window, [pair for pair in pairs if sum(pair)] or [(1, 0, 0)]


@settings(max_examples=30, deadline=None)
@given(windows_and_pairs(), st.sampled_from([1, 2, 4]), st.sampled_from([0, kernels.SHORT]), st.sampled_from([3, 128]))
def test_every_backend_equals_the_definition(window_and_pairs, key_heads, short, band):
    window, pairs = window_and_pairs
    row = inputs(sum(map(sum, pairs)), key_heads=key_heads)
    segments = find_segments(row[0].shape[2], pair_lengths=pairs)
    expected = run(masked_attention, row, segments, 0.5, window)
    with mock.patch.multiple(kernels, SHORT=short, BAND=band):
        assert_equal(run(kernels.CPUFlash.apply, row, segments, 0.5, window), expected)
    assert_equal(run(kernels.segment_attention, row, segments, 0.5, window), expected)
    assert_equal(run(on_cuda(reference_varlen_attn), row, segments, 0.5, window), expected)


def visible(window, **layout) -> list[list[int]]:
    """Tokens that each token of a row of 9 sees: without queries, the output is the mean of their one-hot values."""
    row = [torch.zeros(1, 1, 9, 9), torch.randn(1, 1, 9, 9), torch.eye(9)[None, None]]
    output, _ = packed_attention(None, *row, None, sliding_window=window, **layout)
    return [seen.nonzero().flatten().tolist() for seen in output[0, :, 0]]


def test_who_sees_whom_by_hand():
    assert visible(2, document_lengths=[4, 5]) == [[0], [0, 1], [1, 2], [2, 3], [4], [4, 5], [5, 6], [6, 7], [7, 8]]
    # 3, 4, 5 are chosen, 6, 7, 8 rejected: both count on from the prompt, 0 to 2.
    pair = [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [1, 2, 6], [2, 6, 7], [6, 7, 8]]
    assert visible(3, pair_lengths=[(3, 3, 3)]) == pair
    assert visible(1, pair_lengths=[(3, 3, 3)]) == [[token] for token in range(9)]
    # A row that nobody packed is a document.
    assert visible(2) == visible(2, document_lengths=[9])


def test_tiles_by_hand():
    segments = find_segments(14, pair_lengths=[(4, 3, 7)])
    assert tiles(segments, 3) == (
        (range(0, 3), range(0)),
        (range(3, 6), range(1, 3)),
        (range(6, 7), range(4, 6)),
        (range(7, 10), range(2, 4)),
        (range(10, 13), range(8, 10)),
        (range(13, 14), range(11, 13)),
    )
    assert tiles(segments, None) is segments


@pytest.mark.parametrize("length", [1024, 4096])
def test_work_and_memory_grow_with_the_length_times_the_window(length):
    window, row = 64, inputs(length)
    with Work() as work:
        packed_attention(None, *row, None, sliding_window=window, document_lengths=[length])[0].sum().backward()
    # Half a tile of its own and the masked tile before it, forward and backward.
    assert length * window < sum(work.products) / 2 < 1.5 * length * window
    assert work.largest == row[0].numel()


def made(attn, name):
    model = build(attn, **MODELS[name])
    # Norms of queries and keys amplify the rounding of fp32: SDPA's gradients, too, are 1.3e-5 off those of fp64.
    return model.double() if name in ("qwen3", "gemma3") else model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("given_lengths", [True, False])
def test_packed_documents_equal_masked_sdpa(name, given_lengths):
    ours = step(made("packed", name), LENGTHS, **({"document_lengths": LENGTHS} if given_lengths else {}))
    assert_equal(ours, step(made("sdpa", name), LENGTHS))


@pytest.mark.parametrize("name", MODELS)
def test_packed_pairs_equal_two_sequences_each(name):
    packed = pair_step(made("packed", name), WIDE_PAIRS, packed=True)
    assert_equal(packed, pair_step(made("sdpa", name), WIDE_PAIRS, packed=False))


@pytest.mark.parametrize("window", [1, 2, 5, 16, 200])
def test_windows_of_all_sizes_equal_masked_sdpa(window):
    fields = MODELS["mistral"] | {"sliding_window": window}
    assert_equal(step(build("packed", **fields), LENGTHS), step(build("sdpa", **fields), LENGTHS))
    packed = pair_step(build("packed", **fields), WIDE_PAIRS, packed=True)
    assert_equal(packed, pair_step(build("sdpa", **fields), WIDE_PAIRS, packed=False))


def test_a_window_over_the_whole_row_changes_no_bit():
    def attend(*row, window):
        return packed_attention(None, *row, None, sliding_window=window, pair_lengths=[(20, 10, 20)])[0]

    row = inputs(50)
    windowed, plain = (run(partial(attend, window=window), row) for window in (40, None))
    assert all(torch.equal(windowed[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", MODELS)
def test_unpacked_rows_equal_masked_sdpa(name):
    ids = torch.randint(3, VOCAB, (3, 21), generator=torch.Generator().manual_seed(1))
    found, expected = (made(attn, name) for attn in ("packed", "sdpa"))
    for model in (found, expected):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.parametrize("attn", ["packed", "sdpa"])
def test_batched_replies_are_stock_replies_to_each_prompt_alone(name, attn):
    torch.manual_seed(5)
    prompts = [torch.randint(3, VOCAB, (length,)).tolist() for length in (3, 2 * WINDOW + 3, WINDOW)]
    replies = generate(
        build(attn, **MODELS[name]), prompts, max_new_tokens=WINDOW + 2, temperature=0, top_p=1.0, seed=0,
        eos_token_ids=[], pad_token_id=0, batch_size=3,
    )  # fmt: skip
    stock = build("eager", **MODELS[name]).eval()
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(WINDOW + 2):  # without a cache, whose window is a matter of its own
                ids.append(stock(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        assert reply == ids[len(prompt) :]


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_gradient_checkpointing_and_a_fresh_cache_change_nothing(name):
    plain, checkpointed = (build("packed", **MODELS[name]).train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    expected = pair_step(plain, WIDE_PAIRS, packed=True)
    assert_equal(pair_step(checkpointed, WIDE_PAIRS, packed=True), expected, 1e-6)
    ids = torch.randint(3, VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cached, bare = (
            plain(ids, position_ids=document_positions(LENGTHS), document_lengths=LENGTHS, use_cache=use).logits
            for use in (True, False)
        )
    torch.testing.assert_close(cached, bare, atol=1e-6, rtol=1e-6)


def test_compiles_in_one_graph():
    model = build("packed", **MODELS["mistral"])
    ids = torch.randint(3, VOCAB, (1, 31), generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    pairs = [(9, 4, 18)]
    found, expected = (
        run(ids, position_ids=pair_positions(pairs), pair_lengths=pairs, use_cache=False) for run in (compiled, model)
    )
    torch.testing.assert_close(found.logits, expected.logits)


def test_bf16_is_close_to_fp32():
    pairs, window = [(200, 150, 120), (40, 300, 80)], 50
    row = inputs(sum(map(sum, pairs)), size=64)
    segments = find_segments(row[0].shape[2], pair_lengths=pairs)
    exact = run(kernels.CPUFlash.apply, row, segments, None, window)
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in row]
    found = run(kernels.CPUFlash.apply, half, segments, None, window)
    for name, tensor in exact.items():
        assert (found[name].float() - tensor).norm() <= 2**-7 * tensor.norm()


def test_no_mask_is_built_for_a_window_but_for_chunks_and_patterns():
    sizes = dict(q_length=9, kv_length=9, batch_size=1)
    config = MistralConfig(sliding_window=4)
    assert packed_mask(**sizes, local_size=4, config=config) == 4
    assert packed_mask(**sizes, local_size=3, config=config).shape == (1, 1, 9, 9)
    fields = MODELS["gemma3"] | {"use_bidirectional_attention": True}
    with pytest.raises(ValueError, match="packed documents with padding"):
        step(build("packed", **fields), [9, 5], document_lengths=[9, 5])
    fields = dict(
        intermediate_size_mlp=48, head_dim=8, num_local_experts=2, attention_chunk_size=4, no_rope_layers=[1] * 4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = build("packed", Llama4ForCausalLM, Llama4TextConfig, **fields)
    with pytest.raises(ValueError, match="packed documents with padding"):
        step(model, [9, 5], document_lengths=[9, 5])


def test_the_remedy_for_softcaps_keeps_documents_apart():
    fields = dict(
        model=Gemma2ForCausalLM, config=Gemma2Config, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=2.0
    )
    model = build("eager", **fields).eval()
    ids = torch.randint(3, VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        packed = model(ids, position_ids=document_positions(LENGTHS), document_lengths=LENGTHS, use_cache=False).logits
        alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
