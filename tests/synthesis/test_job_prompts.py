"""Rows as prompts: ids that stay, modes that the job sets, requests to servers and to checkpoints."""

from smolpost.synthesis.jobs.asking import Asker, row_of
from smolpost.synthesis.jobs.prompts import conversation_of, prompts_of, question_of
from smolpost.synthesis.records import Prompt
from smolpost.synthesis.settings import Teacher
from tests.synthesis.jobs import in_mixture, row, turns

SERVER = Asker("teacher", Teacher(model="big", url="http://localhost:1/v1"), 0)
HERE = Asker("teacher", Teacher(stage="sft"), 0)


def ids(*rows):
    return [prompt.id for prompt in prompts_of(in_mixture(rows))]


def test_ids_are_the_rows_own_or_follow_from_their_content():
    one, two, three = row("1+1?"), row("2+2?"), row("3+3?")
    assert ids(row("1+1?", id="a"), row("2+2?", id=7), row("3+3?", id="")) == ["a", "7", *ids(row("3+3?", id=""))]
    assert ids(one, two) == ids(three, one, two)[1:] == ids(one, three, two)[::2]
    assert ids(one)[0].startswith("sums-") and ids(row("1+1?", source="other"))[0].startswith("other-")
    assert ids({"messages": turns("1?", "2")})[0].startswith("mine-")  # a row without a source has its mixture's


def test_equal_rows_are_numbered():
    first = row("1+1?")
    assert ids(first, row("2+2?"), first, first) == [ids(first)[0], ids(row("2+2?"))[0]] + [
        f"{ids(first)[0]}-{number}" for number in (2, 3)
    ]


def test_words_of_the_system_message_do_not_set_the_mode():
    system = {"role": "system", "content": "/no_think Be brief. Look into /think/tank. /think"}
    assert conversation_of({"messages": [system, *turns("a", "b")]})[0]["content"] == (
        "Be brief. Look into /think/tank."
    )
    assert conversation_of({"messages": [{"role": "system", "content": "/no_think"}, *turns("a", "b")]}) == turns(
        "a", "b"
    )
    pair = {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "c", "e")}
    assert question_of(pair) == turns("a", "b", "c")
    assert question_of({"messages": turns("a", "b", "c")}) == turns("a", "b", "c")
    assert question_of({"prompt": "a"}) == turns("a")


def test_a_server_gets_instructions_as_system_message_and_no_reasoning_and_a_checkpoint_gets_the_row():
    tools = [{"type": "function", "function": {"name": "f"}}]
    content = {
        "messages": turns("a", "<think>\nhm\n</think>\nb", "c", "d"),
        "chat_template_kwargs": {"custom_instructions": "Be kind.", "enable_thinking": False},
        "tools": tools,
    }
    prompt = Prompt("1", "mine", content)
    asked = SERVER.request(prompt, question_of(content), True)
    assert asked.messages == [{"role": "system", "content": "Be kind."}, *turns("a", "b", "c")]
    assert asked.template_kwargs is None and asked.thinking is True and asked.tools == tools
    here = HERE.request(prompt, question_of(content), True)
    assert here.messages == turns("a", "<think>\nhm\n</think>\nb", "c")
    assert here.template_kwargs == {"custom_instructions": "Be kind."}
    assert here.seed == asked.seed != SERVER.request(prompt, question_of(content), True, turn=1).seed
    again = {**content, "messages": [{"role": "system", "content": "Be kind."}, *content["messages"]]}
    assert SERVER.request(Prompt("1", "mine", again), question_of(again), True).messages == asked.messages


def test_seeds_differ_by_role_prompt_and_stage():
    prompt = Prompt("1", "mine", row("1+1?"))
    askers = [SERVER, Asker("chosen", SERVER.teacher, 0), Asker("teacher", SERVER.teacher, 1)]
    seeds = [asker.request(prompt, [], None).seed for asker in askers]
    seeds.append(SERVER.request(prompt._replace(id="2"), [], None).seed)
    assert len(set(seeds)) == 4


def test_tools_that_only_a_template_shows_go_to_checkpoints_alone():
    listed = {"chat_template_kwargs": {"xml_tools": ["{}"]}}
    assert SERVER.cannot_ask(listed) and not HERE.cannot_ask(listed) and not SERVER.cannot_ask(row("1+1?"))


def test_a_row_states_all_four_settings():
    prompt = Prompt("1", "mine", {**row("1+1?"), "chat_template_kwargs": {"custom_instructions": None}})
    assert row_of(prompt, True, "_x", {"messages": []}) == {
        "messages": [],
        "chat_template_kwargs": {
            "custom_instructions": "", "enable_thinking": True, "python_tools": [], "xml_tools": [],
        },
        "source": "mine_x",
    }  # fmt: skip
