"""smolpost import: a pipeline from another tool's YAML file."""

import argparse
from dataclasses import replace
from pathlib import Path

from smolpost import screen
from smolpost.errors import UserError
from smolpost.files import write_text
from smolpost.importing.draft import Draft, name_of
from smolpost.importing.keys import Keys
from smolpost.importing.recognise import AXOLOTL, METHODS, OPTIONS, method_of, tool_of
from smolpost.screen import command_line, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `import_command` takes, under the same names."""
    parser.add_argument("file", type=Path, metavar="FILE", help="YAML settings of TRL, alignment-handbook or Axolotl")
    parser.add_argument("--from", dest="tool", choices=OPTIONS, help="whose file it is; default: told by its keys")
    parser.add_argument("--method", choices=METHODS, help="of TRL's files; default: told by the keys")
    parser.add_argument("--num-processes", type=int, metavar="N", help="ranks that trained; default 1")
    parser.add_argument("--out", type=Path, metavar="PATH.yaml", help="default: NAME_smolpost.yaml beside FILE")


def import_command(
    file: Path,
    *,
    tool: str | None = None,
    method: str | None = None,
    num_processes: int | None = None,
    out: Path | None = None,
) -> int:
    """Write the pipeline and print what became of each key of the file.

    Args:
        file, tool, ...: As `add_arguments` describes them; None is not stated.
    Returns:
        Exit code 0.
    Raises:
        UserError: The file cannot be read or translated, the pipeline that it gives is refused, or a file is in the
            way. Nothing is left behind.
    """
    from smolpost.importing import yaml_source
    from smolpost.importing.written import listing, pipeline_text

    console = screen.console()
    if num_processes is not None and num_processes < 1:
        raise UserError(f"--num-processes {num_processes} is below 1")
    content = yaml_source.read(file)
    name = name_of(file.stem)
    place = out or file.with_name(f"{name}_smolpost.yaml")
    if place.suffix != ".yaml":
        raise UserError(f"--out {place} does not end in .yaml; pipeline= takes files that do")
    draft, why = translated(file, content, tool, method, num_processes)
    template = place.with_suffix(".jinja") if draft.template is not None else None
    for path in (place, template):
        if path is not None and path.exists():
            raise UserError(f"{shown(path)} exists; remove it, or name another file with --out")
    if template is not None:
        key = f"stages.{draft.stage}.template"
        draft.settings[key] = replace(draft.settings[key], value=shown(template))
    empty = [key for key, value in content.items() if value is None]
    _write(file, place, template, draft, pipeline_text(draft, name, place, empty))
    console.print("\n".join(listing(draft, empty, max(40, console.width))), soft_wrap=True)
    console.print(f"\n{shown(file)}: {draft.tool} ({why})", soft_wrap=True)
    if draft.assumed:
        console.print(f"assumed: {draft.assumed}", soft_wrap=True)
    console.print(f"{shown(place)}: `{command_line(['smolpost', 'plan', f'pipeline={place}'])}`", soft_wrap=True)
    return 0


def translated(
    file: Path, content: dict, tool: str | None = None, method: str | None = None, num_processes: int | None = None
) -> tuple[Draft, str]:
    """The draft of a file's content, and how its tool and method were told."""
    from smolpost.importing import axolotl, trl

    owner, why = tool_of(content, tool, shown(file))
    keys = Keys(content, file)
    if owner == AXOLOTL:
        draft = Draft(file, keys, owner, axolotl.stage_of(keys))
        axolotl.translate(draft, num_processes)
        return draft, why
    method, reason = method_of(content, method, shown(file))
    draft = Draft(file, keys, owner, method)
    trl.translate(draft, method, num_processes)
    return draft, f"{why}; {method}: {reason}"


def _write(file: Path, place: Path, template: Path | None, draft: Draft, text: str) -> None:
    """Write the files and plan the pipeline; if that refuses it, remove them."""
    from smolpost.pipeline.plan import plan
    from smolpost.recipe import load

    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        if template is not None:
            write_text(template, draft.template)
        write_text(place, text)
        plan(load([f"pipeline={place}"]))
    except BaseException as error:
        for path in (place, template):
            if path is not None:
                path.unlink(missing_ok=True)
        if isinstance(error, UserError):
            line = str(error).removeprefix(f"{shown(place)}: ")
            raise UserError(f"{shown(file)}: the pipeline that it gives is refused: {line}") from None
        raise
