"""mergekit files of the kinds that people publish, as they are: every tensor against mergekit's own run of the file."""

import json

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from smolpost.merging.mergekit.methods import merge_yaml
from tests.merging.checkpoints import WORDS, save_model, save_tokenizer, weights

LLAMA = {
    "vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip

# One file of each kind, with the keys, gradients and leftovers that such files have.
FILES = {
    "slerp by slices with filters": """
        slices: [{sources: [{model: base, layer_range: [0, 4]}, {model: a, layer_range: [0, 4]}]}]
        merge_method: slerp
        base_model: base
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - value: 0.5
        dtype: bfloat16
    """,
    "slerp, its base not among the models": """
        merge_method: slerp
        base_model: base
        models: [{model: a}]
        parameters: {t: 0.45}
        dtype: float32
    """,
    "slerp with leftovers of other methods": """
        models: [{model: base, layer_range: [0, 4]}, {model: a, layer_range: [0, 4], parameters: {weight: 0.5}}]
        merge_method: slerp
        base_model: base
        parameters: {t: [0, 0.5, 1, 0.5, 0], int8_mask: true, normalize: true}
        dtype: bfloat16
    """,
    "ties with gradients": """
        models:
          - {model: a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
          - {model: b, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
          - {model: c, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}
        merge_method: ties
        base_model: base
        parameters: {normalize: true, int8_mask: true}
        dtype: float16
    """,
    "dare_ties with the base listed": """
        models:
          - model: base
          - {model: a, parameters: {density: 0.53, weight: 0.4}}
          - {model: b, parameters: {density: 0.53, weight: 0.3}}
        merge_method: dare_ties
        base_model: base
        parameters: {int8_mask: true}
        dtype: bfloat16
        random_seed: 7
    """,
    "dare_ties, union and auto": """
        merge_method: dare_ties
        base_model: base
        models:
          - {model: base, parameters: {weight: 0.2}}
          - {model: a, parameters: {weight: 0.2}}
          - {model: b, parameters: {weight: 0.2}}
        parameters: {density: 0.3}
        tokenizer: {source: union}
        chat_template: auto
        random_seed: 7
    """,
    "dare_linear": """
        models:
          - {model: a, parameters: {weight: 1.0, density: 1.0}}
          - {model: b, parameters: {weight: 0.8, density: 0.5}}
        base_model: base
        merge_method: dare_linear
        dtype: bfloat16
        parameters: {lambda: 1.0, rescale: false}
        random_seed: 7
    """,
    "linear without a base": """
        models:
          - {model: a, parameters: {weight: 1.0}}
          - {model: b, parameters: {weight: 0.3}}
        merge_method: linear
        dtype: float16
    """,
    "linear of trajectories, one dtype computed and another written": """
        merge_method: linear
        base_model: c
        models:
          - {model: a, parameters: {weight: 1}}
          - {model: b, parameters: {weight: 2}}
          - {model: c, parameters: {weight: 3}}
        parameters: {normalize: true}
        dtype: float32
        out_dtype: bfloat16
    """,
    "passthrough that stacks layers": """
        slices:
          - sources: [{model: a, layer_range: [0, 3]}]
          - sources: [{model: b, layer_range: [1, 4]}]
        merge_method: passthrough
        dtype: float16
    """,
    "passthrough of one layer at a time": """
        dtype: bfloat16
        merge_method: passthrough
        slices:
        - sources: [{layer_range: [0, 1], model: a}]
        - sources:
          - layer_range: [0, 1]
            model: a
            parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}, {value: 1.0}]}
        - sources: [{layer_range: [2, 4], model: a}]
    """,
    "task_arithmetic": """
        merge_method: task_arithmetic
        base_model: base
        models:
          - model: base
          - {model: a, parameters: {weight: 1.0}}
          - {model: b, parameters: {weight: -0.25, density: 0.5}}
        parameters: {normalize: false}
        dtype: float16
    """,
    "model_stock": """
        models: [{model: a}, {model: b}, {model: c}]
        merge_method: model_stock
        base_model: base
        dtype: bfloat16
        tokenizer_source: base
    """,
    "model_stock by rows, with weights that it ignores": """
        name: stock-of-three
        base_model: base
        dtype: float32
        out_dtype: bfloat16
        merge_method: model_stock
        models:
          - {model: a, parameters: {weight: [{filter: mlp, value: [2, 1]}, {value: 1}]}}
          - {model: b, parameters: {weight: [{filter: lm_head, value: 0}, {value: [1, 0.5]}]}}
        parameters: {filter_wise: true}
        tokenizer_source: a
    """,
    "breadcrumbs": """
        models:
          - {model: a, parameters: {weight: 0.4, density: 0.9, gamma: 0.01}}
          - {model: b, parameters: {weight: 0.6, density: 0.9, gamma: 0.01}}
        merge_method: breadcrumbs
        base_model: base
        dtype: bfloat16
    """,
    "breadcrumbs_ties": """
        models: [{model: a, parameters: {weight: 0.4}}, {model: b, parameters: {weight: 0.6}}]
        merge_method: breadcrumbs_ties
        base_model: base
        parameters: {density: 0.85, gamma: 0.01, normalize: 1.0}
        dtype: bfloat16
    """,
    "della": """
        base_model: base
        merge_method: della
        models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]
        parameters: {density: 0.5, normalize: true, epsilon: 0.4, lambda: 1}
        tokenizer_source: union
        chat_template: llama3
        random_seed: 7
    """,
    "della_linear by modules, as mergekit writes its cards": """
        base_model: base
        dtype: bfloat16
        merge_method: della_linear
        modules:
          default:
            slices:
            - sources:
              - {layer_range: [0, 4], model: a, parameters: {density: 0.5, epsilon: 0.4, weight: [0.9, 0.2, 0.2, 0.95]}}
              - {layer_range: [0, 4], model: b, parameters: {density: 0.5, epsilon: 0.4, weight: [0.1, 0.9, 1.0, 0.4]}}
              - {layer_range: [0, 4], model: base}
        parameters: {lambda: 1.0, normalize: 1.0}
        tokenizer: {}
        random_seed: 7
    """,
    "nuslerp with a gradient": """
        models:
          - {model: a, parameters: {weight: [0.1, 0.3, 0.1]}}
          - {model: b, parameters: {weight: [0.9, 0.7, 0.9]}}
        merge_method: nuslerp
        dtype: float32
        out_dtype: bfloat16
        tokenizer: {source: b}
    """,
    "nuslerp of differences": """
        models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]
        base_model: base
        merge_method: nuslerp
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
        dtype: bfloat16
    """,
    "multislerp": """
        models: [{model: a, parameters: {weight: [0.5]}}, {model: b, parameters: {weight: [0.7]}}]
        base_model: base
        merge_method: multislerp
        tokenizer: {source: base}
        chat_template: chatml
        parameters: {normalize_weights: false, eps: 1e-8}
        dtype: bfloat16
    """,
    "karcher": """
        models: [{model: a}, {model: b}, {model: c}]
        merge_method: karcher
        dtype: bfloat16
        parameters: {tol: 1e-9, max_iter: 20}
        tokenizer: {source: union}
    """,
    "sce": """
        merge_method: sce
        models: [{model: a}, {model: b}]
        base_model: base
        parameters: {select_topk: 0.8}
        dtype: bfloat16
    """,
    "arcee_fusion": """
        models: [{model: a}]
        merge_method: arcee_fusion
        base_model: base
        dtype: float32
        out_dtype: bfloat16
    """,
    "nearswap": """
        models: [{model: a}]
        merge_method: nearswap
        base_model: base
        parameters: {t: 0.1}
        dtype: bfloat16
    """,
    "ram": "{merge_method: ram, base_model: base, models: [{model: a}, {model: b}], dtype: bfloat16}",
    "anchors and a merge key": """
        merge_method: ties
        base_model: &start base
        models:
          - model: *start
          - {model: a, parameters: &half {weight: 0.5, density: 0.5}}
          - {model: b, parameters: *half}
          - model: c
            parameters: {<<: *half, density: 0.9}
        dtype: bfloat16
    """,
    "one mapping at several places": """
        merge_method: passthrough
        slices:
          - sources: &all [{model: a, layer_range: [0, 4]}]
          - sources: *all
        dtype: bfloat16
    """,
}  # fmt: skip


def save_llama(
    folder, seed, *, words=WORDS, added=("<think>",), template="{{ 'base' }}", dtype=torch.bfloat16, **fields
):
    config = LlamaConfig(**{**LLAMA, "vocab_size": len(words) + len(added), **fields})
    save_model(folder, LlamaForCausalLM(config), seed, dtype=dtype)
    save_tokenizer(folder, words, template, added)
    return folder


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A folder with the checkpoints that the files name."""
    root = tmp_path_factory.mktemp("llamas")
    for seed, name in enumerate(("base", "a", "b", "c")):
        save_llama(root / name, seed)
    return root


def theirs(config, out, **options):
    """What mergekit alone writes for a file's content."""
    config = {key: value for key, value in config.items() if key not in ("name", "random_seed")}
    run_merge(
        MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True, write_model_card=False, **options)
    )
    return weights(out)


