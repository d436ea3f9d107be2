"""Data sets as the library `datasets` has them in memory, to be saved as it saves them."""

from typing import Any

import pytest

from tests.support.image_sources import make_png

CLASS_NAMES = ["cat", "dog", "owl"]


def make_dataset(images: list[bytes], labels: list[int] | None = None) -> Any:
    """Returns a data set with an Image feature, and a ClassLabel if there are labels."""
    datasets = pytest.importorskip("datasets")
    columns: dict[str, Any] = {"image": [{"bytes": data, "path": f"{k}.png"} for k, data in enumerate(images)]}
    features = {"image": datasets.Image()}
    if labels is not None:
        columns["label"], features["label"] = labels, datasets.ClassLabel(names=CLASS_NAMES)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def make_images(count: int, first: int = 0) -> list[bytes]:
    return [make_png(k) for k in range(first, first + count)]
