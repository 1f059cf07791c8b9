"""Which tokens train: decoded text, two derivations, pairs, and the segments' own tokenization."""

import copy
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smolpost.chat.fates import Fate
from smolpost.chat.masks import (
    Encoded,
    Policy,
    check_spans,
    encode,
    encode_batch,
    encode_pair,
    encode_prompt,
    trained_by_prefixes,
)
from smolpost.chat.render import load_template, render, render_spans
from smolpost.errors import UserError

DAY = "01 July 2025"
LAST = Policy(last_turn_only=True)
USER = {"role": "user", "content": "hi"}
DIALOG = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "<think>\nhm\n</think>\none"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two"},
]
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


def trained_runs(tokenizer, encoded):
    """The decoded text of each run of trained tokens."""
    runs, previous = [], False
    for token, fate in zip(*encoded[:2], strict=True):
        trained = fate == Fate.TRAINED
        if trained and not previous:
            runs.append([])
        if trained:
            runs[-1].append(token)
        previous = trained
    return [tokenizer.decode(run) for run in runs]


def is_trained(fates):
    return [fate == Fate.TRAINED for fate in fates]


@pytest.mark.parametrize("kind", ["bpe", "char"])
@pytest.mark.parametrize(
    ("thinking", "first"), [(True, "<think>\nhm\n</think>\none<|im_end|>"), (False, "one<|im_end|>")]
)
def test_trained_tokens_decode_to_exactly_the_replies(kind, thinking, first, request):
    tokenizer = request.getfixturevalue(kind)
    kwargs = {"template_kwargs": {"enable_thinking": thinking}, "today": DAY}
    encoded = encode(tokenizer, DIALOG, **kwargs)
    assert trained_runs(tokenizer, encoded) == [first, CALL + "<|im_end|>", "two<|im_end|>"]
    assert tokenizer.decode(encoded.input_ids) == render(tokenizer, DIALOG, **kwargs)


@pytest.mark.parametrize("thinking", [True, False])
def test_ids_are_those_of_inference(bpe, thinking):
    options = {"template_kwargs": {"enable_thinking": thinking}, "today": DAY}
    # "\n" + "the" or "\n\n" would merge across the edge if the text were tokenized as a whole.
    messages = [USER, {"role": "assistant", "content": "the answer"}]
    prompt = bpe.encode(render(bpe, messages[:1], **options, add_generation_prompt=True), add_special_tokens=False)
    reply = bpe.encode("the answer<|im_end|>", add_special_tokens=False)
    encoded = encode(bpe, messages, **options)
    newline = bpe.encode("\n", add_special_tokens=False)
    assert encoded.input_ids == prompt + reply + newline
    assert is_trained(encoded.fates) == [False] * len(prompt) + [True] * len(reply) + [False]


def test_last_turn_only_trains_the_last_reply_with_the_same_ids(bpe):
    full, last = encode(bpe, DIALOG, today=DAY), encode(bpe, DIALOG, today=DAY, policy=LAST)
    assert last.input_ids == full.input_ids
    assert trained_runs(bpe, last) == ["two<|im_end|>"]
    ends_untrained = [*DIALOG[:-1], {**DIALOG[-1], "train": False}]
    assert trained_runs(bpe, encode(bpe, ends_untrained, today=DAY, policy=LAST)) == [CALL + "<|im_end|>"]
    no_reply = encode(bpe, [USER], today=DAY, policy=LAST)
    assert Fate.TRAINED not in no_reply.fates


def test_encode_batch_equals_encode(bpe, char):
    conversations = [DIALOG, [USER], DIALOG[:3], [{"role": "system", "content": "/system_override"}]]
    kwargs = [None, {"xml_tools": ["x"]}, {"enable_thinking": False}, None]
    tools = [[{"name": "f"}], None, None, []]
    for tokenizer in (bpe, char):
        batch = encode_batch(tokenizer, conversations, template_kwargs=kwargs, tools=tools, today=DAY)
        columns = zip(conversations, kwargs, tools, strict=True)
        assert batch == [encode(tokenizer, m, template_kwargs=k, tools=t, today=DAY) for m, k, t in columns]
    assert batch[3] == Encoded([], [], 0)
    assert encode_batch(bpe, [], today=DAY) == []


