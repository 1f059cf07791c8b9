"""The {% generation %} tags of somebody else's template are checked on a few rows, ours on none."""

import pytest

from smolpost.chat.render import load_template
from smolpost.chat.tokenizer import build_tokenizer
from smolpost.data import tokenize
from smolpost.data.rows import Row
from smolpost.errors import UserError
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "yo"}
OTHER = {"role": "assistant", "content": "ho"}
CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}REPLY{%- else %}"
    "{{ m.content + '<|im_end|>' }}{%- endif %}{{ '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
UNTAGGED = CHATML.replace("REPLY", "{{ m.content + '<|im_end|>' }}")
TAGGED = CHATML.replace("REPLY", "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}")
WITHOUT_STOP = CHATML.replace("REPLY", "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}")
STAGE = {"init_from": "x", "data": "x", "max_seq_len": 64, "global_batch_size": 1}


@pytest.fixture
def tokenizer():
    made = build_tokenizer(["hi yo ho"], kind="bpe", vocab_size=300, template="chatml")
    made.chat_template = TAGGED
    return made


def rows(number: int, *more: dict) -> list[Row]:
    plain = [{"messages": [USER, REPLY]}] * number
    return [Row(row, "x.jsonl", i) for i, row in enumerate([*plain, *more], 1)]


def tokenized(tokenizer, found: list[Row], stage=SFTStage, **settings) -> int:
    made = stage(**{**STAGE, "learning_rate": 1e-3, **settings})
    return sum(batch.num_rows for batch in tokenize.token_batches(made, found, tokenizer))


@pytest.fixture
def asked(monkeypatch) -> list:
    """The conversations that are rendered turn by turn."""
    found, check = [], tokenize.check_spans
    monkeypatch.setattr(tokenize, "check_spans", lambda t, turns, **k: found.append(turns) or check(t, turns, **k))
    return found


def test_the_first_row_of_each_shape_is_asked(tokenizer, asked):
    longer, thinking = [USER, REPLY, USER, OTHER], [USER, {**REPLY, "content": "<think>\nhm\n</think>\nyo"}]
    found = rows(600, {"messages": longer}, {"messages": thinking}, {"messages": [USER, OTHER]})
    assert tokenized(tokenizer, found) == 603
    assert asked == [[USER, REPLY], longer, thinking]


@pytest.mark.parametrize("template", [UNTAGGED, load_template("smollm3"), load_template("chatml")])
def test_no_tags_and_our_own_are_not_asked(tokenizer, asked, template):
    tokenizer.chat_template = template
    assert tokenized(tokenizer, rows(3)) == 3 and asked == []


def test_tags_do_not_matter_where_everything_trains(tokenizer):
    tokenizer.chat_template = WITHOUT_STOP
    assert tokenized(tokenizer, rows(3), train_roles=["all"]) == 3


def test_a_wrong_one_is_named_with_its_row(tokenizer):
    tokenizer.chat_template = WITHOUT_STOP
    with pytest.raises(UserError, match=r"^x\.jsonl:1: messages\[1\]: the template's generation span is 'yo"):
        tokenized(tokenizer, rows(3))
    pair = Row({"chosen": [USER, REPLY], "rejected": [USER, OTHER]}, "p.jsonl", 7)
    with pytest.raises(UserError, match=r"^p\.jsonl:7: messages\[1\]: the template's generation span is 'yo"):
        tokenized(tokenizer, [pair], APOStage)
