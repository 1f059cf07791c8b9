"""The settings that follow from a checkpoint and its rows, each with its reason."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from smolpost.data.packing import best_fit_decreasing
from smolpost.data.settings import DocumentRows, PairRows
from smolpost.progress import plural
from smolpost.starting.checkpoint import Checkpoint
from smolpost.starting.rows import File, Tokens
from smolpost.training.memory import CARDS, SHARE, gigabytes, memory, setup_of, shape_of
from smolpost.training.settings import LoRA, PackTraining

STEP = 256  # tokens, of which max_seq_len is a multiple
COVERED = 99  # percent of the rows that max_seq_len holds completely
PASS_TOKENS = 8192  # of a forward pass, about; short rows share one
MOST_PACKS, MOST_PAIRS = 128, 32  # per optimizer step, as published
FEWEST_ROWS = 8  # per optimizer step: fewer make it noise
ENOUGH_STEPS = 100  # of an epoch. The playbook lost 12 points of IFEval with 19 steps, and none with 150 to 300
MANY_STEPS = 1000  # of an epoch, from which one epoch is enough
LORA_TIMES = 10  # that the learning rate of full training is multiplied by
# Parameters below which a learning rate holds, for SFT and for preference training.
RATES = ((50e6, 3e-4, 3e-5), (500e6, 5e-5, 2e-6), (2e9, 2e-5, 1e-6), (10e9, 1e-5, 5e-7), (math.inf, 5e-6, 2e-7))
RANK = LoRA(r=16)


class Setting(NamedTuple):
    """A value of the pipeline; `key` is relative to the stage, or whatever it belongs to."""

    key: str
    value: object
    why: str


@dataclass(frozen=True)
class Data:
    """The files of one layout, and their sample together.

    Attributes:
        tokens: Of each file.
        num_rows: That train.
        lengths: [N] tokens that a row needs.
        weights: [N] rows of the files that a row of the sample stands for.
    """

    files: list[File]
    tokens: list[Tokens]

    @property
    def num_rows(self) -> int:
        """Rows that train, about: without those held out, and without the share that is refused in the sample."""
        return round(sum(self._each()))

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens that a row of the sample needs."""
        return np.concatenate([tokens.lengths for tokens in self.tokens])

    @property
    def weights(self) -> np.ndarray:
        """[N] rows that a row of the sample stands for."""
        shares = zip(self._each(), self.tokens, strict=True)
        return np.concatenate([np.full(len(t.lengths), rows / len(t.lengths)) for rows, t in shares])

    def percentile(self, percent: float) -> int:
        """Tokens that at most this share of all rows needs."""
        order = np.argsort(self.lengths, kind="stable")
        upto = np.cumsum(self.weights[order])
        place = np.searchsorted(upto, percent / 100 * upto[-1])
        return int(self.lengths[order][min(place, len(order) - 1)])

    def thinking(self) -> float:
        """Share of the rows whose reasoning trains."""
        return float(np.average(np.concatenate([tokens.thinks for tokens in self.tokens]), weights=self.weights))

    def above(self, limit: int) -> float:
        """Share of the rows that need more tokens."""
        return float(np.average(self.lengths > limit, weights=self.weights))

    def cut_tokens(self, limit: int) -> float:
        """Tokens of all rows, each cut at the limit."""
        return float((np.minimum(self.lengths, limit) * self.weights).sum())

    def units(self, length: int) -> float:
        """Pairs, or packs of this length, that an epoch has, about."""
        if self.files[0].layout == "pairs":
            return self.num_rows
        packs = best_fit_decreasing(np.minimum(self.lengths, length), length).num_packs
        return packs * self.num_rows / len(self.lengths)

    def _each(self) -> list[float]:
        pairs = zip(self.files, self.tokens, strict=True)
        return [(f.num_rows - t.held_out) * len(t.lengths) / (len(t.lengths) + len(t.faults)) for f, t in pairs]


def looking_stage(layout: str) -> DocumentRows | PairRows:
    """A stage with the usual settings for reading rows."""
    return (DocumentRows if layout == "documents" else PairRows)(data=layout, max_seq_len=2)


def stage_settings(data: Data, checkpoint: Checkpoint, *, lora: bool, gpus: int) -> list[Setting]:
    """Lengths, batch, epochs and learning rate of an SFT or preference stage."""
    pairs = data.files[0].layout == "pairs"
    length = row_length(data, checkpoint.context)
    found = [_length_setting(data, length, checkpoint.context)]
    units = data.units(length)
    batch = batch_of(units, units / data.num_rows, MOST_PAIRS if pairs else MOST_PACKS, gpus)
    epochs = 1 if pairs or units / batch >= MANY_STEPS else 3
    steps = num_steps(data, length, batch, epochs)
    unit = "pairs" if pairs else "packs"
    kept = round(batch * data.cut_tokens(length) / units)
    found += [
        *(
            []
            if pairs
            else [Setting("packing", "bfd", "short rows share a pack; none sees another, and none is split")]
        ),
        Setting("global_batch_size", batch, f"{unit} per optimizer step, about {kept:,} tokens"),
        *_passes(pairs, length, batch, gpus),
        Setting("num_epochs", epochs, f"about {counted(steps)}"),
        _rate(checkpoint.parameters, pairs, lora),
    ]
    if pairs:
        found.append(Setting("beta", 0.1, "the playbook scored better with it than with the published 0.05"))
        found.append(Setting("seeds", [42], "one model; with several, a soup stage averages them"))
    if lora:
        found.append(Setting("lora.r", RANK.r, "adapters train, and are merged into the weights at the end"))
        if not checkpoint.takes_adapters(RANK):
            found.append(Setting("lora.target_modules", ["all-linear"], "its layers have names of their own"))
    return found


