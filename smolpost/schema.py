"""The fields of a recipe. A name that is not here is a typo; `recipe` says so with the full key.

Every field says its meaning and unit. Fields marked `in_key=False` cannot change a stage's result
(to float tolerance), so changing them never redoes a finished stage.
"""

from dataclasses import dataclass, field
from typing import Any

from smolpost.registry import ROW_SHAPES, Registry

MISSING = "???"  # OmegaConf's mark for a value the recipe must give
RELEASE_DAY = "08 July 2025"  # SmolLM3's; the date rendered into text where the recipe names no other


PACKED_ATTENTION = "packed"  # `smolpost.model.attention`, the one that keeps the sides of a pair apart
ADDED_TOKENS = "added tokens"  # kind of a checkpoint that `smolpost add-tokens` made, in its manifest
DTYPES = ("float32", "bfloat16", "float16")  # of merged weights
SEEDS = "[0, 4294967295]"  # what numpy, torch and Python all take


def tuning(default: Any, interval: str | None = None, choices: tuple[str, ...] | None = None) -> Any:
    """A field that changes how a stage runs and never its result, so it is not in the stage's key."""
    return _field(default, in_key=False, interval=interval, choices=choices)


def number(interval: str, default: Any = MISSING) -> Any:
    """A number that has to be in the interval, e.g. "[0, 1)" or "(0, inf)"."""
    return _field(default, interval=interval)


def count(default: Any = MISSING) -> Any:
    """A number of things, at least one."""
    return _field(default, interval="[1, inf)")


def positive(default: Any = MISSING) -> Any:
    """A number above 0."""
    return _field(default, interval="(0, inf)")


def seeded(default: int) -> Any:
    """A seed of random numbers."""
    return _field(default, interval=SEEDS)


def numbers(interval: str, *default: float) -> Any:
    """A list of different numbers, at least one, each in the interval."""
    return _field(list(default), interval=interval, filled=True, distinct=True)


def some(*default: str) -> Any:
    """A list that holds at least one name."""
    return _field(list(default), filled=True)


def _field(default: Any, **metadata: Any) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def registered(registry: Registry, default: str) -> Any:
    """A field that takes the name of an entry, including entries that plugins add later."""
    return field(default=default, metadata={"choices": registry})


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
    columns: str = registered(ROW_SHAPES, "smoltalk2")  # shape of the rows in the file
    rename: dict[str, str] = field(default_factory=dict)  # column of the file -> the column it stands for
    roles: dict[str, str] = field(default_factory=dict)  # role of the file -> system, user, assistant or tool
    last_user_is_reply: bool = False  # a last user turn right after another one is a reply with a wrong label
    enable_thinking: bool | None = None  # the mode of conversations that do not say theirs; null: the template's own
    mode_from_reply: bool = False  # in place of it: they think if their last reply has a think block
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
    note: str = ""  # what its user should know, printed by `plan`
    run_dir: str = "runs"
    seed: int = seeded(0)  # from which a pipeline may take the seeds of its stages
    plugins: list[str] = field(default_factory=list)  # modules of the user's own (`recipe/plugins.py`)
    data_root: str | None = MISSING  # the user's data folder, where the pipeline's data files are named under it
    model: Model = field(default_factory=Model)
    data: dict[str, Mixture] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)  # name -> one of registry.STAGE_KINDS
    evaluation: Evaluation = field(default_factory=Evaluation)
    harness: Harness = field(default_factory=Harness)  # of `smolpost eval`; `smolpost run` leaves it alone
    accelerate: dict[str, Any] = field(default_factory=dict)  # content of the chosen file under recipes/accelerate
