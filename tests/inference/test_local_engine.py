"""The engine in this process: replies and log-probabilities are the model's own, one by one or in a batch."""

import json
import re

import pytest
import torch

from smolpost.errors import UserError
from smolpost.inference.generation import stop_token_ids
from smolpost.inference.local import LocalEngine
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.model.loading import load_for_inference

TEXTS = ["ab", "a longer prompt, with words", "c?"]


@pytest.fixture
def engine(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 2.5  # so that not every reply is cut
    return LocalEngine(model, tokenizer)


@pytest.fixture
def prompts(tokenizer):
    return [tokenizer.encode(text) for text in TEXTS]


def reference(engine, prompt, most):
    """(token ids of the reply, whether it stopped) by transformers' generate on the prompt alone."""
    stops = stop_token_ids(engine.model.generation_config)
    output = engine.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=most,
        do_sample=False,
        pad_token_id=stops[0],
    )
    reply = output[0, len(prompt) :].tolist()
    return reply, reply[-1] in stops


def test_greedy_replies_are_transformers_replies_to_each_prompt_alone(engine, prompts):
    replies = engine.generate(prompts, max_new_tokens=40)
    stopped = []
    for prompt, [reply] in zip(prompts, replies, strict=True):
        ids, ended = reference(engine, prompt, 40)
        assert reply.num_tokens == len(ids) and reply.cut is not ended
        shown = engine.tokenizer.decode([i for i in ids if i not in engine.stop_tokens])
        assert reply.text == shown
        assert engine.generate([prompt], max_new_tokens=40) == [[reply]]
        stopped.append(ended)
    assert set(stopped) == {True, False}  # else one of the two ends was not seen


@pytest.fixture
def endless(model, tokenizer, tmp_path):
    """Folder of a checkpoint that stops at the end of a text only, while its template ends turns with another token."""
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    end = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    return tmp_path


def test_a_checkpoint_that_does_not_stop_is_scored_as_it_is_and_told_of(endless, prompts, capsys):
    """What stock `generate` runs past ends no reply here; the remedy that the line names makes both stop."""
    model, tokenizer = load_for_inference(endless)
    likeliest = model(torch.tensor([prompts[0]])).logits[0, -1].argmax()
    with torch.no_grad():  # the model says nothing but the end of a turn
        model.lm_head.weight[tokenizer.eos_token_id] = 2 * model.lm_head.weight[likeliest]
    [[reply]] = LocalEngine(model, tokenizer).generate(prompts[:1], max_new_tokens=9)
    assert reply.num_tokens == 9 and reply.cut
    [line] = capsys.readouterr().out.splitlines()
    text_end, turn_end = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|im_end|>"])
    assert line.startswith(f"{endless} stops at <|end_of_text|> and not at <|im_end|>, which ends a reply in its chat ")
    remedy = re.search(r"set eos_token_id to (\[.*\]) in its generation_config.json", line).group(1)
    assert json.loads(remedy) == [turn_end, text_end]
    (endless / "generation_config.json").write_text(f'{{"eos_token_id": {remedy}}}')
    model.generation_config = load_for_inference(endless)[0].generation_config
    [[reply]] = LocalEngine(model, tokenizer).generate(prompts[:1], max_new_tokens=9)
    assert reply.num_tokens == 1 and not reply.cut
    assert capsys.readouterr().out == ""


def test_a_tokenizer_without_a_template_is_told_nothing(endless, capsys):
    model, tokenizer = load_for_inference(endless)
    tokenizer.chat_template = None
    LocalEngine(model, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}.{% endfor %}"  # ends a turn with plain text
    LocalEngine(model, tokenizer)
    assert capsys.readouterr().out == ""


def test_samples_differ_and_come_back_with_the_seed(engine, prompts):
    options = dict(max_new_tokens=12, temperature=1.0, num_samples=4)
    replies = engine.generate(prompts, **options, seed=5)
    assert [len(samples) for samples in replies] == [4, 4, 4]
    assert all(len({reply.text for reply in samples}) == 4 for samples in replies)
    assert replies == engine.generate(prompts, **options, seed=5) != engine.generate(prompts, **options, seed=6)


def test_samples_belong_to_their_prompts(engine, prompts):
    """Of a temperature near 0 all samples are the greedy reply, so a mixed up order shows."""
    greedy = engine.generate(prompts, max_new_tokens=12)
    sampled = engine.generate(prompts, max_new_tokens=12, temperature=1e-4, num_samples=3)
    assert sampled == [[reply] * 3 for [reply] in greedy]
    assert len({reply.text for [reply] in greedy}) == 3


def test_logps_are_the_log_softmax_of_the_full_logits(engine, prompts):
    places = [[1], [3, 4, 9, len(prompts[1]) - 1], []]
    found = engine.logps(list(zip(prompts, places, strict=True)))
    for ids, wanted, logps in zip(prompts, places, found, strict=True):
        with torch.no_grad():
            full = engine.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert logps == pytest.approx([full[place - 1, ids[place]].item() for place in wanted], abs=1e-5)


def test_our_own_model_gives_the_same_logps(engine, model, tokenizer, prompts):
    """Checkpoints load as this class, whose attention takes packed rows."""
    own = SmolLM3ForCausalLM(SmolLM3Config(**model.config.to_dict()))
    own.load_state_dict(model.state_dict())
    sequences = [(ids, list(range(1, len(ids)))) for ids in prompts]
    for ours, theirs in zip(LocalEngine(own, tokenizer).logps(sequences), engine.logps(sequences), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_no_place_no_logps(engine, prompts):
    assert engine.logps([(prompts[0], [])]) == [[]]


def test_training_mode_comes_back(engine, prompts):
    engine.model.train()
    engine.logps([(prompts[0], [1])])
    engine.generate(prompts[:1], max_new_tokens=2)
    assert engine.model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(model, tokenizer, value):
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(
        UserError, match=r"model's model.norm.weight holds NaN or infinite numbers; train it again"
    ) as told:
        LocalEngine(model, tokenizer)
    assert "\n" not in str(told.value)


def test_activations_that_overflow_are_refused(engine, prompts):
    with torch.no_grad():
        engine.model.model.norm.weight.fill_(3e38)
    with pytest.raises(UserError, match="a log-probability of the evaluated model is NaN or infinite") as told:
        engine.logps([(prompts[0], [1])])
    assert "\n" not in str(told.value)
