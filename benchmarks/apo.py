"""APO side by side with TRL: pairs per second and peak memory on the same real preference pairs.

python benchmarks/apo.py [--quick] [--device cuda]

TRL runs apo_zero on the same tokenized pairs, once with the reference beside the policy and once with
precompute_ref_log_probs; that pass is not counted for it, nor our filling of the cache for us. Ours counts the tokens
of assistant turns, TRL scores every token of a completion. "second seed" is the time our cache costs a further run.
"""

import time
from pathlib import Path

from datasets import Dataset
from side_by_side import alternate, keep, options, run_side, show
from workload import (
    SMALL,
    SMOLLM3_3B,
    Clock,
    environment,
    matmul_tflops,
    model_flops,
    model_for,
    prepared,
    rates,
    rows_of,
    scratch,
    tokenizer_for,
)

from smolpost.chat.masks import encode_pair
from smolpost.schema import RELEASE_DAY
from smolpost.stages.preference import APOStage
from smolpost.training import preference, reference
from smolpost.training.arguments import training_arguments
from smolpost.training.reference_cache import ReferenceCache

WARMUP = 1


def stage_of(case: dict) -> APOStage:
    return APOStage(
        init_from="x", data="y", max_seq_len=65536, learning_rate=1e-6, global_batch_size=case["batch"],
        max_steps=WARMUP + case["steps"], logging_steps=1, save_steps=10_000, report_to=[],
        pack_tokens=case["pack_tokens"], gradient_checkpointing=case["device"] == "cuda",
    )  # fmt: skip


def smolpost_side(case: dict) -> dict:
    with scratch() as folder:
        rows = rows_of(case["file"], case["rows"])
        tokenizer, stage, here = tokenizer_for(rows), stage_of(case), environment(case)
        pairs, _ = prepared(stage, case["file"], case["rows"], tokenizer, Path(folder))
        spent = []
        for _ in range(2):  # the second time stands for a second seed
            began = time.perf_counter()
            cache = ReferenceCache(Path(folder) / "reference", "bench", reference.scored_tokens(pairs))
            reference.fill(
                cache, pairs, lambda: model_for(case, tokenizer, ours=True), preference.capacity(stage), here
            )
            cache.open()
            spent.append(time.perf_counter() - began)
        arguments = training_arguments(stage, 0, len(pairs), folder, here)
        model, clock = model_for(case, tokenizer, ours=True), Clock(WARMUP)
        trainer = preference.trainer(stage, model, tokenizer, pairs, cache, arguments, 0, here)
        trainer.add_callback(clock)
        trainer.train()
        first, last = WARMUP * case["batch"], (WARMUP + case["steps"]) * case["batch"]
        taken = pairs.select(trainer.batches.order()[first:last])
        lengths = [(len(p["prompt_ids"]), len(p["chosen_ids"]), len(p["rejected_ids"])) for p in taken]
        attended = sum((p * p + c * c + r * r) // 2 + p * (c + r) for p, c, r in lengths)
        scored = int(reference.scored_tokens(taken.flatten_indices()).sum())
        return clock.measured(
            pairs=len(taken), model_flops=model_flops(model, sum(map(sum, lengths)), scored, attended),
            reference_seconds=spent[0], second_seed_seconds=spent[1], matmul_tflops=matmul_tflops(case),
        )  # fmt: skip


def trl_side(case: dict, *, precompute: bool) -> dict:
    from trl import DPOConfig, DPOTrainer

    class TokenizedPairs(DPOTrainer):
        """TRL's trainer on rows that are tokenized already."""

        def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
            return dataset

    with scratch() as folder:
        rows = rows_of(case["file"], case["rows"])
        tokenizer, columns = tokenizer_for(rows), {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
        for row in rows:
            kwargs, tools = row.get("chat_template_kwargs"), row.get("tools")
            pair = encode_pair(
                tokenizer, row["chosen"], row["rejected"], template_kwargs=kwargs, tools=tools, today=RELEASE_DAY
            )
            for key, values in columns.items():
                values.append(getattr(pair, key))
        on_gpu, clock, micro = case["device"] == "cuda", Clock(WARMUP), case["trl_micro_batch"]
        arguments = DPOConfig(
            output_dir=folder, loss_type=["apo_zero"], beta=0.05, max_length=None, precompute_ref_log_probs=precompute,
            per_device_train_batch_size=micro, gradient_accumulation_steps=case["batch"] // micro,
            max_steps=WARMUP + case["steps"], learning_rate=1e-6, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=not on_gpu, bf16=on_gpu, gradient_checkpointing=on_gpu,
        )  # fmt: skip
        trainer = TokenizedPairs(
            model=model_for(case, tokenizer, ours=False), args=arguments, train_dataset=Dataset.from_dict(columns),
            ref_model=None if precompute else model_for(case, tokenizer, ours=False), processing_class=tokenizer,
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
        return clock.measured(pairs=case["steps"] * case["batch"])


TAU, GSM8K = "tau airline, vocabulary 8192", "gsm8k, vocabulary 128256"
TARGETS = {TAU: {"speed": 4, "memory": 3}, GSM8K: {"speed": 2.5}}
SIDES = {
    "smolpost": smolpost_side,
    "trl": lambda case: trl_side(case, precompute=False),
    "trl, precomputed": lambda case: trl_side(case, precompute=True),
}


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    if run_side(SIDES, arguments):
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
    results = []
    memory = "peak_gpu_gb" if arguments.device == "cuda" else "peak_gb"
    for name, case in cases.items():
        sides, table = alternate(list(SIDES), case, arguments), []
        speed = {side: found["pairs"] / found["seconds"] for side, found in sides.items()}
        for side, found in sides.items():
            row = {"side": side, "pairs/s": speed[side], "peak GB": found[memory], "CPU s": found["cpu_seconds"]}
            row |= {"reference s": found.get("reference_seconds"), "2nd seed s": found.get("second_seed_seconds")}
            table.append(row | rates(found))
        ratio = {}
        for side in list(SIDES)[1:]:
            ratio[side] = {
                "speed": speed["smolpost"] / speed[side],
                "memory": sides[side][memory] / sides["smolpost"][memory],
            }
            row = {"side": f"ratio to {side}", "pairs/s": ratio[side]["speed"], "peak GB": ratio[side]["memory"]}
            table.append(row)
        results.append({"case": name, "settings": case, "sides": sides, "ratio": ratio, "target": TARGETS.get(name)})
        show(f"APO, {name}; target {TARGETS.get(name)}", table)
    keep("apo", arguments, results)


if __name__ == "__main__":
    main()
