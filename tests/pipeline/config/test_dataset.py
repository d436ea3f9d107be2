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
