"""`doctor --against trl`: both engines agree on a healthy miniature, and a planted fault of one of them shows."""

import tempfile

import pytest
import torch

from smolpost import cli
from smolpost.doctor import stage_sample
from smolpost.doctor.two_engines import Comparison, compare_engines, exit_code
from smolpost.objectives.losses import ApoZero, loss
from smolpost.registry import LOSSES
from smolpost.training import sft
from tests.doctor.clinic import LIGHT, Clinic
from tests.hinge import Hinge

OF_PAIRS = ("loss", "gradient norm", "reward, chosen", "reward, rejected")


def compared(clinic: Clinic, stage: str, *words: str, rows: int = 16) -> Comparison:
    lineage = clinic.lineage(*words)
    return compare_engines(lineage, lineage.stages[stage], rows=rows)


def values(found: Comparison, name: str) -> list[float]:
    return [number.ours for number in found.numbers if number.name == name]


def worst(found: Comparison) -> float:
    assert found.numbers and not found.reason
    return max(number.off for number in found.numbers)


# ---------------------------------------------------------------- both engines agree


def test_both_engines_take_the_same_steps_of_sft(healthy):
    found = compared(healthy, "sft")
    assert found.sample == "10 documents in 2 packs, 3 steps at a learning rate of 0.001, fp32"
    assert [number.step for number in found.numbers] == [1, 1, 1, 2, 2, 3, 3]
    assert worst(found) < 1e-5 and found.differing() == [] and exit_code(found) == 0
    losses = values(found, "loss")
    assert losses[0] == pytest.approx(5.99, abs=0.1) and losses[2] < losses[1] < losses[0] - 0.01  # ln 400 = 5.99


def test_both_engines_take_the_same_steps_of_apo(healthy):
    found = compared(healthy, "apo")
    assert {number.name for number in found.numbers} == {*OF_PAIRS, "largest gradient"}
    assert worst(found) < 1e-5
    assert values(found, "loss")[0] == pytest.approx(1, abs=1e-6)
    chosen, rejected = values(found, "reward, chosen"), values(found, "reward, rejected")
    assert chosen[0] == pytest.approx(0, abs=1e-6) and chosen[1] > 1e-3 > -1e-3 > rejected[1]


