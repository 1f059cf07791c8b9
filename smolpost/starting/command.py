"""smolpost new: look at a checkpoint and rows, and write the pipeline that trains it on them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from smolpost.errors import UserError
from smolpost.files import MANIFEST, STAMPS, write_text
from smolpost.pipeline.plan import plan
from smolpost.recipe import load
from smolpost.recipe.checks import NAME
from smolpost.screen import command_line, shown
from smolpost.starting import rows
from smolpost.starting.cautions import cautions
from smolpost.starting.checkpoint import Checkpoint, Template, adopt, choose_template
from smolpost.starting.checkpoint import look as look_at_checkpoint
from smolpost.starting.choices import (
    Data,
    Launch,
    Setting,
    choose_launch,
    looking_stage,
    num_steps,
    sized,
    stage_settings,
)
from smolpost.starting.report import checkpoint_lines, file_line, rows_table, settings_lines
from smolpost.starting.written import Pipeline

STAGES = {"documents": "sft", "pairs": "preference"}  # layout -> its stage and mixture in the pipeline


@dataclass
class Asked:
    """What the user wants.

    Attributes:
        name: Of the pipeline and its file.
        checkpoint: Folder or Hub id.
        sft, preference: Files of rows; one list may be empty.
        gpus: Processes that train, one for each GPU; 1 on a CPU.
        roles: Role of the files -> system, user, assistant or tool.
    """

    name: str
    checkpoint: str
    sft: list[str] = field(default_factory=list)
    preference: list[str] = field(default_factory=list)
    lora: bool = False
    gpus: int = 1
    roles: dict[str, str] = field(default_factory=dict)


class Found(NamedTuple):
    """What was looked at, and what follows."""

    checkpoint: Checkpoint
    template: Template
    data: list[Data]
    settings: list[list[Setting]]
    launch: Launch


def new(asked: Asked, console: Console) -> Path:
    """Write the pipeline into the current folder and print why it is as it is; its file.

    Raises:
        UserError: The name, the checkpoint or the rows cannot be used, or a file is in the way. Nothing is written.
    """
    file, template_file = check_name(asked.name)
    if not (asked.sft or asked.preference):
        raise UserError(f"there is nothing to train on; name files with {' or '.join(rows.FLAGS.values())}")
    if asked.gpus < 1:
        raise UserError(f"--gpus {asked.gpus} is below 1; give 1 for a CPU or one GPU")
    found = _look(asked)
    pipeline = _pipeline(asked, found, template_file)
    _write(file, template_file, pipeline, found, console)
    _report(found, asked, file, console)
    return file


def check_name(name: str) -> tuple[Path, Path]:
    """The files that a pipeline of this name has: its own, and its template's.

    Raises:
        UserError: It is not a pipeline's name, or a file is in the way.
    """
    if not NAME.fullmatch(name) or name.endswith((".yaml", ".yml")):
        raise UserError(f"{name!r} is not a name for a pipeline; use letters, digits and _ . + -, without .yaml")
    files = Path(f"{name}.yaml"), Path(f"{name}.jinja")
    for file in (*files, Path("pipeline") / files[0]):
        if file.exists():
            raise UserError(f"{file} exists; choose another name, or remove it")
    return files


def _look(asked: Asked) -> Found:
    checkpoint = look_at_checkpoint(asked.checkpoint)
    files = []
    for layout, paths in (("documents", asked.sft), ("pairs", asked.preference)):
        names = rows.source_names(paths)
        files.append([rows.look(path, layout, name, asked.roles) for path, name in zip(paths, names, strict=True)])
    needs = next((need for some in files for file in some if (need := file.needs())), None)
    template = choose_template(checkpoint, needs)
    tokenizer = checkpoint.tokenizer
    tokenizer.chat_template = template.text
    data, settings = [], []
    for some in filter(None, files):
        stage = looking_stage(some[0].layout)
        tokens = [rows.tokenize(file, stage, tokenizer, checkpoint.context) for file in some]
        data.append(Data(some, tokens))
        settings.append(stage_settings(data[-1], checkpoint, lora=asked.lora, gpus=asked.gpus))
    lengths = [value(chosen, "max_seq_len") for chosen in settings]
    launch = choose_launch(checkpoint, lengths, lora=asked.lora, gpus=asked.gpus, card=_card())
    return Found(checkpoint, template, data, settings, launch)


def value(settings: list[Setting], key: str):
    return next(setting.value for setting in settings if setting.key == key)


def _card() -> float | None:
    """Bytes of this machine's GPU, or None without one."""
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


# ---------------------------------------------------------------- the pipeline


