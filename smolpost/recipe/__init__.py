"""YAML and command-line words in, one typed Recipe out. The only importer of hydra and omegaconf."""

import smolpost.evaluation.tasks  # noqa: F401  registers the kinds of task that a recipe may name
from smolpost.recipe.places import room
from smolpost.recipe.request import Request, as_yaml, load
from smolpost.recipe.secrets import masked

__all__ = ["Request", "as_yaml", "load", "masked", "room"]
