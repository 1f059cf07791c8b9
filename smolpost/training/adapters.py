"""Low-rank adapters by peft: put on the model before training, merged into its weights after."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import PreTrainedModel

from smolpost.errors import UserError
from smolpost.schema import LoRA

ADAPTER = "lora_"  # what peft calls the adapters' parameters


def add_adapters(name: str, model: PreTrainedModel, lora: LoRA, seed: int) -> PeftModel:
    """Freeze the model and train adapters beside its linear layers; at the start they change nothing.

    Args:
        name: The stage, for the message.
        seed: Of the adapters' random half.
    Raises:
        UserError: A target module is no layer of the model.
    """
    for target in lora.target_modules:
        if not any(module.rpartition(".")[2] == target for module, _ in model.named_modules()):
            raise UserError(
                f"stages.{name}.lora.target_modules names {target}, which {type(model).__name__} does not have; its "
                f"linear layers: {', '.join(linear_layers(model))}"
            )
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def merged(base: PreTrainedModel, trained: PeftModel, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The start checkpoint with the trained adapters added to its weights, in its precision.

    Args:
        base: The start checkpoint, loaded anew; it is changed.
        trained: For its adapters' configuration; its own parameters may be sharded.
        state: Its whole state, gathered.
    """
    model = get_peft_model(base, trained.peft_config["default"])
    adapters = {name.replace(".default.", "."): value for name, value in state.items() if ADAPTER in name}
    set_peft_model_state_dict(model, adapters)
    return model.merge_and_unload()


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Last names of the model's linear layers but for its head."""
    head = model.get_output_embeddings()
    layers = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head]
    return sorted({name.rpartition(".")[2] for name in layers})
