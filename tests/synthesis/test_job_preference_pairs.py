"""Pairs are SmolTalk2 Preference rows: what each side replied, and a reason for every pair that is dropped."""

import asyncio
import re

import pytest

from smolpost.chat.masks import encode_pair
from smolpost.data.validate import validate_row
from smolpost.errors import UserError
from smolpost.schema import RELEASE_DAY
from smolpost.stages.pairs import PairsStage
from smolpost.synthesis import local
from smolpost.synthesis.jobs.complement import sources_of_mode
from smolpost.synthesis.jobs.preference_pairs import PreferencePairs
from smolpost.synthesis.local import LocalTeacher
from smolpost.synthesis.records import Record, Reply
from smolpost.synthesis.settings import Filters, Teacher
from tests.synthesis.fakes import thinking_reply
from tests.synthesis.generated import Generated
from tests.synthesis.tiny_checkpoints import make_rows

TEACHERS = """
chosen: {{stage: null, model: big, url: http://localhost:1/v1, thinking: {thinking}}}
rejected: {{stage: null, model: small, url: http://localhost:1/v1, thinking: {thinking}}}
"""


OFF = Filters(think_format=False)


def stage(**changes):
    teachers = {role: Teacher(stage="sft", max_new_tokens=40, batch_size=4) for role in ("chosen", "rejected")}
    return PairsStage(**{"prompts": "prompts", **teachers, **changes})


def local_teacher(checkpoint, teacher):
    return LocalTeacher(lambda: checkpoint, teacher, RELEASE_DAY, key="stages.pairs.teacher")


def outcomes(settings, rows, chosen, rejected):
    """What becomes of the rows where two engines reply; the job that made them."""
    job = PreferencePairs(settings, [("sums", row) for row in rows])
    engines = {"chosen": chosen, "rejected": rejected}
    prompts = list(job.prompts())

    async def records(role):
        async with engines[role] as engine:
            samples = await asyncio.gather(*(job.converse(role, prompt, engine.ask) for prompt in prompts))
        return [Record(prompt.id, prompt.source, sample) for prompt, sample in zip(prompts, samples, strict=True)]

    kept = {role: asyncio.run(records(role)) for role in engines}
    return [
        outcome
        for i, prompt in enumerate(prompts)
        for outcome in job.outcomes(prompt, {role: kept[role][i] for role in engines})
    ]


@pytest.fixture
def made(rig):
    """outcomes(...) of two checkpoints that reply as functions say."""

    def make(rows, chosen, rejected, /, **changes):
        settings = stage(**changes)
        checkpoints = {"chosen": rig(chosen), "rejected": rig(rejected)}
        engines = [local_teacher(checkpoints[role], getattr(settings, role)) for role in settings.ROLES]
        make.asked = [model.prompts for model, _ in checkpoints.values()]
        return outcomes(settings, rows, *engines)

    return make


def solve(prompt):
    """Reply to `i+i?` in the prompt's mode."""
    number = int(re.search(r"(\d+)\+", prompt).group(1))
    thinks = prompt.endswith("assistant\n")
    return ("<think>\nsum\n</think>\n" if thinks else "") + str(2 * number)


def fail(prompt):
    return solve(prompt) + "0"


# ---------------------------------------------------------------- rows


