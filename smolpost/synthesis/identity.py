"""Who answers behind a URL, in the server's own words; and why it answers nobody."""

import asyncio
import hashlib
import json
import time
from typing import Any

from smolpost.errors import UserError
from smolpost.inference.served import listed, served_as
from smolpost.synthesis.connection import Connection, Fault
from smolpost.synthesis.settings import Teacher

LOOK_UP = 30.0  # seconds for one page
POLL = 2.0  # seconds between two looks at a server that is loading its model
# transformers lists its cache, fails without one, and loads what is asked; hosted APIs do not list all their names.
UNLISTED = ("transformers", "hosted")
# Server -> a page beside the API, and what only this server has there; one further down may have the page, too.
OWN_PAGES = {
    "sglang": ("get_server_info", "model_path"), "llama_cpp": ("props", "build_info"), "vllm": ("version", "version"),
    "transformers": ("health", "status"),
}  # fmt: skip
AGAIN = "run the same command again: it goes on from here"


async def identify(connection: Connection, teacher: Teacher) -> tuple[str, dict[str, Any]]:
    """The name to ask the model by, and what the server says of itself.

    vLLM tells its version under /version, SGLang under /get_server_info; llama.cpp tells its build, its context and its
    chat template under /props. What a server does not tell is None.

    Returns:
        Name, and server, model, revision, max_model_len, version, template (SHA-256 of its text).
    Raises:
        UserError: It does not answer, is not an OpenAI-compatible API, has another model than `teacher.model`, or takes
            no more tokens than one reply may have.
    """
    models = await _models(connection, teacher)
    model = _chosen(models, connection, teacher)
    page = await _page(connection, teacher)
    template, settings = page.get("chat_template"), page.get("default_generation_settings") or {}
    length = model.get("max_model_len") or settings.get("n_ctx")
    if length and teacher.max_new_tokens >= length:
        raise UserError(
            f"{connection.key}.max_new_tokens={teacher.max_new_tokens} leaves no room for a prompt in the {length} "
            f"tokens that {connection.url} takes; lower it, or serve the model with a longer context"
        )
    return model["id"], {
        "server": teacher.server,
        "model": model.get("root") or model["id"],
        "revision": teacher.revision,
        "max_model_len": length,
        "version": page.get("version") or page.get("build_info"),
        "template": hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None,
    }


async def server_kind(connection: Connection) -> str:
    """Which of `settings.SERVERS` answers, by the pages that only one of them has; "hosted" where none is there."""
    root = connection.url.rsplit("/", 1)[0]
    for kind, (path, key) in OWN_PAGES.items():
        found = await connection.send("GET", f"{root}/{path}", LOOK_UP)
        if isinstance(found, Fault) and found.unreached:
            break
        if not isinstance(found, Fault) and key in found:
            return kind
    return "hosted"


async def _models(connection: Connection, teacher: Teacher) -> list[dict[str, Any]]:
    """What the server lists under /models; empty where it needs no such page."""
    shown, due, said = f"{connection.shown}/models", time.monotonic() + teacher.deadline, False
    while isinstance(found := await connection.send("GET", f"{connection.url}/models", LOOK_UP), Fault):
        if found.status is None:
            raise UserError(
                f"{connection.shown} does not answer ({found}); start the server (`smolpost serve` prints how), "
                "or mend the address"
            )
        if teacher.server in UNLISTED and found.status in (404, 405, 500, 501):
            return []
        if found.hopeless:
            raise UserError(await hopeless(connection, teacher.model, found))
        if not found.retried or found.status == 200 or time.monotonic() > due:
            raise UserError(f"{shown} answered {found}; give the address of an OpenAI-compatible API")
        if not said:
            print(f"{shown} answered {found}; waiting for it", flush=True)
        said = True
        await asyncio.sleep(max(found.wait, POLL))
    models = found.get("data")
    if not isinstance(models, list) or any(not isinstance(m, dict) or "id" not in m for m in models):
        raise UserError(
            f"{shown} answered {json.dumps(found)[:200]}, which is no list of models; give the address of an "
            "OpenAI-compatible API"
        )
    return models


def _chosen(models: list[dict[str, Any]], connection: Connection, teacher: Teacher) -> dict[str, Any]:
    """The entry of the teacher's model."""
    key = f"{connection.key}.model"
    if teacher.model is None and len(models) == 1:
        print(f"{key} is not set: {connection.url} serves {listed(models)}, which is asked", flush=True)
        return models[0]
    if teacher.model is None:
        raise UserError(f"{key} is not set, and {connection.url} serves {listed(models)}; name the model to ask")
    if model := served_as(models, teacher.model):
        return model
    if teacher.server in UNLISTED:
        return {"id": teacher.model}
    raise UserError(
        f"{key}={teacher.model} is not served by {connection.url}, which has {listed(models)}; serve it there, or set "
        f"{key} to what is served"
    )


async def _page(connection: Connection, teacher: Teacher) -> dict[str, Any]:
    """What the server tells beside the API; empty where it does not."""
    path = {"vllm": "version", "sglang": "get_server_info", "llama_cpp": "props"}.get(teacher.server)
    found = await connection.send("GET", f"{connection.url.rsplit('/', 1)[0]}/{path}", LOOK_UP) if path else {}
    return {} if isinstance(found, Fault) else found


async def hopeless(connection: Connection, model: str | None, fault: Fault) -> str:
    """One line about a status that every request would get."""
    key, url, variable = connection.key, connection.url, connection.api_key_env
    if fault.status in (401, 403) and variable:
        return f"{key}.api_key_env={variable} holds a key that {url} refuses ({fault}); export a valid one, and {AGAIN}"
    if fault.status in (401, 403):
        return f"{key}.url={url} wants a key ({fault}); export it, and name its variable in {key}.api_key_env"
    if fault.status == 402:
        return f"{key}.url={url} wants to be paid ({fault}); settle that, and {AGAIN}"
    if fault.status not in (404, 405):
        return f"{key}.url={url} does not answer itself ({fault}); give the address that answers"
    found = await connection.send("GET", f"{url}/models", LOOK_UP)
    if not isinstance(found, Fault) and isinstance(found.get("data"), list):
        return f"{key}.model={model} is refused by {url} ({fault}); set it to what is served: {listed(found['data'])}"
    found = await connection.send("GET", f"{url}/v1/models", LOOK_UP)
    remedy = "give one like http://localhost:8000/v1" if isinstance(found, Fault) else f"set it to {url}/v1"
    return f"{key}.url={url} is not the address of the API ({fault}); {remedy}"
