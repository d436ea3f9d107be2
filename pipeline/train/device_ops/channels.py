"""The augmentations of images with any number of channels, for many images at once on any device, bit by bit those of
`data.channels.channel_ops`.

Images are (B, C, H, W) int32 here; uint8, or int16 of the same bits, elsewhere (`tasks.device.pixel_levels`).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.pipeline.data.augment.op_params import (
    Affine,
    CropBox,
    Fit,
    Flip,
    Jitter,
    OpBatch,
    OpParams,
    Shift,
    VerticalFlip,
)
from firstlight.pipeline.data.augment.pixel_params import Blur, Erase
from firstlight.pipeline.data.channels.resampling import WEIGHT_SUM, Taps, find_taps
from firstlight.pipeline.train.device_ops.colors import expand_per_image
from firstlight.pipeline.train.device_ops.filters import blur_batch, erase_batch
from firstlight.pipeline.train.device_ops.geometry import (
    flip_batch,
    flip_batch_vertically,
    interpolate_affine,
    place_shifted,
)
from firstlight.tasks.device.copies import send_array
from firstlight.tasks.device.pixel_levels import WHITE_LEVELS, narrow_levels, widen_levels

# Values that are augmented at a time: an intermediate takes 8 bytes for each.
VALUES_PER_PART = {"cpu": 2**18}
DEFAULT_VALUES_PER_PART = 2**23


@torch.no_grad()
def augment_channel_batch(images: Tensor, drawn: Sequence[OpBatch], size: int) -> Tensor:
    """Augments (B, C, H, W) uint8 or int16 by parameters of `augment.sample_params`, to (B, C, size, size)."""
    channels = images.shape[1]
    values = max(images[0].numel(), channels * size**2)
    at_a_time = max(1, VALUES_PER_PART.get(images.device.type, DEFAULT_VALUES_PER_PART) // values)
    parts, white = [], WHITE_LEVELS[images.dtype]
    for start in range(0, len(images), at_a_time):
        part = widen_levels(images[start : start + at_a_time])
        for op in drawn:
            part = CHANNEL_BATCH_OPS[op.kind](part, op.rows[start : start + at_a_time], size, white)
        parts.append(narrow_levels(part, images.dtype))
    return torch.cat(parts)


def _crop_batch(images: Tensor, boxes: np.ndarray, size: int, white: int) -> Tensor:
    return _resample_levels(images, boxes, (size, size), white)


def _resample_levels(images: Tensor, boxes: np.ndarray, size: tuple[int, int], white: int) -> Tensor:
    """Resamples boxes (B, 4) left, top, width, height to `size` (width, height)."""
    left, top, across, down = boxes.T
    columns = _build_weights(find_taps(left, left + across, images.shape[3], size[0]), images.shape[3], images.device)
    rows = _build_weights(find_taps(top, top + down, images.shape[2], size[1]), images.shape[2], images.device)
    levels = _round_sums(images.double() @ columns.mT[:, None])
    return _round_sums(rows[:, None] @ levels).clamp_(max=float(white)).int()


def _build_weights(taps: Taps, inputs: int, device: torch.device) -> Tensor:
    """Returns the (B, outputs, inputs) float64 whole weights."""
    positions, weights = send_array(taps.positions, device), send_array(taps.weights, device)
    dense = torch.zeros(*weights.shape[:2], inputs, dtype=torch.float64, device=device)
    # Positions beyond the line have the weight 0.
    return dense.scatter_add_(2, positions, weights)


def _round_sums(sums: Tensor) -> Tensor:
    return sums.add_(WEIGHT_SUM / 2).div_(WEIGHT_SUM).floor_()


def _shift_batch(images: Tensor, drawn: np.ndarray, size: int, white: int) -> Tensor:
    square = _resample_levels(images, drawn[:, [0, 1, 2, 2]], (size, size), white)
    return place_shifted(square, drawn[:, 3:])


def _fit_batch(images: Tensor, drawn: np.ndarray, size: int, white: int) -> Tensor:
    """Resizes and pads the images. They have one size, so the first row of parameters applies to all."""
    across, down, left, top, width, height = (int(value) for value in drawn[0])
    boxes = np.tile((0.0, 0.0, across, down), (len(images), 1))
    whole = _resample_levels(images, boxes, (width, height), white)
    return F.pad(whole, (left, size - width - left, top, size - height - top))


def _flip_batch(images: Tensor, drawn: np.ndarray, size: int, white: int) -> Tensor:
    return flip_batch(images, drawn, size)


def _flip_batch_vertically(images: Tensor, drawn: np.ndarray, size: int, white: int) -> Tensor:
    return flip_batch_vertically(images, drawn, size)


def _warp_batch(images: Tensor, drawn: np.ndarray, size: int, white: int) -> Tensor:
    return (interpolate_affine(images, drawn, size) + 0.5).floor().int()


def _jitter_batch(images: Tensor, drawn: np.ndarray, size: int, white: int) -> Tensor:
    """Multiplies levels (brightness), or their distances from the mean of their channel (contrast)."""
    images = images.clone()
    for order in drawn[:, 4:].T:
        for k in (0, 1):
            rows = np.flatnonzero((order == k) & (drawn[:, k] != 1.0))
            if len(rows):
                index = send_array(rows, images.device)
                images[index] = _scale_contrast(images[index], drawn[rows, k], bool(k), white)
    return images


def _scale_contrast(images: Tensor, factors: np.ndarray, around_mean: bool, white: int) -> Tensor:
    factor, levels = expand_per_image(factors, images), images.double()
    if around_mean:
        total = images.sum((2, 3), keepdim=True, dtype=torch.int64).double()
        mean = (total / (images.shape[2] * images.shape[3]) + 0.5).floor()
        levels = mean + (levels - mean) * factor
    else:
        levels = levels * factor
    return (levels.clamp(0.0, float(white)) + 0.5).floor().int()


def _blur_batch(images: Tensor, drawn: np.ndarray, size: int, white: int) -> Tensor:
    return blur_batch(images, drawn, size, torch.float64)


CHANNEL_BATCH_OPS: dict[type[OpParams], Callable[[Tensor, np.ndarray, int, int], Tensor]] = {
    CropBox: _crop_batch,
    Shift: _shift_batch,
    Fit: _fit_batch,
    Flip: _flip_batch,
    VerticalFlip: _flip_batch_vertically,
    Affine: _warp_batch,
    Jitter: _jitter_batch,
    Blur: _blur_batch,
    Erase: erase_batch,
}
