# ruff: noqa: E501 - whole lines are compared
"""`smolpost sample`: which prompts are asked, that replies are those of the model, and that none is asked for twice."""

import json
import re
import shutil

import pytest
from transformers import AutoTokenizer

from smolpost import cli
from smolpost.chat.masks import encode_prompt
from smolpost.errors import UserError
from smolpost.inference.local import LocalEngine
from smolpost.model.loading import load_for_inference
from smolpost.pipeline import manifest, sample
from smolpost.pipeline.sample_prompts import read_prompts, shipped_prompts
from smolpost.schema import RELEASE_DAY
from tests.synthesis.fault_server import start_fault_server
from tests.synthesis.tiny_checkpoints import make_model, make_tokenizer

ASKED = [{"role": "user", "content": "2+2?"}]
FEW = ("--max-new-tokens", "12", "--temperature", "0")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder with two finished stages whose replies differ."""
    root, tokenizer = tmp_path_factory.mktemp("runs"), make_tokenizer()
    for seed, stage in enumerate(("sft", "apo")):
        folder = root / "mine" / f"{stage}-{seed}"
        make_model(seed, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        manifest.write(folder, stage=stage, key=str(seed))
    return root


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys, runs):
    """Run the command in a folder of its own: exit code, what was printed, and as errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.txt").write_text("2+2?\n\n  Hello \n")

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["sample", *words, f"run_dir={runs}"])
        printed = capsys.readouterr()
        return end.value.code, printed.out, printed.err

    return run


