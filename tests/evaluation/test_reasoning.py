"""Reasoning counts what a canned engine gets right, in each mode, and keeps every reply."""

import json
import math
import re
from itertools import combinations

import pytest

from smolpost.data.rows import Row
from smolpost.errors import UserError
from smolpost.evaluation.scores import aggregate
from smolpost.evaluation.task import Context
from smolpost.evaluation.tasks.reasoning import Reasoning, ReasoningTask, pass_at
from smolpost.inference.engine import Reply
from smolpost.inference.local import LocalEngine
from tests.evaluation.canned import Canned

SUMS = ["1+1?", "2+2?", "3+4?", "4+4?", "5+5?", "6+6?"]


def row(question, answer, **kwargs):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "chat_template_kwargs": kwargs}


def solve(prompt):
    first, second = re.findall(r"(\d)\+(\d)\?", prompt)[-1]
    return str(int(first) + int(second))


def in_think_mode(prompt):
    return prompt.endswith("<|im_start|>assistant\n")


ROWS = [("sums", row(question, f"<think>\nhm\n</think>\n{solve(question)}")) for question in SUMS]


def task(rows=ROWS, **settings):
    context = Context("08 July 2025", 7, lambda name: {"heldout": rows}[name])
    return Reasoning("sums", ReasoningTask(**{"answer_pattern": r"(\d+)", **settings}), context)


def measured(tokenizer, reply, rows=ROWS, **settings):
    """(samples, the engine) of all items in one batch."""
    asked, engine = task(rows, **settings), Canned(tokenizer, reply)
    return asked.measure(engine, asked.items(tokenizer)), engine


def scores(tokenizer, reply, rows=ROWS, **settings):
    samples, _ = measured(tokenizer, reply, rows, **settings)
    return {metric: score["value"] for metric, score in aggregate(samples).items()}


def test_a_model_that_is_always_right_scores_one_in_both_modes(tokenizer):
    def reply(prompt):
        return ("<think>\nis it 99?\n</think>\n" if in_think_mode(prompt) else "") + solve(prompt)

    samples, engine = measured(tokenizer, reply)
    found = aggregate(samples)
    assert list(found) == [
        f"{mode}{metric}" for mode in ("think", "no_think") for metric in ("", "/tokens", "/cut", "/unclosed")
    ]
    assert (found["think"]["value"], found["no_think"]["value"], found["think"]["n"]) == (1.0, 1.0, 6)
    assert found["think/tokens"]["value"] == len(tokenizer.encode("is it 99?"))
    assert found["no_think/tokens"]["value"] == 0
    assert [in_think_mode(prompt) for prompt, _ in engine.asked] == [True, False] * 6
    assert all("Today Date: 08 July 2025" in prompt for prompt, _ in engine.asked)


def test_right_answers_count_in_their_mode_only(tokenizer):
    found = scores(tokenizer, lambda p: solve(p) if in_think_mode(p) or "2+2" in p else "no idea")
    assert (found["think"], found["no_think"]) == (1.0, pytest.approx(1 / 6))


def test_one_mode_alone(tokenizer):
    samples, engine = measured(tokenizer, solve, modes=["no_think"])
    assert [sample.id for sample in samples] == [f"{i}/no_think" for i in range(6)]
    assert not any(in_think_mode(prompt) for prompt, _ in engine.asked)


def test_both_modes_of_a_problem_are_one_cluster(tokenizer):
    samples, _ = measured(tokenizer, solve)
    assert len({sample.id for sample in samples}) == 12
    assert {sample.cluster: None for sample in samples}.keys() == set("012345")
    assert all(sample.id.startswith(f"{sample.cluster}/") for sample in samples)


def test_a_think_block_that_never_closed_has_no_answer(tokenizer):
    found = scores(tokenizer, lambda p: Reply(f"<think>\n{solve(p)}", 9, in_think_mode(p)))
    assert (found["think"], found["think/unclosed"], found["think/cut"]) == (0.0, 1.0, 1.0)
    assert (found["no_think/unclosed"], found["no_think/cut"]) == (1.0, 0.0)


def test_a_prompt_that_opens_the_think_block(tokenizer, monkeypatch):
    template = tokenizer.chat_template
    opened = template.replace('("" if thinking else', '("<think>\n" if thinking else')
    assert opened != template
    monkeypatch.setattr(tokenizer, "chat_template", opened)
    found = scores(tokenizer, solve)
    assert (found["think"], found["think/unclosed"]) == (0.0, 1.0)
    assert (found["no_think"], found["no_think/unclosed"]) == (1.0, 0.0)
    assert scores(tokenizer, lambda p: f"hm\n</think>\n{solve(p)}")["think"] == 1.0


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize(("num_samples", "num_right", "k"), [(5, 2, 1), (5, 2, 3), (5, 2, 4), (5, 0, 5), (6, 6, 2)])
def test_pass_at_is_the_share_of_subsets_with_a_right_reply(num_samples, num_right, k):
    right = [True] * num_right + [False] * (num_samples - num_right)
    subsets = list(combinations(right, k))
    assert pass_at(k, num_samples, num_right) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_of_many_samples_is_finite():
    exact = 1 - math.comb(100_000 - 7, 1000) / math.comb(100_000, 1000)
    assert pass_at(1000, 100_000, 7) == pytest.approx(exact, rel=1e-12)


