"""Stand-ins for modules that other branches bring."""

import asyncio
import importlib.util
import json
import sys
import types
from typing import NamedTuple

from smolpost.synthesis.records import Prompt, Record, RequestFailed, Verdict


class RunCounts(NamedTuple):
    prompts: int
    done: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float


KEPT = {}


def generate(folder, prompts, converse, engine, settings, *, fingerprint, concurrency, task=None, watch=None):
    async def all_of():
        async with engine:
            identity = await engine.identity()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "run.json").write_text(json.dumps({"fingerprint": fingerprint, "identity": identity}))
            kept = KEPT.setdefault(folder, {})
            for prompt in prompts:
                if prompt.id in kept:
                    continue
                try:
                    record = Record(prompt.id, prompt.source, await converse(prompt, engine.ask))
                except RequestFailed as error:
                    record = Record(prompt.id, prompt.source, [], error.reason)
                kept[prompt.id] = (prompt, record)

    asyncio.run(all_of())
    failed = sum(record.error is not None for _, record in KEPT[folder].values())
    return RunCounts(len(KEPT[folder]), len(KEPT[folder]) - failed, failed, 0, 0, 0.0)


def records(folder):
    yield from KEPT[folder].values()


def write(folder, outcomes, *, facts, max_failed, num_prompts):
    rows, reasons, failed = [], {}, 0
    for outcome in outcomes:
        if outcome.row is not None:
            rows.append(outcome.row | {"id": outcome.prompt.id})
        elif outcome.error:
            failed += 1
        else:
            reasons[outcome.reason] = reasons.get(outcome.reason, 0) + 1
    assert len(rows) + sum(reasons.values()) + failed == num_prompts
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return {"accepted": len(rows), "filtered": reasons, "failed": failed, "facts": facts, "prompts": num_prompts}


def canonical(reply):
    if reply.reasoning is None:
        return reply.content
    return f"<think>\n{reply.reasoning}\n</think>\n\n{reply.content}"


def judge_sample(sample, prompt, filters, *, thinking):
    faults = [reply for reply in sample.replies if reply.finish_reason != "stop"]
    return {"finished": Verdict(not faults, "cut" if faults else "")}


def first_fault(verdicts):
    return next((v.reason for v in verdicts.values() if not v.passed), "")


MODULES = {
    "run": dict(generate=generate, records=records, RunCounts=RunCounts, RequestFailed=RequestFailed, Prompt=Prompt),
    "results": dict(write=write),
    "replies": dict(canonical=canonical),
    "filters": dict(judge_sample=judge_sample, first_fault=first_fault),
    "profiles": dict(unsupported=lambda teacher, key: []),
}


def install():
    for name, content in MODULES.items():
        full = f"smolpost.synthesis.{name}"
        if full not in sys.modules and importlib.util.find_spec(full) is None:
            module = types.ModuleType(full)
            vars(module).update(content)
            sys.modules[full] = module
