"""Merges of tiny SmolLM3 checkpoints: hand-computed means, refusals by their text, and what the result folder holds."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smolpost.errors import UserError
from smolpost.merging.checkpoint import CHUNK
from smolpost.merging.linear import merge
from smolpost.merging.shards import write_mean
from tests.merging.checkpoints import (
    TEMPLATE,
    WORDS,
    edit_config,
    edit_weights,
    mean,
    save_checkpoint,
    save_tokenizer,
    weights,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three fp32 checkpoints a, b, c; a and b share a template, c has its own. Tests copy before they edit."""
    root = tmp_path_factory.mktemp("trained")
    templates = {"a": TEMPLATE, "b": TEMPLATE, "c": "{{ 'c' }}"}
    return {n: save_checkpoint(root / n, i, template=templates[n]) for i, n in enumerate("abc")}


@pytest.fixture
def edited(trained, tmp_path):
    """A copy of b to damage."""
    return Path(shutil.copytree(trained["b"], tmp_path / "edited"))


# ---------------------------------------------------------------- what is written


def test_soup_and_linear_merge_in_one_pass_match_torch(trained, tmp_path):
    a, b, c = trained["a"], trained["b"], trained["c"]
    # 0.9 x mean(a, b) + 0.1 x c, flattened.
    inputs = [("a", a, 0.45), ("b", b, 0.45), ("c", c, 0.1)]
    report = merge(inputs, "a", tmp_path / "out", "float32", verification="full", allow_template_change=True)
    soup = mean([(a, 0.5), (b, 0.5)], torch.float32)
    expected = {n: 0.9 * soup[n] + 0.1 * t for n, t in weights(c).items()}
    merged = weights(tmp_path / "out")
    assert merged.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(merged[name], expected[name], rtol=0, atol=2.4e-7)  # one fp32 unit at 2
    exact = mean([(a, 0.45), (b, 0.45), (c, 0.1)])
    assert report["max_abs_diff"] == max((merged[n].double() - exact[n]).abs().max().item() for n in exact)
    assert report["max_abs_diff"] < 1e-7
    assert report["num_tensors"] == len(expected) == 2 + 4 * 9  # embedding, final norm; 7 matrices, 2 norms per layer
    assert report["num_parameters"] == sum(t.numel() for t in expected.values())
    assert report["inputs"] == {"a": 0.45, "b": 0.45, "c": 0.1}
    assert (report["base"], report["dtype"]) == ("a", "float32")


def test_bfloat16_is_rounded_once(trained, tmp_path):
    inputs = [("a", trained["a"], 0.45), ("b", trained["b"], 0.45), ("c", trained["c"], 0.1)]
    report = merge(inputs, "a", tmp_path / "out", "bfloat16", verification="full", allow_template_change=True)
    exact, merged = mean([(folder, weight) for _, folder, weight in inputs]), weights(tmp_path / "out")
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}
    equal = sum((merged[n] == exact[n].to(torch.bfloat16)).sum().item() for n in exact)
    assert report["correctly_rounded"] == equal / report["num_parameters"] > 0.999
    assert report["max_abs_diff"] < 2 * 2**-9  # half a bf16 unit below 2


def test_bfloat16_inputs_are_summed_in_fp32_for_a_float32_result(tmp_path):
    # Left to itself mergekit rounds the mean to the inputs' bf16 and then writes it as float32.
    a, b = (save_checkpoint(tmp_path / n, i, dtype=torch.bfloat16) for i, n in enumerate("ab"))
    merge([("a", a, 0.75), ("b", b, 0.25)], "b", tmp_path / "out", "float32")
    exact = mean([(a, 0.75), (b, 0.25)])
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), exact[name], rtol=0, atol=2.4e-7)


def test_soup_of_equal_checkpoints_is_the_identity(trained, edited, tmp_path):
    a = trained["a"]
    shutil.copytree(a, tmp_path / "again")
    report = merge([("x", a, 0.5), ("y", tmp_path / "again", 0.5)], "x", tmp_path / "out", "float32")
    assert report["max_abs_diff"] == 0
    assert report["correctly_rounded"] == 1
    torch.testing.assert_close(weights(tmp_path / "out"), weights(a), rtol=0, atol=0)


