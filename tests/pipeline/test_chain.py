"""The whole chain on 200 rows: killed, continued, and every claim checked on what it left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoTokenizer

from smolpost import recipe
from smolpost.data.collate import collate_packs
from smolpost.data.mixtures import mix
from smolpost.evaluation import results
from smolpost.pipeline import manifest
from smolpost.pipeline.lineage import Lineage
from smolpost.report.score_tables import headlines
from tests.made_rows import LAYERS, REAL

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def chain_words(data_root: Path, run_dir: Path) -> list[str]:
    rows = [f"data.{name}.sources.gsm8k.max_rows={n}" for name, n in (("mid", 200), ("sft", 200), ("preference", 40))]
    rows += ["data.heldout.sources.gsm8k.first_row=200", "data.heldout_pairs.sources.gsm8k.first_row=40"]
    small = ["hidden_size=64", "intermediate_size=128", "num_attention_heads=4"]
    return [
        "pipeline=gsm8k", "data=gsm8k_folder", f"data_root={data_root}", f"run_dir={run_dir}", *rows,
        *(f"model.architecture.{word}" for word in small), "stages.init.vocab_size=1024",
        "stages.base.global_batch_size=4", "stages.base.micro_batch_size=4", "stages.base.save_steps=2",
        "stages.long_context.max_steps=6", "stages.mid.global_batch_size=4", "stages.sft.global_batch_size=4",
        "stages.sft.logging_steps=1",
        "stages.apo.global_batch_size=8", "stages.apo.learning_rate=1e-3", "stages.apo.logging_steps=1",
        "stages.apo.num_epochs=4",
        "evaluation.tasks.loss.max_rows=10", "evaluation.tasks.answer.max_rows=4",
        "evaluation.tasks.answer.max_new_tokens=8", "evaluation.tasks.pairs.max_rows=6",
        "evaluation.tasks.ruler.tasks=[niah_single_1]", "evaluation.tasks.ruler.lengths=[512]",
        "evaluation.tasks.ruler.num_prompts=2",
    ]  # fmt: skip


@pytest.fixture(
    scope="module", params=[*LAYERS[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in LAYERS[1:])]
)
def chain(request, made_rows, tmp_path_factory):
    """The finished chain: (words, lineage, output of the run that was killed, output of the run that finished)."""
    rows = made_rows if request.param == "made" else REAL / "gsm8k"
    words = chain_words(rows, tmp_path_factory.mktemp("chain"))
    lineage = Lineage(recipe.load(words))
    command = [sys.executable, "-m", "smolpost.cli", "run", *words]
    first = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    base, deadline = lineage.stages["base"].folder, time.monotonic() + 300
    while not list(base.glob("checkpoint-*/whole")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    killed = first.communicate()[0]
    second = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-3000:]
    return words, lineage, killed, second.stdout


pytestmark = pytest.mark.timeout(1200)


def test_the_killed_run_continues_where_it_was(chain):
    _, lineage, killed, output = chain
    assert "init: run (new)" in killed and "base: run (new)" in killed
    assert "1/9 init: done" in output
    assert "2/9 base: resume (at step" in output
    assert manifest.read(lineage.stages["base"].folder)["report"]["resumed_from"].startswith("checkpoint-")


def test_every_stage_has_a_manifest_with_its_parents(chain):
    _, lineage, _, _ = chain
    for name, stage in lineage.stages.items():
        found = manifest.read(stage.folder)
        assert (found["stage"], found["key"], found["parents"]) == (name, stage.key, stage.parent_keys)
    assert manifest.read(lineage.stages["merge"].folder)["weights"] == pytest.approx(
        {"apo-42": 0.45, "apo-43": 0.45, "long_context": 0.1}
    )


def test_losses_fall(chain):
    _, lineage, _, _ = chain
    reports = {name: manifest.read(stage.folder)["report"] for name, stage in lineage.stages.items()}
    assert reports["base"]["loss_last"] < reports["base"]["loss_first"] - 0.5
    assert reports["sft"]["loss_last"] < reports["sft"]["loss_first"]
    for seed in (42, 43):  # apo_zero is exactly 1 where policy equals reference
        log = [entry["loss"] for entry in reports[f"apo-{seed}"]["log"] if "loss" in entry]
        assert log[0] == pytest.approx(1, abs=1e-5) and min(log) < 0.999
    loss = {name: results.read(lineage.stages[name].evaluation["loss"])["scores"] for name in ("base", "sft")}
    assert loss["sft"]["no_think"]["value"] < loss["base"]["no_think"]["value"]


def test_labels_of_the_collated_batch_are_the_policys_text(chain):
    """Every trained token of every pack, decoded, is an assistant's reply with its stop token, and all are there."""
    _, lineage, _, _ = chain
    stage = lineage.stages["sft"]
    tokenizer = AutoTokenizer.from_pretrained(stage.folder)
    expected = []
    for _, row in mix(stage.data["sft"]):
        reply = row["messages"][-1]["content"]
        expected.append(f"{reply}<|im_end|>")
    found = []
    for pack in load_from_disk(str(stage.prepared)):
        batch = collate_packs([pack])
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        for begin, end in zip(starts, [*starts[1:], None], strict=True):
            labels = batch["labels"][0][begin:end]
            found.append(tokenizer.decode(labels[labels != -100]))
    assert sorted(found) == sorted(expected) and len(found) == 200