def test_encode_batch_names_the_row(bpe):
    with pytest.raises(UserError, match=r"^rows\[1\]: messages\[0\]\.role=bot is unknown"):
        encode_batch(bpe, [[USER], [{"role": "bot", "content": "x"}]], today=DAY)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        encode_batch(bpe, [[USER], [USER]], tools=[None], today=DAY)


# ───── two derivations ─────

# Pieces that meet at the edges of spans: line breaks, blanks, tags, multi-byte characters.
PIECES = ["a", "the", " ", "\n", "\n\n", "é", "🙂", "user", "<|im_end|>"]
BLOCKS = ["<think>", "</think>", "<think>\nhm\n</think>\n"]
TEXT = st.lists(st.sampled_from(PIECES + BLOCKS), max_size=6).map("".join)
CALLS = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from(["f", "g"]), "arguments": st.sampled_from(["{}", {"x": [1, "é"]}])}),
    min_size=1,
    max_size=2,
)
ASSISTANT = st.one_of(
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": TEXT},
        optional={"train": st.booleans(), "reasoning_content": TEXT, "tool_calls": CALLS},
    ),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": st.none(), "tool_calls": CALLS}),
)
OTHER = st.fixed_dictionaries({"role": st.sampled_from(["user", "tool", "system"]), "content": TEXT})


def legal(messages):
    """Tool results before the first reply become user turns."""
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    return [{**m, "role": "user"} if m["role"] == "tool" and i < first else m for i, m in enumerate(messages)]


SYSTEM = st.lists(st.sampled_from(["/think", "/no_think", "/system_override", "Be brief."]), max_size=2)
CONVERSATIONS = st.builds(
    lambda words, turns: legal(([{"role": "system", "content": " ".join(words)}] if words else []) + turns),
    SYSTEM,
    st.lists(st.one_of(ASSISTANT, OTHER), min_size=1, max_size=6),
)
KWARGS = st.fixed_dictionaries(
    {},
    optional={
        "enable_thinking": st.sampled_from([True, False, None]),
        "custom_instructions": TEXT,
        "xml_tools": st.sampled_from([[], ["x"]]),
        "python_tools": st.sampled_from([[], ["def f(): ..."]]),
    },
)
RELAXED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@RELAXED
@given(messages=CONVERSATIONS, kwargs=KWARGS)
def test_spans_and_prefixes_agree_on_random_conversations(bpe, char, messages, kwargs):
    for tokenizer in (bpe, char):
        options = {"template_kwargs": kwargs, "today": DAY}
        assert encode(tokenizer, messages, **options) == trained_by_prefixes(tokenizer, messages, **options)


@RELAXED
@given(messages=CONVERSATIONS, kwargs=KWARGS)
def test_ids_decode_to_the_rendering(bpe, messages, kwargs):
    options = {"template_kwargs": kwargs, "today": DAY}
    assert bpe.decode(encode(bpe, messages, **options).input_ids) == render(bpe, messages, **options)


@RELAXED
@given(messages=CONVERSATIONS)
def test_chatml_spans_and_prefixes_agree(chatml, messages):
    assert encode(chatml, messages, today=DAY) == trained_by_prefixes(chatml, messages, today=DAY)


@pytest.mark.parametrize("name", ["sft", "mid"])
def test_derivations_agree_on_word_problems(bpe, rows, name):
    for row in rows(name, 300):
        options = {"template_kwargs": row.get("chat_template_kwargs"), "today": DAY}
        encoded = encode(bpe, row["messages"], **options)
        assert encoded == trained_by_prefixes(bpe, row["messages"], **options)
        assert trained_runs(bpe, encoded) == [
            m["content"].lstrip("\n") + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"
        ]


def test_derivations_agree_on_tool_conversations(bpe, rows):
    for row in rows("tools", 15):
        options = {"tools": row["tools"], "today": DAY}
        encoded = encode(bpe, row["messages"], **options)
        assert encoded == trained_by_prefixes(bpe, row["messages"], **options)
        runs = trained_runs(bpe, encoded)
        assert len(runs) == sum(m["role"] == "assistant" for m in row["messages"])
        # 1 stop token per run, and no tool result inside.
        assert all(run.count("<|im_end|>") == 1 and run.endswith("<|im_end|>") for run in runs)
        assert "<tool_response>" not in "".join(runs)


