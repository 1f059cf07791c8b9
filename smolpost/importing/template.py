"""Which chat template the imported stage has: the file's, the model's own, or one of ours that renders the same."""

import json
import re
from pathlib import Path

from smolpost.chat.render import load_template, render, render_spans
from smolpost.errors import UserError
from smolpost.importing.draft import Draft
from smolpost.schema import RELEASE_DAY

OURS = ("chatml", "smollm3_published", "smollm3")
RELEASED = "HuggingFaceTB/SmolLM3-3B"  # smollm3_published renders like its template
_ASKED, _TOLD = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}
_SYSTEM = {"role": "system", "content": "Answer briefly."}
_THOUGHT = {"role": "assistant", "content": "<think>\n2 + 2 = 4\n</think>\n4"}
# Conversations that tell templates apart: (messages, chat_template_kwargs).
PROBES = (
    ([_ASKED, _TOLD], {}),
    ([_SYSTEM, _ASKED, _TOLD, _ASKED, _TOLD], {}),
    ([_ASKED, _THOUGHT], {"enable_thinking": True}),
    ([_SYSTEM, _ASKED, _TOLD], {"enable_thinking": False}),
    ([{"role": "system", "content": "/no_think"}, _ASKED, _TOLD], {}),
    ([{"role": "system", "content": "/system_override Be terse."}, _ASKED, _TOLD], {}),
)


def from_text(draft: Draft, text: str, name: str) -> None:
    """Use the template that the file holds or names: under our name where it renders the same, else as a file.

    Args:
        name: The key that says it.
    """
    same = same_as(text)
    if same:
        note = f"renders the same in {len(PROBES)} conversations"
        draft.set(".template", same, name, note=note)
    else:
        draft.set(".template", None, name)
        draft.template = text
        if marks_more(text):
            draft.template = without_marks(text)
            what = "its {% generation %} marks hold more than replies; replies and their stop tokens train here"
            draft.differs(name, what)
    draft.set(".allow_template_change", True, note="the file sets its own template")
    if "strftime_now" in text:
        draft.differs(name, f"the date in training text is `today`, here {RELEASE_DAY}, and not the clock's")


def from_file(draft: Draft, path: str, name: str) -> None:
    """Use a .jinja file, or the template of another checkpoint."""
    for place in (Path(path), draft.file.parent / path):
        if place.suffix in (".jinja", ".jinja2", ".j2") and place.is_file():
            from_text(draft, place.read_text(encoding="utf-8"), name)
            return
    text = _of_checkpoint(path, None)
    if text is None:
        raise UserError(
            f"{draft.file}: {name}={path} is neither a .jinja file nor a checkpoint on this machine; correct it, or "
            "save the template as a .jinja file"
        )
    from_text(draft, text, name)


def of_model(draft: Draft, model: str, revision: str | None) -> None:
    """Use the model's own template: from its folder or the Hub's cache, else leave the choice to the user."""
    if model == RELEASED:
        draft.set(".template", "smollm3_published", note="renders like the template of the released model")
        draft.set(".allow_template_change", True, note="its text is another, its renderings are the same")
        return
    text = _of_checkpoint(model, revision)
    if text is not None:
        draft.set(".template", None, note=f"the template of {model}")
        draft.template = text
        return
    guess = "smollm3_published" if "smollm3" in model.lower() and "base" not in model.lower() else "chatml"
    draft.set(".template", guess, note="a guess: if the model has another template, preparation refuses this one")
    draft.differs(
        "chat template",
        f"the template of {model} is not on this machine, and {guess} is a guess; if preparation refuses it, "
        f"`hf download {model} chat_template.jinja tokenizer_config.json` brings it, and then import again",
    )


def same_as(text: str) -> str | None:
    """The template of OURS that renders all PROBES like this one, or None."""
    theirs = _rendered(text)
    return next((name for name in OURS if theirs == _rendered(load_template(name))), None) if theirs else None


def _rendered(text: str) -> list[str] | None:
    try:
        return [render(text, messages, template_kwargs=kwargs, today=RELEASE_DAY) for messages, kwargs in PROBES]
    except UserError:
        return None


def marks_more(text: str) -> bool:
    """Whether the template has {% generation %} marks that hold more than replies."""
    return re.search(r"{%[-+]?\s*generation\b", text) is not None and not _marks_replies(text)


def _marks_replies(text: str) -> bool:
    """Whether the marks begin after the generation prompt, in all PROBES."""
    for messages, kwargs in PROBES:
        options = {"template_kwargs": kwargs, "today": RELEASE_DAY}
        try:
            spans = render_spans(text, messages, **options)[1]
            prompt = render(text, messages[:-1], add_generation_prompt=True, **options)
        except UserError:
            return False
        if not spans or spans[-1][0] != len(prompt):
            return False
    return True


def without_marks(text: str) -> str:
    """The template without {% generation %} marks: the tags become conditions that hold, so that no space moves."""
    opened = re.sub(r"({%[-+]?\s*)generation(\s*[-+]?%})", r"\1if true\2", text)
    return re.sub(r"({%[-+]?\s*)endgeneration(\s*[-+]?%})", r"\1endif\2", opened)


def _of_checkpoint(name: str, revision: str | None) -> str | None:
    """The chat template in a checkpoint's folder, or in the Hub's cache on this machine."""
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        place = Path(name) / file if Path(name).is_dir() else _cached(name, file, revision)
        if place is None or not place.is_file():
            continue
        text = place.read_text(encoding="utf-8")
        if file.endswith(".json"):
            try:
                text = json.loads(text).get("chat_template")
            except ValueError:
                continue
        if isinstance(text, str) and text.strip():
            return text
    return None


def _cached(name: str, file: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
