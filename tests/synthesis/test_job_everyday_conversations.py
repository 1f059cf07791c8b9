"""everyday_conversations: the plan, the two roles, what ends a conversation."""

from collections import Counter
from types import SimpleNamespace

import pytest

from smolpost.stages.everyday_conversations import EverydayConversationsStage
from smolpost.synthesis.jobs.everyday_conversations import LANGUAGES, EverydayConversations
from smolpost.synthesis.records import Reply
from smolpost.synthesis.settings import Filters, Teacher
from tests.synthesis.jobs import outcomes_of

STAGE = EverydayConversationsStage()
PERSONAS, TOPICS = STAGE.lines("personas"), STAGE.lines("topics")


def job(**settings):
    given = dict(
        teacher=Teacher(model="big"), num_conversations=60, min_turns=2, max_turns=3,
        languages=dict.fromkeys(LANGUAGES, 1.0), filters=Filters(), seed=0,
    )  # fmt: skip
    return EverydayConversations(SimpleNamespace(**given | settings), PERSONAS, TOPICS)


def chat(request):
    """The user says what number the message is; the assistant repeats it."""
    text = request.messages[-1]["content"]
    if text.startswith("Play a person"):
        return Reply(f"“message {text.count('Person:')}”", None, "stop")
    return Reply(f"{text}, you say", "hm" if request.thinking else None, "stop")


def test_the_library_has_personas_and_topics_for_thousands_of_conversations():
    assert len(PERSONAS) >= 60 and len(TOPICS) >= 120
    assert len({line.casefold() for line in (*PERSONAS, *TOPICS)}) == len(PERSONAS) + len(TOPICS)


def test_the_plan_keeps_to_the_shares_and_grows_at_its_end():
    prompts = list(job().prompts())
    assert Counter(prompt.row["language"] for prompt in prompts) == dict.fromkeys(LANGUAGES, 10)
    assert list(job(num_conversations=90).prompts())[:60] == prompts == list(job().prompts())
    assert list(job(seed=1).prompts()) != prompts
    uneven = Counter(p.row["language"] for p in job(languages={"en": 3.0, "de": 1.0, "fr": 0.0}).prompts())
    assert uneven == {"en": 45, "de": 15}
    many = [(p.row["persona"], p.row["topic"]) for p in job(num_conversations=8000).prompts()]
    assert len(set(many[: len(PERSONAS) * len(TOPICS)])) == len(set(many)) == min(8000, len(PERSONAS) * len(TOPICS))
    assert {prompt.row["turns"] for prompt in prompts} == {2, 3}


def test_both_sides_are_the_teachers_and_the_row_holds_the_conversation_alone():
    first, *_ = outcomes_of(job(min_turns=2, max_turns=2), teacher=chat)
    texts = [turn["content"] for turn in first.row["messages"]]
    assert texts == ["message 0", "message 0, you say", "message 1", "message 1, you say"]
    assert first.row["source"] == "everyday_en" and first.row["chat_template_kwargs"]["enable_thinking"] is False


def test_a_thinking_teacher_thinks_as_the_assistant_and_its_thoughts_are_not_the_users():
    seen = []

    def reply(request):
        seen.append((request.thinking, request.messages[-1]["content"]))
        return chat(request)

    outcome, *_ = outcomes_of(
        job(num_conversations=1, min_turns=2, max_turns=2, teacher=Teacher(model="big", thinking=True)), teacher=reply
    )
    assert [thinking for thinking, _ in seen] == [False, True, False, True]
    assert "Person: message 0\n\nAssistant: message 0, you say" in seen[2][1] and "hm" not in seen[2][1]
    assert outcome.row["messages"][1]["content"] == "<think>\nhm\n</think>\n\nmessage 0, you say"


def test_a_cut_or_empty_message_ends_the_conversation():
    def reply(request):
        text = request.messages[-1]["content"]
        return Reply("Well", None, "length") if "Person:" in text else chat(request)

    cut, *_ = outcomes_of(job(num_conversations=1), teacher=reply)
    assert (cut.row, cut.reason) == (None, "cut")
    loose, *_ = outcomes_of(job(num_conversations=1, filters=Filters(finished=False)), teacher=reply)
    assert (loose.row, loose.reason) == (None, "unanswered")


def test_the_language_filter_is_on_and_knows_each_conversations_language():
    pytest.importorskip("lingua")
    assert STAGE.filters.language
    said = {
        "fr": "Je voudrais savoir comment faire un bon gâteau au chocolat pour mes enfants.",
        "en": "I would like to know how to bake a good chocolate cake for my children.",
    }

    def reply(request):
        return Reply(said["fr"] if "in French" in request.messages[0]["content"] else said["en"], None, "stop")

    found = outcomes_of(
        job(num_conversations=2, min_turns=1, max_turns=1, languages={"en": 1.0, "fr": 1.0},
            filters=Filters(language=True)),
        teacher=reply,
    )  # fmt: skip
    assert [bool(outcome.row) for outcome in found] == [True, False]  # the French question has an English reply
