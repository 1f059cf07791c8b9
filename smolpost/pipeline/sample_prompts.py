"""The prompts of `smolpost sample`: a text file with a prompt on each line, or rows as training data has them."""

from pathlib import Path

from smolpost.data.mixtures import take
from smolpost.data.validate import turns_of_prompt
from smolpost.errors import UserError
from smolpost.recipe.places import room
from smolpost.report.replies import Prompt
from smolpost.schema import Source
from smolpost.synthesis.jobs.prompts import asks_nothing, conversation_of


def shipped_prompts() -> Path:
    """Twelve prompts of our own: chat, maths, code, a refusal, a system message, several turns, tools."""
    return room("recipes") / "prompts" / "vibe.jsonl"


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a file, in its order.

    A .txt file has a prompt on each line; blank lines do not count. Every other file is read as training rows are
    (JSONL, also compressed, or Parquet), and a row is a prompt (`prompt`, a text or messages) or a conversation
    (`messages`). Where a conversation ends with a reply, the model is asked for that reply.

    Raises:
        UserError: The file cannot be read, has no prompts, or a row of it is not a prompt.
    """
    if not file.is_file():
        raise UserError(f"--prompts {file} is not a file; name a .txt file with a prompt on each line, or a JSONL file")
    if file.suffix == ".txt":
        return _lines(file)
    prompts = []
    for number, row in enumerate(take(Source(path=str(file)), "prompts", 0, replies=False), 1):
        if "messages" not in row and "prompt" not in row:
            raise UserError(f"{row.where}: has no prompt and no messages; give one of them to ask about")
        given = row.get("id")
        name = str(given) if isinstance(given, str | int) and given != "" else str(number)
        messages = conversation_of(row if "messages" in row else {"messages": turns_of_prompt(row["prompt"])})
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if asks_nothing(messages):
            raise UserError(f"{row.where}: no user speaks in it; add the question")
        variables = row.get("chat_template_kwargs") or {}
        kwargs = {name: value for name, value in variables.items() if name != "enable_thinking" and value}
        prompts.append(Prompt(name, messages, row.get("tools") or None, kwargs))
    return prompts


def _lines(file: Path) -> list[Prompt]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{file}: is empty; write a prompt on each line")
    return [Prompt(str(i), [{"role": "user", "content": line}]) for i, line in lines]
