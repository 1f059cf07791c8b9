"""Prompts and completions, with labels or without: which rows are read, what trains, what is written."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode, encode_completion, encode_prompt, trained_by_prefixes
from smolpost.data.columns import as_row, row_for
from smolpost.data.report import format_report
from smolpost.data.rows import Row
from smolpost.data.settings import CompletionRows, LabelledRows
from smolpost.data.tokenize_completions import tokenize_completions
from smolpost.errors import UserError
from smolpost.schema import Source
from tests.prepared import prepared

USER = {"role": "user", "content": "2+2?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("4", "five"))
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
}
RESULT = {"role": "tool", "content": "4", "name": "add"}
OPPOSITE = {"messages": [USER, BAD], "label": False}
OPTIONS = {"today": "02 January 2026"}


def labelled(**settings):
    return LabelledRows(**{"data": "mixed", "max_seq_len": 2000, "num_workers": 1, "max_dropped": 0.9} | settings)


def completions(**settings):
    return CompletionRows(**{"data": "mixed", "max_seq_len": 2000, "num_workers": 1} | settings)


def contents(dataset, *without):
    return [{name: value for name, value in row.items() if name not in ("rows", *without)} for row in dataset]


def make(tmp_path, name, stage, rows, tokenizer, **mixture):
    (tmp_path / name).mkdir()
    return prepared(stage, rows, tokenizer, tmp_path / name, **mixture)


def fault(row, tokenizer, stage=None, source=None):
    """Why a row is refused."""
    stage = stage or labelled()
    try:
        row = row_for(Row(row, "f", 1), source or Source(path="f"), stage.layout)
    except UserError as error:
        return str(error)
    [found] = tokenize_completions(stage, [row], tokenizer)
    return found.fault


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("row", "source"),
    [
        ({"prompt": "2+2?", "completion": "4", "label": True}, {}),  # TRL's, as texts
        ({"prompt": [USER], "completion": [GOOD], "label": 1}, {}),  # and as turns
        ({"messages": [USER, GOOD], "label": True}, {}),  # LLaMA-Factory's and ms-swift's
        ({"messages": [USER, GOOD], "kto_tag": True}, {}),
        ({"instruction": "2+2?", "input": "", "output": "4", "kto_tag": True}, {"columns": "alpaca"}),
        (
            {
                "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
                "kto_tag": True,
            },
            {"columns": "sharegpt"},
        ),
        ({"messages": [USER, GOOD], "desirable": 1}, {"rename": {"desirable": "label"}}),
    ],
)
def test_public_sets_give_the_same_prepared_row(row, source, tokenizer, tmp_path):
    rows = [("one", row), ("other", OPPOSITE)]
    found, _ = make(tmp_path, "a", labelled(), rows, tokenizer, settings={"one": source})
    expected, _ = make(tmp_path, "b", labelled(), [{"messages": [USER, GOOD], "label": True}, OPPOSITE], tokenizer)
    assert contents(found) == contents(expected)
    assert [row["label"] for row in found] == [[1], [0]]
    assert found[0]["prompt_ids"] == encode_prompt(tokenizer, [USER], today=labelled().today)
    assert tokenizer.decode(found[0]["completion_ids"]) == "4<|im_end|>"
    assert found[0]["completion_mask"] == [1, 1]


@pytest.mark.parametrize("think", [True, False])
def test_a_pair_is_its_two_sides_written_apart(think, tokenizer, tmp_path):
    kwargs = {"chat_template_kwargs": {"enable_thinking": think}}
    good = {"role": "assistant", "content": "<think>\nadd\n</think>\n4"} if think else GOOD
    first, again = [USER, BAD], {"role": "user", "content": "Sure?"}
    pairs = [
        {"prompt": "2+2?", "chosen": [USER, good], "rejected": [USER, BAD], **kwargs},
        {"chosen": [*first, again, good], "rejected": [*first, again, BAD], **kwargs},
        {"chosen": [USER, CALL, RESULT, good], "rejected": [USER, CALL, RESULT, BAD], **kwargs},
        {"chosen": [USER, CALL, RESULT, good], "rejected": [USER, BAD], **kwargs},
    ]
    apart = [
        {"prompt": prompt, "completion": completion, "label": label, **kwargs}
        for prompt, chosen, rejected in (
            ([USER], [good], [BAD]),
            ([*first, again], [good], [BAD]),
            ([USER, CALL, RESULT], [good], [BAD]),
            ([USER], [CALL, RESULT, good], [BAD]),
        )
        for completion, label in ((chosen, True), (rejected, False))
    ]
    one, report = make(tmp_path, "pairs", labelled(), pairs, tokenizer)
    two, _ = make(tmp_path, "apart", labelled(), apart, tokenizer)
    assert contents(one) == contents(two)
    assert [row["rows"] for row in one] == [[i // 2] for i in range(8)]
    assert report["sources"]["only"]["labels"] == report["totals"]["labels"] == {"desired": 4, "undesired": 4}
    assert report["totals"]["rows_kept"] == 4 and report["totals"]["completions"] == 8


def test_the_last_reply_is_judged_unless_the_row_says_where_its_completion_begins(tokenizer, tmp_path):
    turns = [USER, CALL, RESULT, GOOD]
    for number, (row, text, mask) in enumerate(
        [
            ({"messages": turns}, "4<|im_end|>", "t"),
            ({"messages": turns, "completion_turns": 3}, None, "tut"),
            ({"prompt": "2+2?", "completion": [CALL, RESULT, GOOD]}, None, "tut"),
        ]
    ):
        found, _ = make(tmp_path, str(number), labelled(), [{**row, "label": True}, OPPOSITE], tokenizer)
        whole = encode(tokenizer, turns, today=labelled().today)
        ids = found[0]["prompt_ids"] + found[0]["completion_ids"]
        assert ids == whole.input_ids[: len(ids)] and len(whole.input_ids) - len(ids) == 1  # the last line break
        flags = np.array(found[0]["completion_mask"])
        assert "".join("tu"[1 - value] for value in flags[np.flatnonzero(np.diff(flags, prepend=-1))]) == mask
        assert not text or tokenizer.decode(found[0]["completion_ids"]) == text
        fates = np.array(found[0]["completion_fates"])
        assert (Fate.TOOL in fates) == (mask == "tut")
        # A second derivation, by prefixes: what trains after the prompt.
        other = trained_by_prefixes(tokenizer, turns, today=labelled().today)
        start = len(found[0]["prompt_ids"])
        assert (np.array(other.fates[start : len(ids)]) == Fate.TRAINED).tolist() == (flags == 1).tolist()


def test_without_labels_the_same_columns_but_the_label(tokenizer, tmp_path):
    rows = [{"messages": [USER, GOOD]}, {"prompt": "2+2?", "completion": "five"}]
    found, report = make(tmp_path, "a", completions(), rows, tokenizer)
    judged, _ = make(tmp_path, "b", labelled(), [rows[0] | {"label": True}, rows[1] | {"label": False}], tokenizer)
    assert contents(found) == contents(judged, "label") and "labels" not in report["totals"]
    assert report["totals"]["completions"] == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [USER, GOOD]}, "f:1: has no label, which says whether its reply is desired"),
        ({"messages": [USER, GOOD], "label": -1}, "f:1: label=-1 is not a mark; expected true, false, 1 or 0"),
        ({"messages": [USER, GOOD], "label": "good"}, "f:1: label='good' is not a mark"),
        ({"messages": [USER, GOOD], "label": True, "kto_tag": False}, "label=True, kto_tag=False disagree"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD], "label": True}, "has chosen and rejected and also a label"),
        ({"text": "words", "label": True}, "f:1: is a text row, and the stage trains on prompts and their completions"),
        ({"messages": [USER, GOOD], "label": True, "completion_turns": 2}, "completion_turns=2 is not one of"),
        ({"prompt": "", "completion": "4", "label": True}, "f:1: messages[0] is an empty user turn"),
        ({"prompt": "2+2?", "completion": "", "label": True}, "f:1: messages[1] is an empty assistant turn"),
        ({"prompt": [], "completion": [GOOD], "label": True}, "f:1: messages has no assistant turn after a user turn"),
    ],
)  # fmt: skip
def test_refused_rows_say_why(row, said, tokenizer):
    assert said in fault(row, tokenizer)


def test_only_a_reader_of_labels_takes_undesired_replies(tokenizer):
    assert fault(OPPOSITE, tokenizer) is None
    assert "label=false marks an undesired reply" in fault(OPPOSITE, tokenizer, completions())
    for layout in ("documents", "pairs", "completions"):
        with pytest.raises(UserError, match="label=false marks an undesired reply, and would be trained on"):
            row_for(Row(OPPOSITE, "f", 1), Source(path="f"), layout)
    found = as_row(Row({**OPPOSITE, "label": 0, "score": 3}, "f", 1), Source(path="f"), judged=True)
    assert found["label"] is False and found.unread == ("score",)
    assert as_row(found, Source(path="f"), judged=True) == found
    assert "is a preference row" in fault({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, tokenizer, completions())


# ---------------------------------------------------------------- lengths and the ledger


def test_overlong_completions(tokenizer, tmp_path):
    long = {"role": "assistant", "content": "4" * 50}
    rows = [{"messages": [USER, GOOD], "label": True}, OPPOSITE, {"chosen": [USER, GOOD], "rejected": [USER, long]}]
    prompt = len(encode_prompt(tokenizer, [USER], today=labelled().today))
    limit = prompt + 10
    with pytest.raises(UserError, match=rf"only.jsonl:3 .*has {prompt + 51} tokens, above max_seq_len={limit}; 1 of 3"):
        make(tmp_path, "refuse", labelled(max_seq_len=limit, overlong="refuse"), rows, tokenizer)
    with pytest.raises(UserError, match="overlong=split with data=mixed: a completion cannot be split"):
        make(tmp_path, "split", labelled(max_seq_len=limit, overlong="split"), rows, tokenizer)
    found, report = make(tmp_path, "drop", labelled(max_seq_len=limit, overlong="drop"), rows, tokenizer)
    assert len(found) == 2 and report["totals"]["labels"] == {"desired": 1, "undesired": 1}  # the pair goes as a whole
    assert report["totals"]["dropped"] == {"overlong": 1}
    found, report = make(tmp_path, "cut", labelled(max_seq_len=limit, overlong="truncate"), rows, tokenizer)
    assert [len(row["completion_ids"]) for row in found] == [2, 5, 2, 10] and report["totals"]["rows_truncated"] == 1
    entry = report["totals"]
    assert entry["tokens_read"] == sum(
        entry[f"tokens_{name}"] for name in ("trained", "masked", "truncated", "dropped")
    )
    assert entry["tokens_trained"] == sum(sum(row["completion_mask"]) for row in found)
    assert entry["tokens_truncated"] == 41
    with pytest.raises(UserError, match="none of its 3 rows has a trained token"):
        make(tmp_path, "none", labelled(max_seq_len=prompt, overlong="truncate", max_dropped=1.0), rows, tokenizer)


def test_one_label_alone_is_refused_and_a_source_may_have_one(tokenizer, tmp_path):
    good = {"messages": [USER, GOOD], "label": True}
    with pytest.raises(UserError, match=r"data=mixed: 2 of its completions are desired and 0 undesired; .* needs both"):
        make(tmp_path, "one", labelled(), [good, good], tokenizer)
    rows = [("liked", good), ("liked", good), ("disliked", OPPOSITE)]
    found, report = make(tmp_path, "both", labelled(), rows, tokenizer, settings={"disliked": {"loss_weight": 0.5}})
    assert {name: entry["labels"] for name, entry in report["sources"].items()} == {
        "liked": {"desired": 2, "undesired": 0},
        "disliked": {"desired": 0, "undesired": 1},
    }
    assert found["weights"] == [[1.0], [1.0], [0.5]] and report["sources"]["liked"]["rows_duplicate"] == 1
    file = io.StringIO()
    Console(file=file, width=200).print(format_report(json.loads(json.dumps(report))))
    assert "3 completions (2 desired, 1 undesired) of" in file.getvalue()
    assert "disliked: 0 desired, 1 undesired" in file.getvalue()


def test_sides_that_render_alike_contradict_each_other(tokenizer, tmp_path):
    thought = {"role": "assistant", "content": "<think>\nadd\n</think>\n4"}
    alike = {"chosen": [USER, GOOD], "rejected": [USER, thought], "chat_template_kwargs": {"enable_thinking": False}}
    found, report = make(
        tmp_path, "a", labelled(), [alike, {"messages": [USER, GOOD], "label": True}, OPPOSITE], tokenizer
    )
    assert report["totals"]["dropped"] == {"equal once rendered": 1} and len(found) == 2


def test_a_prompt_that_the_policy_would_train_stays_context(tokenizer):
    turns = [USER, GOOD, {"role": "user", "content": "And 3+3?"}, {"role": "assistant", "content": "6"}]
    found = encode_completion(tokenizer, turns, 3, **OPTIONS)
    assert Fate.TRAINED not in found.prompt_fates and set(found.completion_fates) == {Fate.TRAINED}
    assert found.prompt_ids == encode_prompt(tokenizer, turns[:3], **OPTIONS)
