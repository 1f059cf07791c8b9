"""Carry out a plan: skip finished stages, continue interrupted ones, and end in one table."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.rule import Rule

from smolpost import disks, schema, signals, stage_log
from smolpost.errors import UserError
from smolpost.evaluation import results
from smolpost.evaluation.task import Context, EvaluationTask
from smolpost.files import MANIFEST, write_json
from smolpost.pipeline import estimate, manifest, processes, record
from smolpost.pipeline.code import made_by_others
from smolpost.pipeline.lineage import Lineage, Located
from smolpost.pipeline.measurable import check_measurable
from smolpost.pipeline.plan import select
from smolpost.progress import LATER, duration, plural
from smolpost.recipe import Request
from smolpost.screen import command_line
from smolpost.training import trackers


def status(stage: Located) -> tuple[str, str]:
    """What `run` will do with the stage, and why: ("done" | "evaluate" | "resume" | "run", reason).

    The reason of "done" names code and library versions that have changed since, which redo nothing.
    """
    if stage.finished():
        if stage.evaluated():
            others = made_by_others(manifest.read(stage.folder), type(stage.config))
            return "done", f"made by {', '.join(others)}" if others else ""
        unmeasured = [name for name, folder in stage.evaluation.items() if not results.read(folder)]
        return "evaluate", f"not measured with these settings yet: {', '.join(unmeasured)}"
    if stage.folder.is_dir():
        steps = sorted(int(c.name.removeprefix("checkpoint-")) for c in stage.folder.glob("checkpoint-*"))
        return "resume", f"at step {steps[-1]}" if steps else "from its beginning"
    if any(replies.folder.is_dir() for replies in stage.replies.values()):
        return "resume", "with the replies that are there"
    return "run", _changes(stage)


def _changes(stage: Located) -> str:
    """How the stage differs from the newest finished stage of the same name."""
    earlier = [found for found in estimate.finished_before(stage) if found["stage"] == stage.name]
    if not earlier:
        return "new"
    last, now = earlier[-1], estimate.as_stored(stage)
    changed = _differences(last["config"], now)
    changed += [f"{name} is another" for name, key in stage.parent_keys.items() if last["parents"].get(name) != key]
    return f"changed: {', '.join(changed) or 'data, or the version of a step'} ({stage.name}-{last['key']} is kept)"


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ, each with its old and its new value; of nested ones only the parts that do."""
    found = []
    for name in now | before:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new and (isinstance(old, dict) or isinstance(new, dict)):
            found.append(f"{prefix}{name} is {'new' if old is None else 'gone'}")
        elif old != new:
            found.append(f"{prefix}{name} {old} -> {new}")
    return found


def run(request: Request, console: Console) -> int:
    """Run every stage that `stage=` means, with what it needs first; the exit code.

    Raises:
        UserError: The recipe or its data cannot be used.
    """
    lineage = Lineage(request, look_up=True)
    wanted = _with_parents(lineage, [p.name for p in select(lineage.stages.planned.values(), request.stage)])
    todo = [(stage, status(stage)[0]) for stage in map(lineage.stages.__getitem__, wanted)]
    todo = [(stage, word) for stage, word in todo if word != "done"]
    if todo:
        for stage, word in todo:
            if word != "evaluate":
                stage.config.check_installed(stage.entry)
        disks.check_writable(lineage.root, f"run_dir={request.recipe.run_dir}")
        processes.warm()
        if request.recipe.evaluation.tasks:
            _check_tasks(request.recipe.evaluation.tasks)
        record.write(lineage.root, request, map(lineage.stages.__getitem__, wanted))
    began = time.monotonic()
    waiting: list[str] = []  # models whose evaluation reads rows of a stage that is still to come
    for number, name in enumerate(wanted, 1):
        word, reason = status(lineage.stages[name])
        done, elapsed = set(wanted[: number - 1]), time.monotonic() - began
        left = estimate.seconds_left(todo, done, elapsed)
        about = f", about {duration(left)} left" if left is not None and word != "done" else ""
        heading(f"{number}/{len(wanted)} {name}: {word}{about}{f' ({reason})' if reason else ''}", console)
        stage = lineage.stages[name]
        commands = [(name, command) for command in stage.making] if word in ("run", "resume") else []
        if commands and stage.config.LAUNCHED:  # hours of work
            check_measurable(lineage, stage)
        if stage.measuring and word != "done":
            waiting.append(name)
        made = {n for n in wanted if n == name or lineage.stages[n].finished()}
        ready = [model for model in waiting if lineage.measured_on(model) <= made]
        waiting = [model for model in waiting if model not in ready]
        commands += [(model, lineage.stages[model].measuring) for model in ready]
        later = estimate.seconds_after(stage, todo, done, elapsed) if commands else None
        if code := _carry_out(lineage, stage, commands, later, console):
            return code
        _check_made(lineage.stages[name], [lineage.stages[model] for model in ready])
    return _conclude(lineage, wanted, time.monotonic() - began, console)


