"""Values that a recipe takes from the environment with ${oc.env:NAME}: used as they are, shown only by name."""

import os
import re
import sys
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from smolpost import stage_log

NAME = re.compile(r"\$\{oc\.env:\s*[\"']?(\w+)")
LEAST = 6  # characters of a text that is masked; shorter ones stand in other words, too
MARK = re.compile("\0(\\w+)\0")


def mask(config: DictConfig) -> None:
    """From now on, this process prints the names of the variables that the recipe uses instead of their values."""
    texts = {os.environ.get(name, ""): f"${{oc.env:{name}}}" for name in NAME.findall(OmegaConf.to_yaml(config))}
    names = {text: texts[text] for text in sorted(texts, key=len, reverse=True) if len(text) >= LEAST}
    stage_log.hide(names)
    for stream in ("stdout", "stderr") if names else ():
        setattr(sys, stream, _Masked(getattr(sys, stream), names))


class _Masked:
    """A stream that replaces some words by names."""

    def __init__(self, stream: TextIO, names: dict[str, str]):
        self._stream, self._names = stream, names

    def write(self, text: str) -> int:
        for hidden, name in self._names.items():
            text = text.replace(hidden, name)
        return self._stream.write(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def environment(config: DictConfig) -> dict[str, str]:
    """Full key of each value that uses the environment -> what is shown of it."""
    if not NAME.search(OmegaConf.to_yaml(config)):
        return {}
    found: dict[str, str] = {}
    _collect("", _named(config), found)
    return found


def as_yaml(config: DictConfig, *, resolve: bool) -> str:
    """The recipe as YAML; what comes from the environment stays an interpolation."""
    if not resolve:
        return OmegaConf.to_yaml(config)
    return OmegaConf.to_yaml(OmegaConf.create(_shown(_named(config))))


def masked(values: Any, key: str, environment: dict[str, str]) -> Any:
    """A copy of nested values for people to read; values from the environment are replaced by their names.

    Args:
        values: Dicts, lists and leaves.
        key: Their full key in the recipe.
    """
    if key in environment:
        return environment[key]
    if isinstance(values, dict):
        return {name: masked(value, f"{key}.{name}", environment) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [masked(value, f"{key}.{number}", environment) for number, value in enumerate(values)]
    return values


def _named(config: DictConfig) -> dict:
    """The resolved recipe without types; each environment variable is replaced by a mark with its name."""
    read = OmegaConf.create(OmegaConf.to_container(config))
    OmegaConf.register_new_resolver("oc.env", lambda name, *_: f"\0{name}\0", replace=True)
    try:
        return OmegaConf.to_container(read, resolve=True)
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shown(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return MARK.sub(r"${oc.env:\1}", value) if isinstance(value, str) else value


def _collect(key: str, value: Any, found: dict[str, str]) -> None:
    if isinstance(value, str) and MARK.search(value):
        found[key] = _shown(value)
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            _collect(f"{key}.{name}" if key else str(name), item, found)
