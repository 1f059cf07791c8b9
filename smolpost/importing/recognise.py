"""Whose file it is, and what it trains: told by its keys."""

from typing import Any, NamedTuple

from smolpost.errors import UserError

HANDBOOK, TRL, AXOLOTL = "alignment-handbook", "TRL", "Axolotl"
OPTIONS = {"trl": TRL, "alignment-handbook": HANDBOOK, "axolotl": AXOLOTL}  # values of --from
# Tool -> keys that no other tool has.
MARKS = {
    AXOLOTL: (
        "base_model",
        "sequence_len",
        "sample_packing",
        "val_set_size",
        "micro_batch_size",
        "pretraining_dataset",
    ),
    HANDBOOK: ("dataset_mixture", "dataset_mixer"),
    TRL: ("model_name_or_path",),
}
_LLAMA_FACTORY = (
    "LLaMA-Factory, which is not read, as its datasets are names in a dataset_info.json; write a pipeline with their "
    "paths (docs/recipes.md)"
)
# Files of others: keys that they all have -> what is said.
OTHERS = {
    ("finetuning_type",): _LLAMA_FACTORY,
    ("stage", "cutoff_len"): _LLAMA_FACTORY,
    ("merge_method",): "mergekit; smolpost merge OUT --config FILE runs it",
    ("pipeline", "stages"): "smolpost's own; smolpost plan pipeline=./FILE.yaml plans it",
    ("compute_environment",): "accelerate, a launch config; --num-processes says what is needed of it",
}
# Method of TRL -> keys that say it.
METHODS = {
    "sft": (
        "packing", "packing_strategy", "assistant_only_loss", "completion_only_loss", "dataset_text_field",
        "max_seq_length", "eos_token", "dataset_kwargs", "shuffle_dataset", "chat_template_path", "text_column",
        "eval_packing",
    ),
    "dpo": (
        "loss_weights", "ld_alpha", "f_divergence_type", "label_smoothing", "use_weighting", "discopop_tau",
        "rpo_alpha", "reference_free",
    ),
    "kto": ("desirable_weight", "undesirable_weight"),
}  # fmt: skip
# Keys that dpo and kto have: a file that nothing else tells is one of dpo.
BESIDE_A_REFERENCE = (
    "beta", "max_prompt_length", "precompute_ref_log_probs", "sync_ref_model", "generate_during_eval",
)  # fmt: skip
LOSSES = {"nll": "sft", "dft": "sft", "chunked_nll": "sft", "kto": "kto", "apo_zero_unpaired": "kto"}  # others: dpo
COLUMNS = {"rejected": "dpo", "label": "kto"}
# Keys of methods that are not read here.
UNREAD = {
    "GRPO or RLOO": ("num_generations", "reward_funcs", "reward_weights"),
    "a reward model": ("center_rewards_coefficient",),
    "distillation": ("teacher_model_name_or_path", "lmbda"),
    "ORPO, CPO or SimPO": ("simpo_gamma", "cpo_alpha"),
}


class Recognised(NamedTuple):
    tool: str
    why: str


def tool_of(keys: dict[str, Any], asked: str | None, file: str) -> Recognised:
    """
    Args:
        asked: The value of --from, or None.
    Raises:
        UserError: It is of no tool that is read, or could be of several.
    """
    if asked is not None:
        return Recognised(OPTIONS[asked], f"--from {asked}")
    for marks, what in OTHERS.items():
        if all(mark in keys for mark in marks):
            raise UserError(f"{file}: has the key {marks[0]} of {what}")
    found = {tool: [mark for mark in marks if mark in keys] for tool, marks in MARKS.items()}
    if found[HANDBOOK] and not found[AXOLOTL]:
        return Recognised(HANDBOOK, f"it has {found[HANDBOOK][0]}")
    tools = [tool for tool in (AXOLOTL, TRL) if found[tool]]
    if len(tools) == 1:
        return Recognised(tools[0], f"it has {', '.join(found[tools[0]][:3])}")
    if tools:
        raise UserError(
            f"{file}: has keys of several tools ({found[AXOLOTL][0]} of Axolotl, {found[TRL][0]} of TRL); say whose it "
            f"is with --from {' or '.join(OPTIONS)}"
        )
    raise UserError(
        f"{file}: is of no tool that is known here; Axolotl's files have base_model, alignment-handbook's "
        "dataset_mixture or dataset_mixer, TRL's model_name_or_path; say whose it is with --from"
    )


def method_of(keys: dict[str, Any], asked: str | None, file: str) -> tuple[str, str]:
    """The method of a file of TRL or alignment-handbook, and why: its script says it, which the file does not name.

    Raises:
        UserError: Nothing says it, or several methods are said, or it is one that is not read.
    """
    if asked is not None:
        return asked, f"--method {asked}"
    for method, marks in UNREAD.items():
        if mark := next((mark for mark in marks if keys.get(mark) is not None), None):
            raise UserError(f"{file}: {mark} is a key of {method}, which cannot be imported; {', '.join(METHODS)} can")
    found = {method: [m for m in marks if keys.get(m) is not None] for method, marks in METHODS.items()}
    losses = keys.get("loss_type")
    if losses is not None:
        found[LOSSES.get(losses, "dpo") if isinstance(losses, str) else "dpo"].append("loss_type")
    columns = {str(name) for entry in _entries(keys) for name in entry.get("columns") or []}
    for column, method in COLUMNS.items():
        if column in columns:
            found[method].append(f"the column {column}")
    if not found["kto"]:
        found["dpo"] += [name for name in BESIDE_A_REFERENCE if keys.get(name) is not None]
    said = [method for method, names in found.items() if names]
    if len(said) == 1:
        return said[0], f"it has {', '.join(found[said[0]][:3])}"
    if said:
        told = " and ".join(f"{found[method][0]} of {method}" for method in said)
        raise UserError(f"{file}: has keys of several scripts ({told}); say which one ran with --method")
    raise UserError(f"{file}: nothing in it says what it trains; say it with --method {', --method '.join(METHODS)}")


def _entries(keys: dict[str, Any]) -> list[dict]:
    mixture = keys.get("dataset_mixture")
    entries = mixture.get("datasets") if isinstance(mixture, dict) else keys.get("datasets")
    return [entry for entry in entries or [] if isinstance(entry, dict)] if isinstance(entries, list) else []
