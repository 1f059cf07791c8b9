"""The wheel alone, in a clean environment and outside the clone, knows the same pipelines and jobs."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from smolpost import __version__

ROOT = Path(__file__).parent.parent


EXTRAS = "deepspeed,eval,export,hygiene,serve,trackers"


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Folder with the sdist, and the wheel that was built from it: $SMOLPOST_DIST, or a new one."""
    if found := os.environ.get("SMOLPOST_DIST"):
        return Path(found).absolute()
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def wheel(dist):
    [file] = dist.glob("*.whl")
    return file


def test_the_sdist_holds_what_the_wheel_is_built_from(dist):
    [file] = dist.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "recipes/pipeline/tiny.yaml"} <= names
    assert not any(name.startswith("tests") or name.endswith(".pyc") for name in names)


def test_the_wheel_holds_everything_under_one_name(wheel):
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert f"\nVersion: {__version__}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names) and "smolpost/constraints.txt" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"smolpost"}
    for folder in ("recipes", "data_gen", "merge", "smolpost"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".yaml", ".py", ".jinja", ".txt"):
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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_empty_environment_with_all_extras(wheel, tmp_path, request):
    """Everything from the package registry, then what a new user does, in an empty folder."""
    request.addfinalizer(lambda: shutil.rmtree(tmp_path / "env"))  # gigabytes, which pytest would keep
    venv.create(tmp_path / "env", with_pip=True)
    program = tmp_path / "env" / "bin"
    (tmp_path / "empty").mkdir()

    def run(*words):
        done = subprocess.run(
            [program / words[0], *words[1:]], cwd=tmp_path / "empty", capture_output=True, text=True, timeout=900,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "200"},
        )  # fmt: skip
        if words[0] == "pip" and "No matching distribution" in done.stderr:
            pytest.skip("no package registry can be reached")
        assert done.returncode == 0, (words, done.stdout[-1500:], done.stderr[-1500:])
        return done.stdout

    constraints = ["--quiet", "--constraint", str(ROOT / "constraints.txt")]
    run("pip", "install", *constraints, "torch")
    run("pip", "install", *constraints, f"{wheel}[{EXTRAS}]")
    assert "No broken requirements" in run("pip", "check")
    assert run("smolpost", "--version") == f"{__version__}\n"
    assert "smolpost VERB" in run("smolpost", "--help")
    assert "pipeline smollm3: 6 stages" in run("smolpost", "plan", "pipeline=smollm3")
    assert "smollm3_from_release" in run("smolpost", "completion", "bash")
    found = {(f["name"], f["status"]) for f in json.loads(run("smolpost", "doctor", "--environment", "--json"))}
    assert ("packages", "ok") in found and ("torch", "ok") in found
    run("smolpost", "run", "pipeline=tiny", "stage=base", "stages.base.max_steps=2", "evaluation=none", "~stages.sweep")
    assert "# tiny base" in run("smolpost", "card", "base")
    run("smolpost", "push", "base", f"file://{tmp_path}/pushed", "--yes")
    assert (tmp_path / "pushed" / "model.safetensors").is_file()
