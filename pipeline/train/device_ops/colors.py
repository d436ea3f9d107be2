"""Changes of colour of many images at once on any device, bit-identical to Pillow's."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.data.augment.pixel_params import SATURATED_DROPS
from firstlight.tasks.device.copies import send_array


def expand_per_image(values: np.ndarray, images: Tensor) -> Tensor:
    """Sends (B,) values to the device of `images`, as (B, 1, 1, 1)."""
    return send_array(values, images.device)[:, None, None, None]


def jitter_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    """Applies the four changes of colour, in the order that was drawn for each image, unless they are neutral.

    Saturation and hue of images of one channel, which are gray, change nothing.
    """
    images = images.clone()
    changes = (_change_brightness, _change_contrast, _change_saturation, _change_hue)
    for turn in range(4, 8):
        for k, change in enumerate(changes[: 2 if images.shape[1] == 1 else 4]):
            rows = np.flatnonzero((drawn[:, turn] == k) & (drawn[:, k] != float(k < 3)))
            if len(rows):
                index = send_array(rows, images.device)
                images[index] = change(images[index], drawn[rows, k])
    return images


def _change_brightness(images: Tensor, factors: np.ndarray) -> Tensor:
    return blend_images(torch.zeros((), dtype=torch.float32, device=images.device), images, factors)


def _change_contrast(images: Tensor, factors: np.ndarray) -> Tensor:
    gray = _to_luma(images)
    mean = (gray.sum((1, 2, 3), keepdim=True).double() / gray[0].numel() + 0.5).floor()
    return blend_images(mean.float(), images, factors)


def _change_saturation(images: Tensor, factors: np.ndarray) -> Tensor:
    return blend_images(_to_luma(images).float(), images, factors)


def blend_images(base: Tensor, images: Tensor, factors: np.ndarray) -> Tensor:
    """Interpolates from `base` to the images by `factors`, above 1 beyond the images, and truncates, as Pillow does."""
    return (
        (base + expand_per_image(factors.astype(np.float32), images) * (images.float() - base))
        .clamp_(0, 255)
        .to(torch.uint8)
    )


def _to_luma(images: Tensor) -> Tensor:
    """Converts (B, 3, H, W) uint8 to (B, 1, H, W) int32, the luma of ITU-R 601; gray (B, 1, H, W) keep their level."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 2**15) >> 16)[:, None]


def _change_hue(images: Tensor, turns: np.ndarray) -> Tensor:
    hue, saturation, value = _to_hsv(images)
    by = send_array(np.rint(255 * turns).astype(np.int64), images.device)[:, None, None]
    return _to_rgb((hue + by) % 256, saturation, value)


def _to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Converts (B, 3, H, W) uint8 to hue int64, saturation and value float32, each (B, H, W) of integers in 0..255."""
    red, green, _ = images.unbind(1)
    value = images.amax(1)
    span = value - images.amin(1)
    from_red, from_green, from_blue = ((value[:, None] - images).float() / span.clamp(min=1)[:, None]).unbind(1)
    is_red, is_green = red == value, green == value
    plus = torch.where(is_red, from_blue, torch.where(is_green, from_red, from_green))
    minus = torch.where(is_red, from_green, torch.where(is_green, from_blue, from_red))
    third = torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0)).double()
    # One colour of 200 differs by a level of hue if all is computed in float32.
    turns = ((third + plus - minus).float().double() / 6.0 + 1.0).frac_().float()
    hue = (turns.double() * 255.0).long() * (span > 0)
    return hue, (span.float() / value.clamp(min=1) * 255.0).floor_(), value.float()


def _to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Inverts `_to_hsv` -> (B, 3, H, W) uint8."""
    below = _saturated_drops(hue.device)[hue].movedim(3, 1)
    return (value[:, None] * (1.0 - (saturation / 255.0)[:, None] * below) + 0.5).to(torch.uint8)


@lru_cache(maxsize=8)
def _saturated_drops(device: torch.device) -> Tensor:
    """Returns `SATURATED_DROPS` on a device, (256, 3)."""
    return send_array(np.ascontiguousarray(SATURATED_DROPS.T), device)


def gray_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    return torch.where(expand_per_image(drawn[:, 0] > 0, images), _to_luma(images).to(torch.uint8), images)
