"""Outcomes of jobs, made by hand, for tests of what is written and shown of them."""

from smolpost.synthesis.records import Outcome, Prompt, Record, Reply, Sample, Verdict

FACTS = {
    "name": "traces",
    "kind": "reasoning_traces",
    "key": "stages.traces",
    "job": {"turns": "last"},
    "filters": {"finished": True, "against": ["a.jsonl"]},
    "teachers": {
        "teacher": {
            "model": "Qwen/Qwen3-32B", "revision": "abc", "server": "vllm", "server_version": "0.32.0",
            "template_hash": "0123", "sampling": {"temperature": 0.6, "top_k": 20},
        },
        "chosen": {"model": "strong", "server": "vllm", "sampling": {}},
        "rejected": {"model": "weak", "server": "vllm", "sampling": {}},
    },
}  # fmt: skip
THOUGHT = "<think>\nTwo and two.\n</think>\n\n4"


def reply(text: str = THOUGHT, **fields) -> Reply:
    given = {"finish_reason": "stop", "prompt_tokens": 10, "completion_tokens": 5, "seed": 7, "raw": {"content": text}}
    return Reply(text, None, **given | fields)


def record(identity: str, source: str, messages: list[dict], **fields) -> Record:
    return Record(identity, source, [Sample(messages, [reply(messages[-1]["content"], **fields)])])


def turns(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def accepted(identity: str, source: str = "maths", question: str = "2 + 2?", answer: str = THOUGHT, **row) -> Outcome:
    """Of one teacher; `row` overrides the row's keys, and None leaves one out."""
    messages = turns(question, answer)
    made = {"messages": messages, "chat_template_kwargs": {"enable_thinking": True}, "source": f"{source}_traces"} | row
    return Outcome(
        Prompt(identity, source, {"messages": messages[:1]}),
        {key: value for key, value in made.items() if value is not None},
        verdicts={"finished": Verdict(True), "repetition": Verdict(True, score=0.25)},
        records={"teacher": record(identity, source, messages)},
    )


def pair(identity: str, source: str = "maths", question: str = "2 + 2?", sides=(THOUGHT, "5"), **row) -> Outcome:
    chosen, rejected = (turns(question, side) for side in sides)
    made = {
        "prompt": question, "chosen": chosen, "rejected": rejected, "chat_template_kwargs": {"enable_thinking": True},
        "source": f"{source}_pairs",
    }  # fmt: skip
    return Outcome(
        Prompt(identity, source, {"messages": chosen[:1]}),
        made | row,
        verdicts={"margin": Verdict(True, score=1.5)},
        records={"chosen": record(identity, source, chosen), "rejected": record(identity, source, rejected)},
    )


def filtered(identity: str, reason: str = "cut", source: str = "maths", answer: str = "<think>\nOn and") -> Outcome:
    messages = turns("2 + 2?", answer)
    return Outcome(
        Prompt(identity, source, {"messages": messages[:1]}),
        None,
        reason=reason,
        verdicts={"finished": Verdict(False, reason), "repetition": Verdict(True, score=0.5)},
        records={"teacher": record(identity, source, messages, finish_reason="length")},
    )


def failed(identity: str, error: str = "HTTP 500", source: str = "maths") -> Outcome:
    prompt = Prompt(identity, source, {"messages": turns("2 + 2?", "")[:1]})
    return Outcome(prompt, None, error=error, records={"teacher": Record(identity, source, [], error, ("500", "500"))})
