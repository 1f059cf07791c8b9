"""The pipeline file and the list of what became of each key, as text."""

import textwrap
from pathlib import Path
from typing import Any

import yaml

from smolpost.importing.draft import Draft, Group, Setting
from smolpost.screen import command_line, shown

WIDTH = 118  # of the comments


def pipeline_text(draft: Draft, name: str, place: Path, empty: list[str]) -> str:
    """The pipeline, commented, with the list at its end.

    Args:
        name: The pipeline's name.
        place: Where the file will be.
    """
    head = [
        "# @package _global_",
        f"# Written by smolpost import from {_inline(shown(draft.file))}, a file of {draft.tool}.",
        f"#   {command_line(['smolpost', 'plan', f'pipeline={_relative(place)}'])}",
        "defaults:",
        "  - /evaluation: none",
        f"  - /accelerate: {draft.accelerate}",
        "  - _self_",
        f"pipeline: {name}",
    ]
    tree: dict[str, Any] = {}
    order = {"model": 0, "data": 1, "stages": 2, "accelerate": 3}
    for ours in sorted(draft.settings, key=lambda key: order[key.partition(".")[0]]):
        *path, last = ours.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = draft.settings[ours]
    body = list(_lines(tree, "", draft))
    if draft.assumed:
        head.insert(3, f"# Assumed: {draft.assumed}.")
    listed = [f"# {line}".rstrip() for line in listing(draft, empty, WIDTH - 2)]
    return "\n".join([*head, *body, "", *listed, ""])


def listing(draft: Draft, empty: list[str], width: int) -> list[str]:
    """What became of each key, group after group.

    Args:
        empty: Keys of the file without a value.
        width: Of a line, in characters.
    """
    groups = {group: [(", ".join(names), what) for what, names in draft.said[group].items()] for group in Group}
    for ours, setting in draft.settings.items():
        if setting.keys:
            groups[Group.TRANSLATED].append((", ".join(setting.keys), f"{ours}={yaml_value(setting.value)}"))
    prefix = f"stages.{draft.stage}."
    own = [f"{o.removeprefix(prefix)}={yaml_value(s.value)}" for o, s in draft.settings.items() if _is_default(o, s)]
    if own:
        groups[Group.DEFAULT].append((", ".join(own), ""))
    if empty:
        groups[Group.LEFT_OUT].append((", ".join(empty), "they have no value"))
    lines = []
    for group in Group:
        if groups[group]:
            title = f"{group} ({draft.trainer})" if group in (Group.BROKEN, Group.DEFAULT) else str(group)
            lines += [*([""] if lines else []), f"{title[:1].upper()}{title[1:]}:"]
            for names, what in groups[group]:
                lines += _entry(names, what, width)
    return lines


def _is_default(ours: str, setting: Setting) -> bool:
    """Whether the value is one that the tool sets by itself, and not the frame of the pipeline."""
    frame = (".kind", ".init_from", ".data", ".template", ".allow_template_change", ".engine")
    return not setting.keys and ours.startswith("stages.") and not ours.endswith(frame)


def _entry(names: str, what: str, width: int) -> list[str]:
    text = f"{_inline(names)}  ->  {_inline(what)}" if what else _inline(names)
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)


def _lines(tree: dict[str, Any], indent: str, draft: Draft):
    for key, node in tree.items():
        if not isinstance(node, Setting):
            yield f"{indent}{key}:"
            yield from _lines(node, f"{indent}  ", draft)
            continue
        note = node.note
        if not node.keys and not note and indent.startswith("    ") and key not in ("kind", "init_from", "data"):
            note = f"{draft.trainer}'s default"
        line = f"{indent}{key}: {yaml_value(node.value)}"
        yield f"{line}   # {_inline(note)}" if note else line


def yaml_value(value: Any) -> str:
    """As YAML writes it in one line."""
    if isinstance(value, list | dict):
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
        return text.strip()
    return yaml.safe_dump(value, width=10**6, allow_unicode=True).partition("\n...")[0].strip()


def _inline(text: str) -> str:
    return " ".join(text.split())


def _relative(place: Path) -> str:
    path = shown(place)
    return path if path.startswith(("/", ".")) else f"./{path}"
