"""Augmentations of many channels on a device: the pixels of `channel_ops`, bit by bit."""

from typing import Any

import numpy as np
import pytest
import torch

from firstlight.pipeline.config.schema import parse_augment
from firstlight.pipeline.data.augment import ops
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys
from firstlight.pipeline.data.channels.channel_image import ChannelImage
from firstlight.pipeline.data.channels.channel_ops import CHANNEL_OPS
from firstlight.pipeline.train.device_ops.channels import CHANNEL_BATCH_OPS, augment_channel_batch
from firstlight.tasks.device.pixel_levels import send_pixels
from tests.support.channel_images import draw_bands

NEUTRAL = {"op": "color_jitter", "saturation": 0.0, "hue": 0.0}
PIPELINES: list[list[dict[str, Any]]] = [
    [{"op": "center_crop"}],
    [{"op": "random_crop", "size": 20}],
    [{"op": "random_resized_crop"}, {"op": "horizontal_flip"}, {"op": "vertical_flip"}],
    [{"op": "random_shift"}],
    [{"op": "fit"}],
    [{"op": "center_crop"}, {"op": "random_affine", "degrees": 90.0, "scale": 0.4}],
    [{"op": "random_resized_crop"}, NEUTRAL],
    [{"op": "center_crop"}, {"op": "gaussian_blur"}],
    [{"op": "center_crop"}, {"op": "cutout", "value": "noise"}, {"op": "random_erasing", "value": "gray"}],
    [{"op": "random_resized_crop"}, NEUTRAL, {"op": "gaussian_blur", "p": 1.0}, {"op": "random_affine"}],
]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 13])
@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda pipeline: "-".join(op["op"] for op in pipeline))
def test_a_batch_has_the_pixels_of_each_image(pipeline: list[dict[str, Any]], channels: int, bits: int) -> None:
    count, side, size = 12, (33, 29), 24
    images = np.stack([draw_bands(k, channels, 40, kind=2, bits=bits)[: side[1], : side[0]] for k in range(count)])
    keys = derive_view_keys(3, np.zeros(count, np.int64), np.arange(count), 0)
    augment = tuple(op.model_dump() for op in parse_augment(pipeline))
    params = ops.sample_params(augment, keys, np.array([side] * count), size)
    expected = np.stack(list(ops.apply_batch([ChannelImage(image) for image in images], params, size)))
    found = augment_channel_batch(send_pixels(images, torch.device("cpu")).permute(0, 3, 1, 2), params, size)
    found = found.permute(0, 2, 3, 1).contiguous().numpy().view(images.dtype)
    assert np.array_equal(found, expected)
    assert expected.max() > 2 ** (bits - 1)


def test_every_op_of_an_image_has_one_of_a_batch() -> None:
    assert CHANNEL_BATCH_OPS.keys() == CHANNEL_OPS.keys()
