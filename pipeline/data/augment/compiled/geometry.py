"""Flips, shifts, affine maps and erased boxes, in place, of (rows, 3, columns) uint8 planes."""

import numpy as np

from firstlight.pipeline.data.augment.compiled.compiler import compiled
from firstlight.pipeline.data.augment.random_numbers import (
    FIRST_MULTIPLIER,
    FIRST_SHIFT,
    GOLDEN_GAMMA,
    SECOND_MULTIPLIER,
    SECOND_SHIFT,
    THIRD_SHIFT,
)

LEVEL_SHIFT, NEXT = np.uint64(64 - 8), np.uint64(1)


@compiled
def flip_planes(planes: np.ndarray) -> None:
    columns = planes.shape[2]
    for y in range(planes.shape[0]):
        for channel in range(3):
            line = planes[y, channel]
            for x in range(columns // 2):
                line[x], line[columns - 1 - x] = line[columns - 1 - x], line[x]


@compiled
def flip_planes_vertically(planes: np.ndarray) -> None:
    rows = planes.shape[0]
    levels = planes.reshape(rows, -1)
    for y in range(rows // 2):
        upper, lower = levels[y], levels[rows - 1 - y]
        for j in range(upper.shape[0]):
            upper[j], lower[j] = lower[j], upper[j]


@compiled
def place_planes(planes: np.ndarray, left: int, top: int, side: int) -> np.ndarray:
    """Returns (side, 3, side) black planes with others at a place, which may lie partly outside."""
    placed = np.zeros((side, 3, side), np.uint8)
    rows, columns = planes.shape[0], planes.shape[2]
    for y in range(max(0, -top), min(rows, side - top)):
        for channel in range(3):
            for x in range(max(0, -left), min(columns, side - left)):
                placed[top + y, channel, left + x] = planes[y, channel, x]
    return placed


@compiled
def warp_planes(planes: np.ndarray, a: float, b: float, c: float, d: float, e: float, f: float) -> None:
    """Applies an `Affine`, bilinear between the centres of pixels; the outermost half pixel has the edge's levels."""
    source, side = planes.copy(), planes.shape[2]
    for row in range(side):
        for column in range(side):
            x = a * (column + 0.5) + b * (row + 0.5) + c
            y = d * (column + 0.5) + e * (row + 0.5) + f
            if x < 0 or x >= side or y < 0 or y >= side:
                planes[row, 0, column] = planes[row, 1, column] = planes[row, 2, column] = 0
                continue
            left, top = np.floor(x - 0.5), np.floor(y - 0.5)
            right_share, low_share = x - 0.5 - left, y - 0.5 - top
            near, far = max(int(left), 0), min(int(left) + 1, side - 1)
            above, below = max(int(top), 0), min(int(top) + 1, side - 1)
            for channel in range(3):
                upper_line, lower_line = source[above, channel], source[below, channel]
                first = np.float64(upper_line[near])
                upper = first + (np.float64(upper_line[far]) - first) * right_share
                second = np.float64(lower_line[near])
                lower = second + (np.float64(lower_line[far]) - second) * right_share
                planes[row, channel, column] = np.uint8(upper + (lower - upper) * low_share)


@compiled
def draw_level(key: np.uint64, number: int) -> np.uint8:
    """Returns a level of noise: those of `random_numbers.draw_levels`, counted from 0."""
    bits = key + (np.uint64(number) + NEXT) * GOLDEN_GAMMA
    bits ^= bits >> FIRST_SHIFT
    bits *= FIRST_MULTIPLIER
    bits ^= bits >> SECOND_SHIFT
    bits *= SECOND_MULTIPLIER
    bits ^= bits >> THIRD_SHIFT
    return np.uint8(bits >> LEVEL_SHIFT)


@compiled
def erase_box(planes: np.ndarray, left: int, top: int, right: int, bottom: int, level: int, key: float) -> None:
    """Erases the box of an `Erase`, to its level, or to noise of its key if the level is negative."""
    columns = planes.shape[2]
    for y in range(top, bottom):
        for x in range(left, right):
            for channel in range(3):
                noise = draw_level(np.uint64(key), (y * columns + x) * 3 + channel)
                planes[y, channel, x] = noise if level < 0 else np.uint8(level)
