"""GSM8K's problems as SmolTalk2 rows: `smoltalk2_{mid,sft,heldout,preference,heldout_pairs}.jsonl`."""

from dataclasses import dataclass

from smolpost.errors import Wrong
from smolpost.schema import MISSING, Recipe, number, seeded
from smolpost.stages.base import Stage, Work, stage_kind

PAIRS = ("smoltalk2_preference.jsonl", "smoltalk2_heldout_pairs.jsonl")


@stage_kind
@dataclass
class Gsm8kStage(Stage):
    """Every problem becomes one row; the reasoning rows get the problems that the shares leave."""

    kind: str = "gsm8k"
    problems: str = MISSING  # mixture name; its sources have columns: gsm8k
    sft: float = number("(0, 1)", 0.37)  # share of the problems; half of these rows think
    preference: float = number("[0, 1)", 0.1)  # share of the problems; rejected: one calculation is wrong; 0: no pairs
    heldout: float = number("(0, 1)", 0.05)  # share of the SFT rows and of the pairs that is kept from training
    seed: int = seeded(0)  # of the wrong calculations

    VERSION = 1
    SCRIPT = "data_gen/gsm8k.py"

    def mixtures(self):
        return [("problems", self.problems)]

    def check(self, key, recipe, place):
        if self.sft + self.preference >= 1:
            raise Wrong(f"{key}.sft", f"={self.sft} and preference={self.preference} leave nothing for mid; lower one")
        mixture = recipe.data.get(self.problems)
        for name, source in mixture.sources.items() if mixture else ():
            if source.columns != "gsm8k":
                raise Wrong(
                    f"data.{self.problems}.sources.{name}.columns",
                    f"={source.columns}, but {key} reads problems; set columns=gsm8k",
                )
        if not self.preference and (reader := self._pairs_reader(key.removeprefix("stages."), recipe)):
            raise Wrong(f"{key}.preference", f"=0 writes no pairs, but {reader}; raise it, or leave that stage out")

    def _pairs_reader(self, entry: str, recipe: Recipe) -> str:
        """What reads the pairs of this stage, in words; "" where nothing does."""
        for name, stage in recipe.stages.items():
            for _, mixture in stage.mixtures():
                for source in recipe.data[mixture].sources.values() if mixture in recipe.data else ():
                    if source.stage == entry and source.path in PAIRS:
                        return f"stages.{name} reads {source.path}"
        return ""

    def make(self, work: Work):
        from smolpost.data.gsm8k import write_gsm8k
        from smolpost.data.mixtures import mix

        rows = (row for _, row in mix(work.data[self.problems]))
        shares = {name: getattr(self, name) for name in ("sft", "preference", "heldout", "seed")}
        report = write_gsm8k(rows, work.folder, key=f"stages.{work.stage.entry}", **shares)
        counts = ", ".join(f"{name} {count}" for name, count in report["rows"].items())
        print(f"{report['problems']} problems as rows: {counts}", flush=True)
        return report
