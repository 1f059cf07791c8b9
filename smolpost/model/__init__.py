"""SmolLM3 as our own transformers model; importing this package registers it with the Auto classes."""

from smolpost.model.configuration_smollm3 import SmolLM3Config
from smolpost.model.modeling_smollm3 import (
    SmolLM3ForCausalLM,
    SmolLM3ForQuestionAnswering,
    SmolLM3ForSequenceClassification,
    SmolLM3ForTokenClassification,
    SmolLM3Model,
    SmolLM3PreTrainedModel,
)
from smolpost.model.register import register

register()

__all__ = [
    "SmolLM3Config",
    "SmolLM3ForCausalLM",
    "SmolLM3ForQuestionAnswering",
    "SmolLM3ForSequenceClassification",
    "SmolLM3ForTokenClassification",
    "SmolLM3Model",
    "SmolLM3PreTrainedModel",
    "register",
]
