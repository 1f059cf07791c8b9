"""The command that serves a teacher or a checkpoint of ours, as each server spells it.

A checkpoint's chat template says which parsers fit, as read in the sources of vLLM and SGLang:

- With ours a reply begins with a think block in think mode, and the prompt ends with an empty one in no-think mode.
  `qwen3` reads both: a reply without tags is the answer where the request turned thinking off. `deepseek_r1` takes such
  a reply for reasoning.
- Without a no-think mode no parser is named. vLLM's `qwen3` would take a reply that does not think for reasoning.
- Ours writes calls as JSON between <tool_call> and </tool_call> on one line. `hermes` reads them; SGLang's `qwen25`
  wants line breaks after and before the tags.
"""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from smolpost.chat.calls import TAGS
from smolpost.chat.reasoning import OPEN
from smolpost.chat.render import load_template
from smolpost.errors import UserError
from smolpost.files import read_json
from smolpost.screen import command_line
from smolpost.synthesis.profiles import PROFILES, unsupported
from smolpost.synthesis.settings import SERVERS, Teacher

OWN_SERVERS = tuple(server for server in SERVERS if server != "hosted")
PROMPT_TOKENS = 8192  # room for a prompt beside the longest reply; together the 40,960 that Qwen3's config states
SLOTS = 4  # prompts that llama.cpp answers at once; its context is divided among them
INSTALL = {
    "vllm": "pip install vllm", "sglang": "pip install 'sglang[all]'",
    "transformers": "pip install 'smolpost[serve]'", "llama_cpp": "build llama.cpp",
}  # fmt: skip

# SGLang has --served-model-name, too. But its /models then names nothing else, and an evaluation that compares the
# served model with its checkpoint would refuse it.
_NAME_FLAGS = {"vllm": "served-model-name", "llama_cpp": "alias"}

Flags = dict[str, str]  # name without its dashes -> value; "" for a flag that has none


def serve_command(teacher: Teacher, *, name: str | None = None, template: Path | None = None) -> list[str]:
    """The words of a command that serves the teacher's model where its `url` says.

    The context is the longest reply and 8,192 tokens of prompt, or all that a checkpoint folder has. `teacher.serve`
    adds flags and replaces those that are here. A server of another machine listens on all of its addresses.

    Args:
        name: By which clients ask for the model; None: the model itself.
        template: File of a chat template in place of the model's own.
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
    if name and teacher.server in _NAME_FLAGS:
        flags[_NAME_FLAGS[teacher.server]] = name
    if teacher.server in ("vllm", "sglang"):
        flags |= _parsers(teacher, template)
    if template:
        flags[_template_flag(teacher)] = str(template)
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


def reasoning_parser(model: str, template: str = "") -> str | None:
    """Name of the parser that vLLM and SGLang have for a model's think blocks.

    Without one a block stays in the content, where it is read as well.

    Args:
        template: Text of the chat template, where it is known.
    """
    qwen3 = re.search(r"qwen3", model, re.IGNORECASE) and not re.search("instruct|coder", model, re.IGNORECASE)
    has_modes = "enable_thinking" in template and OPEN in template
    return "qwen3" if qwen3 or has_modes else None


def own_template(folder: Path) -> str:
    """Text of a checkpoint's chat template; "" where it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    text = read_json(folder / "tokenizer_config.json").get("chat_template")
    return text if isinstance(text, str) else ""


def _parsers(teacher: Teacher, template: Path | None) -> Flags:
    """What vLLM and SGLang are told of think blocks and tool calls."""
    text = load_template(template) if template else own_template(Path(teacher.model))
    reasoning = reasoning_parser(teacher.model, text)
    flags = {"reasoning-parser": reasoning} if reasoning else {}
    if f"<{TAGS['xml']}>" in text:
        flags |= {"enable-auto-tool-choice": ""} if teacher.server == "vllm" else {}
        flags["tool-call-parser"] = "hermes"
    return flags


def _template_flag(teacher: Teacher) -> str:
    if teacher.server == "transformers":
        raise UserError(
            "--chat-template is not a flag of transformers serve; copy the checkpoint's folder, and put the template "
            "there as chat_template.jinja"
        )
    return "chat-template-file" if teacher.server == "llama_cpp" else "chat-template"


def _vllm(teacher: Teacher) -> tuple[list[str], Flags]:
    flags = _revision(teacher) | {"max-model-len": str(_context(teacher)), "dtype": _dtype(teacher)}
    return ["vllm", "serve", teacher.model], flags


def _sglang(teacher: Teacher) -> tuple[list[str], Flags]:
    flags = _revision(teacher) | {"context-length": str(_context(teacher)), "dtype": _dtype(teacher)}
    return ["python", "-m", "sglang.launch_server", "--model-path", teacher.model], flags


def _transformers(teacher: Teacher) -> tuple[list[str], Flags]:
    if teacher.revision:
        raise UserError(
            f"revision={teacher.revision} has no flag of transformers serve, which reads it from the model's name; "
            f"set model to {teacher.model}@{teacher.revision} and revision to null"
        )
    return ["transformers", "serve", teacher.model], {}


def _llama_cpp(teacher: Teacher) -> tuple[list[str], Flags]:
    if Path(teacher.model).is_dir():
        export = command_line(["smolpost", "export", "gguf", teacher.model, "OUT"])
        raise UserError(
            f"model={teacher.model} is a checkpoint folder, and llama.cpp reads GGUF files; `{export}` writes one, and "
            "`smolpost serve OUT/model.gguf` serves it"
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
    return min(wanted, positions(Path(teacher.model)) or wanted)


def positions(folder: Path) -> int | None:
    """Tokens of a checkpoint's context, YaRN's stretch included; None where there is no checkpoint."""
    config = read_json(folder / "config.json")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) == "yarn" and (original := rope.get("original_max_position_embeddings")):
        return round(original * rope["factor"])
    return config.get("max_position_embeddings")


def _dtype(teacher: Teacher) -> str:
    """Of a checkpoint folder in fp16, its own; fp32 weights are served in the precision that training computes in."""
    config = read_json(Path(teacher.model) / "config.json")
    return "float16" if config.get("dtype", config.get("torch_dtype")) == "float16" else "bfloat16"


def notes(teacher: Teacher, chosen: str, template: Path | None = None) -> list[str]:
    """What else its user should know, a line each.

    Args:
        chosen: The server that the teacher's recipe names.
        template: As `serve_command`.
    """
    folder, lines = Path(teacher.model), []
    settings = read_json(folder / "config.json")
    if teacher.server != chosen:
        lines.append(f"the teacher's recipe says server={chosen}; it needs server={teacher.server} to ask this server")
    if (
        teacher.server in ("vllm", "sglang")
        and settings.get("model_type") == "smollm3"
        and "rope_theta" not in settings
    ):
        export = command_line(["smolpost", "export", "vllm-config", teacher.model, "OUT"])
        lines.append(
            f"{PROFILES[teacher.server].title} reads another spelling of this folder's config.json; `{export}` writes "
            "a folder with both, to serve instead"
        )
    if settings and template is None and not own_template(folder):
        lines.append("the checkpoint has no chat template, so it cannot chat; --chat-template smollm3 gives it one")
    return lines
