"""Files of TRL, alignment-handbook and Axolotl as pipelines: the values that the loaded recipe has, and the lists."""

from pathlib import Path

import pytest

from smolpost import recipe
from smolpost.chat.render import render
from smolpost.errors import UserError
from smolpost.importing.command import import_command, translated
from smolpost.importing.draft import Group
from smolpost.importing.yaml_source import read
from smolpost.pipeline.plan import plan
from smolpost.recipe import Request

FILES = Path(__file__).parent
NAMES = sorted(file.stem for file in FILES.glob("*.yaml"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(name: str, here: Path, **options) -> Request:
    """The request of the pipeline that a file beside this one gives."""
    assert import_command(FILES / f"{name}.yaml", out=Path(f"{name}.yaml"), **options) == 0
    return recipe.load([f"pipeline=./{name}.yaml"])


def from_text(text: str, here: Path, **options) -> Request:
    Path("settings.yaml").write_text(text)
    Path("mine.yaml").unlink(missing_ok=True)
    import_command(Path("settings.yaml"), out=Path("mine.yaml"), **options)
    return recipe.load(["pipeline=./mine.yaml"])


def said(name: str, group: Group) -> str:
    """What is said in a group of a file's list, in one text."""
    draft, _ = translated(FILES / f"{name}.yaml", read(FILES / f"{name}.yaml"))
    return "\n".join(f"{', '.join(names)} -> {what}" for what, names in draft.said[group].items())


def values(stage, **expected):
    assert {name: getattr(stage, name) for name in expected} == expected


SCHEDULE = {"weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "seeds": [42]}


@pytest.mark.parametrize("name", NAMES)
def test_every_file_gives_a_pipeline_that_plans_and_mentions_each_of_its_keys(name, here, capsys):
    request = imported(name, here)
    assert len(plan(request)) == 1
    text, printed = Path(f"{name}.yaml").read_text(), " ".join(capsys.readouterr().out.split())
    for key in read(FILES / f"{name}.yaml"):
        assert key in printed, key
        assert key in text, key


def test_handbook_sft(here):
    request = imported("handbook_sft", here, num_processes=64)
    stage, model = request.recipe.stages["sft"], request.recipe.model
    assert (model.checkpoint, model.revision) == ("HuggingFaceTB/SmolLM3-3B-checkpoints", "it-mid-training")
    sources = request.recipe.data["sft"].sources
    assert {n: (s.path, s.subset, s.split, s.weight) for n, s in sources.items()} == {
        "table_gpt_no_think": ("HuggingFaceTB/smoltalk2", "SFT", "table_gpt_no_think", 1.0),
        "OpenThoughts3_1_2M_think": ("HuggingFaceTB/smoltalk2", "SFT", "OpenThoughts3_1.2M_think", 0.02),
    }
    values(
        stage, kind="sft", train_roles=["assistant"], packing="bfd", max_seq_len=65536, overlong="truncate",
        num_epochs=5.0, learning_rate=2e-5, lr_scheduler="cosine", min_lr_ratio=0.1, warmup_ratio=0.03,
        warmup_steps=None, max_grad_norm=0.2, global_batch_size=128, micro_batch_size=1, precision="bf16",
        num_workers=12, report_to=["wandb"], logging_steps=1, allow_template_change=True, **SCHEDULE,
    )  # fmt: skip
    assert request.recipe.accelerate["distributed_type"] == "MULTI_GPU"
    assert request.recipe.accelerate["num_processes"] == 64
    broken = said("handbook_sft", Group.BROKEN)
    assert "packing_strategy: ffd -> TRL refuses it since 0.20" in broken
    assert "assistant_only_loss: true -> with packing, TRL 0.19 trained on user turns" in broken
    assert "warmup_ratio: 0.03 (now warmup_steps below 1), torch_dtype: bfloat16 (now dtype)" in broken
    assert "trust_remote_code: true" in said("handbook_sft", Group.DIFFERS)
    assert not said("handbook_sft", Group.UNKNOWN)


def test_a_template_of_the_file_comes_beside_the_pipeline_without_marks_that_hold_the_header(here):
    stage = imported("handbook_sft", here).recipe.stages["sft"]
    template = Path(stage.template)
    assert template == Path("handbook_sft.jinja")
    assert "generation" not in template.read_text().replace("add_generation_prompt", "")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    original = read(FILES / "handbook_sft.yaml")["chat_template"]
    text = render(template.read_text(), messages, today="x")
    assert text == render(original, messages, today="x") == "<|turn|>user\na<|end|>\n<|turn|>assistant\nb<|end|>\n"


def test_handbook_mid_uses_our_template_where_it_renders_the_same(here):
    request = imported("handbook_mid", here)
    stage, mixture = request.recipe.stages["sft"], request.recipe.data["sft"]
    values(
        stage, template="chatml", train_roles=["all"], packing="bfd", min_lr_ratio=0.2, warmup_ratio=0.0,
        max_grad_norm=1.0, precision="auto", global_batch_size=2,
    )  # fmt: skip
    assert (mixture.seed, mixture.sources["OpenThoughts3_1_2M"].weight) == (7, 0.9)
    assert not Path("handbook_mid.jinja").exists()


def test_handbook_dpo(here):
    request = imported("handbook_dpo", here)
    stage = request.recipe.stages["dpo"]
    values(
        stage, kind="apo", engine="smolpost", loss="apo_zero", beta=0.05, learning_rate=1e-6, max_seq_len=24576,
        overlong="truncate", warmup_ratio=0.1, max_grad_norm=0.2, num_epochs=1.0, **SCHEDULE,
    )  # fmt: skip
    weights = {name: source.weight for name, source in request.recipe.data["preference"].sources.items()}
    assert sorted(weights.values()) == [0.25, 0.5]
    broken = said("handbook_dpo", Group.BROKEN)
    assert "chat_template_kwargs before 0.24" in broken
    assert "raises a TypeError on SmolTalk2's pairs" in broken
    assert "padding_free: true -> TRL switches it off for pairs since 0.29" in broken


def test_handbooks_older_mixer(here):
    request = imported("handbook_mixer", here)
    sources = request.recipe.data["sft"].sources
    assert {n: (s.split, s.weight) for n, s in sources.items()} == {
        "ultrachat_200k": ("train_sft", 0.5), "no_robots": ("train_sft", 1.0),
    }  # fmt: skip
    values(
        request.recipe.stages["sft"], packing="none", max_seq_len=2048, min_lr_ratio=0.0, warmup_ratio=0.1,
        global_batch_size=16, num_workers=4, template="chatml", allow_template_change=False,
    )  # fmt: skip
    assert "`hf download mistralai/Mistral-7B-v0.1" in said("handbook_mixer", Group.DIFFERS)


def test_trl_sft_states_trls_defaults(here):
    request = imported("trl_sft", here)
    values(
        request.recipe.stages["sft"], learning_rate=2e-5, train_roles=["all"], packing="bfd", overlong="split",
        max_seq_len=2048, num_epochs=3.0, lr_scheduler="linear", warmup_ratio=0.05, max_grad_norm=1.0,
        global_batch_size=16, micro_batch_size=2, activation_checkpointing="full", **SCHEDULE,
    )  # fmt: skip
    text = Path("trl_sft.yaml").read_text()
    assert "weight_decay: 0.0   # TRL's default\n" in text
    assert "learning_rate: 2.0e-05\n" in text
    assert request.recipe.accelerate["distributed_type"] == "NO"


def test_trl_lora_on_shares(here):
    request = imported("trl_lora", here)
    stage, mixture = request.recipe.stages["sft"], request.recipe.data["sft"]
    values(
        stage, train_roles=["assistant"], lr_scheduler="constant", warmup_steps=20, max_steps=400, packing="none",
        max_grad_norm=1e9, global_batch_size=32,
    )  # fmt: skip
    assert (stage.lora.r, stage.lora.alpha, stage.lora.dropout) == (64, 16 * 8.0, 0.05)
    assert stage.lora.target_modules == ["all-linear"]
    assert (mixture.share_of, [source.share for source in mixture.sources.values()]) == ("rows", [0.75, 0.25])
    assert mixture.sources["rows"].path == "rows/*.jsonl"
    accelerate = request.recipe.accelerate
    assert (accelerate["deepspeed_config"]["zero_stage"], accelerate["num_processes"]) == (3, 4)
    assert "load_in_4bit: true -> the frozen weights are not quantized" in said("trl_lora", Group.DIFFERS)
    assert "assistant_only_lss: true -> " in said("trl_lora", Group.UNKNOWN)
    assert said("trl_lora", Group.UNKNOWN).endswith("did you mean assistant_only_loss?")


def test_trls_own_losses_run_on_its_engine(here):
    stage = imported("trl_dpo", here).recipe.stages["dpo"]
    values(stage, kind="apo", engine="trl", beta=0.1, learning_rate=5e-7, global_batch_size=8, max_seq_len=1024)
    values(
        stage.trl,
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
        micro_batch_size=4,
        label_smoothing=0.0,
    )
    assert "label_smoothing: 0.1 -> TRL 1.16 reads it for robust" in said("trl_dpo", Group.BROKEN)
    assert "max_prompt_length: 512 -> " in said("trl_dpo", Group.DIFFERS)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("loss_type: [sigmoid, sft]\nloss_weights: [2.0, 1.0]", {"engine": "smolpost", "sft_weight": 0.5}),
        ("rpo_alpha: 0.3", {"engine": "smolpost", "loss": "sigmoid", "sft_weight": 0.3}),
        ("loss_type: robust\nlabel_smoothing: 0.1", {"loss": "robust", "loss_settings": {"label_smoothing": 0.1}}),
        ("loss_type: ipo\nld_alpha: 0.5", {"loss": "ipo", "ld_alpha": 0.5}),
        ("loss_type: hinge", {"engine": "trl"}),
        ("beta: 0.2\nuse_weighting: true", {"engine": "trl", "beta": 0.2}),
    ],
)
def test_losses(here, keys, expected):
    stage = from_text(f"model_name_or_path: a/b\ndataset_name: c/d\n{keys}\n", here).recipe.stages["dpo"]
    values(stage, **expected)


def test_axolotl_full(here):
    request = imported("axolotl_full", here, num_processes=8)
    stage, [source] = request.recipe.stages["sft"], request.recipe.data["sft"].sources.values()
    assert (source.path, source.split, source.columns) == ("mlabonne/FineTome-100k", "train[:20%]", "sharegpt")
    assert source.weight == 0.98
    values(
        stage, template="chatml", train_roles=["assistant"], packing="bfd", overlong="drop", max_seq_len=8192,
        learning_rate=2e-5, num_epochs=3.0, lr_scheduler="cosine", min_lr_ratio=0.1, warmup_steps=100,
        max_grad_norm=1.0, global_batch_size=64, micro_batch_size=2, precision="auto", activation_checkpointing="full",
        **SCHEDULE,
    )  # fmt: skip
    assert request.recipe.accelerate["deepspeed_config"]["zero_stage"] == 2  # ZeRO-1 has no config of its own
    assert not said("axolotl_full", Group.DIFFERS)
    assert not said("axolotl_full", Group.UNKNOWN)


def test_axolotl_lora_on_several_kinds_of_datasets(here):
    Path("rows.jsonl").write_text('{"body": "text"}\n')
    request = imported("axolotl_lora", here)
    stage, mixture = request.recipe.stages["sft"], request.recipe.data["sft"]
    alpaca, texts, turns, own = mixture.sources.values()
    assert (alpaca.columns, alpaca.weight) == ("alpaca", 0.25)
    assert (texts.path, texts.rename) == ("rows.jsonl", {"body": "text"})
    assert (turns.columns, turns.roles) == ("sharegpt", {"bot": "assistant"})
    assert (own.columns, own.rename) == ("alpaca", {"question": "instruction", "reply": "output"})
    assert mixture.hygiene.exact
    values(
        stage, template="chatml", packing="none", overlong="drop", warmup_ratio=0.03, activation_checkpointing="none"
    )
    assert (stage.lora.r, stage.lora.alpha, stage.lora.target_modules) == (16, 32.0, ["q_proj", "v_proj"])
    assert "datasets[2].type: sharegpt -> Axolotl refuses it" in said("axolotl_lora", Group.BROKEN)
    assert "sequence_length: 4096" in said("axolotl_lora", Group.UNKNOWN)
    assert "did you mean sequence_len?" in said("axolotl_lora", Group.UNKNOWN)
    assert "datasets[0].type: alpaca" in said("axolotl_lora", Group.DIFFERS)


def test_axolotl_dpo(here):
    request = imported("axolotl_dpo", here)
    stage = request.recipe.stages["dpo"]
    values(
        stage, kind="apo", loss="sigmoid", beta=0.3, max_seq_len=4096, overlong="drop", lr_scheduler="linear",
        warmup_steps=10, num_epochs=4.0, global_batch_size=8, learning_rate=2e-4,
    )  # fmt: skip
    assert stage.lora.target_modules == ["all-linear"]
    pairs, orca = request.recipe.data["preference"].sources.values()
    assert pairs.rename == {"conversation": "prompt", "better": "chosen"}
    assert orca.rename == {"question": "prompt"}
    assert "load_in_8bit: true" in said("axolotl_dpo", Group.DIFFERS)


def test_kto(here):
    stage = imported("trl_kto", here).recipe.stages["kto"]
    values(
        stage, kind="kto", loss="kto", beta=0.2, desirable_weight=1.5, undesirable_weight=1.0, learning_rate=5e-7,
        global_batch_size=8, micro_batch_size=4, max_seq_len=1024, warmup_ratio=0.0, num_epochs=3.0, **SCHEDULE,
    )  # fmt: skip
    request = imported("axolotl_kto", here)
    stage = request.recipe.stages["kto"]
    values(
        stage, kind="kto", loss="kto", beta=0.5, desirable_weight=0.2, undesirable_weight=1.0, warmup_steps=20,
        global_batch_size=4, micro_batch_size=2, overlong="drop", template="chatml",
    )  # fmt: skip
    assert (stage.lora.r, stage.lora.alpha) == (32, 64.0)
    assert "load_in_4bit: true" in said("axolotl_kto", Group.DIFFERS)


AXOLOTL = "base_model: a/b\nlearning_rate: 1e-4\nsequence_len: 64\nmicro_batch_size: 1\n"
DATASET = "datasets: [{path: c/d, type: chat_template}]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AXOLOTL + DATASET + "train_on_inputs: true", {"train_roles": ["all"]}),
        (AXOLOTL + DATASET + "excess_length_strategy: truncate", {"overlong": "truncate"}),
        (AXOLOTL + "pretraining_dataset: [{path: c/d, text_column: t}]\nmax_steps: 9\nsample_packing: true",
         {"packing": "wrapped", "max_steps": 9}),
        (AXOLOTL + DATASET + "bf16: false\nfp16: true", {"precision": "bf16"}),
        (AXOLOTL + DATASET + "bf16: false", {"precision": "fp32"}),
        (AXOLOTL + DATASET + "lr_scheduler: one_cycle", {"lr_scheduler": "cosine", "min_lr_ratio": 0.0}),
        (AXOLOTL + DATASET + "wandb_project: x", {"report_to": ["wandb"]}),
    ],
)  # fmt: skip
def test_axolotl_values(here, text, expected):
    values(from_text(text, here).recipe.stages["sft"], **expected)


