"""Tokenizers and chat templates that mergekit files ask for: vocabularies are aligned as mergekit does it."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from smolpost.errors import UserError
from smolpost.merging.linear import merge
from smolpost.merging.mergekit.methods import merge_method, merge_yaml
from tests.merging.checkpoints import WORDS, mean, weights
from tests.merging.test_mergekit_files import same_bits, save_llama, theirs

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHATML = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`plain` and its twin, `chatml` with two tokens more, `padded` with rows of no token, `permuted` tokens."""
    root = tmp_path_factory.mktemp("models")
    save_llama(root / "plain", 0, added=(), dtype=torch.float32)
    save_llama(root / "twin", 1, added=(), dtype=torch.float32)
    save_llama(root / "chatml", 2, added=CHATML, dtype=torch.float32, template="{{ 'chatml' }}")
    save_llama(root / "padded", 3, added=(), dtype=torch.float32, vocab_size=16)
    save_llama(root / "padded2", 4, added=(), dtype=torch.float32, vocab_size=16)
    save_llama(root / "permuted", 5, words=[*WORDS[:2], *reversed(WORDS[2:])], added=(), dtype=torch.float32)
    return root


def linear(*names, **keys):
    return {
        "merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 1.0}} for name in names],
        "base_model": names[0], "dtype": "float32", **keys,
    }  # fmt: skip


def both(config, folder, monkeypatch, models, **settings):
    """Our merge of a file and mergekit's, in `ours` and `theirs`: the same weights, vocabulary and template."""
    monkeypatch.chdir(models)
    file = folder / "merge.yml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    report = merge_yaml(file, folder / "ours", **settings)
    same_bits(weights(folder / "ours"), theirs(config, folder / "theirs"))
    configs = [AutoConfig.from_pretrained(folder / who) for who in ("ours", "theirs")]
    assert configs[0].vocab_size == configs[1].vocab_size
    tokenizers = [AutoTokenizer.from_pretrained(folder / who) for who in ("ours", "theirs")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    return report, tokenizers[0]


SOURCES = {
    "union": linear("plain", "chatml", tokenizer_source="union"),
    "base": linear("plain", "chatml", tokenizer_source="base"),
    "one of the models": linear("plain", "chatml", tokenizer={"source": "chatml"}),
    "a block without keys": linear("plain", "chatml", tokenizer={}),
    "permuted tokens": linear("plain", "permuted", tokenizer_source="base"),
    "rows of no token": linear("padded", "padded2", tokenizer_source="base"),
    "rows of no token and other rows": linear("padded", "chatml", tokenizer_source="union"),
    "padding": linear("chatml", "plain", tokenizer={"source": "base", "pad_to_multiple_of": 16}),
    "a new token, and forced ones": linear(
        "plain", "chatml",
        tokenizer={
            "source": "union",
            "tokens": {
                "model": {"source": {"kind": "model_token", "model": "chatml", "token_id": 11}},
                "a": {"source": "chatml", "force": True},
                "b": {"source": {"kind": "model_token", "model": "plain", "token": "c"}, "force": True},
                "<none>": {"source": {"kind": "zero"}},
            },
        },
    ),
    "slerp": {
        "merge_method": "slerp", "models": [{"model": "plain"}, {"model": "chatml"}], "base_model": "plain",
        "parameters": {"t": 0.5}, "dtype": "bfloat16", "tokenizer_source": "union",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", SOURCES)
def test_vocabularies_are_aligned_as_mergekit_aligns_them(case, models, tmp_path, monkeypatch):
    report, tokenizer = both(SOURCES[case], tmp_path, monkeypatch, models, allow_template_change=True)
    assert report["tokens_without_embedding"] == []
    rows = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").get_input_embeddings().weight.shape[0]
    assert rows == (16 if case == "padding" else len(tokenizer))


def test_each_token_has_the_row_that_it_had(models, tmp_path, monkeypatch):
    both(SOURCES["union"], tmp_path, monkeypatch, models, allow_template_change=True)
    merged, chatml, plain = (
        weights(folder)[EMBEDDING] for folder in (tmp_path / "ours", models / "chatml", models / "plain")
    )
    torch.testing.assert_close(merged[:10], (chatml[:10] + plain[:10]) / 2)
    torch.testing.assert_close(merged[10:12], chatml[10:12])  # which plain does not have


def test_rows_are_averaged_in_the_order_of_the_file(models, tmp_path, monkeypatch):
    # Three models have the tokens that their base lacks; in mergekit the order of the sum is another in every run.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "plain", "plain")
    for seed, name in enumerate("xyz", start=11):
        save_llama(tmp_path / name, seed, added=CHATML, dtype=torch.float32)
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump(linear("plain", "y", "z", "x", tokenizer_source="union", chat_template="chatml")))
    merge_yaml(file, tmp_path / "out")
    rows = [weights(tmp_path / name)[EMBEDDING][10:] for name in "yzx"]
    average = (torch.zeros_like(rows[0]) + rows[0] + rows[1] + rows[2]) / 3
    sums = torch.zeros_like(rows[0])
    for values in (average, *rows):
        sums.add_(values)
    assert torch.equal(weights(tmp_path / "out")[EMBEDDING][10:], sums / 4)


def test_tokens_that_no_input_has_are_counted(models, tmp_path, monkeypatch):
    config = linear("plain", "twin", tokenizer={"source": "chatml"})
    report, tokenizer = both(config, tmp_path, monkeypatch, models, allow_template_change=True)
    assert report["tokens_without_embedding"] == sorted(CHATML)
    assert not weights(tmp_path / "ours")[EMBEDDING][10:].any() and len(tokenizer) == 12


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (linear("plain", "chatml"), "vocab_size=10 and 12; merge only checkpoints "
        "with the same architecture, or state"),
        (linear("plain", "permuted"), "token 'a' has id 2 and 9; merge only checkpoints "
        "with the same tokenizer, or state"),
        (linear("plain", "twin", tokenizer={"tokens": {"<new>": {}}}), "mergekit cannot compute the merge ("),
        (
            linear("plain", "twin", tokenizer={"tokens": {"<new>": {"source": "plain"}}}),
            "mergekit cannot compute the merge (Token '<new>' not found in model",
        ),
        (linear("plain", "twin", tokenizer_source="base", tokenizer={}), "has both tokenizer_source and tokenizer"),
    ],
)  # fmt: skip
def test_vocabularies_that_cannot_be_aligned_are_refused(config, message, models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError) as caught:
        merge_yaml(tmp_path / "merge.yml", tmp_path / "out", allow_template_change=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "merge.yml"]