def _pipeline(asked: Asked, found: Found, template_file: Path) -> Pipeline:
    kinds = " and ".join({"documents": "SFT", "pairs": "preference training"}[d.files[0].layout] for d in found.data)
    checkpoint = found.checkpoint
    made = f"{kinds}{' by LoRA' if asked.lora else ''} of {checkpoint.place}"
    pipeline = Pipeline(asked.name, f"Written by smolpost new: {made} ({sized(checkpoint.parameters)} parameters).")
    tasks = {"documents": ("perplexity", "loss", "loss of"), "pairs": ("preference", "pairs", "accuracy on")}
    pipeline.defaults.append(("/evaluation: none", ""))
    for data in found.data:
        kind, name, what = tasks[data.files[0].layout]
        if any(tokens.held_out for tokens in data.tokens):
            pipeline.defaults.append((f"/schema/{kind}@evaluation.tasks.{name}", f"{what} rows that do not train"))
    pipeline.defaults.append((f"/accelerate: {found.launch.accelerate}", found.launch.why))
    groups = {"sft": "sft", "preference": "apo"}
    for data in found.data:
        stage = STAGES[data.files[0].layout]
        pipeline.defaults.append((f"/stage@stages.{stage}: {groups[stage]}", ""))
    pipeline.set("pipeline", asked.name, "results go to runs/ and this name")
    pipeline.set("model.checkpoint", checkpoint.place)
    if asked.gpus > 1:
        pipeline.set("accelerate.num_processes", asked.gpus, "one for each GPU")
    for data in found.data:
        _set_data(pipeline, data)
    start = "checkpoint"
    for data, settings in zip(found.data, found.settings, strict=True):
        stage = STAGES[data.files[0].layout]
        _set_stage(pipeline, stage, start, settings, found.template, template_file)
        start = stage
    return pipeline


def _set_data(pipeline: Pipeline, data: Data) -> None:
    layout = data.files[0].layout
    heldout = "heldout" if layout == "documents" else "heldout_pairs"
    for file, tokens in zip(data.files, data.tokens, strict=True):
        train = file.num_rows - tokens.held_out
        places = [(STAGES[layout], "max_rows", f"of {file.num_rows:,}; the others are held out")]
        places += [(heldout, "first_row", "")] if tokens.held_out else []
        for mixture, limit, why in places:
            key = f"data.{mixture}.sources.{file.name}"
            pipeline.set(f"{key}.path", file.source.path)
            if file.source.columns != "smoltalk2":
                pipeline.set(f"{key}.columns", file.source.columns, "the shape that the rows have")
            for theirs, ours in file.source.rename.items():
                pipeline.set(f"{key}.rename.{theirs}", ours)
            for theirs, ours in file.source.roles.items():
                pipeline.set(f"{key}.roles.{theirs}", ours)
            if file.source.last_user_is_reply:
                pipeline.set(f"{key}.last_user_is_reply", True, "a last user turn after another one is a reply")
            if file.source.enable_thinking is False:
                pipeline.set(f"{key}.enable_thinking", False, "no row thinks, and rows do not say so themselves")
            if file.source.mode_from_reply:
                pipeline.set(
                    f"{key}.mode_from_reply", True, "rows do not say whether they think, but their replies show"
                )
            if tokens.held_out:
                pipeline.set(f"{key}.{limit}", train, why)


def _set_stage(
    pipeline: Pipeline, stage: str, start: str, settings: list[Setting], template: Template, template_file: Path
) -> None:
    key = f"stages.{stage}"
    pipeline.set(f"{key}.init_from", start)
    pipeline.set(f"{key}.data", stage)
    pipeline.set(f"{key}.template", template.name or str(template_file), template.why)
    if start == "checkpoint":
        why = "its text is another than the checkpoint's" if template.changes else ""
        pipeline.set(f"{key}.allow_template_change", template.changes, why)
    for setting in settings:
        pipeline.set(f"{key}.{setting.key}", setting.value, setting.why)


def _write(file: Path, template_file: Path, pipeline: Pipeline, found: Found, console: Console) -> None:
    """Adopt the checkpoint, write the files and plan the pipeline; if that is refused, remove all of it."""
    made = []
    try:
        if found.checkpoint.unadopted:
            adopt(found.checkpoint)
            made += [Path(found.checkpoint.place) / name for name in (MANIFEST, STAMPS)]
        if found.template.name is None:
            made.append(template_file)
            write_text(template_file, found.template.text)
        made.append(file)
        write_text(file, pipeline.text())
        plan(load([f"pipeline={pipeline.name}"]))
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------- what is printed


def _report(found: Found, asked: Asked, file: Path, console: Console) -> None:
    def say(*lines: str) -> None:
        for line in lines:
            console.print(line, soft_wrap=True)

    say(*checkpoint_lines(found.checkpoint, found.template))
    console.print()
    console.print(rows_table(found.data))
    say("", *(file_line(file) for data in found.data for file in data.files))
    doubts = []
    for data, settings in zip(found.data, found.settings, strict=True):
        stage = STAGES[data.files[0].layout]
        say("", *settings_lines(f"stages.{stage}", settings))
        batch, length = value(settings, "global_batch_size"), value(settings, "max_seq_len")
        steps = num_steps(data, length, batch, value(settings, "num_epochs"))
        doubts += cautions(data, batch, steps, "enable_thinking" in found.template.text)
    say("", *settings_lines("launch", [Setting("accelerate", found.launch.accelerate, found.launch.why)]))
    if found.launch.fits is False:
        remedy = "--gpus N" if asked.lora else "--lora or --gpus N"
        doubts.append(f"the model {found.launch.why}; use {remedy} with more, or larger GPUs")
    if doubts:
        say("", "look at:", *(f"- {line}" for line in doubts))
    files = [file, *([file.with_suffix(".jinja")] if found.template.name is None else [])]
    say("", f"written: {', '.join(map(shown, files))}")
    for verb, what in (("plan", "shows what will be done"), ("run", "does it")):
        say(f"  `{command_line(['smolpost', verb, f'pipeline={asked.name}'])}` {what}")
