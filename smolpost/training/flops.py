"""How many floating-point operations a prepared row needs in training, read from the model and the row's lengths."""

import numpy as np
from datasets import Dataset
from torch import nn

from smolpost.chat.fates import Fate
from smolpost.data.collate import PARTS
from smolpost.data.dataset_folder import list_lengths, list_sums
from smolpost.objectives.head import decoder_of
from smolpost.training.reference import pair_lengths, scored_tokens

# Fields of configurations whose models do not apply every matrix to every token, or whose heads have two sizes.
UNKNOWN_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank")


def row_flops(model: nn.Module, rows: Dataset) -> np.ndarray | None:
    """Needed floating-point operations of each row, forward and backward.

    A matrix counts 2 for each weight and token that it must be applied to, 2 for the gradient of its input, and 2 for
    its own gradient if it trains. The head is applied to scored tokens only. Attention counts 12 D for each pair of a
    query and a key that sees it, D being the width of all query heads of a layer. A pair's prompt counts once.
    Recomputation, padding, the scoring of a reference and elementwise work are not needed, or too little to count.

    Args:
        model: A causal LM of transformers, or peft's wrapper around one, before a backend wraps it.
        rows: N prepared rows: packs of documents, or preference pairs.
    Returns:
        [N] float64; None where rows or model are of another kind (experts, layers without attention).
    """
    layers, head = weight_flops(model), _linear_flops(model.get_output_embeddings())
    windows = attention_windows(model)
    if layers is None or windows is None or not {"seq_lengths", "chosen_ids"} & set(rows.column_names):
        return None
    tokens, scored = row_tokens(rows)
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attended = sum(windows.count(window) * attended_pairs(rows, window) for window in set(windows))
    return layers * tokens + head * scored + 12.0 * config.num_attention_heads * head_dim * attended


def weight_flops(model: nn.Module) -> float | None:
    """Operations of the decoder's matrices for each token; None if it has others than linear layers' and embeddings."""
    modules = list(decoder_of(model).modules())
    others = [module for module in modules if not isinstance(module, nn.Linear | nn.Embedding)]
    # ds_shape: of a parameter that ZeRO-3 has taken apart
    shapes = [getattr(p, "ds_shape", p.shape) for module in others for p in module.parameters(recurse=False)]
    if any(len(shape) > 1 for shape in shapes):
        return None
    return sum(_linear_flops(module) for module in modules if isinstance(module, nn.Linear))


def _linear_flops(layer: nn.Linear) -> float:
    return (6.0 if layer.weight.requires_grad else 4.0) * layer.in_features * layer.out_features


def attention_windows(model: nn.Module) -> list[int | None] | None:
    """The sliding window of each layer, None for full attention; None in the list's place where a layer is of another
    kind."""
    config = model.config.get_text_config()
    if any(getattr(config, field, None) for field in UNKNOWN_FIELDS):
        return None
    window = getattr(config, "sliding_window", None)
    known = {"full_attention": None, "sliding_attention": window}
    usual = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers
    return [known[kind] for kind in kinds] if set(kinds) <= set(known) else None


def row_tokens(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """[N] tokens and [N] scored tokens of packs or preference pairs."""
    if "seq_lengths" in rows.column_names:
        return list_lengths(rows, "input_ids"), list_sums(rows, "fates", lambda fates: fates == Fate.TRAINED)
    return pair_lengths(rows), scored_tokens(rows)


def attended_pairs(rows: Dataset, window: int | None) -> np.ndarray:
    """[N] pairs of a query and a key that it sees, of packs or preference pairs, in one layer."""

    def seen(length: np.ndarray) -> np.ndarray:
        """Of a sequence: its position i, from 1, sees the last min(i, window) positions."""
        within = length if window is None else np.minimum(length, window)
        return within * (within + 1) // 2 + (length - within) * within

    if "seq_lengths" in rows.column_names:
        return list_sums(rows, "seq_lengths", lambda lengths: seen(lengths.astype(np.int64)))
    prompt, chosen, rejected = (list_lengths(rows, f"{part}_ids") for part in PARTS)
    return seen(prompt + chosen) + seen(prompt + rejected) - seen(prompt)
