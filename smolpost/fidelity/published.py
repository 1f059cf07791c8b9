"""What the sources say of each value of the SmolLM3 recipe. What a pipeline has is read from the pipeline, never here.

The sources:
    blog: huggingface.co/blog/smollm3.
    handbook: recipes/smollm3 of github.com/huggingface/alignment-handbook (sft/mid.yaml, sft/sft.yaml, dpo/apo.yaml).
    playbook: the team's Smol Training Playbook, with their ablations.
"""

from dataclasses import dataclass
from typing import Any

SOURCES = ("blog", "handbook", "playbook")
# What a stage does in the published recipe, and its title.
ROLES = {
    "mid": "Reasoning mid-training",
    "sft": "SFT",
    "preference": "APO",
    "soup": "Soup",
    "merge": "Linear merge",
}
TRAINING = ("mid", "sft", "preference")
DOCUMENTS = ("mid", "sft")
NOTHING = object()  # the value of a source that cannot be compared


@dataclass(frozen=True)
class Said:
    """What one source says of a value.

    Attributes:
        value: As the recipe would have it; NOTHING where it is not one value.
        text: As it is shown; "" shows the value.
        also: Further values of the recipe that mean the same.
        unset: The source leaves it out, so that a library's default applies: the value.
    """

    value: Any = NOTHING
    text: str = ""
    also: tuple = ()
    unset: bool = False


NOT_SAID = Said(text="not said")
NO_STEP = Said(text="no such step")


@dataclass(frozen=True)
class Row:
    """One value of the recipe.

    Attributes:
        roles: The stages that have it.
        key: Field of the stage. `data.KEY` is a field of the stage's mixture, `model.KEY` one of the recipe's model,
            `weights` the shares that a merge's inputs have.
        what: What it is, where the key does not say it.
        why: Why smollm3 has its value, where a source says another one or none does.
    """

    roles: tuple[str, ...]
    key: str
    what: str
    blog: Said = NOT_SAID
    handbook: Said = NOT_SAID
    playbook: Said = NOT_SAID
    why: str = ""


def _unset(value: Any, text: str = "") -> Said:
    return Said(value, text, unset=True)


_EXPLICIT = "The handbook states it."
_DEFAULTS = "The handbook leaves it out, so its trainer used transformers' default."
_PUBLISHED_TEMPLATE = (
    "smollm3 is the published template without its faults: it keeps tool calls and tool results, and freezes the date. "
    "smollm3_published renders as published."
)
_MID_WEIGHTS = {"Llama_Nemotron_Post_Training_Dataset_reasoning_r1": 1.0, "OpenThoughts3_1_2M": 1.0}
_SFT_WEIGHTS = {
    "smoltalk_smollm3_everyday_conversations_no_think": 1.0,
    "smoltalk_smollm3_systemchats_30k_no_think": 1.0,
    "tulu_3_sft_personas_instruction_following_no_think": 1.0,
    "hermes_function_calling_v1_no_think": 1.0,
    "smoltalk_smollm3_smol_magpie_ultra_no_think": 0.5,
    "smoltalk_multilingual_8languages_lang_5_no_think": 1.0,
    "table_gpt_no_think": 1.0,
    "OpenHermes_2_5_no_think": 0.5,
    "OpenThoughts3_1_2M_no_think_no_think": 0.4,
    "Mixture_of_Thoughts_science_no_think": 1.0,
    "smoltalk_smollm3_explore_instruct_rewriting_no_think": 1.0,
    "smoltalk_smollm3_smol_rewrite_no_think": 1.0,
    "smoltalk_smollm3_smol_summarize_no_think": 1.0,
    "LongAlign_64k_context_lang_annotated_lang_6_no_think": 1.0,
    "multi_turn_reasoning_if_think": 1.0,
    "smoltalk_everyday_convs_reasoning_Qwen3_32B_think": 1.0,
    "smoltalk_systemchats_Qwen3_32B_think": 1.0,
    "xlam_traces_no_think": 1.0,
    "smolagents_toolcalling_traces_think": 1.0,
    "s1k_1_1_think": 1.0,
    "LongAlign_64k_Qwen3_32B_yarn_131k_think": 1.0,
    "aya_dataset_Qwen3_32B_think": 1.0,
    "smoltalk_multilingual8_Qwen3_32B_think": 0.3,
    "OpenThoughts3_1_2M_think": 0.02,
    "table_gpt_Qwen3_32B_think": 1.0,
}
_PAIR_WEIGHTS = {
    "llama_3_1_tulu_3_8b_preference_mixture_no_think": 0.5,
    "tulu_3_8b_pref_mix_Qwen3_32B_Qwen3_0_6B_think": 0.25,
}

