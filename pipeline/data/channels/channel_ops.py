"""Augmentations of images with any number of channels, of 8 or 16 bits; those that mix colours are refused by name.

Levels are whole numbers, and every op rounds to the nearest. The result of an op is exact or elementwise in float64, so
that `train.device_ops.channels` gives the same pixels on any device. Pixels beyond the image are 0.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from firstlight.pipeline.data.augment.op_params import (
    Affine,
    CropBox,
    Fit,
    Flip,
    Jitter,
    OpParams,
    Shift,
    VerticalFlip,
)
from firstlight.pipeline.data.augment.pixel_params import NOISE, Blur, Erase
from firstlight.pipeline.data.augment.random_numbers import draw_levels
from firstlight.pipeline.data.channels.channel_image import ChannelImage
from firstlight.pipeline.data.channels.resampling import resample_box

# Op -> why it is refused.
REFUSED_OPS = {
    "random_grayscale": "it mixes colours",
    "solarize": "it is defined for levels of 8 bits",
    "posterize": "it is defined for levels of 8 bits",
    "equalize": "it is defined for levels of 8 bits",
    "autocontrast": "it is defined for levels of 8 bits",
    "sharpness": "it is defined for levels of 8 bits",
    "rand_augment": "it mixes colours",
    "trivial_augment": "it mixes colours",
}
# The parameters of color_jitter that mix colours.
MIXING_STRENGTHS = ("saturation", "hue")
JITTER_OP = "color_jitter"


def explain_refused_op(op: Mapping[str, Any]) -> str | None:
    """Returns why an op, as a recipe has it with all parameters, cannot change images of any channels, with what is
    valid; None if it can.
    """
    name = op["op"]
    if name in REFUSED_OPS:
        return f"{name} is not valid with dataset.channels, since {REFUSED_OPS[name]}; valid: leave it out"
    mixing = [key for key in MIXING_STRENGTHS if op.get(key)] if name == JITTER_OP else []
    if mixing:
        return (
            f"{name} with {' and '.join(mixing)} is not valid with dataset.channels, since it mixes colours; "
            "valid: saturation: 0 and hue: 0"
        )
    return None


def keep_channel_ops(ops: Sequence[Mapping[str, Any]]) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """Returns the ops that images of any channels can have, and the names of what was left out.

    `ops` have all their parameters. The changes of brightness and contrast remain of color_jitter.
    """
    kept, dropped = list[dict[str, Any]](), list[str]()
    for op in ops:
        if op["op"] in REFUSED_OPS:
            dropped.append(op["op"])
        elif explain_refused_op(op) is not None:
            kept.append({**op, **dict.fromkeys(MIXING_STRENGTHS, 0.0)})
            dropped += [f"{key} of {op['op']}" for key in MIXING_STRENGTHS if op[key]]
        else:
            kept.append(dict(op))
    return tuple(kept), tuple(dropped)


def apply_channel_ops(image: ChannelImage, params: Sequence[OpParams], size: int) -> np.ndarray:
    """Applies the ops' parameters to an image of any size. Returns (size, size, C) of the same type."""
    values = image.values
    white = int(np.iinfo(values.dtype).max)
    for op in params:
        values = CHANNEL_OPS[type(op)](values, op, size, white)
    return values


def _crop(values: np.ndarray, op: CropBox, size: int, white: int) -> np.ndarray:
    return resample_box(values, (op.left, op.top, op.width, op.height), size, size, white)


def _shift(values: np.ndarray, op: Shift, size: int, white: int) -> np.ndarray:
    square = resample_box(values, (op.left, op.top, op.side, op.side), size, size, white)
    return _paste(square, int(op.right), int(op.down), size)


def _fit(values: np.ndarray, op: Fit, size: int, white: int) -> np.ndarray:
    whole = resample_box(values, (0.0, 0.0, op.across, op.down), int(op.width), int(op.height), white)
    return _paste(whole, int(op.left), int(op.top), size)


