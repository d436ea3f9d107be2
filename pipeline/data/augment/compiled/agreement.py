"""Compares compiled augmentations with Pillow: they are used only where they have its pixels, bit by bit.

Another version of Pillow may resample in another order, and a compiler may fuse what ours does not.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from firstlight.pipeline.data.augment.compiled.steps import STEP_KINDS, MakeViews, pack_steps
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
    VerticalFlip,
)
from firstlight.pipeline.data.augment.pixel_params import (
    NOISE,
    AutoContrast,
    Blur,
    Equalize,
    Erase,
    Posterize,
    Sharpness,
    Solarize,
)

# Widths and heights that Pillow resamples along rows first, and along columns first; one is enlarged.
COMPARED_SIZES = ((64, 48), (48, 200), (20, 17))
COMPARED_SIDE = 32
# Factors whose products with levels lie next to whole numbers, where the last bit decides.
TENTHS, ORDER = (0.1, 0.3, 0.7, 1.1, 1.7, 1.9), (0.0, 1.0, 2.0, 3.0)
CROP = CropBox(1.25, 0.0, 14.5, 16.75)
COMPARED_CROPS: tuple[OpParams, ...] = (
    CROP,
    CropBox(0.0, 0.0, 20.0, 17.0),
    CropBox(0.3, 1.7, 9.1, 6.4),
    CropBox(3.1, 0.9, 16.7, 14.3),
    Shift(0.0, 0.0, 17.0, -3.0, 4.0),
    Fit(0.0, 0.0, 3.0, 5.0, 24.0, 20.0),
)
COMPARED_CHANGES: tuple[OpParams, ...] = (
    Flip(1.0),
    VerticalFlip(1.0),
    Affine(0.96, 0.21, -2.1, -0.21, 0.93, 3.4),
    Affine(1.3, -0.4, 3.7, 0.6, 0.8, -2.9),
    Jitter(1.37, 0.61, 1.73, 0.31, 3.0, 0.0, 2.0, 1.0),
    Jitter(0.41, 1.59, 0.27, -0.17, 1.0, 3.0, 0.0, 2.0),
    *(Jitter(factor, 1.0, 1.0, 0.0, *ORDER) for factor in TENTHS),
    *(Jitter(1.0, factor, 1.0, 0.0, *ORDER) for factor in TENTHS),
    *(Jitter(1.0, 1.0, factor, 0.0, *ORDER) for factor in TENTHS),
    *(Jitter(1.0, 1.0, 1.0, turns, *ORDER) for turns in (0.03, 0.21, 0.47)),
    Grayscale(1.0),
    Blur(1.3, 3.0),
    Solarize(97.5),
    Posterize(3.0),
    Equalize(1.0),
    AutoContrast(1.0),
    *(Sharpness(factor) for factor in TENTHS),
    Erase(3.0, 5.0, 17.0, 21.0, NOISE, 1234567.0),
)


def find_difference(make_views: MakeViews) -> str:
    """Returns the kind of op whose pixels are not Pillow's, with the size of an image; empty if there is none."""
    for pixels in _make_pictures():
        height, width = pixels.shape[:2]
        crops = [Fit(width, height, *crop[2:]) if isinstance(crop, Fit) else crop for crop in COMPARED_CROPS]
        for ops in [*((crop,) for crop in crops), *((CROP, change) for change in COMPARED_CHANGES)]:
            if not np.array_equal(_apply_compiled(make_views, pixels, ops), _apply_with_pillow(pixels, ops)):
                return f"{type(ops[-1]).__name__} of {width} x {height} pixels"
    return ""


def _apply_compiled(make_views: MakeViews, pixels: np.ndarray, ops: Sequence[OpParams]) -> np.ndarray:
    views = np.empty((1, COMPARED_SIDE, COMPARED_SIDE, 3), np.uint8)
    steps = pack_steps([OpBatch(type(op), np.array([op], np.float64)) for op in ops])
    make_views(pixels[None], steps.numbers, steps.weights, views)
    return views.reshape(views.shape[1:])


def _apply_with_pillow(pixels: np.ndarray, ops: Sequence[OpParams]) -> np.ndarray:
    colours = np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else np.ascontiguousarray(pixels[..., :3])
    image = Image.fromarray(colours)
    for op in ops:
        image = op.apply_to(image, COMPARED_SIDE)
    return np.asarray(image)


def _make_pictures() -> Iterator[np.ndarray]:
    """Yields (H, W, C) uint8 images: noise, of low contrast in one channel, and ramps; of 3, 4 and 1 channels."""
    rng = np.random.default_rng(0)
    for width, height in COMPARED_SIZES:
        pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
        pixels[..., 1] = pixels[..., 1] // 2 + 40
        pixels[::2, : width // 2, 2] = np.arange(width // 2) * 255 // width
        yield np.ascontiguousarray(pixels[..., :3])
        yield pixels
        yield np.ascontiguousarray(pixels[..., 2:3])


assert {type(op) for op in (*COMPARED_CROPS, *COMPARED_CHANGES)} == set(STEP_KINDS), "every kind is compared"
