"""Images of several sizes are opened as they were held, without a copy."""

import numpy as np
from PIL import Image

from firstlight.pipeline.data.images.pixel_views import PIXEL_BYTES
from firstlight.pipeline.data.images.ragged import RaggedImages
from tests.support.photograph_folders import PHOTOGRAPH_SIZES, make_photograph


def test_images_are_opened_as_they_were() -> None:
    pictures = [make_photograph(*size, seed=k) for k, size in enumerate(PHOTOGRAPH_SIZES)]
    held = RaggedImages.collect(pictures)
    assert held.sizes.tolist() == [list(size) for size in PHOTOGRAPH_SIZES]
    assert held.num_bytes == PIXEL_BYTES * sum(wide * high for wide, high in PHOTOGRAPH_SIZES)
    for number, picture in enumerate(pictures):
        opened = held.open_image(number)
        assert (opened.mode, opened.size) == ("RGB", picture.size)
        assert np.array_equal(np.asarray(opened), np.asarray(picture))
        small = opened.resize((9, 9), Image.Resampling.BILINEAR, box=(3, 2, 21, 27))
        assert np.array_equal(small, picture.resize((9, 9), Image.Resampling.BILINEAR, box=(3, 2, 21, 27)))


def test_a_buffer_is_split_by_sizes() -> None:
    pictures = [make_photograph(*size) for size in PHOTOGRAPH_SIZES]
    held = RaggedImages.collect(pictures)
    buffer = np.concatenate([part.reshape(-1, PIXEL_BYTES) for part in held.pixels])
    again = RaggedImages.split_buffer(buffer, held.sizes)
    assert all(np.array_equal(a, b) for a, b in zip(again.pixels, held.pixels, strict=True))
    assert RaggedImages.split_buffer(buffer[:0], held.sizes[:0]).sizes.shape == (0, 2)
