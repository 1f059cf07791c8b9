"""Per-document attention equals transformers' masked SDPA, on packed rows and on everything else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.model.attention import document_lengths, documents_mask

VOCAB = 40


def build(attn: str, **changes) -> SmolLM3ForCausalLM:
    torch.manual_seed(0)
    config = SmolLM3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=256, **changes,
    )  # fmt: skip
    config._attn_implementation = attn
    return SmolLM3ForCausalLM(config)


def step(model, lengths: list[int], **kwargs):
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    output = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False, **kwargs)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_packed_row_equals_masked_sdpa(lengths):
    ours, reference = step(build("documents"), lengths), step(build("sdpa"), lengths)
    torch.testing.assert_close(ours[0], reference[0], atol=1e-5, rtol=1e-5)
    for name, gradient in reference[1].items():
        torch.testing.assert_close(ours[1][name], gradient, atol=1e-5, rtol=1e-5)


def test_packed_row_equals_documents_alone():
    model, lengths = build("documents").eval(), [7, 1, 12, 7]
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions).logits[0]
        alone = torch.cat([model(input_ids=part).logits[0] for part in ids.split(lengths, dim=1)])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing():
    plain, checkpointed = build("documents").train(), build("documents").train()
    checkpointed.gradient_checkpointing_enable()
    expected, found = step(plain, [9, 4, 9]), step(checkpointed, [9, 4, 9])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-6)


def test_padded_batch_and_generation_equal_sdpa():
    ours, reference = build("documents").eval(), build("sdpa").eval()
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


def test_serves_other_models_by_name():
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    reference = step(model, [5, 8, 5])[0]
    model.set_attn_implementation("documents")
    torch.testing.assert_close(step(model, [5, 8, 5])[0], reference, atol=1e-5, rtol=1e-5)


def test_no_mask_is_built_for_packed_rows():
    assert documents_mask(q_length=8, kv_length=8, batch_size=1) is None
    assert (
        documents_mask(q_length=1, kv_length=1, q_offset=0, attention_mask=torch.tensor([[True]]), batch_size=1) is None
    )
    padding = torch.tensor([[False, True, True]])
    built = documents_mask(q_length=3, kv_length=3, attention_mask=padding, batch_size=1)
    assert built[0, 0].tolist() == [[False, False, False], [False, True, False], [False, True, True]]


def test_document_lengths_by_hand():
    assert document_lengths(torch.tensor([[0, 1, 2, 0, 0, 1]])) == [3, 1, 2]
    assert document_lengths(torch.tensor([[0, 1, 2]])) is None


def test_refusals():
    model = build("documents")
    positions = torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(ValueError, match="batch of 2 rows; flatten the batch into one row"):
        model(input_ids=torch.ones(2, 4, dtype=torch.long), position_ids=positions.expand(2, -1), use_cache=False)
    model = build("documents", use_sliding_window=True, sliding_window=2)
    with pytest.raises(ValueError, match="no sliding window; use sdpa"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), position_ids=positions, use_cache=False)