def test_one_folder_under_two_names_keeps_both_weights(trained, tmp_path):
    a, b = trained["a"], trained["b"]
    merge([("x", a, 0.25), ("y", a, 0.125), ("z", b, 0.625)], "y", tmp_path / "out", "float32")
    exact = mean([(a, 0.375), (b, 0.625)])
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), exact[name], rtol=0, atol=2.4e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_of_tied_untied_and_sharded_models_is_merged(tied, tmp_path):
    # A folder name with + and @, which mergekit would read as an adapter and a revision.
    a = save_checkpoint(tmp_path / "a+x@y z", 0, tie_word_embeddings=tied, shard="3KB", attention_bias=True)
    b = save_checkpoint(tmp_path / "b", 1, tie_word_embeddings=tied, attention_bias=True)
    assert len(list(a.glob("*.safetensors"))) > 1
    merge([("a", a, 0.5), ("b", b, 0.5)], "b", tmp_path / "out", "float32")
    merged = weights(tmp_path / "out")
    torch.testing.assert_close(merged, {n: t.float() for n, t in mean([(a, 0.5), (b, 0.5)]).items()}, rtol=0, atol=0)
    assert ("lm_head.weight" in merged) is not tied
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.3.self_attn.q_proj.bias"} <= merged.keys()


