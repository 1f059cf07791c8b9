"""How much memory of a device a training step takes, from the numbers of config.json. Needs no torch.

Symbols: T tokens of a forward pass, H hidden size, I inner size of the MLP, N query heads, K key heads, D head size,
V vocabulary, P parameters, w bytes of a number that is computed (2 under bf16, else 4). All results are bytes.

A layer keeps for its backward pass, per token:
- none: 2 (4 H + 4 + w H) for the inputs of its norms in fp32, their scales and their results; w (2 N + 2 K) D + 4 N for
  attention's inputs, output and log-sum-exps; 3 w I for the gate, the up projection and their product. Layers that are
  not fused (stock transformers, and ours on a CPU) add 2 (4 H) for the normed inputs in fp32 and w I for silu(gate).
- selective: 4 H for its input; w ((2 N + 2 K) D + H + 2 I) + 4 N for the products and attention.
- full: 4 H for its input.
- offload: nothing, but the inputs of a few layers are on their way to the host.

Beside all layers' part there are the final norm's input and result, the cosines and sines, and:
- the head: the gradient [V, H] of its weight in fp32, the weight in bf16, and its tiles;
- autocast's copies of the weights in bf16, with `none`: until the backward pass. Otherwise a layer's copies go with
  it, as the trainer switches autocast's cache off;
- the working set of a layer's backward pass: what it recomputes, the gradients of its activations and of a weight.
"""

import math
from dataclasses import dataclass
from typing import Any

from smolpost.training.settings import POLICIES, LoRA, PackTraining, PairTraining, Training

SHARE = 0.92  # of a device's memory that `auto` fills; the rest is for the CUDA context and fragmentation
CPU_SHARE = 0.5  # of the memory that is free: the rest of the machine needs some, too
ANYWHERE = 1e9  # bytes, for which every GPU has room
CARDS = (80e9, 141e9)  # bytes; what a plan shows `auto` for
TILES = {"cuda": 1.2 * 2**30, "cpu": 1.2 * 2**27}  # of the head, at most: `objectives.tiling`
IN_FLIGHT = 6  # layer inputs on the device under `offload`
# Configurations with these have matrices that not every token passes, or attention of another kind.
UNKNOWN = ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank")


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder of the usual kind: attention and a gated MLP in each layer.

    Attributes:
        fused: Elementwise work runs in `model.fused`'s compiled functions.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    fused: bool

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear layers, by the names that LoRA's targets have."""
        queries, keys = self.heads * self.head_size, self.key_heads * self.head_size
        return {
            "q_proj": (self.hidden, queries), "k_proj": (self.hidden, keys), "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden), "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner), "down_proj": (self.inner, self.hidden),
        }  # fmt: skip

    @property
    def layer_parameters(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.matrices.values()) + 2 * self.hidden

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.embedding * (1 if self.tied else 2) + self.hidden


def shape_of(config: dict[str, Any], compiled: bool) -> Shape | None:
    """The sizes that a config.json states; None where it is of another kind.

    Args:
        compiled: Whether `model.fused` compiles its functions, as it does on a GPU.
    """
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    sizes = hidden, config.get("intermediate_size"), config.get("num_hidden_layers"), heads
    if any(config.get(name) for name in UNKNOWN) or not all(sizes) or not config.get("vocab_size"):
        return None
    return Shape(
        *sizes,
        key_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or hidden // heads,
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", True)),
        fused=compiled and config.get("model_type") == "smollm3",
    )


@dataclass(frozen=True)
class Setup:
    """What a step's memory hangs on beside the model's shape.

    Attributes:
        tokens: Of the largest forward pass of a rank.
        passes: Forward passes of a rank in a step.
        bf16: Whether the computation is in bf16; weights stay in fp32.
        lora: The stage's; r=0: all weights train.
        backend: single, ddp, zero1 to zero3, or fsdp2.
        ranks: Over which a backend spreads what it spreads.
        device: cuda or cpu.
    """

    tokens: int
    passes: int
    bf16: bool
    lora: LoRA
    backend: str = "single"
    ranks: int = 1
    device: str = "cuda"

    @property
    def frozen_in_bf16(self) -> bool:
        """Whether the matrices that LoRA freezes are held in bf16: `adapters.frozen_in_bf16`."""
        return self.bf16 and bool(self.lora.r) and self.backend == "single"

    @property
    def width(self) -> int:
        """w: bytes of a number that is computed."""
        return 2 if self.bf16 else 4