def same_bits(ours, golden):
    assert ours.keys() == golden.keys()
    for name, tensor in golden.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def test_every_method_of_mergekits_has_a_file():
    from mergekit.merge_methods.registry import registered_methods

    methods = {yaml.safe_load(text)["merge_method"] for text in FILES.values()}
    assert {method.spec.name for method in registered_methods()} - methods == {"ramplus_tl"}  # below


@pytest.mark.parametrize("kind", FILES)
def test_files_as_people_publish_them(kind, llamas, tmp_path, monkeypatch):
    monkeypatch.chdir(llamas)
    file = tmp_path / "merge.yml"
    file.write_text(FILES[kind])
    report = merge_yaml(file, tmp_path / "ours")
    content = yaml.safe_load(file.read_text())
    golden = theirs(content, tmp_path / "theirs", random_seed=content.get("random_seed"))
    same_bits(weights(tmp_path / "ours"), golden)
    configs = [AutoConfig.from_pretrained(tmp_path / who).to_dict() for who in ("ours", "theirs")]
    for field in ("num_hidden_layers", "vocab_size", "dtype"):
        assert configs[0][field] == configs[1][field], field
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / who) for who in ("ours", "theirs")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert report["base"] == content.get("base_model", "a") and str(tmp_path) not in json.dumps(report)
