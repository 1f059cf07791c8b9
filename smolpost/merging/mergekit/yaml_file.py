"""Reads mergekit's YAML files: their documents and the models that they name.

mergekit ignores unknown keys; here each of them is refused by name. A document may also have `name` and `random_seed`,
which are options of mergekit's commands.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from smolpost.errors import UserError
from smolpost.merging.checkpoint import Checkpoint

# Part of the file -> its keys.
KEYS = {
    "file": (
        "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
        "tokenizer_source", "tokenizer", "chat_template", "name", "random_seed",
    ),
    "models": ("model", "parameters", "layer_range"),
    "slices": ("sources", "base_model", "parameters"),
    "sources": ("model", "layer_range", "parameters"),
    "modules": ("models", "slices", "parameters"),
    "tokenizer": ("source", "tokens", "pad_to_multiple_of"),
    "tokenizer.tokens": ("source", "force"),
    "the source of a token": ("kind", "model", "token_id", "token"),
    "a model": ("model", "lora"),
    "the path of a model": ("path",),
}  # fmt: skip
LAYOUTS = ("models", "slices", "modules")


@dataclass(frozen=True)
class Document:
    """One merge of a file.

    Attributes:
        where: The document in messages.
        config: mergekit's keys, with names for models and without the keys below; `tokenizer_source` is `tokenizer`.
        models: Name -> checkpoint of every model, in the order of the file.
        name: Later documents use the result by this name; or None.
        seed: `random_seed`, or None.
        chat_template: As stated: a name of mergekit's, "auto", a template's text, or None.
        used: The given names that the document names.
    """

    where: str
    config: dict[str, Any]
    models: dict[str, Checkpoint]
    name: str | None
    seed: int | None
    chat_template: str | None
    used: set[str]


def read_file(file: Path, named: dict[str, Path], place: Callable[[int], Path]) -> list[Document]:
    """The documents of a mergekit file, its models found under their names or as folders.

    Args:
        named: Name in the file -> folder.
        place: Number of a document, from 0 -> folder of its result, for documents that later ones name.
    Raises:
        UserError: The file cannot be read, or has a key that would be ignored; a model is missing; a name belongs to no
            model; or a document is neither the last nor named by a later one.
    """
    try:
        stated = [
            content
            for content in yaml.load_all(file.read_text(encoding="utf-8"), Loader=_UniqueKeys)
            if content is not None
        ]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"merge config {file} cannot be read ({reason(error)})") from error
    if not stated:
        raise UserError(f"merge config {file} has no merge")
    documents, made = [], {}
    for number, content in enumerate(stated):
        where = f"merge config {file}" + (f", document {number + 1}" if len(stated) > 1 else "")
        document = _document(content, named | made, where)
        if document.name in made:
            raise UserError(f"{where}: name {document.name} is that of an earlier document; choose another")
        documents.append(document)
        if number + 1 < len(stated):
            if document.name is None:
                raise UserError(
                    f"{where} has no name, so later documents cannot use its result; give it a name or put it last"
                )
            made[document.name] = place(number)
    used = set().union(*(document.used for document in documents))
    for name in sorted(named.keys() - used):
        raise UserError(f"merge config {file} names no model {name}; drop {name}={named[name]}, or correct its name")
    for name in sorted(made.keys() - used):
        raise UserError(
            f"merge config {file}: no later document names {name}, and the last one is the result; merge it in a file "
            "of its own"
        )
    return documents


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a repeated key is an error; otherwise the last one would win silently."""

    def compose_mapping_node(self, anchor):
        # Before anchors are merged into mappings (<<), where a key of the mapping's own may repeat an anchor's.
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = [key for key in keys if keys.count(key) > 1]
        if repeated:
            raise yaml.composer.ComposerError(None, None, f"key {repeated[0]} is repeated", node.start_mark)
        return node


