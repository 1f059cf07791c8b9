"""What prepare says where a rendering is not what the row says."""

import io
import json
from itertools import islice

import pytest
from rich.console import Console

from smolpost.chat.render import load_template
from smolpost.data.columns import as_row
from smolpost.data.rendering import NOTES
from smolpost.data.report import format_report
from smolpost.data.rows import Row
from smolpost.errors import UserError
from smolpost.schema import Source
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage
from tests.families import byte_level
from tests.prepared import prepared

STAGE = {"init_from": "x", "data": "x", "max_seq_len": 2**16, "global_batch_size": 1, "num_workers": 1}
SYSTEM = {"role": "system", "content": "Reply tersely."}
USER = {"role": "user", "content": "What is six times seven?"}
REPLY = {"role": "assistant", "content": "It is 42."}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "mul", "arguments": {"a": 6, "b": 7}}}]}
RESULT = {"role": "tool", "content": '{"product": 42}'}
TOOL = {"name": "mul", "description": "Multiply.", "parameters": {"type": "object", "properties": {}}}
THINKING = REPLY | {"reasoning_content": "Six sevens."}
PLAIN = (  # ChatML as many base models have it
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ REPLY + '<|im_end|>' }}{% endgeneration %}{% else %}{{ (m.content or '') + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
DROPS_CALLS = PLAIN.replace("REPLY", "(m.content or '')")
CALLS = "(m.content or '') + (m.tool_calls | tojson if m.tool_calls else '')"
KEEPS_CALLS = PLAIN.replace("REPLY", CALLS)
UNTAGGED = DROPS_CALLS.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def sft(**settings) -> SFTStage:
    return SFTStage(**STAGE | {"learning_rate": 1e-3} | settings)


def ledger(template: str, rows: list, folder, stage: SFTStage | None = None, added=(), **settings) -> dict:
    """The entry of the rows' source."""
    tokenizer = byte_level(added=added, template=template)
    _, report = prepared(stage or sft(), rows, tokenizer, folder, settings={"only": settings})
    return report["sources"]["only"]


def row(*messages, **more) -> dict:
    return {"messages": list(messages), **more}


# ---------------------------------------------------------------- refused


REFUSED = {
    "a call is dropped": (DROPS_CALLS, row(USER, CALL), r"messages\[1\]: .* leaves the call of 'mul' out of the reply"),
    "a call beside text is dropped": (DROPS_CALLS, row(USER, CALL | REPLY), r"leaves the call of 'mul' out"),
    "arguments are dropped": (
        PLAIN.replace("REPLY", "(m.content or '') + (m.tool_calls[0].function.name if m.tool_calls else '')"),
        row(USER, CALL, RESULT, REPLY),
        r"leaves the call of 'mul' out",
    ),
    "reasoning is dropped": (DROPS_CALLS, row(USER, THINKING), r"leaves the reasoning 'Six sevens\.' out of the reply"),
    "a think block is cut off": (
        PLAIN.replace("REPLY", "m.content.split('</think>')[-1]"),
        row(USER, REPLY | {"content": "<think>\nSix sevens.\n</think>\nIt is 42."}),
        r"leaves the reasoning 'Six sevens\.' out of the reply",
    ),
    "the turn is empty": (PLAIN.replace("REPLY", "''"), row(USER, REPLY), r"leaves 'It is 42\.' out of the reply"),
    "nothing is left": (
        load_template("smollm3"),
        row(USER, REPLY | {"content": "<think>\nSix"}, chat_template_kwargs={"enable_thinking": False}),
        r"makes an empty reply of 'Six'; use another template, or delete the row",
    ),
    "text is cut": (PLAIN.replace("REPLY", "m.content[:5]"), row(USER, REPLY), r"leaves 'It is 42\.' out of the reply"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_reply_that_would_train_without_a_part_is_refused(case, tmp_path):
    template, bad, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        ledger(template, [bad], tmp_path)


def test_pairs_are_refused_for_either_side(tmp_path):
    pair = {"chosen": [USER, REPLY], "rejected": [USER, CALL]}
    with pytest.raises(UserError, match=r":1: messages\[1\]: the chat template leaves the call of 'mul' out"):
        ledger(DROPS_CALLS, [pair], tmp_path, APOStage(**STAGE))


def test_single_bad_rows_are_dropped_and_counted(tmp_path):
    entry = ledger(DROPS_CALLS, [row(USER, REPLY)] * 9 + [row(USER, CALL)], tmp_path)
    assert entry["rows_kept"] == 9 and entry["dropped"] == {"refused": 1}


def test_replies_that_do_not_train_may_lose_what_they_like(tmp_path):
    left_out = row(USER, CALL | {"train": False}, RESULT, REPLY)
    assert ledger(DROPS_CALLS, [left_out], tmp_path)["rows_kept"] == 1


@pytest.mark.parametrize("roles", [["assistant"], ["all"]])
@pytest.mark.parametrize("template", [DROPS_CALLS, UNTAGGED])
def test_a_turn_that_ends_in_text_is_refused(template, roles, tmp_path):
    ends = template.replace("<|im_end|>", "</s>")  # which the tokenizer spells out
    with pytest.raises(
        UserError, match=r"ends the turn with 't is 42\.</s>', which is not a stop .*\(<\|im_start\|>, <\|im"
    ):
        ledger(ends, [row(USER, REPLY)], tmp_path, sft(train_roles=roles))


@pytest.mark.parametrize("template", [DROPS_CALLS, UNTAGGED])
def test_a_tag_of_structure_ends_no_turn(template, tmp_path):
    ends = template.replace("<|im_end|>", "")
    reply = REPLY | {"content": '<tool_call>{"name": "mul"}</tool_call>'}
    with pytest.raises(UserError, match=r"ends the turn with '\"}</tool_call>'|ends the turn with .*</tool_call>"):
        ledger(ends, [row(USER, reply)], tmp_path, added=("<tool_call>", "</tool_call>"))


# ---------------------------------------------------------------- noted


WITHOUT = "{%- for m in messages if m.role != 'ROLE' %}"
NOTED = {
    "system": (
        KEEPS_CALLS.replace("{%- for m in messages %}", WITHOUT.replace("ROLE", "system")),
        row(SYSTEM, USER, REPLY),
    ),
    "tool results": (
        KEEPS_CALLS.replace("{%- for m in messages %}", WITHOUT.replace("ROLE", "tool")),
        row(USER, CALL, RESULT, REPLY),
    ),
    "user": (KEEPS_CALLS.replace("{%- for m in messages %}", WITHOUT.replace("ROLE", "user")), row(USER, REPLY)),
    "tools": (KEEPS_CALLS, row(USER, CALL, RESULT, REPLY, tools=[TOOL])),
    "text beside calls": (
        PLAIN.replace("REPLY", "(m.tool_calls | tojson if m.tool_calls else m.content)"),
        row(USER, CALL | {"content": "Let me see."}),
    ),
    "earlier reasoning": (
        PLAIN.replace("REPLY", "(m.reasoning_content or '' if loop.last else '') + m.content"),
        row(USER, THINKING, USER, THINKING),
    ),
    "no-think reasoning": (
        load_template("smollm3"),
        row(USER, THINKING, chat_template_kwargs={"enable_thinking": False}),
    ),
}


@pytest.mark.parametrize("note", NOTED)
def test_what_a_template_may_leave_out_is_noted(note, tmp_path):
    template, said = NOTED[note]
    plain = row(USER, REPLY, chat_template_kwargs={"enable_thinking": False})
    entry = ledger(template, [said, plain] if note != "user" else [said], tmp_path)
    without_modes = {} if note in ("user", "no-think reasoning") else {"no mode": 1}  # of the plain row
    assert entry["notes"] == {note: 1} | without_modes and {*entry["notes"]} <= {*NOTES}


def test_rows_that_ask_for_no_think_under_a_template_without_modes_are_noted(tmp_path):
    rows = [row(USER, REPLY, chat_template_kwargs={"enable_thinking": asked}) for asked in (False, True, False)]
    assert ledger(load_template("chatml"), [*rows, row(USER, REPLY)], tmp_path)["notes"] == {"no mode": 2}


def test_reasoning_may_be_left_out_by_setting_the_mode(tmp_path):
    entry = ledger(DROPS_CALLS, [row(USER, THINKING)], tmp_path, enable_thinking=False)
    assert entry["notes"] == {"no-think reasoning": 1}


def test_ones_own_templates_leave_nothing_out(tmp_path):
    think = {"chat_template_kwargs": {"enable_thinking": True}}
    said = row(SYSTEM, USER, CALL | {"content": "Let me see."}, RESULT, THINKING, USER, THINKING, tools=[TOOL], **think)
    flags = row({"role": "system", "content": "Reply /no_think tersely. /system_override"}, USER, REPLY)
    quoted = row(USER, REPLY | {"content": '  "é"\n\n\tline\r\n'}, **think)
    blocks = row(USER, REPLY | {"content": "<think>\na\n</think>\n\n<think>b</think>\n\nIt is </think> 42."}, **think)
    entry = ledger(load_template("smollm3"), [said, flags, quoted, blocks], tmp_path)
    assert entry["notes"] == {} and entry["rows_kept"] == 4


# ---------------------------------------------------------------- modes


def test_rows_that_do_not_say_their_mode_are_noted_with_share_and_setting(tmp_path):
    stated = [row(USER, REPLY, chat_template_kwargs={"enable_thinking": value}) for value in (True, False)]
    words = [row({"role": "system", "content": f"Reply. {word}"}, USER, REPLY) for word in ("/think", "/no_think")]
    rows = [
        *stated,
        *words,
        row(USER, THINKING),
        {"text": "no conversation"},
        row(USER, REPLY),
        row(SYSTEM, USER, REPLY),
    ]
    tokenizer = byte_level()
    _, report = prepared(sft(), rows, tokenizer, tmp_path)
    assert report["sources"]["only"]["notes"] == {"mode": 2} == report["totals"]["notes"]
    console = Console(width=1000, file=io.StringIO())
    console.print(format_report(report))
    assert (
        "only: 2 of 8 rows (25%) do not state their mode and have no think block, so they train as replies in think "
        "mode; set enable_thinking: false of the source, mode_from_reply: true where other rows of it think, or each "
        "row's own in chat_template_kwargs\n"
    ) in console.file.getvalue()


def test_a_source_may_take_the_mode_from_the_last_reply(tmp_path):
    """Stated modes stay; an empty block, reasoning of an earlier reply and words about the tag do not think."""
    aside = {**THINKING, "reasoning_content": "so"}
    rows = [
        row(USER, THINKING),
        row(USER, {**REPLY, "reasoning_content": "so"}),
        row(USER, REPLY),
        row(USER, {**REPLY, "content": f"<think>\n\n</think>\n\n{REPLY['content']}"}),
        row(USER, aside, USER, REPLY),
        row(USER, {**REPLY, "content": "It writes <think>a</think> first."}),
        row(USER, REPLY) | {"chat_template_kwargs": {"enable_thinking": True}},
    ]
    modes = [
        as_row(Row(content, "f", number), Source(path="f", mode_from_reply=True))["chat_template_kwargs"]
        for number, content in enumerate(rows, 1)
    ]
    assert [mode["enable_thinking"] for mode in modes] == [True, True, False, False, False, False, True]
    pair = {"chosen": [USER, THINKING], "rejected": [USER, REPLY]}
    assert as_row(Row(pair, "f", 1), Source(path="f", mode_from_reply=True))["chat_template_kwargs"] == {
        "enable_thinking": True
    }


@pytest.mark.parametrize("thinks", [True, False])
def test_a_source_may_say_the_mode_of_rows_that_do_not(thinks, tmp_path):
    other = row(USER, REPLY, chat_template_kwargs={"enable_thinking": not thinks})
    tokenizer = byte_level()
    dataset, report = prepared(
        sft(packing="none"),
        [row(USER, REPLY), other],
        tokenizer,
        tmp_path,
        settings={"only": {"enable_thinking": thinks}},
    )
    shown = ["Reasoning Mode: /think" in tokenizer.decode(pack["input_ids"]) for pack in dataset]
    assert shown == [thinks, not thinks] and report["totals"]["notes"] == {}


@pytest.mark.parametrize("template", [load_template("chatml"), DROPS_CALLS])
def test_templates_without_modes_note_none(template, tmp_path):
    assert ledger(template, [row(USER, REPLY)], tmp_path)["notes"] == {}


def test_a_pair_is_noted_by_its_chosen_side(tmp_path):
    pairs = [
        {"chosen": [USER, one], "rejected": [USER, other]} for one, other in ((REPLY, THINKING), (THINKING, REPLY))
    ]
    assert ledger(load_template("smollm3"), pairs, tmp_path, APOStage(**STAGE))["notes"] == {"mode": 1}


@pytest.mark.parametrize("name", ["tools", "sft"])
def test_rows_of_files_lose_nothing(rows_file, name, tmp_path):
    with rows_file(name).open() as lines:
        rows = [json.loads(line) for line in islice(lines, 32)]
    entry = ledger(load_template("smollm3"), rows, tmp_path, sft(max_seq_len=2**18))
    says = "chat_template_kwargs" in rows[0]
    assert entry["rows_kept"] == 32 and entry["notes"] == ({} if says else {"mode": 32})
