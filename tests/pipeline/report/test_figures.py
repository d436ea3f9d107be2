"""What reaches the pictures: maps, classes, filters."""

import numpy as np
import pytest

from firstlight.pipeline.report import figures
from firstlight.pipeline.report.grid import display_names


def test_maps_side_by_side_have_the_points_of_each_class() -> None:
    labels = np.array([0, 1, 1, -1])
    points = np.arange(8.0).reshape(4, 2)
    figure = figures.draw_embedding_map({"a": (points, ("x", "y")), "b": (-points, ("x", "y"))}, labels, ["cat", "dog"])
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["a", "b"]
    sizes = [[len(line.get_xdata()) for line in axis.lines] for axis in figure.axes]
    assert sizes == [[1, 2, 1]] * 2


def test_many_classes_are_counted_without_names() -> None:
    by_class = {f"class {k}": [k, 2 * k] for k in range(300)}
    figure = figures.draw_class_counts(by_class, ["train", "test"])
    assert figure.get_size_inches()[0] < 12
    train, test = figure.axes[0].lines
    assert train.get_ydata().tolist() == list(range(299, -1, -1))
    assert max(test.get_ydata()) == 598


def test_every_tower_has_its_filters() -> None:
    rng = np.random.default_rng(0)
    figure = image_figures.draw_filters([rng.normal(size=(20, 3, 3, 3)), rng.normal(size=(5, 1, 5, 5))], composed=True)
    drawn = [image.get_array() for image in figure.axes[0].get_images()]
    assert [image.shape for image in drawn] == [(3, 3, 3)] * 20 + [(5, 5)] * 5
    assert all(image.min() >= 0 and image.max() <= 1 for image in drawn)


def test_only_wrong_predictions_are_framed() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    figure = image_figures.draw_neighbour_rows(
        [(image, [image] * 3, [True, False, True]), (image, [image] * 2, [False, True])], ["cat", ""], "nearest"
    )
    (axis,) = figure.axes
    assert len(axis.get_images()) == 7
    lefts = [[image.get_extent()[0] for image in axis.get_images()][k] for k in (1, 3, 6)]
    assert [frame.get_x() for frame in axis.patches] == pytest.approx(lefts)
    assert "cat" in [text.get_text() for text in axis.texts]


def test_an_image_that_is_no_square_keeps_its_shape() -> None:
    figure = image_figures.draw_captioned_images([np.zeros((10, 40, 3), np.uint8)], ["wide"], "one")
    left, right, bottom, top = figure.axes[0].get_images()[0].get_extent()
    assert (right - left) / (bottom - top) == pytest.approx(4.0)


def test_names_are_escaped_for_matplotlib() -> None:
    assert display_names(["cat", "_hidden", "a\nb\x00", "y" * 33]) == [
        "cat",
        " _hidden",
        "a b ",
        "y" * 31 + "\N{HORIZONTAL ELLIPSIS}",
    ]
    figure = figures.draw_class_counts({r"$\bad{$": [1, 2], "_x": [3, 4]}, ["train", "test"])
    figure.canvas.draw()
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == [r"$\bad{$", " _x"]
