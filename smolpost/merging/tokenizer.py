"""The tokenizer and chat template of a merge, where a mergekit file asks for others than the base's."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from smolpost.files import write_json
from smolpost.merging.mergekit.plan import in_users_words


def template_text(stated: str, models: list[Any]) -> str | None:
    """The chat template that `chat_template` of a mergekit file means.

    Args:
        stated: A name of mergekit's (chatml, llama3, ...), "auto" (the one that most models have), or a template.
        models: mergekit's references to the models, for "auto"; of templates that equally many have, the first wins.
    Returns:
        None where no model has one.
    Raises:
        UserError: It is neither.
    """
    from mergekit.merge import _set_chat_template

    tokenizer = SimpleNamespace(chat_template=None)
    config = SimpleNamespace(chat_template=stated, referenced_models=lambda: models)
    with in_users_words("merge chat_template"):
        _set_chat_template(tokenizer, config)
    return tokenizer.chat_template


def write_tokenizer(folder: Path, tokenizer: Any, template: str | None) -> None:
    """Write a tokenizer, or only a chat template for the tokenizer in the folder.

    Args:
        tokenizer: None if the folder has one.
        template: Replaces the tokenizer's; None keeps it.
    """
    if tokenizer is not None:
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    elif template is not None:
        stated = folder / "tokenizer_config.json"
        if stated.exists():
            content = json.loads(stated.read_text(encoding="utf-8"))
            if content.pop("chat_template", None) is not None:
                write_json(stated, content)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
