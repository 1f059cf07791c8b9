"""What the pages of `smolpost inspect` and `smolpost sample` share.

Each is one file that needs no network and runs no script of others.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from smolpost.data.report import short
from smolpost.errors import UserError
from smolpost.files import write_bytes

MARK = '<meta name="generator" content="smolpost {}">'  # by which a page is known as one of a command of ours
HEAD_BYTES = 1000  # of a page, within which the mark stands


def write_html(file: Path, template: str, *, command: str = "inspect", **values: Any) -> int:
    """Render a template of this folder into a file, which is replaced in one step.

    Args:
        command: That writes the page.
    Returns:
        Bytes written.
    """
    content = _template(template).render(mark=Markup(MARK.format(command)), **values).encode("utf-8", "replace")
    write_bytes(file, content)
    return len(content)


def as_json(data: Any) -> Markup:
    """JSON that cannot end its script element, whatever the texts hold."""
    text = json.dumps(data, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def check_is_ours(file: Path, command: str = "inspect") -> None:
    """
    Args:
        command: That writes such pages.
    Raises:
        UserError: The file cannot be written, or it is something else than such a page.
    """
    if not file.parent.is_dir():
        raise UserError(f"--html {file}: the folder {file.parent} does not exist; make it or name another")
    if file.is_dir():
        raise UserError(f"--html {file} is a folder; name a file in it")
    if file.exists():
        with open(file, "rb") as there:
            if MARK.format(command).encode() not in there.read(HEAD_BYTES):
                raise UserError(
                    f"--html {file} exists and is not a page of `smolpost {command}`; remove it or give another name"
                )


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "csp_hash": _csp_hash}
    return environment.get_template(name)


def _csp_hash(script: str) -> str:
    """The script's name in the page's content security policy, which lets no other script run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
