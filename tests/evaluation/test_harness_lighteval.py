"""lighteval in an environment of its own: a stand-in program in fast tests, the real one where it is installed."""

import json
import os
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from smolpost.errors import UserError
from smolpost.evaluation.harness.checkpoint_view import write_view
from smolpost.evaluation.harness.lighteval import scores_of
from smolpost.evaluation.harness.run import run_harness
from smolpost.schema import Harness

# Writes what lighteval 0.13.0 wrote in a run of its own: the same folders, file names and fields, fewer of them. Like
# lighteval it takes generations that lie in the checkpoint's folder for its own, whatever the weights are now.
STAND_IN = """#!{python}
import json, pathlib, sys
import pyarrow as pa, pyarrow.parquet as pq, yaml
from safetensors import safe_open
backend, settings, task = sys.argv[1:4]
options = dict(zip(sys.argv[4:], sys.argv[5:]))
model = yaml.safe_load(open(settings))["model_parameters"]
checkpoint, out = pathlib.Path(model["model_name"]), pathlib.Path(options["--output-dir"])
with open({calls!r}, "a") as file:
    print(json.dumps([sys.argv[1:], model, sorted(p.name for p in checkpoint.iterdir())]), file=file)
if task.startswith("broken"):
    print("ValueError: Cannot find task broken")
    sys.exit(1)
cache = checkpoint / "83c220d792aa7c53" / task / "GENERATIVE.json"
if not cache.exists():
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps(safe_open(checkpoint / "model.safetensors", "np").metadata()["reply"]))
reply = json.loads(cache.read_text())
texts = ["<think>why</think>" + reply, "<think>" + reply]
rows = [
    dict(
        doc=dict(id=str(i), task_name=task, query=f"{{i}}?", choices=["4"]),
        metric=dict(em=int(text.endswith("4"))),
        model_response=dict(text=[text], text_post_processed=[text.split("</think>")[-1]], input=None),
    )
    for i, text in enumerate(texts)
]
em = sum(row["metric"]["em"] for row in rows) / 2
day, name = "2026-01-01T00-00-00.000000", str(checkpoint).strip("/")
(out / "results" / name).mkdir(parents=True)
(out / "details" / name / day).mkdir(parents=True)
results = dict(results={{task: dict(em=em, em_stderr=0.5), "all": dict(em=em, em_stderr=0.5)}})
(out / "results" / name / f"results_{{day}}.json").write_text(json.dumps(results))
pq.write_table(pa.Table.from_pylist(rows), out / "details" / name / day / f"details_{{task}}_{{day}}.parquet")
"""