def test_rows_have_smoltalk2s_preference_shape(made):
    rows = make_rows(3)
    found = [outcome.row for outcome in made(rows, solve, fail)]
    assert found[1] == {
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
    assert [row["chosen"][1]["content"] for row in found] == ["0", "<think>\nsum\n</think>\n2", "4"]
    for row in found:
        assert validate_row(row, "rows.parquet") == "preference"


def test_training_reads_the_prompt_that_was_asked_and_the_reply_that_was_given(made, tokenizer):
    """Byte for byte, as a model learns from the tokens that it wrote."""
    read = {}
    for outcome in made(make_rows(4), solve, fail):
        options = dict(template_kwargs=outcome.row["chat_template_kwargs"], today=RELEASE_DAY)
        pair = encode_pair(tokenizer, outcome.row["chosen"], outcome.row["rejected"], **options)
        assert not any(pair.chosen_fates) and not any(pair.rejected_fates)  # all trained
        prompt = tokenizer.decode(pair.prompt_ids)
        read[prompt] = tokenizer.decode(pair.chosen_ids), tokenizer.decode(pair.rejected_ids)
    asked, by_rejected = made.asked
    assert sorted(asked) == sorted(by_rejected) == sorted(read)
    assert all(read[prompt] == (solve(prompt) + "<|im_end|>", fail(prompt) + "<|im_end|>") for prompt in asked)


def test_servers_replies_have_the_canonical_form(tmp_path, monkeypatch):
    weak = lambda request: thinking_reply(request)._replace(content="No idea", raw={"content": "raw text"})  # noqa: E731
    rows, report = Generated(
        tmp_path, monkeypatch, "pairs", make_rows(4), TEACHERS.format(thinking="null"),
        chosen=thinking_reply, rejected=weak,
    ).made()  # fmt: skip
    assert (report["prompts"], report["accepted"], report["filtered"]) == (4, 4, {})
    assert [row["chosen"][-1]["content"] for row in rows[:2]] == [
        "You said 0+0?", "<think>\nThey say 1+1?\n</think>\n\nYou said 1+1?",
    ]  # fmt: skip
    assert [row["rejected"][-1]["content"] for row in rows[:2]] == [
        "No idea", "<think>\nThey say 1+1?\n</think>\n\nNo idea",
    ]  # fmt: skip


@pytest.mark.parametrize("answered", [True, False])
def test_the_prompt_ends_before_the_last_reply_or_with_the_user_and_tools_stay(made, answered):
    turns = ("user", "1+1?"), ("assistant", "2"), ("user", "3+3?"), ("assistant", "6")
    turns = turns if answered else turns[:3]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    row = {"messages": [{"role": role, "content": text} for role, text in turns], "source": "chat", "tools": tools}
    thinks = lambda answer: lambda prompt: f"<think>\nhm\n</think>\n{answer}"  # noqa: E731
    [outcome] = made([row], thinks("a"), thinks("b"))
    assert (outcome.row["prompt"], outcome.row["tools"]) == ("3+3?", tools)
    assert outcome.row["chat_template_kwargs"]["enable_thinking"] is True  # as the template decides
    assert outcome.row["chosen"][:-1] == outcome.row["rejected"][:-1] == row["messages"][:3]
    assert '"name": "f"' in made.asked[0][0] and "6" not in made.asked[0][0].partition("3+3?")[2]


def test_pairs_are_prompts_too(made):
    [row] = [outcome.row for outcome in made(make_rows(1), solve, fail)]
    assert made([row], solve, fail)[0].row == row | {"source": "sums_pairs_pairs"}


# ---------------------------------------------------------------- which pairs stay


def some_wrong(*numbers):
    return lambda prompt: fail(prompt) if re.search(rf"\n({'|'.join(map(str, numbers))})\+", prompt) else solve(prompt)


def reasons(found):
    return {outcome.prompt.row["messages"][0]["content"][0]: outcome.reason for outcome in found if outcome.reason}


@pytest.mark.parametrize(
    ("keep", "dropped"),
    [
        ("different", {}),
        ("chosen_right", {"2": "chosen_wrong"}),
        ("right_and_wrong", {"2": "chosen_wrong", "3": "rejected_right"}),
    ],
)
@pytest.mark.parametrize("answer", ["off", "label"])
def test_keep_and_the_reasons_of_every_drop(made, keep, dropped, answer):
    # 0 and 4: both right; 1: rejected wrong; 2: chosen wrong; 3: both right, by another way of thinking.
    def rejected(prompt):
        return some_wrong(1)(prompt).replace("sum", "why" if "3+3?" in prompt else "sum")

    found = made(make_rows(5), some_wrong(2), rejected, keep=keep, filters=Filters(answer=answer))
    assert reasons(found) == {"0": "identical", "4": "identical"} | dropped
    assert [outcome.row is None for outcome in found] == [bool(outcome.reason) for outcome in found]


def test_answers_are_compared_as_text_or_as_mathematics(made):
    row = make_rows(1)[0]
    row["messages"][1]["content"] = "0.5"
    settings = dict(keep="chosen_right", chosen=Teacher(stage="sft", max_new_tokens=99))
    half = lambda prompt: "The answer is 1/2."  # noqa: E731
    assert reasons(made([row], half, solve, **settings)) == {"0": "chosen_wrong"}
    assert reasons(made([row], half, solve, **settings, filters=Filters(answer="label"))) == {}
    del row["messages"][1]
    assert reasons(made([row], half, solve, **settings)) == {"0": "no_reference"}


def test_filters_judge_the_chosen_side_and_the_rejected_one_may_have_any_fault(made):
    def rambling(*numbers):
        return lambda prompt: "so " * 20 if re.search(rf"\n({'|'.join(map(str, numbers))})\+", prompt) else fail(prompt)

    found = made(make_rows(5), rambling(0, 1), rambling(0, 1, 2, 3))
    assert reasons(found) == {"0": "chosen_cut", "1": "chosen_cut", "4": "identical"}
    assert found[2].row["rejected"][1]["content"] == "so " * 13 + "s"
    assert found[1].verdicts["chosen.finished"].reason == "chosen_cut"


def test_replies_that_training_would_read_alike_are_identical(made):
    # The template strips reasoning in no-think mode: of row 0 nothing but the answer, "x", would be left on both sides.
    found = made(make_rows(2), lambda prompt: "<think>\na\n</think>\nx", lambda prompt: "x", filters=OFF)
    assert reasons(found) == {"0": "identical"}


def test_sides_that_share_nearly_all_words_are_dropped_from_max_similarity_on(made):
    words = "one two three four five six seven eight nine"
    settings = dict(filters=OFF, chosen=Teacher(stage="sft", max_new_tokens=99))
    rejected = dict(rejected=Teacher(stage="mid", max_new_tokens=99))
    sides = (lambda prompt: f"{words} ten", lambda prompt: f"{words} nil")
    [outcome] = made(make_rows(1), *sides, max_similarity=0.9, **settings, **rejected)
    assert (outcome.reason, outcome.verdicts["similarity"].score) == ("too_similar", pytest.approx(0.9))
    assert made(make_rows(1), *sides, max_similarity=0.95, **settings, **rejected)[0].row


def test_rows_without_a_question_are_dropped_and_nobody_is_asked(made):
    found = made([{"messages": [{"role": "assistant", "content": "hi"}], "source": "chat"}], solve, fail)
    assert [outcome.reason for outcome in found] == ["no_user_turn"] and made.asked == [[], []]


def test_sides_draw_different_numbers_and_so_do_equal_rows(models, tokenizer):
    settings = stage(filters=Filters(finished=False, think_format=False))
    engines = [local_teacher((models[0], tokenizer), settings.chosen) for _ in range(2)]
    found = outcomes(settings, make_rows(1) * 6, *engines)
    replies = [r.samples[0].messages[-1]["content"] for outcome in found for r in outcome.records.values()]
    assert len(set(replies)) == len(replies) == 12


# ---------------------------------------------------------------- the stage


def test_an_interrupted_run_gives_the_rows_of_one_that_was_not(models, tokenizer, tmp_path, monkeypatch):
    filters = "filters: {finished: false, think_format: false}"
    settings = TEACHERS.format(thinking="null") + filters
    calls, generate = [], local.generate_each

    def cut_at_third(*args, **options):
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise UserError("the power went out")
        return generate(*args, **options)

    def engines(folder):
        teacher = Teacher(stage="sft", max_new_tokens=24, batch_size=4)
        made = Generated(folder, monkeypatch, "pairs", make_rows(22), settings)
        made.engines = {
            role: local_teacher((model, tokenizer), teacher)
            for role, model in zip(("chosen", "rejected"), models, strict=True)
        }
        for engine in made.engines.values():  # as the engine of a server says
            engine.under_way, engine.width = 0, 4
        return made

    (tmp_path / "whole").mkdir()
    rows, report = engines(tmp_path / "whole").made("stages.made.chunk_size=5")
    assert report["accepted"] + sum(report["filtered"].values()) == 22 and report["accepted"] > 10
    (tmp_path / "cut").mkdir()
    interrupted = engines(tmp_path / "cut")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="the power went out"):
        patch.setattr(local, "generate_each", cut_at_third)
        interrupted.made("stages.made.chunk_size=5")
    again = []
    monkeypatch.setattr(local, "generate_each", lambda *a, **k: again.append(len(a[1])) or generate(*a, **k))
    assert interrupted.made("stages.made.chunk_size=5")[0] == rows
    assert 22 < sum(again) < 44  # of both sides


