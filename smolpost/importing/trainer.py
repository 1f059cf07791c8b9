"""What tools share that train with transformers' Trainer: schedule, optimizer, batch, precision, adapters, launch."""

import json
import math
import re
from pathlib import Path
from typing import Any

from smolpost.importing.draft import Draft
from smolpost.importing.keys import Keys, tidy

FULL_ADAMW = ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "paged_adamw_32bit")
SCHEDULES = {
    "linear": "linear", "cosine": "cosine", "cosine_with_min_lr": "cosine", "constant": "constant",
    "constant_with_warmup": "constant", "warmup_stable_decay": "wsd",
}  # fmt: skip
KWARGS = "lr_scheduler_kwargs"
NO_CLIPPING = 1e9  # a gradient norm that is never reached


def schedule(draft: Draft, name: str, key: str) -> None:
    """Write the learning rate's course after the warmup.

    Args:
        name: transformers' name of it.
        key: The key that says the name.
    """
    kwargs = Keys(draft.keys.take(KWARGS, dict, {}), draft.file, f"{KWARGS}.")
    names = [key] if draft.keys.given(key) else []
    ours = SCHEDULES.get(name)
    draft.set(".lr_scheduler", ours or "cosine", *(names if ours else []))
    if ours is None:
        draft.differs(key, f"there is no schedule {name} here; cosine to 0 is written, linear and constant exist too")
    said = [KWARGS] if kwargs.values else []
    if name == "cosine_with_min_lr":
        draft.set(".min_lr_ratio", _min_ratio(draft, kwargs, key), *said)
    elif name == "warmup_stable_decay":
        _decay(draft, kwargs, key)
    elif name == "cosine" or ours is None:
        draft.set(".min_lr_ratio", 0.0)
    for extra in kwargs.unread():
        draft.differs(KWARGS, f"{extra} of the schedule {name} cannot be set here")


def _min_ratio(draft: Draft, kwargs: Keys, key: str) -> float:
    least, ratio = kwargs.take("min_lr", float), kwargs.take("min_lr_rate", float)
    if least is None and ratio is None:
        draft.broken(key, f"transformers refuses it without min_lr or min_lr_rate in {KWARGS}; 0 is written")
    peak = draft.settings[f"stages.{draft.stage}.learning_rate"].value
    return tidy(least / peak) if least and peak else ratio or 0.0


def _decay(draft: Draft, kwargs: Keys, key: str) -> None:
    """transformers counts the decay in steps, and here it is a share of all steps."""
    total = draft.settings.get(f"stages.{draft.stage}.max_steps")
    steps = kwargs.take("num_decay_steps", float)
    if steps is None:
        draft.broken(key, f"transformers refuses it without num_decay_steps in {KWARGS}")
    if steps is not None and total is not None:
        draft.set(".decay_ratio", tidy(steps / total.value), KWARGS)
    else:
        draft.set(".decay_ratio", 0.2)
        draft.differs(key, "the decay is a share of all steps here, not num_decay_steps; decay_ratio=0.2 is written")
    draft.set(".min_lr_ratio", kwargs.take("min_lr_ratio", float, 0.0), *([KWARGS] if kwargs.values else []))
    if kwargs.take("decay_type", str, "cosine") != "linear":
        draft.differs(key, "the decay is linear here; transformers' is a cosine unless decay_type is linear")


def warmup(draft: Draft, schedule_name: str, default: float = 0.0, note: str = "") -> None:
    """Write the warmup of `warmup_steps` or `warmup_ratio`; steps count before the ratio.

    Args:
        default: Share of all steps where the file says nothing.
        note: Of the default.
    """
    keys = draft.keys
    steps, ratio = keys.take("warmup_steps", float, 0.0), keys.take("warmup_ratio", float, 0.0)
    if schedule_name == "constant":
        draft.set(".warmup_ratio", 0.0)
        for name in ("warmup_steps", "warmup_ratio"):
            if keys.take(name, float, 0.0):
                draft.broken(name, "transformers' schedule constant has no warmup; constant_with_warmup has one")
    elif steps >= 1:
        draft.set(".warmup_steps", int(steps), "warmup_steps")
        if ratio:
            draft.broken("warmup_ratio", "warmup_steps counts before it")
    elif steps or ratio:
        draft.set(".warmup_ratio", steps or ratio, "warmup_steps" if steps else "warmup_ratio")
    elif keys.given("warmup_steps") or keys.given("warmup_ratio"):
        said = "warmup_ratio" if keys.given("warmup_ratio") else "warmup_steps"
        draft.set(".warmup_ratio", default, said, note=note)
    else:
        draft.set(".warmup_ratio", default, note=note)


