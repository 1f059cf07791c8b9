"""lm-evaluation-harness in this process, with our model, template and replies; never with its caches."""

import difflib
import importlib.metadata
import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolpost.chat.clock import frozen
from smolpost.errors import UserError
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
from smolpost.files import building
from smolpost.model.loading import load_for_inference
from smolpost.schema import Harness

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = 'pip install -c constraints.txt "smolpost[eval]"'
CODE_SWITCH = "HF_ALLOW_CODE_EVAL"  # the environment's leave to run code that a model wrote, as `evaluate` reads it


def version(harness: Harness) -> str:
    """Of the installed lm_eval.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"harness=lm_eval needs lm-evaluation-harness; install it with `{INSTALL}`") from None


def run(harness: Harness, checkpoint: Path, out: Path, log: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """`run.run_harness` by lm-evaluation-harness; a group of tasks is one task, a tag stands for its tasks."""
    key = unit_key(settings_key(harness, version(harness)), checkpoint)
    tasks = Tasks(harness)
    runner = UnitRunner(harness, checkpoint, tasks)
    found = {
        (name, mode): finished(folder_of(out, name, mode), key) for name in tasks.names for mode in modes_of(harness)
    }
    # Every task is loaded before the first one is asked: a mistake in the last one shows at once, not after hours.
    reasons = {unit: tasks.why_not(*unit) for unit, result in found.items() if result is None}
    for (name, mode), reason in reasons.items():
        with building(folder_of(out, name, mode)) as part:
            unit, samples = skipped(reason) if reason else runner.unit(name, mode)
            write_unit(part, unit | {"key": key}, samples)
        found[name, mode] = unit
        log(summary(name, mode, unit))
    results = {}
    for name in tasks.names:
        units = {mode: found[name, mode] for mode in modes_of(harness)}
        results[name] = joined("lm_eval", name, units, harness.headline.get(name))
    return results


class Tasks:
    """The tasks that the settings name.

    Attributes:
        names: Without tags, in the order asked for.
    """

    def __init__(self, harness: Harness):
        """
        Raises:
            UserError: A task does not exist or cannot be used here.
        """
        from lm_eval import tasks

        folder = harness.custom_tasks
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"harness.custom_tasks={folder} is not a folder; lm_eval reads a folder of task YAML files")
        self.manager = tasks.TaskManager(include_path=folder, include_defaults=False)
        if not set(harness.tasks) <= set(self.manager.all_subtasks):  # reading lm_eval's own takes a while
            self.manager = tasks.TaskManager(include_path=folder)
        self.ruler = Path(tasks.__file__).parent / "ruler"
        self.modes = modes_of(harness)
        self.names = list(dict.fromkeys(name for task in harness.tasks for name in self._expanded(task)))
        unasked = sorted(set(harness.headline) - set(self.names))
        if unasked:
            raise UserError(f"harness.headline.{unasked[0]} is not among the tasks {', '.join(self.names)}")

    def _expanded(self, name: str) -> list[str]:
        entry = self.manager.task_index.get(name)
        if entry is None:
            close = difflib.get_close_matches(name, self.manager.all_tasks, 3)
            hint = f"; did you mean {', '.join(close)}?" if close else "; `lm_eval ls tasks` lists them"
            raise UserError(f"harness.tasks: lm_eval has no task {name}{hint}")
        if name in self.manager.all_tags:
            return [task for tagged in sorted(entry.tags) for task in self._expanded(tagged)]
        if entry.yaml_path is not None and entry.yaml_path.parent == self.ruler:
            raise UserError(
                f"harness.tasks: lm_eval's {name} is RULER, which fetches its texts at run time, misses the asked "
                "lengths and cannot think; use our own: a task of kind `ruler` under evaluation.tasks"
            )
        return [name]

    def why_not(self, name: str, mode: str) -> str | None:
        """Why this mode cannot be asked; None where it can.

        Raises:
            UserError: The task cannot be loaded or used, or no mode of the recipe fits it.
        """
        tasks = self._load(name)
        likelihood = [task for task, loaded in tasks.items() if loaded.OUTPUT_TYPE != "generate_until"]
        started = [task for task, loaded in tasks.items() if loaded.config.gen_prefix is not None]
        if mode != "think" or not (likelihood or started):
            return None
        if likelihood:
            reason = f"{likelihood[0]} is scored by likelihood, without a reply to think in"
        else:
            reason = f"{started[0]} begins the reply itself (gen_prefix), so nothing can be thought before"
        if self.modes == ["think"]:
            raise UserError(f"harness.modes=[think], but {reason}; add no_think")
        return reason

    def _load(self, name: str) -> dict[str, Any]:
        try:
            tasks = self.manager.load([name])["tasks"]
        except (OSError, ValueError, LookupError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"harness.tasks: lm_eval cannot load {name} ({type(error).__name__}: {reason}); "
                "its data set comes from the Hub unless it was fetched before"
            ) from None
        unsafe = [task for task, loaded in tasks.items() if getattr(loaded, "UNSAFE_CODE", False)]
        if unsafe and os.environ.get(CODE_SWITCH) != "1":
            raise UserError(
                f"harness.tasks: {unsafe[0]} runs code that the model wrote; set {CODE_SWITCH}=1 where that is safe"
            )
        if any("ifeval" in task for task in tasks):
            _require_sentence_splitter(name)
        return tasks


def _require_sentence_splitter(name: str) -> None:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise UserError(
            f"harness.tasks: {name} counts sentences with NLTK's punkt_tab, which is not here; fetch it where there is "
            "a network: `python -m nltk.downloader punkt_tab`, and set NLTK_DATA to its folder"
        ) from None


class UnitRunner:
    """Measures tasks on a checkpoint, which is loaded when the first of them needs it."""

    def __init__(self, harness: Harness, checkpoint: Path, tasks: Tasks):
        self.harness, self.checkpoint, self.manager = harness, checkpoint, tasks.manager

    @cached_property
    def model(self) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
        """The model and its tokenizer, whose template has the harness's date."""
        model, tokenizer = load_for_inference(self.checkpoint)
        if self.harness.apply_chat_template and not tokenizer.chat_template:
            raise UserError(f"{self.checkpoint} has no chat template; set harness.apply_chat_template=false")
        if self.harness.apply_chat_template:
            tokenizer.chat_template = frozen(tokenizer.get_chat_template(), self.harness.today)
        return model, tokenizer

    def unit(self, name: str, mode: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Ask a task in a mode: its result, and its samples for a reader."""
        import lm_eval

        from smolpost.evaluation.harness.lm_eval_model import HarnessModel, sample_records

        began = time.perf_counter()
        replying = HarnessModel(*self.model, self.harness, mode)
        results = lm_eval.simple_evaluate(
            replying,
            tasks=[name],
            task_manager=self.manager,
            num_fewshot=self.harness.num_fewshot,
            limit=self.harness.limit,
            gen_kwargs=generation_settings(self.harness),
            apply_chat_template=self.harness.apply_chat_template,
            fewshot_as_multiturn=self.harness.apply_chat_template,
            confirm_run_unsafe_code=os.environ.get(CODE_SWITCH) == "1",
            use_cache=None,
            cache_requests=False,
        )
        samples = sample_records(results["samples"], replying)
        unit = {
            "scores": with_samples(scores_of(results, name), samples),
            "num_items": sum(count["effective"] for count in results["n-samples"].values()),
            "seconds": round(time.perf_counter() - began, 2),
            "notes": {"harness": f"lm_eval {version(self.harness)}", "num_fewshot": results["n-shot"]},
        }
        return unit, samples


def generation_settings(harness: Harness) -> dict[str, Any] | None:
    """What the recipe sets of a task's `generation_kwargs`; the rest is the task's own."""
    settings: dict[str, Any] = {}
    if harness.max_new_tokens is not None:
        settings["max_gen_toks"] = harness.max_new_tokens
    if harness.temperature is not None:
        settings |= {"temperature": harness.temperature, "do_sample": harness.temperature > 0}
    if harness.top_p is not None:
        settings["top_p"] = harness.top_p
    return settings or None


def scores_of(results: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """The named task's metrics as METRIC or METRIC,FILTER, then those of a group's members as MEMBER/METRIC."""
    scores = {}
    rows = results["results"]
    for task in sorted(rows, key=lambda task: task != name):
        row = rows[task]
        number = row["sample_len"] if task in results["n-samples"] else None
        for column, value in row.items():
            metric, comma, kept = column.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            n = row["sample_count"][column] if number is None and "sample_count" in row else number
            label = metric if kept == "none" else column
            label = label if task == name else f"{task}/{label}"
            scores[label] = score(value, n, row.get(f"{metric}_stderr,{kept}"))
    return scores
