"""Masks and boxes, moved as their image is by what was drawn for it (`augment`). Changes of colour leave them as they are."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipeline.annotations import VOID
from pipeline.augment import Affine, Box, Fit, Flip, Row, Shift

NEAREST = Image.Resampling.NEAREST
SEEN = 0.3  # share of an object's box that must be left in the picture for it to count as an object there


def move_mask(mask: np.ndarray, rows: Sequence[Row], size: int) -> np.ndarray:
    """(H, W) uint8 classes of an image -> (size, size) uint8; VOID moves in from outside."""
    moved = Image.fromarray(mask)
    for row in rows:
        if type(row) in MASKS:
            moved = MASKS[type(row)](moved, row, size)
    return np.asarray(moved, np.uint8)


def move_boxes(boxes: np.ndarray, rows: Sequence[Row], size: int) -> tuple[np.ndarray, np.ndarray]:
    """(k, 4) left, top, right, bottom in pixels of an image -> the same in the view, cut at its edges, and (k,) bool: which are seen there."""
    whole = cut = boxes.astype(np.float64)
    for row in rows:
        for step in _steps(row):
            whole, cut = BOXES[type(step)](whole, step, size), BOXES[type(step)](cut, step, size).clip(0, size)
    sides, before = cut[:, 2:] - cut[:, :2], whole[:, 2:] - whole[:, :2]
    seen = (sides >= 1).all(1) & (sides.prod(1) >= SEEN * before.prod(1))
    return cut.astype(np.float32), seen


def _steps(row: Row) -> list[Any]:
    """What moves boxes, one after the other; a shift first cuts a square, so that black moves in and not what is beside it."""
    if isinstance(row, Shift):
        return [Box(row.left, row.top, row.side, row.side), (row.right, row.down)]
    return [row] if type(row) in BOXES else []


def _box_mask(mask: Image.Image, row: Box, size: int) -> Image.Image:
    box = (max(row.left, 0.0), max(row.top, 0.0), min(row.left + row.width, mask.width), min(row.top + row.height, mask.height))
    return mask.resize((size, size), NEAREST, box=box)


def _shift_mask(mask: Image.Image, row: Shift, size: int) -> Image.Image:
    return _on_void(_box_mask(mask, Box(row.left, row.top, row.side, row.side), size), (int(row.right), int(row.down)), size)


def _fit_mask(mask: Image.Image, row: Fit, size: int) -> Image.Image:
    return _on_void(mask.resize((int(row.width), int(row.height)), NEAREST), (int(row.left), int(row.top)), size)


def _on_void(mask: Image.Image, place: tuple[int, int], size: int) -> Image.Image:
    canvas = Image.new("L", (size, size), VOID)
    canvas.paste(mask, place)
    return canvas


def _affine_mask(mask: Image.Image, row: Affine, size: int) -> Image.Image:
    return mask.transform((size, size), Image.Transform.AFFINE, tuple(row), NEAREST, fillcolor=VOID)


def _flip_mask(mask: Image.Image, row: Flip, size: int) -> Image.Image:
    return mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if row.flipped else mask


def _box_boxes(boxes: np.ndarray, row: Box, size: int) -> np.ndarray:
    return _scaled(boxes, (row.left, row.top), (size / row.width, size / row.height), (0.0, 0.0))


def _shift_boxes(boxes: np.ndarray, by: tuple[float, float], size: int) -> np.ndarray:
    return _scaled(boxes, (0.0, 0.0), (1.0, 1.0), by)


def _fit_boxes(boxes: np.ndarray, row: Fit, size: int) -> np.ndarray:
    return _scaled(boxes, (0.0, 0.0), (row.width / row.across, row.height / row.down), (row.left, row.top))


def _scaled(boxes: np.ndarray, origin: tuple[float, float], by: tuple[float, float], to: tuple[float, float]) -> np.ndarray:
    scaled: np.ndarray = (boxes - np.tile(origin, 2)) * np.tile(by, 2) + np.tile(to, 2)
    return scaled


def _flip_boxes(boxes: np.ndarray, row: Flip, size: int) -> np.ndarray:
    left, top, right, bottom = boxes.T
    return np.stack((size - right, top, size - left, bottom), 1) if row.flipped else boxes


def _affine_boxes(boxes: np.ndarray, row: Affine, size: int) -> np.ndarray:
    """The boxes around the four corners, where these come to lie: `row` tells where an output pixel came from, so it is solved for."""
    corners = boxes[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 2)
    back = np.array([[row.a, row.b], [row.d, row.e]])
    moved = np.linalg.solve(back, (corners - (row.c, row.f)).T).T.reshape(-1, 4, 2)
    return np.hstack((moved.min(1), moved.max(1)))


MASKS: dict[type[Any], Callable[[Image.Image, Any, int], Image.Image]] = {
    Box: _box_mask,
    Shift: _shift_mask,
    Fit: _fit_mask,
    Affine: _affine_mask,
    Flip: _flip_mask,
}
BOXES: dict[type[Any], Callable[[np.ndarray, Any, int], np.ndarray]] = {
    Box: _box_boxes,
    tuple: _shift_boxes,
    Fit: _fit_boxes,
    Affine: _affine_boxes,
    Flip: _flip_boxes,
}
