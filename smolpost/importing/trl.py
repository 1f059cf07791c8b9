"""TRL's settings of its sft, dpo and kto scripts, and alignment-handbook's: TRL's and a mixture of datasets."""

from typing import Any

from smolpost.errors import UserError
from smolpost.importing import preference, template, trainer
from smolpost.importing.draft import Draft
from smolpost.importing.trl_data import datasets
from smolpost.importing.trl_keys import DIFFERING, LEFT_OUT, OWN, REMOVED, RENAMED
from smolpost.screen import shown
from smolpost.training.trackers import MODULES

PACKINGS = {"bfd": "bfd", "bfd_split": "bfd", "bfd-requeue": "bfd", "ffd": "bfd", "wrapped": "wrapped"}
KINDS = {"sft": ("sft", "sft"), "dpo": ("apo", "preference"), "kto": ("kto", "preference")}  # -> kind, mixture
NO_LIMIT = 32768  # tokens, where the file says that there is no limit
OFF_PATH = (
    "TRL 1.16 on transformers 5.23 has no such key: `trl` hands it on to accelerate, which refuses it, and the script "
    "alone ignores it"
)


def translate(draft: Draft, method: str, processes: int | None) -> None:
    """Fill the draft from the file's keys.

    Args:
        method: One of KINDS.
        processes: Ranks, or None where nobody said.
    Raises:
        UserError: A value is of the wrong type, the model or the data is missing, or the loss is unknown.
    """
    keys = draft.keys
    model, revision = _model(draft)
    kind, mixture = KINDS[method]
    only_completions = datasets(draft, mixture)
    draft.set(".kind", kind)
    draft.set(".init_from", "checkpoint")
    draft.set(".data", mixture)
    _template(draft, model, revision)
    if method == "sft":
        _documents(draft, only_completions)
    elif method == "dpo":
        _pairs(draft)
    else:
        _labelled(draft)
    draft.copy("learning_rate", ".learning_rate", float, 2e-5 if method == "sft" else 1e-6)
    trainer.length(draft, "num_train_epochs", 3.0)
    name = keys.take("lr_scheduler_type", str, "linear")
    trainer.schedule(draft, name, "lr_scheduler_type")
    trainer.warmup(draft, name)
    trainer.optimizer(draft, "optim")
    trainer.sharding(draft, keys.take("deepspeed", object), bool(keys.take("fsdp", object)))
    _launch(draft, processes)
    _weights(draft)
    trainer.seed(draft)
    trainer.checkpoints(draft)
    _adapters(draft, model)
    _said_of_the_rest(draft, method)


def _model(draft: Draft) -> tuple[str, str | None]:
    model = draft.keys.take("model_name_or_path", str)
    if model is None:
        raise UserError(f"{shown(draft.file)}: has no model_name_or_path; add the one that was trained")
    draft.set("model.checkpoint", model, "model_name_or_path")
    revision = draft.keys.take("model_revision", str)
    if revision not in (None, "main"):
        draft.set("model.revision", revision, "model_revision")
    return model, revision


def _template(draft: Draft, model: str, revision: str | None) -> None:
    text, path = draft.keys.take("chat_template", str), draft.keys.take("chat_template_path", str)
    if text is not None:
        template.from_text(draft, text, "chat_template")
    elif path is not None:
        template.from_file(draft, path, "chat_template_path")
    else:
        template.of_model(draft, model, revision)


