"""The tables of TRL's keys and defaults, against the installed TRL."""

import contextlib
import dataclasses
from pathlib import Path

import pytest
import trl
from trl.scripts.utils import DatasetMixtureConfig

from smolpost.errors import UserError
from smolpost.importing.command import translated
from smolpost.importing.draft import Group
from smolpost.importing.trl_keys import OWN, REMOVED, RENAMED

CONFIGS = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "kto": trl.KTOConfig}
SHARED = (trl.ModelConfig, trl.ScriptArguments, DatasetMixtureConfig)
MINIMAL = {"model_name_or_path": "a/b", "dataset_name": "c/d"}


def fields(method: str) -> dict[str, dataclasses.Field]:
    return {f.name: f for kind in (CONFIGS[method], *SHARED) for f in dataclasses.fields(kind) if f.init}


def default(field: dataclasses.Field):
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def check_told(method: str, name: str, value) -> None:
    draft, _ = translated(Path("x.yaml"), MINIMAL | {name: value}, "trl", method)
    assert not draft.said[Group.UNKNOWN], name
    assert name in draft.told, name


@pytest.mark.parametrize("method", CONFIGS)
def test_something_is_said_of_each_key_that_trl_has(method):
    """One key at a time: a bool at its other value, others at their default."""
    for name, value in {name: default(field) for name, field in fields(method).items()}.items():
        if value is not None and name not in ("datasets", "loss_type"):
            check_told(method, name, not value if isinstance(value, bool) else value)


@pytest.mark.parametrize("method", CONFIGS)
def test_keys_without_a_default_value_are_known_too(method):
    needs_a_file = "chat_template_path"
    unset = [name for name, field in fields(method).items() if default(field) is None]
    for name in (name for name in unset if name not in (*MINIMAL, needs_a_file)):
        told = False
        for sample in (True, 3, "text", {}):
            with contextlib.suppress(UserError):  # of another type
                check_told(method, name, sample)
                told = True
        assert told, name


@pytest.mark.parametrize("method", CONFIGS)
def test_defaults_are_trls(method):
    """What an empty file gives is what TRL's own classes say."""
    draft, _ = translated(Path("x.yaml"), dict(MINIMAL), "trl", method)
    ours = {name.removeprefix(f"stages.{method}."): setting.value for name, setting in draft.settings.items()}
    theirs = {name: default(field) for name, field in fields(method).items()}
    same = {
        "learning_rate": "learning_rate", "weight_decay": "weight_decay", "adam_beta1": "adam_beta1",
        "adam_beta2": "adam_beta2", "adam_epsilon": "adam_epsilon", "max_grad_norm": "max_grad_norm",
        "num_epochs": "num_train_epochs", "lr_scheduler": "lr_scheduler_type", "warmup_ratio": "warmup_steps",
        "max_seq_len": "max_length",
        "global_batch_size": "per_device_train_batch_size",
    }  # fmt: skip
    assert {name: ours[name] for name in same} == {name: theirs[key] for name, key in same.items()}
    assert ours["seeds"] == [theirs["seed"]]
    assert (ours["activation_checkpointing"], theirs["gradient_checkpointing"]) == ("full", True)
    assert theirs["gradient_accumulation_steps"] == 1
    if method == "sft":
        assert (ours["packing"], theirs["packing"], theirs["packing_strategy"]) == ("none", False, "bfd")
        assert (ours["train_roles"], theirs["assistant_only_loss"]) == (["all"], False)
    else:
        assert ours["loss"] == (theirs["loss_type"] if method == "kto" else theirs["loss_type"][0])
        assert ours["beta"] == theirs["beta"]
    adapted, _ = translated(Path("x.yaml"), MINIMAL | {"use_peft": True}, "trl", method)
    lora = {name: adapted.settings[f"stages.{method}.lora.{name}"].value for name in ("r", "alpha", "dropout")}
    assert lora == {name: theirs[f"lora_{name}"] for name in lora}


def test_old_keys_are_old_and_keys_of_one_method_are_its_own():
    known = {method: fields(method).keys() for method in CONFIGS}
    assert not set().union(*known.values()) & {*RENAMED, *REMOVED}
    shared = set.intersection(*map(set, known.values()))
    assert {method: names - shared for method, names in known.items()} == {m: set(names) for m, names in OWN.items()}
