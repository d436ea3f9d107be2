"""Masks and boxes, moved as their image is by what was drawn for it (`augment`). Changes of colour leave them as they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from firstlight.pipeline.data.annotations import VOID, Annotation
from firstlight.pipeline.data.augment.ops import Affine, Box, Drawn, Fit, Flip, Row, Shift
from firstlight.pipeline.data.images import decode_map

NEAREST = Image.Resampling.NEAREST
MAX_MASK = 2**30  # pixels: prepare has compared the size of every mask with its image's
SEEN = 0.3  # share of an object's box that must be left in the picture for it to count as an object there


@dataclass(frozen=True)
class Targets:
    """What a task learns from besides labels. `most`: boxes of an image, at most."""

    kind: Literal["present", "mask", "boxes"]
    most: int = 0

    def of(self, annotations: Sequence[Annotation], drawn: Sequence[Drawn], size: int) -> dict[str, np.ndarray]:
        """Annotations of B images, and what each op does to each image -> `present` (B, C) int8; or `mask` (B, size, size) uint8; or `boxes`
        (B, most, 4) float32, `box_classes` (B, most) int64 and `difficult` (B, most) bool, where unused rows have class -1.
        """
        if self.kind == "present":
            return {"present": np.stack([_there(found.present) for found in annotations])}
        rows = list(zip(*(op.each() for op in drawn), strict=True))
        if self.kind == "mask":
            masks = [decode_map(_there(found.mask), MAX_MASK) for found in annotations]
            return {"mask": np.stack([move_mask(mask, row, size) for mask, row in zip(masks, rows, strict=True)])}
        boxes = np.zeros((len(rows), self.most, 4), np.float32)
        classes, difficult = np.full(boxes.shape[:2], -1, np.int64), np.zeros(boxes.shape[:2], bool)
        for k, (found, row) in enumerate(zip(annotations, rows, strict=True)):
            moved, seen = move_boxes(_there(found.boxes), row, size)
            n = int(seen.sum())
            boxes[k, :n], classes[k, :n], difficult[k, :n] = (
                moved[seen],
                _there(found.box_classes)[seen],
                _there(found.difficult)[seen],
            )
        return {"boxes": boxes, "box_classes": classes, "difficult": difficult}


def _there(value: Any) -> Any:
    assert value is not None, "preflight has checked that the store has these annotations"
    return value


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
    box = (
        max(row.left, 0.0),
        max(row.top, 0.0),
        min(row.left + row.width, mask.width),
        min(row.top + row.height, mask.height),
    )
    return mask.resize((size, size), NEAREST, box=box)


def _shift_mask(mask: Image.Image, row: Shift, size: int) -> Image.Image:
    return _on_void(
        _box_mask(mask, Box(row.left, row.top, row.side, row.side), size), (int(row.right), int(row.down)), size
    )


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


def _scaled(
    boxes: np.ndarray, origin: tuple[float, float], by: tuple[float, float], to: tuple[float, float]
) -> np.ndarray:
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