@pytest.fixture
def checkpoint(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def environment(tmp_path):
    """A folder like a virtual environment's that holds the stand-in; `calls` reads what it was called with."""
    folder = tmp_path / "environment"
    (folder / "lib/python3.11/site-packages/lighteval-0.13.0.dist-info").mkdir(parents=True)
    (folder / "bin").mkdir()
    program = folder / "bin/lighteval"
    program.write_text(STAND_IN.format(python=sys.executable, calls=str(tmp_path / "calls")))
    program.chmod(0o755)
    return folder


def ask(tasks, environment, checkpoint, out, lines=None, **fields):
    harness = Harness(kind="lighteval", tasks=tasks, environment=str(environment), **fields)
    return run_harness(harness, checkpoint, out, [].append if lines is None else lines.append)


def calls(tmp_path):
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def set_weights(checkpoint, text):
    file = checkpoint / "model.safetensors"
    with safe_open(file, "pt") as opened:
        is_set = opened.metadata().get("reply") == text
    if not is_set:  # the order of the metadata, and with it the file's hash, changes from one writing to the next
        save_file(load_file(file), file, {"format": "pt", "reply": text})


def test_results_are_joined_and_an_unclosed_block_is_counted(tmp_path, environment, checkpoint):
    set_weights(checkpoint, "4")
    lines = []
    result = ask(["sums"], environment, checkpoint, tmp_path / "out", lines, modes=["think"])["sums"]
    assert result["kind"] == "lighteval" and result["num_items"] == 2
    assert result["scores"]["think"] == result["scores"]["think/em"]
    assert (result["scores"]["think"]["value"], result["scores"]["think"]["n"]) == (1.0, 2)
    assert result["scores"]["think/unclosed"]["value"] == 0.5  # lighteval calls that reply right
    assert lines == ["sums think: em=1.0000 (n=2)"]
    kept = [json.loads(line) for line in (tmp_path / "out/sums/think/samples.jsonl").read_text().splitlines()]
    assert [sample["record"]["parsed"] for sample in kept] == [["4"], ["<think>4"]]


def test_what_lighteval_is_told(tmp_path, environment, checkpoint):
    set_weights(checkpoint, "4")
    ask(
        ["gpqa:diamond"], environment, checkpoint, tmp_path / "out", temperature=0.6, top_p=0.95, max_new_tokens=64,
        limit=3, tensor_parallel_size=2, custom_tasks="some.module", seed=7,
    )  # fmt: skip
    for mode, (words, model, files) in zip(("think", "no_think"), calls(tmp_path), strict=True):
        assert words[0] == "vllm" and words[2] == "gpqa:diamond|0"
        assert words[5:] == ["--save-details", "--custom-tasks", "some.module", "--max-samples", "3"]
        assert model["system_prompt"] == f"/{mode}" and model["override_chat_template"] is True
        assert model["generation_parameters"] == {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 64, "seed": 7}
        assert model["tensor_parallel_size"] == 2
        assert set(files) == {path.name for path in checkpoint.iterdir()}


def test_no_generation_of_an_earlier_run_is_used_and_the_checkpoint_stays_as_it_was(tmp_path, environment, checkpoint):
    files = sorted(checkpoint.iterdir())
    lines, arguments = [], (["sums"], environment, checkpoint, tmp_path / "out")
    for weights, value, runs in (("4", 1.0, 2), ("4", 1.0, 2), ("5", 0.0, 4)):
        set_weights(checkpoint, weights)
        assert ask(*arguments, lines)["sums"]["scores"]["no_think"]["value"] == value
        assert len(lines) == len(calls(tmp_path)) == runs
    assert sorted(checkpoint.iterdir()) == files
    assert sorted(p.name for p in (tmp_path / "out/sums").iterdir()) == [
        "no_think", "no_think.log", "think", "think.log",
    ]  # fmt: skip


def test_a_failing_task_keeps_finished_ones(tmp_path, environment, checkpoint):
    set_weights(checkpoint, "4")
    arguments = (environment, checkpoint, tmp_path / "out")
    with pytest.raises(UserError, match=r"lighteval failed on broken in think mode: ValueError: Cannot find"):
        ask(["sums", "broken"], *arguments)
    lines = []
    ask(["sums"], *arguments, lines)
    assert lines == []


def test_likelihood_tasks_are_not_asked_with_thoughts(tmp_path, environment, checkpoint):
    set_weights(checkpoint, "4")
    result = ask(["mmlu"], environment, checkpoint, tmp_path / "out", likelihood_tasks=["mmlu"])["mmlu"]
    assert [words[2] for words, *_ in calls(tmp_path)] == ["mmlu|0"]
    assert "think" not in result["scores"] and "skipped" in result["notes"]["think"]


def test_a_set_has_the_mean_of_its_members_and_its_own_standard_error():
    results = {
        "set:a|0": {"em": 0.5, "em_stderr": 0.03},
        "set:b|0": {"em": 1.0, "em_stderr": 0.04},
        "set:_average|0": {"em": 0.75, "em_stderr": 0.035},
    }
    scores, number = scores_of(results, {"set:a|0": [{}] * 3, "set:b|0": [{}] * 5})
    assert number == scores["em"]["n"] == 8
    assert (scores["em"]["value"], scores["a/em"]["value"], scores["b/em"]["n"]) == (0.75, 0.5, 5)
    assert scores["em"]["high"] - 0.75 == pytest.approx(1.96 * 0.05 / 2)  # sqrt(0.03^2 + 0.04^2) / 2


def test_the_view_is_readable_by_transformers_4_and_dated(tmp_path, checkpoint):
    write_view(checkpoint, tmp_path / "view", today="01 May 2031", template=True)
    config = json.loads((tmp_path / "view/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] and config["rope_scaling"] is None
    assert json.loads((tmp_path / "view/tokenizer_config.json").read_text())["tokenizer_class"] != "TokenizersBackend"
    tokenizer, original = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "view", checkpoint))
    ask = [{"role": "system", "content": "/think"}, {"role": "user", "content": "What?"}]
    rendered = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    assert rendered == original.apply_chat_template(
        ask, tokenize=False, add_generation_prompt=True, today="01 May 2031"
    )
    assert tokenizer.encode(rendered) == original.encode(rendered)


def test_a_head_that_is_stored_alone_is_the_embedding_in_the_view(tmp_path, checkpoint):
    """transformers 4 and vLLM look for a tied matrix under the embedding's name alone."""
    whole = load_file(checkpoint / "model.safetensors")
    head = {"lm_head.weight": whole["model.embed_tokens.weight"]}
    rest = {name: tensor for name, tensor in whole.items() if name != "model.embed_tokens.weight"}
    save_file(rest | head, checkpoint / "model.safetensors", metadata={"format": "pt"})
    write_view(checkpoint, tmp_path / "view", today="01 May 2031", template=True)
    assert load_file(tmp_path / "view/model.safetensors").keys() == whole.keys()


def test_what_cannot_be_asked_is_refused_in_one_line(tmp_path, environment, checkpoint):
    old = tmp_path / "old"
    (old / "lib/python3.11/site-packages/lighteval-0.9.2.dist-info").mkdir(parents=True)
    (old / "bin").mkdir()
    (old / "bin/lighteval").touch()
    for fields, message in (
        (
            {"environment": str(tmp_path)},
            r"holds no lighteval; make it with `python -m venv .* \"lighteval\[vllm\]==0.13",
        ),
        ({"environment": None}, r"harness.environment names no folder"),
        ({"environment": str(old)}, r"holds lighteval 0.9.2, not 0.13"),
        ({"max_new_tokens": 99, "backend": "accelerate"}, r"accelerate backend cuts prompts to it, not replies"),
        ({"max_new_tokens": 10**6}, r"harness.max_new_tokens=1000000 leaves no room"),
        ({"custom_tasks": "gone.py"}, r"harness.custom_tasks=gone.py is not a file"),
    ):
        harness = Harness(kind="lighteval", tasks=["sums"], **{"environment": str(environment)} | fields)
        with pytest.raises(UserError, match=message) as caught:
            run_harness(harness, checkpoint, tmp_path / "out", print)
        assert "\n" not in str(caught.value)
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        ask(["sums"], environment, checkpoint, tmp_path / "out")


TASKS = """
from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc

def ask(line, task_name=None):
    return Doc(task_name=task_name, query=line["question"], choices=[line["answer"]], gold_index=0)

TASKS_TABLE = [
    LightevalTaskConfig(
        name="sums", prompt_function=ask, hf_repo={rows!r}, hf_subset="default", hf_avail_splits=["test"],
        evaluation_splits=["test"], generation_size=8, metrics=[Metrics.exact_match], stop_sequence=[],
    )
]
"""


@pytest.mark.slow
def test_the_real_lighteval_does_what_the_stand_in_does(tmp_path, checkpoint):
    """SMOLPOST_LIGHTEVAL names an environment that holds lighteval; offline it needs an empty `tinyBenchmarks.pkl`
    beside its `tiny_benchmarks.py`, which fetches that file when it is imported."""
    environment = os.environ.get("SMOLPOST_LIGHTEVAL")
    if not environment:
        pytest.skip("SMOLPOST_LIGHTEVAL names no environment with lighteval")
    (tmp_path / "rows").mkdir()
    rows = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(3)]
    (tmp_path / "rows/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks.py").write_text(TASKS.format(rows=str(tmp_path / "rows")))
    files = sorted(checkpoint.iterdir())
    fields = {"backend": "accelerate", "batch_size": 2, "custom_tasks": str(tmp_path / "tasks.py"), "modes": ["think"]}
    lines = []
    result = ask(["sums"], Path(environment), checkpoint, tmp_path / "out", lines, **fields)["sums"]
    assert result["num_items"] == result["scores"]["think/em"]["n"] == 3
    assert set(result["scores"]) == {"think", "think/em", "think/unclosed"}
    assert sorted(checkpoint.iterdir()) == files and len(lines) == 1
