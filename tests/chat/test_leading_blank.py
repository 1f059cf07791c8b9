"""Tokenizers that put a blank before a text: a conversation has the ids that it has when it is tokenized in one go."""

import json

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode, encode_prompt
from smolpost.chat.render import load_template, render
from tests.model_families import MISTRAL, MODEL_FAMILIES

TURNS = [
    {"role": "user", "content": "What <? "},
    {"role": "assistant", "content": "<think>\nhm  x\n</think>\nAn answer."},
    {"role": "user", "content": " é [INST] x"},
    {"role": "assistant", "content": "Two ☃"},
]
TIGHT = (
    "{% for m in messages %}{{ '[INST]' ~ m.content ~ '[/INST]' if m.role == 'user' else m.content ~ eos_token }}"
    "{% endfor %}"
)
TEMPLATES = {name: load_template(name) for name in ("chatml", "smollm3")} | {"mistral": MISTRAL, "tight": TIGHT}


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    backend = MODEL_FAMILIES["mistral"].tokenizer().backend_tokenizer
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend = Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | {"pre_tokenizer": None}))
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["first", "always", "prepend"])
def test_ids_are_those_of_the_whole_text(kind, template):
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = TEMPLATES[template]
    turns = [turn | {"content": turn["content"].replace("[INST] ", "")} for turn in TURNS]
    encoded = encode(tokenizer, turns, today="x")
    assert encoded.input_ids == tokenizer.encode(render(tokenizer, turns, today="x"), add_special_tokens=False)
    trained = [i for i, fate in zip(encoded.input_ids, encoded.fates, strict=True) if fate == Fate.TRAINED]
    end = "<|im_end|>" if template in ("chatml", "smollm3") else "</s>"
    decoded = "".join(tokenizer.convert_ids_to_tokens(trained)).replace("▁", " ").split(end)
    assert [text.strip() for text in decoded[:-1]] == [turns[1]["content"], "Two <0xE2><0x98><0x83>"]
    assert encode_prompt(tokenizer, turns[:3], today="x") == encoded.input_ids[: -len(trained_tail(encoded))]


def trained_tail(encoded) -> list[int]:
    """Ids from the last reply on."""
    last = max(
        i for i in range(1, len(encoded.fates))
        if encoded.fates[i] == Fate.TRAINED and encoded.fates[i - 1] != Fate.TRAINED
    )  # fmt: skip
    return encoded.input_ids[last:]


@pytest.mark.parametrize("kind", ["first", "always", "prepend"])
def test_a_control_token_in_a_users_text_stays_text(kind):
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = TEMPLATES["chatml"]
    encoded = encode(tokenizer, TURNS, today="x")
    assert encoded.neutralised == 1
    assert tokenizer.convert_tokens_to_ids("[INST]") not in encoded.input_ids
    assert "".join(tokenizer.convert_ids_to_tokens(encoded.input_ids)).count("[INST]▁x") == 1
