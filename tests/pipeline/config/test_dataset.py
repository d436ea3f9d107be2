"""The section `dataset`: sources and the keys that they need."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from firstlight.pipeline.config.dataset import DatasetOptions

CROP = [{"op": "center_crop"}]


def options(**keys: Any) -> DatasetOptions:
    return DatasetOptions.model_validate(
        {"name": "own", "train_augment": tuple(CROP), "eval_augment": tuple(CROP), **keys}
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "digits", "root": "/data"}, "'digits' takes no dataset.root"),
        ({"source": "folder"}, "'folder' takes dataset.root"),
        ({"source": "list"}, "'list' takes dataset.list"),
        ({"source": "folder", "root": "/data", "list": "a.csv"}, "'folder' takes no dataset.list"),
        ({"source": "folder", "root": "/data", "annotations": ("boxes",)}, "takes no dataset.annotations; valid: null"),
        ({"source": "voc", "root": "/data", "annotations": ("mask", "boxes")}, "mask only alone"),
        ({"source": "voc", "root": "/data", "annotations": ("boxes", "boxes")}, "each may occur once"),
        ({"source": "voc", "root": "/data", "annotations": ("points",)}, "annotations"),
        (
            {"source": "folder", "root": "/data", "mask_values": {"a": 0, "b": 1}},
            "takes no dataset.mask_values; valid: \\{\\}",
        ),
        ({"source": "folder", "root": "/data", "annotated_orientation": "stored"}, "takes no dataset.annotated_or"),
        ({"source": "voc", "root": "/data", "mask_values": {"a": 0, "b": 65536}}, "65536 is no value of a mask"),
        ({"source": "voc", "root": "/data", "mask_values": {"a": 0, "b": -1}}, "-1 is no value of a mask"),
        ({"source": "voc", "root": "/data", "mask_values": {"a": 0, "b": "red"}}, "'red' is no value of a mask"),
        ({"source": "voc", "root": "/data", "mask_values": {"a": 0, "b": "#ff0000"}}, "mixes numbers and colours"),
        ({"source": "voc", "root": "/data", "mask_values": {"a": [0, 1], "b": 1}}, "1 stands twice"),
        ({"source": "voc", "root": "/data", "mask_values": {"a": 0, "void": 1}}, "at least two classes"),
        ({"source": "voc", "root": "/data", "mask_values": {"a": 0, "b": []}}, "at least two classes"),
        ({"source": "folder", "root": "/data", "depth": 7}, "depth"),
        ({"source": "folder", "root": "/data", "depth": 33}, "depth"),
    ],
)
def test_source_rejects_keys_that_it_cannot_use(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        options(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"source": "digits"},
        {"source": "folder", "root": "/data"},
        {"source": "list", "list": "a.csv"},
        {"source": "list", "list": "a.csv", "root": "/data"},
        {"source": "voc", "root": "/data", "annotations": ("boxes", "present")},
        {"source": "voc", "root": "/data", "annotations": ()},
    ],
)
def test_source_takes_the_keys_that_it_needs(keys: dict[str, Any]) -> None:
    assert options(**keys).source == keys["source"]


def test_home_is_expanded_in_locations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = options(source="list", list="~/a.csv", root="~", extends="~/store")
    assert (found.list, found.root, found.extends) == (f"{tmp_path}/a.csv", str(tmp_path), f"{tmp_path}/store")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"train": "a", "test": ["b", "c"]}, {"train": ("a",), "test": ("b", "c")}),
        ({"train": [0, 1], "val": 2}, {"train": ("0", "1"), "val": ("2",)}),
        ({"train": "a", "test": None}, {"train": ("a",)}),
        ({}, {}),
        (None, None),
    ],
)
def test_splits_are_lists_of_names(given: Any, found: Any) -> None:
    assert options(source="folder", root="/data", splits=given).splits == found


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"splits": {"trian": "a"}}, "'trian' is no split; valid: train, val, test"),
        ({"splits": {"train": [{}]}}, "splits.train"),
        ({"encoding": "latin-99"}, "'latin-99' is no encoding that Python knows"),
        ({"delimiter": ";;"}, "at most 1 character"),
        ({"fingerprint": "none"}, "'sample' or 'content'"),
        ({"label_case": "upper"}, "'keep' or 'lower'"),
        ({"encoding": "cp1252"}, "'folder' takes no dataset.encoding; valid: leave it out, or source: list"),
        ({"source": "cifar10", "splits": {}}, "'cifar10' takes no dataset.splits"),
        ({"source": "parquet", "follow_links": True}, "'parquet' takes no dataset.follow_links"),
    ],
)
def test_invalid_ways_of_reading_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        options(**{"source": "folder", "root": "/data", **keys})


def test_list_takes_several_labels() -> None:
    assert options(source="list", list="a.csv", annotations=("present",)).annotations == ("present",)
    with pytest.raises(ValidationError, match=r"'list' takes no dataset\.annotations"):
        options(source="list", list="a.csv", annotations=("boxes",))


def test_values_of_masks_are_lists_in_the_order_of_the_classes() -> None:
    found = options(source="voc", root="/data", mask_values={"cell": 255, "background": [0, 7], "void": 3}).mask_values
    assert list(found.items()) == [("cell", (255,)), ("background", (0, 7)), ("void", (3,))]
    colours = {"a": "#000000", "b": ["#ff0000", "#00ff00"]}
    assert options(source="voc", root="/data", mask_values=colours).mask_values["b"] == ("#ff0000", "#00ff00")
