"""The ops of a batch as numbers, which machine code reads."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from firstlight.pipeline.data.augment.op_params import (
    NO_OP,
    POLICY_KINDS,
    POLICY_STEP_WIDTH,
    Affine,
    CropBox,
    Fit,
    Flip,
    Grayscale,
    Jitter,
    OpBatch,
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
    blur_weights,
)

# The kinds of ops by their numbers.
STEP_KINDS = (
    CropBox,
    Shift,
    Fit,
    Flip,
    VerticalFlip,
    Affine,
    Jitter,
    Grayscale,
    Blur,
    Solarize,
    Posterize,
    Equalize,
    AutoContrast,
    Sharpness,
    Erase,
)
(
    CROP_BOX_STEP,
    SHIFT_STEP,
    FIT_STEP,
    FLIP_STEP,
    VERTICAL_FLIP_STEP,
    AFFINE_STEP,
    JITTER_STEP,
    GRAYSCALE_STEP,
    BLUR_STEP,
) = range(9)
SOLARIZE_STEP, POSTERIZE_STEP, EQUALIZE_STEP, AUTO_CONTRAST_STEP, SHARPNESS_STEP, ERASE_STEP = range(9, len(STEP_KINDS))
STEP_WIDTH = 1 + max(len(kind._fields) for kind in STEP_KINDS)
# The numbers of the kinds in `POLICY_KINDS`, and of no op, whose place is the last.
POLICY_STEPS = np.array([*(STEP_KINDS.index(kind) for kind in POLICY_KINDS), NO_OP], np.float64)


class Steps(NamedTuple):
    """The ops of B images, n for each.

    numbers: (B, n, STEP_WIDTH) float64: the number of an op in `STEP_KINDS`, or `NO_OP`, and its parameters.
    weights: (B, n, radius + 1) int32: of steps that blur, those of pixels at the distances 0 .. radius.
    """

    numbers: np.ndarray
    weights: np.ndarray


# (pixels, numbers, weights, views), see `views.make_views`.
MakeViews = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


def pack_steps(ops: Sequence[OpBatch]) -> Steps:
    """Returns the steps of ops that were drawn for the images of a batch. A policy has a step for each of its ops."""
    numbers, blurs = list[np.ndarray](), dict[int, np.ndarray]()
    for op in ops:
        if op.kind is Policy:
            numbers += [_pack_policy_step(part) for part in np.split(op.rows, op.rows.shape[1] // POLICY_STEP_WIDTH, 1)]
            continue
        if op.kind is Blur:
            blurs[len(numbers)] = _find_blur_weights(op.rows)
        kinds = np.full(len(op.rows), STEP_KINDS.index(op.kind), np.float64)
        numbers.append(_pack_step(kinds, op.rows))
    widest = max((len(weights[0]) for weights in blurs.values()), default=1)
    packed = np.zeros((len(ops[0].rows), len(numbers), widest), np.int32)
    for place, weights in blurs.items():
        packed[:, place, : weights.shape[1]] = weights
    return Steps(np.stack(numbers, 1), packed)


def _pack_policy_step(rows: np.ndarray) -> np.ndarray:
    return _pack_step(POLICY_STEPS[rows[:, 0].astype(np.int64)], rows[:, 1:])


def _pack_step(kinds: np.ndarray, params: np.ndarray) -> np.ndarray:
    step = np.zeros((len(kinds), STEP_WIDTH))
    step[:, 0], step[:, 1 : 1 + params.shape[1]] = kinds, params
    return step


def _find_blur_weights(rows: np.ndarray) -> np.ndarray:
    """Returns (B, radius + 1) int32 weights for the rows of a `Blur`, all of one radius; 0 where nothing is blurred."""
    weights = np.zeros((len(rows), int(rows[0, 1]) + 1), np.int32)
    blurred = rows[:, 0] > 0.0
    weights[blurred] = blur_weights(rows[blurred, 0], int(rows[0, 1]))
    return weights
