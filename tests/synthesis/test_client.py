"""ChatEngine against a server that misbehaves, over real HTTP on loopback."""

import asyncio
import json
import os
import pickle
import random
import re
import time

import pytest

from smolpost.errors import UserError
from smolpost.synthesis import client, connection
from smolpost.synthesis.client import ChatEngine
from smolpost.synthesis.connection import asked_wait, checked_url, proxy_for, whole_text
from smolpost.synthesis.records import Reply, RequestFailed
from smolpost.synthesis.settings import Teacher
from tests.synthesis.asking import KEY, VARIABLE, asked, outcome, outcomes, teacher_of
from tests.synthesis.fault_server import start_fault_server


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A server for tests that script it by the prompt alone."""
    with start_fault_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def quick(monkeypatch):
    """Waits of milliseconds."""
    monkeypatch.setattr(client, "BASE", 0.01)
    monkeypatch.setattr(client, "CAP", 0.1)
    monkeypatch.setattr(client, "KNOCK", 0.05)


# ---------------------------------------------------------------- replies


def test_a_reply_comes_with_what_the_server_counted(shared):
    reply = outcome(teacher_of(shared), "one two three")
    assert (reply.content, reply.reasoning) == ("answer to one two three", "reasoning about one two three, seed 7")
    assert (reply.prompt_tokens, reply.completion_tokens, reply.attempts) == (3, 12, 1)
    assert (reply.finish_reason, reply.closed, reply.tool_calls) == ("stop", True, None)
    assert 0 < reply.seconds < 2 and reply.raw["content"] == reply.content


def test_each_request_asks_for_one_reply(shared):
    outcome(teacher_of(shared), "what is sent")
    body = shared.requests()[-1]["body"]
    assert "n" not in body and body["seed"] == 7 and body["messages"] == asked("what is sent").messages


@pytest.mark.parametrize(
    "faults, attempts",
    [
        ("408|409|425", 4), ("429|500|502|503|504|599", 7), ("reset|drop|half", 4), ("garbage|html|empty", 4),
        ("error|no_choices|no_message|no_reason", 5), ("hang", 2), ("text", 1), ("slow", 1), ("blank", 1),
    ],
)  # fmt: skip
def test_what_may_pass_is_tried_again(shared, quick, faults, attempts):
    reply = outcome(teacher_of(shared, request_timeout=1.5), f"<<{faults}>> {faults}?")
    assert (reply.attempts, reply.content) == (attempts, "" if faults == "blank" else f"answer to {faults}?")


def test_a_reply_that_takes_too_long_is_asked_for_again(shared, quick):
    reply = outcome(teacher_of(shared, request_timeout=0.5), "<<slow>> in pieces")
    assert (reply.attempts, reply.content) == (2, "answer to in pieces")


@pytest.mark.parametrize("reasoning", ["reasoning", "reasoning_content", "inline"])
def test_reasoning_is_found_wherever_the_server_puts_it(tmp_path, reasoning):
    with start_fault_server(tmp_path, reasoning=reasoning) as server:
        whole, cut = outcomes(teacher_of(server), "one", "<<cut>> two")
    assert (whole.reasoning, whole.content, whole.closed) == ("reasoning about one, seed 7", "answer to one", True)
    assert (cut.reasoning, cut.content, cut.closed) == ("reasoning about two, seed 7", "", False)
    assert cut.finish_reason == "length"


def test_tool_calls_and_filtered_replies_are_replies(shared):
    called, filtered = outcomes(teacher_of(shared), "<<tool>> call", "<<filtered>> no")
    assert called.finish_reason == "tool_calls" and called.tool_calls[0]["function"]["name"] == "look_up"
    assert filtered.finish_reason == "content_filter"


def test_in_a_storm_of_faults_each_question_is_answered_once(shared, quick):
    kinds = ("429", "500", "502", "503", "408", "reset", "drop", "half", "garbage", "html", "error", "no_message")
    draw = random.Random(5)
    texts = [f"<<{'|'.join([*draw.choices(kinds, k=draw.randrange(4)), 'ok'])}>> storm {i}" for i in range(300)]
    found = outcomes(teacher_of(shared, concurrency=64), *texts)
    assert [reply.content for reply in found] == [f"answer to storm {i}" for i in range(300)]
    answered = [line["prompt"] for line in shared.requests(200) if line["action"] == "ok" and "storm" in line["prompt"]]
    assert sorted(answered) == sorted(texts)


@pytest.mark.parametrize("wait", ["429@1", "503@@2"])
def test_retry_after_is_honoured(shared, quick, wait):
    began = time.monotonic()
    reply = outcome(teacher_of(shared), f"<<{wait}>> later")
    assert reply.attempts == 2 and 0.9 <= time.monotonic() - began < 4


def test_waits_grow_with_full_jitter_up_to_a_minute(shared, monkeypatch):
    drawn, slept = [], []

    async def sleep(event, seconds):
        slept.append(seconds)

    monkeypatch.setattr(client, "_sleep", sleep)
    monkeypatch.setattr(client._jitter, "uniform", lambda low, high: drawn.append((low, high)) or high / 2)
    outcome(teacher_of(shared, deadline=1e4), f"<<{'|'.join(['500'] * 9)}>> nine times")
    assert drawn == [(0, high) for high in (1, 2, 4, 8, 16, 32, 60, 60, 60)]
    assert slept == [high / 2 for _, high in drawn]


def test_a_refused_request_fails_alone(shared):
    refused, fine = outcomes(teacher_of(shared), "<<400>> bad", "good")
    assert isinstance(refused, RequestFailed) and fine.content == "answer to good"
    assert (refused.reason, refused.attempts) == ("400: injected 400", ("400",))
    [unprocessable] = outcomes(teacher_of(shared), "<<422*>> bad")
    assert unprocessable.attempts == ("422",)


def test_a_request_is_tried_until_its_deadline(shared, quick):
    began = time.monotonic()
    [late] = outcomes(teacher_of(shared, deadline=1.0), "<<502|502|503*>> never")
    assert 0.8 < time.monotonic() - began < 2
    assert re.fullmatch(r"no reply in \d+ tries within 1 s, the last one: 503: injected 503", late.reason)
    assert late.attempts[0] == "502 x 2" and re.fullmatch(r"503 x \d+", late.attempts[1])


def test_the_deadline_also_cuts_a_try(shared):
    began = time.monotonic()
    [late] = outcomes(teacher_of(shared, deadline=1.0), "<<hang>> for ever")
    assert time.monotonic() - began < 3 and late.attempts == ("time-out",)


def test_a_longer_wait_than_the_deadline_fails_at_once(shared):
    began = time.monotonic()
    [late] = outcomes(teacher_of(shared), "<<429@86400>> tomorrow")
    assert time.monotonic() - began < 1 and late.attempts == ("429",)


def test_replies_that_cannot_be_used_are_not_paid_for_without_end(shared, quick):
    [failed] = outcomes(teacher_of(shared), "<<garbage|html|no_choices*>> costs tokens")
    assert failed.reason == "no reply in 10 tries, the last one: no choices"
    assert failed.attempts == ("no JSON object x 2", "no choices x 8")
    [failed] = outcomes(teacher_of(shared), "<<503|503|500*>> breaks the template")
    assert failed.attempts == ("503 x 2", "500 x 10")


# ---------------------------------------------------------------- nobody gets a reply


def stopped(teacher: Teacher, *texts: str) -> str:
    """The one line in which all requests end."""
    lines = {str(error) for error in outcomes(teacher, *texts) if type(error) is UserError}
    [line] = lines
    assert "\n" not in line
    return line


def test_a_refused_key_ends_all_requests_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "sk-wrong-one")
    with start_fault_server(tmp_path, key="sk-right") as server:
        line = stopped(teacher_of(server, api_key_env=VARIABLE, concurrency=2), *(f"question {i}" for i in range(20)))
        assert line == (
            f"{KEY}.api_key_env={VARIABLE} holds a key that {server.url} refuses (401: Incorrect API key provided); "
            "export a valid one, and run the same command again: it goes on from here"
        )
        assert len(server.requests()) <= 2
        without = stopped(teacher_of(server), "question")
        assert without.endswith(f"export it, and name its variable in {KEY}.api_key_env")
        monkeypatch.setenv(VARIABLE, "sk-right\n")
        assert outcome(teacher_of(server, api_key_env=VARIABLE), "question").content == "answer to question"


def test_a_key_that_ends_during_the_run(tmp_path):
    with start_fault_server(tmp_path, unauthorized_after=3) as server:
        found = outcomes(teacher_of(server, concurrency=1), *(f"question {i}" for i in range(6)))
        assert [type(one) for one in found] == [Reply] * 3 + [UserError] * 3


def test_requests_that_wait_end_with_the_others(tmp_path):
    with start_fault_server(tmp_path, unauthorized_after=1) as server:
        texts = ("<<429@60>> much later", "now", "<<ok>> then")
        began = time.monotonic()
        found = outcomes(teacher_of(server, concurrency=1, deadline=100.0), *texts)
    assert [type(one) for one in found] == [UserError, Reply, UserError] and str(found[0]) == str(found[2])
    assert time.monotonic() - began < 5


def test_the_key_is_in_no_message_record_or_picture_of_the_engine(tmp_path, monkeypatch, shared):
    monkeypatch.setenv(VARIABLE, "sk-secret-value")
    teacher = teacher_of(shared, api_key_env=VARIABLE)

    async def ask():
        async with ChatEngine(teacher, key=KEY) as engine:
            found = await asyncio.gather(engine.ask(asked("<<400>> sk-secret-value")), return_exceptions=True)
            return [repr(engine), repr(found), str(await engine.identity())]

    assert not any("sk-secret" in text for text in asyncio.run(ask()))
    assert shared.requests()[-1]["authorization"] == "Bearer sk-secret-value"
    told = connection.Connection(shared.url, VARIABLE, key=KEY)
    told._secret = "sk-secret-value"
    assert told._line("your key\nsk-secret-value is bad") == f"your key ${VARIABLE} is bad"
    assert b"sk-secret" not in pickle.dumps(ChatEngine(teacher, key=KEY))


def test_a_missing_variable_is_named(shared, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(UserError, match=rf"^{KEY}\.api_key_env={VARIABLE} is not set in the environment; export"):
        outcome(teacher_of(shared, api_key_env=VARIABLE), "question")
    monkeypatch.setenv(VARIABLE, "sk\nbroken")
    with pytest.raises(UserError, match=rf"^{KEY}\.api_key_env={VARIABLE} holds characters that no key has"):
        outcome(teacher_of(shared, api_key_env=VARIABLE), "question")


def test_another_model_and_another_path_are_named_with_what_would_do(shared):
    line = stopped(teacher_of(shared, model="other"), "question")
    assert line.startswith(f"{KEY}.model=other is refused by {shared.url} (404: The model `other` does not exist.); ")
    assert line.endswith("set it to what is served: teacher")
    bare = shared.url.removesuffix("/v1")
    line = stopped(teacher_of(shared, url=bare), "question")
    assert line == f"{KEY}.url={bare} is not the address of the API (404: Not Found); set it to {bare}/v1"


def test_many_failures_in_a_row_end_the_run(shared):
    found = outcomes(teacher_of(shared, concurrency=4), *(f"<<400>> bad {i}" for i in range(30)))
    assert [type(one) for one in found].count(RequestFailed) == client.FAILURES - 1
    assert str(found[-1]).startswith(f"{KEY}.url={shared.url} failed 16 requests in a row, the last one with 400: ")
    mixed = outcomes(teacher_of(shared, concurrency=1), *(f"{'<<400>>' * (i % 8 > 0)} {i}" for i in range(40)))
    assert [type(one) for one in mixed].count(RequestFailed) == 35


@pytest.mark.parametrize(
    "url, words",
    [
        (None, r"is not set; give the address of the API with its version, such as http://localhost:8000/v1"),
        ("localhost:8000/v1", r"=localhost:8000/v1 is not the address of a server"),
        ("http://host:port/v1", r"is not the address of a server"),
        ("http://host/v1?key=3", r"is not the address of a server"),
        ("https://me:hidden@host/v1", r" holds a name or a password for host; put it into an environment variable"),
        ("http://host/v1/chat/completions", r"leave /chat/completions out"),
    ],
)
def test_what_cannot_be_a_url_is_refused(url, words):
    with pytest.raises(UserError, match=words) as found:
        ChatEngine(Teacher(model="m", url=url), key=KEY)
    assert str(found.value).startswith(f"{KEY}.url") and "hidden" not in str(found.value)
    assert checked_url("http://host:8000/v1/", KEY) == "http://host:8000/v1"


@pytest.fixture
def proxies(monkeypatch):
    """Set the proxies of the environment, and no others."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    return lambda **given: [monkeypatch.setenv(name, value) for name, value in given.items()]


