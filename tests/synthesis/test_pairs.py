"""Pairs are SmolTalk2 Preference rows, drops are counted, and an interrupted run ends in the same bytes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smolpost.chat.masks import encode_pair
from smolpost.chat.tokenizer import build_tokenizer
from smolpost.data.validate import validate_row
from smolpost.errors import UserError
from smolpost.stages.pairs import PairsStage
from smolpost.synthesis import pairs
from smolpost.synthesis.pairs import sample_pairs
from tests.synthesis.tiny_checkpoints import make_rows

TODAY = "08 July 2025"


def stage(**changes):
    options = dict(prompts="prompts", chosen_from="sft", rejected_from="mid", max_new_tokens=32, batch_size=4)
    return PairsStage(**{**options, **changes})


def written(folder):
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def solve(prompt):
    """Reply to `i+i?` in the prompt's mode."""
    number = int(re.search(r"(\d+)\+", prompt).group(1))
    thinks = prompt.endswith("assistant\n")
    return ("<think>\nsum\n</think>\n" if thinks else "") + str(2 * number)


def fail(prompt):
    return solve(prompt) + "0"


# ---------------------------------------------------------------- rows


def test_rows_have_smoltalk2s_preference_shape(rig, tokenizer, tmp_path):
    rows = make_rows(3)
    report = sample_pairs(stage(), rows, rig(solve), rig(fail), tmp_path)
    assert report == {
        "rows": 3,
        "pairs": 3,
        "dropped": {},
        "cut": {"chosen": 0, "rejected": 0},
        "mean_tokens": {"chosen": (2 + 10 + 2) / 3, "rejected": (3 + 11 + 3) / 3},
    }
    assert written(tmp_path)[1] == {
        "prompt": "1+1?",
        "chosen": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "<think>\nsum\n</think>\n2"},
        ],
        "rejected": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "<think>\nsum\n</think>\n20"},
        ],
        "chat_template_kwargs": rows[1]["chat_template_kwargs"],
        "source": "sums_pairs",
    }
    assert [row["chosen"][1]["content"] for row in written(tmp_path)] == ["0", "<think>\nsum\n</think>\n2", "4"]
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
    for row in written(tmp_path):
        assert validate_row(row, "pairs.jsonl") == "preference"


def test_replies_end_where_each_checkpoint_says_and_the_line_says_what_to_change(rig, tokenizer, tmp_path, capsys):
    """A chosen checkpoint that stock `generate` runs past the end of a turn has no whole reply."""
    chosen, rejected = rig(solve), rig(fail)
    chosen[0].generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    chosen[0].reply = lambda prompt: solve(prompt) + "<|im_end|>\n<|im_start|>user\nAnd more?" + "x" * 32
    with pytest.raises(UserError, match=r"no pair is left of 3 rows \(chosen_cut 3\)"):
        sample_pairs(stage(), make_rows(3), chosen, rejected, tmp_path)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("sft stops at <|end_of_text|> and not at <|im_end|>, which ends a reply in its chat ")
    chosen[0].generation_config.eos_token_id = tokenizer.eos_token_id  # as the line says
    assert sample_pairs(stage(), make_rows(3), chosen, rejected, tmp_path)["pairs"] == 3  # replies are sampled again
    assert capsys.readouterr().out == ""


def test_training_reads_the_prompt_that_was_asked_and_the_reply_that_was_given(rig, tokenizer, tmp_path):
    chosen, rejected = rig(solve), rig(fail)
    sample_pairs(stage(), make_rows(4), chosen, rejected, tmp_path)
    read = {}
    for row in written(tmp_path):
        options = dict(template_kwargs=row["chat_template_kwargs"], today=TODAY)
        pair = encode_pair(tokenizer, row["chosen"], row["rejected"], **options)
        assert not any(pair.chosen_fates) and not any(pair.rejected_fates)  # all trained
        prompt = tokenizer.decode(pair.prompt_ids)
        read[prompt] = tokenizer.decode(pair.chosen_ids), tokenizer.decode(pair.rejected_ids)
    asked = chosen[0].prompts
    assert sorted(asked) == sorted(rejected[0].prompts) == sorted(read)
    assert all(read[prompt] == (solve(prompt) + "<|im_end|>", fail(prompt) + "<|im_end|>") for prompt in asked)


