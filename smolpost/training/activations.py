"""What a layer keeps of its forward pass for its backward pass; the rest is recomputed. Results do not change.

- none: all that backward reads.
- selective: the layer's input and the results of its matrix products and of its attention. Elementwise work is
  recomputed, and it is cheap. The layer's last product is not kept, as backward does not read its result.
- full: the layer's input. The layer runs a second time in the backward pass.
- offload: as full, with the layer's input in pinned host memory while it is not needed.
"""

import functools
import os
from collections.abc import Callable
from types import MethodType
from typing import Any

import psutil
import torch
from accelerate.utils import broadcast_object_list
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from smolpost.errors import UserError
from smolpost.model.fused import compiles
from smolpost.objectives.head import decoder_of
from smolpost.training.environment import Environment
from smolpost.training.memory import CPU_SHARE, SHARE, gigabytes, memory, setup_of, shape_of
from smolpost.training.settings import Training

PRODUCTS = tuple(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm"))
ATTENTION = ("_scaled_dot_product_", "_varlen_attn", "_flash_attn", "flash_attn")  # in the names of such operators


def policy_of(name: str, stage: Training, model: PreTrainedModel, environment: Environment) -> str:
    """The stage's policy; for `auto` the fastest one that fits, which is printed. All ranks call, and agree.

    Args:
        name: The stage.
        model: As loaded, before anything wraps it; with peft's adapters or without.
    """
    if stage.activation_checkpointing != "auto":
        return stage.activation_checkpointing
    policy, why = _fastest(stage, model, environment)
    if environment.world_size > 1:  # ranks that recompute gather weights again, so the others have to
        broadcast_object_list(agreed := [policy])
        [policy] = agreed
    if environment.rank == 0:
        print(f"stages.{name}.activation_checkpointing=auto takes {policy}: {why}", flush=True)
    return policy


def _fastest(stage: Training, model: PreTrainedModel, environment: Environment) -> tuple[str, str]:
    """A policy and the reason for it."""
    device = environment.device
    setup = setup_of(
        stage, bf16=environment.bf16, backend=_backend(environment), ranks=environment.world_size, device=device.type
    )
    shape = shape_of(model.config.get_text_config().to_dict(), compiled=compiles(device.type))
    if not checkpointed_layers(model):
        return "none", f"the layers of {type(model).__name__} cannot recompute"
    if setup is None:
        return "full", "how much memory TRL's trainers take is not known beforehand"
    if shape is None or device.type not in ("cuda", "cpu"):
        return "full", f"how much memory {type(model).__name__} takes on {device.type} is not known beforehand"
    found = memory(shape, setup)
    if device.type == "cpu":
        free = psutil.virtual_memory().available / environment.local_world_size + found.weights  # they are loaded
        policy = "none" if found.peak["none"] <= CPU_SHARE * free else "full"
        return policy, f"none needs {gigabytes(found.peak['none'])} GB of the {gigabytes(free)} GB that a rank has"
    total = torch.cuda.mem_get_info(device)[1]
    policy = found.fastest(SHARE * total)
    needs = ", ".join(f"{name} {gigabytes(peak)}" for name, peak in found.peak.items())
    return policy, f"the fastest within {SHARE:.0%} of the {gigabytes(total)} GB of this GPU ({needs} GB)"


def _backend(environment: Environment) -> str:
    """As `environment.backend_name`, before there is an accelerator to ask."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', 2)}"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp2"
    return "ddp" if environment.world_size > 1 else "single"


def checkpointed_layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can recompute: those of every decoder of transformers, with or without peft's wrapper."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def apply(name: str, model: PreTrainedModel, policy: str) -> None:
    """Make a model's layers keep what the policy says, in training mode. Call it once, before anything wraps the model.

    The layers recompute without reentrant autograd, so frozen inputs (LoRA) need no gradient of their own.

    Args:
        name: The stage, for the message.
        model: A causal LM of transformers, or peft's wrapper around one.
        policy: none, selective, full or offload.
    Raises:
        UserError: The model's layers cannot recompute.
    """
    if policy == "none":
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = checkpointed_layers(base)
    if not layers:
        raise UserError(
            f"stages.{name}.activation_checkpointing={policy}, but {type(base).__name__} has no layers that recompute; "
            f"set stages.{name}.activation_checkpointing=none"
        )
    settings: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, kept_by(base.config))
    for layer in layers:
        layer._gradient_checkpointing_func = functools.partial(checkpoint, **settings)
    # TRL's trainers switch recomputation off and on around generation, which would restore transformers' own function.
    base._set_gradient_checkpointing = MethodType(_switch, base)
    _switch(base)
    if policy == "offload" and torch.accelerator.is_available():
        _offload(base)


def _switch(model: PreTrainedModel, enable: bool = True, **_: Any) -> None:
    for layer in checkpointed_layers(model):
        layer.gradient_checkpointing = enable


def kept_by(config: PreTrainedConfig) -> Callable[..., CheckpointPolicy]:
    """Which results `selective` keeps: those of attention and of products that cost more than to read them again.

    A product over the MLP's inner size is a layer's last one. A product over few numbers, as of LoRA's second matrix,
    is as cheap as elementwise work.
    """
    text = config.get_text_config()
    last, least = getattr(text, "intermediate_size", None), getattr(text, "hidden_size", 0) // 2

    def policy(_: Any, operator: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
        keeps = _is_attention(operator)
        if operator in PRODUCTS:
            width = arguments[-1].shape[-2]  # numbers summed for each of the result's
            keeps = width >= least and width != last
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


@functools.cache
def _is_attention(operator: Any) -> bool:
    return any(part in str(operator) for part in ATTENTION)


def _offload(model: PreTrainedModel) -> None:
    """Move what the decoder's forward pass saves to the host; the head's tensors are needed at once."""
    from trl.models.activation_offloading import OffloadActivations

    offload = OffloadActivations()
    offload.update_model_params(model)
    decoder = decoder_of(model)
    decoder.register_forward_pre_hook(lambda *_: offload.__enter__() and None)
    decoder.register_forward_hook(lambda *_: offload.__exit__(None, None, None), always_call=True)
