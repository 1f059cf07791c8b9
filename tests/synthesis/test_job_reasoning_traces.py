"""reasoning_traces: last turn or every turn, rows that cannot be asked about, the complement of a mixture."""

from types import SimpleNamespace

from smolpost.synthesis.jobs.complement import sources_of_mode
from smolpost.synthesis.jobs.reasoning_traces import ReasoningTraces
from smolpost.synthesis.records import Reply
from smolpost.synthesis.settings import Filters, Teacher
from tests.synthesis.fakes import thinking_reply
from tests.synthesis.jobs import in_mixture, outcomes_of, row, turns


def job(rows, complete=(), **settings):
    teacher = settings.pop("teacher", Teacher(model="big", thinking=True))
    given = dict(turns="last", suffix="_traces", filters=Filters(), seed=0, teacher=teacher)
    return ReasoningTraces(SimpleNamespace(**given | settings), in_mixture(rows), complete)


def test_every_turn_is_asked_for_with_the_answers_before_it():
    asked = []

    def reply(request):
        asked.append(request.messages)
        return thinking_reply(request)

    content = {"messages": [{"role": "system", "content": "s"}, *turns("a", "old", "b", "old", "c", "old", "d")]}
    [outcome] = outcomes_of(job([content], turns="every"), teacher=reply)
    assert asked.pop()[-1]["content"] == "d"  # the user speaks last, so that turn is answered, too
    system = {"role": "system", "content": "s"}
    assert asked == [
        [system, *turns("a")],
        [system, *turns("a", "You said a", "b")],
        [system, *turns("a", "You said a", "b", "You said b", "c")],
    ]
    thought = "<think>\nThey say {0}\n</think>\n\nYou said {0}"
    assert outcome.row["messages"] == [
        system,
        *turns(*(part for name in "abcd" for part in (name, thought.format(name)))),
    ]  # fmt: skip


def test_a_conversation_ends_at_a_reply_without_an_answer():
    def reply(request):
        last = request.messages[-1]["content"]
        return Reply("", "hm", "length", closed=False) if last == "b" else thinking_reply(request)

    content = {"messages": turns("a", "x", "b", "y", "c", "z")}
    filters = Filters(finished=False, think_format=False)
    [outcome] = outcomes_of(job([content], turns="every", filters=filters), teacher=reply)
    assert outcome.row is None and outcome.reason == "empty"
    assert len(outcome.records["teacher"].samples[0].replies) == 2


def test_rows_that_cannot_be_asked_about_are_counted_and_not_asked():
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    tools = {"messages": [*turns("a"), called, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "b"}]}
    silent = {"messages": [{"role": "assistant", "content": "hello"}]}
    listed = row("1+1?", chat_template_kwargs={"python_tools": ["f()"]})
    asked = []

    def reply(request):
        asked.append(request)
        return thinking_reply(request)

    found = outcomes_of(job([tools, silent, listed], turns="every"), teacher=reply)
    assert [outcome.reason for outcome in found] == ["tool_turns", "no_user_turn", "template_tools"] and not asked
    [outcome] = outcomes_of(job([tools]), teacher=lambda request: Reply("done", "hm", "stop"))
    assert outcome.row["messages"][-2:] == [
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ndone"},
    ]


def test_a_prompt_alone_is_enough():
    rows = [
        {"prompt": "a"},
        {"prompt": turns("a", "x", "b"), "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": turns("a", "x", "b")},
    ]
    for how in ("last", "every"):
        found = outcomes_of(job(rows, turns=how), teacher=thinking_reply)
        assert [len(outcome.row["messages"]) for outcome in found] == [2, 4, 4]
        assert [outcome.row["messages"][-2]["content"] for outcome in found] == ["a", "b", "b"]


def test_the_mode_of_a_row_where_the_teacher_decides():
    free = Teacher(model="big")
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    stated, open_mode = outcomes_of(job([row("1+1?", **kwargs), row("2+2?")], teacher=free), teacher=thinking_reply)
    assert stated.row["chat_template_kwargs"]["enable_thinking"] is False
    assert open_mode.row["chat_template_kwargs"]["enable_thinking"] is False  # nothing was asked, and it did not think


def test_the_complement_leaves_out_sources_that_have_rows_of_the_mode():
    thinks = {"chat_template_kwargs": {"enable_thinking": True}}
    no_think = {"chat_template_kwargs": {"enable_thinking": False}}
    there = [row("1?", source="maths_traces", **thinks), row("2?", source="code", **no_think), row("3?", source="law")]
    assert sources_of_mode(in_mixture(there), True, "_traces") == {"maths", "maths_traces", "law"}
    asked = job([row("4?", source="maths"), row("5?", source="code"), row("6?", source="maths")], {"maths"})
    assert [outcome.row["source"] for outcome in outcomes_of(asked, teacher=thinking_reply)] == ["code_traces"]
    assert asked.report() == {"sources_left_out": {"maths": 2}}
    assert asked.lines() == ["sources left out, as they have rows of this mode: maths (2 prompts)"]