def _document(content: Any, named: dict[str, Path], where: str) -> Document:
    _check_keys(content, "file", where)
    config = {key: value for key, value in content.items() if value is not None}
    if not isinstance(config.get("merge_method"), str) or len(config.keys() & set(LAYOUTS)) != 1:
        raise UserError(f"{where} needs merge_method and one of models, slices and modules")
    _check_structure(config, where)
    _tokenizer(config, where)
    name, seed, template = (config.pop(key, None) for key in ("name", "random_seed", "chat_template"))
    for key, value, kind in (("name", name, str), ("random_seed", seed, int), ("chat_template", template, str)):
        if value is not None and type(value) is not kind:
            raise UserError(f"{where}: {key}={value!r:.60} is not {'a whole number' if kind is int else 'a text'}")
    for key in {"dtype", "out_dtype"} & config.keys():
        config[key] = str(config[key]).removeprefix("torch.")
    models = _Models(named, where)
    config = with_models(config, models.name_of)
    return Document(where, config, models.found, name, seed, template, models.used)


def with_models(value: Any, change: Callable[[Any], Any], key: str = "") -> Any:
    """A copy of a configuration with `change(model)` in place of every model that it names.

    A mapping that a YAML anchor puts at several places is copied for each of them.
    """
    if key in ("model", "base_model") and value is not None:
        return change(value)
    if key == "source" and isinstance(value, str) and value not in ("union", "base"):
        return change(value)
    if key in ("tokens", "modules") and isinstance(value, dict):  # one of which may be called "model"
        return {name: with_models(own, change) for name, own in value.items()}
    if isinstance(value, dict):
        return {k: v if k == "parameters" else with_models(v, change, k) for k, v in value.items()}
    if isinstance(value, list):
        return [with_models(item, change) for item in value]
    return value


