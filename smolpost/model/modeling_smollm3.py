"""SmolLM3: a decoder with grouped-query attention that leaves RoPE out of every few layers (NoPE).

Module and parameter names are those of transformers' own SmolLM3, so one checkpoint serves both, vLLM and llama.cpp.

Shapes: B rows, L tokens per row, S keys (cached + L), V vocabulary, H hidden, N query heads, K key/value heads,
D head size.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from smolpost.model.configuration_smollm3 import SmolLM3Config

MASK_BUILDERS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def head_size(config: SmolLM3Config) -> int:
    """D: `config.head_dim` where a checkpoint states one, else an equal share of the hidden size."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class SmolLM3RMSNorm(nn.Module):
    """Scale each vector to unit root mean square, then by a learned weight (arXiv:1910.07467)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H], same dtype."""
        # Squares overflow fp16 and lose their tail in bf16, so the norm itself is fp32; the weight is applied after
        # the cast, as the released checkpoints were trained.
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(hidden_states.dtype)

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


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of x [B, heads, L, D] by the angles behind cos and sin [B or 1, L, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


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
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
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
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: SmolLM3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, L, H] -> [B, L, H]."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


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
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class SmolLM3PreTrainedModel(PreTrainedModel):
    """What the library has to know of every SmolLM3 model; weights are initialised by its rules."""

    config_class = SmolLM3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["SmolLM3DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": SmolLM3DecoderLayer,
        "attentions": SmolLM3Attention,
    }


class SmolLM3Model(SmolLM3PreTrainedModel):
    """The decoder without a head.

    Packed rows: position ids that restart within a row mark a new document, and documents never see each other.
    Stock transformers needs `use_cache=False` and no attention mask for that, and leaks otherwise. Here neither
    matters, as long as the caller passes no cache of its own: see `_padding_mask`. Under torch.compile a mask of ones
    cannot be recognised, so compiled training on packed rows must leave the mask out. A cache returned for a packed
    row holds all of its documents and is not meant to be continued.
    """

    def __init__(self, config: SmolLM3Config):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(SmolLM3DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = SmolLM3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = SmolLM3RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: [B, L]; or give inputs_embeds.
            attention_mask: [B, S], 1 on tokens and 0 on padding; or masks ready for the attention function, 4-D or
                by layer type, as `generate` prepares them. None means that nothing is padding.
            position_ids: [B or 1, L]; None counts on from the cache. Restarts mark documents.
            past_key_values: Cache of earlier tokens, which this call appends to.
            inputs_embeds: [B, L, H], in place of input_ids.
            use_cache: Whether to return a cache; None reads the config.
            **kwargs: Reach the attention function as they are.
        Returns:
            Final states [B, L, H], the cache where use_cache, hidden states and attentions where asked for.
        Raises:
            ValueError: Both or neither of input_ids and inputs_embeds are given, or a packed row cannot be isolated.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {given}")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + past_length)[None]
        elif past_key_values is None:
            attention_mask = self._padding_mask(hidden_states, attention_mask, position_ids, kwargs)
        # A cache made below is still empty, so masks need not know of it; told of it, the library would no longer
        # separate documents.
        masks = self._attention_masks(hidden_states, attention_mask, position_ids, past_key_values)

        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        # Not strict: `from_pretrained(folder, num_hidden_layers=n)` keeps the first n layers and the whole list.
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=False):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def _padding_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        position_ids: torch.Tensor,
        attention_kwargs: dict[str, Any],
    ) -> torch.Tensor | dict | None:
        """Return the mask to build on, which is None where documents are packed, or refuse what would leak.

        The library separates documents by position ids only where it gets no mask. A mask of ones says nothing but
        that nothing is padding, so it is left out; one with padding says something, so it cannot be. Restarts next
        to padding are the padding's (left-padded generation) and no packing.
        """
        # Under a trace the values cannot be looked at; the library then separates wherever there is no mask.
        if torch.compiler.is_compiling() or isinstance(attention_mask, dict):
            return attention_mask
        if attention_mask is not None and attention_mask.shape[1:] != position_ids.shape[1:]:
            return attention_mask
        restarts = position_ids.diff(dim=-1) != 1
        if attention_mask is not None:
            real = attention_mask.to(position_ids.device, torch.bool)
            restarts = restarts & real[:, 1:] & real[:, :-1]
        if not restarts.any():
            return attention_mask

        if attention_mask is not None and not real.all():
            raise ValueError(
                "position_ids restart within a row (packed documents) and attention_mask has padding: the documents "
                "would see each other; leave attention_mask out, trailing padding is hidden by causality"
            )
        rows, implementation = inputs_embeds.shape[0], self.config._attn_implementation
        if rows > 1 and implementation.startswith("flash_attention") and "cu_seq_lens_q" not in attention_kwargs:
            raise ValueError(
                f"{implementation} separates packed documents in a batch of 1 row only, got {rows}: they would see "
                "each other; pass cu_seq_lens_q and its companions, or flatten the batch into one row"
            )
        return None

    def _attention_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        position_ids: torch.Tensor,
        past_key_values: Cache | None,
    ) -> dict[str, Any]:
        """Return the mask of each layer type in use, in the form the attention function wants."""
        if isinstance(attention_mask, dict):
            return attention_mask
        return {
            layer_type: MASK_BUILDERS[layer_type](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            for layer_type in set(self.config.layer_types)
        }


class SmolLM3ForCausalLM(SmolLM3PreTrainedModel, GenerationMixin):
    """The decoder with a language-model head, tied to the embedding where the config says so."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: SmolLM3Config):
        super().__init__(config)
        self.model = SmolLM3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Score the next tokens; arguments not listed are those of `SmolLM3Model.forward`.

        Args:
            labels: [B, L], compared with the logits one position earlier; -100 is ignored.
            logits_to_keep: Score only the last n positions (0: all), or those a tensor selects: [n] indices, [B, n]
                indices per row, or a [B, L] boolean mask, whose logits come out flat.
            **kwargs: Reach the attention function and the loss (`num_items_in_batch`: divisor of the summed loss).
        Returns:
            Loss where labels are given, logits [B, L, V] or the part kept, and what the decoder returns.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(keep_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def keep_positions(hidden_states: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """Select positions of hidden_states [B, L, H] before the head sees them; `keep` as `logits_to_keep` above."""
    if isinstance(keep, int):
        return hidden_states[:, -keep:] if keep else hidden_states
    if keep.dtype == torch.bool and keep.ndim == 2:
        return hidden_states[keep]
    if keep.ndim == 2:
        return hidden_states.take_along_dim(keep[..., None], dim=1)
    return hidden_states[:, keep]


class SmolLM3ForSequenceClassification(GenericForSequenceClassification, SmolLM3PreTrainedModel):
    """The decoder with a linear classifier on each row's last token that is no padding."""


class SmolLM3ForTokenClassification(GenericForTokenClassification, SmolLM3PreTrainedModel):
    """The decoder with a linear classifier on every token."""


class SmolLM3ForQuestionAnswering(GenericForQuestionAnswering, SmolLM3PreTrainedModel):
    """The decoder with start and end scores on every token."""

    # The name stock checkpoints of this head carry.
    base_model_prefix = "transformer"
