"""What a user gets wrong: one clear line, exit code 2, and nothing that a later run would take for finished."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from smolpost import cli, recipe
from smolpost.pipeline.lineage import Lineage

ROOT = Path(__file__).parent.parent
USER = {"role": "user", "content": "1+1?"}
REPLY = {"role": "assistant", "content": "The answer is 2."}
ROW = {"messages": [USER, REPLY], "chat_template_kwargs": {"enable_thinking": False}}
PAIR = {"prompt": "1+1?", "chosen": [USER, REPLY], "rejected": [USER, {"role": "assistant", "content": "3"}]}


class Project:
    """A gsm8k pipeline whose files a test can break."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs = folder / "runs"
        for name, row in (("mid", ROW), ("sft", ROW), ("preference", PAIR)):
            self.write(name, [row] * 8)
        self.words = [
            "pipeline=gsm8k",
            "data=gsm8k_folder",
            f"data_root={folder}",
            f"run_dir={self.runs}",
            "stages.init.vocab_size=300",
        ]

    def file(self, name: str) -> Path:
        return self.folder / f"smoltalk2_{name}.jsonl"

    def write(self, name: str, rows: list[dict]) -> None:
        self.file(name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def finished(self) -> set[str]:
        return {path.parent.name.rpartition("-")[0] for path in self.runs.rglob("manifest.json")}

    def halves(self) -> list[Path]:
        return [path for path in self.runs.rglob("*.part-*")]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    line = [line for line in error.splitlines() if line.startswith("smolpost: ")]
    assert len(line) == 1 and "Traceback" not in error
    return line[0].removeprefix("smolpost: ")


BAD_FILES = {
    "missing": (None, "smoltalk2_sft.jsonl: does not exist; expected a JSONL or Parquet file"),
    "empty": ("", "smoltalk2_sft.jsonl: is empty; expected at least one row"),
    "broken": ('{"messages": [', "smoltalk2_sft.jsonl:1: is not JSON (Expecting value at column 15); expected one"),
    "columns": (
        '{"question": "1+1?", "answer": "2"}\n',
        "smoltalk2_sft.jsonl:1: has the columns question, answer; expected messages, or",
    ),
    "no assistant": (json.dumps({"messages": [USER]}) + "\n", "smoltalk2_sft.jsonl:1: messages has no assistant turn"),
    "role": (
        json.dumps({"messages": [{"role": "robot", "content": "x"}, REPLY]}) + "\n",
        "smoltalk2_sft.jsonl:1: messages[0].role is 'robot'; expected one of system, user, assistant, tool",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES, ids=list(BAD_FILES))
def test_broken_data(project, capsys, case):
    content, expected = BAD_FILES[case]
    project.file("sft").unlink() if content is None else project.file("sft").write_text(content)
    assert expected in refused(capsys, "make", *project.words, "stage=init")
    assert project.finished() == set() and project.halves() == []


def test_overlong_sample_under_refuse(project, capsys):
    cli_ok("make", *project.words, "stage=init")
    short = ["stages.sft.init_from=init", "stages.sft.max_seq_len=16", "stages.sft.overlong=refuse", "stage=sft"]
    line = refused(capsys, "prepare", *project.words, *short)
    assert "smoltalk2_sft.jsonl:" in line and "max_seq_len=16; 8 of 8 rows are too long" in line
    assert line.endswith("raise max_seq_len or set overlong to truncate, split or drop")
    assert project.finished() == {"init"} and project.halves() == []


def cli_ok(*argv: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    assert stop.value.code == 0


def test_unknown_key_and_wrong_type(project, capsys):
    assert refused(capsys, "plan", *project.words, "stages.sft.epochs=3").startswith("stages.sft.epochs is not a key")
    assert refused(capsys, "run", *project.words, "stages.sft.num_epochs=many") == (
        "stages.sft.num_epochs=many is not a number"
    )


def test_stage_before_its_parents(project, capsys):
    line = refused(capsys, "prepare", *project.words, "stage=base")
    assert line.startswith("stage init is not finished: ") and "run `smolpost run pipeline=gsm8k " in line


def test_wrong_verb_for_a_stage(project, capsys):
    assert "makes no model to evaluate" in refused(capsys, "eval", *project.words, "stage=init")
    assert "stage=soup of kind merge has no rows to prepare; training stages have" in refused(
        capsys, "prepare", *project.words, "stage=soup"
    )


def test_inspect_and_doctor_of_what_is_not_there(project, capsys, tmp_path):
    assert "nowhere" in refused(capsys, "inspect", str(tmp_path / "nowhere"))
    line = refused(capsys, "inspect", *project.words, "stage=sft")
    assert line.startswith("stage=sft has no prepared rows; `smolpost prepare pipeline=gsm8k ")
    assert "stage init is not finished" in refused(capsys, "doctor", *project.words, "stage=base")
    assert "--limit 0 is below 1" in refused(capsys, "inspect", *project.words, "stage=sft", "--limit", "0")


def test_prepared_rows_can_be_looked_at_and_checked(project, capsys, tmp_path):
    mine = [*project.words, "stages.sft.init_from=init", "stages.sft.max_seq_len=256", "stages.sft.num_workers=1"]
    cli_ok("make", *mine, "stage=init")
    cli_ok("prepare", *mine, "stage=sft")
    assert "masked tokens by reason" in capsys.readouterr().out
    cli_ok("inspect", *mine, "stage=sft", "--row", "3")
    shown = capsys.readouterr().out
    assert "smoltalk2_sft.jsonl:3" in shown and "The answer is 2.<|im_end|>" in shown
    assert "row 99" in refused(capsys, "inspect", *mine, "stage=sft", "--row", "99")
    (page := tmp_path / "page.html").write_text("mine")
    refused(capsys, "inspect", *mine, "stage=sft", "--html", str(page))
    assert page.read_text() == "mine"
    cli_ok("inspect", *mine, "stage=sft", "--html", str(tmp_path / "new.html"))
    assert "smoltalk2_sft.jsonl" in (tmp_path / "new.html").read_text()
    capsys.readouterr()
    cli_ok("doctor", *mine, "stage=sft", "--rows", "4")
    assert "no check failed" in capsys.readouterr().out
    assert "rows=0 is below 1" in refused(capsys, "doctor", *mine, "stage=sft", "--rows", "0")


def test_disk_without_space(project, tmp_path):
    """A real full disk: a file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        words = [*project.words[:3], f"run_dir={disk}", "stage=init"]
        done = subprocess.run(
            [sys.executable, "-m", "smolpost.cli", "make", *words],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        line = done.stderr.splitlines()[-1]
        assert line.startswith("smolpost: no space left on the disk of") and line.endswith("run_dir=FOLDER elsewhere")
        assert not list(disk.rglob("manifest.json")) and not list(disk.rglob("*.part-*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_plan_of_the_real_recipe_needs_no_network_and_no_gpu(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "pipeline=smollm3"])
    output = capsys.readouterr().out
    assert stop.value.code == 0
    for command in (
        "-m smolpost.train pipeline=smollm3 stage=mid",
        "-m smolpost.train pipeline=smollm3 stage=apo-43",
        "$ python merge/linear.py pipeline=smollm3 stage=merge",
    ):
        assert command in " ".join(output.split())
    assert "recipes/accelerate/zero3.yaml" in output


def test_an_evaluation_without_rows_is_refused_before_training(project, capsys):
    words = [*project.words, "data.heldout.sources.gsm8k.first_row=0", "evaluation.tasks.pairs.stages=[merge]"]
    words += ["evaluation.tasks.answer.answer_pattern='(no such words)'"]
    cli_ok("make", *words, "stage=init")
    assert refused(capsys, "run", *words, "stage=base") == (
        "evaluation.tasks.answer has nothing to measure: no row of data.heldout can be asked; change its rows, or "
        "leave the task out with ~evaluation.tasks.answer"
    )
    assert project.finished() == {"init"}


# ---------------------------------------------------------------- what is printed can be pasted


def commands(output: str) -> list[list[str]]:
    """The words of each command that was printed, as a shell reads them."""
    return [
        shlex.split(line.strip().removeprefix("$ ")) for line in output.splitlines() if line.strip().startswith("$")
    ]


def test_a_printed_command_is_the_same_words_again(project, capsys, tmp_path):
    odd = tmp_path / "my [bold]rows[/bold] :smile: $HOME"
    odd.mkdir(parents=True)
    words = [
        *project.words[:3], f"run_dir='{odd}'", "stages.sft.train_roles=[assistant,tool]", "stages.sft.lora.r=4",
        "stages.sft.lora.target_modules=[all]", f"+data.mine={{sources:{{a:{{path:'{project.file('sft')}'}}}}}}",
    ]  # fmt: skip
    cli_ok("plan", *words, "stage=sft")
    output = capsys.readouterr().out
    assert f"folder: {odd}" in output
    prepare, launch, *_ = commands(output)
    assert prepare == ["smolpost", "prepare", *words, "stage=sft"]
    assert launch[:2] == ["accelerate", "launch"] and launch[-len(words) - 1 :] == [*words, "stage=sft"]
    # Pasted into a shell, with another verb: the same plan, which the shell has left as it was.
    pasted = (
        shlex.join([sys.executable, "-m", "smolpost.cli", "plan"])
        + output.partition("$ smolpost prepare")[2].split("\n")[0]
    )
    again = subprocess.run(
        ["bash", "-c", pasted], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert again.stdout == output, again.stderr


def test_a_command_in_a_refusal_can_be_pasted(project, capsys):
    words = [*project.words, "stages.init.vocab_size=310", "stages.sft.seeds=[1]"]
    line = refused(capsys, "prepare", *words, "stage=base")
    command = shlex.split(line.split("`")[1])
    assert command == ["smolpost", "run", *words, "stage=init"]
    cli_ok(*command[1:])
    assert "init" in project.finished()
    line = refused(capsys, "inspect", *words, "stage=base")
    cli_ok(*shlex.split(line.split("`")[1])[1:])
    cli_ok("inspect", *words, "stage=base")


# ---------------------------------------------------------------- recipes of one's own and Hydra's flags


def test_a_folder_of_recipes_is_repeated_in_every_printed_command(project, capsys, tmp_path):
    own = tmp_path / "my recipes"
    (own / "pipeline").mkdir(parents=True)
    (own / "stage").mkdir()
    (own / "pipeline" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /pipeline/gsm8k\n  - _self_\npipeline: mine\n"
    )
    shipped = (ROOT / "recipes" / "stage" / "sft.yaml").read_text()
    (own / "stage" / "sft.yaml").write_text(shipped.replace("num_epochs: 5", "num_epochs: 5\nlora: {r: 4}"))
    words = ["pipeline=mine", *project.words[1:]]
    cli_ok("plan", "--recipes", str(own), *words, "stage=sft")
    output = capsys.readouterr().out
    assert f"{own}/stage/sft.yaml replaces the library's stage/sft.yaml" in output
    assert "lora.r=4" in output
    printed = commands(output)
    assert len(printed) == 3
    for command in printed:
        assert command[-len(words) - 2 :] == [f"--recipes={own}", *words, "stage=sft"]
    cli_ok("plan", *printed[0][2:])  # what prepare is given, for another verb
    assert capsys.readouterr().out == output
    line = refused(capsys, "prepare", *printed[0][2:])
    assert f"run `smolpost run '--recipes={own}' pipeline=mine" in line
    cli_ok("make", f"--recipes={own}", *words, "stage=init")
    assert project.finished() == {"init"}


def test_the_recipe_as_yaml(project, capsys):
    cli_ok("plan", *project.words, "--cfg", "job")
    written = capsys.readouterr().out
    assert "path: ${data_root}/smoltalk2_mid.jsonl" in written and "pipeline: gsm8k" in written
    cli_ok("plan", *project.words, "--cfg", "job", "--resolve")
    resolved = capsys.readouterr().out
    assert f"path: {project.file('mid')}" in resolved and "${" not in resolved


@pytest.mark.parametrize(
    ("verb", "flag", "text"),
    [
        ("plan", "-m", "-m is a flag of Hydra's own command line; a pipeline is one run; loop over the values in the"),
        ("run", "--multirun", "--multirun is a flag of Hydra's own command line; a pipeline is one run; loop over"),
        ("run", "--cfg=job", "--cfg is a flag of Hydra's own command line; smolpost plan --cfg job prints the recipe"),
        ("plan", "--info", "--info is a flag of Hydra's own command line; smolpost plan shows stages and commands,"),
        ("prepare", "--config-path=x", "--config-path is a flag of Hydra's own command line; --recipes FOLDER names"),
        ("plan", "--config-dir=nowhere", "--recipes nowhere is not a folder; name one with subfolders such as"),
        ("eval", "-cn", "-cn is a flag of Hydra's own command line; pipeline=NAME or pipeline=./FILE.yaml chooses"),
        ("plan", "--recipes=nowhere", "--recipes nowhere is not a folder; name one with subfolders such as pipeline/"),
        ("plan", "pipeline=nowhere.yaml", "pipeline=nowhere.yaml is not a file; name a YAML file, or a pipeline"),
    ],
)
def test_flags_of_hydra_and_folders_that_are_not_there(capsys, verb, flag, text):
    assert refused(capsys, verb, "pipeline=tiny", flag).startswith(text)


# ---------------------------------------------------------------- values from the environment


def test_what_comes_from_the_environment_is_shown_by_its_name(project, capsys, monkeypatch):
    """A date of the prompts and a server's address stand for all: used as they are, nowhere to be read."""
    monkeypatch.setenv("SECRET_DAY", "12 Hidden 1999")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2-token")
    monkeypatch.setenv("SMALL", "3")
    words = [
        *project.words, "stages.sft.init_from=init", "stages.sft.max_seq_len=256", "stages.sft.num_workers=1",
        "stages.sft.today='${oc.env:SECRET_DAY}'", "evaluation.server='http://me:${oc.env:SECRET_TOKEN}@host'",
        "stages.sft.logging_steps='${oc.env:SMALL}'", "stages.init.seed='${oc.env:SMALL}'", "stages.sft.seeds=[1]",
    ]  # fmt: skip
    for argv in (["plan", *words], ["plan", *words, "--cfg", "job"], ["plan", *words, "--cfg", "job", "--resolve"]):
        cli_ok(*argv)
        output = capsys.readouterr().out
        assert "Hidden" not in output and "hunter2" not in output
        assert "${oc.env:SECRET_DAY}" in output
        assert "me:${oc.env:SECRET_TOKEN}@host" in output
    cli_ok("plan", *words, "stage=sft")
    output = capsys.readouterr().out
    assert "logging_steps=${oc.env:SMALL}" in output
    assert "stages.sft.today='${oc.env:SECRET_DAY}'" in commands(output)[0]
    cli_ok("make", *words, "stage=init")
    cli_ok("prepare", *words, "stage=sft")
    output = capsys.readouterr()
    assert "Hidden" not in output.out + output.err
    files = [path for path in project.runs.rglob("*") if path.is_file()]
    assert not [path for path in files if b"Hidden" in path.read_bytes() or b"hunter2" in path.read_bytes()]
    [made] = [path for path in files if path.match("init-*/manifest.json")]
    assert json.loads(made.read_text())["config"]["seed"] == "${oc.env:SMALL}"
    line = refused(capsys, "plan", *words, "stages.sft.data='${oc.env:SECRET_TOKEN}'")
    assert line.startswith("stages.sft.data=${oc.env:SECRET_TOKEN} is not a mixture")


def test_a_cache_key_follows_the_value_not_its_name(project, monkeypatch):
    def key(*words: str) -> str:
        return Lineage(recipe.load([*project.words, *words])).stages["sft"].key

    named = "stages.sft.today='${oc.env:DAY}'"
    monkeypatch.setenv("DAY", "01 May 2025")
    assert key(named) == key("stages.sft.today='01 May 2025'")
    before = key(named)
    monkeypatch.setenv("DAY", "02 May 2025")
    assert key(named) != before
