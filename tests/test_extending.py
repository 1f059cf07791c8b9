"""docs/extending.md: its examples are the plugins of a folder outside the clone, and they run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small import environment, sum_rows

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
MODULES = {name: code for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, flags=re.S)}
[RECIPE] = re.findall(r"```yaml\n(# @package _global_\n# mine.yaml\n.*?)```", PAGE, flags=re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A user's folder: five modules, a pipeline file, two data files."""
    folder = tmp_path_factory.mktemp("my-work")
    for name, code in MODULES.items():
        (folder / name).write_text(code)
    (folder / "mine.yaml").write_text(RECIPE)
    rows = sum_rows(24, seed=0)
    faq = [{"question": row["prompt"], "answers": ["?", row["chosen"][-1]["content"]], "best": 1} for row in rows]
    pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    for name, content in (("faq", faq), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def smolpost(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "smolpost.cli", *words, "pipeline=./mine.yaml", "data_root=."]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)


def test_each_example_is_short():
    assert set(MODULES) == {"faq_rows.py", "hinge_loss.py", "early_answer.py", "reply_length.py", "short_rows.py"}
    assert all(len(code.splitlines()) < 60 for code in MODULES.values())


def test_the_examples_run(folder):
    done = smolpost(folder, "run")
    assert done.returncode == 0, done.stderr + done.stdout
    manifests = {}
    for file in (folder / "runs" / "mine").glob("*/manifest.json"):
        content = json.loads(file.read_text())
        manifests[content["stage"]] = content
    assert set(manifests) == {"short", "init", "sft", "apo", "grpo"}
    assert manifests["short"]["report"] == {"rows": 24, "short": 12}  # those without a think block
    assert manifests["sft"]["report"]["data"]["sources"]["faq"]["rows_read"] == 12
    assert manifests["apo"]["report"]["loss_first"] == pytest.approx(0.5, abs=1e-6)  # the margin: hinge's at_reference
    assert "rewards/early_answer/mean" in manifests["grpo"]["report"]["log"][0]
    [scores] = (folder / "runs" / "mine" / "evaluations").glob("apo-*/length-*/scores.json")
    assert set(json.loads(scores.read_text())["scores"]) == {"tokens", "cut"}
    again = smolpost(folder, "plan")
    assert again.stdout.count("): done") == 5, again.stdout


def test_a_version_makes_again_what_hangs_on_it_and_words_do_not(folder):
    """Each by the keys of the folders that a plan names."""

    def folders() -> dict[str, str]:
        done = smolpost(folder, "plan")
        assert done.returncode == 0, done.stderr
        return dict(re.findall(r"folder: \S*/(short|init|sft|apo|grpo)-(\w+)", done.stdout))

    def changed(module: str, old: str, new: str) -> set[str]:
        before = folders()
        code = (folder / module).read_text()
        assert old in code
        (folder / module).write_text(code.replace(old, new))
        after = folders()
        (folder / module).write_text(code)
        return {name for name in before if before[name] != after[name]}

    assert changed("short_rows.py", "VERSION = 1", "VERSION = 2") == {"short", "sft", "apo", "grpo"}
    assert changed("hinge_loss.py", "VERSION = 1", "VERSION = 2") == {"apo"}
    assert changed("early_answer.py", "VERSION = 1", "VERSION = 2") == {"grpo"}
    assert changed("faq_rows.py", "version=1", "version=2") == {"short", "init", "sft", "apo", "grpo"}
    assert changed("short_rows.py", '"short": len(short)', '"kept": len(short)') == set()


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (None, "plugins: there is no module broken; put its file beside the pipeline file"),
        ("import nonsense_that_is_not_there\n", "broken imports nonsense_that_is_not_there, which is not installed"),
        ("x = 1 +\n", "broken cannot be imported (SyntaxError: invalid syntax"),
        ("1 / 0\n", "broken cannot be imported (ZeroDivisionError: division by zero; broken.py, line 1)"),
        (
            "from smolpost.objectives.losses import Sigmoid, loss\n@loss('sigmoid')\nclass Mine(Sigmoid):\n    pass\n",
            "broken adds the preference loss sigmoid, which smolpost.objectives.losses has added; choose another name",
        ),
        (
            "from smolpost.objectives.losses import Loss, loss\n@loss('mine')\nclass Mine(Loss):\n"
            "    def values(self, chosen, rejected, beta, lengths):\n        return chosen\n",
            "broken.Mine has no method at_reference; define it",
        ),
        (
            "from smolpost.stages.base import Stage, stage_kind\n@stage_kind\nclass Mine(Stage):\n"
            "    kind: str = 'mine'\n    size: int = 3\n",
            "broken.Mine is not a dataclass; put @dataclass right above the class",
        ),
    ],
)
def test_a_module_that_cannot_be_used_is_one_line(tmp_path, code, line):
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("plugins: [", "plugins: [broken, "))
    for name, content in MODULES.items():
        (tmp_path / name).write_text(content)
    if code is not None:
        (tmp_path / "broken.py").write_text(code)
    done = smolpost(tmp_path, "plan")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("smolpost: mine.yaml: plugins: ") and line in done.stderr
