"""Every function of the room says its types."""

import ast
from pathlib import Path

import pytest

import smolpost.chat

FILES = sorted(Path(smolpost.chat.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_arguments_and_results_are_annotated(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in given if a.annotation is None and a.arg != "self"]
            assert not bare, f"{node.name}: {bare}"
            assert node.returns or node.name == "__init__", f"{node.name} has no type of its result"
