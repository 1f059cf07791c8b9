"""Every refusal names a remedy; here each one is followed, and leads to prepared rows."""

import json
import re
import subprocess

import pytest

from smolpost.data.prepare import prepare
from smolpost.errors import UserError
from smolpost.schema import Hygiene, Mixture, Source
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage

SHARED = {"init_from": "x", "data": "y", "max_seq_len": 512, "global_batch_size": 1, "num_workers": 1}
SYSTEM = {"role": "system", "content": "/system_override"}
USER, REPLY, OTHER = ({"role": r, "content": c} for r, c in (("user", "u"), ("assistant", "a"), ("assistant", "b")))
CHAT = {"messages": [SYSTEM, USER, REPLY]}
PAIR = {"chosen": [SYSTEM, USER, REPLY], "rejected": [SYSTEM, USER, OTHER]}
LONG = {"messages": [SYSTEM, USER, {**REPLY, "content": "x" * 600}]}


class Attempt:
    """Rows prepared under settings of their source, stage and mixture."""

    def __init__(self, tokenizer, folder, rows, kind="sft"):
        self.tokenizer, self.folder, self.kind, self.count = tokenizer, folder, kind, 0
        self.file = folder / "rows.jsonl"
        content = rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.file.write_bytes(content)

    def __call__(self, source=None, stage=None, **mixture):
        self.count += 1
        (out := self.folder / str(self.count)).mkdir()
        kinds = {"sft": SFTStage, "apo": APOStage}
        settings = SHARED | ({"learning_rate": 1e-3} if self.kind == "sft" else {}) | (stage or {})
        sources = {"only": Source(path=str(self.file), **(source or {}))}
        mixed = Mixture(sources=sources, **mixture)
        return prepare(
            kinds[self.kind](**settings), mixed, self.tokenizer, lambda name: out / "tokenized", out
        )["totals"]  # fmt: skip

    def refused(self, **settings):
        with pytest.raises(UserError) as error:
            self(**settings)
        return str(error.value)


@pytest.fixture
def attempt(tokenizer, tmp_path):
    return lambda rows, kind="sft": Attempt(tokenizer, tmp_path, rows, kind)


SHAREGPT = {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}
BOT = {"conversations": [{"from": "human", "value": "u"}, {"from": "bot", "value": "a"}]}


@pytest.mark.parametrize(
    "row, kind, before, message, after",
    [
        (SHAREGPT, "sft", {}, "set columns: sharegpt", {"columns": "sharegpt"}),
        ({"messages": SHAREGPT["conversations"]}, "sft", {}, "set columns: sharegpt", {"columns": "sharegpt"}),
        ({"instruction": "u", "output": "a"}, "sft", {}, "set columns: alpaca", {"columns": "alpaca"}),
        ({"dialogue": CHAT["messages"]}, "sft", {}, "rename the columns", {"rename": {"dialogue": "messages"}}),
        ({"question": "u", "chosen": "a", "rejected": "b"}, "apo", {}, "rename the prompt's column",
         {"rename": {"question": "prompt"}}),
        (BOT, "sft", {"columns": "sharegpt"}, "as roles: {bot: assistant}",
         {"columns": "sharegpt", "roles": {"bot": "assistant"}}),
        ({"messages": [{**USER, "role": "client"}, REPLY]}, "sft", {}, "as roles: {client: user}",
         {"roles": {"client": "user"}}),
        ({"messages": [USER, REPLY, USER, {**USER, "content": "a"}]}, "sft", {}, "last_user_is_reply: true",
         {"last_user_is_reply": True}),
        ({**CHAT, "weight": 70}, "sft", {}, "or rename the column", {"rename": {"weight": "kilos"}}),
        ({**CHAT, "completion_mask": [1]}, "sft", {}, "remove the column", {"rename": {"completion_mask": "unused"}}),
        ({"text": "a", "words": "b"}, "sft", {"rename": {"words": "text"}}, "rename the row's own 'text' to another",
         {"rename": {"words": "text", "text": "old"}}),
        ({"text": "abc"}, "sft", {"weight": 0.1}, "raise it to 1 or more", {"weight": 1.0}),
        ({"text": "abc"}, "sft", {"first_row": 1}, "lower first_row", {"first_row": 0}),
        ({"text": "abc"}, "sft", {"max_tokens": 3}, "max_tokens=3 is below the 4 tokens of its first row; raise it",
         {"max_tokens": 4}),
        (CHAT, "sft", {"max_row_bytes": 20}, "or raise max_row_bytes of its source", {"max_row_bytes": 2000}),
        (CHAT, "sft", {"think_share": 1.0}, "or change think_share", {"think_share": 0.0}),
        (CHAT, "sft", {"think_share": 2.0}, r"null leaves it open", {"think_share": None}),
        (CHAT, "sft", {"columns": "csv"}, "use one of smoltalk2, alpaca, gsm8k, sharegpt", {"columns": "smoltalk2"}),
        (CHAT, "sft", {"roles": {"x": "judge"}}, "use one of system, user, assistant, tool", {"roles": {"x": "user"}}),
        (CHAT, "sft", {"split": "test"}, "expected one of train", {"split": "train"}),
    ],
)  # fmt: skip
def test_settings_of_a_source(attempt, row, kind, before, message, after):
    attempt = attempt([row], kind)
    assert message in attempt.refused(source=before)
    assert attempt(source=after)["rows_kept"] == 1


