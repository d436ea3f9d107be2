"""Crops: the ops that a pipeline starts with, which make an image square.

They choose their box in the coordinates of the source image and resample once, so that an extreme aspect ratio (1 x
5000) never becomes a huge intermediate image. The side of a square is a share of the image (`scale`), or a number of
its pixels (`size`): a published crop of 89 of 96 pixels is 89, and not a rounded share, which would resample.
"""

import math
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le

from firstlight.pipeline.data.augment.op_params import CropBox, Fit, OpBatch, OpParams, Shift
from firstlight.pipeline.data.augment.random_numbers import CounterRng

Unit = Annotated[float, Gt(0.0), Le(1.0)]
Side = Annotated[int, Ge(1)]
Corner = Literal["center", "top_left", "top_right", "bottom_left", "bottom_right"]
# The side of a crop as a share of the shorter side of its image, where a recipe says nothing: 224 of 256 pixels.
DEFAULT_CROP_SCALE = 0.875
# Boxes that are sampled for a random resized crop; the first that fits is used.
CROP_TRIES = 10


def stack_params(kind: type[OpParams], *columns: np.ndarray) -> OpBatch:
    """Returns the parameters of a batch from (B,) columns, in the order of the fields of `kind`."""
    rows = np.empty((len(columns[0]), len(columns)))
    for k, column in enumerate(columns):
        rows[:, k] = column
    return OpBatch(kind, rows)


