"""A pipeline of toy sums that trains in a second, launched as users launch it: real processes, real ranks."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from smolpost import recipe
from smolpost.files import hashes, write_json
from smolpost.pipeline import manifest
from smolpost.pipeline.lineage import Lineage

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ("-m", "smolpost.train")
SMALL = [
    "pipeline=gsm8k", "data=gsm8k_folder", "evaluation=none",
    "model.architecture.hidden_size=32", "model.architecture.intermediate_size=64",
    "model.architecture.num_attention_heads=4", "stages.init.vocab_size=400",
    "stages.sft.init_from=init", "stages.sft.max_seq_len=256", "stages.sft.max_steps=12",
    "stages.sft.global_batch_size=4", "stages.sft.micro_batch_size=1", "stages.sft.logging_steps=1",
    "stages.sft.save_steps=2",
    "stages.apo.init_from=init", "stages.apo.seeds=[1]", "stages.apo.max_steps=4", "stages.apo.global_batch_size=4",
    "stages.apo.pack_tokens=300", "stages.apo.logging_steps=1", "stages.apo.learning_rate=1e-3",
    "stages.apo.max_grad_norm=1.0",
]  # fmt: skip


def sum_rows(number: int, seed: int) -> list[dict]:
    """Questions with a right conversation and a wrong one, think and no-think in turn."""
    draw, rows = random.Random(seed), []
    for i in range(number):
        a, b, think = draw.randint(1, 50), draw.randint(1, 50), i % 2 == 0
        ask = {"role": "user", "content": f"What is {a}+{b}?"}
        replies = []
        for total in (a + b, a + b + draw.randint(1, 9)):
            block = f"<think>\n{a} and {b} make {total}.\n</think>\n" if think else ""
            replies.append({"role": "assistant", "content": f"{block}The answer is {total}."})
        right, wrong = ([ask, reply] for reply in replies)
        rows.append({"prompt": ask["content"], "chosen": right, "rejected": wrong, "think": think})
    return rows


class Small:
    """The toy pipeline in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.words = [*SMALL, f"data_root={folder / 'data'}", f"run_dir={folder / 'runs'}"]

    def write_data(self) -> None:
        (self.folder / "data").mkdir(parents=True)
        for seed, name in enumerate(("mid", "sft", "preference")):
            with open(self.folder / "data" / f"smoltalk2_{name}.jsonl", "w") as file:
                for row in sum_rows(120, seed):
                    kwargs = {"chat_template_kwargs": {"enable_thinking": row["think"]}, "source": name}
                    pair = {key: row[key] for key in ("prompt", "chosen", "rejected")}
                    file.write(
                        json.dumps((pair if name == "preference" else {"messages": row["chosen"]}) | kwargs) + "\n"
                    )

    def copy(self, folder: Path) -> "Small":
        """The same pipeline with the same start checkpoint elsewhere; the keys are the same."""
        shutil.copytree(self.folder / "runs", folder / "runs")
        twin = Small(folder)
        twin.words = [*SMALL, f"data_root={self.folder / 'data'}", f"run_dir={folder / 'runs'}"]
        return twin

    def folder_of(self, stage: str, *more: str) -> Path:
        return Lineage(recipe.load([*self.words, *more])).stages[stage].folder

    def smolpost(self, verb: str, *more: str, **kwargs) -> subprocess.CompletedProcess:
        return call([sys.executable, "-m", "smolpost.cli", verb, *self.words, *more], **kwargs)

    def launch(
        self, stage: str, config: str, processes: int, *more: str, program: tuple[str, ...] = PROGRAM, **variables: str
    ) -> subprocess.CompletedProcess:
        """
        Args:
            program: What accelerate starts.
            variables: Of the environment.
        """
        command = self.launch_command(stage, config, processes, *more, program=program)
        return call(command, env=environment() | variables)

    def launch_command(
        self, stage: str, config: str, processes: int, *more: str, program: tuple[str, ...] = PROGRAM
    ) -> list[str]:
        return [
            sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch",
            "--config_file", f"recipes/accelerate/{config}.yaml", "--num_processes", str(processes),
            "--main_process_port", "0", *program, *self.words, *more, f"stage={stage}",
        ]  # fmt: skip

    def weights(self, stage: str, *more: str) -> dict:
        return load_file(self.folder_of(stage, *more) / "model.safetensors")

    def log(self, stage: str, *more: str) -> list[dict]:
        """What the trainer logged at each step."""
        report = manifest.read(self.folder_of(stage, *more))["report"]
        return [entry for entry in report["log"] if "loss" in entry]


def as_written(folder: Path) -> None:
    """Give a finished folder whose files were changed the hashes that they have now."""
    write_json(folder / "manifest.json", manifest.read(folder) | {"files": hashes(folder)})


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def call(command: list[str], **kwargs) -> subprocess.CompletedProcess:
    kwargs = {"timeout": 300, "cwd": ROOT, "env": environment(), "capture_output": True, "text": True} | kwargs
    return subprocess.run(command, **kwargs)
