"""The wheel alone, in a clean environment and outside the clone, knows the same pipelines and jobs."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_the_wheel_holds_everything_under_one_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"smolpost"}
    for folder in ("recipes", "data_gen", "merge", "smolpost"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".yaml", ".py", ".jinja"):
                inside = file.relative_to(ROOT) if folder == "smolpost" else Path("smolpost") / file.relative_to(ROOT)
                assert str(inside) in names, inside


def test_plan_runs_from_the_wheel_outside_the_clone(wheel, tmp_path):
    """A new environment with the wheel; the libraries it needs are lent by path, as installing them takes minutes."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, timeout=120)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    lent = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "lent.pth").write_text(lent + "\n")
    where = subprocess.run(
        [python, "-c", "import smolpost; print(smolpost.__file__)"], cwd=tmp_path, capture_output=True, text=True
    )
    assert where.stdout.startswith(str(site)), where.stdout
    done = subprocess.run(
        [tmp_path / "env" / "bin" / "smolpost", "plan", "pipeline=smollm3"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "pipeline smollm3: 6 stages under runs/smollm3" in text
    job = f"$ python {site.relative_to(tmp_path)}/smolpost/merge/linear.py pipeline=smollm3 stage=merge"
    assert job in text
    assert not (tmp_path / "runs").exists()
    # A recipe of the user's own, which starts from one in the wheel.
    (tmp_path / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /pipeline/smollm3\n  - _self_\npipeline: mine\n"
    )
    (tmp_path / "own" / "accelerate").mkdir(parents=True)
    (tmp_path / "own" / "accelerate" / "node.yaml").write_text("num_processes: 4\n")
    done = subprocess.run(
        [tmp_path / "env" / "bin" / "smolpost", "plan", "--config-dir", "own", "pipeline=mine", "accelerate=node"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "pipeline mine: 6 stages under runs/mine" in text
    words = "--recipes=own pipeline=mine accelerate=node stage=mid"
    assert f"--config_file own/accelerate/node.yaml -m smolpost.train {words}" in text
