"""`smolpost bench`: how fast a training stage would run, from a few steps of its real settings on random weights."""

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from smolpost import signals
from smolpost.errors import UserError
from smolpost.files import read_json, write_json
from smolpost.pipeline import manifest
from smolpost.pipeline.lineage import Lineage, Located
from smolpost.pipeline.plan import plan, select_one
from smolpost.pipeline.run import execute
from smolpost.progress import duration
from smolpost.recipe import Request
from smolpost.stages.base import CHECKPOINT, Planned

START, ROWS, KNOWN_ROWS = "start", "rows", "known_rows.json"  # in the folder that the ranks read
HELD_TOKENS = 2**24  # about as many are copied or generated; where a stage reads more, it reads them several times


def bench(request: Request, steps: int, console: Console) -> int:
    """Measure the stage that `stage=` means, by its launch command, in a folder that is removed; the exit code.

    Raises:
        UserError: The stage cannot be measured.
    """
    planned = {stage.name: stage for stage in plan(request)}
    stage = select_one(planned.values(), request.stage)
    _check(stage, request)
    located = _locator(request)
    with tempfile.TemporaryDirectory(prefix="smolpost-bench-") as folder:
        _put_start(stage, planned, located, request, Path(folder) / START)
        _put_rows(stage, located(stage.name), steps, Path(folder))
        launch = stage.making[-1]
        at = launch.index("-m")
        words = launch[at + 2 :]
        code = execute((*launch[:at], "-m", "smolpost.bench", folder, str(steps), *words), console, {})
    if signals.is_stop(code):
        print(signals.stopped_line(code).partition(";")[0], file=sys.stderr)
    return code


def measure(request: Request, folder: Path, steps: int) -> None:
    """One rank's part; rank 0 prints what was measured."""
    from smolpost.training.bench import bench as train_and_measure
    from smolpost.training.environment import detect

    stage = select_one(plan(request), request.stage)
    found = train_and_measure(
        stage.name,
        stage.config,
        stage.config.method(),
        start=folder / START,
        rows=folder / ROWS,
        out=folder / "out",
        steps=steps,
        attn_implementation=request.recipe.model.attn_implementation,
        environment=detect(stage.config.precision),
    )
    if found:
        print("\n".join(report(stage, found, steps, read_json(folder / KNOWN_ROWS))), flush=True)


def report(stage: Planned, found: dict, steps: int, known: dict) -> list[str]:
    """Lines for a person.

    Args:
        found: Of `training.bench`.
        known: What KNOWN_ROWS says.
    """
    from smolpost.training.arguments import total_steps

    where = f"{found['num_processes']} x {found['device']}, {found['precision']}"
    lines = {
        "stage": f"{stage.name}: {steps} steps after 1 to warm up, on {where}, random weights, {known['what']}",
        "tokens/s": f"{found['tokens_per_second']:,.0f}",
        "seconds per step": f"{found['seconds_per_step']:.3g}",
    }
    if "tflops" in found:
        lines["needed TFLOP/s"] = f"{found['tflops']:.4g} per device"
        lines["share of matmul rate"] = f"{found['matmul_share']:.1%} of {found['matmul_tflops']:.4g} TFLOP/s"
    if "peak_gb" in found:
        lines["peak memory"] = f"{found['peak_gb']:.3g} GB"
    lines["idle passes"] = f"{found['idle_share']:.0%}"
    if rate := found["reference_pairs_per_second"]:
        lines["reference"] = f"{rate:,.3g} pairs/s per device, once, before training"
    number = known["number"]
    if number is None and stage.config.max_steps is None:
        hours = 1e9 / found["tokens_per_second"] / 3600
        lines["a billion tokens"] = f"{hours:,.3g} hours; the stage's rows are not prepared, so their number is open"
    else:
        total = total_steps(stage.config, number)
        seconds, tokens = total * found["seconds_per_step"], total * found["tokens_per_step"]
        lines["the stage"] = f"{total:,} steps, about {duration(seconds)}, {tokens:,.3g} tokens"
    width = max(map(len, lines)) + 2
    return [f"{label:{width}}{text}" for label, text in lines.items()]


def _check(stage: Planned, request: Request) -> None:
    from smolpost.training.generated_rows import LAYOUTS

    config = stage.config
    if not config.LAUNCHED or getattr(config, "layout", None) not in LAYOUTS:
        raise UserError(
            f"stage={stage.name} of kind {config.kind} cannot be measured; choose a stage that trains on "
            f"{' or '.join(LAYOUTS)}"
        )
    if (machines := request.recipe.accelerate.get("num_machines", 1)) > 1:
        raise UserError(f"accelerate.num_machines={machines}, but bench measures one machine; set it to 1")


def _locator(request: Request) -> Callable[[str], Located | None]:
    """Stage's name -> the stage in its folder; None where no command has made anything, or its data is not there."""
    if not (Path(request.recipe.run_dir) / request.recipe.pipeline).is_dir():
        return lambda name: None  # to look further would make the folder
    lineage = Lineage(request)

    def located(name: str) -> Located | None:
        with contextlib.suppress(UserError):
            return lineage.stages[name]
        return None

    return located


def _put_start(
    stage: Planned,
    planned: dict[str, Planned],
    located: Callable[[str], Located | None],
    request: Request,
    out: Path,
) -> None:
    """Write config and tokenizer of what the stage starts from: those of the nearest model that is there.

    An empty file stands for the weights, as the key of a reference asks for one.

    Raises:
        UserError: It comes from the Hub, which cannot give it.
    """
    from transformers import AutoTokenizer

    from smolpost.model.loading import local_folder
    from smolpost.model.stored import CONFIG, read_config

    model, name = request.recipe.model, stage.base
    place = (model.checkpoint, model.revision)
    while name != CHECKPOINT:
        if (found := located(name)) and found.finished():
            place = (str(found.folder), None)
            break
        config = planned[name].config
        if sources := config.checkpoints():
            place = sources[0][1:]
            break
        if planned[name].base is None:
            config.sketch(request.recipe, out)
            break
        name = planned[name].base
    if not out.is_dir():
        folder = local_folder(*place, weights=False)
        read_config(folder / CONFIG).save_pretrained(out)
        AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    (out / "model.safetensors").touch()


def _put_rows(stage: Planned, located: Located | None, steps: int, folder: Path) -> None:
    """Write rows for the steps: some of the stage's own if they are prepared, else generated ones."""
    import datasets

    from smolpost.model.stored import CONFIG, read_config
    from smolpost.training.bench import WARM_UP
    from smolpost.training.generated_rows import MEDIAN, generated_rows

    config = stage.config
    per_step = config.global_batch_size
    batches = min(WARM_UP + steps, max(1, HELD_TOKENS // (per_step * config.max_seq_len)))
    datasets.disable_progress_bars()
    if located and manifest.read(located.prepared):
        own = datasets.load_from_disk(str(located.prepared))
        wanted = max(1, min(batches, len(own) // per_step)) * per_step
        rows = own.select([i * len(own) // wanted for i in range(wanted)])
        known = {"number": len(own), "what": f"{wanted:,} of {len(own):,} prepared rows"}
    else:
        vocab_size = read_config(folder / START / CONFIG).get_text_config().vocab_size
        rows = generated_rows(config, batches * per_step, vocab_size)
        known = {"number": None, "what": f"{len(rows):,} generated rows, parts of {MEDIAN} tokens in the median"}
    rows.save_to_disk(str(folder / ROWS))
    write_json(folder / KNOWN_ROWS, known)
