"""From YAML files and command-line words to one typed Recipe. Only this package imports hydra and omegaconf."""

# They register what a recipe may name.
import smolpost.data.row_shapes
import smolpost.evaluation.tasks
import smolpost.objectives.losses
import smolpost.stages
import smolpost.training.rewards  # noqa: F401
from smolpost.recipe.places import room
from smolpost.recipe.request import Request, as_yaml, load
from smolpost.recipe.secrets import masked
from smolpost.recipe.teacher import teacher

__all__ = ["Request", "as_yaml", "load", "masked", "room", "teacher"]
