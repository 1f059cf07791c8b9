import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from smolpost.chat.render import load_template, render
from smolpost.chat.tokenizer import build_tokenizer, check_covers
from smolpost.errors import UserError

BLOCKS = ["<tool_response>", "</tool_response>", "<tool_call>", "</tool_call>", "<code>", "</code>"]
TURNS = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|im_start|>", "<|im_end|>"]
RELEASED = ["<think>", "</think>", *TURNS, *BLOCKS]
DAY = "01 July 2025"


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_special_tokens_are_single_tokens_with_the_released_roles(kind, request):
    tokenizer = request.getfixturevalue(kind)
    assert [len(tokenizer.encode(token)) for token in RELEASED] == [1] * len(RELEASED)
    assert len({tokenizer.encode(token)[0] for token in RELEASED}) == len(RELEASED)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin_of_text|>", "<|im_end|>")
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    # Default settings add nothing, so a rendered prompt can be tokenized by any stock tool.
    assert tokenizer("a").input_ids == tokenizer.encode("a", add_special_tokens=False)
    assert len(tokenizer("a").input_ids) == 1


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_skipping_special_tokens_keeps_reasoning_and_calls(kind, request):
    tokenizer = request.getfixturevalue(kind)
    text = "<|begin_of_text|><|im_start|>a<think>b</think><tool_call>c</tool_call><code>d</code><tool_response>e"
    ids = tokenizer.encode(text + "</tool_response><|im_end|><|end_of_text|><|finetune_right_pad_id|>")
    kept = "a<think>b</think><tool_call>c</tool_call><code>d</code><tool_response>e</tool_response>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == kept


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(RELEASED))
def test_bpe_round_trips_any_text(bpe, text, token):
    for sample in (text, text + token + text):
        assert bpe.decode(bpe.encode(sample)) == sample


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from("\n\t")), st.sampled_from(RELEASED))
def test_char_round_trips_its_characters(char, text, token):
    for sample in (text, text + token + "users" + text):
        assert char.decode(char.encode(sample)) == sample


def test_char_has_one_token_per_character_and_per_role(char):
    assert [char.decode([token]) for token in char.encode("ab\n c")] == ["a", "b", "\n", " ", "c"]
    for role in ("system", "user", "assistant", "tool"):
        assert len(char.encode(role)) == 1


def test_check_covers_names_the_character(char, bpe):
    check_covers(char, "plain <think> text\n")
    check_covers(bpe, "ß🙂")
    assert char.unk_token_id in char.encode("aßb")
    with pytest.raises(UserError, match=r"character 'ß' \(U\+00DF\) has no token; build the tokenizer on texts"):
        check_covers(char, "aßb")
    check_covers(build_tokenizer(["ß"], kind="char", vocab_size=300, template="smollm3"), "aßb")


def test_vocab_size_is_a_target(bpe, char):
    assert len(bpe) <= 320 and len(char) <= 320
    long = build_tokenizer(["the cat sat on the mat"] * 3, kind="bpe", vocab_size=5000, template="smollm3")
    assert 256 + len(RELEASED) < len(long) < 400
    assert len(build_tokenizer([], kind="bpe", vocab_size=269, template="smollm3")) == 269
    with pytest.raises(UserError, match=r"vocab_size=268 is below the 269 tokens that kind bpe needs; raise it"):
        build_tokenizer([], kind="bpe", vocab_size=268, template="smollm3")
    with pytest.raises(UserError, match=r"vocab_size=100 is below the 118 tokens that kind char needs"):
        build_tokenizer(["abc"], kind="char", vocab_size=100, template="smollm3")


def test_unknown_kind_and_template_are_refused():
    with pytest.raises(UserError, match="tokenizer kind 'word' is unknown; use bpe or char"):
        build_tokenizer(["a"], kind="word", vocab_size=300, template="smollm3")
    with pytest.raises(UserError, match="chat template 'llama' does not exist"):
        build_tokenizer(["a"], kind="char", vocab_size=300, template="llama")


BUILD = """
import sys
from smolpost.chat.tokenizer import build_tokenizer
texts = [f"row {i} {i * i} é {chr(300 + i)}" for i in range(200)]
for kind in ("bpe", "char"):
    build_tokenizer(iter(texts), kind=kind, vocab_size=600, template="smollm3").save_pretrained(f"{sys.argv[1]}/{kind}")
"""

STOCK = """
import sys
from transformers import AutoTokenizer
for kind in ("bpe", "char"):
    tokenizer = AutoTokenizer.from_pretrained(f"{sys.argv[1]}/{kind}")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, today=sys.argv[2])
    sys.stdout.write(text + "\\0")
    out = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, enable_thinking=False, today=sys.argv[2]
    )
    reply = [token for token, trained in zip(out["input_ids"], out["assistant_masks"]) if trained]
    sys.stdout.write(tokenizer.decode(reply) + "\\0")
assert not any(name.split(".")[0] == "smolpost" for name in sys.modules)
"""


def python(code, *arguments, seed):
    environment = {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout


def test_saved_tokenizer_is_deterministic_and_works_without_smolpost(tmp_path):
    for run, seed in (("one", "1"), ("two", "2")):
        python(BUILD, tmp_path / run, seed=seed)
    for kind in ("bpe", "char"):
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            one, two = (tmp_path / run / kind / file for run in ("one", "two"))
            assert one.read_bytes() == two.read_bytes()
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "one" / "bpe")
    assert reloaded.chat_template == load_template("smollm3")
    text = render(reloaded, messages, template_kwargs={"enable_thinking": False}, today=DAY)
    assert python(STOCK, tmp_path / "one", DAY, seed="0").split("\0") == [text, "a<|im_end|>"] * 2 + [""]