def kept(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.replies.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- prompts


def test_the_shipped_prompts_show_every_kind():
    prompts = {prompt.name: prompt for prompt in read_prompts(shipped_prompts())}
    assert len(prompts) == 12 and {"chat", "maths", "code", "refusal", "system", "tools"} <= prompts.keys()
    assert [message["role"] for message in prompts["system"].messages] == ["system", "user"]
    assert [message["role"] for message in prompts["multi-turn"].messages] == ["user", "assistant"] * 2 + ["user"]
    assert prompts["tool-result"].messages[-1]["role"] == "tool" and prompts["tool-result"].tools
    assert [tool["function"]["name"] for tool in prompts["tools"].tools] == ["get_weather", "convert_currency"]


def test_a_line_or_a_row_is_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("\ufefffirst\r\n\r\n second \n")
    first, second = read_prompts(tmp_path / "p.txt")
    assert (first.name, first.messages[0]["content"]) == ("1", "first")
    assert (second.name, second.messages[0]["content"]) == ("3", "second")
    rows = [
        {"prompt": "a"},
        {"id": "mine", "prompt": ASKED},
        {"messages": [{"role": "system", "content": "Be brief. /no_think"}, *ASKED, {"role": "assistant", "content": "4"}]},
        {"messages": ASKED, "chat_template_kwargs": {"enable_thinking": False, "custom_instructions": "x"}},
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, mine, reply, kwargs = read_prompts(tmp_path / "p.jsonl")
    assert (a.name, a.messages) == ("1", [{"role": "user", "content": "a"}]) and mine[:2] == ("mine", ASKED)
    # Its reply is what is asked for, and the command chooses the mode.
    assert reply.messages == [{"role": "system", "content": "Be brief."}, *ASKED]
    assert kwargs.template_kwargs == {"custom_instructions": "x"}


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("none.txt", None, r"--prompts \S+none.txt is not a file; name a .txt file with a prompt on each line, or a JSO"),
        ("p.txt", b" \n", r"p.txt: is empty; write a prompt on each line"),
        ("p.txt", b"\xff", r"p.txt: is not UTF-8 at byte 0; save it as UTF-8"),
        ("p.jsonl", b'{"text": "a"}', r"p.jsonl:1: has no prompt and no messages; give one of them to ask about"),
        ("p.jsonl", b'{"query": "a"}', r"p.jsonl:1: has the columns query; expected messages"),
        ("p.jsonl", b'{"messages": [{"role": "system", "content": "a"}]}', r"p.jsonl:1: no user speaks in it; add"),
        ("p.jsonl", b"a prompt", r"p.jsonl:1: is not JSON"),
        ("p.jsonl", b"", r"p.jsonl: is empty"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_one_line(tmp_path, name, content, line):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=line) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- replies


def test_replies_are_those_of_the_model_in_both_modes(ask, runs, tmp_path):
    code, out, _ = ask("sft", "apo", "--prompts", "few.txt", *FEW)
    assert code == 0 and (tmp_path / "samples.html").is_file()
    entries = {(entry["model"], entry["mode"], entry["prompt"]): entry["reply"] for entry in kept(tmp_path)}
    assert len(entries) == 8
    for stage, folder in (("sft", "mine/sft-0"), ("apo", "mine/apo-1")):
        engine = LocalEngine(*load_for_inference(runs / folder))
        for mode, thinking in (("think", True), ("no_think", False)):
            ids = encode_prompt(
                engine.tokenizer, ASKED, template_kwargs={"enable_thinking": thinking}, today=RELEASE_DAY
            )
            [[reply]] = engine.generate([ids], max_new_tokens=12)
            entry = entries[stage, mode, "1"]
            assert entry["raw"]["content"] == reply.text and entry["completion_tokens"] == reply.num_tokens
            assert (entry["finish_reason"] == "length") == reply.cut and entry["prompt_tokens"] == len(ids)
    lines = [line.split() for line in out.splitlines()]
    assert ["sft", "no", "think", "2", "0"] in [line[:5] for line in lines]


def test_a_run_goes_on_where_it_was_cut(ask, runs, tmp_path, monkeypatch):
    words = ("sft", "apo", "--prompts", "few.txt", "--max-new-tokens", "12", "--num-samples", "3")
    assert ask(*words)[0] == 0
    file = tmp_path / "samples.replies.jsonl"
    whole = {entry["key"]: entry["reply"]["raw"] for entry in kept(tmp_path)}
    assert len(whole) == 24 and len({str(raw) for raw in whole.values()}) > 12  # each sample has a seed of its own
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:5]) + lines[5][:40])  # killed in the middle of a line
    asked = []
    generate = sample.LocalTeacher._generate
    monkeypatch.setattr(
        sample.LocalTeacher, "_generate", lambda self, batch: asked.append(len(batch)) or generate(self, batch)
    )
    assert ask(*words)[0] == 0
    assert sum(asked) == 19 and {entry["key"]: entry["reply"]["raw"] for entry in kept(tmp_path)} == whole
    page = (tmp_path / "samples.html").read_bytes()

    def no_load(*_):
        raise AssertionError

    monkeypatch.setattr(sample, "load_for_inference", no_load)
    assert ask(*words)[0] == 0  # nothing is left, so nothing is loaded
    assert (tmp_path / "samples.html").read_bytes() == page
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert ask(*words, "--temperature", "0.7")[0] == 0
    assert len(kept(tmp_path)) == 48  # other settings are other replies


def test_a_model_without_a_template_continues_the_text(ask, runs, tmp_path):
    base = tmp_path / "base"
    make_model(0, make_tokenizer()).save_pretrained(base)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    code, out, _ = ask("base", "--prompts", "few.txt", *FEW)
    assert code == 0 and "plain text" in out
    entries = kept(tmp_path)
    assert {entry["mode"] for entry in entries} == {"plain"}
    ids = AutoTokenizer.from_pretrained(base)("2+2?", add_special_tokens=False).input_ids
    [[reply]] = LocalEngine(*load_for_inference(base)).generate([ids], max_new_tokens=12)
    assert entries[0]["reply"]["prompt_tokens"] == len(ids) == 4
    assert entries[0]["reply"]["raw"]["content"] == reply.text
    assert "plain text to continue: it has no chat template" in (tmp_path / "samples.html").read_text()
    assert ask("base", "--prompts", "few.txt", "--template", "smollm3", *FEW)[0] == 0
    assert {entry["mode"] for entry in kept(tmp_path)} == {"plain", "think", "no_think"}


