"""What transformers' own suite asks of every model, asked of ours: embeddings, tying, outputs, training, saving."""

import copy
import inspect

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from transformers.models.smollm3 import modeling_smollm3 as stock_models

import smolpost.model as our_models
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM

CLASSES = [
    "SmolLM3Model",
    "SmolLM3ForCausalLM",
    "SmolLM3ForSequenceClassification",
    "SmolLM3ForTokenClassification",
    "SmolLM3ForQuestionAnswering",
]
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def first(model, tokens, **options):
    """A model's first output, whatever its class."""
    return model(tokens, **options)[0]


# ---------------------------------------------------------------- embeddings and tying


@pytest.mark.parametrize("name", CLASSES)
def test_embeddings_are_found_and_replaced(make_pair, name):
    _, ours = make_pair(name=name)
    other = torch.nn.Embedding(10, 32)
    ours.set_input_embeddings(other)
    assert ours.get_input_embeddings() is other
    head = ours.get_output_embeddings()
    assert (head is ours.lm_head) if name == "SmolLM3ForCausalLM" else head is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("size", "multiple", "rows"), [(71, None, 71), (50, None, 50), (61, 64, 64)])
def test_resized_embeddings_keep_what_they_had(make_pair, tokens, tied, size, multiple, rows):
    stock, ours = make_pair(tie_word_embeddings=tied)
    before, tokens = ours(tokens.clamp(max=49)).logits, tokens.clamp(max=49)
    for model in (stock, ours):
        model.resize_token_embeddings(size, pad_to_multiple_of=multiple, mean_resizing=False)
    assert ours.config.vocab_size == rows == stock.config.vocab_size
    assert ours.lm_head.weight.shape == ours.model.embed_tokens.weight.shape == (rows, 32)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied
    kept = min(rows, 61)
    torch.testing.assert_close(ours(tokens).logits[..., :kept], before[..., :kept], **NEAR)


def test_a_resized_model_is_saved_and_read_with_its_size(tmp_path, make_pair, tokens):
    _, ours = make_pair()
    ours.resize_token_embeddings(70)
    ours.save_pretrained(tmp_path)
    again = SmolLM3ForCausalLM.from_pretrained(tmp_path)
    assert again.config.vocab_size == 70
    torch.testing.assert_close(again(tokens).logits, ours(tokens).logits, **NEAR)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_the_embedding_before_and_after_saving(tmp_path, make_pair, tied):
    _, ours = make_pair(tie_word_embeddings=tied)
    ours.save_pretrained(tmp_path)
    again = SmolLM3ForCausalLM.from_pretrained(tmp_path)
    for model in (ours, again, copy.deepcopy(ours)):
        shares = model.lm_head.weight is model.model.embed_tokens.weight
        assert shares is tied
        assert ("lm_head.weight" in dict(model.named_parameters())) is not tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied


def test_a_tied_head_learns_with_the_embedding(make_pair, tokens):
    """One step moves both, and the gradient is the sum of the two of an untied twin."""
    _, ours = make_pair()
    _, untied = make_pair(tie_word_embeddings=False)
    untied.load_state_dict(ours.state_dict())
    for model in (ours, untied):
        model(tokens, labels=tokens).loss.backward()
    both = untied.lm_head.weight.grad + untied.model.embed_tokens.weight.grad
    torch.testing.assert_close(ours.lm_head.weight.grad[1:], both[1:], **NEAR)
    assert ours.lm_head.weight.grad is ours.model.embed_tokens.weight.grad


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("name", CLASSES)
def test_forward_takes_what_stock_takes(name):
    ours, stock = (inspect.signature(getattr(models, name).forward) for models in (our_models, stock_models))
    assert list(ours.parameters) == list(stock.parameters)
    assert list(ours.parameters)[1] == "input_ids"


