"""DPO's losses: on our engine where it has them, else on TRL's."""

from collections.abc import Sequence

from smolpost.errors import UserError
from smolpost.importing.draft import Draft
from smolpost.objectives.losses import LOSSES
from smolpost.screen import shown
from smolpost.training.settings import TRL_LOSSES

SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # losses of TRL that read label_smoothing


def losses(
    draft: Draft,
    names: Sequence[str],
    weights: Sequence[float],
    said: Sequence[str],
    *,
    smoothing: float = 0.0,
    smoothing_key: str = "label_smoothing",
    micro: int = 1,
    only_trl: dict[str, tuple[object, str]] | None = None,
) -> None:
    """Write the loss.

    Args:
        names: TRL's names.
        weights: One for each, or none for 1.
        said: Keys of the file that say them.
        smoothing: `label_smoothing`.
        micro: Pairs per rank and forward pass.
        only_trl: What needs TRL's trainer: our name under `trl` -> the value, and the key of the file that says it.
    Raises:
        UserError: TRL has no such loss.
    """
    if unknown := [name for name in names if name not in TRL_LOSSES]:
        raise UserError(
            f"{shown(draft.file)}: loss_type={unknown[0]} is not a loss of TRL 1.16, which has {', '.join(TRL_LOSSES)};"
            " choose one of them"
        )
    if weights and len(weights) != len(names):
        raise UserError(
            f"{shown(draft.file)}: loss_weights has {len(weights)} numbers for {len(names)} losses; give one for each"
        )
    if smoothing and not set(names) & set(SMOOTHED):
        draft.broken(smoothing_key, f"TRL 1.16 reads it for {', '.join(SMOOTHED)} alone; older versions for sigmoid")
        smoothing = 0.0
    by_weight = dict(zip(names, weights or [1.0] * len(names), strict=True))
    nll = by_weight.pop("sft", 0.0)
    if only_trl or len(by_weight) != 1 or not set(by_weight) <= set(LOSSES) or not all(by_weight.values()):
        _on_trl(draft, names, weights, said, smoothing, smoothing_key, micro, only_trl or {})
        return
    [(name, weight)] = by_weight.items()
    draft.set(".loss", name, *said)
    if name == "robust":
        keys = [smoothing_key] if smoothing else []
        draft.set(".loss_settings", {"label_smoothing": smoothing}, *keys)
    if nll:
        note = "sft's weight over the other's: the mean is over the global batch, TRL's over a forward pass"
        draft.set(".sft_weight", nll / weight, *said, note=note)
    if weight != 1:
        draft.differs(said[-1], f"a single loss is not scaled here; it is {weight:g} times as large under TRL")


def _on_trl(draft, names, weights, said, smoothing, smoothing_key, micro, only_trl) -> None:
    draft.set(".engine", "trl", *said, note="TRL's own trainer on the same rows; our engine does not have this")
    draft.set(".trl.loss_type", list(names), *said)
    if weights:
        draft.set(".trl.loss_weights", list(weights), *said)
    if smoothing:
        draft.set(".trl.label_smoothing", smoothing, smoothing_key)
    draft.set(".trl.micro_batch_size", micro, note="pairs per forward pass; some losses depend on it")
    for name, (value, key) in only_trl.items():
        draft.set(f".trl.{name}", value, key)
