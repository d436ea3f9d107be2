"""The digits of scikit-learn."""

import numpy as np

from firstlight.pipeline.data.images import decode_rgb
from firstlight.pipeline.data.sources import SourcePart, open_source
from tests.support.image_sources import dataset_options


def test_digits_are_those_of_scikit_learn() -> None:
    source = open_source(dataset_options(source="digits"))
    assert (source.splits, source.classes) == ({"train": 1797}, tuple("0123456789"))
    first = next(iter(source.read(SourcePart("train", 0, 1))))
    assert (first.path, first.label) == ("0", 0)
    from sklearn.datasets import load_digits

    expected = np.rint(load_digits().images[0] * 255 / 16)
    np.testing.assert_array_equal(decode_rgb(first.data or b"")[:, :, 0], expected)
    assert [record.label for record in source.read(SourcePart("train", 100, 5))] == load_digits().target[
        100:105
    ].tolist()
    assert open_source(dataset_options(source="digits")).fingerprint == source.fingerprint


def test_test_split_has_fraction_of_each_digit() -> None:
    source = open_source(dataset_options(source="digits", test_fraction=0.2))
    test = source.labels[source.rows["test"]]
    assert source.splits == {"train": 1797 - len(test), "test": len(test)}
    np.testing.assert_array_equal(np.bincount(test), np.floor(np.bincount(source.labels) * 0.2 + 0.5))
