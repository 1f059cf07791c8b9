"""A recipe as an ordered list of stages with their exact commands. Reads and writes no file."""

from dataclasses import dataclass

from smolpost import schema
from smolpost.errors import UserError
from smolpost.recipe import Request, room
from smolpost.screen import shown
from smolpost.training.batch_size import check_global_batch

JOBS = {
    "tasks": "data_gen/tasks.py",
    "pairs": "data_gen/preference_pairs.py",
    "merge": "merge/linear.py",
    "mergekit": "merge/method.py",
    "sweep": "merge/sweep.py",
    "greedy": "merge/greedy.py",
}


@dataclass(frozen=True)
class StagePlan:
    """One stage to run, for one seed.

    Attributes:
        name: The stage's name, with `-SEED` where the stage has several seeds.
        stage: The stage's name in the recipe.
        seed: Training seed, or None for kinds without one.
        config: The recipe's stage.
        weights: Checkpoint inputs: plan name (or "checkpoint") -> weight; 1 where the stage starts from it.
        sides: Of a sweep: checkpoint -> weight behind its weight 0, and behind its weight 1; empty for other kinds.
        base: The input that the result's config and tokenizer come from, or None for kinds that make no model.
        data_stages: Names of the plans whose output files this stage's mixtures read.
        making: Command lines in order, as a user would type them.
        measuring: The command line that evaluates the model, or None for kinds that make none.
    """

    name: str
    stage: str
    seed: int | None
    config: schema.Stage
    weights: dict[str, float]
    sides: tuple[dict[str, float], ...]
    base: str | None
    data_stages: tuple[str, ...]
    making: tuple[tuple[str, ...], ...]
    measuring: tuple[str, ...] | None

    @property
    def commands(self) -> tuple[tuple[str, ...], ...]:
        return (*self.making, *([self.measuring] if self.measuring else []))

    @property
    def parents(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([name for name in self.weights if name != "checkpoint"] + list(self.data_stages)))


def plan(request: Request) -> list[StagePlan]:
    """Every stage of the recipe, parents before children, otherwise in the recipe's order.

    Raises:
        UserError: Stages depend on one another in a circle, a stage starts from one with several seeds, a global batch
            has fewer rows than the accelerate config has processes, or an apo stage's attention cannot share prompts.
    """
    stages = request.recipe.stages
    plans: dict[str, StagePlan] = {}
    for stage in _ordered(request.recipe):
        config = stages[stage]
        if isinstance(config, schema.TrainStage):
            check_global_batch(stage, config.global_batch_size, request.recipe.accelerate.get("num_processes", 1))
            attention = request.recipe.model.attn_implementation
            if config.kind == "apo" and attention != schema.PACKED_ATTENTION:
                raise UserError(
                    f"stages.{stage} trains on pairs that share their prompt, whose sides model.attn_implementation="
                    f"{attention} cannot keep apart; set it to {schema.PACKED_ATTENTION}"
                )
        seeds = config.seeds if isinstance(config, schema.TrainStage) else [None]
        for seed in seeds:
            name = f"{stage}-{seed}" if len(seeds) > 1 else stage
            plans[name] = StagePlan(
                name=name,
                stage=stage,
                seed=seed,
                config=config,
                weights=_weights(stage, config, stages),
                sides=_sides(config, stages),
                base=_base(config, stages),
                data_stages=tuple(sorted(_data_stages(config, request.recipe))),
                making=_making(name, stage, config, request),
                measuring=_measuring(name, config, request),
            )
    return list(plans.values())


def select(plans: list[StagePlan], stage: str | None) -> list[StagePlan]:
    """The plans that `stage=` means: a plan's own name, or a stage's with all its seeds; all when None.

    Raises:
        UserError: No plan has that name.
    """
    if stage is None:
        return plans
    chosen = [p for p in plans if stage in (p.name, p.stage)]
    if not chosen:
        names = ", ".join(dict.fromkeys(n for p in plans for n in (p.stage, p.name)))
        raise UserError(f"stage={stage} is not a stage of this pipeline; choose one of: {names}")
    return chosen


def select_one(plans: list[StagePlan], stage: str | None) -> StagePlan:
    """The one plan that a single-stage command means.

    Raises:
        UserError: `stage=` is absent, unknown, or names several seeds.
    """
    if stage is None:
        raise UserError(f"no stage given; add stage=NAME, one of: {', '.join(p.name for p in plans)}")
    chosen = select(plans, stage)
    if len(chosen) > 1:
        raise UserError(f"stage={stage} has several seeds; choose one of: {', '.join(p.name for p in chosen)}")
    return chosen[0]


