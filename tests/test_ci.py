"""The workflow, the images and the dev container name only what exists, and run what the Makefile runs."""

import json
import re
import shlex
import tomllib

import pytest
import yaml

from smolpost import cli, recipe
from smolpost.pipeline.plan import plan, select
from tests.small import ROOT

WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
JOBS = WORKFLOW["jobs"]
TARGETS = set(re.findall(r"^([\w./-]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
DOCKERFILE = (ROOT / "Dockerfile").read_text()
CHECKOUT, LOCAL = "actions/checkout@", "./"


def runs(job: dict) -> str:
    return "\n".join(step["run"] for step in job["steps"] if "run" in step)


def make_targets(text: str) -> list[str]:
    return re.findall(r"\bmake ([\w./-]+)", text)


# ---------------------------------------------------------------- the workflow


def test_pushes_pull_requests_and_nights_run_it():
    assert set(WORKFLOW[True]) == {"push", "pull_request", "schedule", "workflow_dispatch"}  # YAML reads `on` as true
    assert WORKFLOW["permissions"] == {"contents": "read"} and WORKFLOW["concurrency"]["cancel-in-progress"] is True
    wanted = {
        "tests": {"lint", "test"},
        "demo": {"demo"},
        "docs": {"docs"},
        "wheel": {"release-check"},
        "slow": {"test-all"},
    }
    assert {name: set(make_targets(runs(job))) for name, job in JOBS.items()} == wanted
    assert set(make_targets(runs(JOBS["tests"]))) == set(make_targets((ROOT / ".ci" / "run").read_text()))
    assert "schedule" in JOBS["slow"]["if"] and all("if" not in job for name, job in JOBS.items() if name != "slow")


@pytest.mark.parametrize("name", JOBS)
def test_steps_name_what_exists(name):
    job = JOBS[name]
    assert job["runs-on"] == "ubuntu-latest" and 0 < job["timeout-minutes"] <= 360
    first, second, *_ = job["steps"]
    assert first["uses"].startswith(CHECKOUT) and second["uses"].startswith(LOCAL)
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        if (action := step.get("uses", "")).startswith(LOCAL):
            inputs = yaml.safe_load((ROOT / action / "action.yml").read_text())["inputs"]
            assert set(step.get("with", {})) <= set(inputs)
        elif action:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", action)
    assert set(make_targets(runs(job))) <= TARGETS


def test_its_commands_mean_something():
    lines = [line for job in JOBS.values() for line in runs(job).splitlines() if re.match(r"\S*bin/smolpost ", line)]
    assert len(lines) == 2
    for line in lines:
        _, verb, *words = shlex.split(line)
        assert verb == "--version" or verb in cli.VERBS
        if overrides := [word for word in words if "=" in word]:
            request = recipe.load(overrides)
            assert select(plan(request), request.stage)


def test_torch_comes_from_pytorchs_index_of_cpu_builds_and_nothing_else_is_named():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert WORKFLOW["env"]["PIP_EXTRA_INDEX_URL"] in re.findall(r"https?://\S+", DOCKERFILE)
    assert re.findall(r"https?://\S+", text) == ["https://download.pytorch.org/whl/cpu"]


def test_the_pythons_are_those_that_the_package_allows():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    versions = JOBS["tests"]["strategy"]["matrix"]["python"]
    assert required == f">={versions[0]}" and all(isinstance(version, str) for version in versions)
    setup = yaml.safe_load((ROOT / ".github" / "actions" / "python" / "action.yml").read_text())
    assert setup["inputs"]["version"]["default"] == versions[0] in DOCKERFILE
    [step] = setup["runs"]["steps"]
    assert all((ROOT / file).is_file() for file in step["with"]["cache-dependency-path"].split())


# ---------------------------------------------------------------- images


def instructions() -> list[tuple[str, str]]:
    """(instruction, its words) of the Dockerfile."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    found = [line.partition(" ") for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]
    return [(name, words.strip()) for name, _, words in found]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Name of each stage -> its instructions and those of the stages that it is built from."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, words in instructions():
        if name == "FROM":
            parent, stage = re.fullmatch(r"(\S+) AS (\w+)", words).groups()
            assert parent in found or not found
            current = found[stage] = list(found.get(parent, []))
        elif found:
            current.append((name, words))
    return found


def test_the_dockerfile_has_known_instructions_alone():
    assert {name for name, _ in instructions()} == {"ARG", "FROM", "RUN", "USER", "WORKDIR", "ENV", "COPY", "CMD"}
    assert list(stages()) == ["base", "project", "cuda", "cpu"]  # the last one is built where no target is named


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_an_image_runs_the_miniature_as_a_user_without_rights(stage):
    steps = stages()[stage]
    names = [name for name, _ in steps]
    assert steps[-1] == ("CMD", '["make", "demo"]') and steps[names.index("USER")][1] == "smolpost"
    [install] = [i for i, (name, words) in enumerate(steps) if name == "RUN" and "make .venv/demo" in words]
    assert names.index("USER") < install < len(names) - 1 - names[::-1].index("COPY")
    assert set(make_targets(" ".join(words for name, words in steps if name == "RUN"))) <= TARGETS | {"demo"}
    indexed = any("PIP_EXTRA_INDEX_URL" in words for name, words in steps if name == "ENV")
    assert indexed == (stage == "cpu")


def test_what_is_copied_exists_and_is_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [words.split()[1:-1] for name, words in instructions() if name == "COPY"]
    assert len(copied) == 4
    for source in (source for sources in copied for source in sources):
        assert (ROOT / source).exists() and source.split("/")[0] not in ignored
    needed = {"Makefile", "pyproject.toml", "setup.py", "constraints.txt", "README.md", "LICENSE"}
    assert needed <= set(copied[0])  # what `pip install --editable .` reads
    built = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    assert built - {"__pycache__"} <= set(ignored) and {".git", "**/__pycache__"} <= set(ignored)


def test_the_dev_container_is_the_images_base():
    settings = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    build, folder = settings["build"], ROOT / ".devcontainer"
    assert (folder / build["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert (folder / build["context"]).resolve() == ROOT and build["target"] in stages()
    assert ("USER", settings["remoteUser"]) in stages()[build["target"]]
    assert set(make_targets(settings["postCreateCommand"])) <= TARGETS
    assert settings["containerEnv"]["PIP_EXTRA_INDEX_URL"] == WORKFLOW["env"]["PIP_EXTRA_INDEX_URL"]
