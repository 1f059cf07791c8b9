"""lighteval 0.13 in an environment of its own: hydra-core and it want different versions of antlr.

One process per task and mode. It sees the checkpoint through a new folder of links, and all that it writes, its cache
of generations among it, lies in a folder that is gone afterwards.
"""

import json
import math
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import pyarrow.parquet as pq
import yaml

from smolpost.chat.reasoning import ends_thinking
from smolpost.errors import UserError
from smolpost.evaluation.harness.checkpoint_view import write_view
from smolpost.evaluation.harness.store import (
    finished,
    folder_of,
    joined,
    modes_of,
    score,
    settings_key,
    skipped,
    summary,
    unit_key,
    with_samples,
    write_unit,
)
from smolpost.evaluation.task import MODES
from smolpost.files import building
from smolpost.schema import Harness

SUPPORTED = "0.13"
# The pins: lighteval's task files use an argument that huggingface_hub 2 dropped, its logger hashes text, which
# xxhash 4 refuses, and the vLLM that it asks for was made for transformers 4.
INSTALL = {
    "vllm": '"lighteval[vllm]==0.13.*" "transformers<5" "xxhash<4" langdetect',
    "accelerate": '"lighteval==0.13.*" "huggingface_hub<2" "xxhash<4" langdetect',
}


def version(harness: Harness) -> str:
    """Of the lighteval in the environment.

    Raises:
        UserError: There is none, or one whose command line is not known here.
    """
    folder = harness.environment
    quoted = shlex.quote(folder or "FOLDER")
    make = f"`python -m venv {quoted} && {quoted}/bin/pip install {INSTALL[harness.backend]}`"
    if folder is None:
        raise UserError(f"harness.environment names no folder; make lighteval's environment with {make}")
    found = sorted(Path(folder).glob("lib/python*/site-packages/lighteval-*.dist-info"))
    if not found or not _program(harness).is_file():
        raise UserError(f"harness.environment={folder} holds no lighteval; make it with {make}")
    installed = found[0].name.removeprefix("lighteval-").removesuffix(".dist-info")
    if not installed.startswith(f"{SUPPORTED}."):
        raise UserError(
            f"harness.environment={folder} holds lighteval {installed}, not {SUPPORTED}; make it with {make}"
        )
    return installed


