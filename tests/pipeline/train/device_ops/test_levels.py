"""Maps of levels of a batch are those of Pillow, bit by bit, on noise and on images of few levels."""

import numpy as np
import pytest
import torch
from PIL import Image

from firstlight.pipeline.data.augment.op_params import OpBatch, OpParams
from firstlight.pipeline.data.augment.pixel_params import AutoContrast, Equalize, Posterize, Solarize
from firstlight.pipeline.train.device_ops.augment_batch import augment_batch
from firstlight.pipeline.train.device_ops.levels import equalize_batch, stretch_batch
from tests.support.noise_images import make_extremes, to_batch_of_images


@pytest.mark.parametrize("side", [8, 13, 32, 96])
@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Solarize, (0.0, 1.0, 77.5, 128.0, 254.999, 255.0, 256.0)),
        (Posterize, range(1, 9)),
        (Equalize, (0, 1)),
        (AutoContrast, (0, 1)),
    ],
)
def test_maps_of_levels_are_pillows(kind: type[OpParams], values: tuple[float, ...], side: int) -> None:
    """The images of a batch have different parameters."""
    images = make_extremes(side).repeat(len(values), 0)
    op = OpBatch(kind, np.tile(np.array(values, np.float64)[:, None], (len(images) // len(values), 1)))
    expected = [
        np.asarray(params.apply_to(Image.fromarray(image), side))
        for image, params in zip(images, op.params_per_image(), strict=True)
    ]
    found = augment_batch(to_batch_of_images(images), [op], side)
    assert torch.equal(found, to_batch_of_images(np.stack(expected)))


def test_every_range_of_levels_is_stretched_as_by_pillow() -> None:
    """The rounding of 255 / range decides about a level of some."""
    for low in range(0, 250, 7):
        ramps = [np.clip(np.arange(256), low, high).astype(np.uint8) for high in range(low, 256)]
        images = np.stack([np.broadcast_to(ramp[None, :, None], (1, 256, 3)) for ramp in ramps])
        found = stretch_batch(to_batch_of_images(images), np.ones((len(images), 1)), 256)
        params = AutoContrast(1.0)
        expected = np.stack([np.asarray(params.apply_to(Image.fromarray(image), 256)) for image in images])
        assert torch.equal(found, to_batch_of_images(expected))


def test_histograms_of_every_shape_are_equalised_as_by_pillow() -> None:
    """Few pixels, whose steps round to 0, and one level that outweighs all others."""
    rng = np.random.default_rng(0)
    for side in (2, 5, 16, 17, 40):
        images = rng.integers(0, 256, (30, side, side, 3)) ** rng.uniform(0.1, 1.0, (30, 1, 1, 3))
        images = np.where(rng.random(images.shape) < rng.random((30, 1, 1, 1)), 255, images).astype(np.uint8)
        found = equalize_batch(to_batch_of_images(images), np.ones((30, 1)), side)
        expected = [np.asarray(Equalize(1.0).apply_to(Image.fromarray(image), side)) for image in images]
        assert torch.equal(found, to_batch_of_images(np.stack(expected)))
