"""A checkpoint by folder or Hub id: its files, or the model with every parameter from them."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from smolpost.errors import UserError
from smolpost.model.stored import CONFIG, Tensor, one_line, read_config, renames, stored_tensors

WEIGHTS = "*.safetensors"
FILES = ("*.json", WEIGHTS, "*.jinja", "*.txt", "tokenizer*")  # of a checkpoint
COMPARED = 2**24  # elements of two tensors compared at a time


def local_folder(
    checkpoint: str, revision: str | None = None, *, key: str | None = "model.checkpoint", weights: bool = True
) -> Path:
    """The checkpoint's folder; a Hub id is fetched into the Hub's cache first, safetensors and text files only.

    Args:
        key: Of the checkpoint in the recipe, for messages; None where no recipe names it.
        weights: Fetch them, too.
    Raises:
        UserError: There is no such folder, and the Hub cannot give it.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    wanted = [pattern for pattern in FILES if weights or pattern != WEIGHTS]
    try:
        return Path(snapshot_download(checkpoint, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # the Hub's own errors are both, no network among them
        reason = str(error).strip().splitlines()[0]
        place = f"as {key}=FOLDER" if key else "in its place"
        raise UserError(
            f"checkpoint {checkpoint}@{revision or 'main'} is no folder and cannot be fetched ({reason}); "
            f"give a folder {place}, or fetch it where there is a network"
        ) from None


def load_for_inference(checkpoint: Path, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (in eval mode, on the accelerator if there is one) and tokenizer.

    A CPU gets fp32 whatever the checkpoint holds: bf16 there is slower and not what fp32 training saw.

    Args:
        dtype: On an accelerator, e.g. "bfloat16"; "auto" is the checkpoint's.
    """
    accelerator = torch.accelerator.is_available()
    model = load_model(checkpoint, dtype=dtype if accelerator else torch.float32)
    device = torch.accelerator.current_accelerator() if accelerator else torch.device("cpu")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(checkpoint)


def load_model(
    folder: Path,
    *,
    config: PreTrainedConfig | None = None,
    renamed: dict[str, str] | None = None,
    who: str = "checkpoint",
    own_class: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A checkpoint's causal LM, every parameter of which comes from its files or from tying.

    Args:
        config: In place of the folder's.
        renamed: What `check_whole` returned. None checks here, which is not possible under ZeRO-3: there the library
            knows neither of tensors that are left over nor, on most ranks, of shapes.
        who: The checkpoint in messages.
        own_class: Load a model that is not among the causal LMs, as those of text and images, by its own class.
        options: Of `from_pretrained`: dtype, attn_implementation.
    Raises:
        UserError: The checkpoint would not load whole.
    """
    config = config or read_config(folder / CONFIG, who)
    if renamed is None:
        renamed = check_whole(folder, config, who, own_class=own_class)
    try:
        model, info = _load(folder, config, renamed, own_class, **options)
    except ImportError as error:
        raise UserError(f"{who}: {folder} cannot be loaded here ({one_line(error)})") from error
    if is_quantized(config):
        _refuse_parts(model, info, folder, who)
    if renamed:
        # Else save_pretrained would write the names as they were found.
        used = model._weight_conversions
        model._weight_conversions = [step for step in used if step.source_patterns[0] not in _patterns(renamed)]
    return model


def check_whole(
    folder: Path, config: PreTrainedConfig | None = None, who: str = "checkpoint", *, own_class: bool = False
) -> dict[str, str]:
    """Refuse a checkpoint from which a parameter would be missing, left over or of another shape.

    The library itself loads the files, onto the meta device: no weight is read.

    Returns:
        Stored name -> the model's, where they differ by what a wrapper put in; for `load_model`.
    Raises:
        UserError: With the first tensors and the remedy.
    """
    config = config or read_config(folder / CONFIG, who)
    stored = stored_tensors(folder, who)
    if is_quantized(config):  # needs its library, and a device, even to be looked at
        return {}
    renamed = renames(stored)
    try:
        with _silent():
            options = {"device_map": "meta", "ignore_mismatched_sizes": True, "generation_config": GenerationConfig()}
            model, info = _load(folder, config, renamed, own_class, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{who}: the model of {folder / CONFIG} cannot be built ({one_line(error)}); use a causal LM that the "
            "installed transformers knows"
        ) from error
    _refuse_parts(model, info, folder, who)
    _check_tied(model, stored, renamed, folder, who)
    if renamed and os.environ.get("RANK", "0") == "0":
        name = min(renamed)
        print(f"{who} {folder}: tensor {name} is read as {renamed[name]} ({len(renamed)} such)", flush=True)
    return renamed


def check_usable(folder: Path) -> None:
    """Refuse a checkpoint from elsewhere that lacks weights or its tokenizer.

    Raises:
        UserError: With the remedy.
    """
    check_whole(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; save the tokenizer beside the weights")


def check_plain(folder: Path, config: PreTrainedConfig | None = None) -> None:
    """As `check_whole`, for what other tools read: they do not know of names that a wrapper changed.

    Raises:
        UserError: With the remedy.
    """
    if renamed := check_whole(folder, config):
        raise UserError(
            f"checkpoint {folder}: only smolpost knows tensor {min(renamed)} as {renamed[min(renamed)]}; give all "
            f"plain names first: smolpost merge OUT {folder}=1"
        )


def is_quantized(config: PreTrainedConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _load(
    folder: Path, config: PreTrainedConfig, renamed: dict[str, str], own_class: bool, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    return (_own_class(config) if own_class else AutoModelForCausalLM).from_pretrained(
        folder,
        config=config,
        key_mapping=_patterns(renamed) or None,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )


def _own_class(config: PreTrainedConfig) -> type:
    [name] = config.architectures
    own = getattr(transformers, name, None)
    return AutoModelForCausalLM if own is None or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else own


def _patterns(renamed: dict[str, str]) -> dict[str, str]:
    """As the library wants them: regular expression -> name."""
    return {f"^{re.escape(name)}$": plain for name, plain in renamed.items()}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the library's progress bars and its table of what is missing: we say it in a line."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _refuse_parts(model: PreTrainedModel, info: dict[str, Any], folder: Path, who: str) -> None:
    """
    Args:
        info: What the library says of a load.
    """
    missing = sorted(info["missing_keys"] - model.all_tied_weights_keys.keys())
    unknown, shapes = sorted(info["unexpected_keys"]), sorted(info["mismatched_keys"])
    faults = []
    if missing:
        faults.append(f"lacks {_counted(missing)}")
    if unknown:
        faults.append(f"holds {_counted(unknown)} that {type(model).__name__} does not have")
    if shapes:
        _, stored, wanted = shapes[0]
        faults.append(
            f"holds {_counted([name for name, *_ in shapes])} with shape {list(stored)} in place of {list(wanted)}"
        )
    if faults:
        remedy = _remedy(model, missing, unknown, bool(shapes))
        raise UserError(f"{who} would not load whole: {folder} {' and '.join(faults)}; {remedy}")


def _counted(names: list[str]) -> str:
    return f"tensor {names[0]}" + (f" ({len(names)} such)" if len(names) > 1 else "")


def _remedy(model: PreTrainedModel, missing: list[str], unknown: list[str], shapes: bool) -> str:
    if any(".lora_" in name or ".base_layer." in name for name in unknown):
        return "merge its adapters (peft's merge_and_unload), then save it with save_pretrained"
    if shapes:
        return f"give it the {CONFIG} that was saved with these weights"
    tied = type(model)._tied_weights_keys or {}
    if missing and set(missing) <= set(tied) and not unknown:
        return f"set tie_word_embeddings=true in its {CONFIG} if it was trained so, else save it with its head"
    if not missing:
        return (
            f"if the model is to go without them, load it with {type(model).__name__}.from_pretrained and save it with "
            "save_pretrained"
        )
    return f"save it with save_pretrained from the model itself, or give it the {CONFIG} of these weights"


def _check_tied(
    model: PreTrainedModel, stored: dict[str, Tensor], renamed: dict[str, str], folder: Path, who: str
) -> None:
    """Refuse a second copy that differs: some tools would read one, some the other."""
    place = {renamed.get(name, name): (name, tensor) for name, tensor in stored.items()}
    prefix = f"{model.base_model_prefix}."
    for copy, source in model.all_tied_weights_keys.items():
        found = [place.get(name) or place.get(name.removeprefix(prefix)) for name in (copy, source)]
        if None in found:
            continue
        chunks = (_values(*one).split(COMPARED) for one in found)
        if not all(torch.equal(*pair) for pair in zip(*chunks, strict=True)):
            raise UserError(
                f"{who}: tie_word_embeddings=true, but {copy} is not {source} ({folder}); set it to false in {CONFIG} "
                f"if both were trained, else save the checkpoint without {copy}"
            )


def _values(name: str, tensor: Tensor) -> torch.Tensor:
    """The flattened values of a stored tensor, mapped: read from the disk where touched."""
    with safe_open(tensor.file, "pt") as opened:
        return opened.get_tensor(name).view(-1)
