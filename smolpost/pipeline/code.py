"""What made a result, beside what its key says: the library's code, and the versions of what it runs on.

Neither is in a key: a step declares a version of its own where its results change (`Stage.VERSION`). They are written
into the manifest, and `smolpost plan` names what has changed since.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import platform
from functools import cache
from pathlib import Path

# A recipe's values are in the key as such; messages and bars change no result.
WITHOUT_RESULT = ("schema.py", "errors.py", "progress.py", "screen.py", "signals.py")
# These import every entry, so that it registers.
REGISTERING = ("stages/__init__.py", "evaluation/tasks/__init__.py")
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "datasets", "mergekit", "trl", "smolpost")


def versions() -> dict[str, str]:
    """Name -> version of what results may depend on in their last digits."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES} | {"python": platform.python_version()}


def made_by_others(found: dict, kind: type) -> list[str]:
    """What differs, between the code and libraries that made a finished folder and those of today, in words.

    Args:
        found: Its manifest.
        kind: The stage's class.
    """
    then, now = found.get("versions", {}), versions()
    changed = [f"{name} {then[name]} -> {now[name]}" for name in now if name in then and then[name] != now[name]]
    code = found.get("code")
    return [*(["other code"] if code and code != code_version(kind) else []), *changed]


@cache
def code_version(kind: type) -> str:
    """12 hex digits of the syntax trees, without docstrings, of a stage kind's file and of all that it imports.

    Args:
        kind: The class, of the library or of a plugin.
    """
    library = Path(__file__).parent.parent
    own = Path(inspect.getfile(kind)).resolve()
    version = hashlib.sha256()
    if own.is_relative_to(library.resolve()):
        files = [library / name for name in sorted(imported(library, str(own.relative_to(library.resolve()))))]
    else:
        files = [own]
    for file in files:
        version.update(ast.dump(_without_docstrings(_tree(file))).encode())
    return version.hexdigest()[:12]


@cache
def imported(library: Path, entry: str) -> frozenset[str]:
    """Library files that an entry imports at any depth, anywhere in their code, and the entry itself."""
    found: set[Path] = set()
    todo = [library / entry]
    while todo:
        path = todo.pop()
        name = str(path.relative_to(library))
        if path not in found and name not in (*WITHOUT_RESULT, *REGISTERING):
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
