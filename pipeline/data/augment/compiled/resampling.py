"""Resampling of a box of an image, with the weights, the rounding and the order of passes of Pillow."""

import numpy as np

from firstlight.pipeline.data.augment.compiled.compiler import compiled

# Weights are whole multiples of 2**-WEIGHT_BITS.
WEIGHT_BITS = 22
HALF = 1 << (WEIGHT_BITS - 1)
LAST_LEVEL = np.int32(255)
# Red, green, blue, and one that is not used.
PACKED_BYTES = 4
# Pixels that are transposed at a time, so that what is read and written stays in the cache of a core.
TILE = 16


@compiled
def is_columns_first(width: int, height: int, across: int, down: int) -> bool:
    """Returns True if Pillow resamples columns before rows, from `width` x `height` to `across` x `down` pixels."""
    return height > down and height - down > 2 * (width - across)


@compiled
def weigh_inputs(start: float, stop: float, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each output its first input and its number of inputs, (outputs, 2), and the weights of these.

    The weights are a triangle around the output, two inputs wide, or two outputs if those are larger. It extends beyond
    the edges of the span, but not of the line.
    """
    # Pillow's box is of single precision.
    first, last = np.float32(start), np.float32(stop)
    scale = np.float64(last - first) / outputs
    reach = max(scale, 1.0)
    spans = np.empty((outputs, 2), np.int32)
    weights = np.zeros((outputs, 2 * int(np.ceil(reach)) + 1), np.int32)
    shares = np.empty(weights.shape[1], np.float64)
    for output in range(outputs):
        center = np.float64(first) + (output + 0.5) * scale
        low, high = max(int(center - reach + 0.5), 0), min(int(center + reach + 0.5), inputs)
        total = 0.0
        for k in range(high - low):
            shares[k] = max(1.0 - abs((k + low - center + 0.5) * (1.0 / reach)), 0.0)
            total += shares[k]
        for k in range(high - low):
            weights[output, k] = int(0.5 + shares[k] / total * (1 << WEIGHT_BITS))
        spans[output, 0], spans[output, 1] = low, high - low
    return spans, weights


@compiled
def sum_rows(packed: np.ndarray, spans: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the weighted sums of rows of packed pixels, the first of which is the first that is seen."""
    levels, first = packed.view(np.uint8), spans[0, 0]
    found = np.empty((len(spans), packed.shape[1]), np.uint32)
    length, sums = levels.shape[1], found.view(np.uint8)
    total = np.empty(length, np.int32)
    for output in range(len(spans)):
        place = spans[output, 0] - first
        source, weight = levels[place], weights[output, 0]
        for j in range(length):
            total[j] = HALF + np.int32(source[j]) * weight
        for k in range(1, spans[output, 1]):
            source, weight = levels[place + k], weights[output, k]
            for j in range(length):
                total[j] += np.int32(source[j]) * weight
        line = sums[output]
        for j in range(length):
            line[j] = np.uint8(min(np.int32(total[j] >> WEIGHT_BITS), LAST_LEVEL))
    return found


@compiled
def pack_part(pixels: np.ndarray, top: int, left: int, rows: int, columns: int) -> np.ndarray:
    """Returns a part of (H, W, C) pixels as (rows, columns) uint32: red, green, blue, and a byte that is not used."""
    part = np.empty((rows, columns), np.uint32)
    if pixels.shape[2] == PACKED_BYTES:
        return pixels.view(np.uint32)[top : top + rows, left : left + columns, 0].copy()
    green, blue = (1, 2) if pixels.shape[2] >= 3 else (0, 0)
    bytes_of_part = part.view(np.uint8)
    for y in range(rows):
        for x in range(columns):
            for channel, own in enumerate((0, green, blue)):
                bytes_of_part[y, PACKED_BYTES * x + channel] = pixels[top + y, left + x, own]
    return part


@compiled
def turn_packed(packed: np.ndarray) -> np.ndarray:
    """Returns the columns of packed pixels as rows."""
    rows, columns = packed.shape
    turned = np.empty((columns, rows), np.uint32)
    for start in range(0, rows, TILE):
        for x in range(columns):
            line = turned[x]
            for y in range(start, min(start + TILE, rows)):
                line[y] = packed[y, x]
    return turned


@compiled
def split_channels(packed: np.ndarray) -> np.ndarray:
    """Returns (rows, columns) packed pixels as (rows, 3, columns) uint8."""
    rows, columns = packed.shape
    planes = np.empty((rows, 3, columns), np.uint8)
    for y in range(rows):
        source = packed[y]
        for channel in range(3):
            line, shift = planes[y, channel], np.uint32(8 * channel)
            for x in range(columns):
                line[x] = np.uint8(source[x] >> shift)
    return planes


@compiled
def resample_planes(
    pixels: np.ndarray, left: float, top: float, width: float, height: float, across: int, down: int
) -> np.ndarray:
    """Resamples a box of (H, W, C) uint8 pixels to (down, 3, across) planes, as `Image.resize(BILINEAR, box=)`.

    Images of one channel are gray.
    """
    if width == across and height == down and left == np.floor(left) and top == np.floor(top):
        return split_channels(pack_part(pixels, int(top), int(left), down, across))
    # Rounding may push a box over the edge by 1e-13.
    x, x_weights = weigh_inputs(max(left, 0.0), min(left + width, pixels.shape[1]), pixels.shape[1], across)
    y, y_weights = weigh_inputs(max(top, 0.0), min(top + height, pixels.shape[0]), pixels.shape[0], down)
    # Only the rows and columns that an output sees are resampled.
    rows, columns = y[-1, 0] + y[-1, 1] - y[0, 0], x[-1, 0] + x[-1, 1] - x[0, 0]
    packed = pack_part(pixels, y[0, 0], x[0, 0], rows, columns)
    rows_first = not is_columns_first(pixels.shape[1], pixels.shape[0], across, down)
    for along_rows in (rows_first, not rows_first):
        if along_rows:
            packed = turn_packed(sum_rows(turn_packed(packed), x, x_weights))
        else:
            packed = sum_rows(packed, y, y_weights)
    return split_channels(packed)
