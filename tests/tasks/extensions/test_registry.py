"""Installed packages add to the registries by entry points, and their code decides results as Firstlight's does."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from firstlight.tasks.downstream.task import Task
from firstlight.tasks.extensions import registry
from firstlight.tasks.extensions.registry import Registry, find_entry_points, hash_extensions
from tests.support.extension_package import ENTRY_POINTS, write_package


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose packages are installed for the test."""
    monkeypatch.syspath_prepend(tmp_path)
    for cached in (find_entry_points, hash_extensions):
        cached.cache_clear()
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("loud_extension")]:
        del sys.modules[name]
    for cached in (find_entry_points, hash_extensions):
        cached.cache_clear()


def test_entries_of_other_packages_come_after_the_own(path: Path) -> None:
    write_package(path)
    found = Registry("tasks", {"mine": Task}, Task)
    assert list(found) == ["mine", "named"]
    assert found["named"].__module__ == "loud_extension.parts"
    assert issubclass(found["named"], Task)
    assert len(found) == 2


def test_a_package_is_imported_when_an_unknown_name_is_asked_for(path: Path) -> None:
    write_package(path)
    found = Registry("encoders", {"mine": print})
    assert found["mine"] is print
    assert "loud_extension.parts" not in sys.modules
    assert "two_layers" in found
    assert "loud_extension.parts" in sys.modules


def test_without_packages_there_is_no_hash(path: Path) -> None:
    assert hash_extensions() == ""
    assert list(Registry("methods", {"mine": Task})) == ["mine"]


def test_hash_follows_the_sources_and_the_entry_points(path: Path, tmp_path: Path) -> None:
    write_package(path)
    hashes = {hash_extensions()}
    (path / "loud_extension" / "parts.py").write_text("# changed\n")
    for _ in range(2):
        hash_extensions.cache_clear()
        hashes.add(hash_extensions())
    assert len(hashes) == 2
    assert "loud_extension.parts" not in sys.modules, "the package was not imported for its hash"
    info = path / "loud_extension-1.0.dist-info" / "entry_points.txt"
    info.write_text(info.read_text().replace("squeezed =", "squeezed_more ="))
    find_entry_points.cache_clear()
    hash_extensions.cache_clear()
    assert hash_extensions() not in hashes


@pytest.mark.parametrize(
    ("entries", "module", "warning"),
    [
        ({"named": "loud_extension.parts:Missing"}, "", "cannot be imported: AttributeError: "),
        (
            {"named": "loud_extension.parts:Named"},
            "raise OSError('no\\nlicence')",
            "cannot be imported: OSError: no lic",
        ),
        ({"named": "loud_extension.parts:Named"}, "class Named: ...", "is left out: it is no subclass of Task"),
        ({"mine": "loud_extension.parts:Named"}, "Named = 3", "is left out: 'mine' is the name of another entry"),
    ],
)
def test_an_entry_that_cannot_be_used_is_left_out_with_a_warning(
    path: Path, entries: dict[str, str], module: str, warning: str
) -> None:
    write_package(path, {"tasks": entries}, module)
    found = Registry("tasks", {"mine": Task}, Task)
    with pytest.warns(UserWarning, match=r"^firstlight\.tasks: ") as seen:
        assert list(found) == ["mine"]
    assert warning in str(seen[0].message)
    assert "of loud-extension" in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(found) == ["mine"], "it is told once"


def test_groups_are_those_of_the_registries() -> None:
    assert tuple(ENTRY_POINTS) == registry.EXTENDED_REGISTRIES


def test_loggers_decide_no_results(path: Path) -> None:
    write_package(path, {"loggers": {"text": "loud_extension.parts:TextLogger"}})
    assert [point.name for point in find_entry_points("loggers")] == ["text"]
    assert hash_extensions() == ""
