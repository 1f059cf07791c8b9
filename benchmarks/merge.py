"""Linear merge side by side with mergekit: three SmolLM3-shaped checkpoints of 1 GB each into one, on disk.

python benchmarks/merge.py [--quick]; inputs and outputs lie in a temporary folder (TMPDIR chooses the disk)

Every side runs in a process of its own on inputs that are in the page cache. "smolpost" is `merge` with its defaults:
preflight, pass, SHA-256 of all inputs and the output, verification, load and forward, fsync. "no hashes" leaves out
the SHA-256. "mergekit" is its Python API with default options, as its users run it: no checks, no fsync. "mergekit,
fsync" brings its files to the disk too. "copy" reads the inputs and writes as many bytes as the output has, the floor:
with fsync, and without.

Seconds are of the call with its lazy imports; "process" counts the start of Python and all imports too. Anonymous
memory is the highest RssAnon of /proc/self/status; "above" leaves out what the process had before the call, with torch
and transformers imported on every side.
"""

import gc
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from side_by_side import alternate, keep, one_run, options, run_side, show

NAMES, WEIGHTS = ("soup-0", "soup-1", "mid"), (0.45, 0.45, 0.1)
# SmolLM3's shapes at half its width, with as many layers as make 1 GB.
MODEL = {
    "vocab_size": 128256, "hidden_size": 1024, "intermediate_size": 5504, "num_attention_heads": 8,
    "num_key_value_heads": 2, "pad_token_id": 128004, "bos_token_id": 128000, "eos_token_id": 128012,
}  # fmt: skip
CASES = {"fp32": ("float32", 6), "bf16": ("bfloat16", 19)}  # dtype, layers
BLOCK = 2**23  # bytes that a copy holds at a time


class Anonymous(threading.Thread):
    """Samples the anonymous memory of this process, in GB."""

    def __init__(self):
        super().__init__(daemon=True)
        gc.collect()
        self.before = self.peak = anonymous()
        self._stop_asked = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stop_asked.wait(0.005):
            self.peak = max(self.peak, anonymous())

    def stop(self) -> dict:
        self._stop_asked.set()
        self.join()
        return {"peak_anon_gb": self.peak, "above_gb": self.peak - self.before}


def anonymous() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024 / 1e9


def measured(case: dict, side: str, work) -> dict:
    """One run into a new folder: {seconds, process_seconds, peak_anon_gb, above_gb}."""
    import torch  # noqa: F401 - every side has both before the clock starts
    from transformers import AutoModelForCausalLM  # noqa: F401

    out = Path(case["folder"]) / f"out-{side}"
    shutil.rmtree(out, ignore_errors=True)
    for name in NAMES:  # into the page cache
        for file in (Path(case["folder"]) / name).glob("*.safetensors"):
            with open(file, "rb") as opened:
                while opened.read(BLOCK):
                    pass
    os.sync()  # no one pays for another's dirty pages
    warm = time.clock_gettime(time.CLOCK_MONOTONIC) - began_process()
    sampler, began, cpu = Anonymous(), time.perf_counter(), time.process_time()
    work([Path(case["folder"]) / name for name in NAMES], out)
    seconds = time.perf_counter() - began
    used = time.process_time() - cpu
    found = {"seconds": seconds, "cpu_seconds": used, "start_seconds": warm, **sampler.stop()}
    if not case.get("keep"):
        shutil.rmtree(out)
    return found


def began_process() -> float:
    """When this process began, on the monotonic clock."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


def ours(case: dict, side: str, **settings) -> dict:
    def work(folders, out):
        from smolpost.merging.linear import merge

        merge(list(zip(NAMES, folders, WEIGHTS, strict=True)), NAMES[0], out, case["dtype"], **settings)

    return measured(case, side, work)


def run_mergekit(case: dict, side: str, fsync: bool) -> dict:
    def work(folders, out):
        from mergekit.config import MergeConfiguration
        from mergekit.merge import MergeOptions, run_merge

        models = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(folders, WEIGHTS, strict=True)]
        config = {"merge_method": "linear", "models": models, "base_model": str(folders[0]), "dtype": case["dtype"]}
        run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions())
        if fsync:
            sync(out)

    return measured(case, side, work)


def sync(folder: Path) -> None:
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def copy(case: dict, side: str, fsync: bool) -> dict:
    """Reads every byte of the inputs and writes as many as one has: same dtype in and out, so same bytes."""

    def work(folders, out):
        out.mkdir()
        buffer = memoryview(bytearray(BLOCK))
        with open(out / "copy", "wb", buffering=0) as target:
            for folder in folders:
                for file in sorted(folder.glob("*.safetensors")):
                    with open(file, "rb", buffering=0) as source:
                        while number := source.readinto(buffer):
                            if folder is folders[0]:
                                target.write(buffer[:number])
        if fsync:
            sync(out)

    return measured(case, side, work)


SIDES = {
    "smolpost": lambda case: ours(case, "smolpost"),
    "smolpost, no hashes": lambda case: ours(case, "smolpost-no-hashes", hash_weights=False),
    "mergekit": lambda case: run_mergekit(case, "mergekit", False),
    "mergekit, fsync": lambda case: run_mergekit(case, "mergekit-fsync", True),
    "copy": lambda case: copy(case, "copy", False),
    "copy, fsync": lambda case: copy(case, "copy-fsync", True),
}


def write_inputs(case: dict) -> dict:
    """The checkpoints, drawn from seeds, in a process of their own: their memory is gone when the sides run."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        config = SmolLM3Config(num_hidden_layers=case["layers"], **MODEL)
        config.dtype = getattr(torch, case["dtype"])
        with torch.device("meta"):
            model = SmolLM3ForCausalLM(config)
        model.to(getattr(torch, case["dtype"])).to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.02)
        model.tie_weights()
        model.save_pretrained(Path(case["folder"]) / name)
        words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(Path(case["folder"]) / name)
    size = sum(file.stat().st_size for file in (Path(case["folder"]) / NAMES[0]).glob("*.safetensors"))
    return {"bytes": size, "parameters": sum(p.numel() for p in model.parameters())}


