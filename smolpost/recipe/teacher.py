"""A teacher's file alone, outside a pipeline, for `smolpost serve`."""

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from smolpost.errors import UserError, Wrong
from smolpost.recipe.checks import check_values
from smolpost.recipe.compose import compose_file
from smolpost.recipe.places import Places
from smolpost.recipe.written import near
from smolpost.screen import shown
from smolpost.synthesis.settings import Teacher


def teacher(name: str, folders: list[str]) -> Teacher:
    """The teacher of `recipes/teacher/NAME.yaml`, or of the same file in one of the folders.

    Values that the file leaves to its user (`???`) have their defaults.

    Raises:
        UserError: There is no such file, or it does not hold a teacher.
    """
    places = Places.of(folders)
    names = places.options("teacher")
    if name not in names:
        raise UserError(
            f"{name} is neither a teacher, a finished stage nor a checkpoint folder; {near('', name, names)}"
            f"teachers: {', '.join(names)}"
        )
    file = shown(places.file(f"teacher/{name}"))
    node = compose_file("teacher", name, places)
    if not OmegaConf.is_dict(node):
        raise UserError(f"{file}: has no keys; give the teacher's model and url")
    given = {key: value for key, value in node.items_ex(resolve=False) if not OmegaConf.is_missing(node, key)}
    if unknown := [key for key in given if key not in Teacher.__dataclass_fields__]:
        fields = ", ".join(sorted(Teacher.__dataclass_fields__))
        raise UserError(
            f"{file}: {unknown[0]} is not a key of a teacher; {near('', unknown[0], Teacher.__dataclass_fields__)}"
            f"keys: {fields}"
        )
    try:
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Teacher), given))
        check_values(found, "")
    except Wrong as error:
        raise UserError(f"{file}: {error}") from None
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{file}: {key}{str(error).splitlines()[0]}") from None
    return found
