"""The fields of a recipe. A name that is not here is a typo; `recipe` says so with the full key.

Every field says its meaning and unit. Fields marked `in_key=False` cannot change a stage's result
(to float tolerance), so changing them never redoes a finished stage.
"""

from dataclasses import dataclass, field
from typing import Any

MISSING = "???"  # OmegaConf's mark for a value the recipe must give
RELEASE_DAY = "08 July 2025"  # SmolLM3's; the date rendered into text where the recipe names no other


PACKED_ATTENTION = "packed"  # `smolpost.model.attention`, the one that keeps the sides of a pair apart
DTYPES = ("float32", "bfloat16", "float16")  # of merged weights
SEEDS = "[0, 4294967295]"  # what numpy, torch and Python all take
PREFERENCE_LOSSES = ("apo_zero", "apo_down", "sigmoid", "ipo", "robust")


def tuning(default: Any, interval: str | None = None) -> Any:
    """A field that changes how a stage runs, never what it makes: left out of the stage's cache key."""
    return _field(default, in_key=False, interval=interval)


def number(interval: str, default: Any = MISSING) -> Any:
    """A number that has to be in the interval, e.g. "[0, 1)" or "(0, inf)"."""
    return _field(default, interval=interval)


def count(default: Any = MISSING) -> Any:
    """A number of things, one at least."""
    return _field(default, interval="[1, inf)")


def positive(default: Any = MISSING) -> Any:
    """A number above 0."""
    return _field(default, interval="(0, inf)")


def seeded(default: int) -> Any:
    """A seed of random numbers."""
    return _field(default, interval=SEEDS)


def numbers(interval: str, *default: float) -> Any:
    """A list of numbers, one at least, each in the interval and none twice."""
    return _field(list(default), interval=interval, filled=True, distinct=True)


def some(*default: str) -> Any:
    """A list that holds at least one name."""
    return _field(list(default), filled=True)


def _field(default: Any, **metadata: Any) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def choice(*options: str) -> Any:
    """A field that takes one of the options; the first is the default."""
    return field(default=options[0], metadata={"choices": options})


# ---------------------------------------------------------------- data


@dataclass
class Source:
    """One set of rows inside a mixture."""

    path: str = MISSING  # JSONL (.gz, .zst) or Parquet file, glob pattern, folder, or Hub id
    stage: str | None = None  # the path is relative to this stage's output folder
    subset: str | None = None  # Hub config name, e.g. SFT
    split: str = "train"  # of a folder or Hub id; several joined by +
    revision: str | None = None  # Hub commit or tag
    columns: str = choice("smoltalk2", "sharegpt", "alpaca")  # shape of the rows in the file
    rename: dict[str, str] = field(default_factory=dict)  # column of the file -> the column it stands for
    roles: dict[str, str] = field(default_factory=dict)  # role of the file -> system, user, assistant or tool
    last_user_is_reply: bool = False  # a last user turn right after another one is a reply with a wrong label
    enable_thinking: bool | None = None  # the mode of conversations that do not say theirs; null: the template's own
    first_row: int = number("[0, inf)", 0)  # rows before it are left out, e.g. the training head of a held-out tail
    max_rows: int | None = count(None)  # at most this many rows, counted from first_row
    max_row_bytes: int = count(8 * 2**20)  # of a row in its file; larger ones are refused
    max_tokens: int | None = count(None)  # at most this many, of the rows kept by weight; training stages only
    weight: float = positive(1.0)  # epochs: share of the rows kept after a seeded shuffle; above 1 repeats rows
    share: float | None = number("(0, 1]", None)  # of the mixture, in share_of; rows beyond it are left out
    loss_weight: float = positive(1.0)  # of each trained token's loss (apo: each pair's), relative to other sources
    think_share: float | None = number("[0, 1]", None)  # of kept rows, those that train a think block; to within 0.01


@dataclass
class Hygiene:
    """Which rows of a mixture are removed; each one is listed in `dropped.jsonl` of the prepared rows."""

    exact: bool = False  # rows whose text an earlier row has, up to Unicode form and white space
    near: float = number("[0, 1]", 0.0)  # rows this similar to an earlier one (Jaccard index of word 5-grams); 0: off
    near_permutations: int = number("[16, 1024]", 128)  # of the MinHash that estimates it
    against: list[str] = field(default_factory=list)  # evaluation files; rows that share words with them in a row
    ngram: int = count(13)  # how many words in a row count as shared
    languages: list[str] = field(default_factory=list)  # ISO 639-1 codes that stay; empty: all
    min_confidence: float = number("(0, 1]", 0.5)  # of the detected language, below which a row stays


