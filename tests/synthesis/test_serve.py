# ruff: noqa: E501 - whole lines are compared
"""`smolpost serve`: the command of each server, and what a teacher that cannot be served is told."""

import json
import os
import sys
from pathlib import Path

import pytest

from smolpost import cli
from smolpost.chat.render import load_template
from smolpost.pipeline import manifest
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
    assert "`smolpost export vllm-config sft OUT` writes a folder with both" in err and err.count("\n") == 1


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
        ("", ["qwen32b"], f"qwen32b is neither a teacher, a finished stage nor a checkpoint folder; did you mean qwen3_32b? teachers: {TEACHERS}"),
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
        ("model: teacher", ["mine", "--server", "llama_cpp"], "model=teacher is a checkpoint folder, and llama.cpp reads GGUF files; `smolpost export gguf teacher OUT` writes one, and `smolpost serve OUT/model.gguf` serves it"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_one_line(here, capsys, file, words, line):
    if file:
        Path("teacher/mine.yaml").write_text(file + "\n")
    code, out, err = serve(capsys, *words, "--recipes", ".")
    lines = [text for text in err.splitlines() if "it needs server=" not in text]
    assert (code, out, len(lines)) == (2, "", 1) and lines[0].startswith(f"smolpost: {line}")


@pytest.fixture
def stage(here) -> Path:
    """Folder of a finished sft stage with our template, 64k tokens of context stretched to 128k by YaRN."""
    folder = here / "runs" / "mine" / "sft-1a2b"
    folder.mkdir(parents=True)
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 65536, "rope_theta": 5e6}
    config = {"model_type": "smollm3", "max_position_embeddings": 65536, "rope_parameters": rope, "rope_theta": 5e6}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(load_template("smollm3"))
    manifest.write(folder, stage="sft", key="1a2b")
    return folder


def test_a_stage_is_served_with_its_template_parsers_and_context(stage, capsys):
    parsers = "--reasoning-parser qwen3 {}--tool-call-parser hermes"
    auto = "--enable-auto-tool-choice "
    assert serve(capsys, "sft") == (
        0,
        "vllm serve runs/mine/sft-1a2b --host 127.0.0.1 --port 8000 --max-model-len 131072 --dtype bfloat16 "
        f"--served-model-name sft {parsers.format(auto)}",
        "",
    )
    assert serve(capsys, "sft", "--server", "sglang", "--port", "9001") == (
        0,
        "python -m sglang.launch_server --model-path runs/mine/sft-1a2b --host 127.0.0.1 --port 9001 "
        f"--context-length 131072 --dtype bfloat16 {parsers.format('')}",
        "",
    )
    line = serve(capsys, "sft", "--server", "transformers", "run_dir=runs")[1]
    assert line == "transformers serve runs/mine/sft-1a2b --host 127.0.0.1 --port 8000"
    assert "--served-model-name" not in serve(capsys, "runs/mine/sft-1a2b")[1]


def test_a_template_in_place_of_the_checkpoints_own(stage, capsys):
    (stage / "chat_template.jinja").unlink()
    code, out, err = serve(capsys, str(stage))
    assert code == 0 and "parser" not in out
    assert err == (
        "smolpost: the checkpoint has no chat template, so it cannot chat; --chat-template smollm3 gives it one"
    )
    code, out, err = serve(capsys, str(stage), "--chat-template", "smollm3")
    assert (code, err) == (0, "") and out.endswith("templates/smollm3.jinja")
    assert "--reasoning-parser qwen3" in out and Path(out.split()[-1]).is_file()
    code, out, _ = serve(capsys, str(stage), "--chat-template", "chatml")
    assert code == 0 and "reasoning-parser" not in out  # ChatML has no mode that a request could turn off
    code, _, err = serve(capsys, str(stage), "--chat-template", "smollm3", "--server", "transformers")
    assert code == 2 and "--chat-template is not a flag of transformers serve; copy the checkpoint's folder" in err


def test_the_precision_is_16_bit(stage, capsys):
    config = json.loads((stage / "config.json").read_text())
    for dtype, served in (("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16")):
        (stage / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        assert f"--dtype {served} " in serve(capsys, str(stage))[1]


def test_a_gguf_file_is_served_by_llama_cpp(here, capsys):
    Path("model.gguf").touch()
    assert serve(capsys, "model.gguf")[1].startswith("llama-server --model model.gguf --host 127.0.0.1 --port 8000")
    code, _, err = serve(capsys, "model.gguf", "--server", "vllm")
    assert code == 2 and "--server vllm does not read GGUF files; leave it out, or name a checkpoint" in err


def test_what_of_ours_cannot_be_served_is_one_line(stage, capsys):
    adapter = Path("adapter")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    lines = {
        ("adapter",): "adapter holds a LoRA adapter without its base model; `smolpost merge OUT adapter=1` writes the",
        ("http://localhost:1/v1",): "http://localhost:1/v1 is a server already; `smolpost chat http://localhost:1/v1`",
        ("apo",): "apo is neither a teacher, a finished stage nor a checkpoint folder; teachers: ",
        ("sft", "pipeline=tiny"): "stage sft is not finished: ",
        ("checkpoint", "pipeline=tiny"): "checkpoint stands for model.checkpoint, which has no value here; choose one",
        ("sft", "--port", "0"): "--port=0 is outside [1, 65535]",
        ("sft", "--chat-template", "smollm"): "chat template 'smollm' does not exist; use one of chatml, smollm3",
        ("sft", "--server", "llama_cpp"): "model=runs/mine/sft-1a2b is a checkpoint folder, and llama.cpp reads GGUF",
    }
    for words, line in lines.items():
        code, out, err = serve(capsys, *words)
        assert (code, out) == (2, "") and err.startswith(f"smolpost: {line}"), err
        assert "\n" not in err


def test_run_becomes_the_server(here, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "execv", lambda path, words: ran.append((path, words)))
    serve(capsys, "qwen3_32b", "--server", "transformers", "--run")
    [(path, words)] = ran
    assert path == str(Path(sys.executable).parent / "transformers") and words[:2] == ["transformers", "serve"]
    code, _, err = serve(capsys, "qwen3_32b", "--run")
    assert code == 2 and "--run needs the program vllm, which is not installed here; pip install vllm, or leave" in err
