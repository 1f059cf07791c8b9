"""lm_eval in our process: the numbers of its own command, less its traps."""

import json
import shutil
from copy import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from smolpost.errors import UserError
from smolpost.evaluation.harness import lm_eval as ours
from smolpost.evaluation.harness.run import harness_key, run_harness
from smolpost.schema import Harness
from tests.evaluation.harness_tasks import LIKELIHOOD, write_rows, write_task
from tests.rigged import Rigged

lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
TODAY = "08 July 2025"


@pytest.fixture(autouse=True)
def no_system_report(monkeypatch):
    """lm_eval describes the machine after each run, which takes seconds: `pip list` and the like."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def ask(tasks, folder, checkpoint, out, lines=None, **fields):
    harness = Harness(kind="lm_eval", tasks=tasks, custom_tasks=str(folder), **{"batch_size": 2} | fields)
    return run_harness(harness, checkpoint, out, [].append if lines is None else lines.append)


def samples(out, task, mode):
    lines = (out / task / mode / "samples.jsonl").read_text().splitlines()
    return {sample["id"]: sample for sample in map(json.loads, lines)}


@pytest.fixture
def checkpoint(tmp_path, model, tokenizer):
    """A tiny random model, loud enough for replies to differ by prompt; some of them end."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        model.lm_head.weight[tokenizer.eos_token_id] *= 1.5
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def rigged(tmp_path, tokenizer, monkeypatch):
    """Return a factory: reply function -> checkpoint folder whose model replies so."""

    class Model(Rigged):
        def tie_weights(self):
            pass

    def make(reply, positions=1024):
        model = Model(tokenizer, reply)
        model.config.max_position_embeddings = positions
        monkeypatch.setattr(ours, "load_for_inference", lambda checkpoint: (model, copy(tokenizer)))
        folder = tmp_path / "rigged"
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        return folder

    return make


def their_own(task, folder, checkpoint, thinking):
    """What lm_eval makes of the checkpoint without us."""
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        "hf",
        model_args={
            "pretrained": str(checkpoint), "dtype": "float32", "device": "cpu", "batch_size": 2,
            "enable_thinking": thinking, "think_end_token": "</think>", "chat_template_args": {"today": TODAY},
        },
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=True,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["think", "no_think"])
def test_replies_and_scores_are_those_of_lm_evals_own_run(tmp_path, checkpoint, mode):
    rows = write_rows(tmp_path / "rows.jsonl", ["?"] * 6)
    folder = write_task(tmp_path / "tasks", "sums", rows)
    replies = [s["resps"][0][0] for s in their_own("sums", folder, checkpoint, mode == "think")["samples"]["sums"]]
    assert len(set(replies)) > 1  # or the comparison would say little
    write_rows(rows, [reply if i % 3 else "?" for i, reply in enumerate(replies)])
    golden = their_own("sums", folder, checkpoint, mode == "think")
    result = ask(["sums"], folder, checkpoint, tmp_path / "out", modes=[mode])["sums"]

    kept = samples(tmp_path / "out", "sums", mode)
    for theirs in golden["samples"]["sums"]:
        sample = kept[f"sums/{theirs['doc_id']}"]
        assert sample["record"]["prompt"] == theirs["arguments"][0][0]
        assert sample["record"]["parsed"]["none"] == theirs["filtered_resps"]
        assert sample["metrics"]["exact_match"] == theirs["exact_match"]
    assert result["scores"][mode] == result["scores"][f"{mode}/exact_match"]
    assert result["scores"][mode]["value"] == golden["results"]["sums"]["exact_match,none"] == pytest.approx(4 / 6)
    assert result["scores"][mode]["n"] == 6
    assert 0 <= result["scores"][mode]["low"] < 4 / 6 < result["scores"][mode]["high"] <= 1


def test_likelihoods_are_those_of_lm_evals_own_run_and_not_asked_with_thoughts(tmp_path, checkpoint):
    rows = write_rows(tmp_path / "rows.jsonl", ["?"] * 6)
    folder = write_task(tmp_path / "tasks", "pick", rows, **LIKELIHOOD)
    golden = their_own("pick", folder, checkpoint, False)
    lines = []
    result = ask(["pick"], folder, checkpoint, tmp_path / "out", lines)["pick"]
    kept = samples(tmp_path / "out", "pick", "no_think")
    for theirs in golden["samples"]["pick"]:
        logps = [choice[0] for choice in kept[f"pick/{theirs['doc_id']}"]["record"]["parsed"]["none"]]
        assert logps == pytest.approx([choice[0] for choice in theirs["filtered_resps"]], abs=1e-4)
    assert result["scores"]["no_think"]["value"] == golden["results"]["pick"]["acc,none"]
    assert "think" not in result["scores"]
    assert "scored by likelihood" in result["notes"]["think"]["skipped"] and "skipped" in lines[0]
    with pytest.raises(UserError, match=r"harness.modes=\[think\], but pick is scored by likelihood"):
        ask(["pick"], folder, checkpoint, tmp_path / "out2", modes=["think"])


