"""A checkpoint of the run as a teacher: its replies follow from prompt, settings and seed, whoever shares the batch."""

import asyncio
import gc
import threading
import weakref

import pytest
import torch

from smolpost.errors import UserError
from smolpost.inference import generation
from smolpost.schema import RELEASE_DAY
from smolpost.synthesis import local
from smolpost.synthesis.local import LocalTeacher
from smolpost.synthesis.records import Request, RequestFailed
from smolpost.synthesis.settings import Teacher
from tests.synthesis.tiny_checkpoints import make_model

SUMS = [[{"role": "user", "content": f"{i}+{i}?"}] for i in range(12)]
REQUESTS = [Request(messages, thinking=i % 2 == 0, seed=1000 + i) for i, messages in enumerate(SUMS)]
KEY = "stages.pairs.chosen"


def teacher_of(checkpoint, **changes):
    settings = dict(stage="sft", max_new_tokens=24, batch_size=4, temperature=0.9)
    return LocalTeacher(lambda: checkpoint, Teacher(**settings | changes), RELEASE_DAY, key=KEY)


def ask(teacher, requests, at_once=100):
    """The replies, without how long they took; at most `at_once` requests wait at a time."""

    async def all_of_them():
        gate = asyncio.Semaphore(at_once)

        async def one(request):
            async with gate:
                return (await teacher.ask(request))._replace(seconds=0.0)

        async with teacher:
            return await asyncio.gather(*map(one, requests))

    return asyncio.run(all_of_them())


@pytest.fixture
def checkpoint(models, tokenizer):
    return models[0], tokenizer


@pytest.fixture
def sizes(monkeypatch):
    """Of the batches that were made."""
    found, real = [], local.generate_each

    def counted(model, prompts, *args, **options):
        found.append(len(prompts))
        return real(model, prompts, *args, **options)

    monkeypatch.setattr(local, "generate_each", counted)
    return found


def test_replies_do_not_depend_on_batches_or_order(checkpoint, sizes):
    alone = ask(teacher_of(checkpoint), REQUESTS, at_once=1)
    assert sizes == [1] * 12
    assert len({reply.raw["content"] for reply in alone}) == 12
    assert {reply.finish_reason for reply in alone} == {"stop", "length"}
    for batch_size in (3, 8):
        sizes.clear()
        assert ask(teacher_of(checkpoint, batch_size=batch_size), REQUESTS) == alone
        assert max(sizes) == batch_size and sum(sizes) == 12
    assert ask(teacher_of(checkpoint), REQUESTS[::-1], at_once=5) == alone[::-1]


def test_what_a_run_asks_after_an_interruption_is_what_it_would_have_asked(checkpoint):
    whole = ask(teacher_of(checkpoint), REQUESTS)
    assert ask(teacher_of(checkpoint), REQUESTS[:5]) + ask(teacher_of(checkpoint), REQUESTS[5:]) == whole


def test_one_teacher_can_be_entered_again(checkpoint):
    teacher = teacher_of(checkpoint)
    assert ask(teacher, REQUESTS[:3]) == ask(teacher, REQUESTS[:3])


def test_the_reply_is_taken_apart(rig):
    texts = {"0": "<think>\nwell\n</think>\n0", "1": "plain", "2": "<think>\ncut", "3": "<think>\n\n</think>\nnone"}
    model, tokenizer = rig(lambda prompt: next(text for i, text in texts.items() if f"{i}+" in prompt))
    replies = ask(teacher_of((model, tokenizer), max_new_tokens=99), REQUESTS[:4])
    assert [(r.reasoning, r.content, r.closed) for r in replies] == [
        ("well", "0", True), (None, "plain", True), ("cut", "", False), ("", "none", True),
    ]  # fmt: skip
    assert [r.raw["content"] for r in replies] == list(texts.values())
    assert [r.completion_tokens for r in replies] == [len(tokenizer.encode(t)) + 1 for t in texts.values()]
    assert [r.prompt_tokens for r in replies] == [len(tokenizer.encode(p)) for p in model.prompts]
    [cut] = ask(teacher_of((model, tokenizer), max_new_tokens=4), REQUESTS[1:2])
    assert (cut.content, cut.finish_reason, cut.completion_tokens) == ("plai", "length", 4)


def test_prompts_are_rendered_in_the_asked_mode_with_the_frozen_day(rig):
    model, tokenizer = rig(lambda prompt: "x")
    kwargs = {"custom_instructions": "Rhyme."}
    requests = [Request(SUMS[0], mode, 1, template_kwargs=kwargs) for mode in (True, False, None)]
    ask(teacher_of((model, tokenizer), batch_size=1), requests, at_once=1)
    thinks, plain, default = model.prompts
    assert "Reasoning Mode: /think" in thinks and thinks == default
    assert plain.endswith("<|im_start|>assistant\n<think>\n\n</think>\n") and "Reasoning Mode: /no_think" in plain
    assert all(f"Today Date: {RELEASE_DAY}" in text and "Rhyme." in text for text in model.prompts)
    ask(teacher_of((model, tokenizer), template="chatml"), REQUESTS[:1])
    assert "Reasoning Mode" not in model.prompts[-1]
    with pytest.raises(RequestFailed, match="custom_instructions were given, but the chatml template"):
        ask(teacher_of((model, tokenizer), template="chatml"), requests[:1])