def length(draft: Draft, epochs_key: str, default_epochs: float) -> None:
    """Write `max_steps`, or else the epochs."""
    steps = draft.keys.take("max_steps", int, -1)
    if steps > 0:
        draft.set(".max_steps", steps, "max_steps")
        if draft.keys.given(epochs_key):
            draft.keys.take(epochs_key, float)
            draft.broken(epochs_key, "max_steps counts before it")
        return
    if draft.keys.given("max_steps"):
        draft.left_out("max_steps", "no limit of steps; the epochs count")
    draft.copy(epochs_key, ".num_epochs", float, default_epochs)


def optimizer(draft: Draft, key: str, default: str = "adamw_torch_fused") -> None:
    """AdamW with full states is the one optimizer here."""
    name = draft.keys.take(key, str, default)
    if name in FULL_ADAMW:
        if draft.keys.given(key):
            draft.left_out(key, "AdamW with fp32 states, as here")
    elif "adamw" in name:
        draft.differs(key, "AdamW has states in fp32 here, without the rounding and with more memory")
    else:
        draft.differs(key, "AdamW is the optimizer here")
    draft.copy("weight_decay", ".weight_decay", float, 0.0)
    for beta, value in (("adam_beta1", 0.9), ("adam_beta2", 0.999), ("adam_epsilon", 1e-8)):
        draft.copy(beta, f".{beta}", float, value)
    if draft.settings[f"stages.{draft.stage}.weight_decay"].value:
        draft.differs("weight_decay", "it does not reach embeddings here; transformers' reaches them")
    norm = draft.keys.take("max_grad_norm", float, 1.0)
    note = "" if norm else "0 stands for no clipping"
    names = ["max_grad_norm"] if draft.keys.given("max_grad_norm") else []
    draft.set(".max_grad_norm", norm or NO_CLIPPING, *names, note=note)


def batch(draft: Draft, micro: int, names: list[str], processes: int, stated: str | None) -> None:
    """Write the batch of all ranks, and the launch.

    Args:
        micro: Rows per rank and forward pass.
        names: Keys of the file that say `micro` and the accumulation.
        processes: Ranks.
        stated: What says their number: a key of the file or an option; None where it was assumed.
    """
    accumulation = draft.keys.take("gradient_accumulation_steps", int, 1)
    note = f"{micro} at once x {accumulation} accumulated x {processes} process{'es' if processes > 1 else ''}"
    if stated is None:
        draft.assumed = "one process trained, as the file does not say how many; --num-processes N sets their number"
    draft.set(".global_batch_size", micro * accumulation * processes, *names, note=note)
    if draft.accelerate == "single" and processes > 1:
        draft.accelerate = "ddp"
    if draft.accelerate != "single":
        draft.set("accelerate.num_processes", processes, *([stated] if stated in draft.keys.values else []))


def precision(draft: Draft, bf16: bool | None, fp16: str | None, key: str) -> None:
    """
    Args:
        bf16: None: as the device has it.
        fp16: The key that asks for it, or None.
        key: The key that says bf16.
    """
    if fp16 and not bf16:
        draft.set(".precision", "bf16", note="there is no fp16 here")
        draft.differs(fp16, "there is no fp16 here; bf16 needs no loss scaling and rounds more coarsely")
    else:
        ours = "auto" if bf16 is None else "bf16" if bf16 else "fp32"
        draft.set(".precision", ours, *([key] if draft.keys.given(key) else []))


def activation_checkpointing(draft: Draft, key: str, default: bool) -> None:
    """
    Args:
        key: The key that says whether layers recompute, or, as Axolotl allows, that they offload.
        default: Of the tool.
    """
    keys, offloads = draft.keys, []
    if keys.take("activation_offloading", bool, False):
        offloads.append("activation_offloading")
    elif keys.given("activation_offloading"):
        draft.left_out("activation_offloading", "off, as here")
    if isinstance(said := keys.values.get(key), str) and said.startswith("offload"):
        keys.read.add(key)
        offloads.append(key)
    policy = "offload" if offloads else "full" if keys.take(key, bool, default) else "none"
    draft.set(".activation_checkpointing", policy, *(offloads or ([key] if keys.given(key) else [])))


