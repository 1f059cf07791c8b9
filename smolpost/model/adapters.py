"""Adapters of peft: every tensor of theirs finds its place, and adding them to the weights moves no logit."""

import re
import warnings

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from smolpost.errors import UserError
from smolpost.model.stored import one_line

NUM_PROBED = 64  # tokens that the logits before and after are made from
# How far a logit may move, relative to the largest: fp32's rounding, and no error that a user could notice.
LIMIT = 1e-4


def attach(model: PreTrainedModel, config: PeftConfig, state: dict[str, torch.Tensor], who: str) -> PeftModel:
    """Put adapters on a model.

    Args:
        model: In fp32; it is changed.
        state: The adapters' tensors, under the names that peft saves them with.
        who: The adapter in messages.
    Raises:
        UserError: The adapters are not this model's: a target is not there, a shape is another, a tensor is missing or
            left over. peft itself would go on without such tensors.
    """
    if config.is_prompt_learning:
        raise UserError(f"{who}: peft_type={config.peft_type.value} has no weights to merge; only adapters do")
    try:
        adapted = get_peft_model(model, config)
        result = set_peft_model_state_dict(adapted, state)
    except KeyError as error:
        raise UserError(f"{who} lacks tensor {error.args[0]}; save it with save_pretrained") from error
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{who} is not an adapter of {model.name_or_path}: {one_line(error)}") from error
    # A tied adapter is one parameter under two names, saved once.
    parameters = {name: id(parameter) for name, parameter in adapted.named_parameters(remove_duplicate=False)}
    read = {place for name, place in parameters.items() if name not in result.missing_keys}
    missing = [n for n in result.missing_keys if re.search(r"\.default(\.|$)", n) and parameters.get(n) not in read]
    if missing:
        fault = f"lacks tensor {min(missing)} ({len(missing)} such)"
    elif result.unexpected_keys:
        fault = f"holds tensor {min(result.unexpected_keys)} ({len(result.unexpected_keys)} such)"
    else:
        return adapted
    raise UserError(
        f"{who} {fault}, so it is not an adapter of {model.name_or_path}; give it the base model that it was trained on"
    )


@torch.no_grad()
def merge(adapted: PeftModel, who: str) -> PreTrainedModel:
    """Add the adapters to the weights, in place.

    A head that shares its matrix with the embedding gets its own first, as adapters of one of them would change both.
    It shares the matrix again where the two are equal afterwards; else the model is no longer tied, nor is its config.

    Args:
        adapted: In fp32, whole on one device.
        who: The adapter in messages.
    Raises:
        UserError: A logit moved.
    """
    adapted.eval()
    tied = adapted.get_base_model().config.tie_word_embeddings
    keeps_tied = getattr(adapted.active_peft_config, "ensure_weight_tying", False)
    tokens = _probed_tokens(adapted)
    before = adapted(input_ids=tokens).logits
    _untie(adapted)
    try:
        with warnings.catch_warnings(action="ignore"):  # peft's, of heads that are or were tied
            model = adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise UserError(f"{who} cannot be merged: {one_line(error)}") from error
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    model.config.tie_word_embeddings = tied and (keeps_tied or torch.equal(head.weight, embedding.weight))
    model.tie_weights()
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    moved = (model(input_ids=tokens).logits - before).abs().max().item()
    largest = before.abs().max().item()
    if not moved <= LIMIT * max(1.0, largest):  # NaN, too
        raise UserError(
            f"{who}: merged into its weights, the model's logits move by {moved:.3g} (largest {largest:.3g}); the "
            "adapters cannot be merged: keep them apart, or train without those of the embedding and the head"
        )
    return model


def _probed_tokens(adapted: PeftModel) -> torch.Tensor:
    """[1, L] tokens from all over the vocabulary, and such as the adapter names."""
    embedding = adapted.get_input_embeddings().weight
    size = embedding.shape[0]
    tokens = set(torch.linspace(0, size - 1, min(NUM_PROBED, size)).long().tolist())
    trained = getattr(adapted.active_peft_config, "trainable_token_indices", None) or []
    for indices in trained.values() if isinstance(trained, dict) else [trained]:
        tokens.update(indices[:NUM_PROBED])
    return torch.tensor([sorted(tokens)], device=embedding.device)


def _untie(model: nn.Module) -> None:
    """Give every module parameters of its own."""
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                parameter = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                module.register_parameter(name, parameter)
            seen.add(id(parameter))
