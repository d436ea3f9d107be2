"""The augmentations of `augment`, applied to many images at once on any device, bit-identical to Pillow.

A training may therefore cache its images on the device or stream them, with the same result. Pillow rounds after every
op, and between the two passes of a resampling. This module follows its rules: weights of 22 bits, truncation in blends,
and float32 and float64 where its C code has them. If a compiler fused Pillow's multiplications and additions, as on
ARM, pixels may differ by one level of 255.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from firstlight.pipeline.data.augment.op_params import (
    BILINEAR,
    POLICY_KINDS,
    POLICY_STEP_WIDTH,
    Affine,
    CropBox,
    Fit,
    Flip,
    Grayscale,
    Jitter,
    OpBatch,
    OpParams,
    Policy,
    Shift,
    VerticalFlip,
)
from firstlight.pipeline.data.augment.pixel_params import (
    AutoContrast,
    Blur,
    Equalize,
    Erase,
    Posterize,
    Sharpness,
    Solarize,
)
from firstlight.pipeline.data.channels.resampling import WEIGHT_SUM
from firstlight.pipeline.train.device_ops.colors import gray_batch, jitter_batch
from firstlight.pipeline.train.device_ops.filters import blur_batch, erase_batch, sharpen_batch
from firstlight.pipeline.train.device_ops.geometry import (
    flip_batch,
    flip_batch_vertically,
    gather_pixels,
    interpolate_affine,
    place_shifted,
)
from firstlight.pipeline.train.device_ops.levels import (
    equalize_batch,
    posterize_batch,
    solarize_batch,
    stretch_batch,
)
from firstlight.tasks.device.copies import send_array

# Number of pixels that are augmented at a time, of the images or of the views, whichever are larger. Intermediate
# values take 24 bytes for each. On a CPU they must be few enough for the allocator to reuse their memory: fresh pages,
# a dozen for an image, took as long as half of the arithmetic.
PIXELS_PER_PART = {"cpu": 2**16}
DEFAULT_PIXELS_PER_PART = 2**21
# Products with the weights are summed in two parts, so that float32 is exact: 2**15 * 255 + 2**14 + 255 * taps and
# 2**7 * 255 * taps are below 2**24 for up to 500 taps.
WEIGHT_PART, MAX_TAPS = 2.0**7, 500
COLORS = 3


@torch.no_grad()
def augment_batch(images: Tensor, drawn: Sequence[OpBatch], size: int) -> Tensor:
    """Augments (B, 3, H, W) uint8 images by parameters from `augment.sample_params`, to (B, 3, size, size) uint8.

    Images of one channel, (B, 1, H, W), stand for gray ones with three equal channels, which is what is returned.
    """
    at_a_time = max(
        1, PIXELS_PER_PART.get(images.device.type, DEFAULT_PIXELS_PER_PART) // max(images[0, 0].numel(), size**2)
    )
    parts = []
    for start in range(0, len(images), at_a_time):
        part = images[start : start + at_a_time]
        for op in drawn:
            if op.kind is Erase:
                # Noise has colours.
                part = part.expand(-1, COLORS, -1, -1)
            part = BATCH_OPS[op.kind](part, op.rows[start : start + at_a_time], size)
        parts.append(part)
    return torch.cat(parts).expand(-1, COLORS, -1, -1)


def crop_batch(images: Tensor, boxes: np.ndarray, size: int) -> Tensor:
    """Crops (B, C, H, W) uint8 images to (B, 4) left, top, width and height, and resizes to (B, C, size, size).

    The boxes are resampled as by Pillow's `Image.resize(BILINEAR, box=)`.
    """
    # A box of the size of the view on whole pixels needs no resampling.
    if (boxes[:, 2:] == size).all() and (boxes == np.floor(boxes)).all():
        left, top = send_array(boxes[:, :2].T.astype(np.int64), images.device)
        offsets = torch.arange(size, device=images.device)
        y, x = (top[:, None] + offsets)[:, None, :, None], (left[:, None] + offsets)[:, None, None, :]
        return gather_pixels(images, y, x)
    return _resample_batch(
        images, boxes, (size, size), _is_columns_first(images.shape[3], images.shape[2], (size, size))
    )


def _resample_batch(images: Tensor, boxes: np.ndarray, size: tuple[int, int], columns_first: bool) -> Tensor:
    """Resamples boxes to `size` (width, height): a pass along rows and one along columns, with rounding after each."""
    height, width = images.shape[2:]
    left, top, across, down = boxes.T
    x = _resampling_weights(images, np.maximum(left, 0.0), np.minimum(left + across, width), width, size[0])
    y = _resampling_weights(images, np.maximum(top, 0.0), np.minimum(top + down, height), height, size[1])
    # (B, H, C, W), so that each pass is one product for an image.
    levels = images.transpose(1, 2).to(x.dtype, memory_format=torch.contiguous_format)
    for columns in (columns_first, not columns_first):
        levels = _resample_columns(levels, y) if columns else _resample_rows(levels, x)
    return levels.transpose(1, 2).to(torch.uint8)


def _resample_columns(levels: Tensor, weights: Tensor) -> Tensor:
    flat = levels.flatten(2).to(weights.dtype)
    rounded: Tensor = _round_levels(weights[0] @ flat, weights[1] @ flat).unflatten(2, (levels.shape[2], -1))
    return rounded


def _resample_rows(levels: Tensor, weights: Tensor) -> Tensor:
    flat = levels.flatten(1, 2).to(weights.dtype)
    rounded: Tensor = _round_levels(flat @ weights[0].mT, flat @ weights[1].mT).unflatten(1, (-1, levels.shape[2]))
    return rounded


def _round_levels(upper: Tensor, lower: Tensor) -> Tensor:
    """Rounds levels weighted by the two parts of their weights to levels, in place."""
    return (
        upper.add_(lower.div_(WEIGHT_PART).floor_())
        .add_(WEIGHT_SUM / WEIGHT_PART / 2)
        .div_(WEIGHT_SUM / WEIGHT_PART)
        .floor_()
    )


@lru_cache(maxsize=64)
def _is_columns_first(width: int, height: int, size: tuple[int, int]) -> bool:
    """Returns True if Pillow resamples columns before rows, which is found by trying it.

    The order depends on Pillow's version and on the sizes, not on the box.
    """
    noise = np.random.default_rng(0).integers(0, 256, (8, height, width, 3), dtype=np.uint8)
    box = (width / 7, height / 9, width * 6 / 7, height * 8 / 9)
    theirs = np.stack([np.asarray(Image.fromarray(image).resize(size, BILINEAR, box=box)) for image in noise])
    boxes = np.tile((box[0], box[1], box[2] - box[0], box[3] - box[1]), (8, 1))
    ours = _resample_batch(torch.from_numpy(noise).permute(0, 3, 1, 2), boxes, size, columns_first=True)
    return np.array_equal(ours.permute(0, 2, 3, 1).numpy(), theirs)


def _resampling_weights(images: Tensor, starts: np.ndarray, stops: np.ndarray, inputs: int, outputs: int) -> Tensor:
    """Returns (2, B, outputs, inputs) integer weights for (B,) starts and stops: a triangle around each output.

    The triangle is two input pixels wide, or two output pixels if those are larger. It extends beyond the edges of the
    box, but not of the image. A weight is the first part times WEIGHT_PART plus the second, so that weighted sums of
    levels are integers that float32 represents exactly.
    """
    start, stop = send_array(np.stack((starts, stops)), images.device).float()[:, :, None, None]
    scale = (stop - start).double() / outputs
    reach = scale.clamp(min=1.0)
    taps = 2 * math.ceil(max(1.0, float((stops - starts).max()) / outputs)) + 2
    center = start.double() + (torch.arange(outputs, dtype=torch.float64, device=images.device)[:, None] + 0.5) * scale
    pixel = (center - reach + 0.5).trunc().clamp_(min=0.0) + torch.arange(taps, device=images.device)
    seen = pixel < (center + reach + 0.5).trunc().clamp_(max=inputs)
    weight = (1.0 - ((pixel - center + 0.5) * (1.0 / reach)).abs_()).clamp_(min=0.0).mul_(seen)
    weight = weight.div_(weight.sum(2, keepdim=True)).mul_(WEIGHT_SUM).add_(0.5).floor_()
    upper = (weight / WEIGHT_PART).floor_()
    number = torch.float32 if taps <= MAX_TAPS and _is_float32_exact() else torch.float64
    parts = torch.zeros(2, *weight.shape[:2], inputs + taps, dtype=number, device=images.device)
    for part, values in zip(parts, (upper, weight - upper * WEIGHT_PART), strict=True):
        part.scatter_(2, pixel.long(), values.to(number))
    return parts[..., :inputs]


def _is_float32_exact() -> bool:
    """Returns True if torch multiplies float32 exactly: it can be set to round the factors to 10 or 7 bits."""
    # Its type stubs lack some attributes.
    backends: Any = torch.backends
    return {backends.fp32_precision, backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision} <= {
        "none",
        "ieee",
    }


def fit_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    """Resizes and pads the images. They have one size, so the first row of parameters applies to all."""
    across, down, left, top, width, height = (int(value) for value in drawn[0])
    if (width, height) == (across, down):
        whole = images
    else:
        boxes = np.tile((0.0, 0.0, across, down), (len(images), 1))
        whole = _resample_batch(images, boxes, (width, height), _is_columns_first(across, down, (width, height)))
    return F.pad(whole, (left, size - width - left, top, size - height - top))


def shift_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    """Crops a square of each image and shifts it; uncovered pixels are black."""
    square = crop_batch(images, drawn[:, [0, 1, 2, 2]], size)
    return place_shifted(square, drawn[:, 3:])


def warp_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    return interpolate_affine(images, drawn, size).to(torch.uint8)


def apply_policies(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    """Applies the ops that were chosen for each image: those of one kind in one place of their lists together."""
    images = images.clone()
    for start in range(0, drawn.shape[1], POLICY_STEP_WIDTH):
        step = drawn[:, start : start + POLICY_STEP_WIDTH]
        for place, kind in enumerate(POLICY_KINDS):
            rows = np.flatnonzero(step[:, 0] == place)
            if len(rows):
                index = send_array(rows, images.device)
                images[index] = BATCH_OPS[kind](images[index], step[rows, 1 : 1 + len(kind._fields)], size)
    return images


BATCH_OPS: dict[type[OpParams], Callable[[Tensor, np.ndarray, int], Tensor]] = {
    CropBox: crop_batch,
    Shift: shift_batch,
    Fit: fit_batch,
    Flip: flip_batch,
    VerticalFlip: flip_batch_vertically,
    Affine: warp_batch,
    Jitter: jitter_batch,
    Grayscale: gray_batch,
    Blur: blur_batch,
    Solarize: solarize_batch,
    Posterize: posterize_batch,
    Equalize: equalize_batch,
    AutoContrast: stretch_batch,
    Sharpness: sharpen_batch,
    Erase: erase_batch,
    Policy: apply_policies,
}