def entries(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every mapping of a configuration that may have parameters, inputs before what they are part of."""
    for module in config.get("modules", {}).values():
        yield from entries(module)
    yield from config.get("models") or []
    for piece in config.get("slices") or []:
        yield from piece["sources"]
        yield piece
    yield config


class _Models:
    """Names for the models of a document.

    Attributes:
        found: Name -> checkpoint, in the order in which they were asked for.
        used: The given names that were asked for.
    """

    def __init__(self, named: dict[str, Path], where: str):
        self.found: dict[str, Checkpoint] = {}
        self.used: set[str] = set()
        self._named, self._where = named, where

    def name_of(self, model: Any) -> str:
        """The name a model has in messages and in the manifest: as stated, or the last part of its folder."""
        base, adapter = self._parts(model)
        name, folder = self._folder(base)
        if adapter is None:
            return self._add(Checkpoint(name, folder), given=base in self._named)
        own, place = self._folder(adapter)
        if not (place / "adapter_config.json").exists():
            raise UserError(f"{self._where}: {adapter} in model {base}+{adapter} is not an adapter ({place})")
        return self._add(Checkpoint(f"{name}+{own}", place, adapts=folder), given=False)

    def _add(self, checkpoint: Checkpoint, *, given: bool) -> str:
        """Keep a checkpoint under its name, or another where the name is that of another one."""
        taken = set() if given else self._named.keys()
        name, number = checkpoint.name, 2
        while name in taken or not _same(self.found.get(name, checkpoint), checkpoint):
            name, number = f"{checkpoint.name}-{number}", number + 1
        self.found.setdefault(name, replace(checkpoint, name=name))
        return name

    def _parts(self, model: Any) -> tuple[str, str | None]:
        """A model and the adapter on it: MODEL+ADAPTER, or mergekit's mapping of both."""
        if isinstance(model, dict):
            _check_keys(model, "a model", self._where)
            parts = [self._path(model.get("model")), self._path(model["lora"]) if model.get("lora") else None]
            return parts[0], parts[1]
        if not isinstance(model, str):
            raise UserError(f"{self._where}: model {model!r:.60} is not the name or the folder of a checkpoint")
        if "+" not in model or model in self._named or Path(model).is_dir():
            return model, None
        base, _, adapter = model.partition("+")
        return base, adapter

    def _path(self, value: Any) -> str:
        if isinstance(value, dict):
            _check_keys(value, "the path of a model", self._where)
            value = value.get("path")
        if not isinstance(value, str):
            raise UserError(f"{self._where}: model {value!r:.60} is not the name or the folder of a checkpoint")
        return value

    def _folder(self, model: str) -> tuple[str, Path]:
        if model in self._named:
            self.used.add(model)
            return model, self._named[model]
        folder = Path(model)
        if not folder.is_dir():
            raise UserError(
                f"{self._where}: model {model} is not a folder here"
                f"{' and not one of ' + ', '.join(self._named) if self._named else ''}; download it and name its "
                f"folder in the file or as {model}=FOLDER (an adapter has a folder of its own)"
            )
        return Path(os.path.abspath(folder)).name, folder  # not `resolve`: a link's own name says more


def _same(one: Checkpoint, other: Checkpoint) -> bool:
    return [one.folder.resolve(), one.adapts] == [other.folder.resolve(), other.adapts]


def _check_keys(value: Any, part: str, where: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {part} holds {value!r:.60}, not keys and values")
    unknown = sorted(str(key) for key in value.keys() - set(KEYS[part]))
    if unknown:
        raise UserError(
            f"{where}: key {unknown[0]} in {part} is not one of {', '.join(KEYS[part])}{_elsewhere(unknown[0])}"
        )


def _elsewhere(key: str) -> str:
    """For a key in the wrong part: where it belongs."""
    from mergekit.merge_methods.registry import registered_methods

    if key in KEYS["tokenizer"]:
        return "; it belongs under tokenizer"
    parameters = {parameter.name for method in registered_methods() for parameter in method.spec.parameters}
    return "; it belongs under parameters" if key in parameters else ""


def _check_structure(config: dict[str, Any], where: str) -> None:
    """Refuse models, slices and modules that are not built as mergekit's."""
    _check_parameters(config, where)
    modules = config.get("modules", {})
    if not isinstance(modules, dict) or ("modules" in config and not modules):
        raise UserError(f"{where}: modules holds {modules!r:.60}, not modules by their names")
    for name, module in modules.items():
        _check_keys(module, "modules", where)
        if len({key for key in ("models", "slices") if module.get(key)}) != 1:
            raise UserError(f"{where}: module {name} needs one of models and slices")
        _check_structure(module, where)
    for part in ("models", "slices"):
        if config.get(part) is not None and (not isinstance(config[part], list) or not config[part]):
            raise UserError(f"{where}: {part} is not a list of at least one")
    for model in config.get("models") or []:
        _check_keys(model, "models", where)
        _check_model(model, "models", where)
    for piece in config.get("slices") or []:
        _check_keys(piece, "slices", where)
        _check_parameters(piece, where)
        if not isinstance(piece.get("sources"), list) or not piece["sources"]:
            raise UserError(f"{where}: a slice has no list of sources")
        for source in piece["sources"]:
            _check_keys(source, "sources", where)
            _check_model(source, "sources", where)


def _check_parameters(entry: dict[str, Any], where: str) -> None:
    if not isinstance(entry.get("parameters") or {}, dict):
        raise UserError(f"{where}: parameters holds {entry['parameters']!r:.60}, not parameters by their names")


def _check_model(entry: dict[str, Any], part: str, where: str) -> None:
    _check_parameters(entry, where)
    if entry.get("model") is None:
        raise UserError(f"{where}: an entry of {part} has no model")
    bounds = entry.get("layer_range")
    if part == "models" and bounds is None:
        return
    if not (isinstance(bounds, list) and len(bounds) == 2 and all(type(bound) is int for bound in bounds)):
        raise UserError(f"{where}: layer_range={bounds} is not [first layer, layer after the last]")


def _tokenizer(config: dict[str, Any], where: str) -> None:
    """Put tokenizer_source into `tokenizer`, of which it is the short form."""
    source, block = config.pop("tokenizer_source", None), config.get("tokenizer")
    if source is not None and block is not None:
        raise UserError(f"{where} has both tokenizer_source and tokenizer; keep one")
    if source is not None:
        config["tokenizer"] = {"source": source}
    if block is not None:
        _check_keys(block, "tokenizer", where)
        tokens = block.get("tokens") or {}
        if not isinstance(tokens, dict):
            raise UserError(f"{where}: tokenizer.tokens holds {tokens!r:.60}, not tokens and what they are")
        for token in tokens.values():
            _check_keys(token, "tokenizer.tokens", where)
            if isinstance(token.get("source"), dict):
                _check_keys(token["source"], "the source of a token", where)


def reason(error: Exception) -> str:
    """What an error of mergekit, pydantic or YAML says, on one line."""
    text = re.sub(r"\{.*\}", "{...}", " ".join(str(error).split()))  # mergekit puts whole configurations into errors
    return f"{type(error).__name__} {text}".strip() if isinstance(error, KeyError) or not text else text
