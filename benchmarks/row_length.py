"""SFT cost per token against the length of packed rows, on the same documents: 1k, 4k and 16k tokens.

python benchmarks/row_length.py [--quick] [--device cuda]

Documents never see each other, so longer rows should cost nothing more. The sides are those of benchmarks/sft.py.
"""

from sft import measures
from side_by_side import alternate, keep, options, run_side, show
from workload import SMALL, SMOLLM3_3B

TOKENS = 49152  # measured at every length


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    if run_side(measured := measures(arguments.device), arguments):
        return
    case = {"file": str(arguments.data / "gsm8k" / "smoltalk2_sft.jsonl"), "device": arguments.device, "vocab": 8192}
    case |= {"model": SMOLLM3_3B if arguments.device == "cuda" else SMALL}
    lengths, tokens = (1024, 4096, 16384), TOKENS
    if arguments.quick:
        arguments.repeats, lengths, tokens = 1, (1024, 4096), 8192
    table, results = [], []
    for length in lengths:
        settings = case | {"length": length, "steps": tokens // length}
        sides = alternate(list(measured), settings, arguments)
        cost = {side: 1e6 * found["seconds"] / found["tokens"] for side, found in sides.items()}
        results.append({"settings": settings, "sides": sides, "us_per_token": cost})
    for side in measured:
        first = results[0]["us_per_token"][side]
        for result in results:
            cost = result["us_per_token"][side]
            length, peak = result["settings"]["length"], result["sides"][side]["peak_gb"]
            table.append({"side": side, "row": length, "us/token": cost, "to 1k": cost / first, "peak GB": peak})
    show("SFT cost against row length, smolpost beside TRL", table)
    keep("row_length", arguments, results)


if __name__ == "__main__":
    main()
