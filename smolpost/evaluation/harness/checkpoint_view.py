"""A checkpoint's folder as older libraries can read it, made of links: nothing that is written into it stays."""

import json
from pathlib import Path
from typing import Any

from smolpost.chat.clock import frozen
from smolpost.errors import UserError
from smolpost.merging.placed import place_weights
from smolpost.model.loading import check_plain

TEMPLATE = "chat_template.jinja"


def write_view(checkpoint: Path, view: Path, *, today: str, template: bool) -> None:
    """Link a checkpoint's files into a new folder; three files are rewritten, and so is a head stored alone.

    transformers 5 writes only `rope_parameters`; transformers 4 reads `rope_theta` and takes a default base where it
    is missing. It does not know the tokenizer class that transformers 5 writes either. The chat template gets a fixed
    date: a harness cannot give one, and prompts would change every day.

    Args:
        view: Does not exist.
        template: Whether a chat template is needed.
    Raises:
        UserError: A template is needed, and the checkpoint has none or several; or it would not load whole.
    """
    check_plain(checkpoint)
    view.mkdir()
    rewritten = {"config.json", "tokenizer_config.json", TEMPLATE}
    for file in checkpoint.iterdir():
        if file.is_file() and file.name not in rewritten and not file.match("*.safetensors*"):
            (view / file.name).symlink_to(file.resolve())
    place_weights(checkpoint, view, link=True)
    for name, content in (
        ("config.json", _config(_json(checkpoint / "config.json"))),
        ("tokenizer_config.json", _tokenizer_config(_json(checkpoint / "tokenizer_config.json"))),
    ):
        (view / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    if template:
        (view / TEMPLATE).write_text(frozen(_template(checkpoint), today), encoding="utf-8")


def _config(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters")
    if not rope:
        return config
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config | {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "torch_dtype": config.get("dtype"),
    }


def _tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in config.items() if key != "chat_template"}
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return config


def _template(checkpoint: Path) -> str:
    file = checkpoint / TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _json(checkpoint / "tokenizer_config.json").get("chat_template")
    if not isinstance(template, str):
        found = "several chat templates" if template else "no chat template"
        raise UserError(f"{checkpoint} has {found}; keep one as {TEMPLATE}, or set harness.apply_chat_template=false")
    return template


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