def test_a_reply_has_what_the_context_leaves(ask, runs, tmp_path):
    short = tmp_path / "short"
    model, tokenizer = make_model(0, make_tokenizer()), make_tokenizer()
    ids = encode_prompt(tokenizer, ASKED, template_kwargs={"enable_thinking": True}, today=RELEASE_DAY)
    model.config.max_position_embeddings = len(ids) + 1
    model.save_pretrained(short)
    tokenizer.save_pretrained(short)
    (tmp_path / "one.txt").write_text("2+2?\n" + "x" * 50)
    code, out, _ = ask("short", "--prompts", "one.txt", *FEW)
    replies = {(entry["prompt"], entry["mode"]): entry["reply"] for entry in kept(tmp_path)}
    assert code == 0 and replies["1", "think"]["completion_tokens"] == 1
    assert ("2", "think") not in replies
    assert "failed" in out and f"and the model&#39;s context {len(ids) + 1}" in (tmp_path / "samples.html").read_text()


def test_a_server_beside_a_stage(ask, tmp_path):
    with start_fault_server(tmp_path) as server:
        code, _, _ = ask("sft", server.url, "--prompts", "few.txt", *FEW)
        assert code == 0
        requests = [request["body"] for request in server.requests() if "chat" in request.get("path", "chat")]
        asked = [body for body in requests if body and body.get("messages")]
        assert len(asked) == 4 and {body["chat_template_kwargs"]["enable_thinking"] for body in asked} == {True, False}
        assert {body["chat_template_kwargs"]["today"] for body in asked} == {RELEASE_DAY}
        assert {(body["model"], body["temperature"], body["max_tokens"]) for body in asked} == {("teacher", 0, 12)}
        assert ask("sft", server.url, "--prompts", "few.txt", *FEW)[0] == 0
        again = [request["body"] for request in server.requests() if "chat" in request.get("path", "chat")]
        assert len([body for body in again if body and body.get("messages")]) == 4
    assert "teacher, vLLM; the server&#39;s own chat template" in (tmp_path / "samples.html").read_text()
    code, _, err = ask(server.url, "--prompts", "few.txt", *FEW)
    assert code == 2 and err.startswith(f"smolpost: {server.url} does not answer (") and err.count("\n") == 1


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "sample needs a model: name stages, checkpoint folders or the URLs of servers"),
        (("sft", "sft"), "sft is named twice; name each model once"),
        (("soup",), r"soup is not a checkpoint folder, and no run under \S+ has a finished model of that name; name a"),
        (("sft", "--temperature", "-1"), r"--temperature=-1 is outside \[0, inf\)"),
        (("sft", "--temperature", "nan"), r"--temperature=nan is outside \[0, inf\)"),
        (("sft", "--top-p", "0"), r"--top-p=0 is outside \(0, 1\]"),
        (("sft", "--num-samples", "0"), r"--num-samples=0 is outside \[1, inf\)"),
        (
            ("sft", "--html", "nowhere/page.html"),
            "--html nowhere/page.html: the folder nowhere does not exist; make it",
        ),
        (("sft", "--html", "few.txt"), "--html few.txt exists and is not a page of `smolpost sample`; remove it or"),
        (("sft", "--prompts", "none.txt"), "--prompts none.txt is not a file; name"),
        (("broken",), r"broken has no tokenizer.json; save the tokenizer beside the weights"),
        (("sft", "--template", "none"), "chat template 'none' does not exist; use one of"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(ask, runs, tmp_path, words, line):
    if words == ("broken",):
        shutil.copytree(runs / "mine" / "sft-0", "broken", ignore=shutil.ignore_patterns("manifest.json", "tokenizer*"))
    code, out, err = ask(*words)
    assert code == 2 and re.match(f"smolpost: {line}", err) and err.count("\n") == 1, err
    assert {file.name for file in tmp_path.iterdir()} <= {"few.txt", "broken"} and out == ""


def test_a_file_of_somebody_else_stays(ask, tmp_path):
    file = tmp_path / "samples.replies.jsonl"
    for content in ('{"messages": []}\n', '{"messages": []}', "notes"):
        file.write_text(content)
        code, _, err = ask("sft", "--prompts", "few.txt", *FEW)
        assert code == 2 and file.read_text() == content
        assert (
            "samples.replies.jsonl:1 is not a kept reply; remove samples.replies.jsonl, or give --html another" in err
        )
