"""Figures of filters, nearest images and samples contain the images that they are given."""

from pathlib import Path

import numpy as np
import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report import image_figures
from firstlight.pipeline.train.context import StageContext
from tests.support import recipes


def test_every_tower_has_its_filters() -> None:
    rng = np.random.default_rng(0)
    towers = [rng.normal(size=(20, 3, 3, 3)), rng.normal(size=(5, 1, 5, 5))]
    figure = image_figures.draw_filters({"": towers}, composed=True)
    drawn = [image.get_array() for image in figure.axes[0].get_images()]
    assert [image.shape for image in drawn] == [(3, 3, 3)] * 20 + [(5, 5)] * 5
    assert all(image.min() >= 0 and image.max() <= 1 for image in drawn)


def test_networks_have_their_names_beside_their_first_filters_and_all_filters_of_alexnet_are_drawn() -> None:
    rng = np.random.default_rng(0)
    networks = {"supervised, scratch": [rng.normal(size=(96, 1, 13, 13))], "pretrain": [rng.normal(size=(8, 1, 5, 5))]}
    (axis,) = image_figures.draw_filters(networks, composed=True).axes
    drawn = axis.get_images()
    assert [image.get_array().shape for image in drawn] == [(13, 13)] * 96 + [(5, 5)] * 8
    below = {text.get_text(): text.get_position()[1] for text in axis.texts}
    tops = {name: drawn[k].get_extent()[3] for name, k in (("supervised, scratch", 0), ("pretrain", 96))}
    for name, top in tops.items():
        assert top < below[name] < top + 0.5
    assert axis.texts[1].get_position()[0] < drawn[0].get_extent()[0], "on the left"


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


def test_nearest_images_are_framed_by_class_and_ids_below_zero_are_left_out(tmp_path: Path, digits: Store) -> None:
    context = StageContext.create(recipes.recipe(tmp_path), digits, on_ray=False)
    train = context.splits.train
    labels = context.splits.labels[train]
    query, same = train[labels == labels[0]][:2].tolist()
    other = int(train[labels != labels[0]][0])
    figure = image_figures.draw_neighbours(context, [(query, [same, other, -1])], "nearest")
    (axis,) = figure.axes
    assert len(axis.get_images()) == 3
    assert [frame.get_x() for frame in axis.patches] == pytest.approx([axis.get_images()[2].get_extent()[0]])
