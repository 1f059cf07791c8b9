"""What each command of a plan does: find the inputs, call the library, finish the folder with a manifest."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from smolpost import disks, screen, stage_log
from smolpost.chat.render import load_template, template_hash
from smolpost.data.mixtures import mix
from smolpost.data.settings import SELECTING
from smolpost.errors import UserError
from smolpost.evaluation import results
from smolpost.files import MANIFEST, building, digest, hashes, lock, verify, write_json
from smolpost.pipeline import manifest
from smolpost.pipeline.code import code_version
from smolpost.pipeline.lineage import Lineage, Located
from smolpost.stages.base import CHECKPOINT, Work

SHOWN_ROWS = 20  # of those that are refused
PREPARED_TOKENIZER = "tokenizer"  # subfolder of prepared rows: what they were tokenized with


def make(lineage: Lineage, stage: Located) -> Path:
    """Make a stage's folder unless it is finished.

    Kinds that can be resumed work in the stage's own folder and go on with what an earlier try left there; others get a
    new folder that takes the stage's place in one rename.

    Raises:
        UserError: A parent is not finished, or what the stage's work raises.
    """
    lineage.require_inputs(stage)
    with lock(stage.folder):
        if stage.finished():
            print(f"{stage.folder} is finished", flush=True)
        else:
            stage_log.begin(lineage.log(stage.folder), "make")
            _make(lineage, stage)
        if stage.config.RESUMABLE:  # under the lock: an orphan that has just finished tidies, too
            stage.config.tidy(stage.folder)
    return stage.folder


def _make(lineage: Lineage, stage: Located) -> None:
    if stage.config.RESUMABLE:
        stage.folder.mkdir(parents=True, exist_ok=True)
        _finish(lineage, stage, stage.folder)
        return
    with building(stage.folder) as part:
        _finish(lineage, stage, part)


def _finish(lineage: Lineage, stage: Located, folder: Path) -> None:
    began = time.monotonic()
    report = stage.config.make(work_of(lineage, stage, folder))
    if stage.prepared:
        report |= {"data": manifest.read(stage.prepared)["report"]}
    template = getattr(stage.config, "template", None)
    manifest.write(
        folder,
        pipeline=lineage.recipe.pipeline,
        stage=stage.name,
        kind=stage.config.kind,
        key=stage.key,
        seed=stage.seed,
        parents=stage.parent_keys,
        weights=stage.weights,
        prepared=str(stage.prepared) if stage.prepared else None,
        config=stage.shown,
        recipe_hash=digest(lineage.recipe),
        template_hash=template_hash(load_template(template)) if template else None,
        report=report,
        code=code_version(type(stage.config)),
        seconds=round(time.monotonic() - began, 1),
    )


def work_of(lineage: Lineage, stage: Located, folder: Path) -> Work:
    """What the stage gets to write into the folder.

    Raises:
        UserError: A checkpoint on the Hub cannot be fetched.
    """
    from smolpost.model.loading import local_folder

    return Work(
        stage=stage,
        recipe=lineage.recipe,
        inputs=input_folders(lineage, stage),
        data=stage.data,
        rows=lambda name: mix(lineage.filled(name)),
        prompts=lambda name: mix(lineage.filled(name), replies=False),
        folder=folder,
        place=stage.folder,
        prepared=stage.prepared,
        root=lineage.root,
        checkpoints={
            key: local_folder(place, lineage.commit(place, revision), key=f"stages.{stage.entry}.{key}")
            for key, place, revision in stage.config.checkpoints()
        },
        replies=stage.replies,
    )


def generate(lineage: Lineage, stage: Located, task: int | None) -> None:
    """Ask the teachers of a stage, for one part of the prompts or for all; `make` then finishes the stage.

    Raises:
        UserError: The stage asks no teacher, a parent is not finished, or what the asking raises.
    """
    lineage.require_inputs(stage)
    stage_log.begin(lineage.log(stage.folder), "generate")
    stage.config.generate(work_of(lineage, stage, stage.folder), task)


def preview(lineage: Lineage, stage: Located, rows: int) -> None:
    """Show what a stage would make of its first prompts. Nothing is kept.

    Raises:
        UserError: As `generate`.
    """
    lineage.require_inputs(stage)
    with tempfile.TemporaryDirectory() as folder:
        stage.config.preview(work_of(lineage, stage, Path(folder)), rows)


def input_folders(lineage: Lineage, stage: Located) -> dict[str, Path]:
    """Folder of every checkpoint the stage starts from, by name; a base checkpoint on the Hub is fetched.

    Raises:
        UserError: It cannot be fetched.
    """
    from smolpost.model.loading import local_folder

    revision = lineage.recipe.model.revision
    return {
        name: local_folder(place, lineage.commit(place, revision) if name == CHECKPOINT else None)
        for name, (place, _) in stage.inputs.items()
    }


def prepare(lineage: Lineage, stage: Located) -> Path:
    """Tokenize, mask and pack a stage's rows, once for all its seeds.

    Raises:
        UserError: The stage has no rows of its own, or they cannot be used.
    """
    from smolpost.data.ledger import DROPPED, RefusedRows, refused_rows
    from smolpost.data.report import format_report

    config = stage.config
    if stage.prepared is None:
        raise UserError(f"stage={stage.name} of kind {config.kind} has no rows to prepare; training stages have")
    lineage.require_inputs(stage)
    config.check_start(work_of(lineage, stage, stage.prepared))
    with lock(stage.prepared):
        if is_prepared(stage):
            print(f"{stage.prepared} is prepared", flush=True)
            return stage.prepared
        stage_log.begin(lineage.log(stage.folder), "prepare")
        with contextlib.ExitStack() as locks:
            kept = stage.prepared.with_name(f"{stage.prepared.name}.refused.txt")
            kept.unlink(missing_ok=True)  # of an earlier try
            try:
                report = _prepare(lineage, stage, locks)
            except RefusedRows as error:
                kept.write_text("".join(f"{fault}\n" for fault in error.faults))
                _show_refused(error.faults, kept)
                raise
    _show_refused(refused_rows(stage.prepared), stage.prepared / DROPPED)
    screen.console().print(format_report(report))
    look = screen.command_line(["smolpost", "inspect", stage.prepared])
    print(f"{stage.prepared}; `{look}` shows its rows", flush=True)
    return stage.prepared


def is_prepared(stage: Located) -> bool:
    """Whether the stage's prepared rows are there.

    Raises:
        UserError: Their files are no longer those that were written.
    """
    if manifest.read(stage.prepared) is None:
        return False
    verify(stage.prepared)
    return True


def _prepare(lineage: Lineage, stage: Located, locks: contextlib.ExitStack) -> dict:
    """Write the folder of prepared rows; the report."""
    config = stage.config
    work = work_of(lineage, stage, stage.prepared)
    tokenizer = config.tokenizer_for(work)
    identity = digest([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template])
    shards = {name: tokenized(lineage, stage, name, identity) for name in work.data[config.data].sources}
    for folder in sorted(set(shards.values())):
        locks.enter_context(lock(folder))
    with building(stage.prepared) as part:
        report = config.prepare(dataclasses.replace(work, folder=part), tokenizer, shards.__getitem__)
        tokenizer.save_pretrained(part / PREPARED_TOKENIZER)
        manifest.write(
            part,
            kind="prepared",
            key=stage.prepared.name.rpartition("-")[2],
            template_hash=template_hash(tokenizer.chat_template),
            report=report,
            code=code_version(type(config)),
        )
    return report


def tokenized(lineage: Lineage, stage: Located, source: str, tokenizer: str) -> Path:
    """Folder of a source's tokenized rows. All stages that read and render it in the same way share it.

    Args:
        source: Name in the stage's mixture.
        tokenizer: All that decides how it renders and tokenizes.
    """
    mixture = lineage.recipe.data[stage.config.data]
    rows = lineage.source(mixture.sources[source], without=SELECTING)
    hygiene = [mixture.hygiene, *lineage.against(mixture)]
    parts = stage.config.tokenized_parts(rows, hygiene, tokenizer)
    return lineage.root / "tokenized" / f"{source}-{digest(parts)}"


def _show_refused(faults: list[str], file: Path) -> None:
    """The first rows that are refused, and where all of them are listed."""
    for fault in faults[:SHOWN_ROWS]:
        print(f"refused: {fault}")
    if faults:
        print(f"{len(faults):,} rows are refused; {file} lists them all", flush=True)


def make_on_ranks(lineage: Lineage, stage: Located, rank: int) -> None:
    """One rank of a stage that `accelerate launch` runs.

    Rank 0 prepares missing rows while the others wait on the file, not on NCCL, whose patience is minutes.

    Raises:
        UserError: The stage does not run on ranks, or as `make`.
    """
    if not stage.config.LAUNCHED:
        raise UserError(f"stage={stage.name} of kind {stage.config.kind} is not a training stage; see `smolpost plan`")
    lineage.require_inputs(stage)
    if not stage.finished():
        stage_log.begin(lineage.log(stage.folder), "train")
    if rank == 0:
        if not is_prepared(stage):
            prepare(lineage, stage)
        make(lineage, stage)
        print(f"{stage.folder}", flush=True)
        return
    while not manifest.read(stage.prepared):
        time.sleep(0.5)
    if not stage.finished():
        stage.config.make(work_of(lineage, stage, stage.folder))


def evaluate(lineage: Lineage, stage: str) -> tuple[Path, dict[str, dict]]:
    """Evaluate one model on every task of the recipe and of the harness; finished tasks are read from disk.

    Args:
        stage: Name of a stage that makes a model, or "checkpoint" for the model that the pipeline starts from.
    Returns:
        The folder of all that was measured of the model, and task -> its scores, counts and seconds.
    Raises:
        UserError: The stage makes no model or is not finished, or a task cannot be measured.
    """
    root, folders = lineage.evaluation_of(stage)
    unmeasured = {name: folder for name, folder in folders.items() if not results.read(folder)}
    if unmeasured or lineage.recipe.harness.kind != "none":
        stage_log.begin(lineage.log(root), "eval")
    if unmeasured:
        _measure(lineage, stage, unmeasured)
    found = {name: results.read(folder) for name, folder in folders.items()}
    if lineage.recipe.harness.kind != "none":
        found |= _harness(lineage, stage, root)
    if unmeasured or disks.is_writable(root):  # what is measured can be read on a disk that is read-only
        write_json(root / results.SCORES, found)
    return root, found


def _harness(lineage: Lineage, stage: str, root: Path) -> dict[str, dict]:
    """Scores of the harness's tasks, shown beside ours."""
    from smolpost.evaluation.harness.run import VERSION as HARNESS_VERSION
    from smolpost.evaluation.harness.run import harness_key, run_harness

    harness = lineage.recipe.harness
    key = digest([harness_key(harness), HARNESS_VERSION])
    out = root / f"{harness.kind}-{key}"
    with lock(out):
        return run_harness(harness, model_folder(lineage, stage), out, lambda line: print(line, flush=True))