@dataclass
class Mixture:
    sources: dict[str, Source] = field(default_factory=dict)  # name in reports -> rows
    seed: int = seeded(0)  # of the per-source subsampling and of the shuffle
    shuffle: bool = True  # false keeps file order, source after source: a curriculum
    share_of: str = choice("tokens", "rows")  # what the sources' shares are shares of
    hygiene: Hygiene = field(default_factory=Hygiene)


# ---------------------------------------------------------------- model


@dataclass
class Architecture:
    """SmolLM3Config's fields for a model trained from scratch (transformers' names)."""

    hidden_size: int = count(2048)
    intermediate_size: int = count(11008)
    num_hidden_layers: int = count(36)
    num_attention_heads: int = count(16)
    num_key_value_heads: int = count(4)
    max_position_embeddings: int = count(32768)
    rope_theta: float = positive(2000000.0)
    rope_scaling: dict[str, Any] | None = None
    no_rope_layer_interval: int = count(4)
    no_rope_layers: list[int] | None = None
    tie_word_embeddings: bool = True
    initializer_range: float = number("[0, inf)", 0.02)
    rms_norm_eps: float = positive(1e-6)
    attention_bias: bool = False
    attention_dropout: float = number("[0, 1)", 0.0)
    mlp_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = count(None)


@dataclass
class Model:
    checkpoint: str | None = None  # Hub id or folder that stages without a parent start from; null: the init stage
    revision: str | None = None
    architecture: Architecture = field(default_factory=Architecture)
    attn_implementation: str = tuning(PACKED_ATTENTION)  # for training; not for apo: transformers' backends


# ---------------------------------------------------------------- stages


@dataclass
class Stage:
    kind: str = MISSING

    def parents(self) -> list[tuple[str, str]]:
        """(key, stage name or "checkpoint") of every checkpoint this stage reads."""
        return []

    def mixtures(self) -> list[tuple[str, str]]:
        """(key, mixture name) of every mixture under `data` this stage reads."""
        return []


@dataclass
class TaskBlock:
    """Rows of one synthetic task at one difficulty (`data/tasks.py` says what each task looks like)."""

    task: str = choice("recall", "copy", "chase")
    rows: int = count()
    length: int = count(64)  # characters of the user turn: copy the longest, recall exactly; chase ignores it
    pairs: int = count(8)  # recall: key-value pairs in the context
    queries: int = count(8)  # recall: keys asked for, drawn with replacement
    hops: int = count(4)  # chase: edges to follow
    think: bool = False  # chase: the reply writes the visited nodes in a think block
    verbose: float = number("[0, 1]", 0.0)  # chase: share of replies whose answer names the start as well


@dataclass
class TaskFile:
    blocks: dict[str, TaskBlock] = field(default_factory=dict)  # in file order
    replay: float = number("[0, 1)", 0.0)  # share of a block's text that is drawn from earlier blocks instead


@dataclass
class TasksStage(Stage):
    """Synthetic tasks with checkable answers, as SmolTalk2 JSONL files `NAME.jsonl`."""

    kind: str = "tasks"
    seed: int = seeded(0)
    files: dict[str, TaskFile] = field(default_factory=dict)


@dataclass
class InitStage(Stage):
    """A tokenizer built from the pipeline's own data, and random weights."""

    kind: str = "init"
    tokenizer: str = choice("bpe", "char")  # byte-level BPE, or one token per character
    vocab_size: int = count(8192)  # tokens, special ones included; the target for bpe, ignored by char
    tokenizer_data: list[str] = field(default_factory=list)  # mixtures whose text the tokenizer is built from
    template: str = "chatml"  # chat template stored with the checkpoint
    seed: int = seeded(0)

    def mixtures(self):
        return [("tokenizer_data", name) for name in self.tokenizer_data]


@dataclass
class LoRA:
    """Low-rank adapters (arXiv:2106.09685) in place of the full weights; the finished stage has them merged in."""

    r: int = number("[0, inf)", 0)  # rank of each adapter; 0: no adapters, all weights train
    alpha: float = positive(32.0)  # an adapter's product counts alpha / r
    dropout: float = number("[0, 1)", 0.0)  # of an adapter's input
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )  # linear layers that get an adapter, by the end of their names


