"""Configuration of SmolLM3: the fields of transformers' own, checked before a model is built from them."""

import dataclasses
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

# The types that stretch the context by one number; the library only warns where it is unusable. Fields that single
# types need besides are left to the library's check.
_ROPE_TYPES_WITH_FACTOR = ("linear", "dynamic", "yarn", "llama3")
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")

logger = logging.get_logger(__name__)


@strict
class SmolLM3Config(PreTrainedConfig):
    """Architecture of a SmolLM3 model; the defaults are those of SmolLM3-3B.

    A saved `config.json` loads in stock transformers to the same configuration. It also carries `rope_theta` beside
    `rope_parameters`, because mlx-lm reads only that one and falls back to its own default in silence.

    The defaults of the special tokens are SmolLM3-3B's. One that a smaller vocabulary does not hold becomes None, with
    a warning.

    Args:
        vocab_size: Number of tokens the embedding and the head know.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Query heads per layer.
        num_key_value_heads: Key and value heads per layer, a divisor of `num_attention_heads`; None means as many
            (multi-head attention), 1 is multi-query, anything between grouped-query attention.
        hidden_act: Name of the MLP's activation.
        max_position_embeddings: Longest context in tokens the model is meant for.
        initializer_range: Standard deviation of the initial weights.
        rms_norm_eps: Added to the mean square inside RMSNorm.
        use_cache: Whether forward passes return keys and values by default.
        pad_token_id: Token whose embedding starts at zero and gets no gradient; None for no such token.
        bos_token_id: Token that begins a text.
        eos_token_id: Token, or tokens, that end a text.
        tie_word_embeddings: Whether the head shares the embedding's matrix.
        rope_parameters: `rope_theta`, `rope_type` (default, linear, dynamic, yarn, longrope, llama3) and what that
            type needs. The legacy spellings are accepted too: `rope_theta` and `rope_scaling` as arguments of their
            own, `type` for `rope_type`.
        use_sliding_window: Whether the NoPE layers attend to the last `sliding_window` tokens only.
        sliding_window: Window in tokens, the current one included.
        no_rope_layers: 1 where a layer uses RoPE, 0 where it does not (NoPE); at least one entry per layer.
        no_rope_layer_interval: Every n-th layer is NoPE where `no_rope_layers` is None.
        layer_types: "full_attention" or "sliding_attention" per layer; derived where None.
        attention_bias: Whether the attention's projections have a bias.
        attention_dropout: Dropout on attention probabilities while training, in [0, 1).
        mlp_bias: Whether the MLP's projections have a bias.
    Raises:
        ValueError: Fields contradict each other; the message names field, value, limit and remedy.
        huggingface_hub.errors.StrictDataclassFieldValidationError: A field has the wrong type.
    """

    model_type = "smollm3"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    default_theta = 2_000_000.0

    base_model_tp_plan: ClassVar[dict[str, str]] = {
        **{f"layers.*.self_attn.{name}_proj": "colwise" for name in ("q", "k", "v")},
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 128004
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001
    tie_word_embeddings: bool = True
    rope_parameters: dict | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: int = 4
    layer_types: list[str] | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill what is derived, check it, and let the library take the legacy and common arguments in `kwargs`."""
        self._drop_special_tokens()
        self._check_sizes()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_heads(kwargs.get("head_dim"))

        if self.no_rope_layers is None:
            self.no_rope_layers = self._every_nth_layer_without_rope()
        self._check_no_rope_layers()
        self._check_sliding_window()
        if self.layer_types is None:
            self.layer_types = [
                "sliding_attention" if self.use_sliding_window and not uses_rope else "full_attention"
                for uses_rope in self.no_rope_layers[: self.num_hidden_layers]
            ]
        self._check_layer_types()

        # The library fills these dicts in place; the caller's objects stay as they were.
        if self.rope_parameters is not None:
            self.rope_parameters = dict(self.rope_parameters)
        if kwargs.get("rope_scaling") is not None:
            kwargs["rope_scaling"] = dict(kwargs["rope_scaling"])
        rope_theta = kwargs.get("rope_theta")
        super().__post_init__(**kwargs)
        self._check_rope(rope_theta)

    @property
    def rope_scaling(self) -> dict:
        """The legacy name of `rope_parameters`."""
        return self.rope_parameters

    @rope_scaling.setter
    def rope_scaling(self, value: dict | None) -> None:
        # The library's setter forgets theta, so `from_pretrained(folder, rope_scaling=...)` would build a model
        # without one.
        self.rope_parameters = {"rope_theta": self.rope_parameters["rope_theta"], **(value or {})}
        self.standardize_rope_params()
        self._check_rope(None)

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON types, and RoPE's theta at the top level too."""
        return {**super().to_dict(), "rope_theta": self.rope_parameters["rope_theta"]}

    def validate_architecture(self) -> None:
        """Check the fields again; the library calls this before saving, when they may have been assigned to."""
        super().validate_architecture()
        self._check_sizes()
        self._check_heads(getattr(self, "head_dim", None))
        self._check_no_rope_layers()
        self._check_sliding_window()
        self._check_layer_types()

    def _drop_special_tokens(self) -> None:
        """Defaults that this vocabulary does not hold: no token of it is meant by them."""
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in _SPECIAL_TOKENS}
        outside = [name for name, value in defaults.items() if getattr(self, name) == value >= self.vocab_size]
        for name in outside:
            setattr(self, name, None)
        if outside:
            logger.warning(
                f"vocab_size={self.vocab_size} does not hold the default {', '.join(outside)}, which become None; set "
                "them to the tokenizer's"
            )

    def _every_nth_layer_without_rope(self) -> list[int]:
        interval = self.no_rope_layer_interval
        if interval < 1:
            raise ValueError(
                f"no_rope_layer_interval={interval} must be at least 1; for RoPE in every layer set "
                f"no_rope_layers={[1] * self.num_hidden_layers}"
            )
        return [int(number % interval != 0) for number in range(1, self.num_hidden_layers + 1)]

    def _check_sizes(self) -> None:
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        sizes += ["num_key_value_heads", "max_position_embeddings"]
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} must lie in [0, 1)")
        # Other special tokens outside of it do no harm to the model; -1 would be the last row to torch.
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id} has no row in the embedding, whose last is {self.vocab_size - 1} "
                f"(vocab_size={self.vocab_size}); set pad_token_id to the tokenizer's, or to None"
            )

    def _check_heads(self, head_dim: int | None) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            divisors = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(f"num_key_value_heads={groups} must divide num_attention_heads={heads}; try {divisors}")
        if head_dim is None:
            if self.hidden_size % heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}; "
                    f"try {heads * max(1, round(self.hidden_size / heads))}"
                )
            head_dim = self.hidden_size // heads
        if head_dim % 2:
            raise ValueError(
                f"head size {head_dim} (hidden_size={self.hidden_size} / num_attention_heads={heads}, or head_dim) is "
                f"odd, and RoPE rotates pairs; choose sizes that give {head_dim + 1}"
            )

    def _check_no_rope_layers(self) -> None:
        if len(self.no_rope_layers) < self.num_hidden_layers:
            raise ValueError(
                f"no_rope_layers has {len(self.no_rope_layers)} entries for num_hidden_layers="
                f"{self.num_hidden_layers}; give one per layer, 1 for RoPE and 0 for NoPE"
            )
        if unknown := sorted(set(self.no_rope_layers) - {0, 1}):
            raise ValueError(f"no_rope_layers holds {unknown}; its entries are 1 for RoPE and 0 for NoPE")

    def _check_sliding_window(self) -> None:
        if self.use_sliding_window and self.sliding_window is None:
            raise ValueError("use_sliding_window=True needs sliding_window, which is None; set it, in tokens")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be at least 1 token, or None for no window")

    def _check_layer_types(self) -> None:
        known = {"full_attention", "sliding_attention"}
        if unknown := sorted(set(self.layer_types) - known):
            raise ValueError(f"layer_types holds {unknown}; SmolLM3 knows {sorted(known)}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers={self.num_hidden_layers}; give "
                "one per layer, or None to derive them"
            )
        if "sliding_attention" in self.layer_types and not self.use_sliding_window:
            raise ValueError(
                "layer_types holds 'sliding_attention' but use_sliding_window=False; set use_sliding_window=True, or "
                "layer_types=None"
            )

    def _check_rope(self, rope_theta: float | None) -> None:
        """Check `rope_parameters` and, where it is not None, that the top-level `rope_theta` agrees with it."""
        rope = self.rope_parameters
        known = ["default", *(name for name in ROPE_INIT_FUNCTIONS if name != "proportional")]
        if rope.get("rope_type") not in known:
            raise ValueError(f"rope_parameters.rope_type={rope.get('rope_type')!r} is not one of {known}")
        theta = rope["rope_theta"]
        if not isinstance(theta, (int, float)) or theta <= 0:
            raise ValueError(f"rope_parameters.rope_theta={theta!r} must be a number above 0")
        if rope_theta is not None and rope_theta != theta:
            raise ValueError(
                f"rope_theta={rope_theta} and rope_parameters.rope_theta={theta} differ, and some tools read only the "
                "first; write the same value in both, or leave rope_theta out"
            )
        if rope["rope_type"] in _ROPE_TYPES_WITH_FACTOR:
            factor = rope.get("factor")
            if not isinstance(factor, (int, float)) or factor < 1:
                raise ValueError(
                    f"rope_parameters.factor={factor!r} must be a number of at least 1 for rope_type="
                    f"{rope['rope_type']!r}; set it to wanted context / trained context"
                )
