"""A real server: a tiny model that thinks, behind `transformers serve` on loopback, asked by the real client."""

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from smolpost import cli
from smolpost.errors import UserError
from smolpost.pipeline import manifest
from smolpost.synthesis.client import ChatEngine
from smolpost.synthesis.probe import probe
from smolpost.synthesis.records import Reply, Request, RequestFailed
from smolpost.synthesis.settings import Teacher
from tests.small import environment
from tests.synthesis.thinking_model import NUMBERS, Server, answer, question, reasoning, served
from tests.synthesis.tiny_checkpoints import make_model, make_tokenizer

pytestmark = pytest.mark.slow  # training the models takes half a minute

QWEN3 = dict(server="transformers", temperature=0.6, top_p=0.95, top_k=20, min_p=0.0, max_new_tokens=40)


@pytest.fixture(scope="module")
def strong(thinking_models):
    with served(thinking_models[0]) as server:
        yield server


def engine(at: Server, **settings) -> ChatEngine:
    teacher = Teacher(model=str(at.model), url=at.url, **(QWEN3 | settings))
    return ChatEngine(teacher, key="stages.t.teacher")


def ask(at: Server, numbers: Sequence[int], thinking: bool | None, **settings) -> list[Reply]:
    async def all_replies() -> list[Reply]:
        async with engine(at, **settings) as teacher:
            asked = [Request([{"role": "user", "content": question(n)}], thinking, seed=n) for n in numbers]
            return await asyncio.gather(*map(teacher.ask, asked))

    return asyncio.run(all_replies())


def identity(server: Server, **settings) -> dict:
    async def who() -> dict:
        async with engine(server, **settings) as teacher:
            return await teacher.identity()

    return asyncio.run(who())


def num_right(replies: list[Reply], numbers: Sequence[int]) -> int:
    return sum(reply.content == answer(n) for reply, n in zip(replies, numbers, strict=True))


def test_the_strong_teacher_is_right_and_the_weak_one_often_wrong(strong, thinking_models):
    numbers = NUMBERS[:40]
    assert num_right(ask(strong, numbers, False), numbers) >= 36
    assert num_right(ask(strong, numbers, True), numbers) >= 36
    with served(thinking_models[1]) as weak:
        assert num_right(ask(weak, numbers, True), numbers) <= 30


@pytest.mark.parametrize("thinking_by", ["server", "words"])
def test_it_thinks_as_it_is_asked(strong, thinking_by):
    [silent] = ask(strong, [47], False, thinking_by=thinking_by)
    assert (silent.content, silent.reasoning, silent.finish_reason) == (answer(47), None, "stop")
    assert silent.prompt_tokens > 10 and silent.completion_tokens > 5 and silent.attempts == 1
    if thinking_by == "server":
        [thought] = ask(strong, [47], True)
        assert (thought.content, thought.reasoning, thought.closed) == (answer(47), reasoning(47), True)
        [cut] = ask(strong, [47], True, max_new_tokens=6)
        assert cut.content == "" and not cut.closed and reasoning(47).startswith(cut.reasoning)
        assert (cut.finish_reason, cut.completion_tokens) == ("length", 6)


def test_sampling_reaches_the_model(strong):
    """At top_k 1 the highest temperature is greedy, which this model never is where top_k stays at its own 20."""
    numbers = NUMBERS[:20]
    assert num_right(ask(strong, numbers, False, temperature=50.0, top_p=1.0, top_k=1), numbers) == 20
    assert num_right(ask(strong, numbers, False, temperature=50.0, top_p=1.0, top_k=None), numbers) < 5


def test_the_probe_knows_a_model_that_thinks_and_one_that_cannot(strong, thinking_models, tmp_path):
    found = identity(strong, thinking=True)
    assert (found["model"], found["server"], found["modes"]) == (str(strong.model), "transformers", ["think"])
    assert identity(strong, thinking=False)["modes"] == ["no_think"]
    mute = shutil.copytree(thinking_models[0], tmp_path / "mute")
    template = mute / "chat_template.jinja"
    switch = "if enable_thinking is defined and enable_thinking is false"
    assert switch in template.read_text()
    template.write_text(template.read_text().replace(switch, "if true"))
    with served(mute) as server, pytest.raises(UserError) as caught:
        identity(server, thinking=True)
    line = str(caught.value)
    assert "was asked to think and replied " in line and "its chat template may not read enable_thinking" in line


