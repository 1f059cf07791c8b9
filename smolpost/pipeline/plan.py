"""A recipe as an ordered list of stages with their exact commands. Writes no file."""

from collections.abc import Iterable

from smolpost import schema
from smolpost.errors import UserError
from smolpost.recipe import Request, room
from smolpost.screen import shown
from smolpost.stages.base import CHECKPOINT, Planned, Stage


def plan(request: Request) -> list[Planned]:
    """Every stage of the recipe, parents before children, otherwise in the recipe's order.

    Raises:
        UserError: Stages depend on one another in a circle, a stage starts from one with several seeds, or its inputs
            do not fit it.
    """
    stages = request.recipe.stages
    plans: list[Planned] = []
    for entry in _ordered(request.recipe):
        config = stages[entry]
        config.check_plan(entry, request.recipe)
        seeds = config.seeds_to_run()
        for seed in seeds:
            name = f"{entry}-{seed}" if len(seeds) > 1 else entry
            plans.append(
                Planned(
                    name=name,
                    entry=entry,
                    seed=seed,
                    config=config,
                    weights=config.input_weights(entry, stages),
                    base=config.base_input(stages),
                    data_stages=tuple(sorted(_data_stages(config, request.recipe))),
                    making=_making(name, config, request),
                    measuring=_measuring(name, config, request),
                )
            )
    return plans


def select(plans: Iterable[Planned], stage: str | None) -> list[Planned]:
    """The plans that `stage=` means: a plan's own name, or a stage's with all its seeds; all when None.

    Raises:
        UserError: No plan has that name.
    """
    plans = list(plans)
    if stage is None:
        return plans
    chosen = [p for p in plans if stage in (p.name, p.entry)]
    if not chosen:
        names = ", ".join(dict.fromkeys(n for p in plans for n in (p.entry, p.name)))
        raise UserError(f"stage={stage} is not a stage of this pipeline; choose one of: {names}")
    return chosen


def select_one(plans: Iterable[Planned], stage: str | None) -> Planned:
    """The one plan that a single-stage command means.

    Raises:
        UserError: `stage=` is absent, unknown, or names several seeds.
    """
    plans = list(plans)
    if stage is None:
        raise UserError(f"no stage given; add stage=NAME, one of: {', '.join(p.name for p in plans)}")
    chosen = select(plans, stage)
    if len(chosen) > 1:
        raise UserError(f"stage={stage} has several seeds; choose one of: {', '.join(p.name for p in chosen)}")
    return chosen[0]


def _data_stages(config: Stage, recipe: schema.Recipe) -> set[str]:
    tasks = [recipe.evaluation.tasks[name] for name in config.tasks_measured()]
    read = [*config.mixtures(), *(pair for task in tasks for pair in task.mixtures())]
    mixtures = [recipe.data[name] for _, name in read]
    return {source.stage for mixture in mixtures for source in mixture.sources.values() if source.stage}


def _ordered(recipe: schema.Recipe) -> list[str]:
    """Depth-first topological order; stable in the recipe's own order."""
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise UserError(f"stages depend on one another in a circle: {' -> '.join([*path, name])}")
        if name in done:
            return
        config = recipe.stages[name]
        needs = [p for _, p in config.parents() if p != CHECKPOINT]
        for parent in dict.fromkeys([*needs, *sorted(_data_stages(config, recipe))]):
            visit(parent, (*path, name))
        done.append(name)

    for name in recipe.stages:
        visit(name, ())
    return done


def _making(name: str, config: Stage, request: Request) -> tuple[tuple[str, ...], ...]:
    words = (*request.overrides, f"stage={name}")
    if config.SCRIPT:
        folder, _, file = config.SCRIPT.partition("/")
        return (("python", shown(room(folder) / file), *words),)
    if not config.LAUNCHED:
        return (("smolpost", "make", *words),)
    launch = ["--quiet", "--config_file", shown(request.accelerate)]
    for key, value in request.launch_flags.items():
        launch += [f"--{key}", str(value)]
    return (
        ("smolpost", "prepare", *words),
        ("accelerate", "launch", *launch, "-m", "smolpost.train", *words),
    )


def _measuring(name: str, config: Stage, request: Request) -> tuple[str, ...] | None:
    if not config.MAKES_MODEL or not request.recipe.evaluation.tasks:
        return None
    return ("smolpost", "eval", *request.overrides, f"stage={name}")