def scale_uniform(share: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """Maps shares in [0, 1) to [low, high)."""
    numbers: np.ndarray = low + (high - low) * share
    return numbers


def center_crop(
    rng: CounterRng, sources: np.ndarray, output_side: int, *, scale: Unit | None = None, size: Side | None = None
) -> OpBatch:
    """Crops the central square.

    `scale`: its side as a share of the image's shorter side (0.875: resize to 256, then crop 224). null: 1, or what
    `size` says.
    `size`: its side in pixels of the image; a crop of `image_size` pixels is copied, not resampled. An image with a
    shorter side of fewer pixels gives its largest square. null: what `scale` says.
    """
    return _crop_square(sources, output_side, np.array([0.5, 0.5]), 1.0, scale, size)


def random_crop(
    rng: CounterRng, sources: np.ndarray, output_side: int, *, scale: Unit | None = None, size: Side | None = None
) -> OpBatch:
    """Crops a square at a random position.

    `scale`: its side as a share of the image's shorter side. null: 0.875, or what `size` says. 0.875 is 224 of 256, as
    in NAT, which resizes the shorter side to 256.
    `size`: its side in pixels of the image; a crop of `image_size` pixels is copied, not resampled. An image with a
    shorter side of fewer pixels gives its largest square. null: what `scale` says.
    """
    return _crop_square(sources, output_side, rng.uniform(2), DEFAULT_CROP_SCALE, scale, size)


def corner_crop(
    rng: CounterRng,
    sources: np.ndarray,
    output_side: int,
    *,
    corner: Corner,
    scale: Unit | None = None,
    size: Side | None = None,
) -> OpBatch:
    """Crops a square.

    `corner`: the corner of the image that it lies in, or its centre.
    `scale`: its side as a share of the image's shorter side. null: 0.875, or what `size` says.
    `size`: its side in pixels of the image; a crop of `image_size` pixels is copied, not resampled. An image with a
    shorter side of fewer pixels gives its largest square. null: what `scale` says.
    """
    right, down = (0.5, 0.5) if corner == "center" else (float("right" in corner), float("bottom" in corner))
    return _crop_square(sources, output_side, np.array([right, down]), DEFAULT_CROP_SCALE, scale, size)


def window_crop(
    rng: CounterRng,
    sources: np.ndarray,
    output_side: int,
    *,
    index: Annotated[int, Ge(0)] = 0,
    scale: Unit | None = None,
    size: Side | None = None,
) -> OpBatch:
    """Crops one of the squares that together cover the image: as few as that takes in every row, at even distances.

    `index`: the number of the square, row by row from the upper left; beyond the last it is the last.
    `scale`: its side as a share of the image's shorter side. null: 0.875, or what `size` says.
    `size`: its side in pixels of the image; a crop of `image_size` pixels is copied, not resampled. An image with a
    shorter side of fewer pixels gives its largest square. null: what `scale` says.
    """
    columns, rows = count_windows(sources, scale, size).T
    number = np.minimum(index, columns * rows - 1)
    cell, steps = np.stack((number % columns, number // columns), 1), np.stack((columns, rows), 1) - 1
    side = _find_side(sources, DEFAULT_CROP_SCALE, scale, size)
    # The product is one of whole numbers, so that rounding leaves no gap between squares on whole pixels.
    product, steps = cell * (sources - side), np.maximum(steps, 1)
    corner = np.where(_is_on_pixels(side, output_side, size), product // steps, product / steps)
    return OpBatch(CropBox, np.hstack((corner, side, side)))


def count_windows(sources: np.ndarray, scale: float | None, size: int | None) -> np.ndarray:
    """Returns the (B, 2) numbers of columns and rows of squares that cover images of (B, 2) widths and heights."""
    side = _find_side(sources, DEFAULT_CROP_SCALE, scale, size)
    # A square that falls short by rounding alone needs no other beside it.
    counts: np.ndarray = np.ceil(sources / side - 1e-9).astype(np.int64)
    return counts


def _crop_square(
    sources: np.ndarray,
    output_side: int,
    position: np.ndarray,
    default_scale: float,
    scale: float | None,
    size: int | None,
) -> OpBatch:
    """Returns square crops at `position`, (B, 2) or (2,): 0 is the left or top edge, 1 the right or bottom edge."""
    side = _find_side(sources, default_scale, scale, size)
    free, on_pixels = sources - side, _is_on_pixels(side, output_side, size)
    corner = np.where(on_pixels, np.minimum(np.floor(position * (free + 1)), free), position * free)
    return OpBatch(CropBox, np.hstack((corner, side, side)))


def _is_on_pixels(side: np.ndarray, output_side: int, size: int | None) -> np.ndarray:
    """Returns (B, 1) bool: True for crops with corners on whole pixels of the image.

    They are those given in pixels, and those that keep their size, which then are copied instead of resampled.
    """
    on_pixels: np.ndarray = (side == output_side) | (size is not None)
    return on_pixels


def _find_side(sources: np.ndarray, default_scale: float, scale: float | None, size: int | None) -> np.ndarray:
    """Returns the (B, 1) sides of square crops, in pixels of images of (B, 2) widths and heights."""
    assert scale is None or size is None, "the checks of a recipe let one of them through"
    shorter = sources.min(1, keepdims=True)
    side: np.ndarray = np.minimum(float(size), shorter) if size else (scale or default_scale) * shorter
    return side


def fit_inside(rng: CounterRng, sources: np.ndarray, output_side: int) -> OpBatch:
    """Fits the whole image into the middle of a black square, so that no box or mask is cut off."""
    sides = np.maximum(1, np.rint(sources * (output_side / sources.max(1, keepdims=True))))
    return OpBatch(Fit, np.hstack((sources, np.floor((output_side - sides) / 2), sides)))


def random_shift(
    rng: CounterRng, sources: np.ndarray, output_side: int, *, padding: Annotated[int, Ge(0)] = 4
) -> OpBatch:
    """Resizes the central square to the side of the result, pads it with black, and crops at a random position.

    `padding`: the number of black pixels on each side. This is the usual crop for CIFAR.
    """
    square = center_crop(rng, sources, output_side).rows[:, :3]
    return OpBatch(Shift, np.hstack((square, padding - np.floor(rng.uniform(2) * (2 * padding + 1)))))


def random_resized_crop(
    rng: CounterRng,
    sources: np.ndarray,
    output_side: int,
    *,
    scale: tuple[Unit, Unit] = (0.08, 1.0),
    ratio: tuple[Annotated[float, Gt(0.0)], Annotated[float, Gt(0.0)]] = (3 / 4, 4 / 3),
) -> OpBatch:
    """Crops a box of `scale` times the area, aspect ratio log-uniform in `ratio` (torchvision's RandomResizedCrop)."""
    width, height = sources.T.astype(np.float64)
    drawn = rng.uniform(2 + 2 * CROP_TRIES)
    area = (width * height)[:, None] * scale_uniform(drawn[:, 2 : 2 + CROP_TRIES], *scale)
    aspect = np.exp(scale_uniform(drawn[:, 2 + CROP_TRIES :], math.log(ratio[0]), math.log(ratio[1])))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = fits.argmax(1)[:, None]
    any_fits = fits.any(1)
    # The largest central box of the nearest ratio is taken if no box fits.
    w = np.where(
        any_fits, np.take_along_axis(w, first, 1)[:, 0], np.minimum(width, np.maximum(1, np.rint(height * max(ratio))))
    )
    h = np.where(
        any_fits, np.take_along_axis(h, first, 1)[:, 0], np.minimum(height, np.maximum(1, np.rint(width / min(ratio))))
    )
    left, top = (
        np.where(any_fits, np.floor(u * (free + 1)), free / 2)
        for u, free in ((drawn[:, 0], width - w), (drawn[:, 1], height - h))
    )
    return stack_params(CropBox, left, top, w, h)