THOUGHTS = {
    "0+0?": "<think>\nnothing. at all\n</think>\n0. Or so",  # a stop string inside the thoughts and after the answer
    "1+1?": "<think>\n2",  # cut while thinking of the right answer
    "2+2?": "4",
    "3+3?": "<think>\nthat is 6.\n</think>\n7",
}


def test_thoughts_are_no_answer_and_stops_end_only_answers(tmp_path, rigged):
    rows = write_rows(tmp_path / "rows.jsonl", ["0", "2", "4", "6"])
    folder = write_task(tmp_path / "tasks", "sums", rows, generation_kwargs={"until": ["."], "max_gen_toks": 99})
    checkpoint = rigged(lambda prompt: next(reply for ask, reply in THOUGHTS.items() if ask in prompt))
    scores = ask(["sums"], folder, checkpoint, tmp_path / "out", modes=["think"])["sums"]["scores"]
    kept = samples(tmp_path / "out", "sums", "think")
    assert [kept[f"sums/{i}"]["record"]["parsed"]["none"] for i in range(4)] == [["0"], [""], ["4"], ["7"]]
    assert [kept[f"sums/{i}"]["record"]["replies"] for i in range(4)] == [[text] for text in THOUGHTS.values()]
    assert scores["think"]["value"] == 0.5 and scores["think/unclosed"]["value"] == 0.25


def test_a_model_that_thinks_only_when_asked_scores_differently_by_mode(tmp_path, rigged):
    rows = write_rows(tmp_path / "rows.jsonl", ["yes"] * 3)
    folder = write_task(tmp_path / "tasks", "sums", rows)
    checkpoint = rigged(lambda prompt: "no" if "/no_think" in prompt else "yes")
    scores = ask(["sums"], folder, checkpoint, tmp_path / "out")["sums"]["scores"]
    assert (scores["think"]["value"], scores["no_think"]["value"]) == (1.0, 0.0)
    assert list(scores)[:2] == ["think", "no_think"]


def test_without_a_template_the_bare_text_is_asked(tmp_path, rigged):
    rows = write_rows(tmp_path / "rows.jsonl", ["<think>yes"])
    folder = write_task(tmp_path / "tasks", "sums", rows)
    checkpoint = rigged(lambda prompt: "<think>yes" if prompt == "0+0?" else prompt)
    result = ask(["sums"], folder, checkpoint, tmp_path / "out", apply_chat_template=False)["sums"]
    assert result["scores"]["plain"]["value"] == 1.0


def test_weights_changed_in_place_are_asked_again(tmp_path, checkpoint):
    folder = write_task(tmp_path / "tasks", "sums", write_rows(tmp_path / "rows.jsonl", ["?"] * 4))
    arguments = (["sums"], folder, checkpoint)
    ask(*arguments, tmp_path / "out")
    first = samples(tmp_path / "out", "sums", "think")
    lines = []
    ask(*arguments, tmp_path / "out", lines)
    assert lines == [] and samples(tmp_path / "out", "sums", "think") == first

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    model.save_pretrained(checkpoint)
    ask(*arguments, tmp_path / "out", lines)
    ask(*arguments, tmp_path / "fresh")
    second = samples(tmp_path / "out", "sums", "think")
    assert len(lines) == 2 and second == samples(tmp_path / "fresh", "sums", "think")
    assert [s["record"]["replies"] for s in second.values()] != [s["record"]["replies"] for s in first.values()]


def test_changed_settings_and_rows_are_asked_again(tmp_path, rigged):
    rows = write_rows(tmp_path / "rows.jsonl", ["yes"] * 4)
    folder = write_task(tmp_path / "tasks", "sums", rows)
    arguments = (["sums"], folder, rigged(lambda prompt: "yes"), tmp_path / "out")
    lines = []
    ask(*arguments, lines, modes=["think"])
    ask(*arguments, lines, modes=["think"], headline={"sums": "cut"})  # only shown otherwise
    assert len(lines) == 1
    harness = Harness(kind="lm_eval", tasks=["sums"], custom_tasks=str(folder))
    before = harness_key(harness)
    ask(*arguments, lines, modes=["think"], limit=2)
    write_rows(rows, ["no"] * 4)  # lies outside of the task's folder, but the task file names it
    assert ask(*arguments, lines, modes=["think"], limit=2)["sums"]["scores"]["think"]["value"] == 0.0
    assert len(lines) == 3 and harness_key(harness) != before