@pytest.mark.parametrize(
    "rows, kind, before, message, after",
    [
        ([LONG], "sft", {}, "raise max_seq_len or set overlong to truncate, split or drop", {"overlong": "truncate"}),
        ([LONG], "sft", {}, "raise max_seq_len", {"max_seq_len": 1024}),
        ([LONG], "sft", {}, "split", {"overlong": "split"}),
        ([CHAT, LONG], "sft", {"overlong": "drop"}, "raise max_dropped", {"overlong": "drop", "max_dropped": 0.5}),
        ([CHAT, {"words": 1}], "sft", {}, "or raise max_dropped=0.2", {"max_dropped": 0.5}),
        ([PAIR], "apo", {"overlong": "split"}, "pairs cannot be split; use drop", {"overlong": "drop"}),
        ([CHAT], "sft", {"train_roles": []}, "use [assistant]", {"train_roles": ["assistant"]}),
        ([CHAT], "sft", {"train_roles": ["gpt"]}, "use some of system, user, assistant", {"train_roles": ["user"]}),
        ([CHAT], "sft", {"num_workers": 0}, "use null for one per core", {"num_workers": None}),
        ([{"messages": [USER, {**REPLY, "train": False}]}], "sft", {}, "check its roles and train flags",
         {"train_roles": ["user"]}),
    ],
)  # fmt: skip
def test_settings_of_a_stage(attempt, rows, kind, before, message, after):
    attempt = attempt(rows, kind)
    assert message in attempt.refused(stage=before)
    assert attempt(stage=after)["rows_kept"] >= 1


def test_settings_of_a_mixture(attempt):
    attempt = attempt([{"text": "The weather is fine today."}])
    assert "near=2.0 is outside [0, 1]; use a similarity such as 0.8" in attempt.refused(hygiene=Hygiene(near=2.0))
    assert attempt(hygiene=Hygiene(near=0.8))["rows_kept"] == 1
    german = Hygiene(languages=["de"], min_confidence=0.1)
    assert "hygiene removes all of its 1 rows; loosen it or drop the source" in attempt.refused(hygiene=german)
    assert attempt(hygiene=Hygiene(languages=["de", "en"], min_confidence=0.1))["rows_kept"] == 1


@pytest.mark.parametrize(
    "call, message",
    [
        ({"name": "f"}, 'write "arguments": {} where the function takes none'),
        ({"name": "f", "arguments": {}, "input": {"x": 1}}, "expected the arguments in one of them"),
        ({"name": "f", "arguments": [1]}, "expected a JSON object of names and values"),
    ],
)
def test_calls(attempt, call, message):
    right = {"name": "f", "arguments": {}}
    refused, kept = ({"messages": [USER, {"role": "assistant", "tool_calls": [one]}]} for one in (call, right))
    first = attempt([refused])
    assert message in first.refused()
    first.file.write_text(json.dumps(kept))
    assert first()["rows_kept"] == 1


@pytest.mark.parametrize("encoding", ["UTF-16", "WINDOWS-1252"])
def test_other_encodings(attempt, encoding, tmp_path):
    attempt = attempt((json.dumps({"text": "café"}, ensure_ascii=False) + "\n").encode(encoding))
    command = re.search(r"`iconv (-f \S+) (-t \S+)`", attempt.refused())
    with open(attempt.file, "rb") as file:
        options = f"{command[1]} {command[2]}".split()
        done = subprocess.run(["iconv", *options], stdin=file, capture_output=True, check=True)
    attempt.file.write_bytes(done.stdout)
    assert attempt()["rows_kept"] == 1
