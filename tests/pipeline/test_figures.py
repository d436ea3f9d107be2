"""What reaches the pictures: maps, classes, filters."""

import numpy as np

from pipeline import figures


def test_maps_side_by_side_have_the_points_of_each_class() -> None:
    labels = np.array([0, 1, 1, -1])
    points = np.arange(8.0).reshape(4, 2)
    figure = figures.embedding_map({"a": (points, ("x", "y")), "b": (-points, ("x", "y"))}, labels, ["cat", "dog"])
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["a", "b"]
    sizes = [[len(line.get_xdata()) for line in axis.lines] for axis in figure.axes]
    assert sizes == [[1, 2, 1]] * 2


def test_many_classes_are_counted_without_names() -> None:
    by_class = {f"class {k}": [k, 2 * k] for k in range(300)}
    figure = figures.counts(by_class, ["train", "test"])
    assert figure.get_size_inches()[0] < 12
    train, test = figure.axes[0].lines
    assert train.get_ydata().tolist() == list(range(299, -1, -1))
    assert max(test.get_ydata()) == 598


def test_every_tower_has_its_filters() -> None:
    rng = np.random.default_rng(0)
    figure = figures.filters([rng.normal(size=(20, 3, 3, 3)), rng.normal(size=(5, 1, 5, 5))], composed=True)
    drawn = [axis.get_images()[0].get_array() for axis in figure.axes if axis.get_images()]
    assert [image.shape for image in drawn] == [(3, 3, 3)] * 20 + [(5, 5)] * 5
    assert all(image.min() >= 0 and image.max() <= 1 for image in drawn)
