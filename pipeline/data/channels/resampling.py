"""Resampling of levels of up to 16 bits: bilinear and antialiased, by the rule of Pillow for images of 8 bits.

A level is the sum of levels times weights, which are whole multiples of 2**-22: a triangle around each output, two
input pixels wide, or two output pixels if those are larger. It is rounded after the pass along rows and after that
along columns. These sums are whole numbers below 2**53, which float64 has exactly in any order, so that numpy here and
torch on any device give the same pixels.
"""

import math
from typing import NamedTuple

import numpy as np

# The sum of the weights of an output.
WEIGHT_SUM = 2.0**22


class Taps(NamedTuple):
    """The inputs that each output is made of: (B, outputs, taps) int64 positions and float64 whole weights."""

    positions: np.ndarray
    weights: np.ndarray


def find_taps(starts: np.ndarray, stops: np.ndarray, inputs: int, outputs: int) -> Taps:
    """Returns the taps of `outputs` pixels that lie evenly in each of the (B,) spans of a line of `inputs` pixels.

    Spans are cut off at the ends of the line.
    """
    start = np.maximum(starts.astype(np.float64), 0.0)[:, None, None]
    stop = np.minimum(stops.astype(np.float64), float(inputs))[:, None, None]
    scale = (stop - start) / outputs
    reach = np.maximum(scale, 1.0)
    count = 2 * math.ceil(float(reach.max())) + 2
    center = start + (np.arange(outputs)[:, None] + 0.5) * scale
    position = np.maximum(np.trunc(center - reach + 0.5), 0.0) + np.arange(count)
    is_seen = position < np.minimum(np.trunc(center + reach + 0.5), float(inputs))
    weight = np.maximum(1.0 - np.abs((position - center + 0.5) / reach), 0.0) * is_seen
    weight = np.floor(weight / weight.sum(2, keepdims=True) * WEIGHT_SUM + 0.5)
    return Taps(np.minimum(position, inputs - 1).astype(np.int64), weight)


def round_sums(sums: np.ndarray) -> np.ndarray:
    """Rounds sums of levels times weights to levels, in place."""
    sums += WEIGHT_SUM / 2
    sums /= WEIGHT_SUM
    levels: np.ndarray = np.floor(sums, out=sums)
    return levels


def resample_box(
    values: np.ndarray, box: tuple[float, float, float, float], width: int, height: int, white: int
) -> np.ndarray:
    """Resamples a box (left, top, width, height) of (H, W, C) levels to (`height`, `width`, C) of the same type."""
    left, top, across, down = box
    if (across, down) == (width, height) and left == int(left) and top == int(top):
        return values[int(top) : int(top) + height, int(left) : int(left) + width]
    columns = find_taps(np.array([left]), np.array([left + across]), values.shape[1], width)
    rows = find_taps(np.array([top]), np.array([top + down]), values.shape[0], height)
    # Only the rows that an output sees are resampled.
    first, last = int(rows.positions[0].min()), int(rows.positions[0].max()) + 1
    levels = _sum_along(values[first:last], columns.positions[0], columns.weights[0], 1)
    levels = _sum_along(levels, rows.positions[0] - first, rows.weights[0], 0)
    resampled: np.ndarray = np.minimum(levels, float(white)).astype(values.dtype)
    return resampled


def _sum_along(values: np.ndarray, positions: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """Returns the rounded sums of (H, W, C) levels along an axis; (outputs, taps) positions and weights."""
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    total: np.ndarray = np.zeros(1)
    for place, weight in zip(positions.T, weights.T, strict=True):
        if weight.any():
            total = total + values.take(place, axis) * weight.reshape(shape)
    levels: np.ndarray = round_sums(total)
    return levels
