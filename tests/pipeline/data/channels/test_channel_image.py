"""Images of any number of channels: their size, and their orientation as Pillow turns it."""

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.channels.channel_image import ChannelImage, turn_values_upright
from firstlight.pipeline.data.images.orientation import EXIF_TRANSPOSES


def test_width_and_height_are_those_of_the_values() -> None:
    image = ChannelImage(np.zeros((4, 6, 13), np.uint16))
    assert (image.width, image.height, image.size) == (6, 4, (6, 4))


@pytest.mark.parametrize("orientation", sorted(EXIF_TRANSPOSES))
def test_values_are_turned_as_pillow_turns_images(orientation: int) -> None:
    values = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(values).transpose(EXIF_TRANSPOSES[orientation]))
    assert np.array_equal(turn_values_upright(values, orientation), expected)
    assert np.array_equal(turn_values_upright(values, 1), values)