def test_prefixes_find_a_template_whose_spans_are_wrong(bpe):
    # The published fault: header and prefilled block inside the span. The text is the same.
    branch = '    {%- if message["train"]'
    header, reply = "    {{- assistant_header -}}\n" + branch, '{{- reply ~ "<|im_end|>" -}}'
    correct = load_template("smollm3")
    assert correct.count(header) == 1 and correct.count(reply) == 2
    faulty = correct.replace(header, branch)
    broken = copy.deepcopy(bpe)
    broken.chat_template = faulty.replace(reply, '{{- assistant_header ~ reply ~ "<|im_end|>" -}}')
    assert render(broken, DIALOG, today=DAY) == render(bpe, DIALOG, today=DAY)
    assert encode(broken, DIALOG, today=DAY) != trained_by_prefixes(broken, DIALOG, today=DAY)
    with pytest.raises(UserError, match=r"^messages\[2\]: the template's generation span is '<\|im_start\|>assistant"):
        check_spans(broken, DIALOG, today=DAY)
    check_spans(bpe, DIALOG, today=DAY)


THINKING = [*DIALOG[:2], {"role": "assistant", "content": "yo", "reasoning_content": "hm"}]


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "qwen3_vl"])
def test_line_breaks_inside_a_public_templates_spans_do_not_train(bpe, name):
    """TRL's training templates have the header's line break, or the one after the stop token, inside their tags."""
    trl = pytest.importorskip("trl")
    public = copy.deepcopy(bpe)
    public.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}_training.jinja").read_text()
    text, spans = render_spans(public, THINKING, today=DAY)
    assert any(text[a:b] != text[a:b].strip() for a, b in spans)
    encoded = encode(public, THINKING, today=DAY)
    assert encoded == trained_by_prefixes(public, THINKING, today=DAY)
    assert all(run == run.strip() for run in trained_runs(bpe, encoded)) and len(trained_runs(bpe, encoded)) == 1
    check_spans(public, THINKING, today=DAY)


def test_spans_of_a_template_that_rewrites_history_lose_the_line_break_after_the_stop_token(bpe):
    rewriting = copy.deepcopy(bpe)
    rewriting.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content if loop.last else '-' }}<|im_end|>{{ '\n' }}{% endgeneration %}"
        "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
    )
    dialog = [USER, {"role": "assistant", "content": "a"}, USER, {"role": "assistant", "content": "b"}]
    assert trained_runs(bpe, encode(rewriting, dialog, today=DAY)) == ["-<|im_end|>", "b<|im_end|>"]


def test_template_that_rewrites_history_is_refused(bpe):
    rewriting = copy.deepcopy(bpe)
    rewriting.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content if loop.last else '-' }}{% endgeneration %}{% endfor %}"
    )
    dialog = [USER, {"role": "assistant", "content": "a"}, USER, {"role": "assistant", "content": "b"}]
    rewriting.chat_template = rewriting.chat_template.replace("}}{% endg", "}}<|im_end|>{% endg")
    with pytest.raises(UserError, match="renders earlier turns differently when later turns follow"):
        trained_by_prefixes(rewriting, dialog, today=DAY)
    with pytest.raises(UserError, match=r"renders the turns before messages\[3\] differently"):
        encode_pair(rewriting, dialog, [*dialog[:3], {"role": "assistant", "content": "c"}], today=DAY)


# ───── pairs ─────


def sides_of(pair):
    yield pair.chosen_ids, pair.chosen_fates
    yield pair.rejected_ids, pair.rejected_fates


def assert_pair_equals_encode(tokenizer, pair, chosen, rejected, **options):
    newline = tokenizer.encode("\n", add_special_tokens=False)
    for messages, (completion, fates) in zip((chosen, rejected), sides_of(pair), strict=True):
        full = encode(tokenizer, messages, **options)
        assert pair.prompt_ids + completion + newline == full.input_ids
        assert [*fates, Fate.TEMPLATE] == full.fates[len(pair.prompt_ids) :]
        assert Fate.TRAINED not in pair.prompt_fates and len(pair.prompt_fates) == len(pair.prompt_ids)
        assert completion[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("thinking", [True, False])
def test_pair_of_replies_shares_the_generation_prompt(bpe, thinking):
    options = {"template_kwargs": {"enable_thinking": thinking}, "today": DAY}
    chosen, rejected = ([*DIALOG[:-1], {"role": "assistant", "content": text}] for text in ("the two", "the three"))
    pair = encode_pair(bpe, chosen, rejected, **options)
    assert bpe.decode(pair.prompt_ids) == render(bpe, DIALOG[:-1], **options, add_generation_prompt=True)
    assert bpe.decode(pair.chosen_ids) == "the two<|im_end|>"
    assert bpe.decode(pair.rejected_ids) == "the three<|im_end|>"
    assert {*pair.chosen_fates, *pair.rejected_fates} == {Fate.TRAINED}
    assert_pair_equals_encode(bpe, pair, chosen, rejected, **options)


def test_pair_that_parts_at_a_user_turn(bpe):
    chosen = [USER, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}, DIALOG[-1]]
    rejected = [USER, {"role": "assistant", "content": "a"}, {"role": "user", "content": "c"}, DIALOG[-1], USER]
    pair = encode_pair(bpe, chosen, rejected, today=DAY)
    assert bpe.decode(pair.prompt_ids) == render(bpe, chosen[:2], today=DAY)
    assert trained_runs(bpe, (pair.rejected_ids, pair.rejected_fates)) == ["two<|im_end|>"]
    assert_pair_equals_encode(bpe, pair, chosen, rejected, today=DAY)


