"""Maps of levels are those of Pillow, for images of few levels, too."""

import numpy as np
import pytest

from firstlight.pipeline.data.augment.op_params import CropBox, OpParams
from firstlight.pipeline.data.augment.pixel_params import NO_THRESHOLD, AutoContrast, Equalize, Posterize, Solarize
from tests.support.compiled_views import draw_batch, make_by_pillow, make_compiled
from tests.support.noise_images import make_extremes

CHANGES: list[OpParams] = [
    *(Solarize(threshold) for threshold in (0.0, 1.0, 127.5, 128.0, 255.0, NO_THRESHOLD)),
    *(Posterize(bits) for bits in range(1, 9)),
    Equalize(0.0),
    Equalize(1.0),
    AutoContrast(0.0),
    AutoContrast(1.0),
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_levels(change: OpParams) -> None:
    for side in (1, 2, 15, 16, 48):
        ops = draw_batch(CropBox(0.0, 0.0, side, side), change, count=11)
        images = make_extremes(side)
        assert np.array_equal(make_compiled(images, ops, side), make_by_pillow(images, ops, side)), side