def run(harness: Harness, checkpoint: Path, out: Path, log: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """`run.run_harness` by lighteval; a set of tasks (mixeval_hard) is one task."""
    _check(harness, checkpoint)
    key = unit_key(settings_key(harness, version(harness)), checkpoint)
    results = {}
    for name in dict.fromkeys(harness.tasks):
        units = {}
        for mode in modes_of(harness):
            folder = folder_of(out, name, mode)
            units[mode] = finished(folder, key)
            if units[mode] is None:
                with building(folder) as part:
                    units[mode], samples = _unit(harness, checkpoint, name, mode, folder)
                    write_unit(part, units[mode] | {"key": key}, samples)
                log(summary(name, mode, units[mode]))
        results[name] = joined("lighteval", name, units, harness.headline.get(name))
    return results


def _check(harness: Harness, checkpoint: Path) -> None:
    custom = harness.custom_tasks
    if custom is not None and custom.endswith(".py") and not Path(custom).is_file():
        raise UserError(
            f"harness.custom_tasks={custom} is not a file; lighteval reads a Python file or an installed module"
        )
    if harness.max_new_tokens is None:
        return
    if harness.backend == "accelerate":
        raise UserError(
            f"harness.max_new_tokens={harness.max_new_tokens}: lighteval's accelerate backend cuts prompts to it, "
            "not replies; set it to null, and a reply's length in a task file (generation_size)"
        )
    positions = json.loads((checkpoint / "config.json").read_text())["max_position_embeddings"]
    if harness.max_new_tokens >= positions:
        raise UserError(
            f"harness.max_new_tokens={harness.max_new_tokens} leaves no room for a prompt in the checkpoint's "
            f"{positions} positions; lower it"
        )


def _unit(
    harness: Harness, checkpoint: Path, name: str, mode: str, folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a task in a mode: its result, and its samples for a reader."""
    if mode == "think" and name in harness.likelihood_tasks:
        return skipped("harness.likelihood_tasks says that it is scored by likelihood, without a reply to think in")
    began = time.perf_counter()
    log_file = folder.with_name(f"{mode}.log")
    with tempfile.TemporaryDirectory(prefix=f".{mode}.", dir=folder.parent) as scratch:
        work = Path(scratch)
        write_view(checkpoint, work / "checkpoint", today=harness.today, template=harness.apply_chat_template)
        (work / "model.yaml").write_text(yaml.safe_dump({"model_parameters": model_parameters(harness, mode, work)}))
        with open(log_file, "wb") as log:
            done = subprocess.run(
                command(harness, name, work), stdout=log, stderr=subprocess.STDOUT, env=_environment(work)
            )
        if done.returncode:
            raise UserError(
                f"lighteval failed on {name} in {mode} mode: {_last_line(log_file)} ({log_file} has it all)"
            )
        results, details = read_output(work / "output")
    scores, number = scores_of(results, details)
    samples = sample_records(details, thinks=mode in MODES)
    notes = {"harness": f"lighteval {version(harness)}", "backend": harness.backend}
    scores = with_samples(scores, samples)
    unit = {"scores": scores, "num_items": number, "seconds": round(time.perf_counter() - began, 2), "notes": notes}
    return unit, samples


def command(harness: Harness, name: str, work: Path) -> list[str]:
    """lighteval's command line for a task.

    Args:
        work: Folder with `model.yaml`, where `output` comes to lie.
    """
    words = [str(_program(harness)), harness.backend, str(work / "model.yaml"), f"{name}|{harness.num_fewshot or 0}"]
    words += ["--output-dir", str(work / "output"), "--save-details"]
    if harness.custom_tasks is not None:
        words += ["--custom-tasks", harness.custom_tasks]
    if harness.limit is not None:
        words += ["--max-samples", str(harness.limit)]
    return words


def model_parameters(harness: Harness, mode: str, work: Path) -> dict[str, Any]:
    """What `model.yaml` says; the team that made SmolLM3 chose the mode by the system prompt."""
    settings = {"temperature": harness.temperature or 0.0, "top_p": harness.top_p}
    if harness.backend == "vllm":
        settings |= {"max_new_tokens": harness.max_new_tokens, "seed": harness.seed}
        own = {"tensor_parallel_size": harness.tensor_parallel_size, "seed": harness.seed}
    else:
        own = {"batch_size": harness.batch_size, "dtype": "auto"}
    return own | {
        "model_name": str(work / "checkpoint"),
        "cache_dir": str(work / "cache"),
        "override_chat_template": harness.apply_chat_template,
        "system_prompt": f"/{mode}" if mode in MODES else None,
        "generation_parameters": {key: value for key, value in settings.items() if value is not None},
    }


def read_output(folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, Any]]]]:
    """What one run of lighteval wrote.

    Returns:
        Its `results` by task, and task -> rows of its details.
    Raises:
        UserError: It wrote no results.
    """
    files = sorted(folder.rglob("results_*.json"))
    if not files:
        raise UserError(f"lighteval ended well but wrote no results; it is not the {SUPPORTED} known here")
    results = json.loads(files[-1].read_text(encoding="utf-8"))["results"]
    details = {}
    for file in sorted(folder.rglob("details_*.parquet")):
        rows = pq.ParquetFile(file).read().to_pylist()
        details[rows[0]["doc"]["task_name"] if rows else file.stem] = rows
    return {name: metrics for name, metrics in results.items() if name != "all"}, details


def scores_of(
    results: dict[str, dict[str, float]], details: dict[str, list[dict[str, Any]]]
) -> tuple[dict[str, dict[str, Any]], int]:
    """Metrics of a task, and the number of rows behind them.

    A set's own metrics are lighteval's plain means over its members; its members' are called MEMBER/METRIC. lighteval
    gives a set the mean of the members' standard errors; that of the mean of independent members is used instead.
    """
    members = {task: metrics for task, metrics in results.items() if ":_average|" not in task}
    sizes = {task: len(details.get(task, [])) for task in members}
    total = sum(sizes.values())
    if len(members) == 1:
        return _scores(*members.values(), total, ""), total
    scores: dict[str, dict[str, Any]] = {}
    for metrics in (results[task] for task in results if task not in members):
        for key, value in metrics.items():
            if not key.endswith("_stderr") and isinstance(value, int | float):
                errors = [member.get(f"{key}_stderr") for member in members.values()]
                known = None not in errors
                scores[key] = score(value, total, math.hypot(*errors) / len(errors) if known else None)
    for task, metrics in members.items():
        scores |= _scores(metrics, sizes[task], f"{task.rpartition('|')[0].partition(':')[2]}/")
    return scores, total


def _scores(metrics: dict[str, float], n: int, prefix: str) -> dict[str, dict[str, Any]]:
    return {
        prefix + key: score(value, n, metrics.get(f"{key}_stderr"))
        for key, value in metrics.items()
        if not key.endswith("_stderr") and isinstance(value, int | float)
    }


def sample_records(details: dict[str, list[dict[str, Any]]], *, thinks: bool) -> list[dict[str, Any]]:
    """lighteval's details in the form of our samples.

    lighteval takes the thoughts of an unclosed block for an answer, so how many there are is a metric of its own.
    """
    samples = []
    for task, rows in details.items():
        for row in rows:
            reply = row["model_response"]
            unclosed = {"unclosed": mean(map(ends_thinking, reply["text"]))} if thinks and reply["text"] else {}
            record = {
                "prompt": reply["input"] or row["doc"]["query"],
                "replies": reply["text"],
                "parsed": reply["text_post_processed"],
                "expected": row["doc"]["choices"],
            }
            samples.append({"id": f"{task}/{row['doc']['id']}", "metrics": row["metric"] | unclosed, "record": record})
    return samples


def _program(harness: Harness) -> Path:
    return Path(harness.environment) / "bin" / "lighteval"


def _environment(work: Path) -> dict[str, str]:
    """Ours, less what would lead its Python to our packages.

    Data sets are rebuilt from the Hub's files: lighteval reads its cache of generations back through `datasets`, whose
    own cache goes by path and time, not by content.
    """
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return kept | {"HF_DATASETS_CACHE": str(work / "datasets"), "PYTHONNOUSERSITE": "1"}


def _last_line(file: Path) -> str:
    lines = [line.strip("│╭╰ ") for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line.strip()), "no output")[:300]
