"""Axolotl's settings: full, LoRA and QLoRA fine-tuning, pretraining text, DPO and KTO."""

from smolpost.errors import UserError
from smolpost.importing import preference, template, trainer
from smolpost.importing.axolotl_data import datasets
from smolpost.importing.axolotl_keys import DIFFERING, HARMLESS_PLUGINS, LEFT_OUT, REFUSED
from smolpost.importing.draft import Draft
from smolpost.importing.keys import Keys
from smolpost.importing.trl import KINDS
from smolpost.screen import shown

PAIRS = {"dpo": "sigmoid", "ipo": "ipo"}  # values of rl that train on pairs -> the loss
OVERLONG = {"drop": "drop", "truncate": "truncate", "raise": "refuse"}


def stage_of(keys: Keys) -> str:
    """sft, dpo or kto.

    Raises:
        UserError: The file trains something else.
    """
    method = keys.take("rl", str)
    for name in ("reward_model", "process_reward_model"):
        if keys.take(name, bool, False):
            raise UserError(f"{shown(keys.file)}: {name} cannot be imported; fine-tuning, DPO, IPO and KTO can")
    if method is None:
        return "sft"
    if method in PAIRS:
        return "dpo"
    if method == "kto":
        return "kto"
    raise UserError(f"{shown(keys.file)}: rl={method} cannot be imported; dpo, ipo, kto and files without rl can")


def translate(draft: Draft, processes: int | None) -> None:
    """Fill the draft from the file's keys.

    Args:
        processes: Ranks, or None where nobody said.
    Raises:
        UserError: A value is of the wrong type, or the model or the data is missing.
    """
    keys = draft.keys
    kind, mixture = KINDS[draft.stage]
    model, revision = _model(draft)
    rows = datasets(draft, mixture)
    draft.set(".kind", kind)
    draft.set(".init_from", "checkpoint")
    draft.set(".data", mixture)
    if not draft.keys.take("shuffle_merged_datasets", bool, True):
        draft.set(f"data.{mixture}.shuffle", False, "shuffle_merged_datasets")
    _template(draft, rows.template, model, revision)
    if kind == "apo":
        _pairs(draft)
    elif kind == "kto":
        _labelled(draft)
    else:
        _documents(draft, rows.train_roles, rows.roles_said, rows.only_text)
    if not keys.given("learning_rate"):
        raise UserError(f"{shown(draft.file)}: has no learning_rate, which Axolotl requires; add it")
    draft.copy("learning_rate", ".learning_rate", float, None)
    trainer.length(draft, "num_epochs", 1.0)
    _schedule(draft)
    trainer.optimizer(draft, "optimizer")
    trainer.sharding(draft, keys.take("deepspeed", object), keys.given("fsdp") or keys.given("fsdp_config"))
    _batch(draft, processes)
    _weights(draft)
    trainer.seed(draft)
    trainer.checkpoints(draft)
    _adapters(draft)
    _said_of_the_rest(draft)


def _model(draft: Draft) -> tuple[str, str | None]:
    keys = draft.keys
    model = keys.take("base_model", str)
    if model is None:
        raise UserError(f"{shown(draft.file)}: has no base_model; add the one that was trained")
    draft.set("model.checkpoint", model, "base_model")
    name = "revision_of_model" if keys.given("revision_of_model") else "model_revision"
    revision = keys.take(name, str)
    if revision is not None:
        draft.set("model.revision", revision, name)
    return model, revision


def _template(draft: Draft, of_rows: str | None, model: str, revision: str | None) -> None:
    """The template of the file, or of its datasets, or of the model.

    Args:
        of_rows: What the datasets say.
    """
    keys = draft.keys
    text, name = keys.take("chat_template_jinja", str), keys.take("chat_template", str)
    said = "chat_template" if name is not None else "datasets"
    name = name or of_rows or "tokenizer_default"
    if text is not None and text.endswith((".jinja", ".jinja2", ".j2")):
        template.from_file(draft, text, "chat_template_jinja")
    elif text is not None:
        template.from_text(draft, text, "chat_template_jinja")
    elif name == "chatml":
        draft.set(".template", "chatml", said)
        draft.set(".allow_template_change", True, note="the file sets its own template")
    else:
        if not name.startswith("tokenizer_default"):
            draft.differs(said, f"the template {name} is Axolotl's own; the model's is used, so save it as .jinja file")
        elif keys.given("chat_template"):
            draft.left_out("chat_template", "the template is the model's")
        template.of_model(draft, model, revision)