@pytest.mark.parametrize("name", CLASSES)
def test_hidden_states_and_attentions_of_every_layer(make_pair, tokens, name):
    stock, ours = make_pair("eager", name)
    found, expected = (model(tokens, output_hidden_states=True, output_attentions=True) for model in (ours, stock))
    assert len(found.hidden_states) == 5 and len(found.attentions) == 4
    assert {state.shape for state in found.hidden_states} == {(2, 12, 32)}
    assert {weights.shape for weights in found.attentions} == {(2, 4, 12, 12)}
    for key in ("hidden_states", "attentions"):
        for one, other in zip(found[key], expected[key], strict=True):
            torch.testing.assert_close(one, other, **NEAR)
    for weights in found.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12), **NEAR)
    # The config may ask for them, too.
    ours.config.output_hidden_states = True
    assert len(ours(tokens).hidden_states) == 5


def test_gradients_of_intermediate_outputs_are_kept(make_pair, tokens):
    _, ours = make_pair("eager")
    outputs = ours(tokens, output_hidden_states=True, output_attentions=True)
    for kept in (outputs.hidden_states[0], outputs.attentions[0]):
        kept.retain_grad()
    outputs.logits.flatten()[0].backward()
    assert outputs.hidden_states[0].grad is not None and outputs.attentions[0].grad is not None


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("attention", ["eager", "packed"])
def test_attention_implementations_agree_on_padded_rows(make_pair, tokens, name, attention):
    _, ours = make_pair(name=name)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    expected = first(ours, tokens, attention_mask=mask)
    ours.set_attn_implementation(attention)
    found = first(ours, tokens, attention_mask=mask)
    if name == "SmolLM3ForSequenceClassification":
        torch.testing.assert_close(found, expected, **NEAR)
    else:
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **NEAR)


def test_a_mask_of_ones_is_no_mask(make_pair, tokens):
    _, ours = make_pair()
    torch.testing.assert_close(ours(tokens, attention_mask=torch.ones_like(tokens)).logits, ours(tokens).logits)