def _carry_out(
    lineage: Lineage, stage: Located, commands: list[tuple[str, tuple[str, ...]]], later: float | None, console: Console
) -> int:
    """Run the commands of a stage, and of models that can be measured with it; the run's exit code where one fails.

    Args:
        commands: Each with the name of its stage.
        later: Seconds that the run needs after these; None: not known.
    """
    if not commands:
        return 0
    with stage_log.held(lineage.log(stage.folder)):
        for owner, command in commands:
            began = stage_log.now()
            code = execute(command, console, {LATER: "" if later is None else f"{later:.0f}"})
            if code:
                return _stopped(lineage, lineage.stages[owner], command, code, began, console)
    return 0


def _check_tasks(tasks: dict[str, EvaluationTask]) -> None:
    """Refuse settings of an evaluation before hours of training, not after them."""
    for name, task in tasks.items():
        task.build(name, Context(schema.RELEASE_DAY, 0, lambda mixture: []))


def _check_made(stage: Located, measured: list[Located]) -> None:
    """Refuse to go on if the commands succeeded but their results have other keys than this run expects."""
    missing = [s for s in (stage, *measured) if not s.finished()] + [s for s in measured if not s.evaluated()]
    if missing:
        raise UserError(
            f"stage {missing[0].name}: its commands ended well, but {missing[0].folder} is not finished: code, "
            "recipe or data changed while this ran; the same command goes on with what is there now"
        )


def _with_parents(lineage: Lineage, names: list[str]) -> list[str]:
    wanted = set(names)
    for name in names:
        wanted.update(lineage.measured_on(name))
    for name in reversed([*lineage.stages]):  # children come after their parents
        if name in wanted:
            wanted.update(lineage.stages.planned[name].parents)
    return [name for name in lineage.stages if name in wanted]


def execute(command: tuple[str, ...], console: Console, variables: dict[str, str]) -> int:
    """Run one command of a plan in the foreground; its exit code, negative for a signal that killed it.

    A signal for this process goes on to the command, which is waited for, so nothing runs on unseen. The exit code is
    then the signal's, whatever the command made of it.

    Args:
        variables: For the command's environment.
    """
    console.print(f"$ {command_line(command)}", soft_wrap=True, style="dim")
    with signals.PassedOn() as asked:
        code = processes.start(command, variables).wait()
    return signals.exit_code(asked.signum) if asked.signum else code


def _stopped(
    lineage: Lineage, stage: Located, command: tuple[str, ...], code: int, began: str, console: Console
) -> int:
    if code == 2:  # the command has said in one line what is wrong
        return 2
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    log = lineage.log(stage.folder)
    if stage_log.state(log).get("began", "") >= began:  # of this command, which may have died without a word
        said = {} if signals.is_stop(code) else {"said": how} | stage_log.state(log)
        stage_log.note(log, **said | {"ended": stage_log.now(), "exit_code": code})
    if signals.is_stop(code):
        word, reason = status(stage)
        at = f" {reason}" if word == "resume" and reason.startswith("at step") else ""
        print(signals.stopped_line(code, f" in stage {stage.name}{at}"), file=sys.stderr)
        return code
    where = f"stage {stage.name}: `{' '.join(command[:2])}` {how}"
    console.print(f"{where}; the same command continues here", soft_wrap=True)
    return 1


def _conclude(lineage: Lineage, names: list[str], seconds: float, console: Console) -> int:
    from smolpost.report.score_tables import results_table

    file = lineage.root / "results.json"
    before = _earlier_results(file)
    finished = [stage for stage in _with_folders(lineage, names) if stage.finished()]
    stages = {stage.name: _result(stage, before.get(stage.name, {})) for stage in finished}
    models = [str(stage.folder) for stage in finished if stage.config.MAKES_MODEL]
    final = models[-1] if models else None
    if disks.is_writable(lineage.root):  # what is finished can be read on a disk that is read-only
        write_json(file, {"pipeline": lineage.recipe.pipeline, "final_model": final, "stages": stages})
    evaluations = {name: stages[name]["evaluation"] for name in names if lineage.stages[name].evaluation}
    if evaluations:
        console.print(results_table(evaluations))
        console.print(f"n and 95% intervals: {file}, and `smolpost eval` of a stage shows them", soft_wrap=True)
    for line in _pictures(lineage, names):
        console.print(line, soft_wrap=True)
    parts = [f"{len(names)} {plural('stage', len(names))} in {duration(seconds)}", f"results: {file}"]
    console.print("; ".join([*parts, f"final model: {final}"] if final else parts), soft_wrap=True)
    return 0


