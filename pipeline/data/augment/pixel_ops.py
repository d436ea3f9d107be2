"""Ops that change the levels of an image and leave every pixel where it is, but for `color_jitter` (`ops`)."""

import math
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le

from firstlight.pipeline.data.augment.crops import Side, Unit, scale_uniform, stack_params
from firstlight.pipeline.data.augment.op_params import OpBatch
from firstlight.pipeline.data.augment.pixel_params import (
    NO_THRESHOLD,
    NOISE,
    AutoContrast,
    Blur,
    Equalize,
    Erase,
    Posterize,
    Sharpness,
    Solarize,
)
from firstlight.pipeline.data.augment.random_numbers import CounterRng

Probability = Annotated[float, Ge(0.0), Le(1.0)]
BlurSigma = Annotated[float, Ge(0.01), Le(100.0)]
FillValue = Literal["black", "gray", "noise"]
# The levels of erased pixels. The grey is that of FixMatch's code.
FILL_LEVELS: dict[str, int] = {"black": 0, "gray": 127, "noise": NOISE}
# Boxes that are sampled for random erasing; the first that fits is used.
ERASING_TRIES = 10
# The side of a cut-out square as a share of the side of its view, where a recipe says nothing.
DEFAULT_CUTOUT_SCALE = 0.5