def test_pair_with_an_untrained_first_reply_parts_before_its_header(bpe):
    chosen = [USER, {"role": "assistant", "content": "a", "train": False}, USER, DIALOG[-1]]
    rejected = [USER, {"role": "assistant", "content": "b"}]
    pair = encode_pair(bpe, chosen, rejected, today=DAY)
    assert bpe.decode(pair.prompt_ids) == render(bpe, [USER], today=DAY)
    assert_pair_equals_encode(bpe, pair, chosen, rejected, today=DAY)


def test_pair_whose_one_side_continues_the_other(bpe):
    pair = encode_pair(bpe, DIALOG, DIALOG[:3], today=DAY)
    assert bpe.decode(pair.prompt_ids) == render(bpe, DIALOG[:2], today=DAY, add_generation_prompt=True)
    assert_pair_equals_encode(bpe, pair, DIALOG, DIALOG[:3], today=DAY)
    same = encode_pair(bpe, DIALOG, DIALOG, today=DAY)
    assert same.chosen_ids == same.rejected_ids
    assert bpe.decode(same.chosen_ids) == "two<|im_end|>"


def test_pair_without_a_common_prompt_is_refused(bpe):
    other = [{"role": "user", "content": "other"}, DIALOG[2]]
    with pytest.raises(UserError, match="chosen and rejected do not share a first message"):
        encode_pair(bpe, [USER, DIALOG[2]], other, today=DAY)


@pytest.mark.parametrize(("name", "limit"), [("preference", 200), ("tool_pairs", 18)])
def test_pairs_of_files_equal_encode(bpe, rows, name, limit):
    for row in rows(name, limit):
        options = {"template_kwargs": row.get("chat_template_kwargs"), "tools": row.get("tools"), "today": DAY}
        pair = encode_pair(bpe, row["chosen"], row["rejected"], **options)
        assert_pair_equals_encode(bpe, pair, row["chosen"], row["rejected"], **options)


def test_tokens_never_straddle_an_edge(bpe):
    # Whatever the reply begins with, the prompt's ids stay a prefix.
    prompt = bpe.encode(render(bpe, [USER], today=DAY, add_generation_prompt=True), add_special_tokens=False)
    draw = random.Random(0)
    for _ in range(50):
        reply = "".join(draw.choices("the \t é", k=5))
        encoded = encode(bpe, [USER, {"role": "assistant", "content": reply}], today=DAY)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert is_trained(encoded.fates) == [i >= len(prompt) for i in range(len(encoded.fates) - 1)] + [False]


def test_a_prompt_has_the_ids_that_precede_its_reply_in_training(bpe):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a<|im_end|>b"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "c"},
    ]
    reply = {"role": "assistant", "content": "<think>\nx\n</think>\ntwo"}
    for thinking in (True, False):
        options = {"template_kwargs": {"enable_thinking": thinking}, "today": "1 May 2025"}
        prompt = encode_prompt(bpe, messages, **options)
        whole = encode(bpe, [*messages, reply if thinking else {**reply, "content": "two"}], **options)
        assert whole.input_ids[: len(prompt)] == prompt
        first_of_reply = next(i for i in range(len(prompt), len(whole.fates)) if whole.fates[i] == Fate.TRAINED)
        assert first_of_reply == len(prompt)
        # Two turns before, and the one that is asked: the user's own <|im_end|> is text.
        assert prompt.count(bpe.convert_tokens_to_ids("<|im_end|>")) == 4
