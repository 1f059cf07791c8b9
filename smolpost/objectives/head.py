"""How a causal LM turns hidden states into logits, read from the model and proved on it."""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

SOFTCAP_KEYS = ("final_logit_softcapping",)
# Granite divides by its logits_scaling, HyperCLOVA X multiplies: `head_of` tries both and lets the model decide.
SCALE_KEYS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class Head(NamedTuple):
    """How a model turns a hidden state h into logits: x = scale * (weight h + bias), softcap * tanh(x / softcap).

    Attributes:
        weight: [V, H].
        bias: [V], or None.
        softcap: Bound on the size of logits, > 0, or None.
        scale: Factor on the logits.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a causal LM that makes the hidden states which its head reads, whatever its class calls it.

    Args:
        model: A causal LM of transformers, or peft's wrapper around one.
    Raises:
        ValueError: The model holds no such part beside its head.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    name = model.base_model_prefix
    if name not in dict(model.named_children()):
        raise ValueError(f"{type(model).__name__} has no decoder ({name}) beside its head; take a plain causal LM")
    return getattr(model, name)


def head_of(model: nn.Module) -> Head:
    """Read how a causal LM makes its logits, and prove it on the model's own forward.

    The forward is run, without its decoder and with a head of a few words in place of its own, and must return what
    `Head` says of fixed hidden states: whatever else a model does to its logits is thereby found, named in the
    configuration or not. It costs less than a millisecond, touches no weight and gathers no shard, so a step can
    afford to look the head up anew, as FSDP and peft, which replace it, demand.

    Args:
        model: A causal LM of transformers, or peft's wrapper around one.
    Raises:
        ValueError: The head is no plain linear layer (an adapter, quantised, patched), or the logits are made in a
            way that `Head` does not describe.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    layer = model.get_output_embeddings()
    check_linear(type(model).__name__, layer)
    config = model.config.get_text_config()
    known = [getattr(config, key, None) for key in SCALE_KEYS]
    scales = [1.0, *(scale for value in known if value for scale in (value, 1 / value))]
    softcaps = [*(getattr(config, key, None) for key in SOFTCAP_KEYS), None]
    actual, linear = stand_in_logits(model, layer)
    for scale, softcap in itertools.product(scales, softcaps):
        logits = linear * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if torch.allclose(logits, actual, rtol=1e-4, atol=1e-4):
            return Head(layer.weight, layer.bias, softcap or None, float(scale))
    raise ValueError(
        f"{type(model).__name__} does more to its logits than a linear layer, a factor ({', '.join(SCALE_KEYS)}) and "
        f"a softcap ({', '.join(SOFTCAP_KEYS)}) do; its log-probabilities would be wrong, so train another model"
    )


def check_linear(name: str, layer: nn.Module | None) -> None:
    """Refuse an output embedding whose weight does not say all about it."""
    if layer is None:
        raise ValueError(f"{name} has no output embedding; train a causal LM")
    # peft's copy that trains in place of the layer: its weight is the active one.
    wrapped = type(layer).__name__ == "ModulesToSaveWrapper"
    inner = layer.original_module if wrapped else layer
    # FSDP2 gives a module a class of its own, which inherits its forward.
    if type(inner).forward is not nn.Linear.forward or "forward" in vars(inner):
        raise ValueError(
            f"the output embedding of {name} is {type(inner).__module__}.{type(inner).__name__} with a forward of its "
            "own; log-probabilities are made from the weight of an nn.Linear, so free it of adapters, quantisation "
            "and patches (peft: leave it out of target_modules; modules_to_save may name it)"
        )
    if type(layer.weight) not in (Tensor, nn.Parameter, DTensor) or layer.weight.is_meta:
        raise ValueError(
            f"the output embedding of {name} has a {type(layer.weight).__name__} on {layer.weight.device} for a "
            "weight; load it as an ordinary tensor"
        )


class FixedOutput(BaseModelOutputWithPast):
    """A decoder's output that has whatever else a forward may pass on: nothing."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class FixedStates(nn.Module):
    """Stand-in for a model's decoder: hidden states that are always the same; attributes are the decoder's."""

    def __init__(self, states: Tensor, decoder: nn.Module):
        super().__init__()
        vars(self).update(states=states, decoder=decoder)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["decoder"], name)

    def forward(self, *args: Any, **kwargs: Any) -> FixedOutput:
        return FixedOutput(last_hidden_state=self.states)


def stand_in_logits(model: PreTrainedModel, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits [1, 2, 5] that a model's forward makes of fixed states [1, 2, 3], and those that a linear layer makes."""
    name, parts, decoder = type(model).__name__, dict(model.named_children()), decoder_of(model)
    at = [key for key, part in parts.items() if part is layer]
    if not at:
        raise ValueError(f"{name} does not hold its output embedding itself; take a plain causal LM")
    # An instance without the constructor, which would make a whole model, and without the hooks and patches.
    twin = object.__new__(type(model))
    vars(twin).update(vars(model))
    states = torch.tensor([[[1.0, -2.0, 4.0], [-8.0, 3.0, 0.5]]], device="cpu")
    weight = 4 * torch.linspace(-3, 3, 15, device="cpu").reshape(5, 3).sin()
    bias = None if layer.bias is None else torch.linspace(-1, 2, 5, device="cpu")
    head = nn.Linear(3, 5, bias=bias is not None, device="meta")  # meta: no random numbers are drawn
    head.weight = nn.Parameter(weight)
    head.bias = None if bias is None else nn.Parameter(bias)
    vars(twin)["_modules"] = {**parts, at[0]: head, model.base_model_prefix: FixedStates(states, decoder)}
    ids = torch.zeros(1, 2, dtype=torch.long, device="cpu")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            actual = type(model).forward(twin, input_ids=ids, return_dict=True).logits
        except Exception as error:
            raise ValueError(f"{name}.forward would not show how it makes its logits: {error}") from error
        return actual, nn.functional.linear(states, weight, bias)
