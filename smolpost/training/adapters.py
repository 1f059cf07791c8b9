"""Low-rank adapters by peft: put on the model before training, merged into its weights after."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from smolpost.errors import UserError
from smolpost.model.adapters import attach, merge
from smolpost.model.stored import one_line
from smolpost.training.settings import LoRA

ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the head


def check_targets(name: str, config: PreTrainedConfig, lora: LoRA) -> None:
    """Refuse targets that get no adapter, or one that could not be trained or merged; builds the model without weights.

    Args:
        name: The stage, for the message.
        config: Of the start checkpoint.
    Raises:
        UserError: With the target and what to name instead.
    """
    key = f"stages.{name}.lora.target_modules"
    if not lora.target_modules:
        raise UserError(f"{key} is empty; name linear layers, or [{ALL_LINEAR}]")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    targets = list(lora.target_modules)
    if ALL_LINEAR in targets and targets != [ALL_LINEAR]:
        raise UserError(f"{key}={targets}: {ALL_LINEAR} means all linear layers; use it without other names")
    for target in targets if targets != [ALL_LINEAR] else ():
        _check_target(key, target, model)
    try:
        get_peft_model(model, lora_config(lora), low_cpu_mem_usage=True)
    except ValueError as error:
        raise UserError(
            f"{key}={targets}: peft refuses it ({one_line(error)}); name linear layers, or [{ALL_LINEAR}]"
        ) from error


def _check_target(key: str, target: str, model: PreTrainedModel) -> None:
    layers = f"its linear layers: {', '.join(linear_layers(model))}"
    found = [module for name, module in model.named_modules() if f".{name}".endswith(f".{target}")]
    if not found:
        raise UserError(f"{key} names {target}, which {type(model).__name__} does not have; {layers}")
    if model.get_output_embeddings() in found:
        raise UserError(
            f"{key} names {target}, the head of {type(model).__name__}, whose log-probabilities are made from its "
            f"weight alone; leave it out, {layers}"
        )
    # An adapter of the embedding would have to be added to the head, too, or the two be saved apart: a checkpoint that
    # no longer merges with those of its family.
    if model.get_input_embeddings() in found and model.config.tie_word_embeddings:
        raise UserError(
            f"{key} names {target}, the embedding of {type(model).__name__}, whose matrix is its head's, too "
            f"(tie_word_embeddings=true); leave it out, {layers}"
        )


def lora_config(lora: LoRA) -> LoraConfig:
    """peft's configuration of a stage's `lora`."""
    targets = list(lora.target_modules)
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        task_type="CAUSAL_LM",
    )


def add_adapters(model: PreTrainedModel, lora: LoRA, seed: int) -> PeftModel:
    """Freeze the model and add trainable adapters to its linear layers; untrained, they change nothing.

    Args:
        lora: Its targets are checked.
        seed: Of the adapters' random half.
    """
    torch.manual_seed(seed)
    return get_peft_model(model, lora_config(lora))


def frozen_in_bf16(model: PeftModel) -> None:
    """Keep the frozen matrices of linear layers in bf16, as autocast reads them, at half the memory.

    The head, embeddings, norms and adapters stay as they are. The numbers under bf16 autocast do, too: it rounds these
    matrices in every pass otherwise, as it keeps copies only of weights that train.
    """
    head = model.get_base_model().get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head and not module.weight.requires_grad:
            module.weight.data = module.weight.data.bfloat16()


def merged(base: PreTrainedModel, trained: PeftModel, state: dict[str, torch.Tensor], who: str) -> PreTrainedModel:
    """The start checkpoint with the trained adapters added to its weights, in its precision.

    Args:
        base: The start checkpoint, loaded anew; it is changed.
        trained: For its adapters' configuration; its own parameters may be sharded.
        state: Its whole state, gathered.
        who: The adapters in messages.
    Raises:
        UserError: The merged model is not the trained one.
    """
    adapters = get_peft_model_state_dict(trained, state_dict=state, save_embedding_layers=False)
    return merge(attach(base, trained.peft_config["default"], adapters, who), who)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Last names of the model's linear layers but for its head."""
    head = model.get_output_embeddings()
    layers = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head]
    return sorted({name.rpartition(".")[2] for name in layers})