@dataclass
class TrainStage(Stage):
    """What SFT and APO stages share."""

    init_from: str = MISSING  # stage name, or "checkpoint": model.checkpoint
    data: str = MISSING  # mixture name under data
    template: str = "smollm3"  # chat template: a name under smolpost/chat/templates or a .jinja file
    today: str = RELEASE_DAY  # date rendered into training text; frozen, or prepared data would change daily
    allow_template_change: bool = tuning(False)  # start from a checkpoint that was trained with another template
    train_roles: list[str] = some("assistant")  # whose turns train; [all]: every token
    train_reasoning: bool = True  # false: think blocks are context, the reply after them trains
    last_turn_only: bool = False  # train the last of those turns alone
    max_dropped: float = tuning(0.2, "[0, 1]")  # share of a source's rows; more dropped ones are refused
    max_seq_len: int = number("[2, inf)")  # tokens per row
    overlong: str = choice("refuse", "truncate", "split", "drop")  # samples longer than a row; pairs cannot be split
    learning_rate: float = positive()  # peak
    min_lr_ratio: float = number("[0, 1)", 0.1)  # of the peak, where cosine and wsd end; linear ends at 0
    lr_scheduler: str = choice("cosine", "linear", "constant", "wsd")  # after the warmup
    decay_ratio: float = number("[0, 1)", 0.2)  # of all steps: wsd's linear decay at the end
    warmup_ratio: float = number("[0, 1)", 0.03)  # of all steps
    max_grad_norm: float = positive(0.2)
    weight_decay: float = number("[0, inf)", 0.1)  # not on embeddings, norms and biases
    adam_beta1: float = number("[0, 1)", 0.9)
    adam_beta2: float = number("[0, 1)", 0.95)
    adam_epsilon: float = positive(1e-8)
    num_epochs: float = positive(1.0)
    max_steps: int | None = count(None)  # optimizer steps; overrides num_epochs
    global_batch_size: int = count()  # rows (sft: packs, apo: pairs) per optimizer step, on any number of ranks
    seeds: list[int] = numbers(SEEDS, 42)  # one checkpoint each; several make NAME-SEED
    precision: str = choice("auto", "bf16", "fp32")  # auto: bf16 on an accelerator, fp32 on a CPU
    rope_theta: float | None = positive(None)  # new RoPE base, for long-context stages
    max_position_embeddings: int | None = count(None)  # new longest context, tokens
    lora: LoRA = field(default_factory=LoRA)
    snapshot_steps: int | None = count(None)  # optimizer steps between weights kept for averages; null: none
    num_workers: int | None = tuning(None, "[1, inf)")  # processes that tokenize; null: one per core
    gradient_checkpointing: bool = tuning(True)
    logging_steps: int = tuning(10, "[1, inf)")
    save_steps: int = tuning(500, "[1, inf)")  # optimizer steps between resumable checkpoints
    save_total_limit: int = tuning(2, "[2, inf)")  # resumable checkpoints kept; with 1, a kill while saving loses all
    report_to: list[str] = tuning(["tensorboard"])

    def parents(self):
        return [("init_from", self.init_from)]

    def mixtures(self):
        return [("data", self.data)]


@dataclass
class SFTStage(TrainStage):
    kind: str = "sft"
    packing: str = choice("bfd", "wrapped", "none")
    shuffle_packs: bool = True  # a new order of the packs every epoch; false keeps the prepared order
    micro_batch_size: int = tuning(1, "[1, inf)")  # packs per rank and forward pass


@dataclass
class APOStage(TrainStage):
    kind: str = "apo"
    loss: str = choice(*PREFERENCE_LOSSES)  # TRL's names; sigmoid is DPO
    beta: float = positive(0.05)  # scale on the log-ratios, per nat
    label_smoothing: float = number("[0, 0.5)", 0.0)  # share of flipped pairs that loss=robust assumes
    ld_alpha: float | None = number("[0, 1]", None)  # weight of tokens beyond the pair's shorter side (LD-DPO); null: 1
    sft_weight: float = number("[0, inf)", 0.0)  # of the chosen tokens' mean negative log-likelihood, added to the loss
    warmup_ratio: float = number("[0, 1)", 0.1)
    learning_rate: float = positive(1e-6)
    pack_tokens: int | None = tuning(None, "[2, inf)")  # tokens per forward pass, longer pairs alone; null: max_seq_len


