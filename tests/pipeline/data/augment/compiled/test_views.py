"""Compiled views have the pixels of Pillow, bit by bit, for every pipeline and size."""

import numpy as np
import pytest

from firstlight.pipeline.data.augment.op_params import OpBatch
from firstlight.pipeline.data.augment.ops import sample_params
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys
from tests.support.augmentations import PIPELINES, Ops
from tests.support.compiled_views import make_by_pillow, make_compiled
from tests.support.noise_images import make_noise

SIZES = [(32, 32, 29), (37, 21, 16), (13, 50, 29), (1, 500, 9), (500, 1, 9), (1, 1, 4), (70, 90, 1), (24, 24, 24)]


def draw(ops: Ops, width: int, height: int, size: int, count: int) -> list[OpBatch]:
    ids = np.arange(count)
    return sample_params(
        ops, derive_view_keys(0, np.ones_like(ids), ids, 0), np.tile((width, height), (count, 1)), size
    )


@pytest.mark.parametrize("name", PIPELINES)
def test_views_have_pillows_pixels(name: str) -> None:
    for width, height, size in SIZES:
        images = make_noise(25, width, height)
        before, ops = images.copy(), draw(PIPELINES[name], width, height, size, 25)
        found = make_compiled(images, ops, size)
        assert np.array_equal(found, make_by_pillow(images, ops, size)), (width, height, size)
        assert np.array_equal(images, before)


@pytest.mark.parametrize("name", ["simclr", "fixmatch", "fit", "a corner in pixels"])
def test_gray_images_and_those_with_a_fourth_channel_give_the_same_views(name: str) -> None:
    for width, height, size in SIZES:
        images, ops = make_noise(9, width, height), draw(PIPELINES[name], width, height, size, 9)
        four = np.concatenate((images, images[..., :1] ^ 255), 3)
        assert np.array_equal(make_compiled(four, ops, size), make_compiled(images, ops, size))
        gray = images[..., :1]
        assert np.array_equal(make_compiled(gray, ops, size), make_by_pillow(np.repeat(gray, 3, 3), ops, size))


def test_pixels_that_cannot_be_written_are_read() -> None:
    images, ops = make_noise(3, 20, 30), draw(PIPELINES["simclr"], 20, 30, 16, 3)
    expected = make_compiled(images, ops, 16)
    images.flags.writeable = False
    assert np.array_equal(make_compiled(images, ops, 16), expected)
