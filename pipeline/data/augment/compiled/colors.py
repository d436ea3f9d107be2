"""Changes of colour, in place, of (rows, 3, columns) uint8 planes."""

import numpy as np

from firstlight.pipeline.data.augment.compiled.compiler import compiled
from firstlight.pipeline.data.augment.pixel_params import SATURATED_DROPS

SINGLE_ONE, HALF_LEVEL, HIGHEST, BLACK = np.float32(1.0), np.float32(0.5), np.float32(255.0), np.float32(0.0)


@compiled
def blend_level(base: np.float32, level: np.uint8, factor: np.float32) -> np.uint8:
    """Interpolates from `base` to a level, beyond it if `factor` is above 1, and truncates. All in single precision."""
    blended = base + factor * (np.float32(level) - base)
    return np.uint8(np.int32(min(max(blended, BLACK), HIGHEST)))


@compiled
def find_lumas(planes: np.ndarray, y: int, lumas: np.ndarray) -> None:
    """Sets (columns,) int32 `lumas` to those of a row."""
    red, green, blue = planes[y, 0], planes[y, 1], planes[y, 2]
    for x in range(lumas.shape[0]):
        luma = np.int32(np.int32(red[x]) * 19595 + np.int32(green[x]) * 38470 + np.int32(blue[x]) * 7471 + 32768)
        lumas[x] = luma >> 16


@compiled
def blend_with_level(planes: np.ndarray, base: np.float32, factor: np.float32) -> None:
    levels = planes.reshape(-1)
    for j in range(levels.shape[0]):
        levels[j] = blend_level(base, levels[j], factor)


@compiled
def find_mean_luma(planes: np.ndarray) -> np.float32:
    """Returns the mean luma, rounded to a level."""
    total, lumas = 0, np.empty(planes.shape[2], np.int32)
    for y in range(planes.shape[0]):
        find_lumas(planes, y, lumas)
        total += lumas.sum()
    return np.float32(np.floor(total / (planes.shape[0] * planes.shape[2]) + 0.5))


@compiled
def change_saturation(planes: np.ndarray, factor: np.float32) -> None:
    lumas = np.empty(planes.shape[2], np.int32)
    for y in range(planes.shape[0]):
        find_lumas(planes, y, lumas)
        for channel in range(3):
            line = planes[y, channel]
            for x in range(lumas.shape[0]):
                line[x] = blend_level(np.float32(lumas[x]), line[x], factor)


@compiled
def rotate_hue(planes: np.ndarray, by: np.int32) -> None:
    """Adds `by` to the levels of hue, which go around, as Pillow's conversions to HSV and back."""
    columns = planes.shape[2]
    hues, saturations, values = (
        np.empty(columns, np.int32),
        np.empty(columns, np.float32),
        np.empty(columns, np.float32),
    )
    for y in range(planes.shape[0]):
        red, green, blue = planes[y, 0], planes[y, 1], planes[y, 2]
        for x in range(columns):
            r, g, b = np.float32(red[x]), np.float32(green[x]), np.float32(blue[x])
            most, least = max(r, max(g, b)), min(r, min(g, b))
            span = max(most - least, SINGLE_ONE)
            from_red, from_green, from_blue = (most - r) / span, (most - g) / span, (most - b) / span
            is_red, is_green = r == most, g == most
            plus = from_blue if is_red else (from_red if is_green else from_green)
            minus = from_green if is_red else (from_blue if is_green else from_red)
            third = 0.0 if is_red else (2.0 if is_green else 4.0)
            # One colour of 200 differs by a level of hue if all is computed in single precision.
            sixths = np.float32(third + np.float64(plus) - np.float64(minus))
            turns = np.float64(sixths) / 6.0 + 1.0
            share = np.float32(turns - np.floor(turns))
            hue = np.int32(np.float64(share) * 255.0) if most > least else np.int32(0)
            hues[x] = np.int32(hue + by) & 255
            saturations[x] = np.floor((most - least) / max(most, SINGLE_ONE) * HIGHEST) / HIGHEST
            values[x] = most
        for channel in range(3):
            line, drops = planes[y, channel], SATURATED_DROPS[channel]
            for x in range(columns):
                level = values[x] * (SINGLE_ONE - saturations[x] * drops[hues[x]]) + HALF_LEVEL
                line[x] = np.uint8(np.int32(level))


@compiled
def change_color(planes: np.ndarray, change: int, factor: float) -> None:
    """Applies one of the changes of a `Jitter`: 3 is that of hue, the others have factors."""
    if change == 3:
        if factor != 0.0:
            rotate_hue(planes, np.int32(int(np.rint(255 * factor)) % 256))
    elif factor != 1.0:
        if change == 2:
            change_saturation(planes, np.float32(factor))
        else:
            blend_with_level(planes, BLACK if change == 0 else find_mean_luma(planes), np.float32(factor))


@compiled
def make_gray(planes: np.ndarray) -> None:
    lumas = np.empty(planes.shape[2], np.int32)
    for y in range(planes.shape[0]):
        find_lumas(planes, y, lumas)
        for channel in range(3):
            line = planes[y, channel]
            for x in range(lumas.shape[0]):
                line[x] = np.uint8(lumas[x])
