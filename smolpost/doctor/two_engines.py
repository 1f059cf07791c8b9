"""`smolpost doctor --against trl`: a stage's first steps by our engine and by TRL's, side by side.

Both start from the stage's checkpoint and train on the same short sample, with the stage's own loss, optimizer and
adapters. Nothing that they train is kept.
"""

import contextlib
import gc
import io
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from rich.console import Group
from rich.text import Text
from transformers import PreTrainedModel, TrainerCallback

from smolpost.doctor.stage_sample import Case, NotChecked, examined
from smolpost.doctor.training_steps import TOLERANCE, joined, without_dropout
from smolpost.errors import UserError
from smolpost.pipeline.lineage import Lineage, Located
from smolpost.screen import Blocks
from smolpost.training.adapters import add_adapters
from smolpost.training.settings import Training
from smolpost.training.train import load

STEPS = 3  # the policy differs from the reference from the second one on
SEED = 0
NUM_PACKS = 2  # so that TRL accumulates gradients, and documents share a pack
NAMES = {"loss": "loss", "grad_norm": "gradient norm", "rewards/chosen": "reward, chosen",
         "rewards/rejected": "reward, rejected"}  # fmt: skip
ENGINES = ("smolpost", "trl")


class Number(NamedTuple):
    """What both engines say of one thing.

    Attributes:
        step: Optimizer step, from 1.
        off: Their difference, relative to TRL's number; a reward's, relative to 1 if TRL's is smaller, as losses bend
            at rewards of about 1; the gradients', the largest one of any element, relative to TRL's largest gradient.
    """

    step: int
    name: str
    ours: float
    trl: float
    off: float


class Comparison(NamedTuple):
    """Numbers of the first steps, or the reason why there are none.

    Attributes:
        sample: What was trained on, in words.
        tolerance: Largest `off` that passes.
    """

    numbers: list[Number]
    sample: str = ""
    tolerance: float = 0.0
    reason: str = ""

    def differing(self) -> list[Number]:
        return [number for number in self.numbers if not number.off <= self.tolerance]  # nan differs


class Steps(NamedTuple):
    """What one engine logged of each step, and its first step's gradients by parameter, on the CPU."""

    log: list[dict[str, float]]
    gradients: dict[str, torch.Tensor]

    def largest(self) -> float:
        return max(float(g.abs().max()) for g in self.gradients.values())


def compare_engines(lineage: Lineage, stage: Located, *, rows: int = 32) -> Comparison:
    """Take the first steps of a training stage with both engines, whichever it is set to.

    Args:
        stage, rows: As for `checks.diagnose`.
    Raises:
        UserError: As `checks.diagnose`.
    """
    with examined(lineage, stage, rows) as case:
        try:
            variants = dict(zip(ENGINES, _variants(case), strict=True))
            sample, words = _sample(case)
            for variant in variants.values():
                _check_rows(case, variant, sample)
            steps = [_first_steps(case, variant, sample) for variant in variants.values()]
        except NotChecked as reason:
            return Comparison([], reason=str(reason))
        words += f", {STEPS} steps at a learning rate of {case.config.learning_rate:g}, "
        words += "bf16" if case.environment.bf16 else "fp32"
        return Comparison([*_numbers(*steps)], words, TOLERANCE[case.environment.bf16])


def _variants(case: Case) -> Iterator[Training]:
    """The stage under our engine and under TRL's, one row per forward pass.

    Raises:
        NotChecked: One of them cannot train it.
    """
    config, key = case.config, f"stages.{case.stage.entry}"
    if "engine" not in {f.name for f in fields(config)}:
        raise NotChecked(f"stages of kind {config.kind} have one engine")
    steps = {"max_steps": STEPS, "logging_steps": 1, "report_to": []}
    steps |= {"lr_scheduler": "constant", "warmup_ratio": 0.0, "warmup_steps": None}
    is_pairs = config.layout == "pairs"
    ours, peer = (
        ({"trl": replace(config.trl, micro_batch_size=1, precompute_ref_log_probs=False)}, {"pack_tokens": None})
        if is_pairs
        else ({"micro_batch_size": 1}, {"micro_batch_size": 1})
    )
    for engine, changes in zip(ENGINES, (ours, peer), strict=True):
        variant = replace(config, engine=engine, **steps, **changes)
        if engine == "smolpost" and (alone := _changed(variant.trl)):
            raise NotChecked(f"{key}.trl sets {', '.join(alone)}, which TRL alone has")
        try:
            variant.check(key, case.lineage.recipe, lambda _: "the recipe")
        except UserError as error:
            raise NotChecked(str(error)) from error
        yield replace(variant, trl=replace(variant.trl, micro_batch_size=1)) if is_pairs else variant