TRL = "model_name_or_path: a/b\ndataset_name: c/d\npacking: false\n"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("lr_scheduler_type: constant\nwarmup_ratio: 0.1", {"lr_scheduler": "constant", "warmup_ratio": 0.0}),
        ("lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 20}\nmax_steps: 100",
         {"lr_scheduler": "wsd", "decay_ratio": 0.2, "min_lr_ratio": 0.0}),
        ("lr_scheduler_type: polynomial", {"lr_scheduler": "cosine", "min_lr_ratio": 0.0}),
        ("max_length: null", {"max_seq_len": 32768, "overlong": "refuse"}),
        ("max_length: 512\nwarmup_steps: 10\nwarmup_ratio: 0.5", {"max_seq_len": 512, "warmup_steps": 10}),
        ("completion_only_loss: true", {"train_roles": ["assistant"]}),
        ("loss_type: dft", {"engine": "trl"}),
        ("learning_rate: '3e-6'\nnum_train_epochs: '2'", {"learning_rate": 3e-6, "num_epochs": 2.0}),
    ],
)  # fmt: skip
def test_trl_values(here, keys, expected):
    values(from_text(f"{TRL}{keys}\n", here).recipe.stages["sft"], **expected)


def test_a_value_of_the_environment_stays_one(here, monkeypatch):
    monkeypatch.setenv("ROWS", "c/d")
    request = from_text("model_name_or_path: a/b\npacking: true\ndataset_name: '${ROWS}'\n", here)
    assert next(iter(request.recipe.data["sft"].sources.values())).path == "c/d"
    assert "path: '${oc.env:ROWS}'" in Path("mine.yaml").read_text()