def test_several_samples_per_problem(tokenizer):
    def reply(prompt):
        return [solve(prompt), "wrong", Reply("<think>\nbb\n</think>\n0", 4, False), Reply("<think>\nbbbb", 4, True)]

    settings = dict(num_samples=4, temperature=0.6, top_p=0.95, pass_at=[1, 2, 4], max_new_tokens=33)
    samples, engine = measured(tokenizer, reply, ROWS[:1], modes=["think"], **settings)
    assert samples[0].metrics == {
        "think": 0.25,
        "think/pass@2": pytest.approx(1 - 3 / 6),
        "think/pass@4": 1.0,
        "think/tokens": (2 + 4) / 4,
        "think/cut": 0.25,
        "think/unclosed": 0.25,
    }
    [(_, call)] = engine.asked
    assert {key: call[key] for key in ("temperature", "top_p", "num_samples", "max_new_tokens")} == {
        "temperature": 0.6, "top_p": 0.95, "num_samples": 4, "max_new_tokens": 33,
    }  # fmt: skip


def test_the_seed_is_the_batch_s_own(tokenizer):
    one, engine = task(num_samples=2, temperature=1.0), Canned(tokenizer, solve)
    items = one.items(tokenizer)
    assert {item.num_samples for item in items} == {2}
    for batch in (items[:3], items[3:], items[:3]):
        one.measure(engine, batch)
    first, second, again = (engine.asked[i][1]["seed"] for i in (0, 3, 12))
    assert first == again != second


def test_every_reply_is_kept(tokenizer):
    [sample], _ = measured(tokenizer, lambda _: "<think>\nb\n</think>\n3", ROWS[:1], modes=["think"])
    assert json.loads(json.dumps(sample.record)) == {
        "mode": "think",
        "source": "sums",
        "row": 0,
        "question": "1+1?",
        "expected": "2",
        "replies": [
            {
                "reply": "<think>\nb\n</think>\n3",
                "answer": "3",
                "right": False,
                "tokens": 1,
                "cut": False,
                "unclosed": False,
            }
        ],
    }


# ---------------------------------------------------------------- rows


def test_sources_are_scored_apart_where_there_are_several(tokenizer):
    rows = [*ROWS[:2], ("more", ROWS[2][1])]
    found = scores(tokenizer, lambda p: solve(p) if "3+4" in p else "no", rows)
    assert (found["think/sums"], found["think/more"]) == (0.0, 1.0)
    assert "think/sums" not in scores(tokenizer, solve, rows[:2])
    with pytest.raises(UserError, match=r"^evaluation.tasks.sums.data=heldout: the source 'cut' has the name of a met"):
        task([*rows, ("cut", ROWS[3][1])]).items(tokenizer)


def test_the_prompt_ends_before_the_last_assistant_turn(tokenizer):
    turns = ("user", "3+4?"), ("assistant", "7"), ("user", "1+4?"), ("assistant", "5"), ("user", "thanks")
    rows = [("sums", {"messages": [{"role": role, "content": text} for role, text in turns]})]
    samples, engine = measured(tokenizer, solve, rows, modes=["no_think"])
    assert samples[0].metrics["no_think"] == 1.0
    assert samples[0].record["question"] == "1+4?"
    assert "3+4?" in engine.asked[0][0] and "thanks" not in engine.asked[0][0]


def test_a_row_s_other_template_variables_stay(tokenizer):
    polite = row("1+1?", "2", enable_thinking=False, custom_instructions="Be polite.")
    _, engine = measured(tokenizer, solve, [("sums", polite)])
    assert [in_think_mode(prompt) for prompt, _ in engine.asked] == [True, False]
    assert all("Be polite." in prompt for prompt, _ in engine.asked)


def test_rows_without_an_answer_are_passed_over_and_counted(tokenizer):
    calls = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]
    unclosed = row("1+1?", "<think>\n2")
    flagged = row("1+1?", "2")
    flagged["messages"].insert(0, {"role": "system", "content": "Be brief. /no_think"})
    passed_over = [("s", {"messages": calls}), ("s", row("hi", "hello")), ("s", unclosed), ("s", flagged)]
    one = task([*passed_over, *ROWS, ("s", row("hi", "hello"))], max_rows=2)
    assert one.notes == {}
    assert [item.id for item in one.items(tokenizer)] == ["4/think", "4/no_think", "5/think", "5/no_think"]
    assert one.notes == {"rows_without_answer": 3, "rows_with_flag": 1}
    assert task(passed_over).items(tokenizer) == []