def seed(draft: Draft, default: int = 42) -> None:
    value = draft.keys.take("seed", int, default)
    draft.set(".seeds", [value], *(["seed"] if draft.keys.given("seed") else []))


def checkpoints(draft: Draft) -> None:
    """Saving changes nothing that is trained."""
    keys = draft.keys
    steps = keys.take("save_steps", float)
    if steps is not None and steps >= 1 and keys.take("save_strategy", str, "steps") == "steps":
        draft.set(".save_steps", int(steps), "save_steps")
    for name in ("save_steps", "save_strategy"):
        if keys.given(name) and f"stages.{draft.stage}.save_steps" not in draft.settings:
            draft.left_out(name, "resumable checkpoints are saved every save_steps=500 optimizer steps")
    keys.read.add("save_strategy")
    kept = keys.take("save_total_limit", int)
    if kept is not None and kept >= 2:
        draft.set(".save_total_limit", kept, "save_total_limit")
    elif kept is not None:
        draft.left_out("save_total_limit", "2 checkpoints are kept: with one, a kill while saving loses all")
    logged = keys.take("logging_steps", float)
    if logged is not None and logged >= 1:
        draft.set(".logging_steps", int(logged), "logging_steps")
    elif logged is not None:
        draft.left_out("logging_steps", "a line is logged every 10 optimizer steps")


def lora(
    draft: Draft, targets: list[str], names: list[str], *, dropout: float, alpha: float, rslora: str, note: str = ""
) -> None:
    """Write the adapters.

    Args:
        targets: Names of linear layers, or ["all-linear"].
        names: Keys of the file that say them; none for the tool's default.
        dropout, alpha: The tool's defaults.
        rslora: The key that asks for rank-stabilised adapters.
        note: Of the targets.
    """
    keys = draft.keys
    rank = draft.copy("lora_r", ".lora.r", int, 16)
    scale = keys.take("lora_alpha", float, alpha)
    said = ["lora_alpha"] if keys.given("lora_alpha") else []
    if keys.take(rslora, bool, False):
        stable = f"{scale:g} x sqrt(r): a rank-stabilised adapter's product counts alpha / sqrt(r)"
        draft.set(".lora.alpha", tidy(scale * math.sqrt(rank)), *said, rslora, note=stable)
    else:
        draft.set(".lora.alpha", scale, *said)
    draft.copy("lora_dropout", ".lora.dropout", float, dropout)
    draft.set(".lora.target_modules", targets, *names, note=note)


def sharding(draft: Draft, deepspeed: Any, fsdp: bool) -> None:
    """Choose the accelerate config.

    Args:
        deepspeed: A file's path, its content, or None.
    """
    if deepspeed:
        stage = _zero_stage(draft.file, deepspeed)
        draft.accelerate = "zero3" if stage == 3 else "zero2"
        draft.left_out("deepspeed", f"recipes/accelerate/{draft.accelerate}.yaml shards as its ZeRO stage {stage} does")
    elif fsdp:
        draft.accelerate = "fsdp2"
        what = "recipes/accelerate/fsdp2.yaml shards; it wraps SmolLM3DecoderLayer, so copy it for another architecture"
        for name in ("fsdp", "fsdp_config", "fsdp_version"):
            if draft.keys.given(name):
                draft.left_out(name, what)
    draft.keys.read.update(("deepspeed", "fsdp", "fsdp_config", "fsdp_version"))


def _zero_stage(file: Path, deepspeed: Any) -> int:
    """The ZeRO stage of a DeepSpeed config: by its content, else by the file's name, else 3."""
    config = deepspeed
    if isinstance(deepspeed, str):
        for place in (Path(deepspeed), file.parent / deepspeed):
            try:
                config = json.loads(place.read_text(encoding="utf-8"))
                break
            except (OSError, ValueError):
                continue
    if isinstance(config, dict):
        zero = config.get("zero_optimization")
        found = zero.get("stage") if isinstance(zero, dict) else None
        return found if found in (0, 1, 2, 3) else 3
    named = re.search(r"(?:zero|stage)[_-]?([123])", str(deepspeed).lower())
    return int(named[1]) if named else 3