def _documents(draft: Draft, roles: list[str], roles_said: bool, only_text: bool) -> None:
    keys = draft.keys
    all_train = keys.take("train_on_inputs", bool, False)
    if all_train:
        draft.set(".train_roles", ["all"], "train_on_inputs")
    else:
        names = [
            n for n, said in (("train_on_inputs", keys.given("train_on_inputs")), ("datasets", roles_said)) if said
        ]
        draft.set(".train_roles", roles, *names)
    packs = keys.take("sample_packing", bool, False)
    packed = "bfd" if packs and not only_text else "wrapped" if packs else "none"
    draft.set(".packing", packed, *(["sample_packing"] if keys.given("sample_packing") else []))
    if keys.take("sample_packing_sequentially", bool, False):
        draft.differs("sample_packing_sequentially", "packing looks at all samples, not at neighbours")
    if packed == "none" and only_text:
        draft.set(".overlong", "split", note="Axolotl splits the texts of a completion dataset")
        draft.keys.take("excess_length_strategy", str)
    else:
        _overlong(draft)
    draft.copy("sequence_len", ".max_seq_len", int, 512)


def _overlong(draft: Draft) -> None:
    strategy = draft.keys.take("excess_length_strategy", str, "drop").lower()
    if strategy not in OVERLONG:
        raise UserError(
            f"{shown(draft.file)}: excess_length_strategy={strategy} is not one of {', '.join(OVERLONG)}; choose one"
        )
    names = ["excess_length_strategy"] if draft.keys.given("excess_length_strategy") else []
    note = "" if names else "Axolotl drops them with a line in its log; the data report counts them"
    draft.set(".overlong", OVERLONG[strategy], *names, note=note)


def _pairs(draft: Draft) -> None:
    keys = draft.keys
    _overlong(draft)
    draft.copy("sequence_len", ".max_seq_len", int, 512)
    _beta(draft)
    rpo = keys.take("rpo_alpha", float, 0.0)
    losses = [str(loss) for loss in keys.take("dpo_loss_type", list, [])]
    weights = keys.numbers("dpo_loss_weights")
    said = [name for name in ("rl", "dpo_loss_type", "dpo_loss_weights", "rpo_alpha") if keys.given(name)]
    losses = losses or [PAIRS[keys.take("rl", str)]]
    if rpo:
        losses, weights = [*losses, "sft"], [*(weights or [1.0] * len(losses)), rpo]
    weighted = keys.take("dpo_use_weighting", bool, False)
    preference.losses(
        draft,
        losses,
        weights,
        said,
        smoothing=keys.take("dpo_label_smoothing", float, 0.0),
        smoothing_key="dpo_label_smoothing",
        micro=keys.take("micro_batch_size", int, 1),
        only_trl={"use_weighting": (True, "dpo_use_weighting")} if weighted else None,
    )
    if keys.take("sample_packing", bool, False):
        draft.broken("sample_packing", "Axolotl refuses it with rl; pairs are packed here all the same")


def _labelled(draft: Draft) -> None:
    _overlong(draft)
    draft.copy("sequence_len", ".max_seq_len", int, 512)
    _beta(draft)
    draft.left_out("rl", "a stage of kind kto, on TRL's trainer as under Axolotl")
    draft.copy("kto_desirable_weight", ".desirable_weight", float, 1.0)
    draft.copy("kto_undesirable_weight", ".undesirable_weight", float, 1.0)


def _beta(draft: Draft) -> None:
    keys = draft.keys
    trl = Keys(keys.take("trl", dict, {}), draft.file, "trl.")
    name = next((name for name in ("rl_beta", "dpo_beta") if keys.given(name)), None)
    beta, of_trl = keys.take(name or "rl_beta", float), trl.take("beta", float)
    names = ["trl"] if of_trl is not None else [name] if name else []
    draft.set(".beta", of_trl or beta or 0.1, *names)
    draft.unknown(trl, ["beta"], "the settings of Axolotl's trl are read for GRPO alone, but beta")


def _schedule(draft: Draft) -> None:
    keys = draft.keys
    name = keys.take("lr_scheduler", str, "cosine")
    trainer.schedule(draft, name, "lr_scheduler")
    ratio = keys.take("cosine_min_lr_ratio", float)
    if ratio is not None and name == "cosine":
        draft.set(".min_lr_ratio", ratio, "cosine_min_lr_ratio")
    elif ratio is not None:
        draft.broken("cosine_min_lr_ratio", "Axolotl reads it for lr_scheduler: cosine alone")
    trainer.warmup(draft, name, 0.03, "Axolotl's default, which it limits to 100 steps")


