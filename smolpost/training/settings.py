"""The fields of a training stage. Apart from the code that reads them, as a plan is made without torch."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from smolpost.data.settings import CompletionRows, DocumentRows, LabelledRows, PairRows, Rows
from smolpost.registry import LOSSES
from smolpost.schema import MISSING, SEEDS, choice, count, number, numbers, positive, registered, tuning


@dataclass
class LoRA:
    """Low-rank adapters (arXiv:2106.09685) in place of the full weights; the finished stage has them merged in."""

    r: int = number("[0, inf)", 0)  # rank of each adapter; 0: no adapters, all weights train
    alpha: float = positive(32.0)  # an adapter's product counts alpha / r
    dropout: float = number("[0, 1)", 0.0)  # of an adapter's input
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )  # linear layers that get an adapter, by the end of their names


# What a layer keeps of its forward pass for its backward pass (`training.activations`), the fastest first.
POLICIES = ("none", "selective", "full", "offload")

# Of TRL's DPOTrainer, which trains pairs under `engine: trl`.
TRL_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
TRL_SMOOTHED_LOSSES = ("exo_pair", "robust", "aot", "aot_unpaired")
# The losses that stay what they are under another measure of distance than reverse KL.
TRL_F_DIVERGENCE_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")


@dataclass
class TRLSFT:
    """What TRL's SFTTrainer has beside a stage's own settings."""

    loss_type: str = choice("nll", "dft")  # dft: each token's loss times its probability (arXiv:2508.05629)


@dataclass
class TRLPreference:
    """What TRL's DPOTrainer has beside a stage's own settings, under TRL's names."""

    loss_type: list[str] = field(default_factory=list)  # of TRL_LOSSES; []: the stage's `loss`
    loss_weights: list[float] = field(default_factory=list)  # one for each loss; []: 1
    label_smoothing: float = number("[0, 0.5)", 0.0)  # of exo_pair, robust, aot and aot_unpaired
    f_divergence_type: str = choice("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    f_alpha_divergence_coef: float = number("(0, inf)", 0.5)  # alpha of alpha_divergence
    discopop_tau: float = positive(0.05)
    use_weighting: bool = False  # WPO (arXiv:2406.11827)
    micro_batch_size: int = count(1)  # pairs per rank and forward pass; some losses depend on it
    precompute_ref_log_probs: bool = tuning(False)  # the reference's part before training, not beside it


@dataclass
class Training(Rows):
    """What all training shares."""

    init_from: str = MISSING  # stage name, or "checkpoint": model.checkpoint
    allow_template_change: bool = tuning(False)  # start from a checkpoint that was trained with another template
    allow_split_tokens: bool = tuning(False)  # train control tokens that the tokenizer lacks as ordinary text
    learning_rate: float = positive()  # peak
    min_lr_ratio: float = number("[0, 1)", 0.1)  # of the peak, where cosine and wsd end; linear ends at 0
    lr_scheduler: str = choice("cosine", "linear", "constant", "wsd")  # after the warmup
    decay_ratio: float = number("[0, 1)", 0.2)  # of all steps: wsd's linear decay at the end
    warmup_ratio: float = number("[0, 1)", 0.03)  # of all steps
    warmup_steps: int | None = count(None)  # optimizer steps; overrides warmup_ratio
    max_grad_norm: float = positive(0.2)
    weight_decay: float = number("[0, inf)", 0.1)  # not on embeddings, norms and biases
    adam_beta1: float = number("[0, 1)", 0.9)
    adam_beta2: float = number("[0, 1)", 0.95)
    adam_epsilon: float = positive(1e-8)
    num_epochs: float = positive(1.0)
    max_steps: int | None = count(None)  # optimizer steps; overrides num_epochs
    global_batch_size: int = count()  # rows (packs, or pairs) per optimizer step, on any number of ranks
    seeds: list[int] = numbers(SEEDS, 42)  # one checkpoint each; several make NAME-SEED
    precision: str = choice("auto", "bf16", "fp32")  # auto: bf16 on an accelerator, fp32 on a CPU
    rope_theta: float | None = positive(None)  # new RoPE base, for long-context stages
    max_position_embeddings: int | None = count(None)  # new longest context, tokens
    lora: LoRA = field(default_factory=LoRA)
    snapshot_steps: int | None = count(None)  # optimizer steps between weights kept for averages; null: none
    activation_checkpointing: str = tuning("auto", choices=("auto", *POLICIES))  # auto: the fastest that fits
    logging_steps: int = tuning(10, "[1, inf)")
    save_steps: int = tuning(500, "[1, inf)")  # optimizer steps between resumable checkpoints
    save_total_limit: int = tuning(2, "[2, inf)")  # resumable checkpoints kept; with 1, a kill while saving loses all
    report_to: list[str] = tuning(["tensorboard"])


@dataclass
class PackTraining(Training, DocumentRows):
    """On packs of documents."""

    engine: str = choice("smolpost", "trl")  # trl: TRL's trainer on the same rows
    shuffle_packs: bool = True  # a new order of the packs every epoch; false keeps the prepared order
    micro_batch_size: int = tuning(1, "[1, inf)")  # packs per rank and forward pass
    trl: TRLSFT = field(default_factory=TRLSFT)  # read under engine: trl


@dataclass
class PairTraining(Training, PairRows):
    """On preference pairs, beside a reference."""

    engine: str = choice("smolpost", "trl")  # trl: TRL's trainer on the same rows
    loss: str = registered(LOSSES, "apo_zero")  # TRL's names; sigmoid is DPO
    loss_settings: dict[str, Any] = field(default_factory=dict)  # of the loss alone, e.g. robust's label_smoothing
    beta: float = positive(0.05)  # scale on the log-ratios, per nat
    ld_alpha: float | None = number("[0, 1]", None)  # weight of tokens beyond the pair's shorter side (LD-DPO); null: 1
    sft_weight: float = number("[0, inf)", 0.0)  # of the chosen tokens' mean negative log-likelihood, added to the loss
    warmup_ratio: float = number("[0, 1)", 0.1)
    learning_rate: float = positive(1e-6)
    pack_tokens: int | None = tuning(None, "[2, inf)")  # tokens per forward pass, longer pairs alone; null: max_seq_len
    trl: TRLPreference = field(default_factory=TRLPreference)  # read under engine: trl


@dataclass
class KTOTraining(Training, LabelledRows):
    """On completions that are desired or not, beside a reference, by TRL's KTOTrainer (arXiv:2402.01306)."""

    loss: str = choice("kto", "apo_zero_unpaired")  # the latter without the KL estimate (arXiv:2408.06266)
    beta: float = positive(0.1)  # scale on the log-ratios, per nat
    desirable_weight: float = positive(1.0)  # of a desired completion's loss
    undesirable_weight: float = positive(1.0)  # of an undesired completion's loss
    # Rows per rank and forward pass. kto's KL estimate is their mean, over all ranks, so the result depends on it.
    micro_batch_size: int = count(4)
    warmup_ratio: float = number("[0, 1)", 0.1)
    learning_rate: float = positive(1e-6)

    engine: ClassVar[str] = "trl"


@dataclass
class DistillTraining(Training, CompletionRows):
    """On the student's own replies to prompts and on given ones, beside a teacher."""

    teacher: str = MISSING  # stage name, or "checkpoint"; with the student's tokenizer
    on_policy: float = number("[0, 1]", 1.0)  # share of the rows to which the student replies itself
    divergence_beta: float = number("[0, 1]", 1.0)  # 0: forward KL(teacher, student); 1: reverse KL; between: JSD
    temperature: float = positive(1.0)  # of the sampled replies, and of both distributions in the divergence
    top_p: float = number("(0, 1]", 1.0)  # share of the probability mass sampled from
    top_k: int = number("[0, inf)", 0)  # likeliest tokens sampled from; 0: all
    max_new_tokens: int = count(512)  # longest sampled reply
    micro_batch_size: int = tuning(1, "[1, inf)")  # rows per rank and forward pass
    kept_samples: int = tuning(16, "[0, inf)")  # sampled replies written to samples/ for each logged step

    engine: ClassVar[str] = "trl"


@dataclass
class PolicyTraining(Training, CompletionRows):
    """On rewarded replies of the model's own (GRPO, arXiv:2402.03300)."""

    rewards: dict[str, float] = field(default_factory=dict)  # names of `training/rewards.py` or a plugin -> weight
    reward_settings: dict[str, Any] = field(default_factory=dict)  # name -> settings of that reward
    num_generations: int = number("[2, inf)", 8)  # replies to each prompt, which are rewarded beside one another
    max_new_tokens: int = count(1024)  # longest reply, tokens
    temperature: float = positive(1.0)  # of the samples
    top_p: float = number("(0, 1]", 1.0)
    top_k: int = number("[0, inf)", 0)  # 0: all tokens
    loss: str = choice("dapo", "grpo", "bnpo", "dr_grpo")  # how tokens are averaged, in TRL's words
    scale_rewards: str = choice("group", "batch", "none")  # by whose standard deviation
    beta: float = number("[0, inf)", 0.0)  # weight of the KL divergence from the start checkpoint; 0: none
    micro_batch_size: int = count(1)  # replies per rank and forward pass
    kept_samples: int = tuning(16, "[0, inf)")  # replies written to samples/ for each logged step
    learning_rate: float = positive(1e-6)

    engine: ClassVar[str] = "trl"


def or_our_engine(stage: Training, where: str) -> str:
    """The end of a message whose remedy may also be our engine; "" where TRL alone trains the stage.

    Args:
        where: Key of the stage.
    """
    return f", or set {where}.engine=smolpost" if any(f.name == "engine" for f in fields(stage)) else ""
