"""Checkpoints of other families through every stage of a pipeline, with their own chat template and with ours.

Each run gives a row of the table in docs/models.md, which is compared with the page.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from smolpost import cli, recipe
from smolpost.chat.fates import Fate
from smolpost.chat.needed_tokens import lacking
from smolpost.chat.render import load_template
from smolpost.data.collate import IGNORE_INDEX
from smolpost.errors import UserError
from smolpost.export.command import check_format
from smolpost.export.folder import ExportSource
from smolpost.pipeline import manifest, steps
from smolpost.pipeline.lineage import Lineage
from tests.model_families import MODEL_FAMILIES
from tests.small import ROOT

NAMES = {"qwen3": "Qwen3", "llama3": "Llama 3", "gemma3": "Gemma 3 (text)", "mistral": "Mistral"}
THOUGHT = "<think>\nhm\n</think>\n"
COLUMNS = {  # column -> the stages that it stands for
    "SFT": ["sft"], "APO": ["apo-1", "apo-2"], "LoRA": ["sft_lora", "apo_lora"], "soup, merge": ["soup", "merge"],
}  # fmt: skip
FORMATS = ("onnx", "mlx", "gguf", "vllm-config")
QUICK = {("gemma3", "own"), ("llama3", "smollm3")}
ALL = [
    pytest.param(family, template, marks=[] if (family, template) in QUICK else pytest.mark.slow)
    for family in MODEL_FAMILIES
    for template in ("own", "smollm3")
]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


def write_rows(folder: Path) -> None:
    """Questions with one right answer, think and no-think in turn, and pairs that prefer it."""
    chats, pairs = [], []
    for i in range(16):
        think = i % 2 == 0
        turns = [{"role": "user", "content": f"Is {2 * i + 1} odd?"}]
        right, wrong = (
            [*turns, {"role": "assistant", "content": f"{THOUGHT if think else ''}{answer}"}]
            for answer in ("Yes: 1.", "No: 0.")
        )
        mode = {"chat_template_kwargs": {"enable_thinking": think}}
        chats.append({"messages": right} | mode)
        pairs.append({"chosen": right, "rejected": wrong} | mode)
    for name, rows in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def smolpost(*words) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, words)])
    assert not ended.value.code


def pipeline_of(family: str, template: str, folder: Path) -> tuple[Lineage, str]:
    """The pipeline, and the table's words for the template."""
    model = MODEL_FAMILIES[family]
    if model.template is None:
        pytest.skip(f"the installed trl has no chat template of {family}")
    start, name, words = model.write(folder / "start", model.template), folder / "own.jinja", "its own"
    name.write_text(model.template)
    if template != "own":
        name, words = template, template
        if lacking(model.tokenizer(), load_template(template)):
            smolpost("add-tokens", start, folder / "grown", "--template", template)
            start, words = folder / "grown", f"{template}, after `add-tokens`"
    if not manifest.read(start):
        smolpost("adopt", start)
    write_rows(folder)
    stages = [f"stages.{stage}.template={name}" for stage in ("sft", "sft_lora", "apo", "apo_lora")]
    places = [f"data_root={folder}", f"run_dir={folder / 'runs'}", f"model.checkpoint={start}"]
    return Lineage(recipe.load([f"pipeline={ROOT / 'tests' / 'model' / 'family.yaml'}", *places, *stages])), words


def made(lineage: Lineage, names: list[str]) -> str:
    """What the table says of stages: yes, or why one cannot be made."""
    try:
        for name in names:
            stage = lineage.stages[name]
            steps.make_on_ranks(lineage, stage, 0) if stage.config.LAUNCHED else steps.make(lineage, stage)
    except UserError as error:
        return str(error)
    return "yes"


def exported(folder: Path) -> str:
    said = set()
    for kind in FORMATS:
        try:
            check_format(kind, ExportSource(folder))
            said.add(kind)
        except UserError as error:
            said.add("no: SmolLM3 only" if "only smollm3 is" in str(error) else str(error))
    return ", ".join(sorted(said))