def test_the_models_own_template_is_taken_from_its_folder(here):
    (here / "model").mkdir()
    template = "{% for m in messages %}{{ '[' ~ m.role ~ ']' ~ m.content }}{% endfor %}"
    (here / "model/chat_template.jinja").write_text(template)
    stage = from_text("model_name_or_path: ./model\ndataset_name: c/d\npacking: true\n", here).recipe.stages["sft"]
    assert (stage.template, stage.allow_template_change) == ("mine.jinja", False)
    assert Path("mine.jinja").read_text() == template


def test_secrets_are_not_repeated(here, capsys):
    secret = "hf_abcdefgh"
    from_text(f"{TRL}hub_token: {secret}\nhf_token: {secret}\nmy_api_key: {secret}\n", here)
    assert "hf_token" in Path("mine.yaml").read_text()
    assert secret not in Path("mine.yaml").read_text() + capsys.readouterr().out


def test_slices_of_files_are_rows(here):
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    text = "datasets: [{path: json, data_files: rows.jsonl, split: 'train[10:50]'}]\n"
    request = from_text(f"model_name_or_path: a/b\npacking: true\n{text}", here)
    [source] = request.recipe.data["sft"].sources.values()
    assert (source.path, source.split, source.first_row, source.max_rows) == ("rows.jsonl", "train", 10, 40)


def test_a_refused_pipeline_leaves_nothing(here):
    text = (
        "model_name_or_path: a/b\ndataset_name: c/d\npacking: true\nlearning_rate: 0\nchat_template: '{{ messages }}'\n"
    )
    with pytest.raises(UserError, match=r"^settings\.yaml: the pipeline that it gives is refused: .*learning_rate=0"):
        from_text(text, here)
    assert sorted(path.name for path in here.iterdir()) == ["settings.yaml"]


def test_the_documented_example_is_real(here, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    page = (FILES.parent.parent / "docs/importing.md").read_text()
    settings, rest = page.split('```yaml title="sft.yaml"\n')[1].split("```", 1)
    typed, printed = rest.split("```console\n")[1].split("```")[0].split("\n$ ")[0].split("\n", 1)
    assert typed == "$ smolpost import sft.yaml --num-processes 8"
    Path("sft.yaml").write_text(settings)
    import_command(Path("sft.yaml"), num_processes=8)
    assert capsys.readouterr().out.rstrip("\n") == printed.rstrip("\n")
