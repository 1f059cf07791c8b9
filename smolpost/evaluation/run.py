"""Tasks on one model: measured in batches, with every sample kept; a killed run continues where it was."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from smolpost.errors import UserError
from smolpost.evaluation.results import SAMPLES, SCORES, read
from smolpost.evaluation.scores import aggregate
from smolpost.evaluation.task import Item, Measurement, Sample
from smolpost.files import write_json
from smolpost.inference.engine import Engine
from smolpost.progress import Progress


def run_task(
    name: str,
    task: Measurement,
    engine: Engine,
    folder: Path,
    *,
    batch_tokens: int,
    seed: int,
    items: list[Item] | None = None,
    label: str | None = None,
) -> dict[str, Any]:
    """Measure a task. A finished task is read from its folder; an interrupted one continues with the next batch.

    Args:
        name: For messages.
        task: What is measured.
        folder: For this task, this model and all settings; its name has to stand for them.
        batch_tokens: Most tokens of a batch: prompts, padding and longest replies. A larger item gets its own batch.
        seed: Of the bootstrap.
        items: What `task.items` gives for the engine's tokenizer, where the caller has it; None: it is asked.
        label: For the progress bar; None: the name.
    Returns:
        "kind", "scores" (metric -> value, n, low, high), "notes" (what the task counted beside its metrics),
        "num_items", "seconds" (of measuring, all runs together).
    Raises:
        UserError: A setting or a row cannot be used, or the task has nothing to measure.
    """
    finished = read(folder)
    if finished:
        return finished
    if items is None:
        items = task.items(engine.tokenizer)
    if not items:
        raise UserError(f"evaluation.tasks.{name} has nothing to measure: no row of its data can be asked")
    samples, seconds = _measured(task, engine, items, folder, batch_tokens, label or name)
    result = {
        "kind": task.config.kind,
        "scores": aggregate((samples[item.id] for item in items), seed),
        "notes": task.notes,
        "num_items": len(items),
        "seconds": round(seconds, 2),
    }
    write_json(folder / SCORES, result)
    return result


def _measured(
    task: Measurement, engine: Engine, items: list[Item], folder: Path, batch_tokens: int, label: str
) -> tuple[dict[str, Sample], float]:
    """Item's id -> its sample, and the seconds of measuring; batches that the folder has already are read."""
    folder.mkdir(parents=True, exist_ok=True)
    batches = batched(items, batch_tokens)
    kept, seconds = _kept(folder / SAMPLES, batches)
    samples = {sample.id: sample for sample in kept}
    with (
        open(folder / SAMPLES, "a", encoding="utf-8") as file,
        Progress(label, len(items), "item", done=len(samples)) as progress,
    ):
        for batch in batches:
            if batch[0].id in samples:
                continue
            began = time.perf_counter()
            measured = task.measure(engine, batch)
            spent = time.perf_counter() - began
            seconds += spent
            for item, sample in zip(batch, measured, strict=True):
                line = asdict(sample) | {"record": _record(item, sample, engine.tokenizer), "batch_seconds": spent}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            samples |= {sample.id: sample for sample in measured}
            progress.update(len(batch))
    return samples, seconds


def batched(items: list[Item], batch_tokens: int) -> list[list[Item]]:
    """Items of similar length together, the longest first, so that a batch that needs too much memory fails at once.

    Returns:
        Batches of items with the same number of replies. Their padded size stays within `batch_tokens`, unless a
        single item is larger. The same items give the same batches, so a continued run makes the same ones.
    """
    batches: list[list[Item]] = []
    longest = 0
    for item in sorted(items, key=lambda i: (-i.num_samples, -i.num_tokens, i.id)):
        replies = batches[-1][0].num_samples if batches else None
        longest = max(longest, item.num_tokens)
        if replies != item.num_samples or longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = item.num_tokens
        batches[-1].append(item)
    return batches


def _record(item: Item, sample: Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The sample's record and, where replies were asked for, the prompt as the model was given it."""
    if not item.max_new_tokens:
        return sample.record
    prompt = tokenizer.decode(item.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return {"prompt": prompt, **sample.record}


def _kept(path: Path, batches: list[list[Item]]) -> tuple[list[Sample], float]:
    """Samples of the complete batches of an interrupted run, and their seconds; the file is cut back to them.

    Records stay in the file: they hold the prompts, which may be long.
    """
    if not path.is_file():
        return [], 0.0
    kept, seconds, size = [], 0.0, 0
    with open(path, "rb") as file:
        for batch in batches:
            lines = [file.readline() for _ in batch]
            if not lines[-1].endswith(b"\n"):
                break
            read = [json.loads(line) for line in lines]
            seconds += read[0]["batch_seconds"]
            kept += [Sample(e["id"], e["metrics"], e["weights"], e["cluster"]) for e in read]
            size += sum(map(len, lines))
    os.truncate(path, size)
    return kept, seconds
