"""The layers of SmolLM3: norm, RoPE, grouped-query attention with or without RoPE, MLP.

Module and parameter names are those of transformers' own SmolLM3.

Shapes: B rows, L tokens per row, S keys (cached + L), H hidden, N query heads, K key/value heads, D head size.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from smolpost.model.configuration_smollm3 import SmolLM3Config
from smolpost.model.fused import add_rms_norm, autocast_dtype, rms_norm, rope, swiglu


def head_size(config: SmolLM3Config) -> int:
    """D: `config.head_dim` where a checkpoint states one, else an equal share of the hidden size."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class SmolLM3RMSNorm(nn.Module):
    """Scale each vector to unit root mean square, then by a learned weight (arXiv:1910.07467)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(
        self, hidden_states: torch.Tensor, update: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalize.

        Args:
            hidden_states: [..., H].
            update: [..., H], added to the hidden states first.
        Returns:
            [..., H], in autocast's dtype where it is on: all that reads it would cast it. With an update, the sum
            [..., H] and its norm.
        """
        options = self.weight, self.eps, autocast_dtype(hidden_states)
        if update is None:
            return rms_norm(hidden_states, *options)
        return add_rms_norm(hidden_states, update, *options)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class SmolLM3RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles (arXiv:2104.09864), stretched as `rope_parameters` says.

    `PreTrainedModel` refills the buffers after loading, by the names used here; `dynamic_rope_update` changes them
    with the sequence's length for the rope types that ask for it.
    """

    def __init__(self, config: SmolLM3Config):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.original_max_seq_len = self.max_seq_len_cached = config.max_position_embeddings
        frequencies = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: SmolLM3Config) -> tuple[torch.Tensor, float]:
        """Return plain RoPE's frequencies, [D / 2] radians per position, and its scale on cosines and sines, 1."""
        size = head_size(config)
        exponents = torch.arange(0, size, 2, dtype=torch.float) / size
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Position ids [B or 1, L] -> cosines and sines, each [B or 1, L, D] in x's dtype and on its device."""
        # bf16 cannot tell neighbouring positions apart beyond a few hundred, so angles are fp32 until they are small.
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        scale = self.attention_scaling
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, the one implementation that returns its probabilities.

    Args:
        module: The attention layer; its `num_key_value_groups` says how many query heads share a key head.
        query: [B, N, L, D].
        key: [B, K, S, D]; value alike.
        value: See key.
        attention_mask: [B, 1, L, S], added to the scores: 0 where a query sees a key, very negative elsewhere.
        scaling: Factor on the scores.
        dropout: Probability of dropping an attention weight; active in training mode only.
        **kwargs: What other attention functions understand.
    Returns:
        Output [B, L, N, D] and probabilities [B, N, L, S].
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SmolLM3Attention(nn.Module):
    """Grouped-query attention, with RoPE on most layers and without on the NoPE ones."""

    def __init__(self, config: SmolLM3Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = head_size(config)
        # The library's attention functions read these three from the module.
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True

        self.use_rope = bool(config.no_rope_layers[layer_idx])
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None

        query_size = config.num_attention_heads * self.head_dim
        key_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend and project back.

        Args:
            hidden_states: [B, L, H].
            position_embeddings: Cosines and sines, each [B or 1, L, D].
            attention_mask: Whatever the attention function's mask builder made; None where it needs none.
            past_key_values: Cache that this layer's keys and values are appended to.
            **kwargs: Handed to the attention function as they are (`position_ids`, `cu_seq_lens_q`, ...).
        Returns:
            [B, L, H], and the probabilities [B, N, L, S] where the attention function returns them.
        """
        rows_and_tokens = hidden_states.shape[:-1]
        per_head = (*rows_and_tokens, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(per_head).transpose(1, 2)
        key = self.k_proj(hidden_states).view(per_head).transpose(1, 2)
        value = self.v_proj(hidden_states).view(per_head).transpose(1, 2)

        if self.use_rope:
            query, key = rope(query, key, *position_embeddings, autocast_dtype(query))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*rows_and_tokens, -1)), weights


class SmolLM3MLP(nn.Module):
    """A gated MLP: SwiGLU (arXiv:2002.05202), or with another activation in place of SiLU."""

    def __init__(self, config: SmolLM3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.is_swiglu = config.hidden_act == "silu"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, L, H] -> [B, L, H]."""
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        return self.down_proj(swiglu(gate, up) if self.is_swiglu else self.act_fn(gate) * up)


class SmolLM3DecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and beside a residual connection."""

    def __init__(self, config: SmolLM3Config, layer_idx: int):
        super().__init__()
        self.self_attn = SmolLM3Attention(config, layer_idx)
        self.mlp = SmolLM3MLP(config)
        self.input_layernorm = SmolLM3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SmolLM3RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """[B, L, H] -> [B, L, H]; the keywords are those of `SmolLM3Attention.forward`."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states, normed = self.post_attention_layernorm(hidden_states, attended)
        return hidden_states + self.mlp(normed)
