"""Every step on tiny fixed inputs against results that are kept: nothing changes a result unseen.

A result that is meant to change: raise the step's VERSION, write its line into CHANGELOG.md, and keep the new values
with `SMOLPOST_GOLDEN=write pytest tests/golden`.
"""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer

import smolpost.stages  # registers the kinds
from smolpost.data.practice import write_practice
from smolpost.data.settings import PREPARE_VERSION, TOKENIZE_VERSION
from smolpost.data.sources import read_rows
from smolpost.registry import STAGE_KINDS, TASK_KINDS
from smolpost.schema import Source
from smolpost.training import reference
from tests.golden.golden_project import (
    Project,
    completions,
    digest,
    packs,
    pairs,
    smolpost,
    steps,
    tokenized,
    weight_hash,
    weight_sums,
    with_other_weights,
)  # fmt: skip

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of several threads differ in their last bits
    project = Project(tmp_path_factory.mktemp("golden"))
    project.make()
    yield project
    torch.set_num_threads(threads)


def check(step: str, found: dict | list, tolerance: float = 0.0, *, case: str = "") -> None:
    """Compare with what is kept of the step.

    Args:
        tolerance: Of numbers with a fraction, relative above 1 and absolute below; everything else is equal.
        case: Of several results of one step.
    """
    file = HERE / f"{step}.json"
    kept, found = json.loads(file.read_text()) if file.is_file() else {}, json.loads(json.dumps(found))
    if os.environ.get("SMOLPOST_GOLDEN") == "write":
        kept = {"version": version(step), "results": kept.get("results", {}) | {case: found}}
        file.write_text(json.dumps(kept, ensure_ascii=False, indent=1, sort_keys=True) + "\n")
    assert kept["version"] == version(step), (
        f"{step} declares version {version(step)}, and its results are kept of version {kept['version']}; write the "
        "CHANGELOG line and keep the new results with SMOLPOST_GOLDEN=write"
    )
    differences = list(compared(kept["results"][case], found, tolerance, case))
    assert not differences, (
        f"result of {step} changed: bump its VERSION and write the CHANGELOG line, or undo; "
        + "; ".join(differences[:5])
    )


def version(step: str) -> int | list[int]:
    """What the step declares beside its code."""
    steps = {
        "tokenize": TOKENIZE_VERSION,
        "prepare": PREPARE_VERSION,
        "reference": reference.VERSION,
        "train": [STAGE_KINDS["sft"].VERSION, STAGE_KINDS["apo"].VERSION],
    }
    return steps[step] if step in steps else {**TASK_KINDS, **STAGE_KINDS}[step].VERSION


def compared(kept, found, tolerance: float, place: str):
    """A line for each place where the two differ."""
    if isinstance(kept, dict) and isinstance(found, dict):
        for key in sorted(kept.keys() | found.keys()):
            yield from compared(kept.get(key), found.get(key), tolerance, f"{place}.{key}")
    elif isinstance(kept, list) and isinstance(found, list) and len(kept) == len(found):
        for i, pair in enumerate(zip(kept, found, strict=True)):
            yield from compared(*pair, tolerance, f"{place}[{i}]")
    elif isinstance(kept, float) and isinstance(found, float):
        if not abs(kept - found) <= tolerance * max(1, abs(kept)):
            yield f"{place} was {kept!r}, is {found!r}"
    elif kept != found:
        yield f"{place} was {kept!r}, is {found!r}"


def test_tasks(project):
    folder = project.stage("tasks")
    check("tasks", {file.stem: digest(file.read_text()) for file in sorted(folder.glob("*.jsonl"))})


def test_practice(tmp_path):
    write_practice(tmp_path, problems=40, conversations=10, pairs=10, calls=20, seed=1)
    check("practice", {file.stem: digest(file.read_text()) for file in sorted(tmp_path.glob("*.jsonl"))})


@pytest.mark.parametrize("stage", ["init", "byte_pairs"])
def test_init(project, stage):
    folder = project.stage(stage)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = [*sorted(tokenizer["model"]["vocab"].items(), key=lambda entry: entry[1])]
    check("init",
        {
            "vocabulary": digest(json.dumps(words)), "tokenizer": digest(json.dumps(tokenizer, sort_keys=True)),
            "template": digest(AutoTokenizer.from_pretrained(folder).chat_template), "weights": weight_sums(folder),
        },
        1e-6, case=stage,
    )  # fmt: skip


def test_tokenize(project):
    check("tokenize", {source: tokenized(project, source) for source in ("written", "tasks", "texts", "pairs")})


@pytest.mark.parametrize("stage", ["sft", "wrapped", "alone"])
def test_prepare(project, stage):
    check("prepare", packs(Path(project.manifest(stage)["prepared"])), case=stage)


def test_prepare_pairs(project):
    check("prepare", pairs(Path(project.manifest("apo")["prepared"])), case="apo")