def test_proxies_come_from_the_environment_but_not_for_this_machine(proxies):
    assert proxy_for("https://api.example.com/v1", KEY) is None
    proxies(https_proxy="proxy.example.com:3128", http_proxy="socks5://me:hidden@host:1", no_proxy="inside.example.com")
    assert proxy_for("https://api.example.com/v1", KEY) == "http://proxy.example.com:3128"
    own = ("localhost:1", "127.0.0.1", "[::1]:8000", "inside.example.com")
    assert [proxy_for(f"https://{host}/v1", KEY) for host in own] == [None] * 4
    with pytest.raises(
        UserError, match=r"goes through http_proxy of the environment, which is a socks5 proxy; "
    ) as found:
        proxy_for("http://api.example.com/v1", KEY)
    assert "hidden" not in str(found.value)


def test_a_teacher_is_asked_through_a_proxy(shared, proxies):
    proxies(http_proxy=shared.url.removesuffix("/v1"))
    assert outcome(teacher_of(shared, url="http://teacher.invalid/v1"), "far").content == "answer to far"


def test_retry_after_in_all_its_forms():
    dates = {"Retry-After": "Fri, 27 Nov 2026 09:00:30 GMT", "Date": "Fri, 27 Nov 2026 09:00:10 GMT"}
    assert asked_wait(dates) == 20.0  # by the server's clock, whatever this one says
    assert [asked_wait({"Retry-After": v}) for v in ("3", "0.5", "-1", "soon", "", "²")] == [3.0, 0.5, 0, 0, 0, 0]
    assert asked_wait({"Retry-After": "Fri, 27 Nov 2020 09:00:30 GMT"}) == 0.0


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    assert whole_text(json.loads(r'{"a": ["x\ud83d", "\ud83d\ude00"]}')) == {"a": ["x\ufffd", "\U0001f600"]}


