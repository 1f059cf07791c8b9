"""A checkpoint with new control tokens: what `smolpost add-tokens` writes."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolpost.errors import UserError
from smolpost.files import digest, hashes, sync, verify, workplace, write_json
from smolpost.pipeline import manifest
from smolpost.schema import ADDED_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = "generation_config.json"
IMAGES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def add_tokens(checkpoint: str, out: Path, *, template: str | None, tokens: list[str], multiple: int) -> dict:
    """Write a copy of a checkpoint that has a token for each control token that it lacks.

    With a template, the copy stores it, and stops at the token that ends its replies.

    Args:
        checkpoint: Folder, or Hub id.
        out: New folder.
        template: As `smolpost.chat.render.load_template` takes it; its tokens are added.
        tokens: Further ones.
        multiple: The number of rows of embedding and head is a multiple of it.
    Returns:
        The report of the manifest: `tokens` (token -> id), `vocab_size` and `stop_tokens` (ids) before and after.
    Raises:
        UserError: The folder is there, the checkpoint cannot be used, a token is not one, or none is missing; nothing
            is written.
    """
    from transformers import AutoTokenizer

    from smolpost.merging.files import copy_files
    from smolpost.model.grown import write_grown
    from smolpost.model.loading import check_usable, is_quantized, local_folder
    from smolpost.model.stored import CONFIG, read_config

    if out.exists():
        raise UserError(f"{out} exists; name a new folder")
    folder = local_folder(checkpoint, key=None)
    config = read_config(folder / CONFIG)
    if is_quantized(config):
        raise UserError(
            f"{folder} is quantized (quantization_config in {CONFIG}); take the checkpoint from before quantization"
        )
    check_usable(folder)
    verify(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = max(tokenizer.get_vocab().values()) + 1
    added = _extend(tokenizer, _missing(tokenizer, template, tokens, folder))
    before = config.get_text_config().vocab_size
    size = -(-max(before, first + len(added)) // multiple) * multiple
    with workplace(out) as work:
        unfinished = work / "out"
        unfinished.mkdir()
        write_grown(folder, config, unfinished, first, len(added), size)
        stops = _stop_at_turn_end(folder, tokenizer, template)
        _write_settings(folder, unfinished, size, stops)
        tokenizer.save_pretrained(unfinished)
        copy_files(folder, unfinished, IMAGES)
        check_usable(unfinished)
        report = {"tokens": added, "vocab_size": {"before": before, "after": size}, "stop_tokens": stops}
        files = hashes(unfinished)
        key = digest({name: entry["sha256"] for name, entry in files.items()})
        manifest.write(unfinished, files, kind=ADDED_TOKENS, key=key, report=report)
        sync(*unfinished.rglob("*"), unfinished)
        os.replace(unfinished, out)
    return report


def _missing(
    tokenizer: "PreTrainedTokenizerBase", template: str | None, tokens: list[str], folder: Path
) -> dict[str, bool]:
    """Token -> whether it is special, of those that the tokenizer does not have.

    The tags of think blocks and tool calls are not, so that readers of a reply see them.
    """
    from smolpost.chat.controls import STRUCTURE
    from smolpost.chat.needed_tokens import addable, split_tokens
    from smolpost.chat.render import load_template

    for token in tokens:
        if not token or token != "".join(token.split()):
            raise UserError(f"--tokens {token!r} is empty or has white space; give tokens such as '<|im_start|>'")
    wanted = addable(tokenizer, load_template(template)) if template else []
    wanted += [token for token in split_tokens(tokenizer, tokens) if token not in wanted]
    if not wanted:
        what = [f"every control token of the template {template}"] if template else []
        raise UserError(f"{folder} has a token for {' and '.join([*what, *tokens])}; nothing to add: use it as it is")
    return {token: token not in STRUCTURE for token in wanted}


def _extend(tokenizer: "PreTrainedTokenizerBase", tokens: dict[str, bool]) -> dict[str, int]:
    """Add the tokens; token -> id, ascending without gaps."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in tokens.items()])
    return dict(zip(tokens, tokenizer.convert_tokens_to_ids(list(tokens)), strict=True))


def _stop_at_turn_end(folder: Path, tokenizer: "PreTrainedTokenizerBase", template: str | None) -> dict[str, Any]:
    """Give the tokenizer the template and its end of a turn; where generation stops before and after.

    What the checkpoint stopped at stays: a base model ends a plain text with it. Where there is no padding token it
    becomes that, as trainers that pad with the stop token would not train the stop.
    """
    from smolpost.chat.render import load_template
    from smolpost.chat.turn_end import stop_token
    from smolpost.inference.generation import stored_stop_token_ids

    before = stored_stop_token_ids(folder)
    if template is None:
        return {"before": before, "after": before}
    tokenizer.chat_template = load_template(template)
    end = stop_token(tokenizer)
    if end is None:
        return {"before": before, "after": before}
    if tokenizer.pad_token is None and tokenizer.eos_token_id not in (None, end):
        tokenizer.pad_token = tokenizer.eos_token
    if "eos_token" not in tokenizer.chat_template:  # else another one would change the rendering
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return {"before": before, "after": list(dict.fromkeys([end, *before]))}


def _write_settings(folder: Path, out: Path, size: int, stops: dict[str, list[int]]) -> None:
    """config.json with the new size, and both files' stop tokens."""
    from smolpost.model.stored import CONFIG, read_json

    config = read_json(folder / CONFIG)
    config.get("text_config", config)["vocab_size"] = size
    changes = {"eos_token_id": stops["after"]} if stops["after"] != stops["before"] else {}
    if changes:
        config["eos_token_id"] = stops["after"][0]
    write_json(out / CONFIG, config)
    file = folder / SETTINGS
    if file.is_file() or changes:
        settings = read_json(file) if file.is_file() else {}
        if changes:
            settings.pop("_from_model_config", None)  # otherwise a loader may build it again from the config
        write_json(out / SETTINGS, settings | changes)
