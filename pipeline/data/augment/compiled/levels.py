"""Maps of levels, in place, of (rows, 3, columns) uint8 planes."""

import numpy as np

from firstlight.pipeline.data.augment.compiled.compiler import compiled


@compiled
def solarize_planes(planes: np.ndarray, threshold: int) -> None:
    levels = planes.reshape(-1)
    for j in range(levels.shape[0]):
        if levels[j] >= threshold:
            levels[j] = np.uint8(255) - levels[j]


@compiled
def posterize_planes(planes: np.ndarray, bits: int) -> None:
    levels, kept = planes.reshape(-1), np.uint8(256 - (1 << (8 - bits)))
    for j in range(levels.shape[0]):
        levels[j] &= kept


@compiled
def map_channel(planes: np.ndarray, channel: int, table: np.ndarray) -> None:
    for y in range(planes.shape[0]):
        line = planes[y, channel]
        for x in range(line.shape[0]):
            line[x] = table[line[x]]


@compiled
def equalize_planes(planes: np.ndarray) -> None:
    """Equalises the histogram of each channel, as `PIL.ImageOps.equalize`."""
    counts, table = np.empty(256, np.int64), np.empty(256, np.uint8)
    for channel in range(3):
        counts[:] = 0
        last = 0
        for y in range(planes.shape[0]):
            line = planes[y, channel]
            for x in range(line.shape[0]):
                counts[line[x]] += 1
                last = max(last, int(line[x]))
        step = (planes.shape[0] * planes.shape[2] - counts[last]) // 255
        if step == 0:
            continue
        before = step // 2
        for level in range(256):
            table[level] = min(before // step, 255)
            before += counts[level]
        map_channel(planes, channel, table)


@compiled
def stretch_planes(planes: np.ndarray) -> None:
    """Stretches the levels of each channel to 0..255, as `PIL.ImageOps.autocontrast`."""
    table = np.empty(256, np.uint8)
    for channel in range(3):
        low, high = 255, 0
        for y in range(planes.shape[0]):
            line = planes[y, channel]
            for x in range(line.shape[0]):
                low, high = min(low, int(line[x])), max(high, int(line[x]))
        if high <= low:
            continue
        scale = 255.0 / (high - low)
        offset = -low * scale
        for level in range(256):
            table[level] = min(max(int(level * scale + offset), 0), 255)
        map_channel(planes, channel, table)
