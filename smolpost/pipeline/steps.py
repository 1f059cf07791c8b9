"""What each command of a plan does: find the inputs, call the library, finish the folder with a manifest."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from smolpost import disks, schema, screen
from smolpost.chat.render import load_template, render, template_hash
from smolpost.data.mixtures import mix, rows_alone
from smolpost.data.prompts import named
from smolpost.errors import UserError
from smolpost.evaluation import results
from smolpost.files import MANIFEST, hashes, verify, write_json
from smolpost.pipeline import manifest
from smolpost.pipeline.code import code_version
from smolpost.pipeline.lineage import CODE, Lineage, Located

SHOWN_ROWS = 20  # of those that are refused
PREPARED_TOKENIZER = "tokenizer"  # subfolder of prepared rows: what they were tokenized with


def make(lineage: Lineage, stage: Located, fill: Callable[[Located, Path], dict], *, resumable: bool = False) -> Path:
    """Make a stage's folder unless it is finished.

    Args:
        fill: Writes the stage's files into the folder it is given and returns a report for the manifest.
        resumable: `fill` works in the stage's own folder and goes on with what an earlier try left there; otherwise
            it gets a new folder that takes the stage's place in one rename.
    Raises:
        UserError: A parent is not finished, or what `fill` raises.
    """
    lineage.require_inputs(stage)
    with manifest.lock(stage.folder):
        if stage.finished():
            print(f"{stage.folder} is finished", flush=True)
        elif resumable:
            stage.folder.mkdir(parents=True, exist_ok=True)
            finish(lineage, stage, stage.folder, fill)
        else:
            with manifest.building(stage.folder) as part:
                finish(lineage, stage, part, fill)
    return stage.folder


def finish(lineage: Lineage, stage: Located, folder: Path, fill: Callable[[Located, Path], dict]) -> None:
    began = time.monotonic()
    report = fill(stage, folder)
    config = stage.plan.config
    manifest.write(
        folder,
        pipeline=lineage.recipe.pipeline,
        stage=stage.plan.name,
        kind=config.kind,
        key=stage.key,
        seed=stage.plan.seed,
        parents=stage.parent_keys,
        weights=stage.plan.weights,
        prepared=str(stage.prepared) if stage.prepared else None,
        config=stage.shown,
        recipe_hash=manifest.digest(lineage.recipe),
        template_hash=template_hash(load_template(config.template)) if hasattr(config, "template") else None,
        report=report,
        seconds=round(time.monotonic() - began, 1),
    )


def input_folders(stage: Located, recipe: schema.Recipe) -> dict[str, Path]:
    """Folder of every checkpoint the stage starts from, by name; a base checkpoint on the Hub is fetched.

    Raises:
        UserError: It cannot be fetched.
    """
    from smolpost.model.loading import local_folder

    revision = recipe.model.revision
    return {
        name: local_folder(place, revision if name == "checkpoint" else None)
        for name, (place, _) in stage.inputs.items()
    }


def init(stage: Located, folder: Path, architecture: schema.Architecture) -> dict:
    """A tokenizer from the stage's mixtures, and a model with random weights."""
    import torch

    from smolpost.chat.tokenizer import build_tokenizer
    from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM

    config = stage.plan.config
    options = {"kind": config.tokenizer, "vocab_size": config.vocab_size, "template": config.template}
    empty = build_tokenizer([], **options)  # has the special tokens that templates read
    texts, refused = [], []
    for mixture in stage.data.values():
        for _, row in mix(rows_alone(mixture), refused):
            texts.extend(_texts(row, empty))
    if refused:
        print(f"{len(refused):,} rows are refused and left out of the vocabulary; the first: {refused[0]}", flush=True)
    tokenizer = build_tokenizer(texts, **options)
    torch.manual_seed(config.seed)
    model = SmolLM3ForCausalLM(
        SmolLM3Config(
            **dataclasses.asdict(architecture),
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.convert_tokens_to_ids("<|begin_of_text|>"),
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters, {len(tokenizer):,} tokens in the vocabulary, from {len(texts):,} texts", flush=True
    )
    return {"parameters": parameters, "vocab_size": len(tokenizer), "texts": len(texts)}


def _texts(row: dict, tokenizer) -> list[str]:
    conversations = [row[key] for key in ("messages", "chosen", "rejected") if key in row]
    if not conversations:
        return [row["text"]]
    kwargs, tools = row.get("chat_template_kwargs"), row.get("tools")
    options = {"template_kwargs": kwargs, "tools": tools, "today": schema.RELEASE_DAY}
    with named(row):
        return [render(tokenizer, messages, **options) for messages in conversations]


def prepare(lineage: Lineage, stage: Located) -> Path:
    """Tokenize, mask and pack a training stage's rows, once for all its seeds."""
    from transformers import AutoTokenizer

    from smolpost.data.ledger import DROPPED, RefusedRows, refused_rows
    from smolpost.data.prepare import prepare as prepare_rows
    from smolpost.data.report import format_report
    from smolpost.training.start import check_start

    config = stage.plan.config
    if stage.prepared is None:
        raise UserError(
            f"stage={stage.plan.name} is a {config.kind} stage; only sft and apo stages have rows to prepare"
        )
    lineage.require_inputs(stage)
    start = input_folders(stage, lineage.recipe)[config.init_from]
    check_start(stage.plan.stage, config, start, lineage.recipe.model.attn_implementation)
    with manifest.lock(stage.prepared):
        if manifest.read(stage.prepared):
            verify(stage.prepared)
            print(f"{stage.prepared} is prepared", flush=True)
            return stage.prepared
        tokenizer = AutoTokenizer.from_pretrained(start)
        template = load_template(config.template)
        if config.init_from == "checkpoint":
            check_template(stage, tokenizer.chat_template, template)
        tokenizer.chat_template = template
        identity = manifest.digest([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, template])
        mixture = stage.data[config.data]
        shards = {name: lineage.tokenized(stage, name, identity) for name in mixture.sources}
        with contextlib.ExitStack() as locks:
            for folder in sorted(set(shards.values())):
                locks.enter_context(manifest.lock(folder))
            part = locks.enter_context(manifest.building(stage.prepared))
            kept = stage.prepared.with_name(f"{stage.prepared.name}.refused.txt")
            kept.unlink(missing_ok=True)  # of an earlier try
            try:
                report = prepare_rows(config, mixture, tokenizer, shards.__getitem__, part)
            except RefusedRows as error:
                kept.write_text("".join(f"{fault}\n" for fault in error.faults))
                _show_refused(error.faults, kept)
                raise
            tokenizer.save_pretrained(part / PREPARED_TOKENIZER)
            manifest.write(
                part,
                kind="prepared",
                key=stage.prepared.name.rpartition("-")[2],
                template_hash=template_hash(template),
                report=report,
            )
    _show_refused(refused_rows(stage.prepared), stage.prepared / DROPPED)
    screen.console().print(format_report(report))
    look = screen.command_line(["smolpost", "inspect", stage.prepared])
    print(f"{stage.prepared}; `{look}` shows its rows", flush=True)
    return stage.prepared


def _show_refused(faults: list[str], file: Path) -> None:
    """The first rows that are refused, and where all of them are listed."""
    for fault in faults[:SHOWN_ROWS]:
        print(f"refused: {fault}")
    if faults:
        print(f"{len(faults):,} rows are refused; {file} lists them all", flush=True)


def check_template(stage: Located, found: str | None, template: str) -> None:
    """Refuse to go on from a checkpoint under another chat template than its own."""
    config = stage.plan.config
    if isinstance(found, str) and found != template and not config.allow_template_change:
        raise UserError(
            f"stages.{stage.plan.stage}.template={config.template} (hash {template_hash(template)}) is not the chat "
            f"template of model.checkpoint (hash {template_hash(found)}); set a .jinja file with that one, or "
            f"stages.{stage.plan.stage}.allow_template_change=true where the change is meant"
        )


def train(lineage: Lineage, stage: Located) -> None:
    """One rank of one training stage. Rank 0 prepares missing rows while the others wait on the file, not on NCCL."""
    from smolpost.training.checkpoints import remove_all
    from smolpost.training.environment import detect

    config = stage.plan.config
    if stage.prepared is None:
        raise UserError(f"stage={stage.plan.name} is a {config.kind} stage; smolpost.train runs sft and apo stages")
    environment = detect(config.precision)
    lineage.require_inputs(stage)
    if environment.rank == 0:
        prepare(lineage, stage)
    while not manifest.read(stage.prepared):
        time.sleep(0.5)
    if environment.rank == 0:
        make(lineage, stage, lambda s, folder: _train(lineage, s, folder, environment), resumable=True)
        with manifest.lock(stage.folder):  # an orphan that has just finished removes the same checkpoints
            remove_all(stage.folder)
        print(f"{stage.folder}", flush=True)
    elif not stage.finished():
        _train(lineage, stage, stage.folder, environment)


def _train(lineage: Lineage, stage: Located, folder: Path, environment) -> dict:
    from smolpost.training.train import train as train_stage

    config = stage.plan.config
    metrics = train_stage(
        stage.plan.stage,
        config,
        seed=stage.plan.seed,
        start=input_folders(stage, lineage.recipe)[config.init_from],
        prepared=stage.prepared,
        out=folder,
        references=lineage.root / "references",
        code=code_version(*CODE["reference"]),
        attn_implementation=lineage.recipe.model.attn_implementation,
        environment=environment,
    )
    rows = manifest.read(stage.prepared)["report"]
    return metrics | {"data": rows}


def evaluate(lineage: Lineage, stage: str) -> tuple[Path, dict[str, dict]]:
    """Every task of the recipe on one model, and the harness's; what has been measured already is read.

    Args:
        stage: Name of a stage that makes a model, or "checkpoint" for the model that the pipeline starts from.
    Returns:
        The folder of all that was measured of the model, and task -> its scores, counts and seconds.
    Raises:
        UserError: The stage makes no model or is not finished, or a task cannot be measured.
    """
    root, folders = lineage.evaluation_of(stage)
    unmeasured = {name: folder for name, folder in folders.items() if not results.read(folder)}
    if unmeasured:
        _measure(lineage, stage, unmeasured)
    found = {name: results.read(folder) for name, folder in folders.items()}
    if lineage.recipe.harness.kind != "none":
        found |= _harness(lineage, stage, root)
    if unmeasured or disks.is_writable(root):  # what is measured can be read on a disk that is read-only
        write_json(root / results.SCORES, found)
    return root, found


def _harness(lineage: Lineage, stage: str, root: Path) -> dict[str, dict]:
    """Scores of the harness's tasks, which stand beside ours."""
    from smolpost.evaluation.harness.run import harness_key, run_harness

    harness = lineage.recipe.harness
    key = manifest.digest([harness_key(harness), code_version("evaluation/harness/run.py")])
    out = root / f"{harness.kind}-{key}"
    with manifest.lock(out):
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
        engine = ServerEngine(spec.server, AutoTokenizer.from_pretrained(checkpoint), checkpoint)
    else:
        engine = LocalEngine(*load_for_inference(checkpoint))
    for number, (name, task) in enumerate(tasks.items(), 1):
        label = f"eval {stage}: {name} (task {number} of {len(tasks)})"
        with manifest.lock(folders[name]):
            run_task(name, task, engine, folders[name], batch_tokens=spec.batch_tokens, seed=spec.seed, label=label)


def measurer(lineage: Lineage, stage: Located) -> Callable:
    """What a stage that chooses evaluates its points with, a `selection.live.Measure`.

    Raises:
        UserError: A task cannot be measured.
    """
    from smolpost.selection import live

    spec, config = lineage.recipe.evaluation, stage.plan.config
    shared = context(lineage, config.tasks())._replace(seed=config.seed)
    tasks = {name: spec.tasks[name].build(name, shared) for name in config.tasks()}
    return live.measurer(tasks, batch_tokens=spec.batch_tokens, seed=config.seed)


def model_folder(lineage: Lineage, stage: str) -> Path:
    """Folder of a finished stage's model, or of the checkpoint that the pipeline starts from.

    Raises:
        UserError: The stage is not finished, or the checkpoint cannot be fetched.
    """
    from smolpost.model.loading import local_folder

    lineage.require(stage)
    if stage == "checkpoint":
        return local_folder(lineage.recipe.model.checkpoint, lineage.recipe.model.revision)
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
    return Context(spec.today, spec.seed, lambda name: list(mix(lineage.mixture(name))))


def adopt(folder: Path) -> None:
    """Give a checkpoint from elsewhere a manifest, with a hash of its files as its key.

    Raises:
        UserError: The folder is no checkpoint that loads whole, or has a manifest already.
    """
    from smolpost.model.loading import check_whole

    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if manifest.read(folder):
        raise UserError(f"{folder} has a {MANIFEST} already")
    check_whole(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; save the tokenizer beside the weights")
    files = hashes(folder)
    key = manifest.digest({name: entry["sha256"] for name, entry in files.items()})
    manifest.write(folder, files, kind="adopted", key=key)
    print(f"{folder} adopted with key {key}")
