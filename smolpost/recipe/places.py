"""Where recipe files are looked for: first in the user's folders, then in the library's own."""

from dataclasses import dataclass
from pathlib import Path

from smolpost.errors import UserError
from smolpost.screen import shown

ROOMS = ("recipes", "data_gen", "merge")  # folders that stand beside the library in a clone and inside it in a wheel

# That a command line chooses from beside `pipeline`.
GROUPS = ("model", "data", "evaluation", "harness", "accelerate", "teacher")
PLACED = {"stage": "stages.NAME", "teacher": "stages.NAME.teacher"}  # groups of which a pipeline has several


def room(name: str) -> Path:
    """The folder `name` of ROOMS: beside the library in a clone, inside it in an installed wheel."""
    library = Path(__file__).parent.parent
    inside = library / name
    return inside if inside.is_dir() else library.parent / name


@dataclass(frozen=True)
class Places:
    """Folders of recipe files in the order in which they are searched.

    Attributes:
        own: The user's folders; the first one that has a file wins.
        pipeline: A pipeline file outside every `pipeline` subfolder, in the first folder of `own`; or None.
    """

    own: tuple[Path, ...]
    pipeline: Path | None

    @classmethod
    def of(cls, folders: list[str], pipeline: str | None) -> "Places":
        """Places for the folders of `--recipes` and a pipeline that is named by its file.

        Raises:
            UserError: A folder or the file does not exist.
        """
        for folder in folders:
            if not Path(folder).is_dir():
                raise UserError(
                    f"--recipes {folder} is not a folder; name one with subfolders such as pipeline/ or data/"
                )
        if pipeline is not None and not Path(pipeline).is_file():
            raise UserError(f"pipeline={pipeline} is not a file; name a YAML file, or a pipeline without .yaml")
        own = [Path(folder) for folder in folders]
        if pipeline is not None:
            own.insert(0, Path(pipeline).parent)
        return cls(tuple(own), Path(pipeline) if pipeline is not None else None)

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
        return sorted({file.stem for folder in self.folders for file in folder.glob(f"{group}/*.yaml")})

    @property
    def pipeline_name(self) -> str:
        """The pipeline file's name as a defaults list needs it: the file is one folder above its group's folder."""
        return f"pipeline/../{self.pipeline.stem}"

    def shadowed(self, names: list[str]) -> list[str]:
        """A line for each of the user's files that replaces a file of the library with the same name."""
        shipped = room("recipes")
        files = {name: self.file(name) for name in dict.fromkeys(names)}
        return [
            f"{shown(file)} replaces the library's {name}.yaml"
            for name, file in files.items()
            if file is not None and not file.is_relative_to(shipped) and (shipped / f"{name}.yaml").is_file()
        ]
