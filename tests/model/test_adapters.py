"""Adapters are read whole, and a merge of them moves no logit: embeddings that the head shares, too."""

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

from smolpost.errors import UserError
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.model.adapters import attach, merge
from smolpost.model.loading import load_model
from tests.model.conftest import TINY

TOKENS = torch.arange(60)[None]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    """A checkpoint's folder and whether its head is its embedding."""
    torch.manual_seed(0)
    model = SmolLM3ForCausalLM(SmolLM3Config(**TINY, tie_word_embeddings=request.param))
    for parameter in model.parameters():  # as large as a trained one's: logits that differ are seen
        parameter.data.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder, request.param


def adapter(folder, base, **settings):
    """Save an adapter with random values; returns its folder and the logits that peft gives with it."""
    torch.manual_seed(1)
    model = get_peft_model(load_model(base), LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder, PeftModel.from_pretrained(load_model(base), folder).eval()(input_ids=TOKENS).logits


def attached(base, folder, change=lambda tensors: tensors):
    tensors = change(load_file(folder / "adapter_model.safetensors"))
    return attach(load_model(base), PeftConfig.from_pretrained(folder), tensors, "adapter")


BOTH = ["embed_tokens", "lm_head"]
STAYS_TIED = {
    "projections": dict(target_modules=["q_proj", "down_proj"]),
    "all linear": dict(target_modules="all-linear"),
    "tied adapters": dict(target_modules=BOTH, ensure_weight_tying=True),
    "tied copies": dict(target_modules=["q_proj"], modules_to_save=BOTH, ensure_weight_tying=True),
    "single tokens": dict(target_modules=["q_proj"], trainable_token_indices=[3, 5, 17]),
    "dora": dict(target_modules=["q_proj"], use_dora=True),
}
UNTIES = {
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "both": dict(target_modules=BOTH),
    "copied head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "copied embedding": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "both copied": dict(target_modules=["q_proj"], modules_to_save=BOTH),
}


@pytest.mark.filterwarnings("ignore")  # peft's, of tied weights
@pytest.mark.parametrize("case", [*STAYS_TIED, *UNTIES])
def test_the_merged_model_is_the_adapted_one_and_so_is_its_file(base, case, tmp_path):
    start, tied = base
    settings = (STAYS_TIED | UNTIES)[case]
    folder, expected = adapter(tmp_path / "adapter", start, **settings)
    model = merge(attached(start, folder), "adapter")
    torch.testing.assert_close(model(input_ids=TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    shares = model.lm_head.weight is model.model.embed_tokens.weight
    assert shares == model.config.tie_word_embeddings == (tied and case in STAYS_TIED)
    model.save_pretrained(tmp_path / "merged")
    again = load_model(tmp_path / "merged")
    torch.testing.assert_close(again(input_ids=TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_merge_that_moves_logits_is_caught(base, tmp_path, monkeypatch):
    """Peft's own merge of a tied head adds the adapter to the embedding, too: that is what it is without `_untie`."""
    start, tied = base
    folder, _ = adapter(tmp_path / "adapter", start, target_modules=["lm_head"])
    monkeypatch.setattr("smolpost.model.adapters._untie", lambda model: None)
    if not tied:
        merge(attached(start, folder), "adapter")
        return
    with pytest.raises(UserError, match=r"adapter: merged into its weights, the model's logits move by \d"):
        merge(attached(start, folder), "adapter")


@pytest.mark.parametrize("wrong", [lambda weight: weight.mul_(1.001), lambda weight: weight.fill_(float("nan"))])
def test_weights_that_are_slightly_wrong_after_the_merge_are_caught(base, tmp_path, monkeypatch, wrong):
    folder, _ = adapter(tmp_path / "adapter", base[0], target_modules=["q_proj"])
    adapted = attached(base[0], folder)
    right = adapted.merge_and_unload

    def spoiled():
        model = right()
        wrong(model.model.layers[0].mlp.down_proj.weight)
        return model

    monkeypatch.setattr(adapted, "merge_and_unload", spoiled)
    with pytest.raises(UserError, match="logits move by"):
        merge(adapted, "adapter")


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {n: v for n, v in t.items() if n != A},
            r"lacks tensor .*layers.0.*lora_A.default.weight \(1 such\)",
        ),
        (
            lambda t: t | {A.replace("layers.0", "layers.9"): t[A]},
            r"holds tensor .*layers.9.*, so it is not an adapter",
        ),
        (lambda t: {n.replace(".model.layers", "._orig_mod.model.layers"): v for n, v in t.items()}, "lacks tensor"),
        (lambda t: t | {A: t[A][:, :3]}, r"is not an adapter of .*size mismatch for .*layers.0.*\[4, 3\].*\[4, 32\]"),
    ],
)
def test_an_adapter_of_another_model_is_refused_with_its_first_tensor(base, tmp_path, change, message):
    """peft itself merges what it finds, and nothing where it finds nothing."""
    folder, _ = adapter(tmp_path / "adapter", base[0], target_modules=["q_proj"])
    with pytest.raises(UserError, match=message) as caught:
        attached(base[0], folder, change)
    assert "\n" not in str(caught.value)


def test_targets_that_the_base_does_not_have_are_the_cause_that_is_named(base, tmp_path):
    folder, _ = adapter(tmp_path / "adapter", base[0], target_modules=["q_proj"])
    config = PeftConfig.from_pretrained(folder)
    config.target_modules = {"qkv_proj"}
    with pytest.raises(UserError, match=f"adapter is not an adapter of {base[0]}: Target modules .*qkv_proj"):
        attach(load_model(base[0]), config, {}, "adapter")


def test_prompts_are_no_weights(base):
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="peft_type=PROMPT_TUNING has no weights to merge"):
        attach(load_model(base[0]), config, {}, "adapter")
