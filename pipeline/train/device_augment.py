"""The ops of `augment`, applied to many images at once on any device: what was drawn for an image gives the pixels that Pillow gives.

Not nearly, but bit by bit, so that a training may hold its images on the device or stream them and be the same training. Pillow rounds after
every op, and between the two passes of a resampling, by rules that are followed here: weights of 22 bits, truncation in blends, float32 and
float64 where its C code has them. (Where a compiler fused its multiplications and additions, as on ARM, a level of 1/255 may be between them.)
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
    Affine,
    CropBox,
    Fit,
    Flip,
    Grayscale,
    Jitter,
    OpBatch,
    OpParams,
    Shift,
)

# Pixels of the images, or of the views where these are larger, that are augmented at a time: what is computed on the way takes 24 bytes each. On a
# CPU it must stay small enough for the allocator to keep it: fresh pages, a dozen an image, took as long as half of the arithmetic.
PIXELS_PER_PART = {"cpu": 2**16}
DEFAULT_PIXELS_PER_PART = 2**21
WEIGHT_SUM = 2.0**22  # what Pillow's weights of a pixel sum to
# Weights are added up in two parts: 2**15 * 255 + 2**14 + 255 * taps, and 2**7 * 255 * taps, are below 2**24 for up to 500 of them.
WEIGHT_PART, MAX_TAPS = 2.0**7, 500


@torch.no_grad()
def augment_batch(images: Tensor, drawn: Sequence[OpBatch], size: int) -> Tensor:
    """(B, 3, H, W) uint8 and what `augment.draw` gave for them -> (B, 3, size, size) uint8."""
    at_a_time = max(1, PIXELS_PER_PART.get(images.device.type, DEFAULT_PIXELS_PER_PART) // max(images[0, 0].numel(), size**2))
    parts = []
    for start in range(0, len(images), at_a_time):
        part = images[start : start + at_a_time]
        for op in drawn:
            part = BATCH_OPS[op.kind](part, op.rows[start : start + at_a_time], size)
        parts.append(part)
    return torch.cat(parts)


def crop_batch(images: Tensor, boxes: np.ndarray, size: int) -> Tensor:
    """(B, 3, H, W) uint8, (B, 4) left, top, width, height -> (B, 3, size, size) uint8, resampled as `Image.resize(BILINEAR, box=)`."""
    if (boxes[:, 2:] == size).all() and (boxes == np.floor(boxes)).all():  # as they are
        left, top = torch.from_numpy(boxes[:, :2].T.astype(np.int64)).to(images.device)
        places = torch.arange(size, device=images.device)
        return _gather_pixels(images, (top[:, None] + places)[:, None, :, None], (left[:, None] + places)[:, None, None, :])
    return _resample_batch(images, boxes, (size, size), _is_columns_first(images.shape[3], images.shape[2], (size, size)))


def _resample_batch(images: Tensor, boxes: np.ndarray, size: tuple[int, int], columns_first: bool) -> Tensor:
    """To `size` (width, height): along the rows and along the columns, one after the other, rounded in between."""
    height, width = images.shape[2:]
    left, top, across, down = boxes.T
    x = _resampling_weights(images, np.maximum(left, 0.0), np.minimum(left + across, width), width, size[0])
    y = _resampling_weights(images, np.maximum(top, 0.0), np.minimum(top + down, height), height, size[1])
    levels = images.transpose(1, 2).to(
        x.dtype, memory_format=torch.contiguous_format
    )  # (B, H, 3, W): both passes are one product an image
    for columns in (columns_first, not columns_first):
        levels = _resample_columns(levels, y) if columns else _resample_rows(levels, x)
    return levels.transpose(1, 2).to(torch.uint8)


def _resample_columns(levels: Tensor, weights: Tensor) -> Tensor:
    flat = levels.flatten(2).to(weights.dtype)
    rounded: Tensor = _round_levels(weights[0] @ flat, weights[1] @ flat).unflatten(2, (3, -1))
    return rounded


def _resample_rows(levels: Tensor, weights: Tensor) -> Tensor:
    flat = levels.flatten(1, 2).to(weights.dtype)
    rounded: Tensor = _round_levels(flat @ weights[0].mT, flat @ weights[1].mT).unflatten(1, (-1, 3))
    return rounded


def _round_levels(upper: Tensor, lower: Tensor) -> Tensor:
    """Sums of levels by the two parts of their weights -> levels; in place."""
    return upper.add_(lower.div_(WEIGHT_PART).floor_()).add_(WEIGHT_SUM / WEIGHT_PART / 2).div_(WEIGHT_SUM / WEIGHT_PART).floor_()


@lru_cache(maxsize=64)
def _is_columns_first(width: int, height: int, size: tuple[int, int]) -> bool:
    """Whether Pillow resamples the columns before the rows. That depends on its version and the sizes, not on the box: so it is asked."""
    noise = np.random.default_rng(0).integers(0, 256, (8, height, width, 3), dtype=np.uint8)
    box = (width / 7, height / 9, width * 6 / 7, height * 8 / 9)
    theirs = np.stack([np.asarray(Image.fromarray(image).resize(size, BILINEAR, box=box)) for image in noise])
    boxes = np.tile((box[0], box[1], box[2] - box[0], box[3] - box[1]), (8, 1))
    ours = _resample_batch(torch.from_numpy(noise).permute(0, 3, 1, 2), boxes, size, columns_first=True)
    return np.array_equal(ours.permute(0, 2, 3, 1).numpy(), theirs)


def _resampling_weights(images: Tensor, starts: np.ndarray, stops: np.ndarray, inputs: int, outputs: int) -> Tensor:
    """(B,) where boxes start and stop -> (2, B, outputs, inputs) whole numbers: a triangle about the place of each output.

    It is two input pixels wide, or two output pixels where those are larger, and reaches over the edges of the box, not of the image. The
    weights are the first part times PART plus the second, so that sums of levels are whole numbers that float32 holds.
    """
    start, stop = torch.from_numpy(np.stack((starts, stops))).to(images.device).float()[:, :, None, None]
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
    """Whether products of float32 are computed as such: torch can be told to round their factors to 10 or 7 bits."""
    backends: Any = torch.backends  # its types do not tell of all of them
    return {backends.fp32_precision, backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision} <= {
        "none",
        "ieee",
    }


def fit_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    """The images have one size, so one row says it for all."""
    across, down, left, top, width, height = (int(value) for value in drawn[0])
    if (width, height) == (across, down):
        whole = images
    else:
        boxes = np.tile((0.0, 0.0, across, down), (len(images), 1))
        whole = _resample_batch(images, boxes, (width, height), _is_columns_first(across, down, (width, height)))
    return F.pad(whole, (left, size - width - left, top, size - height - top))


def shift_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    square = crop_batch(images, drawn[:, [0, 1, 2, 2]], size)
    right, down = torch.from_numpy(drawn[:, 3:].T.astype(np.int64)).to(images.device)
    places = torch.arange(size, device=images.device)
    x, y = (places - right[:, None])[:, None, None, :], (places - down[:, None])[:, None, :, None]
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    return torch.where(inside, _gather_pixels(square, y.clamp(0, size - 1), x.clamp(0, size - 1)), 0)


def _gather_pixels(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 3, h, w), the pixels at rows `y` and columns `x`, which broadcast to (B, 1, h, w)."""
    flat = (y * images.shape[3] + x).flatten(1)[:, None].expand(-1, 3, -1)
    taken: Tensor = images.flatten(2).gather(2, flat).unflatten(2, (y.shape[2], x.shape[3]))
    return taken