def test_a_tensor_longer_than_one_chunk_is_compared_to_its_end(tmp_path):
    sizes = {"vocab_size": CHUNK // 16 + 7}
    a, b = (save_checkpoint(tmp_path / n, i, **sizes) for i, n in enumerate("ab"))
    report = merge([("a", a, 0.5), ("b", b, 0.5)], "a", tmp_path / "out", "float32")
    assert report["num_parameters"] == sum(t.numel() for t in weights(a).values()) > CHUNK


def test_config_tokenizer_and_template_are_the_bases(trained, tmp_path):
    c = Path(shutil.copytree(trained["c"], tmp_path / "c"))
    edit_config(c, max_position_embeddings=131072)
    (c / "additional_chat_templates").mkdir()
    (c / "additional_chat_templates" / "tool.jinja").write_text("{{ 'tool' }}")
    (c / "README.md").write_text("not ours to copy")
    out = tmp_path / "out"
    out.mkdir()  # empty is as good as absent
    report = merge([("a", trained["a"], 0.9), ("c", c, 0.1)], "c", out, "bfloat16", allow_template_change=True)
    assert report["max_position_embeddings"] == {"a": 32768, "c": 131072}
    copied = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    for name in [*copied, "additional_chat_templates/tool.jinja"]:
        assert (out / name).read_bytes() == (c / name).read_bytes(), name
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (c, out))
    assert ours == {**theirs, "dtype": "bfloat16"}
    written = {"config.json", "model.safetensors", "merge_manifest.json", "README.md"}
    files = {*written, "additional_chat_templates", *copied}
    assert {file.name for file in out.iterdir()} == files
    modes = {stat.S_IMODE(file.stat().st_mode) for file in out.rglob("*") if file.is_file()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask
    assert not list(tmp_path.glob(".*"))  # the draft folder is gone


def test_old_spelling_of_config_fields_is_the_same_model(trained, edited, tmp_path):
    config = json.loads((edited / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    del config["no_rope_layers"], config["dtype"]
    (edited / "config.json").write_text(json.dumps({**config, "rope_theta": theta, "torch_dtype": "float32"}))
    merge([("a", trained["a"], 0.5), ("old", edited, 0.5)], "old", tmp_path / "out", "bfloat16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16"
    assert "dtype" not in written


STOCK_LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(loading.values()), loading
assert type(model).__module__ == "transformers.models.smollm3.modeling_smollm3", type(model)
tokenizer = AutoTokenizer.from_pretrained(folder)
assert tokenizer.convert_tokens_to_ids("<think>") == 10
assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
assert model(torch.arange(8)[None]).logits.isfinite().all()
assert not any(name.startswith(("smolpost", "mergekit")) for name in sys.modules)
"""

MERGE_WITH_REGISTERED_CLASSES = """
import sys
from pathlib import Path
from smolpost.model.register import register
register()
from smolpost.merging.linear import merge
a, b, out = map(Path, sys.argv[1:])
report = merge([("a", a, 0.5), ("b", b, 0.5)], "a", out, "float32")
assert report["num_tensors"] == 38, report
assert "mergekit" not in sys.modules  # seconds of imports
"""


def run_python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_loads_in_stock_transformers_and_registered_classes_change_nothing(trained, tmp_path):
    run_python(MERGE_WITH_REGISTERED_CLASSES, trained["a"], trained["b"], tmp_path / "out")
    run_python(STOCK_LOAD, tmp_path / "out")
    torch.testing.assert_close(
        weights(tmp_path / "out"),
        {n: t.float() for n, t in mean([(trained["a"], 0.5), (trained["b"], 0.5)]).items()},
        rtol=0,
        atol=0,
    )


# ---------------------------------------------------------------- what is refused


def refused(inputs, tmp_path, base="a", out="out", dtype="float32", **settings):
    """The one-line message of a refused merge, which wrote nothing."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        merge(inputs, base, tmp_path / out, dtype, **settings)
    assert sorted(tmp_path.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def refused_pair(trained, edited, tmp_path):
    return refused([("a", trained["a"], 0.5), ("b", edited, 0.5)], tmp_path)


def test_refuses_weights_that_do_not_sum_to_one(trained, tmp_path):
    inputs = [("a", trained["a"], 0.5), ("b", trained["b"], 0.4)]
    assert refused(inputs, tmp_path) == "merge weights a=0.5, b=0.4 sum to 0.9, not 1; divide each by their sum"
    assert "sum to nan, not 1" in refused([("a", trained["a"], float("nan"))], tmp_path)


def test_refuses_unknown_base_repeated_name_and_dtype(trained, tmp_path):
    inputs = [("a", trained["a"], 0.5), ("b", trained["b"], 0.5)]
    assert refused(inputs, tmp_path, base="z").startswith("merge base='z' is not among the inputs a, b; name the input")
    assert "not among the inputs (none)" in refused([], tmp_path)
    assert refused([inputs[0], inputs[0]], tmp_path) == "merge inputs name 'a' 2 times; add up its weights"
    message = refused(inputs, tmp_path, dtype="float64")
    assert message == "merge dtype='float64' is not known; choose one of float32, bfloat16, float16"
    message = refused(inputs, tmp_path, engine="theirs")
    assert message == "merge engine='theirs' is not known; choose one of ours, mergekit"
    assert "merge verification='none' is not known; choose one of sampled, full" in refused(
        inputs, tmp_path, verification="none"
    )


def test_refuses_a_dirty_output_folder(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00002.safetensors").touch()
    message = refused([("a", trained["a"], 1.0)], tmp_path)
    assert message == f"merge output {tmp_path / 'out'} exists and is not an empty folder; name another or empty it"


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}, "rope_parameters={'rope_theta': 2000000.0"),
        ({"no_rope_layers": [1, 1, 0, 1]}, "no_rope_layers=[1, 1, 1, 0] and [1, 1, 0, 1]"),
        ({"num_attention_heads": 2}, "num_attention_heads=4 and 2"),
        ({"num_hidden_layers": 5, "no_rope_layers": None, "layer_types": None}, "layer_types="),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=True and False"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-06 and 1e-05"),
        ({"hidden_act": "gelu"}, "hidden_act=silu and gelu"),
        ({"vocab_size": 41}, "vocab_size=40 and 41"),
        ({"architectures": ["SmolLM3ForTokenClassification"]}, "architectures=['SmolLM3ForCausalLM'] and ["),
    ],
)
def test_refuses_configs_that_give_the_weights_another_meaning(fields, values, trained, edited, tmp_path):
    edit_config(edited, **fields)
    message = refused_pair(trained, edited, tmp_path)
    assert message.startswith(f"merge inputs 'a' and 'b' differ in config.json: {values}")
    assert "; merge only checkpoints with the same architecture" in message


def test_refuses_rope_spelled_in_two_ways_that_differ(trained, edited, tmp_path):
    edit_config(edited, rope_theta=1e4)
    message = refused_pair(trained, edited, tmp_path)
    assert message.startswith("merge input 'b': rope_theta=10000.0 and rope_parameters.rope_theta=2000000.0 in ")


def test_an_unknown_field_is_refused_with_a_remedy_that_works(trained, edited, tmp_path):
    edit_config(edited, unsloth_fixed=True, tuned_by="someone")
    message = refused_pair(trained, edited, tmp_path)
    assert message.endswith("tuned_by=None and someone; merge only checkpoints with the "
    "same architecture, or delete tuned_by "
                            "if it is only a tool's note")  # fmt: skip
    file = edited / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "tuned_by"}))
    merge([("a", trained["a"], 0.5), ("b", edited, 0.5)], "a", tmp_path / "out", "float32")


def test_names_that_wrappers_changed_are_plain_in_the_result(trained, edited, tmp_path):
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in load_file(edited / "model.safetensors").items()}
    save_file(tensors, edited / "model.safetensors", metadata={"format": "pt"})
    inputs = [("a", trained["a"], 0.5), ("b", edited, 0.5)]
    message = refused(inputs, tmp_path, engine="mergekit")
    assert "mergekit does not know tensor _orig_mod.model." in message
    merge(inputs, "b", tmp_path / "out", "float32")
    merge([inputs[0], ("b", trained["b"], 0.5)], "b", tmp_path / "other", "float32")
    torch.testing.assert_close(weights(tmp_path / "out"), weights(tmp_path / "other"), rtol=0, atol=0)
    # What the refusal tells to do.
    merge([("b", edited, 1.0)], "b", tmp_path / "plain", "float32")
    merge([inputs[0], ("b", tmp_path / "plain", 0.5)], "b", tmp_path / "again", "float32", engine="mergekit")