def _documents(draft: Draft, only_completions: bool) -> None:
    """What trains in a row, and how rows become packs."""
    keys = draft.keys
    assistant = keys.take("assistant_only_loss", bool, False)
    completion = keys.take("completion_only_loss", bool)
    names = [name for name in ("assistant_only_loss", "completion_only_loss") if keys.given(name)]
    if assistant or completion or (completion is None and only_completions):
        note = "" if assistant or completion else "TRL trains the completions of such rows"
        draft.set(".train_roles", ["assistant"], *names, note=note)
    else:
        note = "TRL trains each token of messages and of text; for rows of prompt and completion set [assistant]"
        draft.set(".train_roles", ["all"], *names, note="" if completion is False else note)
    packing, strategy = keys.take("packing", bool, False), keys.take("packing_strategy", str, "bfd")
    if strategy not in PACKINGS:
        raise UserError(
            f"{shown(draft.file)}: packing_strategy={strategy} is not one of TRL's: {', '.join(PACKINGS)}; choose one"
        )
    said = [name for name in ("packing", "packing_strategy") if keys.given(name)]
    draft.set(".packing", PACKINGS[strategy] if packing else "none", *said)
    if strategy == "ffd":
        draft.broken("packing_strategy", "TRL refuses it since 0.20; bfd is what came in its place")
    elif strategy == "bfd-requeue":
        draft.broken("packing_strategy", "it is bfd_split since TRL 1.0, and the old name goes away in 2.0")
    if packing and strategy == "wrapped":
        draft.differs("packing_strategy", "documents of a row do not attend to each other here; under TRL they do")
    if packing and assistant:
        draft.broken("assistant_only_loss", "with packing, TRL 0.19 trained on user turns all the same, in silence")
    _max_length(draft, "split" if strategy in ("bfd_split", "bfd-requeue") and packing else "truncate")
    loss = keys.take("loss_type", str, "nll")
    if loss == "dft":
        draft.set(".engine", "trl", "loss_type", note="TRL's own trainer on the same rows; our engine has no dft")
        draft.set(".trl.loss_type", "dft", "loss_type")
    elif loss not in ("nll", "chunked_nll"):
        raise UserError(f"{shown(draft.file)}: loss_type={loss} is not a loss of TRL's sft; choose nll or dft")


def _max_length(draft: Draft, overlong: str) -> None:
    keys = draft.keys
    old, new = keys.take("max_seq_length", int), keys.take("max_length", int)
    without = "max_length" in keys.values and new is None and old is None
    if without:
        draft.set(".max_seq_len", NO_LIMIT, "max_length", note="TRL has no limit here; longer rows are refused")
        draft.set(".overlong", "refuse")
        return
    name = "max_length" if new is not None else "max_seq_length"
    draft.set(".max_seq_len", new or old or 1024, *([name] if keys.given(name) else []))
    draft.set(".overlong", overlong, note="TRL does so in silence; the data report counts such rows")


def _pairs(draft: Draft) -> None:
    keys = draft.keys
    _max_length(draft, "truncate")
    draft.copy("beta", ".beta", float, 0.1)
    alpha = keys.take("ld_alpha", float)
    if alpha is not None:
        draft.set(".ld_alpha", alpha, "ld_alpha")
    names = [str(name) for name in keys.take("loss_type", list, ["sigmoid"])]
    weights = keys.numbers("loss_weights")
    said = [name for name in ("loss_type", "loss_weights") if keys.given(name)]
    rpo = keys.take("rpo_alpha", float, 0.0)
    if rpo:
        names, weights, said = [*names, "sft"], [*(weights or [1.0] * len(names)), rpo], [*said, "rpo_alpha"]
    settings: dict[str, tuple[type, Any]] = {
        "f_divergence_type": (str, "reverse_kl"), "f_alpha_divergence_coef": (float, 0.5),
        "discopop_tau": (float, 0.05), "use_weighting": (bool, False),
    }  # fmt: skip
    found = {name: keys.take(name, kind, default) for name, (kind, default) in settings.items()}
    preference.losses(
        draft,
        names,
        weights,
        said,
        smoothing=keys.take("label_smoothing", float, 0.0),
        micro=keys.take("per_device_train_batch_size", int, 8),
        only_trl={name: (value, name) for name, value in found.items() if value != settings[name][1]},
    )
    if keys.take("padding_free", bool, False):
        draft.broken("padding_free", "TRL switches it off for pairs since 0.29, with a warning; batches are so here")


def _labelled(draft: Draft) -> None:
    keys = draft.keys
    _max_length(draft, "truncate")
    draft.copy("beta", ".beta", float, 0.1)
    draft.copy("desirable_weight", ".desirable_weight", float, 1.0)
    draft.copy("undesirable_weight", ".undesirable_weight", float, 1.0)
    loss = draft.copy("loss_type", ".loss", str, "kto")
    if loss not in ("kto", "apo_zero_unpaired"):
        raise UserError(
            f"{shown(draft.file)}: loss_type={loss} is not one of TRL's kto; choose kto or apo_zero_unpaired"
        )
    if keys.take("train_sampling_strategy", str, "sequential") != "random":
        draft.differs("train_sampling_strategy", "rows come in a random order; TRL's kto takes them in theirs")


