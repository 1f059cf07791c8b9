"""The small project that the golden tests compare: its rows, its commands, and what is read from its folders."""

import hashlib
import json
import os
import random
import runpy
import shlex
import sys
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file

from smolpost import cli

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TRAINED, IGNORED = 0, -100  # a fate, a label


# ---------------------------------------------------------------- rows


def write_rows(folder: Path) -> None:
    """Everything that a row can hold, by hand, and some of it by the dozen."""
    folder.mkdir()
    tool = {
        "name": "area",
        "description": "Area of a triangle.",
        "parameters": {"type": "object", "properties": {"base": {"type": "integer"}}, "required": ["base"]},
    }
    user, system = {"role": "user", "content": "Wie groß ist 3 + 4?"}, {"role": "system", "content": "Be brief."}
    thought = {"role": "assistant", "content": "<think>\n3 and 4 make 7.\n</think>\n7"}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "area", "arguments": {"base": 3}}}],
    }
    result, last = {"role": "tool", "content": "7.5", "name": "area"}, {"role": "assistant", "content": "It is 7.5."}
    ask = {"role": "user", "content": "Area with base 3?"}
    conversations = [
        {"messages": [user, thought], "chat_template_kwargs": {"enable_thinking": True}},
        {"messages": [system, user, {"role": "assistant", "content": "7"}]},
        {
            "messages": [user, thought, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}],
            "chat_template_kwargs": {"enable_thinking": False, "custom_instructions": "Speak like a pirate."},
        },
        {"messages": [ask, call, result, last], "tools": [{"type": "function", "function": tool}]},
        {
            "messages": [ask, {"role": "assistant", "content": "<code>area(base=3)</code>"}, result, last],
            "chat_template_kwargs": {"python_tools": [json.dumps(tool)], "enable_thinking": False},
        },
    ]
    draw = random.Random(4)
    for _ in range(7):
        a, b, think = draw.randint(1, 99), draw.randint(1, 99), draw.random() < 0.5
        block = f"<think>\n{'so ' * draw.randint(1, 40)}{a + b}\n</think>\n" if think else ""
        turns = [{"role": "user", "content": f"What is {a}+{b}?"}, {"role": "assistant", "content": f"{block}{a + b}."}]
        conversations.append({"messages": turns, "chat_template_kwargs": {"enable_thinking": think}})
    conversations.append(conversations[0])  # hygiene removes it
    pairs = []
    for number, row in enumerate(conversations[5:12]):
        wrong = {"role": "assistant", "content": row["messages"][1]["content"][:-1] + f"{number} or so."}
        pairs.append(
            {
                "prompt": row["messages"][0]["content"],
                "chosen": row["messages"],
                "rejected": [row["messages"][0], wrong],
                "chat_template_kwargs": row["chat_template_kwargs"],
            }
        )
    texts = [{"text": " ".join(draw.choice(("Ein", "naïve", "row", "of", "words")) for _ in range(60))} for _ in "abcd"]
    function = {**tool, "parameters": {**tool["parameters"], "type": "dict"}}
    calls = [
        {"id": f"simple_{n}", "question": [[{"role": "user", "content": f"Base {n}?"}]], "function": [function]}
        for n in (3, 4)
    ]
    answers = [{"id": f"simple_{n}", "ground_truth": [{"area": {"base": [n]}}]} for n in (3, 4)]
    documents = [
        {"question": f"Who has number {n}?", "context": f"Number {n} is what Ada {n} has.", "answers": [f"Ada {n}"]}
        for n in range(8)
    ]
    files = {
        "conversations": conversations, "texts": texts, "pairs": pairs, "calls": calls, "answers": answers,
        "documents": documents,
    }  # fmt: skip
    for name, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


# ---------------------------------------------------------------- commands