def _batch(draft: Draft, processes: int | None) -> None:
    keys = draft.keys
    micro, total = keys.take("micro_batch_size", int, 1), keys.take("batch_size", int)
    names = [name for name in ("micro_batch_size", "gradient_accumulation_steps") if keys.given(name)]
    said = keys.take("world_size", int)
    stated = "--num-processes" if processes is not None else "world_size" if said else None
    trainer.batch(draft, micro, names, processes or said or 1, stated)
    if total is not None:
        draft.set(".global_batch_size", total, "batch_size", note="Axolotl divides it by the number of processes")
    if draft.stage != "dpo":
        draft.copy("micro_batch_size", ".micro_batch_size", int, 1)


def _weights(draft: Draft) -> None:
    """Precision and memory."""
    keys = draft.keys
    said = keys.take("bf16", str, "auto").lower()
    bf16 = None if said == "auto" else said in ("true", "full")
    key = "bf16"
    fp16 = next((name for name in ("fp16", "float16") if keys.take(name, bool, False)), None)
    if keys.take("bfloat16", bool, False):
        bf16, key = True, "bfloat16"
        draft.differs("bfloat16", "weights and AdamW's states stay in fp32 here; the computation is bf16 all the same")
    if keys.take("float32", bool, False):
        bf16, key = False, "float32"
    trainer.precision(draft, bf16, fp16, key)
    trainer.activation_checkpointing(draft, "gradient_checkpointing", False)
    if keys.given("dataset_processes") or keys.given("dataset_num_proc"):
        name = "dataset_processes" if keys.given("dataset_processes") else "dataset_num_proc"
        draft.copy(name, ".num_workers", int, None)
    trackers = [("wandb", "wandb_project"), ("mlflow", "mlflow_experiment_name"), ("tensorboard", "use_tensorboard")]
    named = [(tracker, key) for tracker, key in trackers if keys.values.get(key)]
    keys.read.update(key for _, key in trackers)
    if named:
        draft.set(".report_to", [tracker for tracker, _ in named], *(key for _, key in named))


def _adapters(draft: Draft) -> None:
    keys = draft.keys
    adapter = keys.take("adapter", str)
    if adapter is None:
        for name in [name for name in keys.unread() if name.startswith("lora_") or name == "peft_use_rslora"]:
            keys.read.add(name)
            draft.broken(name, "Axolotl trains no adapters without adapter: lora")
        return
    if adapter not in ("lora", "qlora"):
        raise UserError(f"{shown(draft.file)}: adapter={adapter} cannot be imported; lora and qlora can")
    targets = [str(name) for name in keys.take("lora_target_modules", list, [])]
    names = ["lora_target_modules"] if targets else []
    if keys.take("lora_target_linear", bool, False):
        targets, names = ["all-linear"], ["lora_target_linear"]
    if not targets:
        raise UserError(f"{shown(draft.file)}: has an adapter and no layers; add lora_target_linear: true")
    trainer.lora(draft, targets, ["adapter", *names], dropout=0.0, alpha=16.0, rslora="peft_use_rslora")


def _said_of_the_rest(draft: Draft) -> None:
    keys = draft.keys
    tokens = keys.take("special_tokens", dict, {})
    if set(tokens) - {"pad_token"}:
        draft.differs("special_tokens", "the tokenizer is the checkpoint's; stop tokens are read from the template")
    elif tokens:
        draft.left_out("special_tokens", "rows are not padded")
    plugins = [str(name) for name in keys.take("plugins", list, [])]
    if plugins:
        others = [name for name in plugins if not any(part in name.lower() for part in HARMLESS_PLUGINS)]
        if others:
            draft.differs("plugins", f"{', '.join(others)} is not run")
        else:
            draft.left_out("plugins", "they make Axolotl faster, and change nothing that is trained")
    if keys.take("dataset_exact_deduplication", bool, False):
        mixture = draft.settings[f"stages.{draft.stage}.data"].value
        draft.set(f"data.{mixture}.hygiene.exact", True, "dataset_exact_deduplication")
    for name, why in REFUSED.items():
        if keys.given(name):
            keys.read.add(name)
            draft.broken(name, why)
    draft.sort_out(LEFT_OUT, DIFFERING)
    known = [*keys.read, *DIFFERING, *(name for names in LEFT_OUT.values() for name in names)]
    draft.unknown(keys, known, "it is not in the schema of Axolotl that is known here")
