"""The installation and the machine, before anything runs: what is there, what will be slow, and why.

Nothing here needs an installation that works: what cannot be imported is a finding. Nothing asks the network unless
the caller wants it.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from smolpost import __version__
from smolpost.doctor import machine
from smolpost.doctor.finding import Finding, looked_at

STYLES = {"ok": "green", "note": "cyan", "slow": "yellow", "fail": "bold red"}
HUB_TIMEOUT = 10  # seconds
EXTRAS = ("deepspeed", "eval", "export", "gguf", "hygiene", "serve", "trackers")  # for users; others build docs, tests


def examine(run_dir: Path, *, network: bool = False) -> list[Finding]:
    """Look at everything, in a few seconds.

    Args:
        run_dir: Where runs go; need not exist.
        network: Also ask whether the Hub answers.
    """
    looks = {
        "python": python,
        "packages": packages,
        "extras": extras,
        "torch": machine.devices,
        "attention": machine.attention,
        "cores": machine.cores,
        "memory": machine.memory,
        "disk": lambda: machine.disks(run_dir),
        "/dev/shm": machine.shared_memory,
        "compiler": compiler,
        "accelerate": accelerate,
        "hub": lambda: hub(network),
    }
    return [finding for name, look in looks.items() for finding in looked_at(name, look)]


def python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata("smolpost")["Requires-Python"]
    value = f"{platform.python_version()} on {platform.system()} {platform.machine()}, smolpost {__version__}"
    if platform.python_version() in SpecifierSet(wanted):
        yield Finding("ok", "python", value)
    else:
        yield Finding("fail", "python", f"{value}; smolpost needs {wanted}", "make an environment with such a Python")


def packages() -> Iterator[Finding]:
    """What smolpost needs, against the ranges of its metadata and the versions that it was tested with."""
    tested, others, number = _tested(), [], 0
    for requirement in _requirements():
        number += 1
        installed = _version(requirement.name)
        if installed is None:
            yield Finding("fail", requirement.name, "not installed", f"pip install '{requirement}'")
        elif not requirement.specifier.contains(installed, prereleases=True):
            value = f"{installed} is not in the range {requirement.specifier}"
            yield Finding("fail", requirement.name, value, f"pip install '{requirement}'")
        elif (known := tested.get(_plain(requirement.name))) and installed.partition("+")[0] != known:
            others.append(f"{requirement.name} {installed} ({known})")
    if others:
        remedy = f"if results differ: pip install -c {_constraints()} smolpost"
        yield Finding("note", "packages", f"other versions than the tested (in brackets): {', '.join(others)}", remedy)
    else:
        yield Finding("ok", "packages", f"{number} required, all in their ranges and in the tested versions")


def extras() -> Iterator[Finding]:
    """Which of the optional parts are complete."""
    complete, lacking = [], {}
    for extra in EXTRAS:
        missing = [r.name for r in _requirements(extra) if _version(r.name) is None]
        if missing:
            lacking[extra] = missing
        else:
            complete.append(extra)
    if complete:
        yield Finding("ok", "extras", ", ".join(complete))
    if lacking:
        value = "; ".join(f"{extra} (lacks {', '.join(missing)})" for extra, missing in lacking.items())
        yield Finding("note", "extras", f"not installed: {value}", f"pip install 'smolpost[{','.join(lacking)}]'")


def _requirements(extra: str = ""):
    """The requirements of smolpost itself, or those that an extra adds."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, importlib.metadata.requires("smolpost")):
        of_extra = "extra" in str(requirement.marker)
        if of_extra != bool(extra) or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        requirement.marker = None
        yield requirement


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _constraints() -> Path:
    from smolpost.recipe.places import room

    return room("recipes").parent / "constraints.txt"


def _tested() -> dict[str, str]:
    """Package -> the version that smolpost was tested with."""
    lines = _constraints().read_text().splitlines() if _constraints().is_file() else []
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {_plain(name): version for name, version in pins}


def compiler() -> Iterator[Finding]:
    """What DeepSpeed compiles its kernels with when a run first uses them."""
    if _version("deepspeed") is None:
        yield Finding("ok", "deepspeed", "not installed; only accelerate=zero2 and zero3 need it")
        return
    from shutil import which

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    missing = [name for name in ("c++", "ninja") if which(name, path=path) is None]
    cuda = os.environ.get("CUDA_HOME") or which("nvcc")
    if machine.has_cuda() and not cuda:
        missing.append("nvcc (the CUDA toolkit, or CUDA_HOME)")
    if missing:
        remedy = "install them, or train with accelerate=ddp or fsdp2, which compile nothing"
        yield Finding("note", "deepspeed", f"cannot compile its kernels without {', '.join(missing)}", remedy)
    else:
        yield Finding("ok", "deepspeed", f"{_version('deepspeed')}, with a compiler and ninja")


def accelerate() -> Iterator[Finding]:
    """Settings of accelerate that come from elsewhere than the recipes."""
    variables = sorted(name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "DEEPSPEED_")))
    if variables:
        remedy = "unset them unless they are meant: they add to the recipe's accelerate file"
        yield Finding("note", "accelerate", f"the environment sets {', '.join(variables)}", remedy)
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    file = home / "accelerate" / "default_config.yaml"
    if file.is_file():
        yield Finding("ok", "accelerate", f"{file} is not used; accelerate=NAME chooses a file of recipes/accelerate")
    elif not variables:
        yield Finding("ok", "accelerate", "no settings beside the recipes'")


def hub(ask: bool) -> Iterator[Finding]:
    """Whether this user can reach the Hub, as far as it can be known without asking it."""
    from huggingface_hub import constants, get_token

    login = "with a token" if get_token() else "without a token (HF_TOKEN), which gated and private names need"
    if constants.HF_HUB_OFFLINE:
        yield Finding("note", "hub", f"offline, as HF_HUB_OFFLINE asks; {login}", "unset it to fetch models and data")
    elif not ask:
        yield Finding("ok", "hub", f"{constants.ENDPOINT} was not asked (--network asks); {login}")
    else:
        import httpx2

        try:
            code = httpx2.head(constants.ENDPOINT, timeout=HUB_TIMEOUT, follow_redirects=True).status_code
        except httpx2.HTTPError as error:
            remedy = "check the network and HTTPS_PROXY, or fetch elsewhere and set HF_HUB_OFFLINE=1"
            yield Finding("fail", "hub", f"{constants.ENDPOINT} does not answer ({type(error).__name__})", remedy)
        else:
            yield Finding("ok", "hub", f"{constants.ENDPOINT} answers (HTTP {code}); {login}")


def exit_code(found: list[Finding]) -> int:
    """1 if something does not run, else 0."""
    return int(any(finding.status == "fail" for finding in found))


def report(found: list[Finding]) -> Group:
    """A line for each finding, the remedy under it, and the verdict."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found:
        table.add_row(Text(finding.status, STYLES[finding.status]), Text(finding.name), Text(finding.value))
        if finding.remedy:
            table.add_row("", "", Text(f"remedy: {finding.remedy}", "italic"))
    slow = [finding.name for finding in found if finding.status == "slow"]
    failed = [finding.name for finding in found if finding.status == "fail"]
    verdict = f"does not run: {', '.join(failed)}" if failed else "nothing stands in the way of a run"
    if slow:
        verdict += f"; slow: {', '.join(slow)}"
    return Group(table, Text(verdict, "bold"))