def test_left_padding_changes_nothing_with_its_positions(make_pair, tokens):
    _, ours = make_pair()
    padded = torch.cat((torch.zeros(2, 5, dtype=torch.long), tokens), dim=1)
    mask = (torch.arange(17) >= 5).long().expand(2, -1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = ours(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(found, ours(tokens).logits, **NEAR)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_stretched_rope_changes_long_rows(tiny, kind):
    """Dynamic scaling begins beyond the trained context; the others act at once."""

    def outputs(**rope):
        torch.manual_seed(0)
        model = our_models.SmolLM3Model(SmolLM3Config(**tiny, initializer_range=0.5, **rope)).eval()
        rows = torch.arange(100)[None] % 60
        return model(rows[:, :10]).last_hidden_state, model(rows).last_hidden_state

    plain, stretched = outputs(), outputs(rope_scaling={"type": kind, "factor": 10.0})
    assert torch.allclose(plain[0], stretched[0], atol=1e-5) is (kind == "dynamic")
    assert not torch.allclose(plain[1], stretched[1], atol=1e-5)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", CLASSES[1:])
def test_every_parameter_gets_a_gradient_and_a_step_lowers_the_loss(make_pair, tokens, name):
    _, ours = make_pair(name=name)
    targets = {
        "SmolLM3ForCausalLM": {"labels": tokens},
        "SmolLM3ForSequenceClassification": {"labels": torch.tensor([0, 1])},
        "SmolLM3ForTokenClassification": {"labels": tokens % 2},
        "SmolLM3ForQuestionAnswering": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    }[name]
    ours.train()
    loss = ours(tokens, **targets).loss
    loss.backward()
    assert [n for n, parameter in ours.named_parameters() if parameter.grad is None] == []
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter -= 0.01 * parameter.grad
    assert ours(tokens, **targets).loss < loss


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
def test_problems_of_a_sequence_classifier(make_pair, tokens, problem):
    stock, ours = make_pair(name="SmolLM3ForSequenceClassification", problem_type=problem, num_labels=3)
    labels = {"single_label_classification": torch.tensor([0, 2])}.get(problem, torch.rand(2, 3))
    torch.testing.assert_close(ours(tokens, labels=labels).loss, stock(tokens, labels=labels).loss, **NEAR)


def test_checkpointing_of_activations_goes_on_and_off(make_pair):
    _, ours = make_pair()
    assert not ours.is_gradient_checkpointing
    ours.activation_checkpointing_enable()
    assert ours.is_gradient_checkpointing and all(layer.gradient_checkpointing for layer in ours.model.layers)
    ours.gradient_checkpointing_disable()
    assert not ours.is_gradient_checkpointing


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_model_is_the_same_in_every_dtype_and_shard(tmp_path, make_pair, tokens, name, dtype):
    _, ours = make_pair(name=name)
    ours.to(dtype).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, info = type(ours).from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert again.dtype == dtype == ours.dtype and not again.training
    for key, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    if dtype == torch.float32:  # `to` rounds RoPE's frequencies, too; loading does not
        assert torch.equal(first(again, tokens), first(ours, tokens))


def test_weights_that_a_file_lacks_are_initialised_as_those_of_a_new_model(tmp_path, make_pair):
    """A classifier from a causal LM: the body is read, its head is new and of the config's spread."""
    _, ours = make_pair()
    ours.save_pretrained(tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=7, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"} and not info["unexpected_keys"]
    assert torch.equal(model.model.layers[2].mlp.up_proj.weight, ours.model.layers[2].mlp.up_proj.weight)
    assert model.score.weight.shape == (7, 32) and 0.01 < model.score.weight.std() < 0.03


def test_rotary_frequencies_come_back_from_meta(tmp_path, make_pair):
    """They are buffers of no file; loading builds the model without memory first."""
    _, ours = make_pair(rope_parameters={"rope_type": "yarn", "rope_theta": 5e4, "factor": 2.0})
    ours.save_pretrained(tmp_path)
    again = SmolLM3ForCausalLM.from_pretrained(tmp_path)
    for name, buffer in ours.named_buffers():
        assert torch.equal(dict(again.named_buffers())[name], buffer)


def test_copies_and_pickles_are_the_model(tmp_path, make_pair, tokens):
    _, ours = make_pair()
    torch.save(ours, tmp_path / "model.pt")
    for again in (copy.deepcopy(ours), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(again(tokens).logits, ours(tokens).logits)
        assert again.config.to_dict() == ours.config.to_dict()


def test_outputs_of_one_model_do_not_change_from_call_to_call(make_pair, tokens):
    _, ours = make_pair()
    assert torch.equal(ours(tokens).logits, ours(tokens).logits)
    ours.config.attention_dropout = 0.5  # training's alone
    assert torch.equal(ours(tokens).logits, ours(tokens).logits)


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize(
    ("method", "use_cache"),
    [("greedy", True), ("greedy", False), ("beams", True), ("beams", False), ("assisted", True)],
)
def test_every_way_to_generate_gives_stocks_tokens(make_pair, tokens, use_cache, method):
    stock, ours = make_pair()
    found = []
    for model in (stock, ours):
        rows = tokens[:1] if method == "assisted" else tokens
        options = {"greedy": {}, "beams": {"num_beams": 3}, "assisted": {"assistant_model": model}}[method]
        found.append(
            model.generate(rows, max_new_tokens=8, do_sample=False, use_cache=use_cache, pad_token_id=0, **options)
        )
    assert found[0].tolist() == found[1].tolist()


def test_generation_returns_what_it_is_asked_for(make_pair, tokens):
    stock, ours = make_pair("eager")
    options = dict(
        max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True,
        output_logits=True, output_hidden_states=True, output_attentions=True, pad_token_id=0,
    )  # fmt: skip
    found, expected = (model.generate(tokens, **options) for model in (ours, stock))
    assert len(found.scores) == len(found.hidden_states) == len(found.attentions) == 3
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, **NEAR)
    assert [part.shape for part in found.attentions[1]] == [part.shape for part in expected.attentions[1]]


def test_generation_goes_on_from_embeddings_and_from_a_cache(make_pair, tokens):
    _, ours = make_pair()
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = ours.generate(tokens, **options)
    embedded = ours.generate(inputs_embeds=ours.get_input_embeddings()(tokens), **options)
    assert embedded.tolist() == expected[:, 12:].tolist()
    half = ours.generate(tokens, **options | dict(max_new_tokens=3, min_new_tokens=3), return_dict_in_generate=True)
    rest = dict(max_new_tokens=3, min_new_tokens=3, past_key_values=half.past_key_values)
    assert ours.generate(half.sequences, **options | rest).tolist() == expected.tolist()
