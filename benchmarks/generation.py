"""Replies to one batch of prompts: our decoding on a GPU beside transformers' `generate`, tokens per second.

python benchmarks/generation.py [--quick] [--device cuda]

Every side samples with the same seed from the same random weights, without a stop token. "smolpost" is what an
evaluation on a GPU runs: a fixed cache, and CUDA graphs that each call captures again. "generate" is the library as
installed, and what an evaluation on a CPU runs. "generate, static" has its static cache, which a GPU compiles. The
first call warms a side up and is shown apart; the median of the next ones is the result. On a CPU "smolpost" has no
graphs: such a run only shows that all sides give the same replies.
"""

import functools
import statistics
import time

import torch
from side_by_side import alternate, keep, options, run_side, show
from workload import SMOLLM3_3B

from smolpost.inference.decoding import Decoder, cuda_graphs
from smolpost.inference.sampling import Sampling
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM

TINY = {  # the miniature's
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
CALLS = 3
TEMPERATURE, TOP_P, SEED = 0.6, 0.95, 0


def model_for(case: dict) -> SmolLM3ForCausalLM:
    torch.manual_seed(0)
    config = SmolLM3Config(**case["model"], vocab_size=case["vocab"], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device(case["device"]):
        dtype = torch.bfloat16 if case["device"] == "cuda" else torch.float32
        return SmolLM3ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def smolpost(model: SmolLM3ForCausalLM, prompts: torch.Tensor, case: dict) -> list[list[int]]:
    decoder = Decoder(
        model, case["rows"], case["prompt"] + case["reply"], sampling=Sampling(TEMPERATURE, TOP_P), eos_token_ids=[],
        pad_token_id=0, capture=cuda_graphs() if case["device"] == "cuda" else None,
    )  # fmt: skip
    with torch.no_grad():
        return decoder.reply(prompts, torch.ones_like(prompts), case["reply"], SEED)


def library(model: SmolLM3ForCausalLM, prompts: torch.Tensor, case: dict, **options) -> list[list[int]]:
    torch.manual_seed(SEED)
    model.generation_config.eos_token_id = None
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
    mask = torch.ones_like(prompts)
    output = model.generate(prompts, attention_mask=mask, max_new_tokens=case["reply"], **sampling, **options)
    return output[:, case["prompt"] :].tolist()


SIDES = {
    "smolpost": smolpost,
    "generate": library,
    "generate, static": functools.partial(library, cache_implementation="static"),
}


def measure(side: str, case: dict) -> dict:
    model, seconds = model_for(case), []
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, case["vocab"], (case["rows"], case["prompt"]), generator=draw).to(case["device"])
    for _ in range(1 + CALLS):
        began = time.perf_counter()
        replies = SIDES[side](model, prompts, case)
        seconds.append(time.perf_counter() - began)
    peak = {"peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9} if case["device"] == "cuda" else {}
    tokens, checksum = sum(map(len, replies)), sum(map(sum, replies))
    return {
        "seconds": statistics.median(seconds[1:]), "first_seconds": seconds[0], "tokens": tokens,
        "checksum": checksum, **peak,
    }  # fmt: skip


def main() -> None:
    arguments = options(__doc__.splitlines()[0], needs_data=False)
    if run_side({name: functools.partial(measure, name) for name in SIDES}, arguments):
        return
    shared = {"device": arguments.device}
    tiny = shared | {"model": TINY, "vocab": 256, "prompt": 64}
    cases = {
        "miniature, 16 rows, replies of 16": tiny | {"rows": 16, "reply": 16},
        "miniature, 64 rows, replies of 256": tiny | {"rows": 64, "reply": 256},
    }
    if arguments.device == "cuda":
        big = shared | {"model": SMOLLM3_3B, "vocab": 128256, "prompt": 256, "reply": 512}
        cases |= {f"3B shapes, {rows} rows, replies of 512": big | {"rows": rows} for rows in (8, 64)}
    if arguments.quick:
        arguments.repeats, cases = 1, {"miniature, 16 rows, replies of 16": tiny | {"rows": 16, "reply": 16}}
    table, results = [], []
    for name, case in cases.items():
        sides = alternate(list(SIDES), case, arguments)
        speed = {side: found["tokens"] / found["seconds"] for side, found in sides.items()}
        results.append({"case": name, "settings": case, "sides": sides, "tokens_per_second": speed})
        table += [
            {
                "case": name, "side": side, "tokens/s": speed[side], "ms/step": 1e3 * found["seconds"] / case["reply"],
                "ours over it": speed["smolpost"] / speed[side], "first call s": found["first_seconds"],
                "peak GB": found.get("peak_gpu_gb", found["peak_gb"]),
            }
            for side, found in sides.items()
        ]  # fmt: skip
    show(f"Replies on {arguments.device}, smolpost beside transformers", table)
    keep("generation", arguments, results)


if __name__ == "__main__":
    main()
