"""smolpost add-tokens: old rows stay, new rows are the mean, and generation stops where the template's replies end."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from smolpost import cli
from smolpost.chat.render import load_template
from smolpost.files import verify
from smolpost.pipeline import manifest
from tests.model_families import MODEL_FAMILIES

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = [
    "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<code>", "</code>",
    "<tool_response>", "</tool_response>",
]  # fmt: skip


def run(*words) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["add-tokens", *map(str, words)])
    return ended.value.code


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits(folder, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(ids).logits


@pytest.mark.parametrize("name", MODEL_FAMILIES)
def test_old_tokens_are_as_they_were(name, tmp_path):
    """Rows, tokenization and logits of old tokens; a new row is the mean of the old ones."""
    start = MODEL_FAMILIES[name].write(tmp_path / "start")
    size = len(MODEL_FAMILIES[name].tokenizer())
    assert run(start, tmp_path / "out", "--template", "smollm3") == 0
    before, after = weights(start), weights(tmp_path / "out")
    grown = {EMBEDDING, HEAD} & before.keys()
    assert grown == ({EMBEDDING} if name in ("qwen3", "gemma3") else {EMBEDDING, HEAD})  # those two are tied
    for key, tensor in before.items():
        assert torch.equal(after[key][: len(tensor)], tensor)
        assert key in grown or after[key].shape == tensor.shape
    for key in grown:
        mean = before[key].double().mean(0).float()
        torch.testing.assert_close(after[key][size:], mean.expand(len(after[key]) - size, -1), atol=1e-7, rtol=1e-6)
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (start, tmp_path / "out"))
    text = "An é [INST] <bos> text <|eot_id|>\n with  blanks"
    assert new.encode(text) == old.encode(text)
    added = [token for token in TOKENS if token not in old.get_vocab()]
    assert new.convert_tokens_to_ids(added) == [*range(size, size + len(added))] and len(after[EMBEDDING]) == len(new)
    assert all(new.encode(f"a{token}b", add_special_tokens=False).count(size + i) == 1 for i, token in enumerate(added))
    ids = torch.randint(size, (2, 30), generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(tmp_path / "out", ids)[..., :size], logits(start, ids))


def test_it_stops_where_the_templates_replies_end(tmp_path, capsys):
    start = MODEL_FAMILIES["llama3"].write(tmp_path / "start")
    assert run(start, tmp_path / "out", "--template", "smollm3") == 0
    out, tokenizer = capsys.readouterr().out, AutoTokenizer.from_pretrained(tmp_path / "out")
    end, before = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|im_end|>", load_template("smollm3"))
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [end, before]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (end, [end, before])
    assert "<think>" in tokenizer.decode(tokenizer.encode("<think>"), skip_special_tokens=True)
    assert tokenizer.decode([end], skip_special_tokens=True) == ""
    verify(tmp_path / "out")
    report = manifest.read(tmp_path / "out")["report"]
    assert report["tokens"] == {token: 264 + i for i, token in enumerate(TOKENS)}
    assert report["vocab_size"] == {"before": 264, "after": 274} and f"stops at [{end}, {before}]" in out


def test_shards_bf16_and_unused_rows(tmp_path):
    """Rows that the matrix has beyond the tokenizer are used first; files that hold neither matrix keep their bytes."""
    family = MODEL_FAMILIES["llama3"]
    start, size = tmp_path / "start", len(family.tokenizer())
    model = AutoModelForCausalLM.from_pretrained(family.write(tmp_path / "whole"), dtype=torch.bfloat16)
    model.resize_token_embeddings(size + 20)
    model.save_pretrained(start, max_shard_size="20KB")
    family.tokenizer().save_pretrained(start)
    for number, words in ((20, ()), (24, ("--pad-to-multiple-of", "32"))):
        out = tmp_path / f"out-{number}"
        assert run(start, out, "--tokens", "<|a|>", "<|b|>", *words) == 0
        files = sorted(file.name for file in start.glob("*.safetensors"))
        assert len(files) > 3 and sorted(file.name for file in out.glob("*.safetensors")) == files
        before, after = weights(start), weights(out)
        for key in (EMBEDDING, HEAD):
            assert after[key].dtype == torch.bfloat16 and len(after[key]) == size + number
            assert torch.equal(after[key][:size], before[key][:size])
            mean = before[key][:size].double().mean(0).bfloat16()
            assert torch.equal(after[key][size : size + 2], mean.expand(2, -1))
            assert torch.equal(after[key][size + 2 : size + 20], before[key][size + 2 :])
            assert torch.equal(after[key][size + 20 :], mean.expand(number - 20, -1))
        index = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]
        assert index["total_size"] == sum(tensor.nbytes for tensor in after.values())
        assert index.get("total_parameters", 0) in (0, sum(tensor.numel() for tensor in after.values()))
        assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == size + number
        # Without a template, nothing says where replies end.
        assert AutoTokenizer.from_pretrained(out).eos_token == "<|end_of_text|>"
        assert not (out / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("spoil", "words", "said"),
    [
        ({}, [], "add-tokens needs --template NAME or --tokens TOKEN"),
        ({}, ["--template", "smollm3", "--pad-to-multiple-of", "0"], "--pad-to-multiple-of 0 is below 1"),
        ({}, ["--template", "smolm3"], "chat template 'smolm3' does not exist; use one of chatml, smollm3"),
        ({}, ["--tokens", "a b"], "--tokens 'a b' is empty or has white space"),
        ({}, ["--tokens", "<|eot_id|>"], "has a token for <|eot_id|>; nothing to add: use it as it is"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ["--tokens", "<a>"], "is quantized"),
        ({"vocab_size": 300}, ["--tokens", "<a>"], "would not load whole"),
        ("adapter", ["--tokens", "<a>"], "is a LoRA adapter"),
        ("no tokenizer", ["--tokens", "<a>"], "has no tokenizer.json; save the tokenizer beside the weights"),
        ("out", ["--tokens", "<a>"], "exists; name a new folder"),
        ("no folder", ["--tokens", "<a>"], "; give a folder in its place, or fetch it"),
    ],
)  # fmt: skip
def test_refusals_write_nothing(spoil, words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = MODEL_FAMILIES["llama3"].write(tmp_path / "start")
    if isinstance(spoil, dict):
        config = json.loads((start / "config.json").read_text())
        (start / "config.json").write_text(json.dumps(config | spoil))
    elif spoil == "adapter":
        (start / "config.json").rename(start / "adapter_config.json")
    elif spoil == "no tokenizer":
        (start / "tokenizer.json").unlink()
    elif spoil == "out":
        (tmp_path / "out").mkdir()
    folder = "nobody/nothing" if spoil == "no folder" else start
    capsys.readouterr()
    assert run(folder, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"start", *(["out"] if spoil == "out" else [])}
