"""SmolLM3: a decoder with grouped-query attention that leaves RoPE out of every few layers (NoPE).

Module and parameter names are those of transformers' own SmolLM3, so one checkpoint serves both, vLLM and llama.cpp.

Shapes: B rows, L tokens per row, S keys (cached + L), V vocabulary, H hidden.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from smolpost.model.attention import NAME as PACKED
from smolpost.model.configuration_smollm3 import SmolLM3Config
from smolpost.model.layers_smollm3 import SmolLM3Attention, SmolLM3DecoderLayer, SmolLM3RMSNorm, SmolLM3RotaryEmbedding

MASK_BUILDERS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


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

        # The attention is told where documents begin, so nothing looks for that in the positions: on a GPU the host
        # would have to wait for them.
        is_laid_out = (
            self.config._attn_implementation == PACKED and attention_mask is None and past_key_values is None
        ) and any(kwargs.get(name) is not None for name in ("document_lengths", "pair_lengths"))
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + past_length)[None]
        elif past_key_values is None and not is_laid_out:
            attention_mask = self._padding_mask(hidden_states, attention_mask, position_ids, kwargs)
        # A cache made below is still empty, so masks need not know of it; told of it, the library would no longer
        # separate documents.
        masks = self._attention_masks(
            hidden_states, attention_mask, None if is_laid_out else position_ids, past_key_values
        )

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
        position_ids: torch.Tensor | None,
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