def _paste(values: np.ndarray, left: int, top: int, size: int) -> np.ndarray:
    """Puts (h, w, C) levels at a place, which may lie partly outside, of a black square."""
    canvas = np.zeros((size, size, values.shape[2]), values.dtype)
    height, width = values.shape[:2]
    rows, columns = slice(max(top, 0), min(top + height, size)), slice(max(left, 0), min(left + width, size))
    if rows.start < rows.stop and columns.start < columns.stop:
        canvas[rows, columns] = values[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return canvas


def _flip(values: np.ndarray, op: Flip, size: int, white: int) -> np.ndarray:
    return values[:, ::-1] if op.flipped else values


def _flip_vertically(values: np.ndarray, op: VerticalFlip, size: int, white: int) -> np.ndarray:
    return values[::-1] if op.flipped else values


def _warp(values: np.ndarray, op: Affine, size: int, white: int) -> np.ndarray:
    """Applies an affine map, bilinear between the centres of pixels; the outermost half pixel has the edge's levels."""
    center = np.arange(size, dtype=np.float64) + 0.5
    x = op.a * center + op.b * center[:, None] + op.c
    y = op.d * center + op.e * center[:, None] + op.f
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    left, top = np.floor(x - 0.5), np.floor(y - 0.5)
    right_share, low_share = (x - 0.5 - left)[:, :, None], (y - 0.5 - top)[:, :, None]
    columns = [np.clip(k, 0, size - 1).astype(np.int64) for k in (left, left + 1)]
    rows = [np.clip(k, 0, size - 1).astype(np.int64) for k in (top, top + 1)]
    lines = []
    for row in rows:
        near, far = (values[row, column].astype(np.float64) for column in columns)
        lines.append(near + (far - near) * right_share)
    levels = lines[0] + (lines[1] - lines[0]) * low_share
    return np.where(inside[:, :, None], np.floor(levels + 0.5), 0.0).astype(values.dtype)


def _jitter(values: np.ndarray, op: Jitter, size: int, white: int) -> np.ndarray:
    """Multiplies levels (brightness), or their distances from the mean of their channel (contrast)."""
    for k in map(int, op[4:]):
        if k > 1 or op[k] == 1.0:
            continue
        levels = values.astype(np.float64)
        if k == 0:
            levels = levels * op.brightness
        else:
            mean = np.floor(values.sum((0, 1), dtype=np.int64) / (values.shape[0] * values.shape[1]) + 0.5)
            levels = mean + (levels - mean) * op.contrast
        values = np.floor(np.clip(levels, 0.0, float(white)) + 0.5).astype(values.dtype)
    return values


def _blur(values: np.ndarray, op: Blur, size: int, white: int) -> np.ndarray:
    return op.blur_levels(values.astype(np.float64)).astype(values.dtype) if op.sigma else values


def _erase(values: np.ndarray, op: Erase, size: int, white: int) -> np.ndarray:
    columns, rows = slice(int(op.left), int(op.right)), slice(int(op.top), int(op.bottom))
    values = values.copy()
    if op.level == NOISE:
        bits = 8 * values.dtype.itemsize
        noise = draw_levels(np.array([op.key]).astype(np.uint64), values.size, bits).reshape(values.shape)
        values[rows, columns] = noise[rows, columns]
    else:
        values[rows, columns] = scale_fill_level(op.level, white)
    return values


def scale_fill_level(level: float, white: int) -> int:
    """Returns a level of 0..255 as the same share of `white`."""
    return int(level) * (white // 255)


CHANNEL_OPS: dict[type[OpParams], Callable[[np.ndarray, Any, int, int], np.ndarray]] = {
    CropBox: _crop,
    Shift: _shift,
    Fit: _fit,
    Flip: _flip,
    VerticalFlip: _flip_vertically,
    Affine: _warp,
    Jitter: _jitter,
    Blur: _blur,
    Erase: _erase,
}
