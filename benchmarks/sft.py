"""SFT by our engine and by TRL's: tokens per second and peak memory of one stage on the same real rows.

python benchmarks/sft.py [--quick] [--device cuda]

The stage's `engine` decides who trains. Rows, packs (best fit over the data set), their order, weights, optimizer,
activation checkpointing (on a GPU), precision and global batch of one pack are the stage's. "trl" has the attention of
a pipeline, or flash attention where it is installed; "trl, sdpa" has transformers' own. "trl, liger" runs where that is
installed.
"""

import functools
from pathlib import Path

from side_by_side import alternate, compared, keep, options, run_side
from workload import SMALL, SMOLLM3_3B, Clock, Side, needed, scratch, sides_of, train

from smolpost.chat.fates import Fate
from smolpost.stages.sft import SFTStage

ROWS = 1000
WARMUP = 1


def measure(side: Side, case: dict) -> dict:
    settings = {"activation_checkpointing": "full" if case["device"] == "cuda" else "none"} | side.settings
    stage = SFTStage(
        init_from="x", data="y", max_seq_len=case["length"], overlong="truncate", learning_rate=1e-4,
        global_batch_size=1, max_steps=WARMUP + case["steps"], logging_steps=1, report_to=[], engine=side.engine,
        **settings,
    )  # fmt: skip
    with scratch() as folder:
        trainer, packs, _ = train(stage, {"rows": ROWS} | case, side, Path(folder), clock := Clock(WARMUP))
        taken = packs.select(trainer.batches.order()[WARMUP : WARMUP + case["steps"]])
        tokens = sum(len(pack["input_ids"]) for pack in taken)
        scored = sum(pack["fates"].count(Fate.TRAINED) for pack in taken)
        return clock.measured(tokens=tokens, trained_share=scored / tokens, **needed(trainer, taken, case))


TARGETS = {
    "rows of 4096, vocabulary 128256": {"speed": 4, "memory": 2},
    "rows of 4096, vocabulary 8192": {"speed": 2},
}
SIDES = {
    "smolpost": Side("smolpost"),
    "trl": Side("trl"),
    "trl, sdpa": Side("trl", attention="sdpa"),
    "trl, liger": Side("trl", liger=True),
}


def measures(device: str) -> dict[str, functools.partial]:
    """What measures each side that can run on the device."""
    return {name: functools.partial(measure, side) for name, side in sides_of(SIDES, device).items()}


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    if run_side(sides := measures(arguments.device), arguments):
        return
    shared = {"file": str(arguments.data / "gsm8k" / "smoltalk2_sft.jsonl"), "device": arguments.device}
    if arguments.device == "cuda":
        big = shared | {"model": SMOLLM3_3B, "vocab": 128256, "steps": 10}
        cases = {"3B shapes, rows of 16384": big | {"length": 16384}}
    elif arguments.quick:
        arguments.repeats = 1
        cases = {"rows of 1024, vocabulary 8192": shared | {"model": SMALL, "vocab": 8192, "length": 1024, "steps": 4}}
    else:
        small = shared | {"model": SMALL, "length": 4096}
        cases = {
            "rows of 4096, vocabulary 128256": small | {"vocab": 128256, "steps": 3},
            "rows of 4096, vocabulary 8192": small | {"vocab": 8192, "steps": 12},
        }
    results = [
        compared("SFT", "tokens", name, case, alternate(list(sides), case, arguments), TARGETS.get(name))
        for name, case in cases.items()
    ]
    keep("sft", arguments, results)


if __name__ == "__main__":
    main()
