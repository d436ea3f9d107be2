"""Parameters of registered classes: read from the classes once, then from the cache until `tasks` changes."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge

from firstlight.pipeline.code_cache import read_cached
from firstlight.pipeline.config.schemas import entries as module
from firstlight.pipeline.config.schemas.entries import describe_registries, describe_registry, load_entries, read_fact
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.nn.encoders import ENCODERS
from firstlight.tasks.pretrain import METHODS


class Toy:
    """Does little.

    `size`: the side.
    `mode`: the way.
    """

    name_of_measure = ("a", "b")

    def __init__(self, encoder: object, *, size: Annotated[int, Ge(1)] = 2, mode: Literal["x", "y"]) -> None:
        pass


def test_parameters_have_types_meanings_and_defaults() -> None:
    assert describe_registry({"toy": Toy}, {}, ("name_of_measure",)) == {
        "toy": {
            "text": Toy.__doc__,
            "parameters": {
                "size": {"type": {"bounded": "int", "bounds": {"ge": 1}}, "meaning": "The side.", "default": 2},
                "mode": {"type": {"choices": ["x", "y"]}, "meaning": "The way."},
            },
            "facts": {"name_of_measure": ("a", "b")},
        }
    }


def test_parameter_of_another_type_is_named() -> None:
    def shrink(*, file: Path) -> None:
        pass

    with pytest.raises(TypeError, match=r"shrink: file: the type .*Path.* cannot be that of a key of a recipe"):
        describe_registry({"shrink": shrink}, {})


def test_every_entry_and_its_facts_are_known() -> None:
    found = load_entries()
    assert list(found["methods"]) == list(METHODS)
    assert list(found["tasks"]) == list(TASKS)
    assert list(found["encoders"]) == list(ENCODERS)
    for name, method in METHODS.items():
        assert read_fact("methods", name, "image_metrics") == method.image_metrics
        assert read_fact("methods", name, "reported_metrics") == method.reported_metrics
        assert list(found["methods"][name]["parameters"]) == list(method.complete_parameters({}))
    for name, task in TASKS.items():
        assert read_fact("tasks", name, "measure") == task.measure


def test_entries_are_cached_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_has_torch", lambda: False)
    fresh: Any = load_entries.__wrapped__
    expected = describe_registries()
    assert fresh() == expected
    monkeypatch.setattr(module, "describe_registries", lambda: {"read": "again"})
    assert fresh() == expected
    monkeypatch.setattr(module, "hash_sources", lambda files, *versions: "f" * 64)
    assert fresh() == {"read": "again"}
    assert read_cached(module.PARAMETERS_CACHE, "f" * 64) == {"read": "again"}
