"""Named augmentations, on the CPU, with PIL and numpy only: the decoding tasks import no torch.

An augmentation is a pure function of (image, random numbers). The random numbers are a pure function of (seed, pass,
id, view), the index of the op in its list, and the index of the number among those of the op (`random_numbers`). The
order of reading, the number of workers and retries therefore cannot change a pixel. A pipeline starts with one crop,
which makes the image `size` x `size`. Crops choose their box in the coordinates of the source image and resample once,
so that an extreme aspect ratio (1 x 5000) never becomes a huge intermediate image.

The parameters of an op are sampled for all images of a batch at once, before it is applied: an op depends on random
numbers and on the sizes of the images, never on pixels.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from PIL import Image

from firstlight.pipeline.data.augment.op_params import (
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
from firstlight.pipeline.data.augment.random_numbers import CounterRng

Unit = Annotated[float, Gt(0.0), Le(1.0)]
Strength = Annotated[float, Ge(0.0), Le(1.0)]
Corner = Literal["center", "top_left", "top_right", "bottom_left", "bottom_right"]
# Boxes that are sampled for a random resized crop; the first that fits is used.
CROP_TRIES = 10
# The (24, 4) orders of the four changes of color_jitter.
JITTER_ORDERS = np.array(list(permutations(range(4))), np.float64)


def _stack_params(kind: type[OpParams], *columns: np.ndarray) -> OpBatch:
    rows = np.empty((len(columns[0]), len(columns)))
    for k, column in enumerate(columns):
        rows[:, k] = column
    return OpBatch(kind, rows)


# Each op takes a generator, the (B, 2) widths and heights of the source images, and the size of the result. Its
# keyword-only parameters are its parameters in a recipe.


def center_crop(rng: CounterRng, sources: np.ndarray, size: int, *, scale: Unit = 1.0) -> OpBatch:
    """Crops the central square; its side is `scale` times the shorter side (0.875: resize to 256, then crop 224)."""
    return _crop_square(sources, size, scale, np.array([0.5, 0.5]))


def random_crop(rng: CounterRng, sources: np.ndarray, size: int, *, scale: Unit = 0.875) -> OpBatch:
    """Crops a square at a random position; its side is `scale` times the shorter side.

    NAT resizes the shorter side to 256 and crops 224, which is the default.
    """
    return _crop_square(sources, size, scale, rng.uniform(2))


def corner_crop(rng: CounterRng, sources: np.ndarray, size: int, *, corner: Corner, scale: Unit = 0.875) -> OpBatch:
    """Crops a square.

    `corner`: the corner of the image that it lies in, or its centre.
    `scale`: its side as a share of the image's shorter side.
    """
    right, down = (0.5, 0.5) if corner == "center" else (float("right" in corner), float("bottom" in corner))
    return _crop_square(sources, size, scale, np.array([right, down]))


def _crop_square(sources: np.ndarray, size: int, scale: float, position: np.ndarray) -> OpBatch:
    """Returns square crops at `position`, (B, 2) or (2,): 0 is the left or top edge, 1 the right or bottom edge.

    A crop that keeps its size is on whole pixels, so that it copies instead of resampling.
    """
    side = scale * sources.min(1, keepdims=True)
    free = sources - side
    corner = np.where(side == size, np.minimum(np.floor(position * (free + 1)), free), position * free)
    return OpBatch(CropBox, np.hstack((corner, side, side)))


def fit_inside(rng: CounterRng, sources: np.ndarray, size: int) -> OpBatch:
    """Fits the whole image into the middle of a black square, so that no box or mask is cut off."""
    sides = np.maximum(1, np.rint(sources * (size / sources.max(1, keepdims=True))))
    return OpBatch(Fit, np.hstack((sources, np.floor((size - sides) / 2), sides)))


def random_shift(rng: CounterRng, sources: np.ndarray, size: int, *, padding: Annotated[int, Ge(0)] = 4) -> OpBatch:
    """Resizes the central square to `size`, pads it with `padding` black pixels, and crops at a random position.

    This is the usual crop for CIFAR.
    """
    square = center_crop(rng, sources, size).rows[:, :3]
    return OpBatch(Shift, np.hstack((square, padding - np.floor(rng.uniform(2) * (2 * padding + 1)))))


def random_resized_crop(
    rng: CounterRng,
    sources: np.ndarray,
    size: int,
    *,
    scale: tuple[Unit, Unit] = (0.08, 1.0),
    ratio: tuple[Annotated[float, Gt(0.0)], Annotated[float, Gt(0.0)]] = (3 / 4, 4 / 3),
) -> OpBatch:
    """Crops a box of `scale` times the area, aspect ratio log-uniform in `ratio` (torchvision's RandomResizedCrop)."""
    width, height = sources.T.astype(np.float64)
    drawn = rng.uniform(2 + 2 * CROP_TRIES)
    area = (width * height)[:, None] * _scale_uniform(drawn[:, 2 : 2 + CROP_TRIES], *scale)
    aspect = np.exp(_scale_uniform(drawn[:, 2 + CROP_TRIES :], math.log(ratio[0]), math.log(ratio[1])))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = fits.argmax(1)[:, None]
    any_fits = fits.any(1)
    # If none fits: the largest central box of the nearest ratio.
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
    return _stack_params(CropBox, left, top, w, h)


def horizontal_flip(
    rng: CounterRng, sources: np.ndarray, size: int, *, p: Annotated[float, Ge(0.0), Le(1.0)] = 0.5
) -> OpBatch:
    """Mirrors the image left to right with probability `p`."""
    return _stack_params(Flip, rng.uniform(1)[:, 0] < p)


def random_affine(
    rng: CounterRng,
    sources: np.ndarray,
    size: int,
    *,
    degrees: Annotated[float, Ge(0.0), Le(180.0)] = 10.0,
    scale: Annotated[float, Ge(0.0), Le(0.9)] = 0.1,
) -> OpBatch:
    """Rotates by up to `degrees` and scales by 1 +- `scale` about the centre; black outside."""
    turn, grow = rng.uniform(2).T
    angle, zoom = np.radians(_scale_uniform(turn, -degrees, degrees)), _scale_uniform(grow, 1 - scale, 1 + scale)
    a, b, c = np.cos(angle) / zoom, np.sin(angle) / zoom, size / 2
    return _stack_params(Affine, a, b, c - a * c - b * c, -b, a, c + b * c - a * c)


def color_jitter(
    rng: CounterRng,
    sources: np.ndarray,
    size: int,
    *,
    brightness: Strength = 0.4,
    contrast: Strength = 0.4,
    saturation: Strength = 0.4,
    hue: Annotated[float, Ge(0.0), Le(0.5)] = 0.1,
) -> OpBatch:
    """Changes brightness, contrast, saturation and hue in random order (torchvision's ColorJitter).

    `brightness`: its factor is uniform in 1 +- this strength.
    `contrast`: its factor is uniform in 1 +- this strength.
    `saturation`: its factor is uniform in 1 +- this strength.
    `hue`: the hue is shifted by up to this many turns.
    """
    drawn = rng.uniform(5)
    strength = np.array((brightness, contrast, saturation, hue))
    changes = np.array((1.0, 1.0, 1.0, 0.0)) + _scale_uniform(drawn[:, :4], -strength, strength)
    return OpBatch(Jitter, np.hstack((changes, JITTER_ORDERS[(drawn[:, 4] * len(JITTER_ORDERS)).astype(np.int64)])))


def random_grayscale(
    rng: CounterRng, sources: np.ndarray, size: int, *, p: Annotated[float, Ge(0.0), Le(1.0)] = 0.2
) -> OpBatch:
    """Makes the image grey with probability `p`."""
    return _stack_params(Grayscale, rng.uniform(1)[:, 0] < p)


def _scale_uniform(share: np.ndarray, low: Any, high: Any) -> np.ndarray:
    numbers: np.ndarray = low + (high - low) * share
    return numbers


CROP_OPS: dict[str, Callable[..., OpBatch]] = {
    "center_crop": center_crop,
    "corner_crop": corner_crop,
    "fit": fit_inside,
    "random_crop": random_crop,
    "random_shift": random_shift,
    "random_resized_crop": random_resized_crop,
}
OPS: dict[str, Callable[..., OpBatch]] = {
    **CROP_OPS,
    "horizontal_flip": horizontal_flip,
    "random_affine": random_affine,
    "color_jitter": color_jitter,
    "random_grayscale": random_grayscale,
}


def list_ten_crops(scale: float = 0.875) -> tuple[tuple[dict[str, Any], ...], ...]:
    """Returns ten lists of ops: four corners and the centre, then their mirror images (torchvision's TenCrop)."""
    corners = ("top_left", "top_right", "bottom_left", "bottom_right", "center")
    # The top left of a mirrored image was its top right.
    mirrored = ("top_right", "top_left", "bottom_right", "bottom_left", "center")
    crops = [{"op": "corner_crop", "corner": corner, "scale": scale} for corner in (*corners, *mirrored)]
    return tuple(
        (crop,) if k < len(corners) else (crop, {"op": "horizontal_flip", "p": 1.0}) for k, crop in enumerate(crops)
    )


def sample_params(ops: Sequence[Mapping[str, Any]], keys: np.ndarray, sources: np.ndarray, size: int) -> list[OpBatch]:
    """Samples the parameters of each of `ops`, which are applied one after the other, for the images of a batch.

    `ops`: mappings `{"op": name, **parameters}`, as in a recipe; `keys`: (B,) uint64 of `derive_view_keys`; `sources`:
    (B, 2) widths and heights of the images.
    """
    return [
        OPS[op["op"]](CounterRng(keys, index), sources, size, **{k: v for k, v in op.items() if k != "op"})
        for index, op in enumerate(ops)
    ]


def apply_params(image: Image.Image, params: Sequence[OpParams], size: int) -> np.ndarray:
    """Applies the ops' parameters to an RGB image of any size. Returns (size, size, 3) uint8."""
    for op in params:
        image = op.apply_to(image, size)
    return np.asarray(image, dtype=np.uint8)


def apply_batch(images: Sequence[Image.Image], ops: Sequence[OpBatch], size: int) -> Iterator[np.ndarray]:
    """Applies the ops' parameters to RGB images of any sizes. Yields (size, size, 3) uint8, one image after another."""
    for image, params in zip(images, zip(*(op.params_per_image() for op in ops), strict=True), strict=True):
        yield apply_params(image, params, size)
