"""Arrays and images of Pillow share their pixels."""

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.images.pixel_views import view_as_image, view_pixels


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 3), (200, 331)])
def test_pixels_of_an_image_are_viewed(width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = view_pixels(Image.fromarray(pixels))
    assert found.shape == (height, width, 4)
    assert np.array_equal(found[..., :3], pixels)
    assert not found.flags.writeable


def test_pixels_outlive_their_image() -> None:
    image = Image.new("RGB", (300, 300), (1, 2, 3))
    found = view_pixels(image)
    del image
    assert np.array_equal(found[..., :3], np.full((300, 300, 3), (1, 2, 3)))


def test_an_array_becomes_an_image_and_back_without_a_copy() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    image = view_as_image(pixels)
    assert (image.mode, image.size) == ("RGB", (30, 20))
    assert np.shares_memory(view_pixels(image), pixels)


def test_an_image_of_many_megabytes_is_copied() -> None:
    """Pillow has it in several blocks."""
    image = Image.effect_noise((2600, 2500), 60).convert("RGB")
    assert np.array_equal(view_pixels(image)[..., :3], np.asarray(image))


def test_other_modes_are_refused() -> None:
    with pytest.raises(AssertionError):
        view_pixels(Image.new("L", (3, 3)))