def check(case: dict) -> dict:
    """mergekit's fp32 sums beside ours: refused where an element is off by more than one unit of the dtype.

    As its users run it, mergekit rounds the weights and sums of bf16 inputs to bf16 and divides by the weights' sum.
    """
    import torch
    from safetensors import safe_open

    kept = case | {"keep": True}
    ours(kept, "smolpost")
    ours(kept, "mergekit", engine="mergekit")
    folder, furthest, equal, total = Path(case["folder"]), 0, 0, 0
    theirs = {}
    for file in (folder / "out-mergekit").glob("*.safetensors"):
        opened = safe_open(file, "pt")
        theirs |= dict.fromkeys(opened.keys(), opened)
    mine = safe_open(folder / "out-smolpost" / "model.safetensors", "pt")
    assert set(mine.keys()) == set(theirs)
    kind = torch.int32 if case["dtype"] == "float32" else torch.int16
    for name in mine.keys():  # noqa: SIM118 - not a dict
        for a, b in zip(*(o.get_tensor(name).view(-1).split(2**22) for o in (mine, theirs[name])), strict=True):
            far = (ordered(a.view(kind)) - ordered(b.view(kind))).abs()
            furthest, equal, total = max(furthest, int(far.max())), equal + int((far == 0).sum()), total + a.numel()
    for side in ("smolpost", "mergekit"):
        shutil.rmtree(folder / f"out-{side}")
    assert furthest <= 1, f"{furthest} ulp from mergekit"
    return {"ulp": furthest, "share_equal": equal / total}


def ordered(bits):
    """Floats' bits as integers in the floats' order, neighbours one apart."""
    import torch

    low = torch.iinfo(bits.dtype).min
    wide = bits.long()
    return torch.where(wide < 0, low - wide, wide)


def compare(name: str, arguments) -> dict:
    dtype, layers = CASES[name]
    layers = 1 if arguments.quick else layers
    with tempfile.TemporaryDirectory(prefix="smolpost-bench-") as folder:
        case = {"folder": folder, "dtype": dtype, "layers": layers}
        size = one_run("inputs", case, arguments)
        found = alternate(list(SIDES), case, arguments)
        beside = one_run("check", case, arguments)
    mine, keys = found["smolpost"], ("seconds", "cpu_seconds", "process_seconds", "peak_anon_gb", "above_gb")
    for sides in found.values():
        sides["process_seconds"] = sides["start_seconds"] + sides["seconds"]
    ratios = {
        side: {key: other[key] / mine[key] for key in keys if mine[key]}
        for side, other in found.items()
        if other is not mine
    }
    settings = {"dtype": dtype, "layers": layers, "inputs": len(NAMES), **{k: size[k] for k in ("bytes", "parameters")}}
    against = {key: beside[key] for key in ("ulp", "share_equal")}
    return {"case": name, "settings": settings, "sides": found, "peer_over_ours": ratios, "against_mergekit": against}


def table_of(result: dict) -> list[dict]:
    rows = []
    for side, found in result["sides"].items():
        ratio = result["peer_over_ours"].get(side, {})
        row = {"case": result["case"], "side": side, "seconds": found["seconds"], "x ours": ratio.get("seconds")}
        row |= {"CPU s": found["cpu_seconds"], "x CPU": ratio.get("cpu_seconds")}
        row |= {"process s": found["process_seconds"], "anon GB": found["peak_anon_gb"]}
        row |= {"x anon": ratio.get("peak_anon_gb"), "above GB": found["above_gb"], "x above": ratio.get("above_gb")}
        rows.append(row)
    return rows


def targets_of(results: list[dict]) -> list[dict]:
    """What was asked of the full run."""
    rows = []
    for result in results:
        sides, ratios = result["sides"], result["peer_over_ours"]
        faster, less = ratios["mergekit"]["seconds"], ratios["mergekit"]["above_gb"]
        floor = sides["smolpost"]["seconds"] / sides["copy, fsync"]["seconds"]
        for name, found, met, limit in (
            ("mergekit's seconds over ours", faster, faster >= 5, ">= 5"),
            ("mergekit's anonymous memory over ours", less, less >= 8, ">= 8"),
            ("our seconds over copy with fsync", floor, floor <= 2, "<= 2"),
        ):
            rows.append({"target": f"{result['case']}: {name}", "limit": limit, "found": found, "met": met})
    return rows


def main() -> None:
    if not Path("/proc/self/status").exists():
        sys.exit("RssAnon is read from /proc, which only Linux has")
    arguments = options(__doc__.splitlines()[0])
    if run_side(SIDES | {"inputs": write_inputs, "check": check}, arguments):
        return
    if arguments.quick:
        arguments.repeats = 1
    results = [compare(name, arguments) for name in (["bf16"] if arguments.quick else CASES)]
    show("Linear merge of three checkpoints", [row for result in results for row in table_of(result)])
    print(json.dumps({result["case"]: result["against_mergekit"] for result in results}))
    if arguments.quick:
        return
    targets = targets_of(results)
    show("Targets", targets)
    keep("merge", arguments, [*results, {"case": "targets", "targets": targets}])


if __name__ == "__main__":
    main()
