"""Linear merge side by side with mergekit: three SmolLM3-shaped checkpoints of 1 GB each into one, on disk.

python benchmarks/merge.py [--quick | --whole]; inputs and outputs lie in a temporary folder (TMPDIR chooses the disk).
--whole merges checkpoints of SmolLM3-3B's own shapes instead, 6 GB each, by the commands and by a copy.

Every side runs in a process of its own on inputs that are in the page cache. "smolpost" is `merge` with its defaults:
preflight, pass, SHA-256 of all inputs and the output, verification, load and forward, fsync. "no hashes" leaves out
the SHA-256. "mergekit" is its Python API with default options: no checks, no fsync. "mergekit, fsync" brings its files
to the disk too. "smolpost merge" and "mergekit-yaml" are the commands, as users run them, from the start of the process
to its end. "copy" reads the inputs and writes as many bytes as the output has, the floor:
with fsync, and without.

Seconds are of the call with its lazy imports, and of commands the whole process; "process" counts the start of Python
and all imports too. CPU seconds tell more than seconds where the machine has other work. Anonymous memory is the
highest RssAnon of /proc/PID/status; "above" leaves out what the process had before the call, with torch and
transformers imported on every side; commands have no such figure.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from side_by_side import alternate, keep, one_run, options, run_side, show

NAMES, WEIGHTS = ("soup-0", "soup-1", "mid"), (0.45, 0.45, 0.1)
VOCABULARY = {"vocab_size": 128256, "pad_token_id": 128004, "bos_token_id": 128000, "eos_token_id": 128012}
# SmolLM3's shapes at half its width, with as many layers as make 1 GB; and its own.
HALF = {"hidden_size": 1024, "intermediate_size": 5504, "num_attention_heads": 8, "num_key_value_heads": 2}
CASES = {
    "fp32": {"dtype": "float32", "model": HALF | {"num_hidden_layers": 6}},
    "bf16": {"dtype": "bfloat16", "model": HALF | {"num_hidden_layers": 19}},
    "3b": {"dtype": "bfloat16", "model": {}},
}
BLOCK = 2**23  # bytes that a copy holds at a time


class Anonymous(threading.Thread):
    """Samples the anonymous memory of a process, in GB."""

    def __init__(self, process: str = "self"):
        super().__init__(daemon=True)
        gc.collect()
        self._process = process
        self.before = self.peak = anonymous(process)
        self._stop_asked = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stop_asked.wait(0.005):
            self.peak = max(self.peak, anonymous(self._process))

    def stop(self) -> dict:
        self._stop_asked.set()
        self.join()
        return {"peak_anon_gb": self.peak, "above_gb": self.peak - self.before}


def anonymous(process: str) -> float:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except ProcessLookupError:  # it ended meanwhile
        return 0.0
    found = [line for line in status.splitlines() if line.startswith("RssAnon:")]  # a zombie has none
    return int(found[0].split()[1]) * 1024 / 1e9 if found else 0.0


def fresh_output(case: dict, side: str) -> Path:
    """A place for a side's result, with the inputs in the page cache and no one's dirty pages left to pay for."""
    out = Path(case["folder"]) / f"out-{side}"
    shutil.rmtree(out, ignore_errors=True)
    for name in NAMES:
        for file in (Path(case["folder"]) / name).glob("*.safetensors"):
            with open(file, "rb") as opened:
                while opened.read(BLOCK):
                    pass
    os.sync()
    return out


def measured(case: dict, side: str, work) -> dict:
    """One call in this process: {seconds, cpu_seconds, start_seconds, peak_anon_gb, above_gb}."""
    import torch  # noqa: F401 - every side has both before the clock starts
    from transformers import AutoModelForCausalLM  # noqa: F401

    warm = time.clock_gettime(time.CLOCK_MONOTONIC) - began_process()
    out = fresh_output(case, side)
    sampler, began, cpu = Anonymous(), time.perf_counter(), time.process_time()
    work([Path(case["folder"]) / name for name in NAMES], out)
    seconds = time.perf_counter() - began
    used = time.process_time() - cpu
    found = {"seconds": seconds, "cpu_seconds": used, "start_seconds": warm, **sampler.stop()}
    if not case.get("keep"):
        shutil.rmtree(out)
    return found


def command(case: dict, side: str, words) -> dict:
    """One command in a process of its own, from its start to its end."""
    out = fresh_output(case, side)
    words = words([Path(case["folder"]) / name for name in NAMES], out)
    cpu, began = os.times(), time.perf_counter()
    with tempfile.TemporaryFile() as said, subprocess.Popen(words, stdout=said, stderr=said) as process:
        sampler = Anonymous(str(process.pid))
        process.wait()
        seconds = time.perf_counter() - began
        said.seek(0)
        if process.returncode:
            sys.exit(said.read().decode()[-3000:])
    after = os.times()
    used = after.children_user + after.children_system - cpu.children_user - cpu.children_system
    shutil.rmtree(out)
    return {
        "seconds": seconds, "cpu_seconds": used, "start_seconds": 0.0, "peak_anon_gb": sampler.stop()["peak_anon_gb"]
    }  # fmt: skip


def our_command(case: dict) -> dict:
    def words(folders, out):
        weighted = [f"{folder}={weight}" for folder, weight in zip(folders, WEIGHTS, strict=True)]
        return [Path(sys.executable).with_name("smolpost"), "merge", out, *weighted, "--dtype", case["dtype"]]

    return command(case, "smolpost-command", words)


def mergekit_command(case: dict) -> dict:
    def words(folders, out):
        file = Path(case["folder"]) / "merge.yml"
        file.write_text(json.dumps(mergekit_config(folders, case["dtype"])))  # JSON is YAML
        return [Path(sys.executable).with_name("mergekit-yaml"), file, out]

    return command(case, "mergekit-command", words)


def mergekit_config(folders: list[Path], dtype: str) -> dict:
    models = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(folders, WEIGHTS, strict=True)]
    return {"merge_method": "linear", "models": models, "base_model": str(folders[0]), "dtype": dtype}


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

        config = MergeConfiguration.model_validate(mergekit_config(folders, case["dtype"]))
        run_merge(config, str(out), MergeOptions())
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
    "smolpost merge": our_command,
    "mergekit-yaml": mergekit_command,
    "copy": lambda case: copy(case, "copy", False),
    "copy, fsync": lambda case: copy(case, "copy-fsync", True),
}


COMMANDS = ("smolpost merge", "mergekit-yaml")  # compared with each other; the other sides with "smolpost"
WHOLE_SIDES = ["smolpost", "mergekit", *COMMANDS, "copy, fsync"]


def write_inputs(case: dict) -> dict:
    """The checkpoints, drawn from seeds, in a process of their own: their memory is gone when the sides run."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        config = SmolLM3Config(**VOCABULARY, **case["model"])
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

    kept = case | {"keep": True}
    ours(kept, "smolpost")
    ours(kept, "mergekit", engine="mergekit")
    folder, furthest, equal, total = Path(case["folder"]), 0, 0, 0
    mine, theirs = tensors_of(folder / "out-smolpost"), tensors_of(folder / "out-mergekit")
    assert mine.keys() == theirs.keys()
    kind = torch.int32 if case["dtype"] == "float32" else torch.int16
    for name, opened in mine.items():
        values = (file.get_tensor(name).view(-1).split(2**22) for file in (opened, theirs[name]))
        for a, b in zip(*values, strict=True):
            far = (ordered(a.view(kind)) - ordered(b.view(kind))).abs()
            furthest, equal, total = max(furthest, int(far.max())), equal + int((far == 0).sum()), total + a.numel()
    for side in ("smolpost", "mergekit"):
        shutil.rmtree(folder / f"out-{side}")
    assert furthest <= 1, f"{furthest} ulp from mergekit"
    return {"ulp": furthest, "share_equal": equal / total}