def test_bad_rows_are_named(tokenizer):
    with pytest.raises(UserError, match=r"^held.jsonl:7: has no messages but the columns text.*the heldout mixture"):
        task([("s", Row({"text": "once"}, "held.jsonl", 7))]).items(tokenizer)
    bad = row("1+1?", "2")
    bad["messages"].insert(0, {"role": "alien", "content": "x"})
    with pytest.raises(UserError, match=r"^held.jsonl:8: messages\[0\].role=alien"):
        task([("s", Row(bad, "held.jsonl", 8))]).items(tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modes": ["fast"]}, r"modes=\['fast'\] is not a list of different modes; use some of think, no_think"),
        ({"modes": []}, r"modes=\[\] is not a list"),
        ({"modes": ["think", "think"]}, "modes=.* is not a list of different modes"),
        ({"max_rows": 0}, "max_rows=0 is below 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is below 1"),
        ({"num_samples": 0}, "num_samples=0 is below 1"),
        ({"temperature": -1.0}, "temperature=-1.0 is not a number from 0 on"),
        ({"temperature": math.nan}, "temperature=nan is not a number"),
        ({"top_p": 0.0}, r"top_p=0.0 is outside \(0, 1\]"),
        ({"num_samples": 4}, "num_samples=4 replies at temperature=0 are all the same"),
        (
            {"num_samples": 4, "temperature": 0.6, "pass_at": [1, 8]},
            r"pass_at=\[1, 8\] needs k from 1 to num_samples=4",
        ),
        ({"pass_at": [0]}, r"pass_at=\[0\] needs k from 1"),
        ({"answer_pattern": ".*"}, "answer_pattern='.*' has no group"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=rf"^evaluation.tasks.sums.{message}") as error:
        task(**settings)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- mathematics and models


def test_mathematics(tokenizer):
    pytest.importorskip("math_verify", reason="math-verify is not installed (smolpost[eval])")
    rows = [("s", row("half?", "The answer is 1/2")), ("s", row("many?", "1,250")), ("s", row("who?", "Ann"))]
    one = task(rows, answer="math", modes=["think"])
    items = one.items(tokenizer)
    assert one.notes["rows_without_answer"] == 1
    engine = Canned(tokenizer, lambda p: r"so \boxed{0.5}" if "half" in p else "<think>\n1250\n</think>\n1,251")
    half, many = one.measure(engine, items)
    assert (half.metrics["think"], many.metrics["think"]) == (1.0, 0.0)
    assert (half.record["expected"], many.record["replies"][0]["answer"]) == ("1/2", "1251")


@pytest.mark.parametrize("answer", ["pattern", "math"])
def test_rows_of_a_file_answered_with_their_own_replies(tokenizer, rows_file, answer):
    if answer == "math":
        pytest.importorskip("math_verify", reason="math-verify is not installed (smolpost[eval])")
    lines = rows_file("sft").read_text(encoding="utf-8").splitlines()[:40]
    rows = [("gsm8k", row) for row in map(json.loads, lines)]
    replies = {row["messages"][0]["content"]: row["messages"][1]["content"] for _, row in rows}

    def reply(prompt):
        return replies[re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", prompt, re.DOTALL)[-1]]

    one = task(rows, answer=answer, answer_pattern=r"The answer is (.*)\.", max_rows=None)
    samples = one.measure(Canned(tokenizer, reply), one.items(tokenizer))
    found = aggregate(samples)
    assert (found["think"]["value"], found["no_think"]["value"], found["think"]["n"]) == (1.0, 1.0, 40)
    assert one.notes["rows_without_answer"] == 0
    wrong = one.measure(Canned(tokenizer, lambda p: "The answer is -17."), one.items(tokenizer))
    assert aggregate(wrong)["think"]["value"] == 0.0


def test_a_model_of_transformers(model, tokenizer):
    one = task(ROWS[:2], max_new_tokens=8, num_samples=3, temperature=1.0, pass_at=[1, 3])
    items = one.items(tokenizer)
    samples = one.measure(LocalEngine(model, tokenizer), items)
    assert [sample.id for sample in samples] == [item.id for item in items]
    assert [len(sample.record["replies"]) for sample in samples] == [3] * 4
    assert samples == one.measure(LocalEngine(model, tokenizer), items)
    cut = [entry["cut"] for sample in samples for entry in sample.record["replies"]]
    assert aggregate(samples)["think/cut"]["n"] == 2 and any(cut)
