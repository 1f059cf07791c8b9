"""Our SmolLM3 against transformers' own, with the same weights: fp32, tolerance 1e-5."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config as StockConfig
from transformers.models.smollm3.modeling_smollm3 import SmolLM3ForCausalLM as StockForCausalLM

from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM

VARIANTS = {
    "default": {},
    "untied": dict(tie_word_embeddings=False),
    "nope_every_second": dict(no_rope_layer_interval=2),
    "nope_explicit": dict(no_rope_layers=[0, 1, 1, 0]),
    "rope_everywhere": dict(no_rope_layers=[1, 1, 1, 1, 0]),
    "yarn": dict(
        rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=8)
    ),
    "yarn_legacy": dict(
        rope_theta=5e4, rope_scaling=dict(type="yarn", factor=2.0, original_max_position_embeddings=8, beta_fast=4)
    ),
    "rope_dynamic": dict(
        max_position_embeddings=8, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    ),
    "sliding": dict(use_sliding_window=True, sliding_window=3, no_rope_layer_interval=2),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "multi_head": dict(num_key_value_heads=4),
    "multi_head_by_none": dict(num_key_value_heads=None),
    "multi_query": dict(num_key_value_heads=1),
    "own_head_size": dict(head_dim=12),
    "gelu": dict(hidden_act="gelu"),
}


def assert_close(ours, stock):
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_hidden_states_and_every_gradient(make_pair, tokens, variant, attention):
    stock, ours = make_pair(attention, **VARIANTS[variant])
    labels = tokens.masked_fill(torch.arange(12) < 3, -100)
    outputs = []
    for model in (stock, ours):
        output = model.train()(tokens, labels=labels, output_hidden_states=True)
        output.loss.backward()
        outputs.append(output)
    expected, actual = outputs

    assert_close(actual.logits, expected.logits)
    assert_close(actual.loss, expected.loss)
    assert len(actual.hidden_states) == 5
    assert_close(actual.hidden_states, expected.hidden_states)
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[name])


def test_attentions_are_the_eager_probabilities(make_pair, tokens):
    stock, ours = make_pair("eager")
    actual = ours(tokens, output_attentions=True).attentions
    assert_close(actual, stock(tokens, output_attentions=True).attentions)
    assert actual[0].shape == (2, 4, 12, 12)
    assert_close(actual[3].sum(-1), torch.ones(2, 4, 12))


def test_bfloat16_rounds_where_stock_rounds(make_pair, tokens):
    stock, ours = make_pair()
    assert torch.equal(ours.bfloat16()(tokens).logits, stock.bfloat16()(tokens).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_batch(make_pair, tokens, attention, side):
    stock, ours = make_pair(attention)
    mask = torch.ones_like(tokens)
    mask[1, slice(0, 4) if side == "left" else slice(8, 12)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    actual = ours(tokens, attention_mask=mask, position_ids=positions).logits
    assert_close(actual, stock(tokens, attention_mask=mask, position_ids=positions).logits)
    alone = ours(tokens[1:, mask[1].bool()]).logits[0]
    assert_close(actual[1, mask[1].bool()], alone)


def test_input_embeddings_replace_input_ids(make_pair, tokens):
    _, ours = make_pair()
    assert_close(ours(inputs_embeds=ours.get_input_embeddings()(tokens)).logits, ours(tokens).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds must be given, got neither"):
        ours()


def test_dropout_draws_as_stock_does(make_pair, tokens):
    stock, ours = make_pair("eager", attention_dropout=0.5)
    logits = []
    for model in (stock, ours):
        torch.manual_seed(3)
        logits.append(model.train()(tokens).logits)
    assert_close(logits[1], logits[0])
    assert not torch.allclose(logits[1], ours.eval()(tokens).logits)


def test_loss_divides_by_num_items_in_batch(make_pair, tokens):
    stock, ours = make_pair()
    actual = ours(tokens, labels=tokens, num_items_in_batch=torch.tensor(5)).loss
    assert_close(actual, stock(tokens, labels=tokens, num_items_in_batch=torch.tensor(5)).loss)
    # 11 positions of 2 rows have a next token.
    assert_close(actual, ours(tokens, labels=tokens).loss * 22 / 5)


@pytest.mark.parametrize(
    "keep",
    [0, 1, 3, torch.tensor([0, 5]), torch.tensor([[0, 5], [2, 11]]), torch.arange(24).view(2, 12) % 5 == 0],
    ids=["all", "last", "last_3", "indices", "indices_per_row", "mask"],
)
def test_logits_to_keep(make_pair, tokens, keep):
    stock, ours = make_pair()
    assert_close(ours(tokens, logits_to_keep=keep).logits, stock(tokens, logits_to_keep=keep).logits)


def test_return_dict_false_gives_stock_tuple(make_pair, tokens):
    stock, ours = make_pair()
    actual, expected = (model(tokens, labels=tokens, use_cache=False, return_dict=False) for model in (ours, stock))
    assert_close(actual, expected)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("SmolLM3ForSequenceClassification", dict(labels=torch.tensor([0, 2]))),
        ("SmolLM3ForTokenClassification", dict(labels=torch.arange(24).view(2, 12) % 3)),
        (
            "SmolLM3ForQuestionAnswering",
            dict(start_positions=torch.tensor([1, 4]), end_positions=torch.tensor([2, 9])),
        ),
    ],
)
def test_heads(make_pair, tokens, name, targets):
    stock, ours = make_pair(name=name, num_labels=3)
    tokens = tokens.clone()
    tokens[1, 9:] = 0  # padding, which moves the row's last token
    mask = (tokens != 0).long()
    # Not in training mode: the token head has dropout.
    expected, actual = (model(tokens, attention_mask=mask, **targets) for model in (stock, ours))
    assert set(actual) == set(expected)
    for key in set(expected) - {"past_key_values"}:
        assert_close(actual[key], expected[key])
    expected.loss.backward()
    actual.loss.backward()
    gradients = {parameter_name: parameter.grad for parameter_name, parameter in stock.named_parameters()}
    for parameter_name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[parameter_name])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(make_pair, tokens, use_reentrant):
    _, plain = make_pair("sdpa")
    _, checkpointed = make_pair("sdpa")
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        checkpointed.enable_input_require_grads()
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None].expand(2, -1)
    losses = []
    for model in (plain, checkpointed):
        loss = model.train()(tokens, labels=tokens, position_ids=positions).loss
        loss.backward()
        losses.append(loss)
    assert_close(losses[1], losses[0])
    for one, other in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        assert_close(one.grad, other.grad)


def test_every_keyword_reaches_the_attention_function(make_pair, tokens):
    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, attention_mask, kwargs))
        return query.transpose(1, 2), None

    AttentionInterface.register("smolpost_test_spy", spy)
    _, ours = make_pair("smolpost_test_spy")
    cu_seqlens = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    positions = torch.arange(12)[None]
    ours(tokens, position_ids=positions, cu_seq_lens_q=cu_seqlens, max_length_q=12, anything="else")

    assert [layer for layer, _, _ in seen] == [0, 1, 2, 3]
    for _, mask, kwargs in seen:
        assert mask is None
        assert kwargs["cu_seq_lens_q"] is cu_seqlens
        assert kwargs["position_ids"] is positions
        assert (kwargs["max_length_q"], kwargs["anything"], kwargs["dropout"]) == (12, "else", 0.0)


@pytest.mark.parametrize("fields", [{}, dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)])
def test_initial_weights(tiny, fields):
    torch.manual_seed(0)
    model = SmolLM3ForCausalLM(
        SmolLM3Config(**{**tiny, "hidden_size": 128, "vocab_size": 512, "initializer_range": 0.05, **fields})
    )
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert abs(parameter.mean()) < 0.002, name
            assert abs(parameter.std() / 0.05 - 1) < 0.05, name
    assert (model.model.embed_tokens.weight[0] == 0).all()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_initial_weights_of_a_seed_are_stock_ones(tiny):
    states = []
    for config_class, model_class in ((StockConfig, StockForCausalLM), (SmolLM3Config, SmolLM3ForCausalLM)):
        torch.manual_seed(7)
        states.append(model_class(config_class(**tiny)).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[1][name], states[0][name]) for name in states[0])


def test_plans_and_flags_are_stock_ones(make_pair):
    stock, ours = make_pair()
    for name in ("_tp_plan", "_pp_plan", "_fsdp_plan", "_no_split_modules", "_tied_weights_keys", "_supports_sdpa"):
        assert getattr(ours, name) == getattr(stock, name), name
    for name in ("base_model_tp_plan", "base_model_pp_plan", "base_model_fsdp_plan", "keys_to_ignore_at_inference"):
        assert getattr(ours.config, name) == getattr(stock.config, name), name
    for name in ("_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"):
        assert getattr(ours, name) == getattr(stock, name), name