ROWS = (
    # ---------------------------------------------------------------- where it starts, and its rows
    Row(
        ("mid",), "init_from", "start",
        Said("HuggingFaceTB/SmolLM3-3B-Base"), Said("HuggingFaceTB/SmolLM3-3B-Base"),
    ),
    Row(("mid",), "data.weights", "share of each set", Said(text="2 sets, 35B tokens"), Said(_MID_WEIGHTS)),
    Row(
        ("sft",), "data.weights", "share of each set",
        Said(text="22 sets, 1.8B tokens"), Said(_SFT_WEIGHTS),
        why="The handbook lists each set; the blog counts 12 without and 10 with thinking. The last 200 rows of both "
        "OpenThoughts3 sets are held out for evaluation.",
    ),
    Row(
        ("preference",), "data.weights", "share of each set",
        Said(text="2 sets"), Said(_PAIR_WEIGHTS), Said(text="169k pairs; 17k and 85k scored better"),
        why="The handbook states the weights, which give 169k pairs. The last 100 rows of both sets are held out for "
        "evaluation.",
    ),
    Row(("mid", "sft"), "data.seed", "seed of the mixture", handbook=Said(0)),
    Row(("preference",), "data.seed", "seed of the mixture", handbook=_unset(0)),
    # ---------------------------------------------------------------- template and masks
    Row(("mid",), "template", "chat template", Said("chatml"), Said("chatml", "ChatML, written out")),
    Row(
        ("sft",), "template", "chat template",
        Said(text="described"), Said("smollm3_published", "written out"), why=_PUBLISHED_TEMPLATE,
    ),
    Row(
        ("preference",), "template", "chat template",
        handbook=_unset("smollm3_published", "the checkpoint's"), why=_PUBLISHED_TEMPLATE,
    ),
    Row(("mid",), "train_roles", "turns that train", handbook=_unset(["all"])),
    Row(
        ("sft",), "train_roles", "turns that train",
        Said(["assistant"], "not user turns, not tool results"), Said(["assistant"]),
        Said(["assistant"], "assistant: IFEval (think) 67.1 -> 71.6"),
    ),
    Row(
        ("preference",), "train_roles", "turns that train",
        handbook=_unset(["all"], "all after the common prompt"),
        why="Only the model's own turns are scored. A pair that ends in one assistant turn has the same mask.",
    ),
    # ---------------------------------------------------------------- packing and lengths
    Row(
        ("mid",), "packing", "",
        Said("wrapped"), _unset("bfd", "TRL's best fit"),
        why="The handbook names no method, so the blog's applies.",
    ),
    Row(
        ("sft",), "packing", "",
        Said("bfd"), Said("bfd", "ffd, which TRL later renamed bfd"),
        Said(text="costs 12 points of IFEval at batch 128 on 76M tokens"),
        why="TRL's ffd was best fit under another name. The playbook's cost came from steps of 4M tokens.",
    ),
    Row(("mid",), "max_seq_len", "tokens per row", handbook=Said(32768)),
    Row(("sft",), "max_seq_len", "tokens per row", handbook=Said(65536)),
    Row(("preference",), "max_seq_len", "tokens per row", Said(24576, "24k"), Said(24576)),
    Row(("sft",), "overlong", "samples longer than a row", handbook=_unset("truncate", "TRL truncates")),
    Row(
        ("preference",), "overlong", "pairs longer than a row",
        handbook=_unset("truncate prompts", "TRL keeps a prompt's last 512 tokens"),
        why="TRL before 0.29 cut every prompt to 512 tokens by default. Here a pair that fits is never cut.",
    ),
    # ---------------------------------------------------------------- the objective
    Row(
        ("preference",), "loss", "",
        Said("apo_zero", "APO"), Said("apo_zero"), Said("apo_zero", "apo_zero, best of 4"),
    ),
    Row(
        ("preference",), "beta", "beta, per nat",
        handbook=Said(0.05), playbook=Said(0.05, "0.05; 0.1 scored better: 48.1/33.4, not 45.4/32.2"), why=_EXPLICIT,
    ),
    # ---------------------------------------------------------------- optimization
    Row(
        ("mid",), "num_epochs", "epochs",
        Said(4, "4, about 140B tokens"), Said(5), Said(5),
        why="The handbook states 5, and the playbook agrees. The blog says 4.",
    ),
    Row(
        ("sft",), "num_epochs", "epochs",
        Said(4, "4, about 8B tokens"), Said(5), Said(text="1 to compare; 1 -> 5: IFEval 70.5 -> 78.0"),
        why="The handbook states 5. The blog says 4.",
    ),
    Row(("preference",), "num_epochs", "epochs", handbook=Said(1)),
    Row(("mid",), "learning_rate", "peak learning rate", handbook=Said(2e-5)),
    Row(
        ("sft",), "learning_rate", "peak learning rate",
        handbook=Said(2e-5), playbook=Said(1e-5, "1e-5 to compare; packed: 3e-6 best of 5"), why=_EXPLICIT,
    ),
    Row(
        ("preference",), "learning_rate", "peak learning rate",
        handbook=Said(1e-6), playbook=Said(1e-6, "1e-6; 1e-7 scored better: 49.6/32.6, not 45.4/32.2"), why=_EXPLICIT,
    ),
    Row(TRAINING, "lr_scheduler", "schedule after the warm-up", handbook=Said("cosine", "cosine_with_min_lr")),
    Row(TRAINING, "min_lr_ratio", "last learning rate, of the peak", handbook=Said(0.1)),
    Row(DOCUMENTS, "warmup_ratio", "warm-up, of all steps", handbook=Said(0.03)),
    Row(("preference",), "warmup_ratio", "warm-up, of all steps", handbook=Said(0.1)),
    Row(
        ("mid",), "global_batch_size", "rows per step", handbook=Said(128, "128: 64 GPUs x 1 x 2"),
    ),
    Row(
        ("sft",), "global_batch_size", "rows per step",
        handbook=Said(128, "128: 64 GPUs x 1 x 2"), playbook=Said(128, "128; packed: 8 to 16"), why=_EXPLICIT,
    ),
    Row(("preference",), "global_batch_size", "pairs per step", handbook=Said(32, "32: 16 GPUs x 1 x 2")),
    Row(TRAINING, "max_grad_norm", "clipping of the gradient norm", handbook=Said(0.2)),
    Row(
        TRAINING, "weight_decay", "",
        Said(text="not said (pretraining: 0.1)"), _unset(0.0), _unset(0.0), why=_DEFAULTS,
    ),
    Row(TRAINING, "adam_beta1", "AdamW's beta1", Said(text="not said (pretraining: 0.9)"), _unset(0.9)),
    Row(
        TRAINING, "adam_beta2", "AdamW's beta2",
        Said(text="not said (pretraining: 0.95)"), _unset(0.999), _unset(0.999), why=_DEFAULTS,
    ),
    Row(TRAINING, "adam_epsilon", "AdamW's epsilon", handbook=_unset(1e-8)),
    Row(DOCUMENTS, "seeds", "", handbook=Said([42])),
    Row(
        ("preference",), "seeds", "seeds, a checkpoint each",
        Said(text="several: a soup"), Said([42]), why="A soup needs several. How many the team had is not published.",
    ),
    # ---------------------------------------------------------------- the model
    Row(
        TRAINING, "precision", "",
        handbook=Said("bf16", also=("auto",)), why="auto: bf16 on an accelerator, fp32 on a CPU.",
    ),
    Row(
        TRAINING, "model.attn_implementation", "attention",
        Said("packed", "within documents"), Said("flash_attention_2", also=("packed",)),
        why="Both keep packed documents apart; packed does so on any device, and is FlashAttention on a GPU.",
    ),
    Row(
        ("mid",), "rope_theta", "RoPE theta",
        Said(text="not said (long context: 1.5M at 32k, 5M at 64k)"), _unset(None, "the checkpoint's"),
        Said(text="not said (pretraining configs: 2M at 32k)"),
        why="null keeps the start checkpoint's. Long-context training ends before this recipe begins.",
    ),
    # ---------------------------------------------------------------- merging
    Row(
        ("soup",), "weights", "shares of the inputs", Said("equal", "equal: a soup"), NO_STEP, NOT_SAID,
    ),
    Row(
        ("merge",), "weights", "shares of the inputs",
        Said([0.9, 0.1], "0.9 soup + 0.1 mid-training checkpoint"), NO_STEP,
    ),
    Row(
        ("merge",), "added", "what is added to the soup",
        Said(text="a mid-training checkpoint, not named"), NO_STEP,
        why="The base checkpoint is the end of long-context mid-training. Reasoning mid-training lost long context.",
    ),
    Row(
        ("soup", "merge"), "dtype", "type of the weights", handbook=NO_STEP,
        why="The mean is summed in fp32 and rounded once.",
    ),
)  # fmt: skip