@dataclass
class PairsStage(Stage):
    """Preference rows: a stronger checkpoint's reply is chosen, a weaker one's rejected."""

    kind: str = "pairs"
    prompts: str = MISSING  # mixture name; each row's messages up to its last assistant turn
    chosen_from: str = MISSING  # stage of the stronger checkpoint
    rejected_from: str = MISSING  # stage of the weaker checkpoint
    template: str = "smollm3"  # of both checkpoints' prompts
    today: str = RELEASE_DAY
    max_new_tokens: int = count(256)
    temperature: float = number("[0, inf)", 0.6)
    top_p: float = number("(0, 1]", 0.95)
    keep: str = choice("different", "chosen_right", "right_and_wrong")  # the last two compare with the row's answer
    seed: int = seeded(0)
    batch_size: int = count(64)  # prompts per generate call; in the key, as it decides each batch's random numbers

    def parents(self):
        return [("chosen_from", self.chosen_from), ("rejected_from", self.rejected_from)]

    def mixtures(self):
        return [("prompts", self.prompts)]


@dataclass
class MergeStage(Stage):
    """A weighted mean of checkpoints; a stage with several seeds stands for their equal-weight soup."""

    kind: str = "merge"
    inputs: dict[str, float] = field(default_factory=dict)  # stage name or "checkpoint" -> weight; they sum to 1
    base: str = MISSING  # the input whose config, tokenizer and chat template the result has
    dtype: str = choice(*DTYPES)  # of the merged weights on disk; sums are fp32 throughout
    allow_template_change: bool = tuning(False)  # merge inputs that speak other chat templates than the base
    average: str = choice("final", "lawa", "ema")  # what an input stands for: its last weights, or a mean along its run
    average_last: int = count(5)  # lawa: snapshots, the final weights among them
    ema_decay: float = number("[0, 1)", 0.8)  # ema: per snapshot

    def parents(self):
        return [("inputs", name) for name in self.inputs]


@dataclass
class MergekitStage(Stage):
    """A merge by one of mergekit's methods or its YAML files, behind the checks of a linear one."""

    kind: str = "mergekit"
    inputs: dict[str, Any] = field(default_factory=dict)  # stage or "checkpoint" -> its parameters: {weight: 0.5}
    base: str = MISSING  # the input whose config, tokenizer and chat template the result has
    method: str | None = None  # mergekit's name, e.g. slerp, ties, dare_ties
    parameters: dict[str, Any] = field(default_factory=dict)  # of the whole merge, and defaults for the inputs'
    base_model: str | None = None  # the input that differences are taken from, where the method needs one
    config: str | None = None  # mergekit YAML that names the inputs as its models, in place of method and parameters
    dtype: str = choice(*DTYPES)  # of the merged weights on disk; a YAML has its own
    seed: int = seeded(0)  # of methods that draw numbers; with 0, the random_seed of a YAML that has one
    allow_template_change: bool = tuning(False)  # merge inputs that speak other chat templates than the base

    def parents(self):
        return [("inputs", name) for name in self.inputs]


@dataclass
class ChoosingStage(Stage):
    """What stages share that evaluate merges in memory and write the one that is chosen."""

    base: str = MISSING  # the input whose config, tokenizer and chat template the result has
    dtype: str = choice(*DTYPES)  # of the evaluated and of the written weights
    seed: int = seeded(1)  # of prompts and sampled replies; evaluation.seed, another, judges the result

    def metrics_used(self) -> list[tuple[str, str]]:
        """(key, "TASK/METRIC") of every score that chooses."""
        return []

    def tasks(self) -> list[str]:
        """Names of the evaluation tasks that have to be measured."""
        return list(dict.fromkeys(metric.removeprefix("-").partition("/")[0] for _, metric in self.metrics_used()))


@dataclass
class SweepStage(ChoosingStage):
    """The mixture of two checkpoints that a rule picks after each was evaluated (`selection/sweep.py` states it)."""

    kind: str = "sweep"
    start: str = MISSING  # weight 0: a stage, its soup where it has several seeds, or a merge stage
    added: str = MISSING  # weight 1, likewise: strong at long context
    weights: list[float] = numbers("[0, 1]", 0.05, 0.1, 0.15, 0.2, 0.3)  # of `added`; 0 and 1 always
    long: list[str] = field(default_factory=list)  # TASK/METRIC to raise; -TASK/METRIC where lower is better
    rest: list[str] = field(default_factory=list)  # what raising it may cost, likewise
    max_cost: float = number("[0, inf)", 0.02)  # of `rest` against weight 0, in its unit
    confident: bool = False  # the 95% interval of the cost has to be within max_cost, not only its mean

    def parents(self):
        return [("start", self.start), ("added", self.added)]

    def metrics_used(self):
        return [("long", metric) for metric in self.long] + [("rest", metric) for metric in self.rest]