def _with_folders(lineage: Lineage, names: list[str]) -> Iterator[Located]:
    """The named stages, and those that earlier runs have left a folder of, in their order."""
    for name in lineage.stages:
        if name in names:
            yield lineage.stages[name]
        elif any(lineage.root.glob(f"{name}-*/{MANIFEST}")):
            with contextlib.suppress(UserError):  # its data is gone, so no folder is known to be its own
                yield lineage.stages[name]


def _earlier_results(file: Path) -> dict[str, dict]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["stages"])
    except (OSError, ValueError, LookupError, TypeError):  # none, or not ours
        return {}


def _result(stage: Located, before: dict) -> dict:
    """The entry of a finished stage in the pipeline's results.

    Args:
        before: What they said; its evaluation stays where this run measures nothing of the same model.
    """
    found = manifest.read(stage.folder)
    result = {"kind": found["kind"], "folder": str(stage.folder), "key": stage.key, "seconds": found["seconds"]}
    measured = {task: results.read(folder) for task, folder in stage.evaluation.items()}
    if stage.evaluation and all(measured.values()):
        result["evaluation"] = measured
    return (before if before.get("key") == stage.key else {}) | result


def _pictures(lineage: Lineage, names: list[str]) -> list[str]:
    """Lines that name the plots of these stages and the command that shows their training curves, if they have any."""
    folders = [lineage.stages[name].folder for name in names]
    plots = [str(file) for folder in folders for file in sorted(folder.glob("*.png"))]
    measured = lineage.root / "evaluations"
    maps = {file.name for folder in folders for file in (measured / folder.name).glob("*.png")}
    plots += [f"{measured}/*/{name}" for name in sorted(maps)]
    lines = [f"plots: {', '.join(plots)}"] if plots else []
    return lines + trackers.places(lineage.root, folders)


def heading(text: str, console: Console) -> None:
    """A rule across the screen that begins with the text; the text alone if it is too long for that."""
    console.print(Rule(text, align="left") if cell_len(text) + 4 <= console.width else text, soft_wrap=True)


def describe(request: Request, console: Console) -> None:
    """Print the stages in order: what will be done and why, their settings and their exact commands.

    Raises:
        UserError: The recipe or its data cannot be used.
    """
    lineage = Lineage(request)
    plans = select(lineage.stages.planned.values(), request.stage)
    console.print(f"pipeline {lineage.recipe.pipeline}: {len(plans)} stages under {lineage.root}", soft_wrap=True)
    if lineage.recipe.note:
        console.print(f"note: {lineage.recipe.note}", soft_wrap=True)
    for line in request.replaced:
        console.print(line, soft_wrap=True)
    for name in lineage.hub_names():
        console.print(f"on the Hub: {name}", soft_wrap=True)
    for number, stage in enumerate((lineage.stages[plan.name] for plan in plans), 1):
        word, reason = status(stage)
        heading(f"{number}. {stage.name} ({stage.config.kind}): {word}{f', {reason}' if reason else ''}", console)
        for line in _settings(stage, lineage.recipe):
            console.print(f"  {line}", soft_wrap=True)
        for command in stage.commands:
            console.print(f"  $ {command_line(command)}", soft_wrap=True, style="bold")


def _settings(stage: Located, recipe: schema.Recipe) -> list[str]:
    lines = [f"folder: {stage.folder}"]
    if stage.inputs:
        weighted = stage.base and len(stage.inputs) > 1
        inputs = [f"{weight:g} x {name}" if weighted else name for name, (_, weight) in stage.inputs.items()]
        lines.append(
            f"from: {', '.join(inputs)}" + (f" ({recipe.model.checkpoint})" if "checkpoint" in stage.inputs else "")
        )
    for name, mixture in stage.data.items():
        rows = ", ".join(f"{key} x {source.weight:g}" for key, source in mixture.sources.items())
        lines.append(f"data {name}: {rows}")
    shown = dict(stage.shown)
    for key in ("kind", "init_from", "data", "seeds", "files", "inputs"):
        shown.pop(key, None)
    if stage.seed is not None:
        shown = {"seed": stage.seed} | shown
    if "lora" in shown and not shown["lora"]["r"]:
        del shown["lora"]
    if shown.get("engine") == "smolpost":
        del shown["trl"]  # read by the other engine alone
    for key in [key for key in shown if dataclasses.is_dataclass(getattr(stage.config, key, None))]:
        usual = dataclasses.asdict(type(getattr(stage.config, key))())
        shown |= {f"{key}.{name}": value for name, value in shown.pop(key).items() if value != usual[name]}
    lines.append("settings: " + " ".join(f"{key}={value}" for key, value in shown.items() if value is not None))
    return lines + stage.config.notes(recipe) + stage.config.reply_notes(stage.replies)
