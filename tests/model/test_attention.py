"""Packed attention equals the same documents and preference pairs run one by one, on every backend."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import SmolLM3Config as StockConfig
from transformers import SmolLM3ForCausalLM as StockModel

from smolpost.model import attention_kernels as kernels
from smolpost.model.attention import packed_attention, packed_mask
from smolpost.model.attention_segments import find_segments, lengths_from_positions
from tests.model.packed_rows import (
    PAIRS,
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

pair_lists = st.lists(st.tuples(*[st.integers(0, 12)] * 3), min_size=1, max_size=4).filter(lambda x: sum(map(sum, x)))
# All segments in calls of their own, or those of one length in one.
shorts = st.sampled_from([0, kernels.SHORT])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), shorts, st.booleans())
def test_packed_documents_equal_masked_sdpa(lengths, short, given_lengths):
    with mock.patch.object(kernels, "SHORT", short):
        ours = step(build("packed"), lengths, **({"document_lengths": lengths} if given_lengths else {}))
    assert_equal(ours, step(build("sdpa"), lengths))


def test_packed_documents_equal_documents_alone():
    model, lengths = build("packed").eval(), [7, 1, 12, 7]
    ids = torch.randint(3, VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=document_positions(lengths)).logits[0]
        alone = torch.cat([model(input_ids=part).logits[0] for part in ids.split(lengths, dim=1)])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(pair_lists, st.sampled_from([1, 2, 4]), shorts)
def test_packed_pairs_equal_two_sequences_each(pairs, key_heads, short):
    with mock.patch.object(kernels, "SHORT", short):
        packed = pair_step(build("packed", num_key_value_heads=key_heads), pairs, packed=True)
    assert_equal(packed, pair_step(build("sdpa", num_key_value_heads=key_heads), pairs, packed=False))


def test_rope_and_nope_layers_alike():
    for interval in (1, 2, 5):  # NoPE everywhere, on every other layer, nowhere
        packed = pair_step(build("packed", no_rope_layer_interval=interval), PAIRS, packed=True)
        assert_equal(packed, pair_step(build("sdpa", no_rope_layer_interval=interval), PAIRS, packed=False))


def visible(**layout) -> list[list[int]]:
    """Tokens that each token of a row of 9 sees: without queries, the output is the mean of their one-hot values."""
    row = [torch.zeros(1, 1, 9, 9), torch.randn(1, 1, 9, 9), torch.eye(9)[None, None]]
    output, _ = packed_attention(None, *row, None, **layout)
    assert output.shape == (1, 9, 1, 9)
    sets = [row.nonzero().flatten().tolist() for row in output[0, :, 0]]
    means = torch.stack([torch.eye(9)[tokens].mean(0) for tokens in sets])
    torch.testing.assert_close(output[0, :, 0], means)
    return sets


def test_who_sees_whom_by_hand():
    documents = visible(document_lengths=[4, 1, 4])
    assert documents == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [4], [5], [5, 6], [5, 6, 7], [5, 6, 7, 8]]
    pairs = visible(pair_lengths=[(2, 1, 2), (1, 1, 2)])
    assert pairs == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [5], [5, 6], [5, 7], [5, 7, 8]]
    # Without a prompt, chosen and rejected are two documents.
    assert visible(pair_lengths=[(0, 4, 1), (4, 0, 0)]) == documents


def test_segments_by_hand():
    assert find_segments(6, document_lengths=[4, 2]) == ((range(4), range(0)), (range(4, 6), range(0)))
    pairs = find_segments(9, pair_lengths=[(2, 1, 2), (1, 3, 0)])
    assert pairs == ((range(3), range(0)), (range(3, 5), range(2)), (range(5, 9), range(0)))
    assert lengths_from_positions(torch.tensor([[0, 1, 2, 0, 0, 1]])) == [3, 1, 2]
    assert lengths_from_positions(torch.tensor([[0, 1, 2]])) is None
    # Numbers of segments: 0 and 3 share a call.
    assert kernels.batches([2, 9, 3, 2], short=4) == [[0, 3], [1], [2]]


@pytest.mark.parametrize(
    ("layout", "products"),
    [
        ({"document_lengths": [300, 200, 100, 200]}, (300**2 + 2 * 200**2 + 100**2) / 2),
        (
            {"pair_lengths": [(400, 200, 100), (50, 20, 30)]},
            (600**2 + 100**2 + 70**2 + 30**2) / 2 + 400 * 100 + 50 * 30,
        ),
    ],
)
def test_work_is_the_segments_and_memory_the_row(layout, products):
    row = inputs(800)
    with Work() as work:
        packed_attention(None, *row, None, **layout)[0].sum().backward()
    assert sum(work.products) == 2 * products
    assert work.largest == row[0].numel()


@settings(max_examples=15, deadline=None)
@given(pair_lists, st.sampled_from([1, 2, 4]), shorts)
def test_backends_agree(pairs, key_heads, short):
    row = inputs(sum(map(sum, pairs)), key_heads=key_heads)
    segments = find_segments(row[0].shape[2], pair_lengths=pairs)
    with mock.patch.object(kernels, "SHORT", short):
        cpu = run(kernels.CPUFlash.apply, row, segments, 0.5)
    assert_equal(cpu, run(kernels.segment_attention, row, segments, 0.5))
    assert_equal(run(on_cuda(reference_varlen_attn), row, segments, 0.5), cpu)


def test_documents_take_their_keys_as_they_are_on_cuda():
    def checked(q, k, v, *args, **kwargs):
        assert k.data_ptr() == row[1].data_ptr() and v.data_ptr() == row[2].data_ptr()
        return reference_varlen_attn(q, k, v, *args, **kwargs)

    row, segments = inputs(9), find_segments(9, [4, 5])
    on_cuda(checked)(*row, segments, 0.5)
    # Layers share the indices.
    cpu = torch.device("cpu")
    assert kernels.varlen_index(segments, cpu) is kernels.varlen_index(find_segments(9, [4, 5]), cpu)


def test_dropout_and_unequal_head_sizes_take_public_sdpa():
    query, key, value = inputs(12)
    segments = find_segments(12, [7, 5])
    torch.manual_seed(4)
    found, _ = packed_attention(None, query, key, value, None, dropout=0.5, document_lengths=[7, 5])
    torch.manual_seed(4)
    torch.testing.assert_close(found, kernels.segment_attention(query, key, value, segments, None, dropout=0.5))
    assert (found == 0).any()
    wide = torch.cat((value, 2 * value), dim=3)
    found, _ = packed_attention(None, query, key, wide, None, document_lengths=[7, 5])
    expected, _ = packed_attention(None, query, key, value, None, document_lengths=[7, 5])
    torch.testing.assert_close(found, torch.cat((expected, 2 * expected), dim=3))


def test_strides_do_not_matter():
    row = inputs(sum(map(sum, PAIRS)))
    segments = find_segments(row[0].shape[2], pair_lengths=PAIRS)
    expected = run(kernels.CPUFlash.apply, row, segments, None)
    odd = [tensor.detach().mT.contiguous().mT.requires_grad_() for tensor in row]
    assert odd[0].stride(3) != 1
    assert_equal(run(kernels.CPUFlash.apply, odd, segments, None), expected)
    # sum() hands back a gradient without strides.
    found = torch.autograd.grad(kernels.CPUFlash.apply(*row, segments, None).sum(), row)
    output = kernels.segment_attention(*row, segments, None)
    for ours, theirs in zip(found, torch.autograd.grad(output.sum(), row), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [8, 64])
def test_bf16_is_close_to_fp32(size):
    pairs = [(200, 150, 120), (40, 300, 80)]
    row = inputs(sum(map(sum, pairs)), size=size)
    segments = find_segments(row[0].shape[2], pair_lengths=pairs)
    exact = run(kernels.CPUFlash.apply, row, segments, None)
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in row]
    ours, public = (run(f, half, segments, None) for f in (kernels.CPUFlash.apply, kernels.segment_attention))
    for name, tensor in exact.items():
        assert ours[name].dtype == torch.bfloat16
        errors = [((found[name].float() - tensor).norm() / tensor.norm()).item() for found in (ours, public)]
        assert errors[0] < max(2**-7, 1.2 * errors[1])


def test_autocast_computes_in_the_lower_precision():
    full = pair_step(build("packed"), PAIRS, packed=True)
    with torch.autocast("cpu", torch.bfloat16):
        row = [tensor.detach() for tensor in inputs(9)]
        row[2] = row[2].bfloat16()  # as after RoPE
        assert packed_attention(None, *row, None, document_lengths=[4, 5])[0].dtype == torch.bfloat16
        half = pair_step(build("packed"), PAIRS, packed=True)
    torch.testing.assert_close(half["logits"].float(), full["logits"], atol=0.1, rtol=0.1)
    assert half["model.layers.0.self_attn.q_proj.weight"].abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    plain, checkpointed = build("packed").train(), build("packed").train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        checkpointed.enable_input_require_grads()
    assert_equal(pair_step(checkpointed, PAIRS, packed=True), pair_step(plain, PAIRS, packed=True), 1e-6)
    plain.zero_grad(), checkpointed.zero_grad()
    assert_equal(step(checkpointed, [9, 4, 9]), step(plain, [9, 4, 9]), 1e-6)


@pytest.mark.parametrize(("model", "config"), [(LlamaForCausalLM, LlamaConfig), (StockModel, StockConfig)])
def test_serves_other_models_by_name(model, config):
    found = step(build("packed", model, config), [5, 8, 5], document_lengths=[5, 8, 5])
    assert_equal(found, step(build("sdpa", model, config), [5, 8, 5]))
    found = pair_step(build("packed", model, config), PAIRS, packed=True)
    assert_equal(found, pair_step(build("sdpa", model, config), PAIRS, packed=False))


@pytest.mark.parametrize("layout", [{"document_lengths": [9, 4, 9]}, {"pair_lengths": [(9, 4, 9)]}])
def test_compiles_in_one_graph(layout):
    model = build("packed")
    positions = document_positions([9, 4, 9]) if "document_lengths" in layout else pair_positions([(9, 4, 9)])
    ids = torch.randint(3, VOCAB, positions.shape, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found, expected = (run(ids, position_ids=positions, use_cache=False, **layout) for run in (compiled, model))
    torch.testing.assert_close(found.logits, expected.logits)


@pytest.mark.parametrize("use_cache", [None, True])
def test_a_mask_of_ones_or_a_fresh_cache_leaks_nothing(use_cache):
    model = build("packed").eval()
    ids = torch.randint(3, VOCAB, (1, sum(map(sum, PAIRS))), generator=torch.Generator().manual_seed(1))
    kwargs = {"input_ids": ids, "position_ids": pair_positions(PAIRS), "pair_lengths": PAIRS}
    with torch.no_grad():
        expected = model(**kwargs, use_cache=False).logits
        found = model(**kwargs, use_cache=use_cache, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_padded_batch_and_generation_equal_sdpa():
    ours, reference = build("packed").eval(), build("sdpa").eval()
    torch.manual_seed(2)
    ids = torch.randint(3, VOCAB, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    kwargs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        expected, found = reference(**kwargs).logits, ours(**kwargs).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert ours.generate(**kwargs, **settings).tolist() == reference.generate(**kwargs, **settings).tolist()


def test_no_mask_is_built_for_packed_rows():
    assert packed_mask(q_length=8, kv_length=8, batch_size=1) is None
    one = torch.tensor([[True]])
    assert packed_mask(q_length=1, kv_length=1, q_offset=0, attention_mask=one, batch_size=1) is None
    padding = torch.tensor([[False, True, True]])
    built = packed_mask(q_length=3, kv_length=3, attention_mask=padding, batch_size=1)
    assert built[0, 0].tolist() == [[False, False, False], [False, True, False], [False, True, True]]


def test_refuses_what_would_leak():
    model, ids = build("packed"), torch.ones(1, 4, dtype=torch.long)
    positions = torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(ValueError, match="batch of 2 rows; flatten the batch into one row"):
        model(input_ids=ids.expand(2, -1), position_ids=positions.expand(2, -1), use_cache=False)
    with pytest.raises(ValueError, match="batch of 2 rows; flatten the batch into one row"):
        model(input_ids=ids.expand(2, -1), document_lengths=[2, 2], use_cache=False)
    with pytest.raises(ValueError, match="step back from 3 to 2 at token 4, but a document begins at 0; pass pair_len"):
        model(input_ids=ids.expand(1, -1).repeat(1, 2), position_ids=pair_positions([(2, 2, 2), (1, 1, 0)]))
    mask = torch.tensor([[1, 1, 1, 0]])
    with pytest.raises(ValueError, match=r"padding or a KV cache \(4 queries, 4 keys\): .* leave attention_mask and"):
        model(input_ids=ids, attention_mask=mask, document_lengths=[2, 2], use_cache=False)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"padding or a KV cache \(4 queries, 8 keys\)"):
        model(input_ids=ids, past_key_values=cache, document_lengths=[2, 2])


@pytest.mark.parametrize("layout", [{}, {"document_lengths": [2, 2]}, {"pair_lengths": [(1, 1, 2)]}])
def test_refuses_what_it_cannot_compute(layout):
    positions = torch.tensor([[0, 1, 0, 1]])
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(ValueError, match=f"packed has no {name}; use eager for this model"):
            packed_attention(None, *inputs(4), None, position_ids=positions, **{name: 1.0}, **layout)


def test_refuses_lengths_that_do_not_fit():
    model, ids = build("packed"), torch.ones(1, 9, dtype=torch.long)
    with pytest.raises(ValueError, match="document_lengths sum to 8 tokens, but the row has 9"):
        model(input_ids=ids, document_lengths=[3, 5], use_cache=False)
    with pytest.raises(ValueError, match="pair_lengths sum to 10 tokens, but the row has 9"):
        model(input_ids=ids, pair_lengths=[(1, 2, 3), (1, 1, 2)], use_cache=False)
    with pytest.raises(ValueError, match="document_lengths hold -1, but no length is below 0"):
        model(input_ids=ids, document_lengths=[10, -1], use_cache=False)
    with pytest.raises(ValueError, match="document_lengths sum to 0 tokens, but the row has 9"):
        model(input_ids=ids, document_lengths=[], use_cache=False)
    with pytest.raises(ValueError, match="both given, but a row has one layout"):
        model(input_ids=ids, document_lengths=[9], pair_lengths=[(3, 3, 3)], use_cache=False)
