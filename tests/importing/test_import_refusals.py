# ruff: noqa: E501 - whole lines are compared
"""Files that cannot be imported: one line each, exit code 2, and nothing is written."""

from pathlib import Path

import pytest

from smolpost import cli
from smolpost.errors import UserError
from smolpost.importing.command import import_command

TRL = "model_name_or_path: a/b\ndataset_name: c/d\n"
SFT = TRL + "packing: true\n"
DPO = TRL + "beta: 0.1\n"
AXOLOTL = "base_model: a/b\nmicro_batch_size: 1\n"
ROWS = AXOLOTL + "datasets: [{path: c/d, type: chat_template}]\nlearning_rate: 1e-4\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
OTHER = "{} of LLaMA-Factory, which is not read, as its datasets are names in a dataset_info.json; write a pipeline with their paths (docs/recipes.md)"
UNKNOWN = "is of no tool that is known here; Axolotl's files have base_model, alignment-handbook's dataset_mixture or dataset_mixer, TRL's model_name_or_path; say whose it is with --from"

# Content of settings.yaml -> the line after "settings.yaml".
FILES = {
    "empty": ("", ": is empty; name a settings file of TRL, alignment-handbook or Axolotl"),
    "only comments": ("# nothing\n", ": is empty; name a settings file of TRL, alignment-handbook or Axolotl"),
    "a list": ("- a\n- b\n", ": holds a list; a settings file holds KEY: VALUE lines"),
    "a value": ("abc\n", ": holds a single value; a settings file holds KEY: VALUE lines"),
    "not UTF-8": (b"seed: \xff\xfe1\n", ": is not text in UTF-8; save it as UTF-8"),
    "control characters": (b"seed: \x01\n", ": is not YAML (unacceptable character #x0001: special characters are not allowed)"),
    "tab": ("a:\n\tb: 1\n", ":2: a tab; YAML is indented with spaces"),
    "broken": ("a: [1, 2\nb: 3\n", ":2: is not YAML (expected ',' or ']', but got ':'); quote values that hold : or # or brackets, and indent keys alike"),
    "key twice": ("seed: 1\nseed: 2\n", ":2: seed stands twice; keep one of the two"),
    "two documents": ("a: 1\n---\nb: 2\n", ":2: is not YAML (but found another document); quote values that hold : or # or brackets, and indent keys alike"),
    "python tag": ("a: !!python/object/apply:os.system [ls]\n", ":1: is not YAML (could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'); quote values that hold : or # or brackets, and indent keys alike"),
    "bomb": (BOMB, ": has more than 100,000 values once its aliases are written out"),
    "itself": ("a: &a [*a]\n", ": an alias (*NAME) stands inside its own anchor (&NAME); write it out"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, ": is nested too deeply; name a settings file"),
    "date": ("a: 2025-13-40\n", ": is not YAML (month must be in 1..12); quote the value"),
    "unknown tool": ("epochs: 3\n", ": " + UNKNOWN),
    "LLaMA-Factory": ("model_name_or_path: a/b\nstage: sft\nfinetuning_type: lora\ncutoff_len: 9\n", ": has the key " + OTHER.format("finetuning_type")),
    "ours": ("pipeline: a\nstages: {}\n", ": has the key pipeline of smolpost's own; smolpost plan pipeline=./FILE.yaml plans it"),
    "mergekit": ("merge_method: ties\nmodels: []\n", ": has the key merge_method of mergekit; smolpost merge OUT --config FILE runs it"),
    "two tools": ("base_model: a/b\nmodel_name_or_path: a/b\n", ": has keys of several tools (base_model of Axolotl, model_name_or_path of TRL); say whose it is with --from trl or alignment-handbook or axolotl"),
    "no method": (TRL, ": nothing in it says what it trains; say it with --method sft, --method dpo, --method kto"),
    "two methods": (SFT + "beta: 0.1\n", ": has keys of several scripts (packing of sft and beta of dpo); say which one ran with --method"),
    "grpo": (TRL + "num_generations: 8\n", ": num_generations is a key of GRPO or RLOO, which cannot be imported; sft, dpo, kto can"),
    "an unknown loss of kto": (TRL + "desirable_weight: 1\nloss_type: [kto]\n", ": has keys of several scripts (loss_type of dpo and desirable_weight of kto); say which one ran with --method"),
    "no dataset": ("model_name_or_path: a/b\npacking: true\n", ": names no dataset; add dataset_name, or datasets with a path for each"),
    "no model": ("dataset_mixture: {datasets: [{id: a/b}]}\npacking: true\n", ": has no model_name_or_path; add the one that was trained"),
    "text for a number": (SFT + "learning_rate: fast\n", ": learning_rate=fast is not a number; write a number"),
    "interpolation for a number": (SFT + "learning_rate: ${LR}\n", ": learning_rate=${LR} is not a number; write the value that it stood for"),
    "list for a number": (SFT + "max_length: [1]\n", ": max_length=[1] is not a whole number; write a whole number"),
    "truth for a number": (SFT + "seed: true\n", ": seed=true is not a whole number; write a whole number"),
    "half a token": (SFT + "max_length: 10.5\n", ": max_length=10.5 is not a whole number; write a whole number"),
    "infinite": (SFT + "max_length: .inf\n", ": max_length=inf is not a whole number; write a whole number"),
    "text in a list of datasets": ("model_name_or_path: a/b\npacking: true\ndatasets: [c/d]\n", ": datasets[0]=c/d is not a mapping; write it as KEY: VALUE lines"),
    "some fractions": ("model_name_or_path: a/b\npacking: true\ndatasets: [{path: a, fraction: 0.5}, {path: b}]\n", ": fraction is set for 1 of 2 datasets; TRL wants it for all or none; give the others one"),
    "loss": (DPO + "loss_type: kto_pair\n", ": loss_type=kto_pair is not a loss of TRL 1.16, which has sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, sft, sigmoid_norm; choose one of them"),
    "weights": (DPO + "loss_type: [sigmoid, sft]\nloss_weights: [1]\n", ": loss_weights has 1 numbers for 2 losses; give one for each"),
    "packing strategy": (SFT + "packing_strategy: best\n", ": packing_strategy=best is not one of TRL's: bfd, bfd_split, bfd-requeue, ffd, wrapped; choose one"),
    "template": (SFT + "chat_template_path: nowhere.jinja\n", ": chat_template_path=nowhere.jinja is neither a .jinja file nor a checkpoint on this machine; correct it, or save the template as a .jinja file"),
    "orpo": (ROWS + "rl: orpo\n", ": rl=orpo cannot be imported; dpo, ipo, kto and files without rl can"),
    "reward model": (ROWS + "reward_model: true\n", ": reward_model cannot be imported; fine-tuning, DPO, IPO and KTO can"),
    "adapter without layers": (ROWS + "adapter: lora\n", ": has an adapter and no layers; add lora_target_linear: true"),
    "no learning rate": (AXOLOTL + "datasets: [{path: c/d}]\n", ": has no learning_rate, which Axolotl requires; add it"),
    "out of range": (SFT + "adam_beta2: 1.5\n", ": the pipeline that it gives is refused: stages.sft.adam_beta2=1.5 is outside [0, 1)"),
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(content: str | bytes, **options) -> str:
    Path("settings.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        import_command(Path("settings.yaml"), **options)
    assert [path.name for path in Path().iterdir()] == ["settings.yaml"]
    return str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_one_line_says_what_is_wrong(name, here):
    content, line = FILES[name]
    assert refusal(content) == f"settings.yaml{line}"


def test_what_nobody_said_can_be_said(here):
    assert refusal("model_name_or_path: a/b\nfinetuning_type: lora\n", tool="trl").endswith("--method kto")
    Path("settings.yaml").write_text(TRL)
    assert import_command(Path("settings.yaml"), method="dpo", tool="trl") == 0
    assert "kind: apo" in Path("settings_smolpost.yaml").read_text()


def test_an_existing_file_stays(here):
    Path("settings.yaml").write_text(SFT)
    Path("mine.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"^mine\.yaml exists; remove it, or name another file with --out$"):
        import_command(Path("settings.yaml"), out=Path("mine.yaml"))
    assert Path("mine.yaml").read_text() == "mine"


def test_a_template_that_is_in_the_way_stays(here):
    Path("settings.yaml").write_text(SFT + "chat_template: '{{ messages }}'\n")
    Path("mine.jinja").write_text("mine")
    with pytest.raises(UserError, match=r"^mine\.jinja exists"):
        import_command(Path("settings.yaml"), out=Path("mine.yaml"))
    assert not Path("mine.yaml").exists()


def test_the_command_line(here, capsys):
    Path("settings.yaml").write_text(SFT)
    for words, code, line in (
        (["settings.yaml", "--out", "x.txt"], 2, "--out x.txt does not end in .yaml; pipeline= takes files that do"),
        (["settings.yaml", "--num-processes", "0"], 2, "--num-processes 0 is below 1"),
        (["nowhere.yaml"], 2, "nowhere.yaml: cannot be read (No such file or directory); name a YAML file"),
        (["settings.yaml"], 0, None),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main(["import", *words])
        assert exit.value.code == code
        captured = capsys.readouterr()
        assert captured.err == ("" if line is None else f"smolpost: {line}\n")
    assert captured.out.endswith("settings_smolpost.yaml: `smolpost plan pipeline=settings_smolpost.yaml`\n")