def _changed(settings: Any) -> list[str]:
    """Names of the fields that are not at their defaults."""
    return [f.name for f in fields(settings) if getattr(settings, f.name) != getattr(type(settings)(), f.name)]


def _sample(case: Case) -> tuple[Dataset, str]:
    """The rows of the global batch that every step trains on, and what they are in words."""
    case.need("prepared_rows", "the checks without --against")
    if case.config.layout == "pairs":
        return case.short_pairs, f"{len(case.short_pairs)} pairs"
    found = case.short_documents()
    packs = [joined(found[i::NUM_PACKS]) for i in range(NUM_PACKS)]
    words = f"{len(found)} documents in {len(packs)} packs"
    return Dataset.from_list([{name: values.tolist() for name, values in pack.items()} for pack in packs]), words


def _check_rows(case: Case, variant: Training, rows: Dataset) -> None:
    """
    Raises:
        NotChecked: The engine cannot train the rows.
    """
    try:
        variant.method().check(case.stage.entry, _one_batch(variant, rows), rows, case.environment)
    except UserError as error:
        raise NotChecked(str(error)) from error


def _one_batch(variant: Training, rows: Dataset) -> Training:
    return replace(variant, global_batch_size=len(rows))


def _first_steps(case: Case, variant: Training, rows: Dataset) -> Steps:
    """Train as `training.train.train` does, but without dropout, checkpoints and lines in the terminal."""
    stage, method, environment = _one_batch(variant, rows), variant.method(), case.environment

    def load_start() -> PreTrainedModel:
        return case.runnable(load(case.start, stage, case.lineage.recipe.model.attn_implementation))

    reference, _ = method.reference(stage, rows, case.start, load_start, case.folder / "references", environment)
    arguments = method.arguments(stage, SEED, len(rows), case.folder / stage.engine, environment)
    arguments.set_save("no")
    model = load_start()
    if stage.lora.r:
        model = add_adapters(model, stage.lora, SEED)
    trainer = method.trainer(
        stage, without_dropout(model), case.tokenizer, rows, reference, arguments, SEED, environment
    )
    trainer.add_callback(first := FirstGradients())
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    del trainer, model, reference  # before the other engine loads its own
    gc.collect()
    return Steps(log, first.gradients)


class FirstGradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.gradients = {
                name: p.grad.detach().cpu().clone() for name, p in model.named_parameters() if p.grad is not None
            }


def _numbers(ours: Steps, trl: Steps) -> Iterator[Number]:
    for step, (a, b) in enumerate(zip(ours.log, trl.log, strict=True), 1):
        for key, name in NAMES.items():
            if key in b:
                scale = max(1.0, abs(b[key])) if key.startswith("rewards/") else abs(b[key])
                yield Number(step, name, a[key], b[key], abs(a[key] - b[key]) / scale)
        if step == 1:
            off = max(float((g - trl.gradients[name]).abs().max()) for name, g in ours.gradients.items())
            yield Number(step, "largest gradient", ours.largest(), trl.largest(), off / trl.largest())


def exit_code(found: Comparison) -> int:
    """1 if a number differs; 0 also where nothing could be compared."""
    return int(bool(found.differing()))


def report(found: Comparison) -> Group:
    """The numbers in a table, and the verdict."""
    if found.reason:
        return Group(Text(f"not compared: {found.reason}", "bold"))
    differing = found.differing()
    rows = [
        (str(n.step), n.name, f"{n.ours:.7g}", f"{n.trl:.7g}", f"{n.off:.1e}", "fail" if n in differing else "pass")
        for n in found.numbers
    ]
    heads = ("step", "number", "smolpost", "trl", "difference", "verdict")
    styles = ["bold red" if n in differing else None for n in found.numbers]
    verdict = (
        f"{len(differing)} of {len(rows)} numbers differ; report this as a bug of smolpost, with this table and the "
        "stage's settings"
        if differing
        else "both engines agree"
    )
    return Group(
        Blocks(heads, rows, names=2, styles=styles),
        Text(f"{found.sample}; tolerance {found.tolerance:g}"),
        Text(verdict, "bold"),
    )
