"""The beginning of a run: its prompts are written once, and what it was begun with is compared ever after."""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from smolpost.errors import UserError
from smolpost.files import lock, read_json, remove_parts, replacing, write_json, write_text
from smolpost.screen import shown
from smolpost.synthesis.records import Prompt
from smolpost.synthesis.run_folder import CHUNKS, PROMPTS, REPLIES, RUN, UPDATES, RunFolder, bounds, json_line

NOTED = ("version", "max_model_len")  # of the server: what may change during a run


def prepare(
    path: Path,
    prompts: Iterable[Prompt],
    given: Mapping[str, Any],
    *,
    chunk_size: int,
    tasks: int,
    teacher: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Write the prompts and what the run is begun with; for a run that has begun, compare both.

    Memory does not grow with the length of the prompts, and by 16 bytes with each one.

    Args:
        path: The run has begun when the folder has its run.json, which is written last.
        prompts: In the order of the records.
        given: All that decides the replies beside prompts and teacher; fit for JSON.
        chunk_size: Prompts in a chunk at most; the chunks of all parts are equal in size, up to one prompt.
        tasks: Number of parts.
        teacher: What it says of itself, where it is known before the first request.
    Raises:
        UserError: There is no prompt, two prompts have one id, the run was begun with something else, or
            the folder has replies without a run.
    """
    begun = {"given": json.loads(json.dumps(given, default=asdict)), "chunk_size": chunk_size, "tasks": tasks}
    with lock(path):
        if (path / RUN).exists():
            with open(os.devnull, "wb") as nowhere:
                written = _write_prompts(prompts, nowhere)
            _compare(path, read_json(path / RUN), begun | {"prompts": written.facts})
            return RunFolder(path)
        if any(path.glob(f"{REPLIES}/*")):
            raise UserError(
                f"{shown(path)} has replies and no {RUN} that says what they answer; put that file back, or remove the "
                "folder to ask for them again"
            )
        (path / REPLIES).mkdir(parents=True, exist_ok=True)
        remove_parts(path, [PROMPTS, CHUNKS, RUN])  # of a process that was killed here
        with replacing(path / PROMPTS) as file:
            written = _write_prompts(prompts, file)
            file.flush()
            _refuse_same_ids(written.id_hashes, file.name)
        number = written.facts["number"]
        if not number:
            raise UserError("there is no prompt to ask about; give the prompts mixture at least one row")
        positions = bounds(number, tasks * -(-number // (tasks * chunk_size)))
        write_text(path / CHUNKS, json.dumps([written.offsets[bound.start] for bound in positions]) + "\n")
        write_json(path / RUN, begun | {"prompts": written.facts, "teacher": teacher})
    return RunFolder(path)


def compare_teacher(path: Path, identity: Mapping[str, Any]) -> None:
    """Note what the teacher says of itself before its first request; compare it before all later ones.

    Another version of the server, or another context length, is noted and said: servers are updated while a run lasts.

    Raises:
        UserError: It is not the teacher that has answered so far.
    """
    identity = json.loads(json.dumps(identity))
    with lock(path):
        begun = read_json(path / RUN)
        if begun["teacher"] is None:
            write_json(path / RUN, begun | {"teacher": identity})
            return
        was, now = ({k: v for k, v in said.items() if k not in NOTED} for said in (begun["teacher"], identity))
        _refuse_changes(path, {"teacher": was}, {"teacher": now}, "let that one answer again")
        last = begun["teacher"] | begun.get(UPDATES, [{}])[-1]
        update = {name: identity.get(name) for name in NOTED}
        if changed := [name for name in NOTED if last.get(name) != update[name]]:
            for name in changed:
                print(f"the teacher's {name} is {update[name]} now; it was {last.get(name)} before", flush=True)
            write_json(path / RUN, begun | {UPDATES: [*begun.get(UPDATES, []), update]})


class _Written(NamedTuple):
    offsets: array  # first byte of each prompt's line
    id_hashes: array  # 64 bits of each prompt's id
    facts: dict[str, Any]  # number and SHA-256 of the prompts


def _write_prompts(prompts: Iterable[Prompt], file: BinaryIO) -> _Written:
    offsets, id_hashes, whole, size = array("Q"), array("Q"), hashlib.sha256(), 0
    for prompt in prompts:
        line = json_line(prompt._asdict())
        offsets.append(size)
        id_hashes.append(int.from_bytes(hashlib.blake2b(json_line(prompt.id), digest_size=8).digest()))
        whole.update(line)
        size += file.write(line)
    return _Written(offsets, id_hashes, {"number": len(offsets), "sha256": whole.hexdigest()})


def _refuse_same_ids(id_hashes: array, file: str) -> None:
    hashes = np.frombuffer(id_hashes, np.uint64)
    in_order = np.sort(hashes)
    suspects = set(in_order[1:][in_order[1:] == in_order[:-1]].tolist())
    if not suspects:
        return
    places: dict[str, tuple[int, str]] = {}
    with open(file, "rb") as lines:
        for number, (line, hashed) in enumerate(zip(lines, id_hashes, strict=True), 1):
            if hashed not in suspects:
                continue
            prompt = Prompt(**json.loads(line))
            if prompt.id in places:
                first, source = places[prompt.id]
                raise UserError(
                    f"prompts {first} (source {source}) and {number} (source {prompt.source}) have the same id "
                    f"{prompt.id!r}; give each row an id of its own, or a source's column another name with rename: "
                    "{id: row_id}, so that ids follow from the content"
                )
            places[prompt.id] = number, prompt.source


def _compare(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    def fields(begun: Mapping[str, Any]) -> dict[str, Any]:
        prompts = f"{begun['prompts']['number']:,} with SHA-256 {begun['prompts']['sha256'][:12]}"
        return {**begun["given"], "chunk_size": begun["chunk_size"], "tasks": begun["tasks"], "prompts": prompts}

    _refuse_changes(path, fields(was), fields(now), "set it back")


def _refuse_changes(path: Path, was: Mapping[str, Any], now: Mapping[str, Any], remedy: str) -> None:
    was, now = _flat(was), _flat(now)
    changed = [name for name in dict.fromkeys([*was, *now]) if was.get(name) != now.get(name)]
    if changed:
        name, more = changed[0], len(changed) - 1
        others = f" ({', '.join(changed[1:])} changed, too)" if more else ""
        raise UserError(
            f"{shown(path)} was begun with {name}={_brief(was.get(name))}, and now it is {_brief(now.get(name))}"
            f"{others}; {remedy}, or remove the folder to ask for all its replies again"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested objects by their dotted names."""
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= _flat(inner, f"{name}.{key}" if name else key)
    return leaves


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