def test_a_think_block_that_the_prompt_opened_is_reasoning(rig, tmp_path):
    (path := tmp_path / "opens.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<think>\n' if enable_thinking is not defined or enable_thinking else '' }}{% endif %}"
    )
    model, tokenizer = rig(lambda prompt: "hm\n</think>\n4" if "<think>" in prompt else "4")
    thinks, plain = ask(teacher_of((model, tokenizer), template=str(path), thinking=True), REQUESTS[:2])
    assert (thinks.reasoning, thinks.content) == ("hm", "4")
    assert (plain.reasoning, plain.content) == (None, "4")


def test_each_request_may_have_its_own_length(checkpoint):
    lengths = [4, 9, None, 17]
    requests = [r._replace(max_new_tokens=n) for r, n in zip(REQUESTS, lengths, strict=False)]
    whole, cut = (ask(teacher_of(checkpoint), batch) for batch in (REQUESTS[:4], requests))
    for reply, all_of_it, most in zip(cut, whole, lengths, strict=True):
        assert reply.completion_tokens == min(most or 24, all_of_it.completion_tokens)
        assert all_of_it.raw["content"].startswith(reply.raw["content"])


def test_what_the_template_refuses_fails_alone(checkpoint):
    async def asked():
        async with teacher_of(checkpoint) as teacher:
            bad = Request([{"role": "tool", "content": "4"}], None, 1)
            return await asyncio.gather(teacher.ask(bad), teacher.ask(REQUESTS[0]), return_exceptions=True)

    failed, reply = asyncio.run(asked())
    assert isinstance(failed, RequestFailed) and failed.reason.startswith("messages[0].role=tool")
    assert reply._replace(seconds=0.0) == ask(teacher_of(checkpoint), REQUESTS[:1])[0]


def test_identity_names_checkpoint_template_and_version(checkpoint):
    async def identity(name):
        async with teacher_of(checkpoint, template=name) as teacher:
            return await teacher.identity()

    one, other = (asyncio.run(identity(name)) for name in ("smollm3", "chatml"))
    assert {key for key in one if one[key] != other[key]} == {"template"}
    assert one["stop_tokens"] == ["<|im_end|>"] and one["version"].startswith("transformers ")


def test_a_checkpoint_that_never_stops_is_told_of_and_thinking_needs_a_mode(checkpoint, capsys):
    model = checkpoint[0]
    model.generation_config.eos_token_id, before = 0, model.generation_config.eos_token_id
    try:
        ask(teacher_of(checkpoint), [])
    finally:
        model.generation_config.eos_token_id = before
    assert "every reply runs to its maximum length" in capsys.readouterr().out
    for thinking in (True, False):
        with pytest.raises(
            UserError, match=rf"^{KEY}.thinking={str(thinking).lower()}, but .*chatml has no think mode"
        ):
            ask(teacher_of(checkpoint, template="chatml", thinking=thinking), [])
        ask(teacher_of(checkpoint, thinking=thinking), [])
    ask(teacher_of(checkpoint, template="chatml"), [])


def test_weights_and_activations_that_are_not_finite_are_refused(tokenizer):
    model = make_model(0, tokenizer)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(UserError, match=f"^{KEY}: .*model.norm.weight holds NaN or infinite numbers; train it again"):
        ask(teacher_of((model, tokenizer)), [])
    with torch.no_grad():
        model.model.norm.weight[:] = 3e38  # logits are sums of inf and -inf
    with pytest.raises(UserError, match=f"^{KEY}: .* cannot answer, a probability is NaN.*; train it again"):
        ask(teacher_of((model, tokenizer)), REQUESTS[:2])


def test_too_large_a_batch_names_the_remedy(checkpoint, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(local, "generate_each", full)
    with pytest.raises(UserError, match=rf"^{KEY}.batch_size=4: 4 prompts .*; set {KEY}.batch_size=2$"):
        ask(teacher_of(checkpoint), REQUESTS[:4])
    with pytest.raises(UserError, match=rf"; lower {KEY}.max_new_tokens=24$"):
        ask(teacher_of(checkpoint, batch_size=1), REQUESTS[:1])


def test_leaving_stops_a_batch_under_way_and_lets_the_model_go(tokenizer, monkeypatch):
    """Replies of ten million tokens end at once when their run is cancelled; no thread and no model stay behind."""
    begun = threading.Event()
    real = generation.RowSampling.__call__

    def call(self, *args):
        begun.set()
        return real(self, *args)

    monkeypatch.setattr(generation.RowSampling, "__call__", call)
    kept = []

    def load():
        model = make_model(0, tokenizer)
        model.generation_config.eos_token_id = None
        kept.append(weakref.ref(model))
        return model, tokenizer

    teacher = LocalTeacher(load, Teacher(stage="sft", max_new_tokens=10**7, batch_size=2), RELEASE_DAY, key=KEY)

    async def cancelled():
        async with teacher:
            asked = [asyncio.create_task(teacher.ask(request)) for request in REQUESTS[:4]]
            await asyncio.to_thread(begun.wait)
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(asyncio.wait_for(cancelled(), 30))
    assert not [thread for thread in threading.enumerate() if KEY in thread.name]
    gc.collect()
    assert [model() for model in kept] == [None]