def test_a_token_beyond_the_rows_is_refused(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "plain", "plain")
    shutil.copytree(models / "twin", "short")
    for file in (models / "chatml").glob("*token*"):  # twelve tokens for ten rows
        shutil.copy(file, "short")
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump(linear("plain", "short", tokenizer={"source": "short"})))
    with pytest.raises(
        UserError, match=r"'short': its tokenizer has token '<\|im_end\|>' beyond its last embedding row"
    ):
        merge_yaml(file, tmp_path / "out", allow_template_change=True)


# ---------------------------------------------------------------- chat templates

LONG = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{# " + "x" * 300 + " #}"
)


@pytest.mark.parametrize("template", ["chatml", "llama3", "{{messages[0]['content']}}", LONG, "auto"])
@pytest.mark.parametrize("source", [None, "base"])
def test_chat_templates_that_a_file_states(template, source, models, tmp_path, monkeypatch):
    shutil.copytree(models, tmp_path / "models")
    for name in ("plain", "twin"):
        (tmp_path / "models" / name / "chat_template.jinja").write_text("{{ 'two of three' }}")
    (tmp_path / "models" / "padded" / "chat_template.jinja").write_text("{{ 'one of three' }}")
    config = linear("plain", "twin", chat_template=template)
    if template == "auto":
        config = linear("padded", "plain", "twin", chat_template=template, tokenizer_source="base")
    elif source:
        config["tokenizer_source"] = source
    report, tokenizer = both(config, tmp_path, monkeypatch, tmp_path / "models")
    assert report["donated"] == (["config"] if "tokenizer_source" in config else ["config", "tokenizer"])
    assert "two of three" in tokenizer.chat_template if template == "auto" else "message" in tokenizer.chat_template
    stored = json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())
    assert "chat_template" not in stored


# ---------------------------------------------------------------- models without a tokenizer


@pytest.fixture
def bare(models, tmp_path):
    """Folders of two models without a tokenizer."""
    for name in ("plain", "twin"):
        shutil.copytree(models / name, tmp_path / name, ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    return [tmp_path / name for name in ("plain", "twin")]


def test_models_without_a_tokenizer_are_merged_where_one_says_so(bare, tmp_path):
    inputs = [(folder.name, folder, 0.5) for folder in bare]
    with pytest.raises(UserError, match=r"'plain' has no tokenizer.json .*or merge without tokenizers: --no-tokenizer"):
        merge(inputs, "plain", tmp_path / "out", "float32")
    for engine in ("ours", "mergekit"):
        report = merge(inputs, "plain", tmp_path / engine, "float32", engine=engine, no_tokenizer=True)
        assert report["donated"] == ["config"] and not list((tmp_path / engine).glob("*token*"))
    settings = {"parameters": {"t": 0.5}, "base_model": "plain", "no_tokenizer": True}
    merge_method("slerp", [(f.name, f, {}) for f in bare], "plain", tmp_path / "slerp", "float32", **settings)
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump(linear(*map(str, bare))))
    merge_yaml(file, tmp_path / "file", no_tokenizer=True)
    exact = mean([(folder, 0.5) for folder in bare])
    for out in ("ours", "mergekit", "file"):
        torch.testing.assert_close(weights(tmp_path / out)[HEAD].double(), exact[HEAD], rtol=0, atol=2.4e-7)
    file.write_text(yaml.safe_dump(linear(*map(str, bare), chat_template="chatml")))
    with pytest.raises(UserError, match="states chat_template, but the result has no tokenizer; drop one of them"):
        merge_yaml(file, tmp_path / "not", no_tokenizer=True)
