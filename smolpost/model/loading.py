"""A checkpoint ready for inference on whatever this machine has."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_for_inference(checkpoint: str, revision: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (in eval mode, in the checkpoint's dtype, on the accelerator if there is one) and tokenizer.

    A CPU gets fp32 whatever the checkpoint holds: bf16 there is slower and not what fp32 training saw.
    """
    accelerator = torch.accelerator.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, revision=revision, dtype="auto" if accelerator else torch.float32
    )
    device = torch.accelerator.current_accelerator() if accelerator else torch.device("cpu")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(checkpoint, revision=revision)
