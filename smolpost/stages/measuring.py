"""How a stage that chooses evaluates models in memory."""

from collections.abc import Callable
from pathlib import Path

from smolpost.progress import Progress
from smolpost.stages.base import Work


def measurer(work: Work, names: list[str], seed: int) -> Callable:
    """(model, tokenizer, folder) -> task -> scores and samples.

    Args:
        names: Evaluation tasks of the recipe.
        seed: Of prompts and sampled replies.
    Raises:
        UserError: A task cannot be measured.
    """
    from smolpost.evaluation import results
    from smolpost.evaluation.run import run_task
    from smolpost.evaluation.task import Context
    from smolpost.inference.local import LocalEngine

    spec = work.recipe.evaluation
    shared = Context(spec.today, seed, work.rows)
    tasks = {name: spec.tasks[name].build(name, shared) for name in names}
    options = {"batch_tokens": spec.batch_tokens, "seed": seed}

    def measure(model, tokenizer, folder: Path) -> dict[str, dict]:
        engine, found = LocalEngine(model, tokenizer), {}
        with Progress("tasks", len(tasks), "task") as progress:
            for name, task in tasks.items():
                found[name] = run_task(name, task, engine, folder / name, **options)
                found[name]["samples"] = results.samples(folder / name)
                progress.update()
        return found

    return measure