def test_merged_weights_are_the_stated_average(chain):
    _, lineage, _, _ = chain
    load = lambda name: load_file(lineage.stages[name].folder / "model.safetensors")  # noqa: E731
    one, two, long, soup, merged = (load(n) for n in ("apo-42", "apo-43", "long_context", "soup", "merge"))
    assert merged.keys() == one.keys()
    for name in merged:
        assert not torch.equal(one[name], long[name])
        torch.testing.assert_close(soup[name], (one[name] + two[name]) / 2, atol=1e-7, rtol=1e-6)
        average = 0.45 * one[name].double() + 0.45 * two[name].double() + 0.1 * long[name].double()
        torch.testing.assert_close(merged[name], average.float(), atol=1e-7, rtol=1e-6)


def test_final_model_loads_in_stock_transformers(chain, tmp_path):
    _, lineage, _, _ = chain
    found = json.loads((lineage.root / "results.json").read_text())
    assert found["final_model"] == str(lineage.stages["merge"].folder)
    script = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ask = [{"role": "user", "content": "1+1?"}]
ids = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_tensors="pt")
out = model.generate(**ids, max_new_tokens=4, do_sample=False)
assert type(model).__module__ == "transformers.models.smollm3.modeling_smollm3", type(model)
assert not any(name.partition(".")[0] == "smolpost" for name in sys.modules)
assert model(**ids).logits.isfinite().all() and out.shape[1] > ids["input_ids"].shape[1]
"""
    done = subprocess.run(
        [sys.executable, "-c", script, found["final_model"]],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_results_hold_what_the_table_shows(chain):
    _, lineage, _, output = chain
    stages = json.loads((lineage.root / "results.json").read_text())["stages"]
    models = ["base", "long_context", "mid", "sft", "apo-42", "apo-43", "soup", "merge"]
    assert [name for name, stage in stages.items() if "evaluation" in stage] == models
    for name in models:
        evaluation = stages[name]["evaluation"]
        row = next(line.split() for line in reversed(output.splitlines()) if line.split()[:1] == [name])
        assert list(evaluation) == ["loss", "answer", "pairs", "ruler"]
        values = [evaluation[task]["scores"][metric]["value"] for task, metric in headlines(evaluation)]
        shown = [f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" for value in values]
        assert row[1:] == shown and len(values) == 7


def test_a_second_run_has_nothing_to_do(chain):
    words, lineage, _, _ = chain
    before = {name: manifest.read(stage.folder)["finished"] for name, stage in lineage.stages.items()}
    done = subprocess.run(
        [sys.executable, "-m", "smolpost.cli", "run", *words],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count(": done") == 9
    assert {name: manifest.read(stage.folder)["finished"] for name, stage in lineage.stages.items()} == before


def test_plan_says_what_a_change_redoes_and_why(chain):
    words, _, _, _ = chain
    done = subprocess.run(
        [sys.executable, "-m", "smolpost.cli", "plan", *words, "stages.sft.learning_rate=0.5"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    text = " ".join(done.stdout.split())
    assert "4. mid (sft): done" in text
    assert "5. sft (sft): run, changed: learning_rate 0.001 -> 0.5 (sft-" in text
    assert "6. apo-42 (apo): run, changed: sft is another (apo-42-" in text