def gaussian_blur(
    rng: CounterRng,
    sources: np.ndarray,
    output_side: int,
    *,
    p: Probability = 0.5,
    sigma: tuple[BlurSigma, BlurSigma] = (0.1, 2.0),
    kernel_size: Annotated[int, Ge(3), Le(63)] | None = None,
) -> OpBatch:
    """Blurs the view with probability `p` by a Gaussian (torchvision's GaussianBlur to one level of 255; SimCLR).

    `sigma`: its standard deviation in pixels of the view is uniform between these.
    `kernel_size`: the width of the Gaussian in pixels, beyond which it is 0; an even number counts as the next odd one.
    null: a tenth of the view's side, as in SimCLR, but at least 3: 3 for a view of 32 pixels, 9 for 96, 23 for 224.
    """
    drawn = rng.uniform(2)
    radius = max(1, (kernel_size or output_side // 10) // 2)
    chosen = np.where(drawn[:, 0] < p, scale_uniform(drawn[:, 1], *sigma), 0.0)
    return stack_params(Blur, chosen, np.full(len(chosen), radius))


def solarize(
    rng: CounterRng,
    sources: np.ndarray,
    output_side: int,
    *,
    p: Probability = 0.5,
    threshold: Annotated[int, Ge(0), Le(255)] = 128,
) -> OpBatch:
    """Inverts the levels from `threshold` on, with probability `p` (torchvision's RandomSolarize)."""
    return stack_params(Solarize, np.where(rng.uniform(1)[:, 0] < p, threshold, NO_THRESHOLD))


def posterize(
    rng: CounterRng,
    sources: np.ndarray,
    output_side: int,
    *,
    bits: Annotated[int, Ge(1), Le(8)],
    p: Probability = 0.5,
) -> OpBatch:
    """Keeps the highest `bits` of each level, with probability `p` (torchvision's RandomPosterize)."""
    return stack_params(Posterize, np.where(rng.uniform(1)[:, 0] < p, bits, 8))


def equalize(rng: CounterRng, sources: np.ndarray, output_side: int, *, p: Probability = 0.5) -> OpBatch:
    """Equalises the histogram of each channel with probability `p` (torchvision's RandomEqualize)."""
    return stack_params(Equalize, rng.uniform(1)[:, 0] < p)


def autocontrast(rng: CounterRng, sources: np.ndarray, output_side: int, *, p: Probability = 0.5) -> OpBatch:
    """Stretches the levels of each channel to 0..255 with probability `p` (torchvision's RandomAutocontrast)."""
    return stack_params(AutoContrast, rng.uniform(1)[:, 0] < p)


def sharpness(
    rng: CounterRng,
    sources: np.ndarray,
    output_side: int,
    *,
    p: Probability = 0.5,
    sharpness_factor: Annotated[float, Ge(0.0), Le(10.0)] = 2.0,
) -> OpBatch:
    """Changes the sharpness with probability `p` (torchvision's RandomAdjustSharpness).

    `sharpness_factor`: 0 smooths, 1 changes nothing, 2 sharpens.
    """
    return stack_params(Sharpness, np.where(rng.uniform(1)[:, 0] < p, sharpness_factor, 1.0))


def random_erasing(
    rng: CounterRng,
    sources: np.ndarray,
    output_side: int,
    *,
    p: Probability = 0.5,
    scale: tuple[Unit, Unit] = (0.02, 0.33),
    ratio: tuple[Annotated[float, Gt(0.0)], Annotated[float, Gt(0.0)]] = (0.3, 3.3),
    value: FillValue = "black",
) -> OpBatch:
    """Erases a box of the view with probability `p` (torchvision's RandomErasing); boxes and masks stay as they are.

    `scale`: the share of the view's area that the box has is uniform between these.
    `ratio`: its height over its width is log-uniform between these.
    `value`: the box becomes `black`, `gray` (127), or `noise`, every level of every pixel uniform in 0..255.
    """
    drawn = rng.uniform(4 + 2 * ERASING_TRIES)
    area = output_side**2 * scale_uniform(drawn[:, 4 : 4 + ERASING_TRIES], *scale)
    aspect = np.exp(scale_uniform(drawn[:, 4 + ERASING_TRIES :], math.log(ratio[0]), math.log(ratio[1])))
    height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (height < output_side) & (width < output_side)
    first = fits.argmax(1)[:, None]
    erased = fits.any(1) & (drawn[:, 0] < p)
    height, width = (np.where(erased, np.take_along_axis(side, first, 1)[:, 0], 0.0) for side in (height, width))
    left, top = (
        np.floor(share * (output_side - side + 1)) for share, side in ((drawn[:, 1], width), (drawn[:, 2], height))
    )
    return _stack_boxes(left, top, left + width, top + height, value, drawn[:, 3])


def cutout(
    rng: CounterRng,
    sources: np.ndarray,
    output_side: int,
    *,
    p: Probability = 1.0,
    scale: Unit | None = None,
    size: Side | None = None,
    sizes: Literal["fixed", "random"] = "fixed",
    value: FillValue = "gray",
) -> OpBatch:
    """Erases a square at a random centre with probability `p` (DeVries and Taylor 2017); targets stay as they are.

    The centre is uniform over the pixels of the view, and what lies outside is cut off.

    `scale`: the side of the square as a share of the view's side. null: 0.5, as in FixMatch, or what `size` says.
    `size`: the side of the square in pixels of the view. null: what `scale` says.
    `sizes`: `fixed`, or `random`: uniform for each view from 0 to this side, as in TorchSSL's FixMatch.
    `value`: the square becomes `gray` (127, as in FixMatch), `black`, or `noise`, every level uniform in 0..255.
    """
    drawn = rng.uniform(5)
    largest = size or (scale or DEFAULT_CUTOUT_SCALE) * output_side
    side = np.rint(largest * (drawn[:, 4] if sizes == "random" else np.ones(len(drawn)))) * (drawn[:, 0] < p)
    edges = []
    for share in (drawn[:, 1], drawn[:, 2]):
        start = np.floor(share * output_side) - side // 2
        edges += [np.clip(start, 0, output_side), np.clip(start + side, 0, output_side)]
    left, right, top, bottom = edges
    return _stack_boxes(left, top, right, bottom, value, drawn[:, 3])


def _stack_boxes(
    left: np.ndarray, top: np.ndarray, right: np.ndarray, bottom: np.ndarray, value: FillValue, shares: np.ndarray
) -> OpBatch:
    """Returns the boxes to erase; the (B,) random numbers `shares` are the keys of their noise."""
    level = np.full(len(left), FILL_LEVELS[value])
    return stack_params(Erase, left, top, right, bottom, level, shares * 2.0**53)
