"""Which rows train reasoning, whether the tokenizer spells the tags out, adds them, or has them as special tokens."""

import pytest

from smolpost.chat.answers import opens_thinking
from smolpost.chat.masks import Policy, encode, encode_pair
from smolpost.errors import UserError
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage
from tests.families import byte_level
from tests.prepared import prepared

TAGS = ("<think>", "</think>")
TOKENIZERS = {"spelt out": byte_level(), "added": byte_level(added=TAGS), "special": byte_level(*TAGS)}
STAGE = {"init_from": "x", "data": "x", "max_seq_len": 2048, "global_batch_size": 1, "num_workers": 1}
OPENING = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ '<think>\n' }}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
THOUGHT = "<think>\nx\n</think>\ny"


def chat(*turns, think=True, **reply) -> dict:
    """User and assistant take turns; `reply` holds further keys of the last one."""
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    messages[-1] |= reply
    return {"messages": messages, "chat_template_kwargs": {"enable_thinking": think}}


THINKING = [
    chat("u", THOUGHT),
    chat("u", "<think>x</think>y"),
    chat("u", "\r\n<think>\r\nx\r\n</think>\r\ny"),
    chat("u", "y", reasoning_content="x"),
    chat("u", "x\n</think>\ny"),  # opened in the prompt
    chat("u", "<think>\nthe tag </think> ends it\n</think>\ny"),
    chat("u", THOUGHT, "v", "z"),
    chat("u", "w", "v", THOUGHT),
]
PLAIN = [
    chat("u", "y"),
    chat("u", "Write <think> and </think> around it."),
    chat(f"Answer as {THOUGHT}", "y"),
    chat("u", "<think>\n\n</think>\ny"),
    chat("u", THOUGHT, think=False),
    chat("u", THOUGHT, "v", THOUGHT, think=False),
    chat("u", "w", "v", THOUGHT, train=False),
]


def sft(**settings) -> SFTStage:
    return SFTStage(**STAGE | {"learning_rate": 1e-3} | settings)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_reasoning_is_found_by_its_text(kind, tmp_path):
    share = {"only": {"think_share": len(THINKING) / len(THINKING + PLAIN)}}
    _, report = prepared(sft(), THINKING + PLAIN, TOKENIZERS[kind], tmp_path, settings=share)
    counts = (report["totals"]["think_rows"], report["totals"]["no_think_rows"])
    assert counts == (len(THINKING), len(PLAIN))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_wrong_share_is_refused(kind, tmp_path):
    with pytest.raises(UserError, match=r"50\.0% of its 2 rows train a think block, and sources\.only\.think_share=1"):
        prepared(sft(), [THINKING[0], PLAIN[0]], TOKENIZERS[kind], tmp_path, settings={"only": {"think_share": 1.0}})


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_rows_are_the_same_to_every_tokenizer(kind):
    for row in THINKING + PLAIN:
        options = {"template_kwargs": row["chat_template_kwargs"], "today": "x"}
        assert encode(TOKENIZERS[kind], row["messages"], **options).thinks is (row in THINKING)
        context = encode(TOKENIZERS[kind], row["messages"], **options, policy=Policy(reasoning=False))
        assert context.thinks is False


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_where_every_token_trains_the_templates_own_block_is_no_reasoning(kind):
    policy = Policy(roles=("all",), reasoning=False)
    asked = [{"role": "system", "content": f"Answer as {THOUGHT}"}, *chat("u", "y")["messages"]]
    for messages, think, expected in ((asked, True, False), (asked, False, False), (chat("u", THOUGHT), True, True)):
        messages = messages if isinstance(messages, list) else messages["messages"]
        found = encode(TOKENIZERS[kind], messages, template_kwargs={"enable_thinking": think}, today="x", policy=policy)
        assert found.thinks is expected and set(found.fates) == {0}


@pytest.mark.parametrize("tags", [(), TAGS])
def test_a_block_that_the_prompt_opens_counts_and_may_be_left_out(tags):
    tokenizer = byte_level(added=tags, template=OPENING)
    messages = chat("u", "x\n</think>\ny")["messages"]
    found = encode(tokenizer, messages, today="x")
    assert found.thinks
    context = encode(tokenizer, messages, today="x", policy=Policy(reasoning=False))
    trained = [i for i, fate in zip(context.input_ids, context.fates, strict=True) if fate == 0]
    assert tokenizer.decode(trained) == "\ny<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert opens_thinking(tokenizer, prompt) and not opens_thinking(tokenizer, found.input_ids)


def test_a_pair_thinks_where_its_chosen_side_does(tmp_path):
    sides = [chat("u", THOUGHT)["messages"], chat("u", "z")["messages"]]
    rows = [{"chosen": one, "rejected": two} for one, two in (sides, sides[::-1])]
    _, report = prepared(APOStage(**STAGE), rows, TOKENIZERS["spelt out"], tmp_path)
    assert (report["totals"]["think_rows"], report["totals"]["no_think_rows"]) == (1, 1)
    assert [encode_pair(byte_level(), *pair, today="x").thinks for pair in (sides, sides[::-1])] == [True, False]


def test_special_tags_are_tokens_where_they_are_structure_and_text_elsewhere():
    tokenizer = TOKENIZERS["special"]
    ids = encode(tokenizer, chat("u", THOUGHT)["messages"], today="x").input_ids
    words = encode(tokenizer, PLAIN[1]["messages"], today="x")
    tags = tokenizer.convert_tokens_to_ids(list(TAGS))
    assert [ids.count(tag) for tag in tags] == [1, 1]
    assert [words.input_ids.count(tag) for tag in tags] == [0, 0] and words.neutralised == 2
