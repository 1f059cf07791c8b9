"""Another tool's YAML file as a mapping, or one line that says what is wrong with it and where."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from smolpost.errors import UserError
from smolpost.recipe.yaml_file import syntax
from smolpost.screen import shown

MAX_BYTES = 2**20  # of a file; a settings file has a few thousand
MAX_NODES = 100_000  # of a file whose aliases are written out; more is a YAML bomb


class _UniqueKeys(yaml.SafeLoader):
    """Plain YAML in which a repeated key is an error; the tools let the last one win in silence."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"found duplicate key {key.value}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


def read(file: Path) -> dict[str, Any]:
    """The file's keys and values.

    Raises:
        UserError: It is not a YAML mapping in UTF-8, has a key twice, or grows without limit when its aliases are
            written out.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{shown(file)}: has more than {MAX_BYTES:,} bytes; name a settings file")
        with open(file, encoding="utf-8-sig") as stream:
            loader = _UniqueKeys(stream)
            node = loader.get_single_node()
            _check_size(file, node)
            content = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise UserError(syntax(error)) from None
    except yaml.YAMLError as error:
        raise UserError(f"{shown(file)}: is not YAML ({str(error).splitlines()[0]})") from None
    except UnicodeDecodeError:
        raise UserError(f"{shown(file)}: is not text in UTF-8; save it as UTF-8") from None
    except RecursionError:
        raise UserError(f"{shown(file)}: is nested too deeply; name a settings file") from None
    except ValueError as error:  # of a date such as 2025-13-40
        raise UserError(f"{shown(file)}: is not YAML ({error}); quote the value") from None
    except OSError as error:
        raise UserError(f"{shown(file)}: cannot be read ({error.strerror}); name a YAML file") from None
    if content is None:
        raise UserError(f"{shown(file)}: is empty; name a settings file of TRL, alignment-handbook or Axolotl")
    if not isinstance(content, dict):
        what = "a list" if isinstance(content, list) else "a single value"
        raise UserError(f"{shown(file)}: holds {what}; a settings file holds KEY: VALUE lines")
    return {str(key): value for key, value in content.items()}


def _check_size(file: Path, node: yaml.Node | None) -> None:
    """Refuse a document that contains itself, or that aliases make huge."""
    sizes: dict[Hashable, int | None] = {}

    def size(part: yaml.Node | None) -> int:
        if not isinstance(part, yaml.CollectionNode):
            return 1
        if id(part) not in sizes:
            sizes[id(part)] = None
            pairs = part.value if isinstance(part, yaml.MappingNode) else [(item,) for item in part.value]
            sizes[id(part)] = 1 + sum(size(child) for pair in pairs for child in pair)
        found = sizes[id(part)]
        if found is None:
            raise UserError(f"{shown(file)}: an alias (*NAME) stands inside its own anchor (&NAME); write it out")
        return found

    if size(node) > MAX_NODES:
        raise UserError(f"{shown(file)}: has more than {MAX_NODES:,} values once its aliases are written out")
