"""A reply that is streamed is the reply, token by token, and its text comes in pieces that lose nothing."""

import pytest

import smolpost.inference.generation as generation
from smolpost.inference.decoding import supports
from smolpost.inference.generation import generate, reply_text
from smolpost.inference.streaming import TextStream
from smolpost.model import SmolLM3ForCausalLM  # noqa: F401  registers the class
from tests.families import byte_level

TEXT = "<think>\nnaïve — 日本語 🙂\n</think>\n\nA “quote”, <|im_start|>and\ttabs…"


def replies(model, tokenizer, **changes):
    options = dict(
        max_new_tokens=40, temperature=0.9, top_p=0.9, seed=3, batch_size=1, pad_token_id=0,
        eos_token_ids=[tokenizer.eos_token_id],
    )  # fmt: skip
    return generate(model, [tokenizer.encode("ab?")], **options | changes)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0}, {"top_k": 3}, {"max_new_tokens": 1}, {"eos_token_ids": []}]
)
def test_streamed_tokens_are_the_reply(model, tokenizer, monkeypatch, graphs, changes):
    if graphs:  # as on a GPU, with each step called
        monkeypatch.setattr(generation, "fits", lambda model, *_: supports(model))
        monkeypatch.setattr(generation, "cuda_graphs", lambda: lambda step: step)
    streamed = []
    [reply] = replies(model, tokenizer, stream=streamed.append, **changes)
    assert [token for tokens in streamed for token in tokens] == reply
    assert all(streamed) and [reply] == replies(model, tokenizer, **changes)
    if changes.get("eos_token_ids") == []:
        assert len(reply) == 40 and len(streamed) == (11 if graphs else 40)


def test_top_k_one_is_greedy(model, tokenizer):
    assert replies(model, tokenizer, top_k=1) == replies(model, tokenizer, temperature=0)


def test_what_the_stream_raises_ends_the_reply_and_several_prompts_cannot_be_streamed(model, tokenizer):
    seen = []

    def stop(tokens):
        seen.extend(tokens)
        if len(seen) == 5:
            raise InterruptedError

    before = model.generation_config
    with pytest.raises(InterruptedError):
        replies(model, tokenizer, stream=stop, eos_token_ids=[])
    assert seen == replies(model, tokenizer, eos_token_ids=[])[0][:5] and model.generation_config is before
    with pytest.raises(ValueError, match="one prompt can be streamed, not 2"):
        generate(model, [[1], [2]], max_new_tokens=1, temperature=0, top_p=1, seed=0, eos_token_ids=[], pad_token_id=0,
                 batch_size=2, stream=print)  # fmt: skip


def test_pieces_of_text_are_whole_characters_and_lose_nothing():
    tokenizer = byte_level(added=("<think>", "</think>"))
    ids = [*tokenizer.encode(TEXT, add_special_tokens=False), tokenizer.eos_token_id]
    stream = TextStream(tokenizer, [tokenizer.eos_token_id])
    pieces = [stream.text([i]) for i in ids]
    assert "".join(pieces) + stream.rest() == reply_text(tokenizer, ids, [tokenizer.eos_token_id])
    assert not any("\ufffd" in piece for piece in pieces)
    assert "🙂" in pieces and "日" in pieces


def test_bytes_that_are_no_character_are_shown_in_the_end():
    tokenizer = byte_level()
    half = tokenizer.encode("日", add_special_tokens=False)[:2]
    stream = TextStream(tokenizer, [])
    assert stream.text(half) == "" and stream.rest() == "\ufffd" and stream.rest() == ""
