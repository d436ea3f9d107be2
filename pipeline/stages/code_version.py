"""The version of the code that decides the result of a stage, and the commit that it lies in.

A stage is done again when code changes that may change its result, and only then. So the version covers the module of
its kind and all that this module imports from Firstlight, directly or through others; it leaves out comments,
docstrings, layout, and where a module lies. A changed text of a command, a report or another kind of stage, and a moved
file, leave it as it is.
"""

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path

from firstlight.pipeline import ROOT
from firstlight.pipeline.code_cache import hash_sources, read_cached, write_cached

PACKAGE = __name__.partition(".")[0]
# The module that imports every kind of stage.
REGISTRY = "firstlight.pipeline.stages.registry"
VERSIONS_CACHE = "versions"
# The folders of the source files of this package.
SOURCE_FOLDERS = ("pipeline", "tasks")


@cache
def code_version(kind: type | None = None) -> str:
    """Returns the sha256 of the code that decides the results of a kind of stage, of all kinds together if `kind` (its
    class) is None.

    Parsing all modules takes seconds, so the version of a kind of this package is kept until a source file changes.
    """
    start = REGISTRY if kind is None else kind.__module__
    if not start.startswith(f"{PACKAGE}."):
        return _hash_modules(start)
    key = hash_sources(file for folder in SOURCE_FOLDERS for file in (ROOT / folder).rglob("*.py"))
    known = read_cached(VERSIONS_CACHE, key) or {}
    if start not in known:
        known[start] = _hash_modules(start)
        write_cached(VERSIONS_CACHE, key, known)
    return str(known[start])


def _hash_modules(start: str) -> str:
    content = sha256()
    for digest in sorted(_digest_module(module) for module in _imported_modules(start)):
        content.update(digest)
    return content.hexdigest()


def _imported_modules(start: str) -> set[str]:
    """Returns the names of a module and of all modules of this package that it imports, directly or through others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        waiting += _imports_of(module)
    return found


@cache
def _imports_of(module: str) -> tuple[str, ...]:
    """Returns the modules of this package that a module imports, also inside its functions."""
    names: set[str] = set()
    for node in ast.walk(_parse_module(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return tuple(sorted(name for name in names if name.startswith(f"{PACKAGE}.") and _source_file(name) is not None))


@cache
def _source_file(module: str) -> Path | None:
    """Returns the file of a module of this package, None if there is no such module. Modules of others have their own
    `__file__`.
    """
    path = ROOT.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def _parse_module(module: str) -> ast.Module:
    file = _source_file(module)
    if file is None:  # a kind of stage that another package or a test registers
        import importlib

        file = Path(str(importlib.import_module(module).__file__))
    return ast.parse(file.read_bytes())


@cache
def _digest_module(module: str) -> bytes:
    content = sha256()
    for part in _flatten(_parse_module(module)):
        content.update(part.encode() + b"\0")
    return content.digest()


def _flatten(node: ast.AST) -> Iterator[str]:
    """Yields what a syntax tree says, without docstrings, positions and the modules that names are imported from.

    Fields that are empty are left out: later versions of Python add such fields.
    """
    yield type(node).__name__
    for name, value in ast.iter_fields(node):
        if isinstance(node, ast.ImportFrom) and name == "module" and str(value).startswith(PACKAGE):
            continue
        items = value if isinstance(value, list) else [value]
        if name == "body" and isinstance(value, list):
            items = [item for item in items if not _is_docstring(item)]
        for item in items:
            if isinstance(item, ast.AST):
                yield name
                yield from _flatten(item)
            elif item is not None:
                yield f"{name}={item!r}"


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def git_commit() -> dict[str, str]:
    """Returns MLflow's tag of the commit that the code lies in; {} if it lies in none, or differs from that commit."""
    root = (ROOT / "pipeline").resolve().parent
    try:
        tracked = _run_git(root, "ls-files", "--", "pipeline/__init__.py")
        changed = _run_git(root, "status", "--porcelain", "--", "pipeline", "tasks")
        commit = _run_git(root, "rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit} if tracked and not changed else {}


def _run_git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
