"""Walk a plan: skip what is finished, continue what was cut, and end in one table."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.rule import Rule

from smolpost import schema
from smolpost.atomic import write_json
from smolpost.evaluation import results
from smolpost.pipeline import manifest
from smolpost.pipeline.lineage import Lineage, Located
from smolpost.pipeline.measurable import check_measurable
from smolpost.pipeline.plan import select
from smolpost.recipe import Request
from smolpost.screen import command_line

PROGRAMS = {  # what the first word of a command stands for, whatever PATH holds
    "smolpost": [sys.executable, "-m", "smolpost.cli"],
    "python": [sys.executable],
    "accelerate": [sys.executable, "-m", "smolpost.launch"],
}

ENVIRONMENT = {  # unless the user has set them
    "PYTHONUNBUFFERED": "1",
    # Threads that wait for each other spin this long before they sleep. libgomp's own 300,000 turns make a miniature's
    # step several times slower as soon as anything else runs on the machine; sleeping at once costs half the speed.
    "GOMP_SPINCOUNT": "10000",
}


def status(stage: Located) -> tuple[str, str]:
    """What `run` will do with the stage, and why: ("done" | "evaluate" | "resume" | "run", reason)."""
    if stage.finished():
        if stage.evaluated():
            return "done", ""
        unmeasured = [name for name, folder in stage.evaluation.items() if not results.read(folder)]
        return "evaluate", f"not measured with these settings yet: {', '.join(unmeasured)}"
    if stage.folder.is_dir():
        steps = sorted(int(c.name.removeprefix("checkpoint-")) for c in stage.folder.glob("checkpoint-*"))
        return "resume", f"at step {steps[-1]}" if steps else "from its beginning"
    return "run", _changes(stage)


def _changes(stage: Located) -> str:
    """How the stage differs from its newest finished namesake."""
    earlier = []
    for folder in stage.folder.parent.glob(f"{stage.plan.name}-*"):
        found = manifest.read(folder) if folder.is_dir() else None
        if found and found.get("stage") == stage.plan.name:
            earlier.append(found)
    if not earlier:
        return "new"
    last = max(earlier, key=lambda m: m["finished"])
    now = json.loads(json.dumps(stage.shown))
    changed = [f"{k} {last['config'].get(k)} -> {v}" for k, v in now.items() if last["config"].get(k) != v]
    changed += [f"{name} is another" for name, key in stage.parent_keys.items() if last["parents"].get(name) != key]
    return f"changed: {', '.join(changed) or 'data or code'} ({stage.plan.name}-{last['key']} is kept)"


def run(request: Request, console: Console) -> int:
    """Run every stage that `stage=` means, with what it needs first; the exit code.

    Raises:
        UserError: The recipe or its data cannot be used.
    """
    lineage = Lineage(request)
    if request.recipe.evaluation.tasks:
        _check_tasks(request.recipe.evaluation.tasks)
    wanted = _with_parents(lineage, [p.name for p in select([s.plan for s in lineage.stages.values()], request.stage)])
    began = time.monotonic()
    waiting: list[str] = []  # models whose evaluation reads rows of a stage that is still to come
    for number, name in enumerate(wanted, 1):
        word, reason = status(lineage.stages[name])
        console.print(Rule(f"{number}/{len(wanted)} {name}: {word}{f' ({reason})' if reason else ''}", align="left"))
        plan = lineage.stages[name].plan
        commands = [(name, command) for command in plan.making] if word in ("run", "resume") else []
        if commands and isinstance(plan.config, schema.TrainStage):
            check_measurable(lineage, lineage.stages[name])
        if plan.measuring and word != "done":
            waiting.append(name)
        made = {n for n in lineage.stages if n == name or lineage.stages[n].finished()}
        ready = [model for model in waiting if lineage.measured_on(model) <= made]
        waiting = [model for model in waiting if model not in ready]
        commands += [(model, lineage.stages[model].plan.measuring) for model in ready]
        for owner, command in commands:
            code = execute(command, console)
            if code:
                return _stopped(owner, command, code, console)
    return _conclude(lineage, wanted, time.monotonic() - began, console)


def _check_tasks(tasks: dict[str, schema.EvaluationTask]) -> None:
    """Refuse settings of an evaluation before hours of training, not after them."""
    from smolpost.evaluation.task import Context
    from smolpost.evaluation.tasks import build

    for name, task in tasks.items():
        build(name, task, Context(schema.RELEASE_DAY, 0, lambda mixture: []))


def _with_parents(lineage: Lineage, names: list[str]) -> list[str]:
    wanted = set(names)
    for name in names:
        wanted.update(lineage.measured_on(name))
    for name in reversed(lineage.stages):  # children come after their parents
        if name in wanted:
            wanted.update(lineage.stages[name].plan.parents)
    return [name for name in lineage.stages if name in wanted]


def execute(command: tuple[str, ...], console: Console) -> int:
    """Run one command of a plan in the foreground; its exit code, negative for a signal.

    On ctrl-C the command gets the signal from the terminal, too; it is waited for, so nothing runs on unseen.
    """
    console.print(f"$ {command_line(command)}", soft_wrap=True, style="dim")
    process = subprocess.Popen([*PROGRAMS[command[0]], *command[1:]], env=ENVIRONMENT | os.environ)
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.terminate()
        raise


def _stopped(name: str, command: tuple[str, ...], code: int, console: Console) -> int:
    if code == 2:  # the command has said in one line what is wrong
        return 2
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    console.print(f"stage {name}: `{' '.join(command[:2])}` {how}; the same command continues here", soft_wrap=True)
    return 1


def _conclude(lineage: Lineage, names: list[str], seconds: float, console: Console) -> int:
    from smolpost.evaluation.table import results_table

    stages, evaluations = {}, {}
    for name in names:
        stage = lineage.stages[name]
        found = manifest.read(stage.folder)
        stages[name] = {
            "kind": found["kind"],
            "folder": str(stage.folder),
            "key": stage.key,
            "seconds": found["seconds"],
        }
        if stage.evaluation:
            evaluations[name] = {task: results.read(folder) for task, folder in stage.evaluation.items()}
            stages[name]["evaluation"] = evaluations[name]
    models = [name for name in names if stages[name]["kind"] in schema.MODEL_KINDS]
    final = stages[models[-1]]["folder"] if models else None
    summary = Path(lineage.root) / "results.json"
    write_json(summary, {"pipeline": lineage.recipe.pipeline, "final_model": final, "stages": stages})
    if evaluations:
        console.print(results_table(evaluations))
    console.print(f"{len(names)} stages in {seconds:.0f} s; results: {summary}; final model: {final}", soft_wrap=True)
    return 0


def describe(request: Request, console: Console) -> None:
    """Print the stages in order: what will be done and why, their settings and their exact commands.

    Raises:
        UserError: The recipe or its data cannot be used.
    """
    lineage = Lineage(request)
    plans = select([s.plan for s in lineage.stages.values()], request.stage)
    console.print(f"pipeline {lineage.recipe.pipeline}: {len(plans)} stages under {lineage.root}", soft_wrap=True)
    for line in request.replaced:
        console.print(line, soft_wrap=True)
    for number, plan in enumerate(plans, 1):
        stage = lineage.stages[plan.name]
        word, reason = status(stage)
        console.print(
            Rule(f"{number}. {plan.name} ({plan.config.kind}): {word}{f', {reason}' if reason else ''}", align="left")
        )
        for line in _settings(stage, lineage.recipe):
            console.print(f"  {line}", soft_wrap=True)
        for command in plan.commands:
            console.print(f"  $ {command_line(command)}", soft_wrap=True, style="bold")


def _settings(stage: Located, recipe: schema.Recipe) -> list[str]:
    lines = [f"folder: {stage.folder}"]
    if stage.inputs:
        weighted = len(stage.inputs) > 1 or stage.plan.config.kind == "merge"
        inputs = [
            f"{weight:g} x {name}" if weighted and stage.plan.base else name
            for name, (_, weight) in stage.inputs.items()
        ]
        lines.append(
            f"from: {', '.join(inputs)}" + (f" ({recipe.model.checkpoint})" if "checkpoint" in stage.inputs else "")
        )
    for name, mixture in stage.data.items():
        rows = ", ".join(f"{key} x {source.weight:g}" for key, source in mixture.sources.items())
        lines.append(f"data {name}: {rows}")
    shown = dict(stage.shown)
    for key in ("kind", "init_from", "data", "seeds", "files", "inputs"):
        shown.pop(key, None)
    if stage.plan.seed is not None:
        shown = {"seed": stage.plan.seed} | shown
    if "lora" in shown:
        shown["lora"] = shown["lora"] if shown["lora"]["r"] else None
    lines.append("settings: " + " ".join(f"{key}={value}" for key, value in shown.items() if value is not None))
    return lines
