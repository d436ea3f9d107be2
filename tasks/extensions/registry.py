"""Registries of what a recipe can name, to which installed packages add by entry points.

A package declares, for example, `[project.entry-points."firstlight.methods"]` with `mine = "package.module:MyMethod"`.
The name is then valid in recipes like one of Firstlight's own, in all processes and on all machines with the package.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from firstlight.tasks.extensions.error_text import join_error_lines

T = TypeVar("T")
# The groups of entry points, one for each registry.
GROUP_PREFIX = "firstlight."
# The registries whose entries decide results.
COMPUTING_REGISTRIES = ("methods", "tasks", "encoders", "sources")
EXTENDED_REGISTRIES = (*COMPUTING_REGISTRIES, "loggers")


@cache
def find_entry_points(registry: str) -> tuple[EntryPoint, ...]:
    """Returns the entry points that add to a registry, in the order of their names."""
    assert registry in EXTENDED_REGISTRIES
    return tuple(sorted(entry_points(group=GROUP_PREFIX + registry), key=lambda point: (point.name, point.value)))


class Registry(MutableMapping[str, T]):
    """Entries by name: Firstlight's own, then those of other packages, which are imported when an entry is asked for.

    A package that is being imported itself, and imports Firstlight, is so never asked for what it does not have yet.
    """

    def __init__(self, name: str, own: Mapping[str, T], base: type | None = None) -> None:
        """Takes `name`, one of EXTENDED_REGISTRIES, its `own` entries, and `base`, a base class of all entries."""
        self.name, self.base, self._entries, self._is_complete = name, base, dict(own), False

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            self._add_extensions()
        return self._entries[name]

    def __setitem__(self, name: str, entry: T) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._add_extensions()
        return iter(dict(self._entries))

    def __len__(self) -> int:
        self._add_extensions()
        return len(self._entries)

    def _add_extensions(self) -> None:
        """Adds the entries of other packages, once.

        One that cannot be imported, is no subclass of `base`, or has a name that is taken is left out with a warning.
        """
        if self._is_complete:
            return
        # First, as a package may ask for entries while it is imported.
        self._is_complete = True
        for point in find_entry_points(self.name):
            if point.name in self._entries:
                _warn(point, f"is left out: {point.name!r} is the name of another entry")
                continue
            try:
                found = point.load()
            # The other package may raise anything when it is imported.
            except Exception as error:
                _warn(point, f"cannot be imported: {type(error).__name__}: {join_error_lines(error)}")
                continue
            if not callable(found) or (self.base and not (isinstance(found, type) and issubclass(found, self.base))):
                wanted = f"subclass of {self.base.__name__}" if self.base else "function or class"
                _warn(point, f"is left out: it is no {wanted}")
                continue
            self._entries[point.name] = found


def _warn(point: EntryPoint, problem: str) -> None:
    package = point.dist.name if point.dist is not None else "an unknown package"
    warnings.warn(f"{point.group}: {point.name} = {point.value} of {package} {problem}", stacklevel=4)


@cache
def hash_extensions() -> str:
    """Returns a sha256 over the entry points that decide results, and the sources of their packages; "" without any.

    Results follow from this code as they do from Firstlight's.
    """
    points = [point for registry in COMPUTING_REGISTRIES for point in find_entry_points(registry)]
    if not points:
        return ""
    found = hashlib.sha256()
    for point in points:
        found.update(f"{point.group} {point.name} {point.value}\n".encode())
    for package in sorted({point.module.partition(".")[0] for point in points}):
        for file in _list_sources(package):
            found.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def _list_sources(package: str) -> list[Path]:
    """Returns the source files of a package or module, which is not imported for it."""
    spec = find_spec(package)
    if spec is None:
        return []
    if not spec.submodule_search_locations:
        return [Path(spec.origin)] if spec.origin else []
    return sorted(file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.py"))