class Project:
    """Commands of the pipeline in this process, as `smolpost plan` prints them; results by the stage's name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.words = [f"pipeline={HERE / 'golden.yaml'}", f"data_root={folder / 'data'}", f"run_dir={folder / 'runs'}"]
        write_rows(folder / "data")

    def make(self) -> None:
        """Every stage, parents first."""
        with redirect_stdout(StringIO()) as printed:
            smolpost("plan", *self.words)
        for line in printed.getvalue().splitlines():
            command = shlex.split(line.strip().removeprefix("$ "))
            if line.strip().startswith("$ ") and command[:2] != ["smolpost", "eval"]:
                in_process(command)

    def stage(self, name: str) -> Path:
        """Its finished folder."""
        manifests = (self.folder / "runs").rglob("manifest.json")
        [folder] = [file.parent for file in manifests if json.loads(file.read_text()).get("stage") == name]
        return folder

    def manifest(self, stage: str) -> dict:
        return json.loads((self.stage(stage) / "manifest.json").read_text())

    def scores(self, stage: str, *words: str) -> dict[str, dict]:
        """What `smolpost eval` measures: task -> kind, scores and notes."""
        smolpost("eval", *self.words, *words, f"stage={stage}")
        file = self.folder / "runs" / "golden" / "evaluations" / self.stage(stage).name / "scores.json"
        found = json.loads(file.read_text())
        return {task: {key: found[task][key] for key in ("kind", "scores", "notes", "num_items")} for task in found}


def smolpost(*words: str) -> None:
    with ended_well():
        cli.main(list(words))


def in_process(command: list[str]) -> None:
    """A command line of a plan, without a Python of its own."""
    if command[0] == "smolpost":
        smolpost(*command[1:])
    elif "-m" in command:  # accelerate launch ... -m MODULE WORDS
        module = command.index("-m") + 1
        with ended_well(), arguments(command[module:]):
            runpy.run_module(command[module], run_name="__main__")
    else:
        with ended_well(), arguments(command[1:]):
            runpy.run_path(str(ROOT / command[1]), run_name="__main__")


@contextmanager
def ended_well():
    try:
        yield
    except SystemExit as end:
        assert not end.code, f"exit code {end.code}"


@contextmanager
def arguments(words: list[str]):
    before, there = sys.argv, Path.cwd()
    sys.argv = words
    os.chdir(ROOT)  # plans name the library's files from there
    try:
        yield
    finally:
        sys.argv = before
        os.chdir(there)


# ---------------------------------------------------------------- results in a form that no file format decides


def digest(values) -> str:
    """Of integers or text, whatever holds them."""
    if isinstance(values, np.ndarray | list) and not (len(values) and isinstance(values[0], str)):
        return hashlib.sha256(np.asarray(values, np.int64).tobytes()).hexdigest()[:16]
    return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()[:16]


def flat(column) -> np.ndarray:
    return np.concatenate([np.asarray(row) for row in column])


def tokenized(project: Project, source: str) -> list[dict]:
    """Of each folder that the source is tokenized in: rows, tokens, and hashes of their ids and fates."""
    found = []
    for folder in (project.folder / "runs").rglob(f"tokenized/{source}-*"):
        batches = []
        for file in sorted(folder.glob("*.arrow")):
            batches += pa.ipc.open_file(pa.memory_map(str(file))).read_all().to_batches()
        table = pa.Table.from_batches(batches)
        ids, fates, parts = (table[name].to_pylist() for name in ("ids", "fates", "parts"))
        found.append(
            {
                "rows": len(ids), "tokens": sum(map(len, ids)), "ids": digest(flat(ids)), "fates": digest(flat(fates)),
                "parts": digest(flat(parts)), "faults": digest([fault or "" for fault in table["fault"].to_pylist()]),
            }
        )  # fmt: skip
    return sorted(found, key=lambda entry: (entry["tokens"], entry["ids"], entry["fates"]))


def packs(folder: Path) -> dict:
    """Prepared rows of an sft stage."""
    rows = datasets.load_from_disk(str(folder)).with_format(None)
    ids, fates = flat(rows["input_ids"]), flat(rows["fates"])
    labels = np.where(fates == TRAINED, ids, IGNORED)
    if "labels" in rows.column_names:
        assert (flat(rows["labels"]) == labels).all()
    found = {
        "packs": len(rows), "tokens": len(ids), "ids": digest(ids), "labels": digest(labels), "fates": digest(fates),
        "packs_tokens": digest([len(row) for row in rows["input_ids"]]),
        "documents": digest(flat(rows["seq_lengths"])), "documents_of_packs": digest([*map(len, rows["seq_lengths"])]),
    }  # fmt: skip
    if "seq_weights" in rows.column_names:
        found["weights"] = digest(flat(rows["seq_weights"]).astype(np.float32).view(np.int32))
    return found


def pairs(folder: Path) -> dict:
    """Prepared rows of a preference stage."""
    rows = datasets.load_from_disk(str(folder)).with_format(None)
    found = {"pairs": len(rows)}
    for part in ("prompt", "chosen", "rejected"):
        fates = flat(rows[f"{part}_fates"])
        if f"{part}_mask" in rows.column_names:
            assert (flat(rows[f"{part}_mask"]) == (fates == TRAINED)).all()
        ids = rows[f"{part}_ids"]
        found[part] = {"lengths": [*map(len, ids)], "ids": digest(flat(ids)), "fates": digest(fates)}
    return found


def completions(folder: Path) -> dict:
    """Prepared rows of a stage on labels."""
    rows = datasets.load_from_disk(str(folder)).with_format(None)
    found = {"labels": flat(rows["label"]).tolist(), "mask": digest(flat(rows["completion_mask"]))}
    for part in ("prompt", "completion"):
        ids = rows[f"{part}_ids"]
        fates = digest(flat(rows[f"{part}_fates"]))
        found[part] = {"lengths": [*map(len, ids)], "ids": digest(flat(ids)), "fates": fates}
    return found


def steps(report: dict) -> dict:
    """Loss, gradient norm and learning rate of each step."""
    logged = [entry for entry in report["log"] if "loss" in entry]
    return {name: [entry[name] for entry in logged] for name in ("loss", "grad_norm", "learning_rate")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in sorted(load_file(file).items())}


def weight_sums(folder: Path) -> dict[str, list[float]]:
    """Tensor -> its sum, the sum of its magnitudes, and one in which every place counts differently."""
    found = {}
    for name, tensor in sorted(weights(folder).items()):
        flat = tensor.double().flatten()
        places = torch.linspace(-1, 1, len(flat), dtype=torch.float64)
        found[name] = [float(flat.sum()), float(flat.abs().sum()), float(flat @ places)]
    return found


def weight_hash(folder: Path) -> str:
    """Of every tensor's name, shape, type and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights(folder).items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def with_other_weights(folder: Path, like: Path, seed: int) -> Path:
    """A checkpoint whose weights are multiples of 1/1024: means with weights such as 1/4 round nowhere before the end,
    so their bits are the same on every processor."""
    folder.mkdir()
    for file in like.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja") and not file.name.startswith((".", "manifest")):
            (folder / file.name).write_bytes(file.read_bytes())
    draw = np.random.default_rng(seed)
    drawn = {
        name: torch.from_numpy(draw.integers(-512, 512, tuple(tensor.shape)) / 1024).float()
        for name, tensor in sorted(weights(like).items())
    }
    save_file(drawn, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