def test_sources_that_have_pairs_of_the_mode_are_left_out(tmp_path, monkeypatch):
    rows = [row | {"source": f"from_{i}"} for i, row in enumerate(make_rows(3))]
    settings = TEACHERS.format(thinking="true") + "only_missing: prompts"
    weak = lambda request: Reply("No", "hm", "stop")  # noqa: E731
    made = Generated(tmp_path, monkeypatch, "pairs", rows, settings, chosen=thinking_reply, rejected=weak)
    found, report = made.made()
    assert sources_of_mode([("", row) for row in rows], True, "_pairs") == {"from_1"}
    assert [row["source"] for row in found] == ["from_0_pairs", "from_2_pairs"]
    assert all(row["chat_template_kwargs"]["enable_thinking"] for row in found)
    assert report["sources_left_out"] == {"from_1": 1}
    assert all(request.thinking for role in ("chosen", "rejected") for request in made.asked(role))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("chosen.thinking=true", r"rejected.thinking=null, but chosen.thinking=true; a pair has one mode, so set both"),
        ("only_missing=prompts", r"only_missing=prompts needs one mode for all prompts; set chosen.thinking and"),
        (
            "chosen_from=sft",
            r"chosen_from=sft is a field of the stage's teachers now; write stages.made.chosen.stage=sft$",
        ),
        (
            "top_p=0.5",
            r"top_p=0.5 is a field .*; write stages.made.chosen.top_p=0.5 and stages.made.rejected.top_p=0.5$",
        ),
        ("max_similarity=0", r"max_similarity=0 is outside \(0, 1\]"),
    ],
)
def test_what_the_stage_refuses(tmp_path, monkeypatch, word, message):
    made = Generated(tmp_path, monkeypatch, "pairs", make_rows(1), TEACHERS.format(thinking="null"))
    with pytest.raises(UserError, match=f"stages.made.{message}"):
        made.located(f"stages.made.{word}")