def test_the_prompt_ends_before_the_last_assistant_turn_and_tools_stay(rig, tmp_path):
    turns = ("user", "1+1?"), ("assistant", "2"), ("user", "3+3?"), ("assistant", "6"), ("user", "thanks")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    row = {"messages": [{"role": role, "content": text} for role, text in turns], "source": "chat", "tools": tools}
    chosen = rig(lambda prompt: "a")
    sample_pairs(stage(), [row], chosen, rig(lambda prompt: "b"), tmp_path)
    (pair,) = written(tmp_path)
    assert (pair["prompt"], pair["tools"], pair["chat_template_kwargs"]) == ("3+3?", tools, {})
    assert pair["chosen"][:-1] == pair["rejected"][:-1] == row["messages"][:3]
    assert '"name": "f"' in chosen[0].prompts[0] and "thanks" not in chosen[0].prompts[0]


def test_the_stages_template_renders_both_sides_and_tokenizers_stay(rig, tokenizer, tmp_path):
    before = tokenizer.chat_template
    chosen, rejected = rig(solve), rig(fail)
    sample_pairs(stage(template="chatml"), make_rows(2), chosen, rejected, tmp_path)
    expected = [f"<|im_start|>user\n{i}+{i}?<|im_end|>\n<|im_start|>assistant\n" for i in (0, 1)]
    assert chosen[0].prompts == rejected[0].prompts == expected
    assert tokenizer.chat_template == before


def test_each_side_speaks_through_its_own_tokenizer(rig, tmp_path):
    other = build_tokenizer(["abc 123"], kind="bpe", vocab_size=300, template="smollm3")
    rejected, _ = rig(fail)
    rejected.tokenizer = other
    sample_pairs(stage(), make_rows(2), rig(solve), (rejected, other), tmp_path)
    assert [row["rejected"][1]["content"] for row in written(tmp_path)] == ["00", "<think>\nsum\n</think>\n20"]


# ---------------------------------------------------------------- keep


def some_wrong(*numbers):
    return lambda prompt: fail(prompt) if re.search(rf"\n({'|'.join(map(str, numbers))})\+", prompt) else solve(prompt)


@pytest.mark.parametrize(
    ("keep", "kept", "dropped"),
    [
        ("different", [1, 2, 3], {"identical": 2}),
        ("chosen_right", [1, 3], {"identical": 2, "chosen_wrong": 1}),
        ("right_and_wrong", [1], {"identical": 2, "chosen_wrong": 1, "rejected_right": 1}),
    ],
)
def test_keep_and_the_reasons_of_every_drop(rig, tmp_path, keep, kept, dropped):
    # 0 and 4: both right; 1: rejected wrong; 2: chosen wrong; 3: both right, by another way of thinking.
    chosen = rig(some_wrong(2))
    rejected = rig(lambda prompt: some_wrong(1)(prompt).replace("sum", "why" if "3+3?" in prompt else "sum"))
    report = sample_pairs(stage(keep=keep), make_rows(5), chosen, rejected, tmp_path)
    assert [row["prompt"] for row in written(tmp_path)] == [f"{i}+{i}?" for i in kept]
    assert (report["pairs"], report["dropped"]) == (len(kept), dropped)
    assert report["pairs"] + sum(report["dropped"].values()) == report["rows"]


def test_a_cut_chosen_reply_is_dropped_and_a_cut_rejected_one_is_counted(rig, tmp_path):
    def rambling(*numbers):
        return lambda prompt: "so " * 20 if re.search(rf"\n({'|'.join(map(str, numbers))})\+", prompt) else fail(prompt)

    report = sample_pairs(stage(), make_rows(4), rig(rambling(1)), rig(rambling(1, 2, 3)), tmp_path)
    assert (report["cut"], report["dropped"]) == ({"chosen": 1, "rejected": 3}, {"chosen_cut": 1, "identical": 1})
    assert [row["prompt"] for row in written(tmp_path)] == ["2+2?", "3+3?"]
    assert written(tmp_path)[0]["rejected"][1]["content"] == "so " * 10 + "so"