@pytest.mark.parametrize("stage", ["sft", "wrapped", "apo"])
def test_train(project, stage):
    folder = project.stage(stage)
    check("train", steps(project.manifest(stage)["report"]) | {"weights": weight_sums(folder)}, 1e-5, case=stage)


def test_kto(project):
    manifest = project.manifest("kto")
    check("kto", completions(Path(manifest["prepared"])), case="rows")
    found = steps(manifest["report"]) | {"weights": weight_sums(project.stage("kto"))}
    check("kto", found, 1e-5, case="steps")


def test_distill(project):
    manifest = project.manifest("distill")
    found = steps(manifest["report"]) | {"weights": weight_sums(project.stage("distill"))}
    check("distill", found, 1e-5, case="steps")


def test_grpo(project):
    manifest = project.manifest("grpo")
    found = steps(manifest["report"]) | {"weights": weight_sums(project.stage("grpo"))}
    check("grpo", found, 1e-5, case="steps")


def test_reference(project):
    [folder] = (project.folder / "runs" / "golden" / "references").iterdir()
    logps = np.concatenate([load_file(file)["logps"] for file in sorted(folder.glob("*.safetensors"))])
    check("reference", logps.tolist(), 1e-5)


def test_pairs(project):
    source = Source(path=str(project.stage("pairs") / "rows.parquet"))
    check("pairs", [dict(row) for _, row in read_rows(source)])


@pytest.mark.parametrize("stage", ["soup", "lawa", "ema"])
def test_merge(project, stage):
    check("merge", weight_sums(project.stage(stage)), 1e-6, case=stage)


@pytest.fixture(scope="module")
def checkpoints(project, tmp_path_factory):
    folder, like = tmp_path_factory.mktemp("checkpoints"), project.stage("byte_pairs")
    return [with_other_weights(folder / name, like, seed) for seed, name in enumerate(("one", "two", "start"))]


def test_merge_of_exact_weights(checkpoints, tmp_path):
    one, two, _ = checkpoints
    smolpost("merge", str(tmp_path / "mean"), f"{one}=0.25", f"{two}=0.75")
    check("merge", weight_hash(tmp_path / "mean"), case="exact")


def test_mergekit(checkpoints, tmp_path):
    one, two, start = map(str, checkpoints)
    slerp = [one, two, "--method", "slerp", "--set", "t=0.3"]
    ties = [f"{one}=0.5", f"{two}=1.5", "--method", "ties", "--base-model", start, "--set", "density=0.5"]
    for words in (slerp, ties):
        method = words[3]
        smolpost("merge", str(tmp_path / method), *words, "--dtype", "float32")
        check("mergekit", weight_sums(tmp_path / method), 1e-6, case=method)


def test_sweep(project):
    report = json.loads((project.stage("sweep") / "sweep.json").read_text())
    kept = ("weight", "weights", "picked", "long", "rest", "cost")
    points = [{key: point[key] for key in kept if key in point} for point in report["points"]]
    check("sweep", {"picked": report["picked"], "points": points}, 1e-5)


def test_greedy(project):
    report = json.loads((project.stage("greedy") / "greedy.json").read_text())
    check("greedy", {key: report[key] for key in ("kept", "weights", "value", "alone", "trials")}, 1e-5)


def test_evaluation(project):
    for found in project.scores("sft").values():
        check(found["kind"], found, 1e-6)


class Answers(BaseHTTPRequestHandler):
    """A server whose replies are right where the prompt has an even number of tokens: it says again what was asked, and
    calls the function that was asked for."""

    def do_GET(self):
        self.answer({"data": [{"id": "served", "root": self.server.root}]})

    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        asked = self.server.tokenizer.decode(prompt)
        asked = asked.rpartition("<|im_start|>user")[2].partition("<|im_end|>")[0]
        if "Base" in asked:
            said = '<tool_call>{"name": "area", "arguments": {"base": 3}}</tool_call>'
        else:
            said = f"{asked}\n</think>\n{asked}" if len(prompt) % 2 == 0 else asked[: len(asked) // 3]
        self.answer({"choices": [{"text": said, "finish_reason": "stop"}]})

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


class Patient(ThreadingHTTPServer):
    request_queue_size = 128  # all requests come at once, and a busy machine lets them wait


@pytest.fixture
def server():
    httpd = Patient(("127.0.0.1", 0), Answers)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def test_evaluation_of_replies_that_are_often_right(project, server):
    """The model of three steps replies with nonsense; here every task that asks for replies has something to score."""
    folder = project.stage("wrapped")
    server.root, server.tokenizer = str(folder), AutoTokenizer.from_pretrained(folder)
    here = ["~evaluation.tasks.loss", "~evaluation.tasks.preference", "~stages.sweep", "~stages.greedy"]
    scores = project.scores("wrapped", *here, f"evaluation.server=http://127.0.0.1:{server.server_port}/v1")
    for found in scores.values():
        check(found["kind"], found, 1e-6, case="served")
