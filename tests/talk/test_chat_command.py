"""`smolpost chat` as users run it: through a pipe and in a terminal, with real checkpoints; and what it refuses."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from smolpost import cli
from tests.char_model import char_model, char_tokenizer
from tests.small import environment
from tests.synthesis.fault_server import start_fault_server


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model that answers with a few letters."""
    folder, tokenizer = tmp_path_factory.mktemp("checkpoint"), char_tokenizer()
    char_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """Return a function: (words, stdin) -> (exit code, stdout, stderr), in this process."""

    def command(words, typed=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        with pytest.raises(SystemExit) as stopped:
            cli.main(["chat", *map(str, words)])
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return command


# ---------------------------------------------------------------- through a pipe


def test_each_line_of_a_pipe_is_answered_by_the_answer_alone(run, checkpoint, tmp_path):
    file = tmp_path / "chats.jsonl"
    code, out, err = run(
        [checkpoint, "--temperature", 0, "--max-new-tokens", 20, "--no-think", "--save", file],
        "ab\n/think\n\nabc\\\nd\n",
    )
    assert code == 0 and "Traceback" not in err
    assert err.count("cut at 20 tokens; /set max_new_tokens=40 and /retry allow more") == 2
    assert not file.exists()  # no reply is whole
    assert len(out) >= 2


def test_servers_talk_through_a_pipe_and_two_have_their_names_before_replies(run, tmp_path):
    with start_fault_server(tmp_path / "a", models=("a", "b")) as server:
        words = [server.url, server.url, "--model", "a", "--model", "b", "--save", tmp_path / "chats.jsonl"]
        code, out, err = run(words, "one\n/no_think\ntwo\n")
    assert (code, err) == (0, "")
    assert out.splitlines() == ["a: answer to one", "b: answer to one", "a: answer to two", "b: answer to two"]
    rows = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == ["chat/a", "chat/b"]
    assert [row["chat_template_kwargs"]["enable_thinking"] for row in rows] == [False, False]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "chat takes one model or two, and none was named; name a stage, a folder or a server's URL"),
        (["a", "b", "c"], "chat takes one model or two, and 3 were named"),
        (["nowhere/to/be"], "nowhere/to/be does not exist; name a checkpoint folder, a stage, or the URL of a server"),
        (["sft", "run_dir=nowhere"], "no run under nowhere has a finished model of that name"),
        (["sft", "--temperature", "hot"], "temperature=hot is not a number"),
        (["sft", "--top-p", "2"], "top_p=2.0 is not a number above 0 and up to 1"),
        (["sft", "--seed", "1.5"], "seed=1.5 is not a whole number"),
        (["sft", "--tools", "nowhere.json"], "nowhere.json cannot be read"),
        (["sft", "--save", "."], "is a folder; name a JSONL file"),
        (["{checkpoint}", "--model", "a"], "--model a chooses among a server's models, and no further server is named"),
        (["{checkpoint}", "--server", "vllm"], "--server vllm is for a server's URL, and none is named; leave it out"),
        (["{checkpoint}", "--api-key-env", "KEY"], "--api-key-env KEY is for a server's URL, and none is named"),
        (
            ["http://127.0.0.1:9/v1", "--template", "chatml"],
            "--template chatml is for a checkpoint, and a server renders",
        ),
        (["http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1 does not answer (["),
        (["{checkpoint}", "--template", "llama"], "chat template 'llama' does not exist; use one of chatml, smollm3"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_nothing_is_written(
    run, checkpoint, tmp_path, monkeypatch, words, expected
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run([word.format(checkpoint=checkpoint) for word in words])
    lines = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert (code, out, len(lines)) == (2, "", 1) and expected in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_a_template_names_the_remedy(run, checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    code, _, err = run([tmp_path], "hi\n")
    assert code == 2 and err.splitlines()[-1].endswith(
        "add --template smollm3, --template chatml or --template FILE.jinja"
    )
    code, out, _ = run([tmp_path, "--template", "chatml", "--max-new-tokens", 5, "--no-think"], "hi\n")
    assert code == 0 and out


def test_a_wrong_line_of_a_pipe_ends_it(run, tmp_path):
    with start_fault_server(tmp_path) as server:
        code, out, err = run([server.url], "one\n/set top_p=2\ntwo\n")
    assert (code, out) == (2, "answer to one\n") and "top_p=2.0 is not a number above 0" in err


# ---------------------------------------------------------------- in a terminal


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, *words, columns=80):
        self.process, self.descriptor = pty.fork()
        if self.process == 0:
            size = {"COLUMNS": str(columns), "LINES": "30", "TERM": "xterm"}
            command = [sys.executable, "-m", "smolpost.cli", "chat", *map(str, words)]
            os.execve(sys.executable, command, environment() | size)
        self.seen = self.all = ""

    def wait(self, text, timeout=60.0):
        """Read until the text comes; what came before it."""
        deadline = time.monotonic() + timeout
        while text not in self.seen:
            assert time.monotonic() < deadline, self.all
            self._read(0.2)
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text):
        os.write(self.descriptor, text.encode())

    def interrupt(self):
        time.sleep(0.3)  # a signal just after a prompt is taken with the next key
        self.type("\x03")

    def end(self):
        """Its exit code."""
        deadline = time.monotonic() + 20
        while self._read(1.0):
            assert time.monotonic() < deadline, self.all
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def _read(self, timeout):
        try:
            ready = select.select([self.descriptor], [], [], timeout)[0]
            got = os.read(self.descriptor, 65536).decode("utf-8", "replace") if ready else None
        except OSError:  # it ended
            got = ""
        self.seen += got or ""
        self.all += got or ""
        return got is None or bool(got)


def test_a_chat_in_a_terminal(tmp_path):
    """Thinking folds and unfolds, modes switch, a pasted text is one message; ctrl-C ends a reply, then the chat."""
    file = tmp_path / "chats.jsonl"
    with start_fault_server(tmp_path / "server", reasoning="inline") as server:
        chat = Terminal(server.url, "--seed", 5, "--save", file)
        chat.wait("/help lists the commands")
        chat.wait("> ")
        chat.type("one\r")
        assert re.search(r"thought for \d tokens, \d\.\d s; /unfold shows it", chat.wait("answer to one"))
        assert re.search(r"\d tokens, [\d,.]+ tokens/s, $", chat.wait("seed 5"))
        chat.wait("> ")
        chat.type("/unfold\r")
        chat.wait("reasoning about one, seed 5")
        chat.type("/no_think\r")
        chat.wait("no_think> ")
        chat.type("\x1b[200~two\nlines\x1b[201~\r")
        chat.wait("answer to two\r\nlines")
        chat.wait("no_think> ")
        chat.type("<<sleep:30>> three\r")
        time.sleep(0.5)
        chat.interrupt()
        chat.wait("said nothing; /retry asks again")
        chat.wait("no_think> ")
        chat.interrupt()
        assert chat.end() == 0
        assert "Traceback" not in chat.all
    [row] = map(json.loads, file.read_text().splitlines())
    assert [m["content"] for m in row["messages"]][2] == "two\nlines"


@pytest.mark.parametrize("columns", [120, 80])
def test_two_models_in_a_wide_and_a_narrow_terminal(tmp_path, columns):
    with start_fault_server(tmp_path, models=("one", "two")) as server:
        chat = Terminal(server.url, server.url, "--model", "one", "--model", "two", "--no-think", columns=columns)
        chat.wait("no_think> ")
        chat.type("where?\r")
        chat.wait("no_think> ")
        chat.type("/exit\r")
        assert chat.end() == 0
    side_by_side = re.search(r"answer to where\? {20,}answer to where\?", chat.all)
    assert bool(side_by_side) is (columns == 120) and chat.all.count("answer to where?") >= 2


def test_a_checkpoint_in_a_terminal_stops_at_ctrl_c(checkpoint):
    chat = Terminal(checkpoint, "--max-new-tokens", 100000, "--no-think", "--temperature", 0)
    chat.wait("no_think> ")
    chat.type("abc\r")
    time.sleep(0.5)
    chat.interrupt()
    chat.wait("stopped by ctrl-C; it stays in the conversation, and /retry asks again")
    chat.wait("no_think> ")
    chat.type("\x04")
    assert chat.end() == 0 and "Traceback" not in chat.all


@pytest.mark.slow
def test_a_model_that_thinks_here_and_behind_a_real_server(run, thinking_models, tmp_path):
    from tests.synthesis.thinking_model import question, served

    strong, _ = thinking_models
    with served(strong) as server:
        words = [strong, server.url, "--model", strong, "--temperature", 0, "--save", tmp_path / "chats.jsonl"]
        code, out, err = run(words, f"{question(47)}\n/no_think\n{question(31)}\n")
    assert code == 0, err
    assert [line.partition(": ")[2] for line in out.splitlines()] == [
        "The answer is \\boxed{47}.", "The answer is \\boxed{47}.",
        "The answer is \\boxed{31}.", "The answer is \\boxed{31}.",
    ]  # fmt: skip
    here, there = (json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines())
    assert here["messages"] == there["messages"] and here["messages"][1]["content"].startswith("<think>\nI have to")


def test_a_pipe_that_nobody_reads_any_more_ends_it(tmp_path):
    with start_fault_server(tmp_path) as server:
        command = [sys.executable, "-m", "smolpost.cli", "chat", server.url]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment()) as chat:
            chat.stdin.write("one\n")
            chat.stdin.flush()
            assert chat.stdout.readline() == "answer to one\n"
            chat.stdout.close()
            chat.stdin.write("two\n")
            chat.stdin.close()
            assert (chat.wait(timeout=60), chat.stderr.read()) == (141, "")
