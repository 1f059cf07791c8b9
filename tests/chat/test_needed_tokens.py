"""Control tokens of a template that a tokenizer lacks: found, named with the command that adds them, or no fault."""

import pytest

from smolpost.chat.needed_tokens import addable, check_tokens, lacking
from smolpost.chat.render import load_template
from smolpost.errors import UserError
from tests.families import byte_level
from tests.model_families import MODEL_FAMILIES

CHATML, THINK = ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"]
CALLS = [f"<{slash}{tag}>" for tag in ("tool_call", "code", "tool_response") for slash in ("", "/")]


@pytest.mark.parametrize("name", ["llama3", "gemma3", "mistral"])
def test_our_templates_need_tokens_that_other_families_lack(name):
    tokenizer = MODEL_FAMILIES[name].tokenizer()
    assert lacking(tokenizer, load_template("smollm3")) == [*CHATML, *THINK]
    assert addable(tokenizer, load_template("smollm3")) == [*CHATML, *THINK, *CALLS]
    assert lacking(tokenizer, load_template("chatml")) == CHATML  # replies without reasoning need no more
    assert addable(tokenizer, load_template("chatml")) == [*CHATML, *THINK, *CALLS[:2]]
    assert tokenizer.chat_template is None  # it is not changed


@pytest.mark.parametrize("name", MODEL_FAMILIES)
def test_a_familys_own_template_lacks_nothing(name):
    if (template := MODEL_FAMILIES[name].template) is None:
        pytest.skip("the installed trl has no such template")
    assert lacking(MODEL_FAMILIES[name].tokenizer(), template) == []


def test_qwen3_has_the_tokens_of_our_template():
    assert lacking(MODEL_FAMILIES["qwen3"].tokenizer(), load_template("smollm3")) == []


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}", ["<|user|>", "<|end|>"]),
        ("{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}", ["[INST]", "[/INST]"]),
        ("{% for m in messages %}<|turn>{{ m.content }}<turn|>{% endfor %}", ["<|turn>", "<turn|>"]),
        # Tools' examples and comments are not written into a chat.
        ("{# <|old|> #}{% for m in messages %}{{ m.content }}{% if tools %}<json> <tools>{% endif %}{% endfor %}", []),
        ("{% for m in messages %}### {{ m.role }} (a < b, [1], [note]): {{ m.content }}{% endfor %}", []),
        ("{% for m in messages %}{{ raise_exception('never') }}{% endfor %}", []),
    ],
)  # fmt: skip
def test_only_tags_that_are_written_into_every_chat_count(template, found):
    assert lacking(byte_level(), template) == found


def test_the_refusal_names_the_tokens_and_a_remedy(tmp_path):
    tokenizer = MODEL_FAMILIES["llama3"].tokenizer()
    with pytest.raises(UserError) as error:
        check_tokens(tokenizer, "smollm3", "stages.sft", "meta/base")
    assert str(error.value) == (
        "stages.sft.template=smollm3 writes <|im_start|>, <|im_end|>, <think>, </think>, for which the tokenizer of "
        "meta/base has no token; `smolpost add-tokens meta/base OUT --template smollm3` writes a checkpoint that has "
        "them, for model.checkpoint=OUT"  # without its end no reply trains, so no setting helps
    )
    with pytest.raises(UserError, match=r"<think>, </think>, .* or set stages.sft.allow_split_tokens=true to train"):
        check_tokens(byte_level(template=load_template("chatml")), "smollm3", "stages.sft", "base")
    check_tokens(byte_level(), "chatml", "stages.sft", "base")
    # A model that was trained with tags that are several tokens knows them so.
    spelt = tmp_path / "spelt.jinja"
    spelt.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}")
    tokenizer.chat_template = spelt.read_text()
    check_tokens(tokenizer, spelt, "stages.sft", "base")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"<\|user\|>, <\|assistant\|>, .*or set stages.sft.allow_split_tokens=true"):
        check_tokens(tokenizer, spelt, "stages.sft", "base")