def flip_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    rows = torch.from_numpy(np.flatnonzero(drawn[:, 0])).to(images.device)
    return images.index_copy(0, rows, images[rows].flip(3))


def _per_image(values: np.ndarray, images: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1) on the device of `images`."""
    return torch.from_numpy(values).to(images.device)[:, None, None, None]


def warp_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    """Bilinear about the centres of pixels; the outermost half pixel is the edge's colour, outside is black."""
    a, b, c, d, e, f = (_per_image(column, images) for column in np.ascontiguousarray(drawn.T))
    place = torch.arange(size, device=images.device, dtype=torch.float64) + 0.5
    x, y = a * place + b * place[:, None] + c, d * place + e * place[:, None] + f
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    left, top = (x - 0.5).floor(), (y - 0.5).floor()
    right_share, low_share = x - 0.5 - left, y - 0.5 - top

    def row(y: Tensor) -> Tensor:
        near, far = (
            _gather_pixels(images, y.long().clamp(0, size - 1), x.long().clamp(0, size - 1)).double() for x in (left, left + 1)
        )
        return near + (far - near) * right_share

    upper = row(top)
    return torch.where(inside, upper + (row(top + 1) - upper) * low_share, 0.0).to(torch.uint8)


def jitter_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    """The four changes, each on the images whose turn for it has come."""
    images = images.clone()
    for turn in range(4, 8):
        for k, change in enumerate((_change_brightness, _change_contrast, _change_saturation, _change_hue)):
            rows = np.flatnonzero((drawn[:, turn] == k) & ((k < 3) | (drawn[:, k] != 0.0)))
            if len(rows):
                mine = torch.from_numpy(rows).to(images.device)
                images[mine] = change(images[mine], drawn[rows, k])
    return images