def row_length(data: Data, context: int | None) -> int:
    """max_seq_len: holds COVERED percent of the rows completely, as a multiple of STEP, within the context."""
    length = STEP * math.ceil(data.percentile(COVERED) / STEP)
    return min(length, context or length)


def batch_of(units: float, units_per_row: float, most: int, ranks: int) -> int:
    """Packs or pairs per optimizer step: the most, as a power of two, that leave an epoch ENOUGH_STEPS.

    At least FEWEST_ROWS rows, and a multiple of the ranks.

    Args:
        units: Packs or pairs of an epoch.
        units_per_row: Packs that a row takes, about.
    """
    batch = 2 ** math.floor(math.log2(max(1, min(most, units / ENOUGH_STEPS))))
    fewest = 2 ** math.ceil(math.log2(max(1, min(most, FEWEST_ROWS * units_per_row))))
    return ranks * math.ceil(max(batch, fewest) / ranks)


def num_steps(data: Data, length: int, batch: int, epochs: float) -> int:
    """Optimizer steps, about."""
    return max(1, round(data.units(length) * epochs / batch))


def counted(steps: int) -> str:
    return f"{steps:,} optimizer {plural('step', steps)}"


def learning_rate(parameters: int, pairs: bool, lora: bool) -> float:
    """Peak learning rate for a model of this size."""
    rate = next(rates for rates in RATES if parameters < rates[0])[2 if pairs else 1]
    return float(f"{rate * (LORA_TIMES if lora else 1):.0e}")


def _length_setting(data: Data, length: int, context: int | None) -> Setting:
    unit = "pairs" if data.files[0].layout == "pairs" else "rows"
    longest, above = int(data.lengths.max()), data.above(length)
    limit = f", the model's context of {context:,}" if context and length == context else ""
    if not above:
        return Setting("max_seq_len", length, f"tokens; no {unit} of the sample are longer{limit}")
    cut = f"tokens{limit}; {above:.1%} of the {unit} are longer, up to {longest:,}, and are cut (overlong: truncate)"
    return Setting("max_seq_len", length, cut)


def _passes(pairs: bool, length: int, batch: int, ranks: int) -> list[Setting]:
    """How much a forward pass takes; not part of the result."""
    if length >= PASS_TOKENS:
        return []
    if pairs:
        return [Setting("pack_tokens", PASS_TOKENS, "tokens of a forward pass: memory and speed, not the result")]
    most, micro = batch // ranks, 1
    while 2 * micro * length <= PASS_TOKENS and most % (2 * micro) == 0:
        micro *= 2
    return [Setting("micro_batch_size", micro, "packs of a forward pass: memory and speed, not the result")]


def _rate(parameters: int, pairs: bool, lora: bool) -> Setting:
    size = f"{sized(parameters)} parameters"
    times = f", {LORA_TIMES} times that of full training" if lora else ""
    found = "" if lora else "; playbook at 3B: 1e-7 best, published 1e-6" if pairs else "; at 3B: 3e-6 to 2e-5"
    return Setting("learning_rate", learning_rate(parameters, pairs, lora), f"for {size}{times}{found}")


def sized(number: float) -> str:
    """A number of parameters: 36k, 1.2M, 135M, 3.1B."""
    unit, size = ("B", 1e9) if number >= 1e9 else ("M", 1e6) if number >= 1e6 else ("k", 1e3)
    return f"{number / size:.3g}{unit}"


# ---------------------------------------------------------------- devices


class Launch(NamedTuple):
    """
    Attributes:
        accelerate: A file of recipes/accelerate.
        why: The reason.
        fits: Whether a training step of every stage fits in the memory; None where it is not known.
    """

    accelerate: str
    why: str
    fits: bool | None


def choose_launch(checkpoint: Checkpoint, lengths: list[int], *, lora: bool, gpus: int, card: float | None) -> Launch:
    """Where the model is held: on every GPU, or spread over them where it does not fit on each.

    Args:
        lengths: max_seq_len of the stages.
        card: Bytes of a GPU of this machine; None: it has none, and the larger of the usual sizes is assumed.
    """
    room = card or CARDS[0]
    on = f"{room / 1e9:.0f} GB{'' if card else ', assumed as this machine has no GPU'}"
    shape = shape_of(checkpoint.config, compiled=True)
    spread = "fsdp2" if checkpoint.model_type == "smollm3" else "zero3"  # fsdp2's file names SmolLM3's layer
    if shape is None:
        name = "single" if gpus == 1 else spread
        return Launch(name, "the memory that this kind of model needs is not known", None)

    def peak(backend: str) -> float:
        stage = PackTraining(
            init_from="checkpoint", data="sft", learning_rate=1e-5, global_batch_size=gpus,
            max_seq_len=max(max(lengths), PASS_TOKENS), lora=RANK if lora else LoRA(),
        )  # fmt: skip
        setup = setup_of(stage, bf16=True, backend=backend, ranks=gpus)
        return min(memory(shape, setup).peak.values())

    plain = "single" if gpus == 1 else "ddp"
    for name in (plain, *([spread] if gpus > 1 else [])):
        if (needed := peak(name)) <= SHARE * room:
            held = "one process" if gpus == 1 else "a copy on each GPU" if name == plain else "spread over the GPUs"
            held += ", by smolpost[deepspeed]" if name == "zero3" else ""
            return Launch(name, f"{held}: about {gigabytes(needed)} GB of {on}", True)
    return Launch(name, f"needs about {gigabytes(needed)} GB of {on}", False)
