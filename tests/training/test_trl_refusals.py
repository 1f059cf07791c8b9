"""What TRL cannot do as asked is refused in one line, and what the line advises is accepted."""

import dataclasses
import sys
from pathlib import Path

import pytest

from smolpost import recipe
from smolpost.errors import UserError
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage
from smolpost.training.settings import TRLPreference
from smolpost.training.with_trl import preference, sft
from tests.training.tiny_trainers import CPU, settings

TRL = ["pipeline=gsm8k", "data=gsm8k_folder", "data_root=/data", "stages.apo.engine=trl", "stages.apo.pack_tokens=null"]
LOSS_WEIGHT = "data.preference.sources.gsm8k.loss_weight"


def refusal(*words):
    with pytest.raises(UserError) as caught:
        recipe.load([*TRL, *words])
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("words", "line", "remedy"),
    [
        (
            ["stages.apo.pack_tokens=500"],
            "stages.apo.pack_tokens=500 packs pairs, which TRL cannot; set it to null",
            ["stages.apo.pack_tokens=null"],
        ),
        (
            ["stages.apo.sft_weight=0.5"],
            "stages.apo.sft_weight=0.5 adds a mean over the global batch, which TRL does not have; set it to 0, and "
            "set trl.loss_type=[apo_zero,sft] and trl.loss_weights=[1,0.5]",
            ["stages.apo.trl.loss_type=[apo_zero,sft]", "stages.apo.trl.loss_weights=[1,0.5]"],
        ),
        (
            ["stages.apo.trl.loss_type=[dpo]"],
            "stages.apo.trl.loss_type=dpo is not a loss of TRL, which has sigmoid, hinge, ",
            ["stages.apo.trl.loss_type=[sigmoid]"],
        ),
        (
            ["stages.apo.trl.loss_type=[hinge]", "stages.apo.trl.loss_weights=[1,2]"],
            "stages.apo.trl.loss_weights has 2 numbers for 1 losses; give one for each",
            ["stages.apo.trl.loss_type=[hinge]", "stages.apo.trl.loss_weights=[2]"],
        ),
        (
            ["stages.apo.trl.loss_type=[exo_pair]"],
            "stages.apo.trl.label_smoothing=0, and exo_pair needs more; its paper recommends 1e-3",
            ["stages.apo.trl.loss_type=[exo_pair]", "stages.apo.trl.label_smoothing=1e-3"],
        ),
        (
            ["stages.apo.trl.f_divergence_type=forward_kl"],
            "stages.apo.trl.f_divergence_type=forward_kl goes with sigmoid, sigmoid_norm, ",
            ["stages.apo.loss=sigmoid", "stages.apo.trl.f_divergence_type=forward_kl"],
        ),
        (
            ["stages.apo.trl.loss_type=[aot]", "stages.apo.trl.use_weighting=true"],
            "stages.apo.trl.use_weighting=true weighs pairs, which aot sorts; set it to false",
            ["stages.apo.trl.loss_type=[aot]"],
        ),
        (
            ["stages.apo.loss=robust", "stages.apo.trl.label_smoothing=0.1"],
            "stages.apo.trl.label_smoothing=0.1 goes with stages.apo.trl.loss_type; name the losses there, or set "
            "loss_settings",
            ["stages.apo.loss=robust", "+stages.apo.loss_settings.label_smoothing=0.1"],
        ),
        (
            ["stages.apo.trl.loss_type=[sigmoid]", "stages.apo.trl.label_smoothing=0.1"],
            "stages.apo.trl.label_smoothing=0.1 is read by exo_pair, robust, aot, aot_unpaired alone; leave it out",
            ["stages.apo.trl.loss_type=[sigmoid]"],
        ),
        (
            ["stages.apo.trl.discopop_tau=0.1"],
            "stages.apo.trl.discopop_tau=0.1 is read by discopop alone; leave it out",
            ["stages.apo.trl.loss_type=[discopop]", "stages.apo.trl.discopop_tau=0.1"],
        ),
        (
            ["stages.apo.loss=sigmoid", "stages.apo.trl.f_alpha_divergence_coef=0.3"],
            "stages.apo.trl.f_alpha_divergence_coef=0.3 is read by f_divergence_type=alpha_divergence alone",
            [
                "stages.apo.loss=sigmoid", "stages.apo.trl.f_alpha_divergence_coef=0.3",
                "stages.apo.trl.f_divergence_type=alpha_divergence",
            ],
        ),
        (
            [
                "stages.apo.trl.loss_type=[robust]", "stages.apo.loss=robust",
                "+stages.apo.loss_settings.label_smoothing=0.1",
            ],
            "stages.apo.loss_settings belongs to `loss`, in whose place trl.loss_type stands; leave it out",
            ["stages.apo.trl.loss_type=[robust]", "stages.apo.trl.label_smoothing=0.1"],
        ),
        (
            [f"{LOSS_WEIGHT}=2"],
            f"{LOSS_WEIGHT}=2 weighs losses, and TRL's are all alike; leave it out, or set stages.apo.engine=smolpost",
            [f"{LOSS_WEIGHT}=2", "stages.apo.engine=smolpost"],
        ),
        (
            ["stages.sft.trl.loss_type=dft"],
            "stages.sft.trl is read under stages.sft.engine=trl alone; set that, or leave it out",
            ["stages.sft.trl.loss_type=dft", "stages.sft.engine=trl"],
        ),
    ],
    ids=lambda case: case[-1] if isinstance(case, list) else "",
)  # fmt: skip
def test_settings_are_refused_with_a_remedy_that_works(words, line, remedy):
    assert refusal(*words).startswith(line)
    recipe.load([*TRL, *remedy])