def test_a_setting_that_the_server_does_not_know_fails_in_one_line(strong):
    """As `vllm` the settings go out under vLLM's names, which transformers serve answers with 422."""
    with pytest.raises(RequestFailed, match=r"422: .*Unexpected fields in the request: .*top_k"):
        ask(strong, [47], None, server="vllm", min_p=None)
    with pytest.raises(UserError, match=r"refuses a plain question: 422.*set stages.t.teacher.server and stages"):
        asyncio.run(_probe_as_vllm(strong))


async def _probe_as_vllm(server: Server) -> None:
    async with engine(server, server="vllm") as teacher:
        await probe(teacher.ask, teacher.teacher, [None], key="stages.t.teacher")


def test_a_server_that_is_killed_and_restarted_loses_no_reply(thinking_models, capsys):
    with served(thinking_models[0]) as server:

        async def all_replies() -> list[Reply]:
            async with engine(server, concurrency=4) as teacher:
                asked = [Request([{"role": "user", "content": question(n)}], True, seed=n) for n in NUMBERS]
                replies = [asyncio.create_task(teacher.ask(request)) for request in asked]
                while sum(reply.done() for reply in replies) < 10:
                    await asyncio.sleep(0.01)
                server.kill()
                assert not all(reply.done() for reply in replies)
                await asyncio.to_thread(server.start)
                return await asyncio.gather(*replies)

        replies = asyncio.run(all_replies())
    assert num_right(replies, NUMBERS) >= 0.9 * len(NUMBERS)
    assert any(reply.attempts > 1 for reply in replies)
    printed = capsys.readouterr().out
    assert printed.count("cannot be reached") == printed.count("is back after") == 1


def test_smolpost_serve_runs_the_server(thinking_models, tmp_path):
    port = _free_port()
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "mine.yaml").write_text(
        f"model: {thinking_models[0]}\nserver: transformers\nurl: http://127.0.0.1:{port}/v1\nserve: {{device: cpu}}\n"
    )
    with _serving(port, tmp_path, "mine", "--recipes", str(tmp_path)):
        pass
    assert not _answers(port)  # the program is the server itself: nothing is left behind


def test_a_served_stage_replies_as_it_does_in_this_process(tmp_path, monkeypatch):
    tokenizer, folder, port = make_tokenizer(), tmp_path / "runs" / "mine" / "sft-0", _free_port()
    make_model(0, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest.write(folder, stage="sft", key="0")
    (tmp_path / "p.txt").write_text("2+2?\nHello, who are you?\n")
    with _serving(port, tmp_path, "sft", f"run_dir={tmp_path}/runs", "--server", "transformers", "--port", str(port)):
        monkeypatch.chdir(tmp_path)
        models = ["sft", f"http://127.0.0.1:{port}/v1", "--model", str(folder), f"run_dir={tmp_path}/runs"]
        with pytest.raises(SystemExit) as end:
            cli.main(["sample", *models, "--prompts", "p.txt", "--temperature", "0", "--max-new-tokens", "24"])
        assert end.value.code == 0
    entries = [json.loads(line) for line in (tmp_path / "samples.replies.jsonl").read_text().splitlines()]
    replies: dict[tuple, list] = {}
    for entry in entries:
        said = entry["reply"]
        counts = [said[name] for name in ("finish_reason", "prompt_tokens", "completion_tokens")]
        replies.setdefault((entry["prompt"], entry["mode"]), []).append([said["raw"]["content"] or "", *counts])
    assert len(replies) == 4 and all(here == there for here, there in replies.values()), replies
    assert len({here[0] for here, _ in replies.values()}) > 1


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def _serving(port: int, folder: Path, *words: str) -> Iterator[None]:
    """`smolpost serve WORDS --run`, from when it answers."""
    command = [sys.executable, "-m", "smolpost.cli", "serve", *words, "--run"]
    variables = environment() | {"HF_HUB_CACHE": str(folder / "cache")}
    (folder / "cache").mkdir()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, cwd=Path.cwd())
    try:
        deadline = time.monotonic() + 120
        while not _answers(port):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        assert process.wait(timeout=30) is not None


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
