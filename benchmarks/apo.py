"""APO by our engine and by TRL's: pairs per second and peak memory of one stage on the same real preference pairs.

python benchmarks/apo.py [--quick] [--device cuda]

The stage's `engine` decides who trains; pairs, scored tokens, order, weights and optimizer are the stage's. TRL runs
with the reference beside the policy, and with precompute_ref_log_probs; that pass is not counted for it, nor our
filling of the cache for us. "2nd seed s" is the time that our cache costs a further run. Attention and "trl, liger" are
as in benchmarks/sft.py.
"""

import functools
from pathlib import Path

from side_by_side import alternate, compared, keep, options, run_side
from workload import SMALL, SMOLLM3_3B, Clock, Side, needed, scratch, sides_of, train

from smolpost.stages.preference import APOStage

WARMUP = 1


def measure(side: Side, case: dict) -> dict:
    is_ours = side.engine == "smolpost"
    settings = {"activation_checkpointing": "full" if case["device"] == "cuda" else "none"} | side.settings
    stage = APOStage(
        init_from="x", data="y", max_seq_len=65536, learning_rate=1e-6, global_batch_size=case["batch"],
        max_steps=WARMUP + case["steps"], logging_steps=1, report_to=[], engine=side.engine,
        pack_tokens=case["pack_tokens"] if is_ours else None, **settings,
    )  # fmt: skip
    if not is_ours:
        stage.trl.micro_batch_size = case["trl_micro_batch"]
        stage.trl.precompute_ref_log_probs = side.precompute
    with scratch() as folder:
        trainer, pairs, spent = train(stage, case, side, Path(folder), clock := Clock(WARMUP))
        first, last = WARMUP * case["batch"], (WARMUP + case["steps"]) * case["batch"]
        taken = pairs.select(trainer.batches.order()[first:last])
        own = {"reference_seconds": spent[0], "second_seed_seconds": spent[1]} if is_ours else {}
        return clock.measured(pairs=len(taken), **needed(trainer, taken, case), **own)


TAU, GSM8K = "tau airline, vocabulary 8192", "gsm8k, vocabulary 128256"
TARGETS = {TAU: {"speed": 4, "memory": 3}, GSM8K: {"speed": 2.5}}
SIDES = {
    "smolpost": Side("smolpost"),
    "trl": Side("trl"),
    "trl, precomputed": Side("trl", precompute=True),
    "trl, liger": Side("trl", precompute=True, liger=True),
}


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    sides = {name: functools.partial(measure, side) for name, side in sides_of(SIDES, arguments.device).items()}
    if run_side(sides, arguments):
        return
    shared = {"device": arguments.device, "model": SMOLLM3_3B if arguments.device == "cuda" else SMALL}
    tau = {"file": str(arguments.data / "tau_airline" / "preference.jsonl"), "rows": 6, "batch": 1, "steps": 3}
    gsm8k = {"file": str(arguments.data / "gsm8k" / "smoltalk2_preference.jsonl"), "rows": 60, "batch": 8, "steps": 2}
    # The long pairs with a small vocabulary, where attention weighs most: TRL takes a minute a pair with SmolLM3's.
    cases = {
        TAU: shared | tau | {"vocab": 8192, "pack_tokens": 8192, "trl_micro_batch": 1},
        GSM8K: shared | gsm8k | {"vocab": 128256, "pack_tokens": 4096, "trl_micro_batch": 4},
    }
    if arguments.quick:
        arguments.repeats = 1
        cases = {"gsm8k, vocabulary 8192": cases[GSM8K] | {"vocab": 8192}}
    results = [
        compared("APO", "pairs", name, case, alternate(list(sides), case, arguments), TARGETS.get(name))
        for name, case in cases.items()
    ]
    keep("apo", arguments, results)


if __name__ == "__main__":
    main()