def test_an_unknown_setting_is_a_typo():
    assert "stages.apo.trl.loss_tpye" in refusal("stages.apo.trl.loss_tpye=[hinge]")


def test_a_plugins_loss_is_not_trls_of_that_name(hinge):
    assert refusal("stages.apo.loss=hinge").startswith(
        "stages.apo.loss=hinge is a plugin's, which TRL does not run; set trl.loss_type=[hinge] for TRL's own, or "
        "engine=smolpost"
    )
    recipe.load([*TRL, "stages.apo.trl.loss_type=[hinge]"])


def check(stage, num_rows, ranks):
    method = sft if isinstance(stage, SFTStage) else preference
    method.check("x", stage, range(num_rows), dataclasses.replace(CPU, world_size=ranks))


def packs(**changes):
    return SFTStage(**settings(engine="trl", **{"global_batch_size": 4, "micro_batch_size": 2} | changes))


def pairs(**changes):
    trl = TRLPreference(micro_batch_size=2)
    return APOStage(**settings(engine="trl", trl=trl, **{"global_batch_size": 4} | changes))


@pytest.mark.parametrize(
    ("stage", "num_rows", "ranks", "line", "remedy"),
    [
        (
            pairs(), 9, 1,
            "stages.x: 9 rows leave 1 for the last step of an epoch, not a multiple of 2, the rows that "
            "stages.x.trl.micro_batch_size=2 take at once; TRL's trainers would repeat rows or weigh them unevenly; "
            "stop before with stages.x.max_steps=2, take other rows, or set stages.x.engine=smolpost",
            pairs(max_steps=2),
        ),
        (
            packs(), 10, 2, "stages.x: 10 rows leave 2 for the last step of an epoch, not a multiple of 4",
            packs(max_steps=2),
        ),
        (
            packs(global_batch_size=5), 10, 1,
            "stages.x.global_batch_size=5 is not a multiple of 2, the rows that stages.x.micro_batch_size=2 take at",
            packs(global_batch_size=6),
        ),
        (pairs(max_steps=3), 9, 1, "stages.x: 9 rows leave 1 for the last step", pairs(max_steps=2)),
    ],
    ids=["pairs", "packs on two ranks", "batch", "a later step"],
)  # fmt: skip
def test_rows_that_do_not_come_out_even_are_refused(stage, num_rows, ranks, line, remedy):
    with pytest.raises(UserError) as caught:
        check(stage, num_rows, ranks)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    check(remedy, num_rows, ranks)


def test_packs_of_one_rank_need_not_come_out_even():
    """A token weighs the same in a smaller forward pass."""
    check(packs(), 9, 1)
    check(pairs(), 10, 1)


def test_a_trl_that_is_not_there_is_said_in_one_line(monkeypatch):
    """The names that this version imports may move, too."""
    monkeypatch.delitem(sys.modules, "smolpost.training.with_trl.sft")
    monkeypatch.delattr("smolpost.training.with_trl.sft")
    monkeypatch.setitem(sys.modules, "trl", None)
    work = type("Work", (), {"stage": type("Planned", (), {"entry": "sft"}), "folder": Path("sft")})
    with pytest.raises(UserError, match=r"^stages.sft.engine=trl cannot be loaded .*trl.*; install what"):
        packs().make(work)
