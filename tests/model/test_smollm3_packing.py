"""A packed row equals its documents run one by one, whatever the mode, the cache setting and a mask of ones."""

import pytest
import torch

LENGTHS = ((5, 3, 4), (2, 10))  # documents of the first and the second row
VARIANTS = {
    "default": {},
    "sliding": dict(use_sliding_window=True, sliding_window=3, no_rope_layer_interval=2),
    "yarn": dict(
        rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=8)
    ),
}


@pytest.fixture
def position_ids():
    """Return positions that restart at every document of LENGTHS, [2, 12]."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])


def documents(batch):
    """Cut [2, 12] into the documents of LENGTHS, each [1, n]."""
    return [part[None] for row, lengths in zip(batch, LENGTHS, strict=True) for part in row.split(lengths)]


@pytest.mark.parametrize("ones", [False, True], ids=["no_mask", "mask_of_ones"])
@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_logits(make_pair, tokens, position_ids, variant, attention, training, use_cache, ones):
    _, model = make_pair(attention, **VARIANTS[variant])
    model.train(training)
    mask = torch.ones_like(tokens) if ones else None
    with torch.no_grad():
        packed = model(tokens, position_ids=position_ids, attention_mask=mask, use_cache=use_cache).logits
        alone = [model(document).logits for document in documents(tokens)]
    for ours, expected in zip(documents(packed), alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_loss_and_gradients(make_pair, tokens, position_ids, variant, attention):
    _, packed = make_pair(attention, **VARIANTS[variant])
    _, unpacked = make_pair(attention, **VARIANTS[variant])
    # The first token of a document is nobody's next token: 24 - 5 documents are scored.
    labels, count = tokens.masked_fill(position_ids == 0, -100), torch.tensor(19)
    loss = packed.train()(tokens, position_ids=position_ids, labels=labels, num_items_in_batch=count).loss
    loss.backward()
    pairs = zip(documents(tokens), documents(labels), strict=True)
    losses = [unpacked.train()(ids, labels=wanted, num_items_in_batch=count).loss for ids, wanted in pairs]
    sum(losses).backward()

    torch.testing.assert_close(loss, sum(losses), rtol=1e-5, atol=1e-5)
    for one, other in zip(packed.parameters(), unpacked.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_later_documents_feel_earlier_ones_when_positions_run_on(make_pair, tokens, position_ids):
    # The control: without restarts the same row is one document.
    _, model = make_pair()
    difference = (model(tokens).logits - model(tokens, position_ids=position_ids).logits).abs()
    assert difference[0, :5].max() < 1e-5
    assert difference[0, 5:].max() > 1e-2


def test_compiled_model_isolates_too(make_pair, tokens, position_ids):
    _, model = make_pair()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        actual, expected = (run(tokens, position_ids=position_ids).logits for run in (compiled, model))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_packing_with_padding_is_refused(make_pair, tokens, position_ids):
    _, model = make_pair()
    mask = torch.ones_like(tokens)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="attention_mask has padding: the documents would see each other; leave"):
        model(tokens, position_ids=position_ids, attention_mask=mask)


def test_packed_rows_in_a_flash_batch_are_refused(make_pair, tokens, position_ids):
    _, model = make_pair()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="in a batch of 1 row only, got 2: they would see each other; pass cu_seq_len"):
        model(tokens, position_ids=position_ids)
