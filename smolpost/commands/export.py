"""smolpost export: a checkpoint for another runtime."""

import argparse
from pathlib import Path

from smolpost import screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=["onnx", "mlx", "gguf", "vllm-config"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of prompt and answer; default 256 1024")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per length; default 8")
    parser.add_argument("--max-recall-drop", type=float, default=0.02, help="allowed at any length; default 0.02")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="its sources, for gguf; or LLAMA_CPP")


def command(options: argparse.Namespace) -> int:
    from smolpost.export.command import export_command

    return export_command(
        options.kind,
        options.checkpoint,
        options.out,
        screen.console(),
        lengths=options.lengths,
        num_prompts=options.prompts,
        max_recall_drop=options.max_recall_drop,
        llama_cpp=options.llama_cpp,
    )