def tensors_of(folder: Path) -> dict:
    """Name -> the opened file that holds the tensor."""
    from safetensors import safe_open

    files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict


def ordered(bits):
    """Floats' bits as integers in the floats' order, neighbours one apart."""
    import torch

    low = torch.iinfo(bits.dtype).min
    wide = bits.long()
    return torch.where(wide < 0, low - wide, wide)


def compare(name: str, arguments) -> dict:
    shapes = CASES[name]["model"] | ({"num_hidden_layers": 1} if arguments.quick else {})
    with tempfile.TemporaryDirectory(prefix="smolpost-bench-") as folder:
        case = CASES[name] | {"folder": folder, "model": shapes}
        size = one_run("inputs", case, arguments)
        found = alternate(WHOLE_SIDES if arguments.whole else list(SIDES), case, arguments)
        beside = one_run("check", case, arguments)
    mine, keys = found["smolpost"], ("seconds", "cpu_seconds", "process_seconds", "peak_anon_gb", "above_gb")
    for sides in found.values():
        sides["process_seconds"] = sides["start_seconds"] + sides["seconds"]
    ratios = {
        side: {key: other[key] / own[key] for key in keys if own.get(key) and key in other}
        for side, other in found.items()
        if other is not (own := found["smolpost merge"] if side in COMMANDS else mine)
    }
    settings = {key: case[key] for key in ("dtype", "model")} | {"inputs": len(NAMES)}
    settings |= {key: size[key] for key in ("bytes", "parameters")}
    against = {key: beside[key] for key in ("ulp", "share_equal")}
    return {"case": name, "settings": settings, "sides": found, "peer_over_ours": ratios, "against_mergekit": against}


