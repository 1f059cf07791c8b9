"""Tiny checkpoints for the tests of merging, and what is read from and done to them."""

import json

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

WORDS = ["<pad>", "<eos>", *"abcdefgh"]
VOCAB_SIZE = 40
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def save_tokenizer(folder, words=WORDS, template=TEMPLATE, added=("<think>",)):
    """A word-level tokenizer, tokens added to it and a chat template."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.add_tokens(list(added), special_tokens=True)
    fast.chat_template = template
    fast.save_pretrained(folder)


def save_checkpoint(folder, seed, *, dtype=torch.float32, template=TEMPLATE, shard="1GB", **fields):
    """Random weights drawn from `seed`, as save_pretrained leaves them."""
    config = SmolLM3Config(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
            **fields,
        }
    )
    save_model(folder, SmolLM3ForCausalLM(config), seed, dtype=dtype, shard=shard)
    save_tokenizer(folder, template=template)
    return folder


def save_model(folder, model, seed, *, dtype=torch.float32, shard="1GB"):
    """Random weights drawn from `seed`, without a tokenizer."""
    torch.manual_seed(seed)
    for parameter in model.parameters():  # norms too, which start as ones
        parameter.data.normal_(0, 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def weights(folder):
    """Every tensor of a folder, of one shard or several."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def mean(folders_and_weights, dtype=torch.float64):
    """The weighted mean, tensor by tensor, summed in `dtype`."""
    parts = [(weights(folder), weight) for folder, weight in folders_and_weights]
    return {name: sum(w * tensors[name].to(dtype) for tensors, w in parts) for name in parts[0][0]}


def save_adapter(folder, base, seed=0):
    """A LoRA adapter of rank 2 with both factors drawn from `seed`; returns the merged weights by hand."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    model.save_pretrained(folder)
    factors, expected = load_file(folder / "adapter_model.safetensors"), weights(base)
    for name in factors:
        if "lora_A" in name:
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            expected[target] = expected[target] + 2 * factors[name.replace("lora_A", "lora_B")] @ factors[name]
    return expected
