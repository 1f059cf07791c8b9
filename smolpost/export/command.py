"""`smolpost export FORMAT CHECKPOINT OUT`: converted, scored against the checkpoint, then put in place."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from smolpost.chat.masks import encode_prompt
from smolpost.errors import UserError
from smolpost.export import check, folder, to_gguf, to_mlx, to_onnx, to_vllm
from smolpost.export.folder import ExportSource
from smolpost.export.session import Session
from smolpost.model.loading import load_model
from smolpost.schema import RELEASE_DAY

LENGTHS = (256, 1024)
NUM_PROMPTS = 8


class Format(NamedTuple):
    """One row of `FORMATS`.

    Attributes:
        convert: (source, out folder) to the dtype of the written weights.
        session: (out folder, config, most tokens of a sequence) to the exported model in its runtime.
        obstacle: Why the format cannot hold a model, or "".
        tools: Packages whose versions the manifest keeps.
        modules: Modules that must be there, and the extra of this package that brings them.
    """

    convert: Callable[[ExportSource, Path], str]
    session: Callable[[Path, Any, int], Session]
    obstacle: Callable[[ExportSource], str]
    tools: tuple[str, ...]
    modules: tuple[str, ...] = ()
    extra: str = "export"


def formats(llama_cpp: Path | None = None) -> dict[str, Format]:
    """Name on the command line -> format."""
    return {
        "onnx": Format(
            to_onnx.convert,
            to_onnx.OnnxSession,
            to_onnx.obstacle,
            to_onnx.TOOLS,
            ("onnx", "onnxscript", "onnxruntime"),
        ),
        "mlx": Format(to_mlx.convert, to_mlx.MlxSession, to_mlx.obstacle, to_mlx.TOOLS, ("mlx", "mlx_lm")),
        "gguf": Format(
            partial(to_gguf.convert, llama_cpp=llama_cpp),
            to_gguf.GgufSession,
            to_gguf.obstacle,
            to_gguf.TOOLS,
            ("gguf", "llama_cpp"),
            "gguf",
        ),
        "vllm-config": Format(to_vllm.convert, to_vllm.VllmSession, to_vllm.obstacle, to_vllm.TOOLS),
    }


def export(
    kind: str,
    checkpoint: Path,
    out: Path,
    *,
    lengths: list[int] | None = None,
    num_prompts: int = NUM_PROMPTS,
    seed: int = 0,
    limits: check.Limits = check.LIMITS,
    llama_cpp: Path | None = None,
    asked: dict[int, check.LengthCheck] | None = None,
    show: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Write a checkpoint in another format to a new folder, unless the result is not the same model.

    Args:
        kind: "onnx", "mlx", "gguf" or "vllm-config".
        checkpoint: Folder of a SmolLM3 with its tokenizer.
        out: Result folder; empty or absent.
        lengths: Tokens of prompt and answer at which recall is measured; by default 256 and 1024, as far as the
            model's context goes.
        num_prompts: Per length.
        seed: Of the prompts.
        limits: What the result may differ by.
        llama_cpp: Folder of llama.cpp's sources, for gguf; the variable LLAMA_CPP where None.
        asked: Length -> what is measured instead of recall.
        show: Called with the check's report before a result that failed is refused.
    Returns:
        The manifest, which holds the check's report.
    Raises:
        UserError: The checkpoint cannot be exported, a package is missing, or the check failed; nothing is written.
    """
    chosen, source = formats(llama_cpp)[kind], ExportSource(Path(checkpoint))
    for module in chosen.modules:
        if find_spec(module) is None:
            raise UserError(f"{kind} needs the package {module}; pip install 'smolpost[{chosen.extra}]'")
    check_format(kind, source)
    if kind == "gguf":
        to_gguf.converter_folder(llama_cpp)
    _ = source.weight_files
    longest = source.config.max_position_embeddings
    lengths = lengths or [n for n in LENGTHS if n <= longest] or [longest]
    asked = asked or check.ask(source.tokenizer, lengths, num_prompts=num_prompts, seed=seed)
    max_tokens = max(len(item.ids) + item.max_new_tokens for _, items in asked.values() for item in items)
    with folder.building(out) as work:
        (draft := work / "out").mkdir()
        dtype = chosen.convert(source, draft)
        folder.carry(source, draft)
        session = chosen.session(draft, source.config, max_tokens)
        notes = to_gguf.check_file(source, session, _prompt(source)) if kind == "gguf" else []
        ours = load_model(source.folder, dtype=torch.float32)
        report = check.compare(ours, session, source.tokenizer, asked, dtype=dtype, limits=limits)
        report["notes"] += notes
        show(report)
        check.refuse_failed(report, kind)
        return folder.write_manifest(source, draft, kind, chosen.tools, dtype=dtype, check=report)


def check_format(kind: str, source: ExportSource) -> None:
    """
    Raises:
        UserError: The format cannot hold the model; it names those that can.
    """
    if reason := formats()[kind].obstacle(source):
        others = [name for name, other in formats().items() if not other.obstacle(source)]
        remedy = f"export it as {' or '.join(others)}" if others else "no other format carries it"
        raise UserError(f"{source.folder}: {reason}; {remedy}")


def _prompt(source: ExportSource) -> str:
    """A rendered conversation, special tokens written out."""
    messages = [{"role": "user", "content": "Where is key 42? It's under\n\n  the mat, isn't it?"}]
    if not source.tokenizer.chat_template:
        return messages[0]["content"]
    return source.tokenizer.decode(encode_prompt(source.tokenizer, messages, today=RELEASE_DAY))


def export_command(
    kind: str,
    checkpoint: Path,
    out: Path,
    console: Console,
    *,
    lengths: list[int] | None,
    num_prompts: int,
    max_recall_drop: float,
    llama_cpp: Path | None,
) -> int:
    """The verb: `export`, and a table of what was measured. Returns the exit code."""
    if lengths and min(lengths) < 1:
        raise UserError(f"--lengths {min(lengths)} is below 1 token")
    if num_prompts < 1:
        raise UserError(f"--prompts {num_prompts} is below 1")
    if not 0 <= max_recall_drop <= 1:
        raise UserError(f"--max-recall-drop {max_recall_drop:g} is outside [0, 1]")
    manifest = export(
        kind,
        checkpoint,
        out,
        lengths=lengths,
        num_prompts=num_prompts,
        limits=check.Limits(recall=max_recall_drop),
        llama_cpp=llama_cpp,
        show=partial(show, console),
    )
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    console.print(
        f"{out}: {kind}, {manifest['dtype']}, {size / 1e6:,.1f} MB in {len(manifest['files'])} files", soft_wrap=True
    )
    return 0


def show(console: Console, report: dict[str, Any]) -> None:
    """Print the check's table: a row for each length."""
    table = Table("length", "recall, ours", "recall, exported", "largest logit difference", "limit")
    for column in table.columns:
        column.justify = "right"
    for length, row in report["lengths"].items():
        numbers = (f"{row['ours']:.3f}", f"{row['exported']:.3f}", f"{row['logit_difference']:.2g}")
        table.add_row(str(length), *numbers, f"{row['logit_limit']:.2g}")
    console.print(table)
    for note in report["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