def _data_stages(config: schema.Stage, recipe: schema.Recipe) -> set[str]:
    read = config.mixtures()
    if isinstance(config, schema.ChoosingStage):
        read = [pair for task in config.tasks() for pair in recipe.evaluation.tasks[task].mixtures()]
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
        needs = [p for _, p in config.parents() if p != "checkpoint"]
        for parent in dict.fromkeys([*needs, *sorted(_data_stages(config, recipe))]):
            visit(parent, (*path, name))
        done.append(name)

    for name in recipe.stages:
        visit(name, ())
    return done


def _weights(name: str, config: schema.Stage, stages: dict) -> dict[str, float]:
    if isinstance(config, schema.MergeStage):
        return _sum(config.inputs, stages)
    if isinstance(config, schema.SweepStage):
        return dict.fromkeys([leaf for side in _sides(config, stages) for leaf in side], 1.0)
    if isinstance(config, schema.GreedyStage | schema.MergekitStage):
        return dict.fromkeys([leaf for parent in config.inputs for leaf in _leaves(parent, stages)], 1.0)
    for key, parent in config.parents():
        seeds = getattr(stages.get(parent), "seeds", [None])
        if len(seeds) > 1:
            choices = ", ".join(f"{parent}-{seed}" for seed in seeds)
            raise UserError(
                f"stages.{name}.{key}={parent} has several seeds ({choices}); soup them in a merge stage first"
            )
    return {parent: 1.0 for _, parent in config.parents()}


def _sides(config: schema.Stage, stages: dict) -> tuple[dict[str, float], ...]:
    if not isinstance(config, schema.SweepStage):
        return ()
    return tuple(_sum({parent: 1.0}, stages) for parent in (config.start, config.added))


def _sum(inputs: dict[str, float], stages: dict) -> dict[str, float]:
    """Checkpoints behind weighted merge inputs: a soup is taken apart, so a merge of it rounds once, not twice.

    A merge of averages along runs is not: its snapshots are known only once the runs are finished.
    """
    flat: dict[str, float] = {}
    for parent, weight in inputs.items():
        config = stages.get(parent)
        if isinstance(config, schema.MergeStage) and config.average == "final":
            shares = _sum(config.inputs, stages)
        else:
            leaves = _leaves(parent, stages)
            shares = dict.fromkeys(leaves, 1 / len(leaves))
        for leaf, share in shares.items():
            flat[leaf] = flat.get(leaf, 0.0) + weight * share
    return flat


def _leaves(parent: str, stages: dict) -> list[str]:
    """Plan names of a stage: one, or one per seed."""
    seeds = getattr(stages.get(parent), "seeds", [None])
    return [f"{parent}-{seed}" for seed in seeds] if len(seeds) > 1 else [parent]


def _base(config: schema.Stage, stages: dict) -> str | None:
    if isinstance(config, schema.TrainStage):
        return config.init_from
    if not isinstance(config, schema.MergeStage | schema.MergekitStage | schema.ChoosingStage):
        return None
    name = config.base
    if isinstance(config, schema.MergekitStage):  # its inputs are finished models, soups among them
        return _leaves(name, stages)[0]
    while isinstance(stages.get(name), schema.MergeStage) and stages[name].average == "final":
        name = stages[name].base
    return _leaves(name, stages)[0]


def _making(name: str, stage: str, config: schema.Stage, request: Request) -> tuple[tuple[str, ...], ...]:
    words = (*request.overrides, f"stage={name}")
    if config.kind in JOBS:
        folder, _, file = JOBS[config.kind].partition("/")
        return (("python", shown(room(folder) / file), *words),)
    if config.kind == "init":
        return (("smolpost", "init", *words),)
    launch = ["--quiet", "--config_file", shown(request.accelerate)]
    for key, value in request.launch_flags.items():
        launch += [f"--{key}", str(value)]
    return (
        ("smolpost", "prepare", *words),
        ("accelerate", "launch", *launch, "-m", "smolpost.train", *words),
    )


def _measuring(name: str, config: schema.Stage, request: Request) -> tuple[str, ...] | None:
    if config.kind not in schema.MODEL_KINDS or not request.recipe.evaluation.tasks:
        return None
    return ("smolpost", "eval", *request.overrides, f"stage={name}")