def test_refuses_tensors_missing_on_either_side_or_of_another_shape(trained, edited, tmp_path):
    edit_weights(edited, lambda tensors: tensors.pop("model.norm.weight"))
    assert refused_pair(trained, edited, tmp_path) == (
        "merge inputs 'a' and 'b' differ: tensor model.norm.weight is in 'a' and missing in 'b' (1 such); "
        "save both with save_pretrained"
    )
    edit_weights(edited, lambda tensors: tensors.update({"model.norm.weight": torch.ones(16), "x": torch.ones(1)}))
    assert "tensor x is in 'b' and missing in 'a'" in refused_pair(trained, edited, tmp_path)
    edit_weights(edited, lambda tensors: tensors.update({"model.norm.weight": torch.ones(17)}))
    edit_weights(edited, lambda tensors: tensors.pop("x"))
    assert "tensor model.norm.weight has shape [16] and [17]" in refused_pair(trained, edited, tmp_path)


def test_refuses_a_permuted_vocabulary_and_another_added_token(trained, edited, tmp_path):
    save_tokenizer(edited, words=[*WORDS[:-2], "h", "g"])
    assert refused_pair(trained, edited, tmp_path) == (
        "merge inputs 'a' and 'b' differ in tokenizer.json: token 'g' has id 8 and 9; "
        "merge only checkpoints with the same tokenizer, or state tokenizer_source in a mergekit file, which aligns "
        "vocabularies"
    )
    file = edited / "tokenizer.json"
    file.write_text((trained["a"] / "tokenizer.json").read_text().replace("<think>", "<muse>"))
    assert "token '<muse>' has id none and 10" in refused_pair(trained, edited, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refuses_an_input_with_a_value_that_is_not_finite(value, dtype, trained, edited, tmp_path):
    def spoil(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"].view(-1)[-1] = value
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    edit_weights(edited, spoil)
    message = refused_pair(trained, edited, tmp_path)
    assert message.startswith("merge input 'b': tensor model.layers.2.mlp.up_proj.weight has NaN or infinity; ")


def test_refuses_quantized_weights(trained, edited, tmp_path):
    edit_weights(edited, lambda tensors: tensors.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}))
    assert "tensor model.norm.weight is I8, not one of F32, BF16, F16" in refused_pair(trained, edited, tmp_path)


def test_refuses_a_full_disk(trained, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 0, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = refused([("a", trained["a"], 1.0)], tmp_path, out="new/out")
    elements = sum(tensor.numel() for tensor in weights(trained["a"]).values())
    needed = 4 * elements + sum(file.stat().st_size for file in trained["a"].glob("*.json"))
    assert f"needs {needed:,} bytes and {tmp_path} has 10 free; free {needed - 10:,} bytes or" in message


def test_refuses_folders_that_are_no_single_safetensors_checkpoint(trained, edited, tmp_path):
    model = edited / "model.safetensors"
    index = edited / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}}))
    assert "holds both model.safetensors and model.safetensors.index.json" in refused_pair(trained, edited, tmp_path)
    model.unlink()
    assert "merge input 'b' lacks model-1.safetensors, which model.safetensors.index.json names" in refused_pair(
        trained, edited, tmp_path
    )
    save_file({"other": torch.ones(1)}, edited / "model-1.safetensors")
    message = refused_pair(trained, edited, tmp_path)
    assert "places tensor model.norm.weight in model-1.safetensors, which does not hold it" in message
    index.unlink()
    (edited / "pytorch_model.bin").touch()
    assert "has its weights in pytorch_model.bin" in refused_pair(trained, edited, tmp_path)
    model.write_bytes((trained["b"] / "model.safetensors").read_bytes()[:1000])
    assert f"merge input 'b': {model} cannot be read (" in refused_pair(trained, edited, tmp_path)


def test_refuses_missing_and_broken_json(trained, edited, tmp_path):
    (edited / "tokenizer.json").write_text("{")
    assert f"merge input 'b': {edited / 'tokenizer.json'} cannot be read (" in refused_pair(trained, edited, tmp_path)
    (edited / "tokenizer.json").unlink()
    assert "merge input 'b' has no tokenizer.json" in refused_pair(trained, edited, tmp_path)
    edit_config(edited, hidden_size="wide")
    assert f"merge input 'b': {edited / 'config.json'} cannot be read (" in refused_pair(trained, edited, tmp_path)
    (edited / "config.json").unlink()
    assert "merge input 'b' has no config.json" in refused_pair(trained, edited, tmp_path)
    edit_config(Path(shutil.copytree(trained["a"], tmp_path / "a")), architectures=None)
    message = refused([("a", tmp_path / "a", 1.0)], tmp_path)
    assert message.startswith("merge input 'a': architectures=[] in ")