@pytest.mark.parametrize(("family", "template"), ALL)
def test_every_stage(family, template, tmp_path):
    lineage, words = pipeline_of(family, template, tmp_path)
    cells = {column: made(lineage, names) for column, names in COLUMNS.items()}
    _, scores = steps.evaluate(lineage, "merge")
    cells["evaluation"] = "yes" if {*scores} == {"loss", "answer", "pairs"} else str(sorted(scores))
    if words.endswith("`add-tokens`") and cells["LoRA"] == "yes":
        check_rows_of_new_tokens(lineage)
        cells["LoRA"] = "yes, not the new tokens' rows"
    cells["export"] = exported(lineage.stages["merge"].folder)
    row = f"| {NAMES[family]} | {words} | {' | '.join(cells.values())} |"
    page = (ROOT / "docs" / "models.md").read_text()
    header = f"| model | chat template | {' | '.join(cells)} |"
    assert header in page and row in page, f"docs/models.md has to say\n{header}\n{row}"
    check_masks(lineage, "sft")
    check_first_loss(lineage, "sft")
    for stage in ("sft", "merge"):
        check_stop(lineage.stages[stage].folder, MODEL_FAMILIES[family].turn_end if template == "own" else "<|im_end|>")
    check_mean(lineage)


def documents(lineage: Lineage, stage: str):
    """(ids, fates) of the documents of each of the stage's packs."""
    for row in load_from_disk(str(lineage.stages[stage].prepared)).with_format("numpy"):
        ends = np.cumsum(row["seq_lengths"])[:-1]
        yield list(zip(np.split(row["input_ids"], ends), np.split(row["fates"], ends), strict=True))


def check_masks(lineage: Lineage, stage: str) -> None:
    """What trains is each reply with its stop token, and nothing else but a template's own empty think block."""
    folder = lineage.stages[stage].prepared
    tokenizer, found = AutoTokenizer.from_pretrained(folder / "tokenizer"), []
    for pack in documents(lineage, stage):
        for ids, fates in pack:
            trained = np.flatnonzero(fates == Fate.TRAINED)
            assert (np.diff(trained) == 1).all()  # one turn
            assert len(tokenizer.decode(ids[trained[-1] + 1 :]).strip()) == 0  # the last one of the row
            found.append(tokenizer.decode(ids[trained[:-1]]).strip().replace("</think>\n\n", "</think>\n"))
    assert sorted(found) == sorted([f"{THOUGHT}Yes: 1."] * 8 + ["Yes: 1."] * 8)


def check_first_loss(lineage: Lineage, stage: str) -> None:
    """The first step's loss is that of the stock model on the first two packs, document by document."""
    start = AutoModelForCausalLM.from_pretrained(lineage.recipe.model.checkpoint, attn_implementation="eager")
    nats, num_tokens = 0.0, 0
    for _, pack in zip(range(2), documents(lineage, stage), strict=False):
        for ids, fates in pack:
            labels = np.where(fates == Fate.TRAINED, ids, IGNORE_INDEX)
            number = int((labels[1:] != IGNORE_INDEX).sum())
            with torch.no_grad():
                loss = start(torch.tensor(ids)[None].long(), labels=torch.tensor(labels)[None].long()).loss
            nats, num_tokens = nats + loss.item() * number, num_tokens + number
    log = manifest.read(lineage.stages[stage].folder)["report"]["log"]
    assert log[0]["loss"] == pytest.approx(nats / num_tokens, rel=1e-5)


def check_stop(folder: Path, end: str) -> None:
    """Stock transformers: its chat template's prompt, its greedy `generate`, the folder's own stop tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is 3 odd?"}],
        add_generation_prompt=True, enable_thinking=False, today="08 July 2025", return_dict=False, return_tensors="pt",
    )  # fmt: skip
    reply = model.generate(prompt, max_new_tokens=60, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(reply[-1]) == end and len(reply) < 60
    assert tokenizer.decode(reply[:-1]).endswith("Yes: 1.")


def check_rows_of_new_tokens(lineage: Lineage) -> None:
    """Full training moves them; adapters do not, which the plan says."""
    report = manifest.read(Path(lineage.recipe.model.checkpoint))["report"]
    first, name = min(report["tokens"].values()), "model.embed_tokens.weight"
    folders = [lineage.recipe.model.checkpoint, *(lineage.stages[stage].folder for stage in ("sft_lora", "sft"))]
    before, lora, full = (load_file(Path(folder) / "model.safetensors")[name][first:] for folder in folders)
    assert torch.equal(lora, before) and not torch.equal(full, before)
    said = f"LoRA does not train the rows of the {len(report['tokens'])} tokens"
    notes = {stage: lineage.stages[stage].config.notes(lineage.recipe) for stage in ("sft", "sft_lora")}
    assert said in " ".join(notes["sft_lora"]) and said not in " ".join(notes["sft"])


def check_mean(lineage: Lineage) -> None:
    folders = {name: lineage.stages[name].folder for name in ("sft", "apo-1", "apo-2", "merge")}
    sft, one, two, merged = (load_file(folder / "model.safetensors") for folder in folders.values())
    for name, tensor in merged.items():
        expected = 0.25 * sft[name] + 0.375 * (one[name] + two[name])
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-6)