def _measure(lineage: Lineage, stage: str, folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    from smolpost.evaluation.run import run_task
    from smolpost.inference.local import LocalEngine
    from smolpost.inference.server import ServerEngine
    from smolpost.model.loading import check_plain, load_for_inference

    spec = lineage.recipe.evaluation
    checkpoint = model_folder(lineage, stage)
    # Built before the model is loaded: a wrong setting is said at once.
    shared = context(lineage, folders)
    tasks = {name: spec.tasks[name].build(name, shared) for name in folders}
    if spec.server:
        check_plain(checkpoint)
        engine = ServerEngine(
            spec.server, AutoTokenizer.from_pretrained(checkpoint), checkpoint, key="evaluation.server"
        )
    else:
        engine = LocalEngine(*load_for_inference(checkpoint))
    for number, (name, task) in enumerate(tasks.items(), 1):
        label = f"eval {stage}: {name} (task {number} of {len(tasks)})"
        with lock(folders[name]):
            run_task(name, task, engine, folders[name], batch_tokens=spec.batch_tokens, seed=spec.seed, label=label)


def model_folder(lineage: Lineage, stage: str) -> Path:
    """Folder of a finished stage's model, or of the checkpoint that the pipeline starts from.

    Raises:
        UserError: The stage is not finished, or the checkpoint cannot be fetched.
    """
    from smolpost.model.loading import local_folder

    lineage.require(stage)
    if stage == CHECKPOINT:
        model = lineage.recipe.model
        return local_folder(model.checkpoint, lineage.commit(model.checkpoint, model.revision))
    return lineage.stages[stage].folder


def context(lineage: Lineage, tasks: Iterable[str]):
    """What the named evaluation tasks share.

    Raises:
        UserError: A stage that writes their rows is not finished.
    """
    from smolpost.evaluation.task import Context

    spec = lineage.recipe.evaluation
    for mixture in {name for task in tasks for _, name in spec.tasks[task].mixtures()}:
        for source in lineage.recipe.data[mixture].sources.values():
            if source.stage is not None:
                lineage.require(source.stage)
    return Context(spec.today, spec.seed, lambda name: list(mix(lineage.filled(name))))


def adopt(folder: Path) -> None:
    """Give a checkpoint from elsewhere a manifest, with a hash of its files as its key; one that has it is verified.

    Raises:
        UserError: The folder is not a checkpoint that loads completely, or its files are not those of its manifest.
    """
    from smolpost.model.loading import check_usable

    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if made := manifest.read(folder):
        verify(folder)
        print(f"{folder} has a {MANIFEST} with key {made['key']} already, and its files are those that it lists")
        return
    check_usable(folder)
    files = hashes(folder)
    key = digest({name: entry["sha256"] for name, entry in files.items()})
    manifest.write(folder, files, kind="adopted", key=key)
    print(f"{folder} adopted with key {key}")
