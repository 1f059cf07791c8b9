"""smolpost new: rows of every common shape, what follows from rows and checkpoint, and refusals that write nothing."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from smolpost import cli, recipe
from smolpost.chat.render import load_template
from smolpost.data.mixtures import mix
from smolpost.errors import UserError
from smolpost.pipeline import manifest
from smolpost.starting import command
from smolpost.starting.checkpoint import Checkpoint
from smolpost.starting.choices import batch_of, choose_launch, learning_rate
from smolpost.starting.command import Asked, new
from tests.families import byte_level
from tests.small import call, sum_rows

OWN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ROWS = [row for row in sum_rows(40, 0) if not row["think"]]


def save_checkpoint(folder: Path, template: str | None, *tokens: str) -> None:
    tokenizer = byte_level(*tokens)
    tokenizer.chat_template = template
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=1024, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Folders base (without a template) and instruct (with one)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(folder / "base", None, "<think>", "</think>")
    save_checkpoint(folder / "instruct", OWN)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, checkpoints) -> Path:
    shutil.copytree(checkpoints, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def write(name: str, rows: list[dict]) -> str:
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), name)
    elif name.endswith(".json"):
        Path(name).write_text(json.dumps(rows))
    else:
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def chat(asked: str, reply: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}], **more}


def made(name: str, **asked) -> tuple[recipe.Request, str]:
    """The recipe that `new` writes, and what it prints."""
    out = io.StringIO()
    new(Asked(name, **{"checkpoint": "base"} | asked), Console(file=out, width=200, markup=False))
    return recipe.load([f"pipeline={name}"]), out.getvalue()


def texts(row: dict) -> tuple[str, str]:
    asked, reply = row["chosen"]
    return asked["content"], reply["content"]


SHAPES = {
    "messages.jsonl": lambda q, a: chat(q, a),
    "list.json": lambda q, a: chat(q, a),
    "table.parquet": lambda q, a: chat(q, a),
    "sharegpt.jsonl": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "completion.jsonl": lambda q, a: {"prompt": q, "completion": a},
    "alpaca.jsonl": lambda q, a: {"instruction": q, "input": "", "output": a, "text": f"### {q}{a}"},
    "question.jsonl": lambda q, a: {"question": q, "answer": a},
    "query.jsonl": lambda q, a: {"query": q, "response": a},
}


def test_rows_of_every_common_shape_give_the_same_conversations(here):
    for number, (name, shape) in enumerate(SHAPES.items()):
        file = write(name, [shape(*texts(row)) for row in ROWS])
        found = made(f"shape{number}", sft=[file])[0].recipe
        read = [row["messages"] for _, row in mix(found.data["sft"])]
        assert sorted(turns[1]["content"] for turns in read) == sorted(texts(row)[1] for row in ROWS), name
        assert {turns[0]["role"] for turns in read} == {"user"}
        assert (found.stages["sft"].template, found.stages["sft"].init_from) == ("chatml", "checkpoint")


def test_pairs_train_after_sft_and_rows_are_held_out(here):
    rows = sum_rows(800, 1)
    think = write("think.jsonl", [{"messages": r["chosen"]} for r in rows])
    sides = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows if not row["think"]]
    found, printed = made("both", sft=[think], preference=[write("pairs.jsonl", sides)], lora=True)
    sft, preference = found.recipe.stages["sft"], found.recipe.stages["preference"]
    assert (preference.init_from, preference.seeds, preference.beta, preference.kind) == ("sft", [42], 0.1, "apo")
    assert (sft.learning_rate, preference.learning_rate, sft.lora.r) == (3e-3, 3e-4, 16)
    # 5% of 800 and of 400 rows; the parts together are the file.
    data = {name: next(iter(mixture.sources.values())) for name, mixture in found.recipe.data.items()}
    assert (data["sft"].max_rows, data["heldout"].first_row) == (760, 760)
    assert (data["preference"].max_rows, data["heldout_pairs"].first_row) == (380, 380)
    assert list(found.recipe.evaluation.tasks) == ["loss", "pairs"]
    # Half of the rows think, and none of them says so.
    assert (sft.template, data["sft"].enable_thinking, data["sft"].mode_from_reply) == ("smollm3", None, True)
    assert data["heldout"].mode_from_reply and not data["preference"].mode_from_reply
    assert data["preference"].enable_thinking is False
    assert "do not state their mode" not in printed
    assert "sft: 50% of the rows think; think_share of a source sets another share" in printed
    assert "preference: 380 pairs are few; the playbook's best run had 17,000" in printed


def test_rows_without_thinking_are_marked_where_the_template_has_modes(here):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    found, printed = made("tools", sft=[write("tools.jsonl", [chat(*texts(row), tools=tools) for row in ROWS])])
    source = found.recipe.data["sft"].sources["tools"]
    assert (found.recipe.stages["sft"].template, source.enable_thinking) == ("smollm3", False)
    assert "do not state their mode" not in printed
    assert "no row thinks, so replies with thinking (/think) are not trained" in printed


def test_the_length_holds_99_percent_and_says_who_is_longer(here):
    # A token per byte: 2 turns of <|im_start|>ROLE\nTEXT<|im_end|>\n are 21 tokens beside the texts' bytes.
    rows = [chat("u" * 30, "a" * 300) for _ in range(150)] + [chat("u", "a" * 899)]
    found, printed = made("long", sft=[write("long.jsonl", rows)])
    stage = found.recipe.stages["sft"]
    assert (stage.max_seq_len, stage.overlong, stage.packing) == (512, "truncate", "bfd")
    assert "0.7% of the rows are longer, up to 921, and are cut (overlong: truncate)" in printed
    # The context bounds it.
    found, printed = made("longer", sft=[write("longer.jsonl", [chat("u", "a" * 2000)] * 20)])
    assert found.recipe.stages["sft"].max_seq_len == 1024
    assert "the model's context of 1,024; 100.0% of the rows are longer, up to 2,022" in printed


@pytest.mark.parametrize(
    ("units", "units_per_row", "most", "ranks", "batch"),
    [
        (76e6 / 32768, 1e-2, 128, 1, 16),  # the playbook's data: 8 to 16 packs recovered what 128 had cost
        (1.8e9 / 65536, 1e-2, 128, 8, 128),  # the published data and batch
        (43, 0.3, 128, 1, 4),  # 8 rows at least
        (43, 0.3, 128, 3, 6),  # a multiple of the ranks
        (169_000, 1, 32, 1, 32),
        (380, 1, 32, 1, 8),
    ],
)
def test_the_batch_leaves_an_epoch_enough_steps(units, units_per_row, most, ranks, batch):
    assert batch_of(units, units_per_row, most, ranks) == batch


def test_the_learning_rate_falls_with_the_size_and_lora_has_ten_times_it():
    sizes = (10e6, 135e6, 1.7e9, 3e9, 70e9)
    assert [learning_rate(size, False, False) for size in sizes] == [3e-4, 5e-5, 2e-5, 1e-5, 5e-6]
    assert [learning_rate(size, True, False) for size in sizes] == [3e-5, 2e-6, 1e-6, 5e-7, 2e-7]
    assert (learning_rate(3e9, False, True), learning_rate(3e9, True, True)) == (1e-4, 5e-6)


def test_the_models_own_template_is_kept_in_a_file(here):
    file = write("rows.jsonl", [chat(*texts(row)) for row in ROWS])
    found, printed = made("own", checkpoint="instruct", sft=[file], gpus=2)
    stage = found.recipe.stages["sft"]
    assert (stage.template, stage.allow_template_change) == ("own.jinja", False)
    assert load_template("own.jinja") == OWN
    assert found.recipe.accelerate["num_processes"] == 2 and found.accelerate.stem == "ddp"
    assert stage.global_batch_size % (2 * stage.micro_batch_size) == 0
    assert "template: a file beside the pipeline (the checkpoint's own)" in printed
    assert "written: own.yaml, own.jinja" in printed
    assert manifest.read(Path("instruct"))["kind"] == "adopted"
    # Marks that hold the header, too, are left out: the replies train.
    text = "{% for m in messages %}{% generation %}" + OWN.removeprefix("{% for m in messages %}").replace(
        "{% endfor %}", "{% endgeneration %}{% endfor %}"
    )
    Path("instruct/chat_template.jinja").write_text(text)
    Path("instruct/manifest.json").unlink()
    found, printed = made("marked", checkpoint="instruct", sft=[file])
    assert found.recipe.stages["sft"].allow_template_change
    assert load_template("marked.jinja") == text.replace("{% generation %}", "{% if true %}").replace(
        "{% endgeneration %}", "{% endif %}"
    )
    # A pipeline with this name, or a template, is never overwritten.
    for taken in ("own", "other"):
        shutil.copy("own.jinja", "other.jinja")
        with pytest.raises(UserError, match=rf"{taken}\.(yaml|jinja) exists; choose another name, or remove it"):
            made(taken, checkpoint="instruct", sft=[file])


def test_tokens_that_the_template_needs_are_added_by_the_command_that_is_named(here, monkeypatch):
    file = write("rows.jsonl", [chat(*texts(row)) for row in ROWS])
    tokenizer = json.loads(Path("base/tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<|im_start|>"]
    for i, token in enumerate(sorted(tokenizer["added_tokens"], key=lambda t: t["id"]), 256):
        token["id"] = i
    Path("base/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError) as error:
        made("lacking", sft=[file])
    assert str(error.value) == (
        "--checkpoint base has no chat template, and no token for <|im_start|>, which the template chatml writes; "
        "`smolpost add-tokens base OUT --template chatml` writes a checkpoint that has them; then take --checkpoint OUT"
    )
    assert not Path("base/manifest.json").exists()
    with pytest.raises(SystemExit) as end:
        cli.main(["add-tokens", "base", "OUT", "--template", "chatml"])
    assert not end.value.code
    assert made("added", checkpoint="OUT", sft=[file])[0].recipe.model.checkpoint == "OUT"


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
REFUSED = {
    "name": (["a/b"], {}, "'a/b' is not a name for a pipeline; use letters, digits and _ . + -, without .yaml"),
    "suffix": (["a.yaml"], {}, "'a.yaml' is not a name for a pipeline; use letters, digits"),
    "gpus": (["x", "--gpus", "0"], {}, "--gpus 0 is below 1; give 1 for a CPU or one GPU"),
    "no rows": (["x", "--lora"], {"sft": None}, "smolpost new needs --sft FILE or --preference FILE where no terminal"),
    "no checkpoint": (["x"], {"checkpoint": None}, "smolpost new needs --checkpoint MODEL where no terminal can ask"),
    "missing": (["x"], {"sft": "none.jsonl"}, "--sft none.jsonl: does not exist; expected a JSONL or Parquet file"),
    "empty": (["x"], {"sft": []}, "--sft rows.jsonl: is empty; expected at least one row"),
    "other": (
        ["x"],
        {"sft": [{"foo": 1}] * 3},
        "--sft: none of the 3 rows looked at can be used; rows.jsonl:1: has the",
    ),
    "pairs": (["x"], {"sft": [PAIR] * 3}, "--sft rows.jsonl: its rows are preference pairs, and --sft takes convers"),
    "chats": (
        ["x"],
        {"preference": [chat("a", "b")]},
        "--preference rows.jsonl: its rows are conversations, and --pref",
    ),
    "equal": (
        ["x"],
        {"preference": [PAIR | {"chosen": "c"}]},
        "--preference: none of the 1 rows looked at can be used; ",
    ),
    "roles": (
        ["x", "--roles", "bot=robot"],
        {},
        "--roles bot=robot is not NAME=ROLE; ROLE is one of system, user, assi",
    ),
    "file": (["x"], {"checkpoint": "rows.jsonl"}, "--checkpoint rows.jsonl is a file; name the folder of a checkpoint"),
    "folder": (["x"], {"checkpoint": "./none"}, "--checkpoint ./none is not a folder; name the folder of a checkpoint"),
    "hub": (["x"], {"checkpoint": "none"}, "checkpoint none@main is no folder and cannot be fetched ("),
    "config": (["x"], {"checkpoint": "empty"}, "--checkpoint empty has no config.json (empty); save it with save_pret"),
    "tokenizer": (["x"], {"checkpoint": "mute"}, "--checkpoint mute has no tokenizer.json; save the tokenizer beside"),
    "weights": (
        ["x"],
        {"checkpoint": "light"},
        "--checkpoint light has neither model.safetensors nor model.safetensors",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=list(REFUSED))
def test_a_refusal_is_one_line_and_writes_nothing(here, capsys, monkeypatch, case):
    words, given, line = REFUSED[case]
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    Path("empty").mkdir()
    for name, files in {
        "mute": ["config.json", "model.safetensors"],
        "light": ["config.json", "tokenizer.json"],
    }.items():
        Path(name).mkdir()
        for file in files:
            shutil.copy(f"base/{file}", name)
    given = {"checkpoint": "base"} | ({} if "preference" in given else {"sft": [chat("a", "b")]}) | given
    for flag, value in given.items():
        if value is not None:
            words = [*words, f"--{flag}", value if isinstance(value, str) else write("rows.jsonl", value)]
    if not Path("rows.jsonl").exists():
        write("rows.jsonl", [chat("a", "b")])
    before = sorted(here.rglob("*"))
    with pytest.raises(SystemExit) as end:
        cli.main(["new", *words])
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert captured.err.strip().splitlines()[-1].startswith(f"smolpost: {line}"), captured.err
    assert sorted(here.rglob("*")) == before


def test_the_name_may_stand_after_the_files(here, capsys):
    words = ["new", "--checkpoint", "base", "--sft", write("a.jsonl", [chat("a", "b")] * 3)]
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "mine"])
    assert end.value.code == 0 and Path("mine.yaml").is_file()
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "new needs a NAME for the pipeline, such as `smolpost new mine`" in capsys.readouterr().err


def test_what_plan_refuses_leaves_nothing_behind(here, monkeypatch):
    def refuse(request):
        raise UserError("refused")

    file = write("rows.jsonl", [chat(*texts(row)) for row in ROWS])
    before = sorted(here.rglob("*"))
    monkeypatch.setattr(command, "plan", refuse)
    with pytest.raises(UserError, match="refused"):
        made("x", checkpoint="instruct", sft=[file])
    assert sorted(here.rglob("*")) == before


def test_rows_that_end_in_two_users_and_roles_of_their_own(here):
    two = [*chat("a", "b")["messages"], {"role": "user", "content": "c"}, {"role": "user", "content": "d"}]
    found, printed = made("two", sft=[write("two.jsonl", [{"messages": two}] * 9)])
    assert found.recipe.data["sft"].sources["two"].last_user_is_reply
    assert "two.jsonl: rows end in two user turns, and the last one trains as a reply (last_user_is_reply)" in printed
    turns = [{"from": "customer", "value": "a"}, {"from": "agent", "value": "b"}]
    file = write("roles.jsonl", [{"conversations": turns}] * 9)
    with pytest.raises(UserError, match=r"from is 'customer'; expected .*; for smolpost new: --roles NAME=ROLE$"):
        made("roles", sft=[file])
    found, _ = made("roles", sft=[file], roles={"customer": "user", "agent": "assistant"})
    [(_, row), *_] = mix(found.recipe.data["sft"])
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]


def test_refused_rows_are_counted_and_not_held_out(here):
    rows = [chat(*texts(row)) for row in sum_rows(500, 2)]
    rows[490] = {"messages": []}
    found, printed = made("bad", sft=[write("bad.jsonl", rows)])
    assert "bad.jsonl: 1 of 500 rows are refused; the first: bad.jsonl:491: messages is empty" in printed
    assert list(found.recipe.data) == ["sft"] and not found.recipe.evaluation.tasks


def test_a_terminal_is_asked_and_wrong_answers_are_asked_again(here, monkeypatch, capsys):
    file = write("rows.jsonl", [chat(*texts(row)) for row in ROWS])
    answers = iter(["", "nowhere/at/all", "base", "none.jsonl", file, "", "what", "y", "zero", "1"])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda *_: next(answers))
    with pytest.raises(SystemExit) as end:
        cli.main(["new", "mine"])
    assert end.value.code == 0 and next(answers, None) is None
    found = recipe.load(["pipeline=mine"]).recipe
    assert (found.model.checkpoint, found.stages["sft"].lora.r, list(found.stages)) == ("base", 16, ["sft"])
    assert "--checkpoint nowhere/at/all is not a folder" in capsys.readouterr().out


def test_a_terminal_that_ends_writes_nothing(here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    with pytest.raises(SystemExit) as end:
        cli.main(["new", "mine"])
    assert end.value.code == 2 and not Path("mine.yaml").exists()
    assert "Checkpoint to train (folder or Hub id): no answer; nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_type", "layers", "gpus", "lora", "accelerate", "fits"),
    [
        ("smollm3", 36, 1, False, "single", True),  # the 3B
        ("smollm3", 36, 8, False, "ddp", True),
        ("smollm3", 100, 8, False, "fsdp2", True),
        ("llama", 100, 8, False, "zero3", True),
        ("llama", 100, 1, False, "single", False),
        ("llama", 100, 1, True, "single", True),
    ],
)
def test_a_model_is_spread_where_it_does_not_fit_on_one_gpu(model_type, layers, gpus, lora, accelerate, fits):
    sizes = dict(hidden_size=2048, intermediate_size=11008, num_attention_heads=16, num_key_value_heads=4)
    config = sizes | dict(model_type=model_type, num_hidden_layers=layers, vocab_size=128256)
    checkpoint = Checkpoint("x", Path("x"), config, 0, 65536, None, False)
    launch = choose_launch(checkpoint, [4096], lora=lora, gpus=gpus, card=80e9)
    assert (launch.accelerate, launch.fits) == (accelerate, fits), launch.why


@pytest.mark.slow
def test_a_new_pipeline_runs_to_the_end(here):
    """As a user: two commands, in a folder of their own."""
    rows = sum_rows(60, 3)
    chats = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in map(texts, rows)
    ]
    pairs = [
        {"prompt": row["prompt"], "chosen": texts(row)[1], "rejected": row["rejected"][1]["content"]} for row in rows
    ]
    words = ["--checkpoint", "base", "--sft", write("chats.json", chats), "--preference", write("p.parquet", pairs)]
    smolpost = [sys.executable, "-m", "smolpost.cli"]
    done = call([*smolpost, "new", "mine", *words, "--lora"], cwd=here)
    assert done.returncode == 0, done.stderr
    done = call([*smolpost, "run", "pipeline=mine"], cwd=here, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"about (\d+) optimizer step", Path("mine.yaml").read_text())
    for stage, steps in zip(("sft", "preference"), told, strict=True):
        [folder] = here.glob(f"runs/mine/{stage}-*")
        last = max(entry["step"] for entry in manifest.read(folder)["report"]["log"])
        assert abs(last - int(steps)) <= 1, stage
    done = call([*smolpost, "plan", "pipeline=mine"], cwd=here)
    assert done.stdout.count(": done") == 2, done.stdout
