"""The published data chain in small, as users run it: two real servers, traces, pairs, SFT, APO and a soup."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from smolpost import recipe
from smolpost.pipeline.lineage import Lineage
from tests.small import ROOT, call, environment
from tests.synthesis.thinking_model import ASKED, NUMBERS, Server, reasoning, served

TRACES, PAIRS = 200, 100  # prompts of each stage
SMALL = [
    "model.architecture.hidden_size=32", "model.architecture.intermediate_size=64",
    "model.architecture.num_attention_heads=4", "stages.init.vocab_size=400",
    "stages.sft.max_seq_len=256", "stages.sft.max_steps=4", "stages.sft.global_batch_size=2",
    "stages.sft.micro_batch_size=1", "stages.apo.max_seq_len=256", "stages.apo.max_steps=1",
    "stages.apo.global_batch_size=4", "stages.apo.pack_tokens=512",
]  # fmt: skip


def write_problems(file: Path, number: int) -> None:
    """Questions that the thinking models were trained on, in GSM8K's columns."""
    asked = [(form.format(n), n) for n in NUMBERS for form in ASKED][:number]
    lines = [json.dumps({"question": q, "answer": f"{reasoning(n)}\n#### {n}"}) + "\n" for q, n in asked]
    file.write_text("".join(lines))


class Project:
    """The pipeline in a folder, with the strong model and the weak one behind servers."""

    def __init__(self, folder: Path, strong: Server, weak: Server):
        write_problems(folder / "problems.jsonl", TRACES + PAIRS)
        gsm8k = "sources.gsm8k"
        self.words = [
            "pipeline=teachers", f"run_dir={folder / 'runs'}", *SMALL,
            f"data.prompts.{gsm8k}.path={folder / 'problems.jsonl'}", f"data.prompts.{gsm8k}.max_rows={TRACES}",
            f"data.pair_prompts.{gsm8k}.max_rows={PAIRS}",
        ]  # fmt: skip
        for key, server in (("traces.teacher", strong), ("pairs.chosen", strong), ("pairs.rejected", weak)):
            asked = {"model": server.model, "url": server.url, "server": "transformers", "max_new_tokens": 64}
            self.words += [f"stages.{key}.{name}={value}" for name, value in (asked | {"concurrency": 2}).items()]
        self.stages = Lineage(recipe.load(self.words)).stages

    def start(self, stage: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "smolpost.cli", "run", *self.words, f"stage={stage}"]
        return subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True)

    def run(self, stage: str) -> None:
        done = call([sys.executable, "-m", "smolpost.cli", "run", *self.words, f"stage={stage}"])
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    def replies(self, role: str) -> list[dict]:
        """The records that lie on the disk now, without one that is being written."""
        files = sorted((self.stages["traces"].folder.parent / "replies").glob(f"{role}-*/replies/*[0-9].jsonl"))
        lines = [line for file in files for line in file.read_bytes().splitlines(keepends=True)]
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def wait_for(self, role: str, number: int, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 120
        while len(self.replies(role)) < number:
            assert process.poll() is None and time.monotonic() < deadline, process.poll()
            time.sleep(0.02)

    def rows(self, stage: str) -> list[dict]:
        return pq.read_table(self.stages[stage].folder / "rows.parquet").to_pylist()


def ids(found: list[dict]) -> Counter:
    return Counter(row["id"] for row in found)


def test_killed_servers_and_clients_lose_nothing_and_make_nothing_twice(thinking_models, tmp_path):
    with served(thinking_models[0]) as strong, served(thinking_models[1]) as weak:
        project = Project(tmp_path, strong, weak)
        run = project.start("traces")  # kill -9 of the client and all that it started
        project.wait_for("traces-teacher", 20, run)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        before = project.replies("traces-teacher")
        assert 20 <= len(before) < TRACES

        run = project.start("traces")  # kill -9 of the server: the client waits until it is back
        project.wait_for("traces-teacher", len(before) + 20, run)
        strong.kill()
        time.sleep(1)
        assert run.poll() is None
        strong.start()
        assert run.wait(timeout=120) == 0
        after = project.replies("traces-teacher")
        assert len(after) == TRACES and set(ids(after).values()) == {1}
        assert [line for line in after if line["id"] in ids(before)] == before  # none of them was asked again
        assert set(ids(project.rows("traces")).values()) == {1}

        project.run("apo-42")
        made = {name: project.rows(name) for name in ("traces", "pairs")}
        for name, number in (("traces", TRACES), ("pairs", PAIRS)):
            report = json.loads((project.stages[name].folder / "manifest.json").read_text())["report"]
            assert report["prompts"] == number
            assert report["accepted"] + sum(report["filtered"].values()) + report["failed"] == number
            assert report["accepted"] == len(made[name])
        assert len(made["traces"]) > 0.9 * TRACES and 0.2 * PAIRS < len(made["pairs"]) < 0.9 * PAIRS
        for row in made["traces"]:
            assert row["messages"][-1]["content"].startswith("<think>\nI have to repeat ")
        for row in made["pairs"]:
            assert row["chosen"][:-1] == row["rejected"][:-1] and row["chosen"][-1] != row["rejected"][-1]
        assert (project.stages["apo-42"].folder / "model.safetensors").is_file()

        requests = len(project.replies("pairs-chosen"))
        project.run("soup")
        assert len(project.replies("pairs-chosen")) == requests == PAIRS


def test_both_data_pipelines_ask_different_prompts_for_traces_and_pairs():
    found = recipe.load(["pipeline=teachers"]).recipe
    first, second = (found.data[name].sources["gsm8k"] for name in ("prompts", "pair_prompts"))
    assert (first.path, first.first_row, first.max_rows) == ("openai/gsm8k", 0, second.first_row)
    other = recipe.load(
        ["pipeline=teachers", "data.prompts.sources.gsm8k.path=x", "stages.traces.teacher.url=http://h/v1"]
    )
    assert other.recipe.data["pair_prompts"].sources["gsm8k"].path == "x"
    assert other.recipe.stages["pairs"].chosen.url == "http://h/v1"
    published = recipe.load(["pipeline=smollm3_data"]).recipe
    teachers = {name: stage.teachers() for name, stage in published.stages.items()}
    assert {role: t.model for role, t in teachers["pairs"].items()} == {
        "chosen": "Qwen/Qwen3-32B", "rejected": "Qwen/Qwen3-0.6B",
    }  # fmt: skip
    assert teachers["flips"]["teacher"].thinking is None and teachers["traces"]["teacher"].thinking is True
