"""APO, DPO and their relatives on preference pairs, beside a reference."""

from dataclasses import dataclass

from smolpost.data.settings import PairRows
from smolpost.errors import Wrong
from smolpost.registry import LOSSES
from smolpost.schema import PACKED_ATTENTION
from smolpost.stages.base import stage_kind
from smolpost.stages.train import TrainStage
from smolpost.training.settings import TRL_F_DIVERGENCE_LOSSES, TRL_LOSSES, TRL_SMOOTHED_LOSSES, PairTraining

OURS = "smolpost.objectives.losses"  # whose losses are TRL's, under the same names


@stage_kind
@dataclass
class APOStage(TrainStage, PairTraining):
    kind: str = "apo"

    VERSION = 1
    ROWS = PairRows

    def key_parts(self, keys, stage):
        return {"loss_version": LOSSES[self.loss].VERSION}

    def nested_settings(self):
        return [("loss_settings", self.loss_settings, LOSSES[self.loss], f"loss={self.loss}")]

    def check(self, key, recipe, place):
        super().check(key, recipe, place)
        if self.overlong == "split":
            raise Wrong(f"{key}.overlong", "=split cannot be done to a pair; choose one of: refuse, truncate, drop")
        if self.engine == "trl":
            self._check_trl(key)
            return
        attention = recipe.model.attn_implementation
        if attention != PACKED_ATTENTION:
            raise Wrong(
                key,
                f" trains on pairs that share their prompt, whose sides model.attn_implementation={attention} cannot "
                f"keep apart; set it to {PACKED_ATTENTION}",
            )

    def _check_trl(self, key: str) -> None:
        trl, losses = self.trl, self.trl.loss_type or [self.loss]
        if self.pack_tokens is not None:
            raise Wrong(
                f"{key}.pack_tokens",
                f"={self.pack_tokens} packs pairs, which TRL cannot; set it to null, and trl.micro_batch_size as fits",
            )
        if self.sft_weight:
            raise Wrong(
                f"{key}.sft_weight",
                f"={self.sft_weight:g} adds a mean over the global batch, which TRL does not have; set it to 0, and "
                f"set trl.loss_type=[{','.join(losses)},sft] and trl.loss_weights=[{'1,' * len(losses)}"
                f"{self.sft_weight:g}], whose mean is over a forward pass",
            )
        if not trl.loss_type and LOSSES[self.loss].__module__ != OURS:
            remedy = f"trl.loss_type=[{self.loss}] for TRL's own" if self.loss in TRL_LOSSES else "trl.loss_type"
            raise Wrong(
                f"{key}.loss", f"={self.loss} is a plugin's, which TRL does not run; set {remedy}, or engine=smolpost"
            )
        if unknown := [loss for loss in losses if loss not in TRL_LOSSES]:
            raise Wrong(
                f"{key}.trl.loss_type",
                f"={unknown[0]} is not a loss of TRL, which has {', '.join(TRL_LOSSES)}; take one, or engine=smolpost",
            )
        if trl.loss_type and self.loss_settings:
            raise Wrong(f"{key}.loss_settings", " belongs to `loss`, in whose place trl.loss_type stands; leave it out")
        if trl.loss_weights and len(trl.loss_weights) != len(losses):
            raise Wrong(
                f"{key}.trl.loss_weights",
                f" has {len(trl.loss_weights)} numbers for {len(losses)} losses; give one for each",
            )
        self._check_trl_settings(f"{key}.trl", losses)

    def _check_trl_settings(self, key: str, losses: list[str]) -> None:
        """Refuse settings that TRL refuses, and those that it would not read."""
        trl = self.trl
        if "exo_pair" in losses and not trl.label_smoothing:
            raise Wrong(f"{key}.label_smoothing", "=0, and exo_pair needs more; its paper recommends 1e-3")
        if trl.f_divergence_type != "reverse_kl" and not set(losses) <= set(TRL_F_DIVERGENCE_LOSSES):
            raise Wrong(
                f"{key}.f_divergence_type",
                f"={trl.f_divergence_type} goes with {', '.join(TRL_F_DIVERGENCE_LOSSES)}; set it to reverse_kl",
            )
        if trl.use_weighting and set(losses) & {"aot", "aot_unpaired"}:
            raise Wrong(f"{key}.use_weighting", "=true weighs pairs, which aot sorts; set it to false")
        if trl.label_smoothing and not trl.loss_type:
            raise Wrong(
                f"{key}.label_smoothing",
                f"={trl.label_smoothing:g} goes with {key}.loss_type; name the losses there, or set loss_settings",
            )
        readers = {
            "label_smoothing": (TRL_SMOOTHED_LOSSES, losses),
            "discopop_tau": (["discopop"], losses),
            "f_alpha_divergence_coef": (
                ["f_divergence_type=alpha_divergence"],
                [f"f_divergence_type={trl.f_divergence_type}"],
            ),
        }
        for name, (known, chosen) in readers.items():
            if getattr(trl, name) != getattr(type(trl)(), name) and not set(known) & set(chosen):
                raise Wrong(
                    f"{key}.{name}", f"={getattr(trl, name):g} is read by {', '.join(known)} alone; leave it out"
                )

    def method(self):
        if self.engine == "trl":
            from smolpost.training.with_trl import preference
        else:
            from smolpost.training import preference

        return preference
