"""Trackers beside a training's own log, by name: what each needs, and where it writes.

All of a pipeline's runs are kept in the pipeline's folder, under the pipeline's name as the project and the stage's
folder as the run. No network is asked for unless the user's environment says so: WANDB_MODE or WANDB_API_KEY,
TRACKIO_SPACE_ID or TRACKIO_SERVER_URL. Variables that are set win over what stands here.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from smolpost.errors import UserError, Wrong
from smolpost.screen import command_line

EXTRA = "trackers"  # of pyproject.toml
MODULES = {  # name of transformers -> the module that it imports
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "clearml": "clearml",
    "swanlab": "swanlab",
    "dvclive": "dvclive",
    "codecarbon": "codecarbon",
}
OF_EXTRA = ("trackio", "wandb")


def check_names(key: str, names: list[str]) -> None:
    """
    Args:
        key: Of the stage.
    Raises:
        Wrong: There is no such tracker.
    """
    for name in names:
        if name not in MODULES:
            raise Wrong(f"{key}.report_to", f" has {name}; choose from {', '.join(MODULES)}, or [] for none")


def check_installed(key: str, names: list[str]) -> None:
    """
    Args:
        key: Of the stage.
    Raises:
        UserError: A tracker's package is not installed, with the command that installs it.
    """
    for name in names:
        if importlib.util.find_spec(MODULES[name]) is None:
            package = f"'smolpost[{EXTRA}]'" if name in OF_EXTRA else name.replace("_", "-")
            raise UserError(
                f"{key}.report_to has {name}, which is not installed; pip install {package}, or leave it out"
            )


@contextlib.contextmanager
def environment(names: list[str], folder: Path) -> Iterator[None]:
    """Let a training in this block write its curves below the pipeline's folder; a later try goes on in the same run.

    Args:
        folder: The stage's, in the pipeline's.
    """
    before = dict(os.environ)
    for name in names:
        for variable, value in _variables(name, folder.absolute()).items():
            os.environ.setdefault(variable, value)
    ended_well = False
    try:
        yield
        ended_well = True
    finally:
        if "wandb" in names and (wandb := sys.modules.get("wandb")) and wandb.run:
            wandb.finish(exit_code=0 if ended_well else 1)  # ranks end without what runs at Python's own end
        for variable in os.environ.keys() - before.keys():
            if any(variable in _variables(name, folder) for name in names):
                del os.environ[variable]


def _variables(name: str, folder: Path) -> dict[str, str]:
    root = folder.parent
    if name == "tensorboard":
        return {"TENSORBOARD_LOGGING_DIR": str(folder / "runs")}
    if name == "trackio":
        return {"TRACKIO_DIR": str(root / "trackio")}
    if name == "wandb":
        return {
            "WANDB_MODE": "online" if "WANDB_API_KEY" in os.environ else "offline",
            "WANDB_PROJECT": root.name,
            "WANDB_DIR": str(root),
            "WANDB_RUN_ID": folder.name,
            "WANDB_RESUME": "allow",
            "WANDB_CONSOLE": "off",  # the stage's log has the lines
            "WANDB_SILENT": "true",
        }
    return {}


def places(root: Path, folders: Iterable[Path]) -> list[str]:
    """Lines that say where the curves of a pipeline lie and what shows them.

    Args:
        root: The pipeline's folder.
        folders: Of the stages meant.
    """
    lines = []
    if any(True for folder in folders for _ in folder.glob("**/events.out.tfevents.*")):
        lines.append(f"training curves: `{command_line(['tensorboard', '--logdir', root])}`")
    if (root / "trackio").is_dir():
        show = command_line(["env", f"TRACKIO_DIR={root / 'trackio'}", "trackio", "show", "--project", root.name])
        lines.append(f"training curves: `{show}`")
    if any(True for _ in root.glob("wandb/offline-run-*")):
        lines.append(f"training curves: {root / 'wandb'}; `wandb sync {root / 'wandb'}/offline-run-*` uploads them")
    return lines
