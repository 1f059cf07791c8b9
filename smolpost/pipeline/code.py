"""Which version of the library's code a step runs: its entry files and all they import, comments apart."""

import ast
import hashlib
from functools import cache
from pathlib import Path

# A recipe's values are in the key as such; messages and bars change no result.
WITHOUT_RESULT = ("schema.py", "errors.py", "progress.py", "screen.py", "signals.py")


@cache
def code_version(*entries: str) -> str:
    """12 hex digits of the syntax trees of the entries and of all library files they import, without docstrings.

    Args:
        entries: Files relative to smolpost/, e.g. "data/packing.py".
    """
    library = Path(__file__).parent.parent
    version = hashlib.sha256()
    for name in sorted(set().union(*(imported(library, entry) for entry in entries))):
        version.update(ast.dump(_without_docstrings(_tree(library / name))).encode())
    return version.hexdigest()[:12]


@cache
def imported(library: Path, entry: str) -> frozenset[str]:
    """Library files that an entry imports at any depth, anywhere in their code, and the entry itself."""
    found: set[Path] = set()
    todo = [library / entry]
    while todo:
        path = todo.pop()
        if path not in found and path.name not in WITHOUT_RESULT:
            found.add(path)
            todo += [path.parent / "__init__.py", *_imports(library, path)]  # a package runs before its modules
    return frozenset(str(path.relative_to(library)) for path in found if path.is_file())


@cache
def _imports(library: Path, path: Path) -> tuple[Path, ...]:
    files = []
    for node in ast.walk(_tree(path)) if path.is_file() else ():
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == library.name:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith(f"{library.name}.")]
        else:
            continue
        modules = [library.parent / name.replace(".", "/") for name in names]
        files += [f for module in modules for f in (module.with_suffix(".py"), module / "__init__.py") if f.is_file()]
    return tuple(files)


@cache
def _tree(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            node.body = body[1:] or [ast.Pass()]
    return tree
