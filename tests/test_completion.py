"""The script of `smolpost completion bash`, asked as bash asks it at a TAB."""

import shutil
import subprocess

import pytest

from smolpost import recipe
from smolpost.cli import VERBS, main

ASK = """source "$1"; shift
COMP_LINE="$1" COMP_POINT=${#1}; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_smolpost 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    if shutil.which("bash") is None:
        pytest.skip("bash is not here")
    file = tmp_path_factory.mktemp("completion") / "smolpost.bash"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        lines = []
        patch.setattr("builtins.print", lines.append)
        main(["completion", "bash"])
    assert end.value.code == 0
    file.write_text("\n".join(lines))
    return file


def completed(script, line: str, *words: str) -> list[str]:
    """What bash gets for a line.

    Args:
        words: As bash splits it: at spaces and before and after "=". The last one is to be completed.
    """
    done = subprocess.run(
        ["bash", "-c", ASK, "bash", str(script), line, *words], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.split()


def test_verbs_and_options(script):
    assert set(completed(script, "smolpost ", "smolpost", "")) == {*VERBS}
    assert completed(script, "smolpost pus", "smolpost", "pus") == ["push"]
    assert completed(script, "smolpost plan --re", "smolpost", "plan", "--re") == ["--recipes", "--resolve"]
    assert "--environment" in completed(script, "smolpost doctor --", "smolpost", "doctor", "--")


def test_words(script):
    assert completed(script, "smolpost plan pip", "smolpost", "plan", "pip") == ["pipeline="]
    pipelines = completed(script, "smolpost run pipeline=", "smolpost", "run", "pipeline", "=")
    assert {"tiny", "smollm3", "gsm8k"} <= set(pipelines)
    line = "smolpost run pipeline=smollm3_f"
    assert completed(script, line, "smolpost", "run", "pipeline", "=", "smollm3_f") == ["smollm3_from_release"]
    assert completed(script, "smolpost run model=t", "smolpost", "run", "model", "=", "t") == ["tiny"]


def test_stages_are_those_of_the_pipeline(script):
    words = ["smolpost", "run", "pipeline", "=", "tiny", "stage", "="]
    found = completed(script, "smolpost run pipeline=tiny stage=", *words)
    assert found == list(recipe.load(["pipeline=tiny"]).recipe.stages)
    words = ["smolpost", "run", "pipeline", "=", "smollm3", "stage", "=", "s"]
    assert completed(script, "smolpost run pipeline=smollm3 stage=s", *words) == ["sft", "soup"]
    assert "traces" in completed(script, "smolpost run stage=t", "smolpost", "run", "stage", "=", "t")


def test_files_of_the_user(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "mine.txt").write_text("")
    line = "smolpost plan pipeline=./mi"
    assert completed(script, line, "smolpost", "plan", "pipeline", "=", "./mi") == ["./mine.yaml"]
    line = "smolpost plan pipeline=mi"
    assert completed(script, line, "smolpost", "plan", "pipeline", "=", "mi") == ["mine"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_the_same_names(shell, capsys):
    with pytest.raises(SystemExit):
        main(["completion", shell])
    text = capsys.readouterr().out
    assert "smollm3_from_release" in text and "heldout_pairs" in text and "--environment" in text.replace("-l ", "--")
    assert shell != "zsh" or '"*:key\\=value:_smolpost_words"' in text  # each of the words, not the first alone
    if program := shutil.which(shell):
        subprocess.run([program, "-n", "/dev/stdin"], input=text, text=True, check=True, timeout=60)


def test_a_shell_that_is_not_known(capsys):
    with pytest.raises(SystemExit) as end:
        main(["completion", "cmd"])
    assert end.value.code == 2 and "invalid choice: 'cmd'" in capsys.readouterr().err
