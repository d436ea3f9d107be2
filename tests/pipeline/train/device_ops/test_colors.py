"""Changes of colour of a batch are those of Pillow, bit by bit, and close to those of torchvision."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from firstlight.pipeline.data.augment.op_params import Jitter, OpBatch
from firstlight.pipeline.train.device_ops.augment_batch import augment_batch
from tests.support.noise_images import make_noise, to_batch_of_images


@pytest.mark.parametrize("red", [0, 1, 100, 127, 254, 255])
def test_hue_of_every_colour_is_pillows(red: int) -> None:
    green, blue = np.mgrid[0:256, 0:256]
    source = np.stack((np.full_like(green, red), green, blue), 2).astype(np.uint8)
    for turns in (0.1, -0.31, 0.5):
        op = OpBatch(Jitter, np.array([(1.0, 1.0, 1.0, turns, 3.0, 0.0, 1.0, 2.0)]))
        expected = np.asarray(op.params_per_image()[0].apply_to(Image.fromarray(source), 256))
        assert torch.equal(
            augment_batch(to_batch_of_images(source[None]), [op], 256),
            to_batch_of_images(expected[None]),
        )


@pytest.mark.parametrize(("k", "change"), enumerate(["brightness", "contrast", "saturation", "hue"]))
def test_changes_of_colour_are_close_to_torchvisions(k: int, change: str) -> None:
    source = to_batch_of_images(make_noise(20, 24, 24))
    factors = np.random.default_rng(0).uniform(-0.4, 0.4, 20) + (k < 3)
    rows = np.array(
        [[factor if j == k else float(j < 3) for j in range(4)] + [0.0, 1.0, 2.0, 3.0] for factor in factors]
    )
    found = augment_batch(source, [OpBatch(Jitter, rows)], 24)
    adjust = getattr(functional, f"adjust_{change}")
    expected = torch.stack([adjust(image, factor) for image, factor in zip(source, factors.tolist(), strict=True)])
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= (16 if change == "hue" else 2), "hue and saturation are rounded to 1/255"
    assert difference.double().mean() < 1.5
    assert (found.int() - source.int()).abs().double().mean() > 2