@dataclass
class GreedyStage(ChoosingStage):
    """The equal-weight soup of the checkpoints that raise, or keep, a held-out score (arXiv:2203.05482, Recipe 1)."""

    kind: str = "greedy"
    inputs: list[str] = field(default_factory=list)  # stages; every seed is a candidate
    metrics: list[str] = field(default_factory=list)  # TASK/METRIC whose mean decides; -TASK/METRIC: lower is better

    def parents(self):
        return [("inputs", name) for name in self.inputs]

    def metrics_used(self):
        return [("metrics", metric) for metric in self.metrics]


STAGE_KINDS = {
    stage.kind: stage
    for stage in (
        TasksStage, InitStage, SFTStage, APOStage, PairsStage, MergeStage, MergekitStage, SweepStage, GreedyStage,
    )
}  # fmt: skip
MODEL_KINDS = ("sft", "apo", "merge", "mergekit", "sweep", "greedy")  # kinds that make a model worth evaluating


# ---------------------------------------------------------------- evaluation


@dataclass
class Evaluation:
    tasks: dict[str, Any] = field(default_factory=dict)  # name -> its settings; the order of the table's columns
    today: str = RELEASE_DAY  # date rendered into prompts
    seed: int = seeded(0)  # of prompts and sampled replies
    batch_tokens: int = tuning(16384, "[1, inf)")  # prompts and replies held at once; longer ones come alone
    server: str | None = tuning(None)  # URL of an OpenAI-compatible server that serves the checkpoint; null: here


@dataclass
class Harness:
    """Public benchmarks, run at full scale by somebody else's harness; its scores are joined into ours."""

    kind: str = choice("none", "lm_eval", "lighteval")
    tasks: list[str] = field(default_factory=list)  # by the harness's own names; groups too
    custom_tasks: str | None = None  # further tasks: YAML files' folder (lm_eval), Python file or module (lighteval)
    apply_chat_template: bool = True  # false: the bare text, as base models are asked; there are no modes then
    modes: list[str] = some("think", "no_think")
    likelihood_tasks: list[str] = field(default_factory=list)  # lighteval's, asked without thinking; lm_eval knows
    headline: dict[str, str] = field(default_factory=dict)  # task -> its metric in the table; default: its first one
    num_fewshot: int | None = number("[0, inf)", None)  # examples before a question; null: the task's own number
    limit: int | None = count(None)  # the first rows of each task only; null: all
    max_new_tokens: int | None = count(None)  # longest reply, thinking included; null: the task's own length
    temperature: float | None = number("[0, inf)", None)  # 0: greedy; null: the task's own (lighteval: greedy)
    top_p: float | None = number("(0, 1]", None)  # null: the task's own (lighteval: 1)
    seed: int = seeded(0)  # of sampled replies
    today: str = RELEASE_DAY  # date rendered into prompts
    batch_size: int = count(16)  # prompts per generate call (not vllm); in the key: it decides the random numbers
    backend: str = choice("vllm", "accelerate")  # of lighteval; accelerate: transformers
    environment: str | None = tuning(None)  # folder of the virtual environment that holds lighteval
    tensor_parallel_size: int = tuning(1, "[1, inf)")  # devices that share the model's weights; vllm only


# ---------------------------------------------------------------- the whole


@dataclass
class Recipe:
    pipeline: str = MISSING  # name; runs go to run_dir/pipeline
    run_dir: str = "runs"
    seed: int = seeded(0)  # from which a pipeline may take the seeds of its stages
    data_root: str | None = MISSING  # the user's data folder, where the pipeline's data files are named under it
    model: Model = field(default_factory=Model)
    data: dict[str, Mixture] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)  # name -> one of STAGE_KINDS
    evaluation: Evaluation = field(default_factory=Evaluation)
    harness: Harness = field(default_factory=Harness)  # of `smolpost eval`; `smolpost run` leaves it alone
    accelerate: dict[str, Any] = field(default_factory=dict)  # content of the chosen file under recipes/accelerate