def setup_of(stage: Training, *, bf16: bool, backend: str, ranks: int, device: str = "cuda") -> Setup | None:
    """What a stage asks for; None where TRL trains it, whose logits are not in the formula."""
    if stage.engine != "smolpost":
        return None
    if isinstance(stage, PairTraining):
        # Pairs are packed by length: how many passes a step has is known only with the rows.
        tokens, passes = stage.pack_tokens or stage.max_seq_len, 2
    elif isinstance(stage, PackTraining):
        tokens = stage.micro_batch_size * stage.max_seq_len
        passes = math.ceil(stage.global_batch_size / (stage.micro_batch_size * ranks))
    else:
        return None
    return Setup(tokens, passes, bf16, stage.lora, backend, ranks, device)


@dataclass(frozen=True)
class Memory:
    """Bytes on each device; `activations` and `peak` by policy."""

    weights: float
    gradients: float
    optimizer: float
    activations: dict[str, float]
    peak: dict[str, float]

    def fastest(self, available: float) -> str:
        """The first policy whose peak fits; the last one where none does."""
        return next((policy for policy in POLICIES if self.peak[policy] <= available), POLICIES[-1])


def memory(shape: Shape, setup: Setup) -> Memory:
    """What a training step takes, on each device."""
    weights, gradients, optimizer = states(shape, setup)
    w, tokens = setup.width, setup.tokens
    around = tokens * (4 * shape.hidden + 4 + w * shape.hidden + _normed(shape, setup) + 8 * shape.head_size)
    layer = {policy: tokens * kept_per_token(shape, setup, policy) for policy in POLICIES}
    activations = {policy: shape.layers * layer[policy] + around for policy in POLICIES}
    activations["offload"] = min(IN_FLIGHT, shape.layers) * layer["full"] + around
    if setup.device == "cpu":
        activations["offload"] = activations["full"]  # there is no other memory
    trains_head = not setup.lora.r
    head_gradient = 4.0 * shape.embedding * trains_head
    head = head_gradient + min(TILES[setup.device], tokens * shape.vocabulary * w)
    head += tokens * shape.hidden * (4 + 2 * w) + (w * shape.embedding if setup.bf16 else 0)
    # Autocast copies fp32 weights, and a layer that does not recompute keeps the copies for its backward pass.
    is_cast = setup.bf16 and setup.backend in ("single", "ddp") and not setup.frozen_in_bf16
    copies = dict.fromkeys(POLICIES, 0.0) | {"none": 2.0 * shape.layers * shape.layer_parameters * is_cast}
    before = gradients if setup.passes > 1 else 0.0  # gradients that an earlier pass of the step has left
    peak = {}
    for policy in POLICIES:
        working = _working_set(shape, setup, 0.0 if policy == "none" else layer["none"])
        forward = activations[policy] + copies[policy] + head
        backward = activations[policy] + copies[policy] + head_gradient + working
        peak[policy] = weights + optimizer + max(before + max(forward, backward), gradients + working)
    return Memory(weights, gradients, optimizer, activations, peak)


