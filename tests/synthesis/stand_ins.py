"""Stand-ins for modules that other branches bring."""

import importlib.util
import sys
import types

from smolpost.synthesis.records import Verdict


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