def _launch(draft: Draft, processes: int | None) -> None:
    """The accelerate config and the global batch. `trl` takes accelerate's own options from the file too."""
    keys = draft.keys
    chosen = keys.take("accelerate_config", str)
    if chosen is not None:
        name = chosen.rpartition("/")[2].removesuffix(".yaml")
        ours = {"multi_gpu": "ddp", "zero1": "zero2", "zero2": "zero2", "zero3": "zero3", "single_gpu": "single"}
        draft.accelerate = ours.get(name, "fsdp2" if name.startswith("fsdp") else "single")
        draft.left_out("accelerate_config", f"recipes/accelerate/{draft.accelerate}.yaml is chosen")
    stated = "num_processes" if keys.given("num_processes") else None
    said = keys.take("num_processes", int)
    if processes is not None:
        stated = "--num-processes"
    micro = keys.take("per_device_train_batch_size", int, 8)
    names = [n for n in ("per_device_train_batch_size", "gradient_accumulation_steps") if keys.given(n)]
    trainer.batch(draft, micro, names, processes or said or 1, stated)
    if draft.stage != "dpo":
        draft.copy("per_device_train_batch_size", ".micro_batch_size", int, 8)


def _weights(draft: Draft) -> None:
    """Precision and memory."""
    keys = draft.keys
    trainer.precision(draft, keys.take("bf16", bool), "fp16" if keys.take("fp16", bool, False) else None, "bf16")
    if keys.given("fp16") and not keys.values["fp16"]:
        draft.left_out("fp16", "off, as here")
    name = "dtype" if keys.given("dtype") else "torch_dtype"
    dtype = keys.take(name, str, "float32")
    if dtype == "float32":
        if keys.given(name):
            draft.left_out(name, "weights are loaded in fp32, as here")
    else:
        draft.differs(name, "weights and AdamW's states stay in fp32 here; the computation is bf16 all the same")
    name = "activation_checkpointing" if keys.given("activation_checkpointing") else "gradient_checkpointing"
    trainer.activation_checkpointing(draft, name, True)
    workers = "dataset_num_proc" if keys.given("dataset_num_proc") else "preprocessing_num_workers"
    if keys.given(workers):
        draft.copy(workers, ".num_workers", int, None)
    reported = [str(name) for name in keys.take("report_to", list, [])]
    if reported == ["all"]:
        draft.left_out("report_to", "report_to names trackers one by one; tensorboard is the default")
    elif reported:
        known = [name for name in reported if name in MODULES]
        draft.set(".report_to", known, "report_to")
        if unknown := [name for name in reported if name not in known and name != "none"]:
            draft.differs("report_to", f"{', '.join(unknown)} cannot be named here; choose from {', '.join(MODULES)}")


def _adapters(draft: Draft, model: str) -> None:
    keys = draft.keys
    if not keys.take("use_peft", bool, False):
        for name in [name for name in keys.unread() if name.startswith("lora_") or name in ("use_rslora", "use_dora")]:
            keys.read.add(name)
            draft.broken(name, "TRL trains no adapters without use_peft: true")
        return
    targets = [str(name) for name in keys.take("lora_target_modules", list, [])]
    if not targets and "smollm3" in model.lower():
        draft.broken("use_peft", "peft knows no layers of SmolLM3 and refuses without lora_target_modules")
    note = "" if targets else "peft's choice for Llama and Qwen"
    trainer.lora(
        draft,
        targets or ["q_proj", "v_proj"],
        ["use_peft", *(["lora_target_modules"] if keys.given("lora_target_modules") else [])],
        dropout=0.05,
        alpha=32.0,
        rslora="use_rslora",
        note=note,
    )


def _said_of_the_rest(draft: Draft, method: str) -> None:
    keys = draft.keys
    for other, names in OWN.items():
        for name in names:
            if keys.given(name) and name not in keys.read and name not in OWN[method]:
                keys.read.add(name)
                draft.broken(name, OFF_PATH, f"a key of {other}")
    for name, now in RENAMED.items():
        if keys.given(name):
            draft.broken(name, OFF_PATH, now and f"now {now}")
    if keys.given("evaluation_strategy"):
        keys.read.add("evaluation_strategy")
    if keys.take("group_by_length", bool, False):
        draft.differs("group_by_length", "rows come in a random order")
    for name in REMOVED:
        if keys.given(name) and name not in keys.read:
            keys.read.add(name)
            draft.broken(name, OFF_PATH, "without effect")
    draft.sort_out(LEFT_OUT, DIFFERING)
    draft.unknown(keys, [*keys.read, *DIFFERING, *(n for names in LEFT_OUT.values() for n in names)], OFF_PATH)
