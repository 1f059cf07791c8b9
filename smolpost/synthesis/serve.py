"""The command that serves a teacher, as each server spells it."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from smolpost.errors import UserError
from smolpost.synthesis.profiles import PROFILES, unsupported
from smolpost.synthesis.settings import SERVERS, Teacher

OWN_SERVERS = tuple(server for server in SERVERS if server != "hosted")
PROMPT_TOKENS = 8192  # room for a prompt beside the longest reply; together the 40,960 that Qwen3's config states
SLOTS = 4  # prompts that llama.cpp answers at once; its context is divided among them
INSTALL = {
    "vllm": "pip install vllm", "sglang": "pip install 'sglang[all]'",
    "transformers": "pip install 'smolpost[serve]'", "llama_cpp": "build llama.cpp",
}  # fmt: skip

Flags = dict[str, str]  # name without its dashes -> value; "" for a flag that has none


def serve_command(teacher: Teacher) -> list[str]:
    """The words of a command that serves the teacher's model where its `url` says.

    The context is the longest reply and 8,192 tokens of prompt, or all that a checkpoint folder has. `teacher.serve`
    adds flags and replaces those that are here. A server of another machine listens on all of its addresses.

    Raises:
        UserError: Nothing is to be served, or this server cannot serve it as the teacher says.
    """
    if teacher.stage:
        raise UserError(
            f"stage={teacher.stage} answers in the run's own process, so there is nothing to serve; give the "
            "checkpoint's folder to serve it all the same"
        )
    if teacher.server not in OWN_SERVERS:
        raise UserError(
            f"server={teacher.server} is somebody else's API, so there is nothing to serve; --server chooses one of: "
            f"{', '.join(OWN_SERVERS)}"
        )
    if not teacher.model:
        raise UserError(
            "the teacher names no model; a stage's checkpoint needs no server, and any other teacher needs a Hub id or "
            "a checkpoint folder as its model"
        )
    if faults := unsupported(teacher, "teacher"):
        raise faults[0]
    words, flags = _COMMANDS[teacher.server](teacher)
    address = urlsplit(teacher.url or "http://localhost:8000/v1")
    local = address.hostname in ("localhost", "127.0.0.1", "::1")
    flags = {"host": "127.0.0.1" if local else "0.0.0.0", "port": str(address.port or 8000)} | flags
    for name, value in (flags | teacher.serve).items():
        words += [f"--{name}", value] if value else [f"--{name}"]
    return words


def program(server: str, name: str) -> str:
    """Path of a server's program: in this environment, or wherever the shell finds it.

    Raises:
        UserError: It is not there.
    """
    if name == "python":
        return sys.executable
    beside = Path(sys.executable).parent / name
    if found := str(beside) if beside.is_file() else shutil.which(name):
        return found
    raise UserError(
        f"--run needs the program {name}, which is not installed here; {INSTALL[server]}, or leave --run out and run "
        "the printed command where it is installed"
    )


def reasoning_parser(model: str) -> str | None:
    """Name of the parser that vLLM and SGLang have for a model's think blocks.

    Without one a block stays in the content, where it is read as well.
    """
    qwen3 = re.search(r"qwen3", model, re.IGNORECASE) and not re.search("instruct|coder", model, re.IGNORECASE)
    return "qwen3" if qwen3 else None


def _vllm(teacher: Teacher) -> tuple[list[str], Flags]:
    parser, length = reasoning_parser(teacher.model), _context(teacher)
    flags = _revision(teacher) | {"max-model-len": str(length), "dtype": "bfloat16"}
    return ["vllm", "serve", teacher.model], flags | ({"reasoning-parser": parser} if parser else {})


def _sglang(teacher: Teacher) -> tuple[list[str], Flags]:
    parser, length = reasoning_parser(teacher.model), _context(teacher)
    flags = _revision(teacher) | {"context-length": str(length), "dtype": "bfloat16"}
    words = ["python", "-m", "sglang.launch_server", "--model-path", teacher.model]
    return words, flags | ({"reasoning-parser": parser} if parser else {})


def _transformers(teacher: Teacher) -> tuple[list[str], Flags]:
    if teacher.revision:
        raise UserError(
            f"revision={teacher.revision} has no flag of transformers serve, which reads it from the model's name; "
            f"set model to {teacher.model}@{teacher.revision} and revision to null"
        )
    return ["transformers", "serve", teacher.model], {}


def _llama_cpp(teacher: Teacher) -> tuple[list[str], Flags]:
    if Path(teacher.model).is_dir():
        raise UserError(
            f"model={teacher.model} is a checkpoint folder, and llama.cpp reads GGUF files; `smolpost export gguf "
            f"{teacher.model} FILE.gguf` writes one"
        )
    if "gguf" not in teacher.model.lower():
        raise UserError(
            f"model={teacher.model} is not a GGUF file or a repository of them; set model to one, such as "
            f"{teacher.model}-GGUF"
        )
    if teacher.revision:
        raise UserError(f"revision={teacher.revision} has no flag of llama-server; set revision to null")
    source = "--model" if teacher.model.endswith(".gguf") else "--hf-repo"
    size = {"parallel": str(SLOTS), "ctx-size": str(SLOTS * _context(teacher))}
    return ["llama-server", source, teacher.model], {"alias": teacher.model, **size, "jinja": ""}


_COMMANDS: dict[str, Callable[[Teacher], tuple[list[str], Flags]]] = {
    "vllm": _vllm, "sglang": _sglang, "transformers": _transformers, "llama_cpp": _llama_cpp,
}  # fmt: skip


def _revision(teacher: Teacher) -> Flags:
    return {"revision": teacher.revision} if teacher.revision else {}


def _context(teacher: Teacher) -> int:
    """Tokens of the longest prompt and reply together, as far as the model's positions go where they are known."""
    wanted = teacher.max_new_tokens + PROMPT_TOKENS
    config = Path(teacher.model) / "config.json"
    known = json.loads(config.read_text(encoding="utf-8")).get("max_position_embeddings") if config.is_file() else None
    return min(wanted, known or wanted)


def notes(teacher: Teacher, chosen: str) -> list[str]:
    """What else its user should know, a line each.

    Args:
        chosen: The server that the teacher's recipe names.
    """
    config, lines = Path(teacher.model) / "config.json", []
    if teacher.server != chosen:
        lines.append(f"the teacher's recipe says server={chosen}; it needs server={teacher.server} to ask this server")
    if teacher.server in ("vllm", "sglang") and config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
        if settings.get("model_type") == "smollm3" and "rope_theta" not in settings:
            lines.append(
                f"{PROFILES[teacher.server].title} reads another spelling of this folder's config.json; `smolpost "
                f"export vllm-config {teacher.model} OUT` writes a folder with both, to serve instead"
            )
    return lines