def test_a_kill_keeps_finished_tasks(tmp_path, rigged):
    rows = write_rows(tmp_path / "rows.jsonl", ["yes"] * 2)
    for name in ("sums", "more"):
        folder = write_task(tmp_path / "tasks", name, rows)
    killing = True

    def reply(prompt):
        if killing and "/no_think" in prompt:
            raise KeyboardInterrupt
        return "yes"

    arguments = (["sums", "more"], folder, rigged(reply), tmp_path / "out")
    lines = []
    with pytest.raises(KeyboardInterrupt):
        ask(*arguments, lines)
    assert [line.split(":")[0] for line in lines] == ["sums think"]
    half = tmp_path / "out" / "sums" / ".no_think.part-0"
    shutil.copytree(tmp_path / "out" / "sums" / "think", half)  # as SIGKILL would
    killing = False
    results = ask(*arguments, lines)
    assert [line.split(":")[0] for line in lines[1:]] == ["sums no_think", "more think", "more no_think"]
    assert {task: result["scores"]["no_think"]["value"] for task, result in results.items()} == {"sums": 1, "more": 1}
    assert sorted(path.name for path in (tmp_path / "out" / "sums").iterdir()) == ["no_think", "think"]


def test_sampled_replies_are_the_same_again(tmp_path, checkpoint):
    folder = write_task(tmp_path / "tasks", "sums", write_rows(tmp_path / "rows.jsonl", ["?"] * 4))
    found = {}
    for out, seed in (("one", 0), ("two", 0), ("three", 1)):
        sampling = {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 6, "seed": seed, "modes": ["think"]}
        ask(["sums"], folder, checkpoint, tmp_path / out, **sampling)
        found[out] = [s["record"]["replies"] for s in samples(tmp_path / out, "sums", "think").values()]
    assert found["one"] == found["two"] != found["three"]


def test_what_cannot_be_asked_is_refused_in_one_line(tmp_path, rigged, monkeypatch):
    import nltk
    from lm_eval import tasks as theirs

    rows = write_rows(tmp_path / "rows.jsonl", ["yes"])
    folder = write_task(tmp_path / "tasks", "sums", rows)
    write_task(folder, "beams", rows, generation_kwargs={"until": ["."], "num_beams": 4})
    write_task(folder, "program", rows, unsafe_code=True)
    write_task(folder, "my_ifeval", rows)
    write_task(folder, "gone", tmp_path / "gone.jsonl")
    checkpoint, out = rigged(lambda prompt: "yes", positions=512), tmp_path / "out"
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    ruler = f"{theirs.__path__[0]}/ruler"
    for tasks, fields, message in (
        (["niah_single_1"], {"custom_tasks": ruler}, "niah_single_1 is RULER.*kind `ruler`"),
        (["sums", "beams"], {}, "beams has generation_kwargs.num_beams=4"),
        (["program"], {}, "program runs code that the model wrote; set HF_ALLOW_CODE_EVAL=1"),
        (["my_ifeval"], {}, "NLTK's punkt_tab"),
        (["gone"], {}, "cannot load gone"),
        (["sums"], {"max_new_tokens": 500}, "tokens for its longest prompt and 500 for a reply.* 512 positions"),
        (
            ["sums"],
            {"headline": {"sums": "acc"}},
            "harness.headline.sums=acc is not a metric of this task; it has",
        ),
        (["sums"], {"headline": {"other": "acc"}}, "harness.headline.other is not among the tasks sums"),
        (["sums"], {"modes": ["loud"]}, r"harness.modes=\['loud'\] may hold only think and no_think"),
        (["sums"], {"limit": 0}, "harness.limit=0"),
        ([], {}, "harness.tasks is empty"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            ask(tasks, folder, checkpoint, out, **fields) if "custom_tasks" not in fields else run_harness(
                Harness(kind="lm_eval", tasks=tasks, **fields), checkpoint, out, print
            )
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_unknown_task_is_refused_with_its_like(tmp_path, rigged):
    with pytest.raises(UserError, match=r"lm_eval has no task gsm8; did you mean .*gsm8k"):
        run_harness(Harness(kind="lm_eval", tasks=["gsm8"]), rigged(str), tmp_path / "out", print)


def test_no_harness_is_no_result(tmp_path):
    assert run_harness(Harness(), tmp_path, tmp_path, print) == {}
