# ruff: noqa: E501 - whole lines are compared
"""`smolpost serve`: the command of each server, and what a teacher that cannot be served is told."""

import json
import os
import sys
from pathlib import Path

import pytest

from smolpost import cli
from smolpost.recipe import room
from smolpost.synthesis.serve import reasoning_parser, serve_command
from smolpost.synthesis.settings import Teacher

TEACHERS = ", ".join(sorted(file.stem for file in (room("recipes") / "teacher").glob("*.yaml")))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    return tmp_path


def serve(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, and what `smolpost serve` printed as its command and as errors."""
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", *words])
    printed = capsys.readouterr()
    return end.value.code, printed.out.strip(), printed.err.strip()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["qwen3_32b"],
            "vllm serve Qwen/Qwen3-32B --host 127.0.0.1 --port 8000 --max-model-len 40960 --dtype bfloat16 --reasoning-parser qwen3",
        ),
        (
            ["qwen3_0_6b", "--server", "sglang"],
            "python -m sglang.launch_server --model-path Qwen/Qwen3-0.6B --host 127.0.0.1 --port 8001 --context-length 40960 --dtype bfloat16 --reasoning-parser qwen3",
        ),
        (["qwen3_32b", "--server", "transformers"], "transformers serve Qwen/Qwen3-32B --host 127.0.0.1 --port 8000"),
    ],
)
def test_the_recipes_teachers(capsys, words, line):
    code, out, err = serve(capsys, *words)
    assert (code, out) == (0, line)
    assert ("it needs server=" in err) == ("--server" in words)  # the pipeline has to know the server, too


def test_a_teacher_of_ones_own(here, capsys):
    (here / "teacher" / "mine.yaml").write_text(
        "model: me/mine\nurl: http://gpu7:9000/v1\nrevision: abc\nmax_new_tokens: 1000\n"
        "serve: {tensor-parallel-size: 4, dtype: float16, enable-prefix-caching: ''}\n"
    )
    assert serve(capsys, "mine", "--recipes", ".")[1] == (
        "vllm serve me/mine --host 0.0.0.0 --port 9000 --revision abc --max-model-len 9192 --dtype float16 --tensor-parallel-size 4 --enable-prefix-caching"
    )
    (here / "teacher" / "mine.yaml").write_text("model: m-Q4.gguf\nserver: llama_cpp\nmax_new_tokens: 1808\n")
    assert serve(capsys, "mine", "--recipes", ".")[1] == (
        "llama-server --model m-Q4.gguf --host 127.0.0.1 --port 8000 --alias m-Q4.gguf --parallel 4 --ctx-size 40000 --jinja"
    )
    assert serve_command(Teacher(model="me/mine-GGUF", server="llama_cpp"))[1:3] == ["--hf-repo", "me/mine-GGUF"]


def test_a_checkpoint_folder_has_no_more_tokens_than_its_positions(here, capsys):
    Path("sft").mkdir()
    Path("sft/config.json").write_text(json.dumps({"model_type": "smollm3", "max_position_embeddings": 4096}))
    code, out, err = serve(capsys, "sft")
    assert (code, out) == (0, "vllm serve sft --host 127.0.0.1 --port 8000 --max-model-len 4096 --dtype bfloat16")
    assert "`smolpost export vllm-config sft OUT` writes a folder with both" in err and err.count("\n") == 0


@pytest.mark.parametrize(
    ("model", "parser"),
    [
        ("Qwen/Qwen3-8B", "qwen3"),
        ("Qwen/Qwen3-4B-Instruct-2507", None),
        ("/runs/sft", None),
        ("models/qwen3-8b", "qwen3"),
    ],
)
def test_the_reasoning_parser(model, parser):
    assert reasoning_parser(model) == parser


@pytest.mark.parametrize(
    ("file", "words", "line"),
    [
        ("", ["qwen32b"], f"qwen32b is neither a teacher nor a checkpoint folder with its config.json; did you mean qwen3_32b? teachers: {TEACHERS}"),
        ("", ["hosted"], "server=hosted is somebody else's API, so there is nothing to serve; --server chooses one of: vllm, sglang, transformers, llama_cpp"),
        ("", ["checkpoint"], "the teacher names no model; a stage's checkpoint needs no server, and"),
        ("stage: sft", ["mine"], "stage=sft answers in the run's own process, so there is nothing to serve; give"),
        ("model: m\ntopk: 3", ["mine"], "teacher/mine.yaml: topk is not a key of a teacher; did you mean top_k? keys: api_key_env,"),
        ("model: m\ntop_p: 3", ["mine"], "teacher/mine.yaml: top_p=3 is outside (0, 1]"),
        ("model: m\ntop_p: high", ["mine"], "teacher/mine.yaml: top_p: Value 'high' of type 'str' could not be"),
        ("model: m\nserver: tgi", ["mine"], "teacher/mine.yaml: server=tgi is not a choice; choose one of: vllm, sglang, transformers, llama_cpp, hosted"),
        ("model: [", ["mine"], "teacher/mine.yaml:"),
        ("- 1", ["mine"], "teacher/mine.yaml: "),
        ("defaults: [nope, _self_]\nmodel: m", ["mine"], "teacher/mine.yaml: teacher=nope does not exist; choose one of: "),
        ("model: m\nrevision: a", ["mine", "--server", "transformers"], "revision=a has no flag of transformers serve, which reads it from the model's name; set model to m@a and revision to null"),
        ("model: m\npresence_penalty: 1", ["mine", "--server", "transformers"], "teacher.presence_penalty=1 is not a setting of transformers serve"),
        ("model: m", ["mine", "--server", "llama_cpp"], "model=m is not a GGUF file or a repository of them; set model to one, such as m-GGUF"),
        ("model: teacher", ["mine", "--server", "llama_cpp"], "model=teacher is a checkpoint folder, and llama.cpp reads GGUF files; `smolpost export gguf teacher FILE.gguf`"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_one_line(here, capsys, file, words, line):
    if file:
        Path("teacher/mine.yaml").write_text(file + "\n")
    code, out, err = serve(capsys, *words, "--recipes", ".")
    lines = [text for text in err.splitlines() if "it needs server=" not in text]
    assert (code, out, len(lines)) == (2, "", 1) and lines[0].startswith(f"smolpost: {line}")


def test_run_becomes_the_server(here, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "execv", lambda path, words: ran.append((path, words)))
    serve(capsys, "qwen3_32b", "--server", "transformers", "--run")
    [(path, words)] = ran
    assert path == str(Path(sys.executable).parent / "transformers") and words[:2] == ["transformers", "serve"]
    code, _, err = serve(capsys, "qwen3_32b", "--run")
    assert code == 2 and "--run needs the program vllm, which is not installed here; pip install vllm, or leave" in err
