"""Augmentations of many channels: geometry as with colours, levels channel by channel, and refusals by name."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.config.schema import parse_augment
from firstlight.pipeline.data.augment import ops
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys
from firstlight.pipeline.data.channels.channel_image import ChannelImage
from firstlight.pipeline.data.channels.channel_ops import (
    CHANNEL_OPS,
    REFUSED_OPS,
    explain_refused_op,
    keep_channel_ops,
    scale_fill_level,
)
from tests.support.channel_images import draw_bands

# Ops that are valid with any channels.
GEOMETRY = [
    {"op": "center_crop"},
    {"op": "random_crop", "size": 20},
    {"op": "random_resized_crop"},
    {"op": "random_shift"},
    {"op": "fit"},
    {"op": "horizontal_flip"},
    {"op": "vertical_flip"},
    {"op": "random_affine"},
    {"op": "cutout"},
    {"op": "random_erasing", "p": 1.0},
    {"op": "gaussian_blur", "p": 1.0},
]


def complete(op: dict[str, Any]) -> dict[str, Any]:
    lead = [] if op["op"] in ops.CROP_OPS else [{"op": "center_crop"}]
    found: dict[str, Any] = parse_augment([*lead, op])[-1].model_dump()
    return found


def augment(image: Any, op: dict[str, Any], size: int = 24, count: int = 8) -> np.ndarray:
    lead = () if op["op"] in ops.CROP_OPS else ({"op": "center_crop"},)
    keys = derive_view_keys(0, np.zeros(count, np.int64), np.arange(count), 0)
    params = ops.sample_params((*lead, op), keys, np.array([image.size] * count), size)
    return np.stack(list(ops.apply_batch([image] * count, params, size)))


@pytest.mark.parametrize("op", GEOMETRY, ids=lambda op: op["op"])
def test_three_channels_of_8_bits_look_like_colours(op: dict[str, Any]) -> None:
    values = draw_bands(0, 3, 30, bits=8)
    found = augment(ChannelImage(values), complete(op)).astype(int)
    theirs = augment(Image.fromarray(values), complete(op)).astype(int)
    # Pillow truncates in affine maps, and may resample columns first.
    assert np.abs(found - theirs).max() <= 2
    assert (found == theirs).mean() > 0.4


@pytest.mark.parametrize("op", GEOMETRY, ids=lambda op: op["op"])
def test_every_channel_is_treated_alike_and_keeps_16_bits(op: dict[str, Any]) -> None:
    values = draw_bands(0, 13, 30)
    found = augment(ChannelImage(values), complete(op))
    assert found.dtype == np.uint16
    assert found.shape == (8, 24, 24, 13)
    one = augment(ChannelImage(np.ascontiguousarray(values[:, :, 4:5])), complete(op))
    assert np.array_equal(found[..., 4:5], one)
    assert len(np.unique(found & 255)) > 100


def test_brightness_and_contrast_act_on_each_channel() -> None:
    values = draw_bands(0, 5, 24)
    for key in ("brightness", "contrast"):
        neutral = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
        op = complete({"op": "color_jitter", **neutral, key: 0.4})
        found = augment(ChannelImage(values), op).astype(np.float64)
        keys = derive_view_keys(0, np.zeros(8, np.int64), np.arange(8), 0)
        _, params = ops.sample_params(({"op": "center_crop"}, op), keys, np.full((8, 2), 24), 24)
        factors = params.rows[:, 0 if key == "brightness" else 1]
        for image, factor in zip(found, factors, strict=True):
            mean = np.floor(values.mean((0, 1)) + 0.5) if key == "contrast" else 0.0
            expected = np.clip(mean + factor * (values - mean), 0, 65535)
            assert np.abs(image - expected).max() <= 0.5 + 1e-6


def test_noise_has_all_levels_of_16_bits() -> None:
    op = complete({"op": "cutout", "value": "noise", "scale": 1.0})
    found = augment(ChannelImage(np.zeros((24, 24, 4), np.uint16)), op)
    assert found.max() > 65000
    assert len(np.unique(found)) > 3000
    assert (scale_fill_level(127, 255), scale_fill_level(127, 65535)) == (127, 127 * 257)


@pytest.mark.parametrize("name", sorted(REFUSED_OPS))
def test_ops_that_mix_colours_or_assume_8_bits_are_refused_by_name(name: str) -> None:
    op = complete({"op": name, **({"bits": 4} if name == "posterize" else {})})
    assert str(explain_refused_op(op)).startswith(f"{name} is not valid with dataset.channels, since it ")
    assert keep_channel_ops([op, complete({"op": "horizontal_flip"})]) == (
        (complete({"op": "horizontal_flip"}),),
        (name,),
    )


def test_color_jitter_is_valid_without_what_mixes_colours() -> None:
    plain = complete({"op": "color_jitter"})
    assert explain_refused_op(plain) == (
        "color_jitter with saturation and hue is not valid with dataset.channels, since it mixes colours; "
        "valid: saturation: 0 and hue: 0"
    )
    (kept,), dropped = keep_channel_ops([plain])
    assert (kept["brightness"], kept["saturation"], kept["hue"]) == (0.4, 0.0, 0.0)
    assert dropped == ("saturation of color_jitter", "hue of color_jitter")
    assert explain_refused_op(kept) is None


def test_every_op_is_either_applied_or_refused() -> None:
    applied = {op for op in ops.OPS if op not in REFUSED_OPS}
    for name in applied:
        op = {"op": name, **({"corner": "center"} if name == "corner_crop" else {})}
        keys = derive_view_keys(0, np.zeros(1, np.int64), np.zeros(1, np.int64), 0)
        (params,) = ops.sample_params((op,), keys, np.array([[8, 8]]), 8)
        assert params.kind in CHANNEL_OPS, name