def states(shape: Shape, setup: Setup) -> tuple[float, float, float]:
    """Bytes of weights, gradients and AdamW's two moments on each device.

    Weights and gradients are fp32, but for frozen matrices that are held in bf16. DDP holds gradients a second time, in
    its buckets. Under DeepSpeed the model has the computation's precision, and the fp32 weights lie sharded beside
    AdamW's moments.
    """
    total = shape.parameters
    trained = total
    if setup.lora.r:
        trained = shape.layers * sum(setup.lora.r * sum(shape.matrices[name]) for name in _targets(shape, setup.lora))
        total += trained
    ranks, w = setup.ranks, setup.width
    if setup.backend.startswith("zero"):
        stage = int(setup.backend[-1])
        weights, gradients = w * total / (ranks if stage == 3 else 1), w * trained / (ranks if stage > 1 else 1)
        return weights, gradients, 12 * trained / ranks
    if setup.backend == "fsdp2":
        return 4 * total / ranks, 4 * trained / ranks, 8 * trained / ranks
    halved = 2.0 * shape.layers * (shape.layer_parameters - 2 * shape.hidden) * setup.frozen_in_bf16
    return 4.0 * total - halved, 4.0 * trained * (2 if setup.backend == "ddp" else 1), 8.0 * trained


def kept_per_token(shape: Shape, setup: Setup, policy: str) -> float:
    """Bytes that a layer keeps of each token from its forward pass to its backward pass, as the module's docstring has
    it. Under LoRA and bf16, peft casts the input of each target for itself, and frozen matrices keep nothing."""
    w, hidden, inner = setup.width, shape.hidden, shape.inner
    attention = w * 2 * (shape.heads + shape.key_heads) * shape.head_size + 4 * shape.heads
    if policy == "none":
        kept = 2 * (4 * hidden + 4 + w * hidden) + attention + 3 * w * inner
        if not shape.fused:
            kept += w * inner + 2 * _normed(shape, setup)
        if setup.lora.r:
            targets = _targets(shape, setup.lora)
            kept += w * setup.lora.r * len(targets)
            if setup.bf16:  # the norms' results and the product go, a copy of each target's input comes
                kept += w * (sum(shape.matrices[name][0] for name in targets) - 2 * hidden - inner)
        return kept
    if policy == "selective":
        return 4 * hidden + attention + w * (hidden + 2 * inner)
    return 4 * hidden if policy == "full" or setup.device == "cpu" else 0


def _normed(shape: Shape, setup: Setup) -> int:
    """Bytes that a norm keeps of a token for the gradient of its weight; none where it is fused or frozen."""
    return 0 if shape.fused or setup.lora.r else 4 * shape.hidden


def _working_set(shape: Shape, setup: Setup, recomputed: float) -> float:
    """Of a layer's backward pass, or of the embedding's where that is larger."""
    w = setup.width
    gradients = setup.tokens * (8 * shape.hidden + 2 * w * shape.inner)
    weight = (w + 4) * shape.hidden * shape.inner * (not setup.lora.r)
    gathered = w * shape.layer_parameters * (2 if setup.backend in ("zero3", "fsdp2") else 1)
    return max(recomputed + gradients + weight + gathered, 4 * shape.embedding * (not setup.lora.r))


def _targets(shape: Shape, lora: LoRA) -> list[str]:
    return [name for name in shape.matrices if name in lora.target_modules or "all-linear" in lora.target_modules]


def gigabytes(number: float) -> str:
    return f"{number / 1e9:.3g}"


def shown(found: Memory, setup: Setup) -> list[str]:
    """A plan's lines."""

    def by_policy(numbers: dict[str, float]) -> str:
        return ", ".join(f"{policy} {gigabytes(numbers[policy])}" for policy in POLICIES)

    if found.peak["none"] < ANYWHERE:
        return [
            f"memory of a GPU: {gigabytes(found.peak['none'])} GB with activation_checkpointing=none, which auto takes"
        ]
    cards = ", ".join(f"{found.fastest(SHARE * card)} on {card / 1e9:.0f} GB" for card in CARDS)
    return [
        f"memory of a GPU: weights {gigabytes(found.weights)} + gradients {gigabytes(found.gradients)} + AdamW "
        f"{gigabytes(found.optimizer)} GB; activations of {setup.tokens:,} tokens: {by_policy(found.activations)} GB",
        f"peak of a GPU: {by_policy(found.peak)} GB; activation_checkpointing=auto takes {cards}",
    ]