# ---------------------------------------------------------------- what is noticed after the merge


def test_tensors_the_model_class_does_not_have_or_lacks_are_refused(trained, edited, tmp_path):
    edit_weights(edited, lambda tensors: tensors.update(extra=torch.ones(3)))
    assert (
        f"merge input 'b' would not load whole: {edited} holds tensor extra that SmolLM3ForCausalLM does not have"
        in refused([("b", edited, 1.0)], tmp_path, base="b")
    )
    edit_weights(edited, lambda tensors: [tensors.pop(name) for name in ("extra", "model.norm.weight")])
    message = refused([("b", edited, 1.0)], tmp_path, base="b")
    assert f"merge input 'b' would not load whole: {edited} lacks tensor model.norm.weight; save it" in message


def test_logits_that_are_not_finite_are_refused(trained, edited, tmp_path):
    edit_weights(edited, lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    assert "the merged model's logits are NaN or infinite" in refused([("b", edited, 1.0)], tmp_path, base="b")


@pytest.mark.parametrize("verification", ["sampled", "full"])
@pytest.mark.parametrize("wrong", [lambda t: t.mul_(1.001), lambda t: t[-1:].fill_(float("nan"))])
def test_wrong_elements_are_noticed_and_nothing_stays(wrong, verification, trained, tmp_path, monkeypatch):
    def spoiled(checkpoints, folder, *arguments, **keywords):
        shards = write_mean(checkpoints, folder, *arguments, **keywords)
        edit_weights(folder, lambda tensors: wrong(tensors["model.layers.3.mlp.down_proj.weight"].view(-1)))
        return shards

    monkeypatch.setattr("smolpost.merging.linear.write_mean", spoiled)
    inputs = [("a", trained["a"], 0.5), ("b", trained["b"], 0.5)]
    with pytest.raises(RuntimeError, match=r"tensor model\.layers\.3\.mlp\.down_proj\.weight .* is not the weighted"):
        merge(inputs, "a", tmp_path / "out", "float32", verification=verification)
    assert not list(tmp_path.iterdir())


def test_a_finite_mean_that_the_dtype_cannot_hold_is_refused(trained, edited, tmp_path):
    edit_weights(edited, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    inputs = [("b", edited, 1.0)]
    message = refused(inputs, tmp_path, base="b", dtype="float16")
    assert message == (
        "merge result: the mean of tensor model.norm.weight is beyond 65504, the largest float16; write another dtype"
    )


# ---------------------------------------------------------------- templates and tied heads


def test_refuses_differing_chat_templates_naming_both(trained, tmp_path):
    inputs = [("a", trained["a"], 0.5), ("c", trained["c"], 0.5)]
    assert refused(inputs, tmp_path) == (
        "merge inputs 'a' and 'c' differ in their chat template (default: line 1 is "
        f"{TEMPLATE[:60]!r} and \"{{{{ 'c' }}}}\"); merge checkpoints trained with one template, or allow it with "
        "allow_template_change=True (--allow-template-change): the result has the template of 'a'"
    )
    report = merge(inputs, "c", tmp_path / "out", "float32", allow_template_change=True)
    assert report["base"] == "c"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'c' }}"


def test_one_template_in_the_file_and_in_the_tokenizers_config_is_equal(trained, edited, tmp_path):
    config = json.loads((edited / "tokenizer_config.json").read_text())
    (edited / "chat_template.jinja").unlink()
    inputs = [("a", trained["a"], 0.5), ("b", edited, 0.5)]
    assert "(default: one and none)" in refused(inputs, tmp_path)
    (edited / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    merge(inputs, "a", tmp_path / "out", "float32")


def test_a_tied_head_that_stands_twice_is_written_once(trained, edited, tmp_path):
    def head(change):
        return lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + change})

    inputs = [("a", trained["a"], 0.5), ("b", edited, 0.5)]
    edit_weights(edited, head(1))
    assert "tie_word_embeddings=true, but lm_head.weight is not model.embed_tokens.weight" in refused(inputs, tmp_path)
    edit_weights(edited, head(0))
    merge(inputs, "b", tmp_path / "out", "float32")
    assert weights(tmp_path / "out").keys() == weights(trained["a"]).keys()
