"""Preparation side by side with TRL: from a JSONL file of conversations to packed rows with labels on disk.

python benchmarks/prepare.py [--quick]

The same rows, tokenizer, template and number of worker processes. TRL reads the file with `load_dataset` and prepares
it in SFTTrainer with assistant_only_loss and packing_strategy=bfd, as its user does; ours is what `smolpost prepare`
runs. Ours also checks every row, works out the fate of each token and writes the ledger. The clock covers reading,
rendering, tokenizing, masking, packing and writing, not the imports.
"""

import os
import time
from pathlib import Path

from side_by_side import alternate, keep, options, run_side, show
from workload import SMALL, model_for, prepared, scratch, tokenizer_for

from smolpost.stages.sft import SFTStage

LENGTH = 16384


def smolpost_side(case: dict) -> dict:
    with scratch() as folder:
        file, tokenizer = copied(case, Path(folder)), tokenizer_for(case["file"], None)
        stage = SFTStage(
            init_from="x", data="y", max_seq_len=LENGTH, overlong="truncate", learning_rate=1e-4, global_batch_size=1,
            num_workers=case["workers"],
        )  # fmt: skip
        began = time.perf_counter()
        _, report = prepared(stage, str(file), None, tokenizer, Path(folder))
        seconds = time.perf_counter() - began
        totals = report["totals"]
        return {
            "seconds": seconds,
            "rows": totals["rows_read"],
            "tokens": totals["tokens_read"],
            "packs": totals["packs"],
        }


def trl_side(case: dict) -> dict:
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    with scratch() as folder:
        file, tokenizer = copied(case, Path(folder)), tokenizer_for(case["file"], None)
        model = model_for({"model": SMALL, "vocab": len(tokenizer), "device": "cpu"}, tokenizer, "sdpa")
        began = time.perf_counter()
        rows = load_dataset("json", data_files=str(file), split="train", cache_dir=f"{folder}/cache")
        number = len(rows)
        arguments = SFTConfig(
            output_dir=folder, packing=True, packing_strategy="bfd", max_length=LENGTH, assistant_only_loss=True,
            dataset_num_proc=case["workers"], use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
        )  # fmt: skip
        packs = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer).train_dataset
        seconds = time.perf_counter() - began
        tokens = sum(len(pack) for pack in packs["input_ids"])
        return {"seconds": seconds, "rows": number, "tokens": tokens, "packs": len(packs)}


def copied(case: dict, folder: Path) -> Path:
    """The rows `copies` times over in one file."""
    lines = Path(case["file"]).read_bytes()
    (file := folder / "rows.jsonl").write_bytes(lines * case["copies"])
    return file


SIDES = {"smolpost": smolpost_side, "trl": trl_side}
TARGET = 2.0


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    if run_side(SIDES, arguments):
        return
    workers = len(os.sched_getaffinity(0))
    gsm8k = {"file": str(arguments.data / "gsm8k" / "smoltalk2_sft.jsonl"), "workers": workers}
    airline = {"file": str(arguments.data / "tau_airline" / "conversations.jsonl"), "workers": workers, "copies": 10}
    if arguments.quick:
        arguments.repeats = 1
        cases = {"gsm8k": gsm8k | {"copies": 1}}
    else:
        cases = {
            "gsm8k, 10 times": gsm8k | {"copies": 10},
            "gsm8k, 10 times, one worker": gsm8k | {"copies": 10, "workers": 1},
            "tau airline, 10 times": airline,
        }
    results = []
    for name, case in cases.items():
        sides = alternate(list(SIDES), case, arguments)
        table = [
            {"side": side, "rows/s": found["rows"] / found["seconds"], "tokens": found["tokens"],
             "packs": found["packs"], "seconds": found["seconds"], "peak GB (parent)": found["peak_gb"]}
            for side, found in sides.items()
        ]  # fmt: skip
        ratio = {"speed": sides["trl"]["seconds"] / sides["smolpost"]["seconds"]}
        table.append({"side": "ratio", "rows/s": ratio["speed"]})
        results.append({"case": name, "settings": case, "sides": sides, "ratio": ratio, "target": {"speed": TARGET}})
        show(f"preparation, {name}, {case['workers']} workers; target {TARGET}x", table)
    keep("prepare", arguments, results)


if __name__ == "__main__":
    main()
