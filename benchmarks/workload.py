"""The rows, tokenizer and models both sides of the training benchmarks start from."""

import functools
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from datasets import Dataset, load_from_disk
from transformers import TrainerCallback

import smolpost.model  # noqa: F401  registers our SmolLM3 and its attention
from smolpost.chat.render import load_template, render
from smolpost.chat.tokenizer import build_tokenizer
from smolpost.data.prepare import prepare
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.schema import PACKED_ATTENTION, RELEASE_DAY, Mixture, Source
from smolpost.training.environment import Environment, detect
from smolpost.training.flops import row_flops
from smolpost.training.matmul_rate import matmul_tflops
from smolpost.training.settings import Training
from smolpost.training.train import trainable
from smolpost.training.trainer import Run

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMOLLM3_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
TEXT_TOKENS = 8000  # vocabulary the tokenizer is built with; a model's may be larger, as SmolLM3's is


def rows_of(file: Path, number: int | None = None) -> list[dict]:
    with open(file) as lines:
        return [json.loads(line) for line in lines][:number]


def prepared(stage, file: str, number: int | None, tokenizer, folder: Path):
    """The rows as `smolpost prepare` makes them, as a dataset, and the report."""
    (out := folder / "prepared").mkdir()
    mixture = Mixture(sources={"rows": Source(path=file, max_rows=number)}, shuffle=False)
    report = prepare(stage, mixture, tokenizer, lambda name: folder / name, out)
    return load_from_disk(str(out)), report


@functools.cache
def tokenizer_for(file: str, number: int | None):
    """A tokenizer made from the rows of a file."""
    template, texts = load_template("smollm3"), []
    for row in rows_of(Path(file), number):
        for key in ("messages", "chosen", "rejected"):
            if key in row:
                kwargs, tools = row.get("chat_template_kwargs"), row.get("tools")
                texts.append(render(template, row[key], template_kwargs=kwargs, tools=tools, today=RELEASE_DAY))
    return build_tokenizer(texts, kind="bpe", vocab_size=TEXT_TOKENS, template="smollm3")


def environment(case: dict) -> Environment:
    return detect("bf16" if case["device"] == "cuda" else "fp32")


class Side(NamedTuple):
    """One way to train a stage.

    Attributes:
        attention: Of the model. packed is what a pipeline sets; TRL's documentation asks for flash attention on a GPU.
        precompute: TRL scores its reference before training, as our engine does, and not beside it.
        liger: With Liger's kernels, TRL's documented option on a GPU.
        settings: Fields of the stage that replace what the benchmark sets.
    """

    engine: str
    attention: str = PACKED_ATTENTION
    precompute: bool = False
    liger: bool = False
    settings: Mapping[str, Any] = MappingProxyType({})


def sides_of(sides: dict[str, Side], device: str) -> dict[str, Side]:
    """Those that can run on the device as it is, TRL's with flash attention where that is installed."""
    from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

    on_gpu = device == "cuda"
    found = {name: side for name, side in sides.items() if not side.liger or (on_gpu and is_liger_kernel_available())}
    if not (on_gpu and is_flash_attn_2_available()):
        return found
    return {
        name: side._replace(attention="flash_attention_2")
        if (side.engine, side.attention) == ("trl", PACKED_ATTENTION)
        else side
        for name, side in found.items()
    }


class Trained(NamedTuple):
    """A stage that has been trained.

    Attributes:
        rows: Prepared.
        reference_seconds: What the engine needed before training, the first time and the second time.
    """

    trainer: Run
    rows: Dataset
    reference_seconds: list[float]


def train(
    stage: Training, case: dict, side: Side, folder: Path, clock: "Clock", *, checkpoints: bool = False
) -> Trained:
    """Train a stage on the case's rows as `smolpost run` does, by the engine that it names."""
    method, here = stage.method(), environment(case)
    tokenizer = tokenizer_for(case["file"], case["rows"])
    rows, _ = prepared(stage, case["file"], case["rows"], tokenizer, folder)
    method.check("bench", stage, rows, here)
    (start := folder / "start").mkdir()
    (start / "model.safetensors").touch()  # only names the reference in its cache; models are made in memory
    load_start = functools.partial(model_for, case, tokenizer, side.attention)
    config_for(case, tokenizer, side.attention).save_pretrained(start)
    spent = []
    for _ in range(2):  # the second time stands for a second seed
        began = time.perf_counter()
        reference, _ = method.reference(stage, rows, start, load_start, folder / "references", here)
        spent.append(time.perf_counter() - began)
    arguments = method.arguments(stage, 0, len(rows), folder / "out", here)
    if not checkpoints:
        arguments.set_save("no")
    arguments.use_liger_kernel = side.liger
    model = trainable("bench", stage, load_start, 0, here)
    trainer = method.trainer(stage, model, tokenizer, rows, reference, arguments, 0, here)
    trainer.add_callback(clock)
    trainer.train()
    return Trained(trainer, rows, spent)


def config_for(case: dict, tokenizer, attention: str) -> SmolLM3Config:
    config = SmolLM3Config(
        **case["model"], vocab_size=case["vocab"], max_position_embeddings=65536, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    config._attn_implementation = attention
    return config


def model_for(case: dict, tokenizer, attention: str) -> SmolLM3ForCausalLM:
    """The same weights each time, made on the device: a 3B takes a second there and a minute on a CPU."""
    torch.manual_seed(0)
    with torch.device(case["device"]):
        return SmolLM3ForCausalLM(config_for(case, tokenizer, attention))


class Clock(TrainerCallback):
    """Wall-clock and CPU seconds from the end of the warm-up to the end of training."""

    def __init__(self, warmup: int):
        self.warmup = warmup
        self.losses: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # another side may have run in this process

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step == self.warmup:
            self.began, self.cpu = time.perf_counter(), time.process_time()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds, self.cpu_seconds = time.perf_counter() - self.began, time.process_time() - self.cpu

    def measured(self, **more) -> dict:
        peak = {"peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9} if torch.cuda.is_available() else {}
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "loss_last": self.losses[-1], **more, **peak}


def needed(trainer: Run, rows: Dataset, case: dict) -> dict[str, float]:
    """Floating-point operations that training on the rows needs, and the device's rate in matrix products."""
    flops = row_flops(trainer.model, rows.flatten_indices()).sum()
    return {"model_flops": float(flops), "matmul_tflops": matmul_tflops(environment(case))}


def scratch() -> tempfile.TemporaryDirectory:
    os.environ.setdefault("TQDM_DISABLE", "1")
    return tempfile.TemporaryDirectory(prefix="smolpost-bench-")