def _change_brightness(images: Tensor, factors: np.ndarray) -> Tensor:
    return _blend_images(torch.zeros((), dtype=torch.float32, device=images.device), images, factors)


def _change_contrast(images: Tensor, factors: np.ndarray) -> Tensor:
    gray = _to_luma(images)
    mean = (gray.sum((1, 2, 3), keepdim=True).double() / gray[0].numel() + 0.5).floor()
    return _blend_images(mean.float(), images, factors)


def _change_saturation(images: Tensor, factors: np.ndarray) -> Tensor:
    return _blend_images(_to_luma(images).float(), images, factors)


def _blend_images(base: Tensor, images: Tensor, factors: np.ndarray) -> Tensor:
    """The way from `base` to the images, gone by `factors`: beyond 1, over the images; truncated, not rounded."""
    return (base + _per_image(factors.astype(np.float32), images) * (images.float() - base)).clamp_(0, 255).to(torch.uint8)


def _to_luma(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 1, H, W) int32, the luma of ITU-R 601."""
    red, green, blue = images.int().unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 2**15) >> 16)[:, None]


def _change_hue(images: Tensor, turns: np.ndarray) -> Tensor:
    hue, saturation, value = _to_hsv(images)
    by = torch.from_numpy(np.rint(255 * turns).astype(np.int64)).to(images.device)[:, None, None]
    return _to_rgb((hue + by) % 256, saturation, value)


def _to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, H, W) uint8 -> hue (B, H, W) int64 in 0..255, saturation and value (B, H, W) float32, whole numbers in 0..255."""
    red, green, _ = images.unbind(1)
    value = images.amax(1)
    span = value - images.amin(1)
    from_red, from_green, from_blue = ((value[:, None] - images).float() / span.clamp(min=1)[:, None]).unbind(1)
    is_red, is_green = red == value, green == value
    plus = torch.where(is_red, from_blue, torch.where(is_green, from_red, from_green))
    minus = torch.where(is_red, from_green, torch.where(is_green, from_blue, from_red))
    third = torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0)).double()
    # In float32 alone, one colour of 200 comes out a level of hue apart.
    turns = ((third + plus - minus).float().double() / 6.0 + 1.0).frac_().float()
    hue = (turns.double() * 255.0).long() * (span > 0)
    return hue, (span.float() / value.clamp(min=1) * 255.0).floor_(), value.float()


def _to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The way back, from what `_hsv` gives -> (B, 3, H, W) uint8."""
    below = _saturated_drops(hue.device)[hue].movedim(3, 1)
    return (value[:, None] * (1.0 - (saturation / 255.0)[:, None] * below) + 0.5).to(torch.uint8)


@lru_cache(maxsize=8)
def _saturated_drops(device: torch.device) -> Tensor:
    """(256, 3) float32: how far red, green and blue are below the value at full saturation, for each hue."""
    place = torch.arange(256, dtype=torch.float64) * 6.0 / 255.0
    sixth, rest = place.floor().long() % 6, place.frac()
    levels = torch.stack(
        (torch.zeros(256), 1.0 - rest.float(), rest.float(), torch.ones(256)), 1
    )  # at the top, rising, falling, at the bottom
    return levels.gather(1, torch.tensor([[0, 1, 3], [2, 0, 3], [3, 0, 1], [3, 2, 0], [1, 3, 0], [0, 3, 2]])[sixth]).to(
        device
    )


def gray_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    return torch.where(_per_image(drawn[:, 0] > 0, images), _to_luma(images).to(torch.uint8), images)


BATCH_OPS: dict[type[OpParams], Callable[[Tensor, np.ndarray, int], Tensor]] = {
    CropBox: crop_batch,
    Shift: shift_batch,
    Fit: fit_batch,
    Flip: flip_batch,
    Affine: warp_batch,
    Jitter: jitter_batch,
    Grayscale: gray_batch,
}
