"""SFT side by side with TRL's bfd packing: tokens per second and peak memory on the same real rows.

python benchmarks/sft.py [--quick] [--device cuda]

TRL packs the same tokenized documents (input_ids and labels) with packing_strategy=bfd, padding-free, without
gradient checkpointing, in the device's precision; both sides run transformers' training loop on one pack per step.
"""

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

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode_batch
from smolpost.schema import RELEASE_DAY
from smolpost.stages.sft import SFTStage
from smolpost.training import sft
from smolpost.training.arguments import training_arguments

ROWS = 1000  # TRL packs 1000 rows at a time
WARMUP = 1


def stage_of(case: dict, steps: int) -> SFTStage:
    return SFTStage(
        init_from="x", data="y", max_seq_len=case["length"], overlong="truncate", learning_rate=1e-4,
        global_batch_size=1, max_steps=steps, logging_steps=1, save_steps=10_000, report_to=[],
        gradient_checkpointing=case["device"] == "cuda",
    )  # fmt: skip


def smolpost_side(case: dict) -> dict:
    with scratch() as folder:
        rows = rows_of(case["file"], ROWS)
        tokenizer = tokenizer_for(rows)
        stage = stage_of(case, WARMUP + case["steps"])
        packs, _ = prepared(stage, case["file"], ROWS, tokenizer, Path(folder))
        here = environment(case)
        arguments = training_arguments(stage, 0, len(packs), folder, here)
        model, clock = model_for(case, tokenizer, ours=True), Clock(WARMUP)
        trainer = sft.trainer(stage, model, tokenizer, packs, None, arguments, 0, here)
        trainer.add_callback(clock)
        trainer.train()
        taken = packs.select(trainer.batches.order()[: WARMUP + case["steps"]])
        tokens = sum(len(pack["input_ids"]) for pack in taken)
        scored = sum(pack["fates"].count(Fate.TRAINED) for pack in taken)
        attended = sum(n * (n + 1) // 2 for pack in taken for n in pack["seq_lengths"])
        share = case["steps"] / (WARMUP + case["steps"])
        flops = share * model_flops(model, tokens, scored, attended)
        return clock.measured(
            tokens=share * tokens, model_flops=flops, trained_share=scored / tokens, matmul_tflops=matmul_tflops(case)
        )


def trl_side(case: dict) -> dict:
    from trl import SFTConfig, SFTTrainer

    with scratch() as folder:
        rows = rows_of(case["file"], ROWS)
        tokenizer = tokenizer_for(rows)
        encoded = encode_batch(
            tokenizer, [row["messages"] for row in rows], today=RELEASE_DAY,
            template_kwargs=[row.get("chat_template_kwargs") for row in rows],
        )  # fmt: skip
        labels = [
            [i if fate == Fate.TRAINED else -100 for i, fate in zip(row.input_ids, row.fates, strict=True)]
            for row in encoded
        ]
        documents = Dataset.from_dict({"input_ids": [row.input_ids for row in encoded], "labels": labels})
        on_gpu, clock = case["device"] == "cuda", Clock(WARMUP)
        arguments = SFTConfig(
            output_dir=folder, packing=True, packing_strategy="bfd", max_length=case["length"],
            per_device_train_batch_size=1, max_steps=WARMUP + case["steps"], learning_rate=1e-4, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=not on_gpu, bf16=on_gpu, gradient_checkpointing=on_gpu,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model_for(case, tokenizer, ours=False), args=arguments, train_dataset=documents,
            processing_class=tokenizer, callbacks=[clock],
        )  # fmt: skip
        seen = []
        inner = trainer.training_step
        trainer.training_step = lambda model, inputs, *rest: (
            seen.append(inputs["input_ids"].numel()) or inner(model, inputs, *rest)
        )
        trainer.train()
        return clock.measured(tokens=sum(seen[WARMUP:]))


TARGETS = {
    "rows of 4096, vocabulary 128256": {"speed": 4, "memory": 2},
    "rows of 4096, vocabulary 8192": {"speed": 2},
}
SIDES = {"smolpost": smolpost_side, "trl": trl_side}


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    if run_side(SIDES, arguments):
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
    results, memory = [], "peak_gpu_gb" if arguments.device == "cuda" else "peak_gb"
    for name, case in cases.items():
        sides, table = alternate(list(SIDES), case, arguments), []
        speed = {side: found["tokens"] / found["seconds"] for side, found in sides.items()}
        for side, found in sides.items():
            row = {"side": side, "tokens/s": speed[side], "peak GB": found[memory], "CPU s": found["cpu_seconds"]}
            table.append(row | rates(found))
        ratio = {"speed": speed["smolpost"] / speed["trl"], "memory": sides["trl"][memory] / sides["smolpost"][memory]}
        table.append({"side": "ratio", "tokens/s": ratio["speed"], "peak GB": ratio["memory"]})
        results.append({"case": name, "settings": case, "sides": sides, "ratio": ratio, "target": TARGETS.get(name)})
        show(f"SFT, {name}; target {TARGETS.get(name)}", table)
    keep("sft", arguments, results)


if __name__ == "__main__":
    main()
