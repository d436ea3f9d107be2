"""Compares compiled augmentations with Pillow: they are used only where they have its pixels, bit by bit.

Another version of Pillow may resample in another order, and a compiler may fuse what ours does not.
"""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from firstlight.pipeline.data.augment.compiled.steps import STEP_KINDS, pack_steps
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

# (pixels, numbers, weights, views), see `views.make_views`.
MakeViews = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]
# Widths and heights that Pillow resamples along rows first, and along columns first; one is enlarged.
COMPARED_SIZES = ((64, 48), (48, 200), (20, 17))
COMPARED_SIDE = 32
CROP = CropBox(1.25, 0.0, 14.5, 16.75)
COMPARED_CROPS: tuple[OpParams, ...] = (
    CROP,
    CropBox(0.0, 0.0, 20.0, 17.0),
    Shift(0.0, 0.0, 17.0, -3.0, 4.0),
    Fit(0.0, 0.0, 3.0, 5.0, 24.0, 20.0),
)
COMPARED_CHANGES: tuple[OpParams, ...] = (
    Flip(1.0),
    VerticalFlip(1.0),
    Affine(0.96, 0.21, -2.1, -0.21, 0.93, 3.4),
    Jitter(1.37, 0.61, 1.73, 0.31, 3.0, 0.0, 2.0, 1.0),
    Jitter(0.41, 1.59, 0.27, -0.17, 1.0, 3.0, 0.0, 2.0),
    Grayscale(1.0),
    Blur(1.3, 3.0),
    Solarize(97.5),
    Posterize(3.0),
    Equalize(1.0),
    AutoContrast(1.0),
    Sharpness(1.9),
    Erase(3.0, 5.0, 17.0, 21.0, NOISE, 1234567.0),
)


def find_difference(make_views: MakeViews) -> str:
    """Returns the kind of op whose pixels are not Pillow's, with the size of an image; empty if there is none."""
    for pixels in _make_pictures():
        height, width = pixels.shape[:2]
        crops = [Fit(width, height, *crop[2:]) if isinstance(crop, Fit) else crop for crop in COMPARED_CROPS]
        for ops in [*((crop,) for crop in crops), *((CROP, change) for change in COMPARED_CHANGES)]:
            views = np.empty((1, COMPARED_SIDE, COMPARED_SIDE, 3), np.uint8)
            steps = pack_steps([OpBatch(type(op), np.array([op], np.float64)) for op in ops])
            make_views(pixels[None], steps.numbers, steps.weights, views)
            image = Image.fromarray(pixels)
            for op in ops:
                image = op.apply_to(image, COMPARED_SIDE)
            if not np.array_equal(views[0], np.asarray(image)):
                return f"{type(ops[-1]).__name__} of {width} x {height} pixels"
    return ""


def _make_pictures() -> Iterator[np.ndarray]:
    """Yields (H, W, 3) uint8 noise, of low contrast in one channel."""
    rng = np.random.default_rng(0)
    for width, height in COMPARED_SIZES:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels[..., 1] = pixels[..., 1] // 2 + 40
        yield pixels


assert {type(op) for op in (*COMPARED_CROPS, *COMPARED_CHANGES)} == set(STEP_KINDS), "every kind is compared"