# ---------------------------------------------------------------- a server that goes away


def test_a_restarted_server_is_waited_for_with_one_line(tmp_path, quick, capsys):
    with start_fault_server(tmp_path) as server:
        texts = [f"<<refuse:1>> {i}" if i == 3 else f"<<sleep:0.3>> {i}" for i in range(60)]
        found = outcomes(teacher_of(server, deadline=5.0), *texts)
        assert {reply.content for reply in found} == {f"answer to {i}" for i in range(60)}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{KEY}.url={server.url} cannot be reached (Connection refused); waiting for it"
    assert re.fullmatch(rf"{KEY}\.url={server.url} is back after \d s", lines[1]) and len(lines) == 2


def test_a_wait_for_the_server_does_not_count_for_a_request(tmp_path, quick):
    """Down for longer than the tries of the request may take together, but shorter than an outage may."""

    async def ask():
        async with ChatEngine(teacher_of(server, deadline=2.0), key=KEY) as engine:
            first = asyncio.ensure_future(engine.ask(asked("<<sleep:1*>> patient")))
            await asyncio.sleep(0.5)
            server.kill()
            await asyncio.sleep(1.7)
            server.start()
            return await first

    with start_fault_server(tmp_path) as server:
        assert asyncio.run(ask()).attempts > 2


def test_a_server_that_is_gone_ends_the_run_and_no_prompt(tmp_path, quick):
    with start_fault_server(tmp_path) as server:
        server.kill()
        found = outcomes(teacher_of(server, deadline=0.5), *(f"question {i}" for i in range(50)))
        server.start()
    lines = {str(one) for one in found}
    assert {type(one) for one in found} == {UserError} and len(lines) == 1
    assert re.fullmatch(
        rf"{KEY}\.url={server.url} could not be reached for \d s \(Connection refused\); start it, and run the same "
        r"command again: it goes on from here",
        lines.pop(),
    )


# ---------------------------------------------------------------- how many at once


def test_an_overloaded_server_gets_fewer_requests_and_all_replies_come(tmp_path, quick):
    with start_fault_server(tmp_path, capacity=10, latency=0.02) as server:

        async def ask():
            async with ChatEngine(teacher_of(server, concurrency=100), key=KEY) as engine:
                found = await asyncio.gather(*(engine.ask(asked(f"question {i}")) for i in range(600)))
                return found, engine.width

        found, width = asyncio.run(ask())
        refused = len(server.requests(429))
    assert len({reply.content for reply in found}) == 600
    assert width < 40 and refused < 400
