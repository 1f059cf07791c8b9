"""Which parameters AdamW decays."""

from torch import nn


def decayed_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters with weight decay: the matrices, without embeddings (SmolLM3 follows OLMo 2 here).

    Norm weights and biases are vectors and are left out too; a head tied to the embedding is the embedding.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    # Under ZeRO-3 a parameter's own shape is empty here; DeepSpeed keeps the full one in ds_shape.
    return [
        name
        for name, parameter in model.named_parameters()
        if len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and id(parameter) not in embeddings
    ]