def test_replies_that_training_would_read_alike_are_identical(rig, tmp_path):
    # The template strips reasoning in no-think mode: of row 0 nothing but the answer, "x", would be left on both sides.
    report = sample_pairs(
        stage(), make_rows(2), rig(lambda prompt: "<think>\na\n</think>\nx"), rig(lambda prompt: "x"), tmp_path
    )
    assert (report["dropped"], [row["prompt"] for row in written(tmp_path)]) == ({"identical": 1}, ["1+1?"])


def test_no_pair_left_is_an_error_that_counts(rig, tmp_path):
    rows = make_rows(4)
    with pytest.raises(UserError, match=r"no pair is left of 4 rows \(identical 4\); take a weaker rejected_from"):
        sample_pairs(stage(), rows, rig(solve), rig(solve), tmp_path)
    del rows[3]["messages"][1]
    counts = r"\(chosen_wrong 2, identical 1, no_reference 1\); take a stronger chosen_from"
    with pytest.raises(UserError, match=counts):
        mostly = rig(lambda prompt: solve(prompt) if "0+0" in prompt else fail(prompt) + "0")
        sample_pairs(stage(keep="chosen_right", seed=1), rows, mostly, rig(some_wrong(1, 2, 3)), tmp_path)
    assert not (tmp_path / "pairs.jsonl").exists()
    with pytest.raises(UserError, match="no pair can be sampled from 0 rows"):
        sample_pairs(stage(), [], rig(solve), rig(fail), tmp_path)


def test_another_keep_reuses_the_replies_of_a_run_that_left_no_pair(rig, tmp_path):
    chosen, rejected = rig(solve), rig(lambda prompt: solve(prompt).replace("sum", "why"))
    with pytest.raises(UserError, match="rejected_right 2"):
        sample_pairs(stage(keep="right_and_wrong"), make_rows(4), chosen, rejected, tmp_path)
    num_asked = len(chosen[0].prompts)
    sample_pairs(stage(keep="chosen_right"), make_rows(4), chosen, rejected, tmp_path)
    assert len(chosen[0].prompts) == num_asked and len(written(tmp_path)) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "once", "source": "web"}, "a row of source 'web': has no messages but the columns text, source"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "has no user turn before its last reply"),
        (
            {"messages": make_rows(1)[0]["messages"], "chat_template_kwargs": {"enable_thinking": "no"}},
            "a row of source None: .*enable_thinking='no' is not a boolean",
        ),
    ],
)
def test_rows_that_are_no_prompts_are_refused_before_anything_is_written(rig, tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        sample_pairs(stage(), [*make_rows(2), row], rig(solve), rig(fail), tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- interruption

NUM_ROWS = 22  # six batches of four, the last one short
ROWS = make_rows(NUM_ROWS)


def sampled(tokenizer, models, folder, **changes):
    folder.mkdir(exist_ok=True)
    chosen, rejected = ((model, tokenizer) for model in models)
    options = dict(temperature=1.0, max_new_tokens=24)
    report = sample_pairs(stage(keep="different", **{**options, **changes}), ROWS, chosen, rejected, folder)
    return report, (folder / "pairs.jsonl").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tokenizer, models, tmp_path_factory):
    report, content = sampled(tokenizer, models, tmp_path_factory.mktemp("whole"))
    assert 3 <= report["pairs"] < NUM_ROWS
    return report, content


class Cut(Exception):
    pass


def interrupted(tokenizer, models, folder, num_batches, monkeypatch):
    """Leave the partial file of a run that ended after some batches; return its bytes."""
    append, count = pairs._append, iter(range(num_batches))

    def append_or_cut(file, replies):
        if next(count, None) is None:
            raise Cut
        append(file, replies)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(pairs, "_append", append_or_cut)
        sampled(tokenizer, models, folder)
    return (folder / "replies.partial.jsonl").read_bytes()


def test_an_interrupted_run_goes_on_wherever_the_file_was_torn(tokenizer, models, uninterrupted, tmp_path, monkeypatch):
    content = interrupted(tokenizer, models, tmp_path / "first", 3, monkeypatch)
    ends = [match.end() for match in re.finditer(rb"\n", content)]
    assert len(ends) == 4
    for length in (0, 1, ends[0] - 1, ends[0], ends[1] - 1, ends[2] + 9, ends[3] - 1, ends[3]):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "replies.partial.jsonl").write_bytes(content[:length])
        assert sampled(tokenizer, models, folder) == uninterrupted
        assert [path.name for path in folder.iterdir()] == ["pairs.jsonl"]


