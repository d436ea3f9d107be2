"""The range of levels of a store, and of one that extends another."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from firstlight.pipeline.data.images.levels import LevelCounts
from firstlight.pipeline.data.prepare.level_ranges import decide_levels
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError


def count_levels(*images: tuple[float, float]) -> LevelCounts:
    counts = LevelCounts()
    for low, high in images:
        counts.add_image(low, high)
    return counts


def make_old(levels: dict[str, tuple[float, float]], **images: Any) -> Store:
    return cast(Store, SimpleNamespace(levels=levels, images=images, path=Path("old")))


def test_set_decides_by_its_highest_level() -> None:
    counts = {"16-bit grey": count_levels((0, 1000), (3, 4000), (9, 9)), "floats": count_levels((0.0, 0.25))}
    found = decide_levels(counts, None, None)
    assert found["16-bit grey"] == {
        "black": 0.0,
        "white": 4095.0,
        "lowest": 0,
        "highest": 4000,
        "images": 3,
        "dark": 1,
        "flat": 1,
    }
    assert (found["floats"]["black"], found["floats"]["white"]) == (0.0, 0.25)
    assert decide_levels(counts, 14, None)["16-bit grey"]["white"] == 16383
    assert decide_levels({}, 12, None) == {}


def test_extended_store_keeps_its_range() -> None:
    old = make_old({"16-bit grey": (0.0, 4095.0)})
    assert decide_levels({"16-bit grey": count_levels((0, 900))}, None, old)["16-bit grey"]["white"] == 4095
    assert decide_levels({"16-bit grey": count_levels((0, 900))}, 12, old)["16-bit grey"]["white"] == 4095
    for counts, depth in ((count_levels((0, 5000)), None), (count_levels((0, 900)), 10)):
        with pytest.raises(UserError) as raised:
            decide_levels({"16-bit grey": counts}, depth, old)
        assert "dataset.extends: the images of 16-bit grey have levels 0 to" in str(raised.value)
        assert "4,095 as white" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_store_that_was_written_without_ranges_stays_without() -> None:
    old = make_old({}, modes={"I;16": 5, "RGB": 2})
    counts = {"16-bit grey": count_levels((0, 900)), "floats": count_levels((0.0, 0.25))}
    assert list(decide_levels(counts, None, old)) == ["floats"]
