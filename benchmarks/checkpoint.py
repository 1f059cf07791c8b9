"""What a resumable checkpoint costs: seconds for which training stands still, and the steps while it is written.

python benchmarks/checkpoint.py [--quick] [--device cuda]

"beside" is what a stage does: training goes on once a copy is in memory. "waiting" writes without a copy, as a stage
does if memory is too small for one. "none" saves nothing.
"""

import math
import time
from pathlib import Path

from side_by_side import alternate, keep, options, run_side, show
from workload import SMALL, SMOLLM3_3B, Clock, Side, scratch, train

from smolpost.stages.sft import SFTStage
from smolpost.training import checkpoint_writer
from smolpost.training.checkpoints import num_bytes

ROWS = 200
WARMUP = 1
EVERY = 6  # steps between checkpoints


class Still(Clock):
    """Also counts the seconds between the end of a step and the end of its save."""

    def __init__(self, warmup: int):
        super().__init__(warmup)
        self.still: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        self.ended = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.still.append(time.perf_counter() - self.ended)


def measure(way: str, case: dict) -> dict:
    if way == "waiting":
        checkpoint_writer.SPARE = math.inf  # no memory is enough for a copy
    # The last checkpoint has as many steps after it as the others: all are written before training ends.
    steps = EVERY * (case["checkpoints"] + 1)
    stage = SFTStage(
        init_from="x", data="y", max_seq_len=case["length"], overlong="truncate", learning_rate=1e-4,
        global_batch_size=1, max_steps=steps, save_steps=EVERY, logging_steps=1, report_to=[],
    )  # fmt: skip
    saves = way != "none"
    with scratch() as folder:
        side, clock = Side("smolpost"), Still(WARMUP)
        trainer, _, _ = train(stage, case | {"rows": ROWS}, side, Path(folder), clock, checkpoints=saves)
        size = num_bytes(sum(p.numel() for p in trainer.model.parameters()))
    # The first one also allocates, pinned on CUDA.
    still = {"still": sum(clock.still[1:]) / len(clock.still[1:]), "first_still": clock.still[0]} if saves else {}
    return clock.measured(**still, checkpoint_gb=size / 1e9, steps=steps - WARMUP)


SIDES = ("beside", "waiting", "none")


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    if run_side({way: lambda case, way=way: measure(way, case) for way in SIDES}, arguments):
        return
    shared = {"file": str(arguments.data / "gsm8k" / "smoltalk2_sft.jsonl"), "device": arguments.device}
    if arguments.device == "cuda":
        case = shared | {"model": SMOLLM3_3B, "vocab": 128256, "length": 16384, "checkpoints": 3}
    elif arguments.quick:
        arguments.repeats = 1
        case = shared | {"model": SMALL, "vocab": 8192, "length": 256, "checkpoints": 2}
    else:
        case = shared | {"model": SMALL | {"hidden_size": 512}, "vocab": 65536, "length": 512, "checkpoints": 3}
    sides = alternate(list(SIDES), case, arguments)
    table = [
        {
            "side": side,
            "training stands still, s": found.get("still"),
            "the first time, s": found.get("first_still"),
            "all steps, s": found["seconds"],
            "more than none, s": found["seconds"] - sides["none"]["seconds"],
            "CPU s": found["cpu_seconds"],
            "peak GB": found["peak_gb"],
        }
        for side, found in sides.items()
    ]
    size = sides["none"]["checkpoint_gb"]
    show(f"{case['checkpoints']} checkpoints of {size:.3g} GB in {sides['none']['steps']:.0f} steps", table)
    keep("checkpoint", arguments, [{"case": f"checkpoints of {size:.3g} GB", "settings": case, "sides": sides}])


if __name__ == "__main__":
    main()