def table_of(result: dict) -> list[dict]:
    rows = []
    for side, found in result["sides"].items():
        ratio = result["peer_over_ours"].get(side, {})
        row = {"case": result["case"], "side": side, "seconds": found["seconds"], "x ours": ratio.get("seconds")}
        row |= {"CPU s": found["cpu_seconds"], "x CPU": ratio.get("cpu_seconds")}
        row |= {"process s": found["process_seconds"], "anon GB": found["peak_anon_gb"]}
        row |= {
            "x anon": ratio.get("peak_anon_gb"),
            "above GB": found.get("above_gb"),
            "x above": ratio.get("above_gb"),
        }
        rows.append(row)
    return rows


def targets_of(results: list[dict]) -> list[dict]:
    """What was asked of the full run."""
    rows = []
    for result in results:
        sides, ratios = result["sides"], result["peer_over_ours"]
        faster, less = ratios["mergekit-yaml"]["seconds"], ratios["mergekit"]["above_gb"]
        floor = sides["smolpost"]["seconds"] / sides["copy, fsync"]["seconds"]
        for name, found, met, limit in (
            ("mergekit-yaml's seconds over smolpost merge's", faster, faster >= 5, ">= 5"),
            ("anonymous memory above imports, mergekit's over ours", less, less >= 8, ">= 8"),
            ("our seconds over copy with fsync", floor, floor <= 2, "<= 2"),
        ):
            rows.append({"target": f"{result['case']}: {name}", "limit": limit, "found": found, "met": met})
    return rows


def main() -> None:
    if not Path("/proc/self/status").exists():
        sys.exit("RssAnon is read from /proc, which only Linux has")
    arguments = options(__doc__.splitlines()[0], whole="SmolLM3-3B's own shapes: 30 GB of disk")
    if run_side(SIDES | {"inputs": write_inputs, "check": check}, arguments):
        return
    if arguments.quick:
        arguments.repeats = 1
    cases = ["3b"] if arguments.whole else ["bf16"] if arguments.quick else ["fp32", "bf16"]
    results = [compare(name, arguments) for name in cases]
    show("Linear merge of three checkpoints", [row for result in results for row in table_of(result)])
    print(json.dumps({result["case"]: result["against_mergekit"] for result in results}))
    if arguments.quick:
        return
    targets = targets_of(results)
    show("Targets", targets)
    name = "merge-3b" if arguments.whole else "merge"
    keep(name, arguments, [*results, {"case": "targets", "targets": targets}])


if __name__ == "__main__":
    main()
