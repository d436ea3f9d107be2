"""Blur and sharpness, in place, of (rows, 3, columns) uint8 planes."""

import math

import numpy as np

from firstlight.pipeline.data.augment.compiled.colors import blend_level
from firstlight.pipeline.data.augment.compiled.compiler import compiled
from firstlight.pipeline.data.augment.pixel_params import BLUR_LEVEL_PARTS, BLUR_WEIGHT_SUM

# The bits by which weighted sums of levels are divided down the columns, where a level keeps parts, and along the rows.
DOWN_BITS = int(math.log2(BLUR_WEIGHT_SUM / BLUR_LEVEL_PARTS))
ALONG_BITS = int(math.log2(BLUR_WEIGHT_SUM * BLUR_LEVEL_PARTS))
HALF_DOWN, HALF_ALONG = 1 << (DOWN_BITS - 1), 1 << (ALONG_BITS - 1)


@compiled
def reflect(place: int, side: int) -> int:
    """Returns the pixel at any place of a line of `side` that is continued by reflection at both ends."""
    period = max(1, 2 * side - 2)
    place = place % period
    return min(place, period - place)


@compiled
def blur_planes(planes: np.ndarray, weights: np.ndarray, k: int, radius: int) -> None:
    """Blurs down the columns, then along the rows, by the whole `weights[k]` of pixels at distances 0 .. `radius`."""
    rows, columns = planes.shape[0], planes.shape[2]
    levels, down = planes.reshape(rows, -1).copy(), np.empty(3 * columns, np.int32)
    line, along = np.empty(columns + 2 * radius, np.int32), np.empty(columns, np.int32)
    for y in range(rows):
        source, weight = levels[y], weights[k, 0]
        for j in range(3 * columns):
            down[j] = HALF_DOWN + np.int32(source[j]) * weight
        for distance in range(1, radius + 1):
            weight = weights[k, distance]
            before, after = levels[reflect(y - distance, rows)], levels[reflect(y + distance, rows)]
            for j in range(3 * columns):
                down[j] += np.int32(np.int32(before[j]) + np.int32(after[j])) * weight
        for channel in range(3):
            for j in range(columns):
                line[radius + j] = down[channel * columns + j] >> DOWN_BITS
            for j in range(radius):
                line[j] = line[radius + reflect(j - radius, columns)]
                line[radius + columns + j] = line[radius + reflect(columns + j, columns)]
            weight = weights[k, 0]
            for j in range(columns):
                along[j] = HALF_ALONG + line[radius + j] * weight
            for distance in range(1, radius + 1):
                weight = weights[k, distance]
                before, after = line[radius - distance :], line[radius + distance :]
                for j in range(columns):
                    along[j] += np.int32(before[j] + after[j]) * weight
            found = planes[y, channel]
            for j in range(columns):
                found[j] = np.uint8(along[j] >> ALONG_BITS)


@compiled
def sharpen_planes(planes: np.ndarray, factor: np.float32) -> None:
    """Blends planes with averages of 3 x 3 pixels, of which the middle counts five times; the outermost pixels stay."""
    source, rows, columns = planes.copy(), planes.shape[0], planes.shape[2]
    for y in range(1, rows - 1):
        for channel in range(3):
            above, own, below = source[y - 1, channel], source[y, channel], source[y + 1, channel]
            found = planes[y, channel]
            for x in range(1, columns - 1):
                total = np.int32(4) * own[x]
                for k in range(x - 1, x + 2):
                    total += np.int32(above[k]) + np.int32(own[k]) + np.int32(below[k])
                smooth = np.int32(np.float32(total) / np.float32(13.0) + np.float32(0.5))
                found[x] = blend_level(np.float32(smooth), own[x], factor)
