"""Where recipe files are looked for: first in the user's folders, then in the library's own."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from smolpost.errors import UserError
from smolpost.screen import shown

ROOMS = ("recipes", "data_gen", "merge")  # folders that stand beside the library in a clone and inside it in a wheel

# That a command line chooses from beside `pipeline`.
GROUPS = ("model", "data", "evaluation", "harness", "accelerate", "teacher")
PLACED = {"stage": "stages.NAME", "teacher": "stages.NAME.teacher"}  # groups of which a pipeline has several
PACKAGE = "# @package _global_"  # the first line of a pipeline file: its keys stand at the recipe's root


def room(name: str) -> Path:
    """The folder `name` of ROOMS: beside the library in a clone, inside it in an installed wheel."""
    library = Path(__file__).parent.parent
    inside = library / name
    return inside if inside.is_dir() else library.parent / name


def own_pipelines(folders: Iterable[Path] = ()) -> dict[str, Path]:
    """Name -> file of the user's pipelines that `pipeline=NAME` finds, in the order in which they are searched.

    They are `NAME.yaml` and `pipeline/NAME.yaml` in the folders and then in the current one. Only files that begin with
    the line PACKAGE count, as other YAML files may lie there, too.
    """
    found: dict[str, Path] = {}
    for folder in (*folders, Path()):
        for file in (*sorted(folder.glob("*.yaml")), *sorted(folder.glob("pipeline/*.yaml"))):
            if file.stem not in found and _is_pipeline(file):
                found[file.stem] = file
    return found


def _is_pipeline(file: Path) -> bool:
    try:
        with open(file, encoding="utf-8", errors="replace") as opened:
            return opened.readline().strip() == PACKAGE
    except OSError:  # a folder, or not ours to read
        return False


@dataclass(frozen=True)
class Places:
    """Folders of recipe files in the order in which they are searched.

    Attributes:
        own: The user's folders; the first one that has a file wins.
        pipeline: A pipeline file outside every `pipeline` subfolder, in the first folder of `own`; or None.
        by_name: Whether the pipeline file was found by its name.
    """

    own: tuple[Path, ...]
    pipeline: Path | None = None
    by_name: bool = False

    @classmethod
    def of(cls, folders: list[str], pipeline: str | None = None) -> "Places":
        """Places for the folders of `--recipes` and a pipeline: a file, or the name of one.

        A name without a file of the user's own is left to the search in the folders.

        Raises:
            UserError: A folder or the file does not exist.
        """
        for folder in folders:
            if not Path(folder).is_dir():
                raise UserError(
                    f"--recipes {folder} is not a folder; name one with subfolders such as pipeline/ or data/"
                )
        own = [Path(folder) for folder in folders]
        if pipeline is not None and pipeline.endswith((".yaml", ".yml")):
            if not Path(pipeline).is_file():
                raise UserError(f"pipeline={pipeline} is not a file; name a YAML file, or a pipeline without .yaml")
            return cls((Path(pipeline).parent, *own), Path(pipeline))
        file = own_pipelines(own).get(pipeline)
        if file is None:
            return cls(tuple(own))
        if file.parent.name == "pipeline" and file.parent.parent in (*own, Path()):  # where the search finds it
            return cls(tuple(dict.fromkeys((*own, file.parent.parent))))
        return cls(tuple(dict.fromkeys((file.parent, *own))), file, by_name=True)

    @property
    def folders(self) -> tuple[Path, ...]:
        return (*self.own, room("recipes"))

    def file(self, name: str) -> Path | None:
        """The file that a name such as "stage/sft" stands for, or None where no folder has it."""
        if self.pipeline is not None and name == self.pipeline_name:
            return self.pipeline
        return next((f / f"{name}.yaml" for f in self.folders if (f / f"{name}.yaml").is_file()), None)

    def own_files(self) -> list[Path]:
        """The user's recipe files."""
        groups = ("pipeline", "stage", *GROUPS)
        grouped = [file for own in self.own for group in groups for file in sorted(own.glob(f"{group}/*.yaml"))]
        return [self.pipeline, *grouped] if self.pipeline else grouped

    def options(self, group: str) -> list[str]:
        """Names of a group's files."""
        names = {file.stem for folder in self.folders for file in folder.glob(f"{group}/*.yaml")}
        return sorted(names | own_pipelines(self.own).keys() if group == "pipeline" else names)

    def unusable(self, name: str) -> str | None:
        """Why a file of the user's with a pipeline's name is not found, or None where there is no such file."""
        for folder in (*self.own, Path()):
            for file in (folder / f"{name}.yaml", folder / "pipeline" / f"{name}.yaml"):
                if _is_pipeline(file):
                    where = shown(folder / "pipeline" / file.name)
                    return f"a defaults list does not find {shown(file)}; move it to {where}"
                if file.is_file():
                    return f"{shown(file)} does not begin with the line `{PACKAGE}`, as a pipeline does; add it"
        return None

    @property
    def pipeline_name(self) -> str:
        """The pipeline file's name as a defaults list needs it: the file is one folder above its group's folder."""
        return f"pipeline/../{self.pipeline.stem}"

    def shadowed(self, names: list[str]) -> list[str]:
        """A line for each of the user's files that replaces a file of the library with the same name."""
        shipped = room("recipes").resolve()
        files = {name: self.file(name) for name in dict.fromkeys(names)}
        if self.by_name:
            files[f"pipeline/{self.pipeline.stem}"] = self.pipeline
        return [
            f"{shown(file)} replaces the library's {name}.yaml"
            for name, file in files.items()
            if file is not None and not file.resolve().is_relative_to(shipped) and (shipped / f"{name}.yaml").is_file()
        ]
