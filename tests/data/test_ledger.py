"""What the mixture and the ledger do to rows, in numbers worked out by hand."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from smolpost.chat.fates import Fate
from smolpost.data.mixtures import within_shares
from smolpost.errors import UserError
from smolpost.schema import Hygiene, Mixture, Source
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage
from tests.families import byte_level
from tests.prepared import prepared

SHARED = {"init_from": "x", "data": "y", "max_seq_len": 64, "global_batch_size": 1, "num_workers": 1}


def sft(**settings):
    return SFTStage(**{**SHARED, "learning_rate": 1e-3} | settings)


def chat(user, reply, *, think=True, **more):
    system = {"role": "system", "content": "/system_override"}
    turns = [system, {"role": "user", "content": user}, {"role": "assistant", "content": reply, **more}]
    return {"messages": turns, "chat_template_kwargs": {"enable_thinking": think}}


# ---------------------------------------------------------------- shares, caps, weights


def sized(**lengths):
    return {name: np.array(sizes) for name, sizes in lengths.items()}


def counts(sizes, share_of="tokens", **settings):
    sources = {name: Source(path="x", **settings.get(name, {})) for name in sizes}
    return within_shares(Mixture(sources=sources, share_of=share_of), sizes)


def test_max_tokens_ends_a_source_before_the_row_that_goes_beyond():
    sizes = sized(a=[5, 5, 5, 5], b=[3])
    assert counts(sizes, a={"max_tokens": 15}) == {"a": 3, "b": 1}
    assert counts(sizes, a={"max_tokens": 14}) == {"a": 2, "b": 1}
    with pytest.raises(UserError, match=r"sources.a.max_tokens=4 is below the 5 tokens of its first row"):
        counts(sizes, a={"max_tokens": 4})


def test_shares_are_of_tokens_or_rows_and_the_scarcest_source_is_taken_whole():
    sizes = sized(a=[10] * 100, b=[50] * 4)  # b has 200 tokens: a quarter of 800
    shares = {"a": {"share": 0.75}, "b": {"share": 0.25}}
    assert counts(sizes, **shares) == {"a": 60, "b": 4}
    assert counts(sizes, "rows", **shares) == {"a": 12, "b": 4}
    assert counts(sizes, a={"share": 0.5}, b={"share": 0.5, "max_tokens": 100}) == {"a": 10, "b": 2}


@pytest.mark.parametrize(
    "sources, message",
    [
        ({"a": {"share": 0.5}, "b": {}}, r"sources b have no share, but other sources have"),
        ({"a": {"share": 0.5}, "b": {"share": 0.6}}, r"are not all above 0 with a sum of 1"),
        ({"a": {"loss_weight": 0}}, r"sources.a.loss_weight=0 is not above 0"),
        ({"a": {"max_tokens": 0}}, r"sources.a.max_tokens=0 is below 1"),
        ({"a": {"think_share": 1.5}}, r"sources.a.think_share=1.5 is not in \[0, 1\]"),
    ],
)
def test_settings_of_sources_are_checked(tokenizer, tmp_path, sources, message):
    rows = [(name, {"text": "abc"}) for name in sources]
    with pytest.raises(UserError, match=message):
        prepared(sft(), rows, tokenizer, tmp_path, settings=sources)


def test_realised_shares_are_those_asked_for(tokenizer, tmp_path):
    rng = np.random.default_rng(0)
    rows = [(name, {"text": "x" * rng.integers(2, 40)}) for name in ("a", "b") for _ in range(200)]
    shares = {"a": {"share": 0.9}, "b": {"share": 0.1}}
    _, report = prepared(sft(), rows, tokenizer, tmp_path, settings=shares, shuffle=True)
    read = {name: entry["tokens_read"] for name, entry in report["sources"].items()}
    assert read["b"] / sum(read.values()) == pytest.approx(0.1, abs=0.005)
    assert report["sources"]["a"]["rows_read"] == report["sources"]["a"]["rows_available"] == 200


def test_loss_weights_go_with_their_documents(tokenizer, tmp_path):
    rows = [("a", {"text": "aaa"}), ("b", {"text": "bb"})]
    dataset, _ = prepared(sft(), rows, tokenizer, tmp_path, settings={"b": {"loss_weight": 0.25}})
    (pack,) = dataset
    by_length = dict(zip(pack["seq_lengths"], pack["seq_weights"], strict=True))
    assert by_length == {4: 1.0, 3: 0.25}


# ---------------------------------------------------------------- the ledger


def test_every_token_is_masked_for_a_reason(tokenizer, tmp_path):
    turns = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "skip", "train": False},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "reply"},
    ]
    row = {"messages": [{"role": "system", "content": "/system_override"}, *turns]}
    dataset, report = prepared(sft(), [row], tokenizer, tmp_path)
    masked = report["sources"]["only"]["masked"]
    # Each turn: <|im_start|> role newline ... <|im_end|> newline, a token each.
    assert masked["user"] == 3 and masked["first of a document"] == 1
    assert masked["reply left out"] == len("skip") + 1 or masked["reply left out"] == len("skip")
    assert sum(masked.values()) == report["totals"]["tokens_masked"]
    assert report["totals"]["tokens_trained"] == len("reply") + 1
    fates = np.array(dataset[0]["fates"])
    assert np.bincount(fates, minlength=len(Fate))[Fate.USER] == 3


def test_reasoning_may_be_context_only(tokenizer, tmp_path):
    row = chat("u", "<think>\nxyz\n</think>\nfine")
    dataset, report = prepared(sft(train_reasoning=False), [row], tokenizer, tmp_path)
    trained = np.array(dataset[0]["input_ids"])[np.array(dataset[0]["fates"]) == Fate.TRAINED]
    assert tokenizer.decode(trained).strip() == "fine<|im_end|>"
    assert report["totals"]["think_rows"] == 0
    assert report["totals"]["masked"]["reasoning left out"] >= len("xyz") + 2


def test_more_dropped_rows_than_stated_are_refused_with_the_numbers(tokenizer, tmp_path):
    rows = [chat("a", "b")] * 3 + [chat("u" * 80, "r")]
    stage = {"overlong": "drop", "max_dropped": 0.2}
    message = r"source only: 25.0% of its 4 rows are dropped \(1 overlong\), above max_dropped=0.2"
    with pytest.raises(UserError, match=message):
        prepared(sft(**stage), rows, tokenizer, tmp_path)


def test_another_share_of_think_rows_than_declared_is_refused(tokenizer, tmp_path):
    think, no_think = chat("u", "<think>\nx\n</think>\ny"), chat("u", "y", think=False)
    message = r"source only: 25.0% of its 4 rows train a think block, and sources.only.think_share=0.5"
    with pytest.raises(UserError, match=message):
        prepared(sft(), [think, *[no_think] * 3], tokenizer, tmp_path, settings={"only": {"think_share": 0.5}})


def test_duplicates_are_counted_and_rows_are_listed(tokenizer, tmp_path):
    rows = [("a", {"text": "same"}), ("a", {"text": "other"}), ("b", {"text": "same"}), ("b", {"text": "x" * 90})]
    stage = sft(overlong="drop", max_dropped=0.5)
    _, report = prepared(stage, rows, tokenizer, tmp_path)
    assert [report["sources"][name]["rows_duplicate"] for name in "ab"] == [0, 1]
    table = pq.read_table(tmp_path / "rows" / "rows.parquet").to_pydict()
    assert table["source"] == ["a", "a", "b", "b"] and table["number"] == [1, 2, 1, 2]
    assert table["dropped"] == ["", "", "", "overlong"] and table["tokens"] == [5, 6, 5, 91]
    lines = (tmp_path / "rows" / "dropped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"source": "b", "path": str(tmp_path / "b.jsonl"), "row": 2, "reason": "overlong", "detail": "91 tokens"}
    ]


def test_hygiene_removes_the_later_of_two_and_says_which(tokenizer, tmp_path):
    rows = [("a", {"text": "one  two"}), ("b", {"text": "one two"}), ("b", {"text": "three"})]
    stage = sft(max_dropped=0.5)
    dataset, report = prepared(stage, rows, tokenizer, tmp_path, hygiene=Hygiene(exact=True))
    assert report["sources"]["b"]["dropped"] == {"exact duplicate": 1}
    assert (report["sources"]["b"]["rows_read"], report["sources"]["b"]["rows_kept"]) == (2, 1)
    entry = report["totals"]
    assert entry["tokens_read"] == sum(entry[f"tokens_{k}"] for k in ("trained", "masked", "truncated", "dropped"))
    (line,) = (tmp_path / "rows" / "dropped.jsonl").read_text().splitlines()
    assert json.loads(line)["detail"] == f"of {tmp_path / 'a.jsonl'}:1"
    assert sorted(n for pack in dataset for n in pack["rows"]) == [0, 2]


def test_control_tokens_in_a_users_text_are_counted(tokenizer, tmp_path):
    _, report = prepared(sft(), [chat("a<|im_end|>b", "c")], tokenizer, tmp_path)
    assert report["totals"]["tokens_neutralised"] == 1


def test_roles_are_checked(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"train_roles=\['robot'\]: robot is not a choice; use some of system"):
        prepared(sft(train_roles=["robot"]), [chat("a", "b")], tokenizer, tmp_path)
    (tmp_path / "two").mkdir()
    pair = {"prompt": "u", "chosen": chat("u", "a")["messages"], "rejected": chat("u", "b")["messages"]}
    with pytest.raises(UserError, match=r"all is not a choice"):
        prepared(APOStage(**SHARED, train_roles=["all"]), [pair], tokenizer, tmp_path / "two")


@pytest.mark.parametrize("special, end", [(["<|endoftext|>"], "<|endoftext|>"), ([], "<|im_end|>")])
def test_texts_end_with_the_familys_end_of_text(tmp_path, special, end):
    """Not with the end of a turn, which is the eos_token of a chat model."""
    tokenizer = byte_level(*special)
    dataset, _ = prepared(sft(), [{"text": "abc"}], tokenizer, tmp_path)
    assert tokenizer.decode(dataset[0]["input_ids"]) == "abc" + end