def test_a_run_may_be_torn_more_than_once(tokenizer, models, uninterrupted, tmp_path, monkeypatch):
    first = interrupted(tokenizer, models, tmp_path, 2, monkeypatch)
    (tmp_path / "replies.partial.jsonl").write_bytes(first[:-5])
    second = interrupted(tokenizer, models, tmp_path, 2, monkeypatch)
    assert second.startswith(first) and second.count(b"\n") == 4
    assert sampled(tokenizer, models, tmp_path) == uninterrupted


def test_sides_and_batches_draw_different_numbers(tokenizer, models, tmp_path):
    checkpoint = (models[0], tokenizer)
    rows = make_rows(1) * 6
    report = sample_pairs(stage(temperature=1.0, batch_size=2), rows, checkpoint, checkpoint, tmp_path)
    replies = [row[side][-1]["content"] for row in written(tmp_path) for side in ("chosen", "rejected")]
    assert len(set(replies)) == len(replies) == 2 * report["pairs"] > 4


def test_finished_batches_are_not_sampled_again(tokenizer, models, uninterrupted, tmp_path, monkeypatch, capsys):
    interrupted(tokenizer, models, tmp_path, 4, monkeypatch)
    calls = []
    generate = pairs.generate
    monkeypatch.setattr(pairs, "generate", lambda *a, **k: calls.append(len(a[1])) or generate(*a, **k))
    assert sampled(tokenizer, models, tmp_path) == uninterrupted
    assert calls == [4, 4, 2, 2]
    assert re.search(
        rf"preference pairs: {NUM_ROWS} rows in \d+ s \({NUM_ROWS - 6} were there\)\n", capsys.readouterr().err
    )


def test_replies_to_other_settings_are_discarded(tokenizer, models, uninterrupted, tmp_path, monkeypatch):
    interrupted(tokenizer, models, tmp_path / "a", 3, monkeypatch)
    other = sampled(tokenizer, models, tmp_path / "a", seed=1)
    assert other == sampled(tokenizer, models, tmp_path / "b", seed=1)
    assert other != uninterrupted


def test_a_kill_between_the_last_two_steps_changes_nothing(tokenizer, models, uninterrupted, tmp_path, monkeypatch):
    def cut(path):
        raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Path, "unlink", cut)
        sampled(tokenizer, models, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "replies.partial.jsonl"]
    assert sampled(tokenizer, models, tmp_path) == uninterrupted


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.synthesis.tiny_checkpoints import make_models, make_rows, make_tokenizer
from smolpost.stages.pairs import PairsStage
from smolpost.synthesis import pairs
generate = pairs.generate
def slowly(*args, **kwargs):
    time.sleep(0.3)  # the parent's time to kill in the middle
    return generate(*args, **kwargs)
pairs.generate = slowly
tokenizer = make_tokenizer()
chosen, rejected = ((model, tokenizer) for model in make_models(tokenizer))
stage = PairsStage(prompts="p", chosen_from="a", rejected_from="b", max_new_tokens=24, batch_size=4, temperature=1.0)
pairs.sample_pairs(stage, make_rows({num_rows}), chosen, rejected, Path(sys.argv[1]))
"""


def test_a_run_killed_for_real_ends_in_the_same_bytes(tokenizer, models, uninterrupted, tmp_path):
    script = CHILD.format(root=str(Path(__file__).parents[2]), num_rows=NUM_ROWS)
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    partial, deadline = tmp_path / "replies.partial.jsonl", time.monotonic() + 120
    while not partial.exists() or partial.read_bytes().count(b"\n") < 3:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert 3 <= partial.read_bytes().count(b"\n") < 7 and not (tmp_path / "pairs.jsonl").exists()
    assert sampled(tokenizer, models, tmp_path) == uninterrupted