SETTINGS = {
    "sft-lora": ("sft", "stages.sft.lora.r=4", "stages.sft.lora.dropout=0.5"),
    "sft-wrapped": ("sft", "stages.sft.packing=wrapped", "stages.sft.engine=trl"),
    "sft-micro": ("sft", "stages.sft.micro_batch_size=4", "stages.sft.activation_checkpointing=full"),
    "apo-lora": ("apo", "stages.apo.lora.r=4"),
    "dpo": ("apo", "stages.apo.loss=sigmoid", "stages.apo.ld_alpha=0.5", "stages.apo.beta=0.2"),
    "robust": ("apo", "stages.apo.loss=robust", "+stages.apo.loss_settings.label_smoothing=0.2"),
    "warmup": ("apo", "stages.apo.warmup_steps=2"),
    "trl": ("apo", "stages.apo.engine=trl", "stages.apo.pack_tokens=null", "stages.apo.trl.micro_batch_size=8"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_a_stage_are_compared_as_they_are(healthy, setting):
    assert worst(compared(healthy, *SETTINGS[setting])) < 1e-5


def test_bf16_agrees_within_its_digits(healthy):
    found = compared(healthy, "apo", "stages.apo.precision=bf16")
    assert found.tolerance == 3e-2 and 1e-5 < worst(found) < 3e-2 and found.sample.endswith("bf16")


# ---------------------------------------------------------------- faults


def test_a_loss_with_another_value_differs(healthy, monkeypatch):
    right = ApoZero.values
    monkeypatch.setattr(ApoZero, "values", lambda *args: right(*args) + 0.25)
    found = compared(healthy, "apo")
    assert {number.name for number in found.differing()} == {"loss"} and exit_code(found) == 1
    assert found.differing()[0].off == pytest.approx(0.25, abs=1e-3)


def test_a_gradient_of_the_wrong_sign_differs_although_loss_and_norm_are_right(healthy, monkeypatch):
    right = ApoZero.values
    monkeypatch.setattr(ApoZero, "values", lambda self, a, b, *rest: 2 - right(self, a, b, *rest))
    found = compared(healthy, "apo")
    first = [number for number in found.differing() if number.step == 1]
    assert [number.name for number in first] == ["largest gradient"] and first[0].off == pytest.approx(2, abs=1e-3)


def test_a_pass_that_divides_for_itself_differs(healthy, monkeypatch):
    right = sft.PackTrainer.pass_loss

    def alone(self, model, batch, counts, totals):
        return right(self, model, batch, counts, torch.tensor(self.count(batch)))

    monkeypatch.setattr(sft.PackTrainer, "pass_loss", alone)
    found = compared(healthy, "sft")
    assert values(found, "loss")[0] == pytest.approx(2 * 5.99, rel=0.02)  # two packs, each divided by its own tokens
    assert exit_code(found) == 1


def test_nan_is_a_difference(healthy, monkeypatch):
    monkeypatch.setattr(ApoZero, "values", lambda self, chosen, rejected, *_: (chosen - rejected) * torch.nan)
    assert exit_code(compared(healthy, "apo")) == 1


# ---------------------------------------------------------------- what cannot be compared


@pytest.fixture
def own_loss(monkeypatch):
    monkeypatch.setattr(LOSSES, "_entries", dict(LOSSES))
    loss("own")(Hinge)


@pytest.mark.usefixtures("hinge")
def test_a_plugin_with_the_name_of_a_loss_of_trl_is_not_compared(healthy):
    assert "stages.apo.loss=hinge is a plugin's" in compared(healthy, "apo", "stages.apo.loss=hinge").reason


NOT_COMPARED = {
    "sft_weight": (["stages.apo.sft_weight=0.5"], "stages.apo.sft_weight=0.5 adds a mean over the global batch"),
    "alone": (
        ["stages.apo.engine=trl", "stages.apo.pack_tokens=null", "stages.apo.trl.loss_type=[nca_pair]"],
        "stages.apo.trl sets loss_type, which TRL alone has",
    ),
    "plugin": (["stages.apo.loss=own"], "stages.apo.loss=own is a plugin's, which TRL does not run"),
    "weights": (
        ["data.preference.sources.gsm8k.loss_weight=2"],
        "data.preference.sources.gsm8k.loss_weight=2 weighs losses",
    ),
}


@pytest.mark.parametrize("case", NOT_COMPARED)
def test_what_one_engine_alone_can_train_is_said(healthy, own_loss, case):
    words, reason = NOT_COMPARED[case]
    found = compared(healthy, "apo", *words)
    assert found.numbers == [] and reason in found.reason and exit_code(found) == 0


def test_a_kind_with_one_engine_is_not_compared(healthy):
    words = ["+stage@stages.kto=kto", "stages.kto.init_from=init", "stages.kto.max_seq_len=256"]
    assert compared(healthy, "kto", *words).reason == "stages of kind kto have one engine"


def test_rows_that_cannot_be_prepared_are_not_compared(clinic):
    clinic.write("sft", [{"messages": [{"role": "user", "content": "?"}]}])
    found = compared(clinic, "sft")
    assert found.numbers == [] and "no prepared rows" in found.reason


def test_a_large_model_on_a_cpu_is_compared_on_few_rows_only(healthy, monkeypatch):
    monkeypatch.setattr(stage_sample, "HEAVY", 1000)
    assert "use a GPU or at most 4 rows" in compared(healthy, "sft").reason
    assert worst(compared(healthy, "sft", rows=4)) < 1e-5


def test_a_verb_prints_both_engines_side_by_side(clinic, capsys, monkeypatch):
    words = ["doctor", *clinic.words, *LIGHT, "stage=apo", "--against", "trl"]

    def call() -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        return stop.value.code, capsys.readouterr().out

    code, text = call()
    lines = [line.split() for line in text.splitlines()]
    assert code == 0 and lines[0] == ["step", "number", "smolpost", "trl", "difference", "verdict"]
    assert sum(line[-1:] == ["pass"] for line in lines) == 13 and "both engines agree" in text
    assert "peak" not in text  # the trainers' own lines
    right = ApoZero.values
    monkeypatch.setattr(ApoZero, "values", lambda *args: right(*args) + 0.25)
    code, text = call()
    assert code == 1 and "3 of 13 numbers differ; report this as a bug of smolpost" in text


def test_nothing_of_the_comparison_is_kept(clinic, tmp_path, monkeypatch):
    def files() -> dict:
        return {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*") if file.name != "hashes.json"}

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    before = files()
    compared(clinic, "apo", "stages.apo.engine=trl", "stages.apo.pack_tokens=null", rows=4)
    assert files() == before
