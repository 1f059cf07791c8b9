"""Make the Auto classes of this process resolve `model_type: smollm3` to our classes, and know our attention."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from smolpost.model import attention
from smolpost.model.configuration_smollm3 import SmolLM3Config
from smolpost.model.modeling_smollm3 import (
    SmolLM3ForCausalLM,
    SmolLM3ForQuestionAnswering,
    SmolLM3ForSequenceClassification,
    SmolLM3ForTokenClassification,
    SmolLM3Model,
)

AUTO_CLASSES = {
    AutoModel: SmolLM3Model,
    AutoModelForCausalLM: SmolLM3ForCausalLM,
    AutoModelForSequenceClassification: SmolLM3ForSequenceClassification,
    AutoModelForTokenClassification: SmolLM3ForTokenClassification,
    AutoModelForQuestionAnswering: SmolLM3ForQuestionAnswering,
}


def register() -> None:
    """Point the Auto classes at our config and models, in this process only; calling it again changes nothing.

    A stock `transformers.SmolLM3Config` object still resolves to the stock model: only checkpoints and our own config
    objects resolve to ours.
    """
    AutoConfig.register(SmolLM3Config.model_type, SmolLM3Config, exist_ok=True)
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(SmolLM3Config, model_class, exist_ok=True)
    attention.register()
