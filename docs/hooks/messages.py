"""The page of all refusals, made from the code when the site is built: each message as it is written there."""

import ast
import html
from collections.abc import Iterator
from pathlib import Path

LIBRARY = Path(__file__).parent.parent.parent / "smolpost"
ERRORS = ("UserError", "Wrong")  # smolpost/errors.py
HEAD = """# All refusals

Each line is a message of the library, as the code has it; `...` stands for your names and values. Search this page
for some words of the line that you got. The remedy is usually the part after the last semicolon.
[Troubleshooting](troubleshooting.md) explains the common ones.
"""


def on_files(files, config):
    """MkDocs calls this when it has found the pages."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "messages.md", content=page()))
    return files


def page() -> str:
    rooms: dict[str, set[str]] = {}
    for file in sorted(LIBRARY.rglob("*.py")):
        rooms.setdefault(file.relative_to(LIBRARY).parts[0].removesuffix(".py"), set()).update(messages(file))
    parts = [HEAD]
    for room, found in rooms.items():
        if found:
            lines = "\n".join(f"- <code>{html.escape(message)}</code>" for message in sorted(found))
            parts.append(f"## {room}\n\n{lines}\n")
    return "\n".join(parts)


def messages(file: Path) -> Iterator[str]:
    """What a file's refusals say, with an ellipsis for each value; those that are values only are left out."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS:
            message = "".join(map(_text, node.args))
            if len(message.replace("...", "")) > 12:
                yield message


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    return "..."
