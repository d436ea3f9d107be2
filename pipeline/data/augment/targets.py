"""Moves masks and boxes like their image, by the parameters of its augmentations. Changes of colour do not matter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from firstlight.pipeline.data.annotations import Annotation
from firstlight.pipeline.data.augment.op_params import (
    Affine,
    CropBox,
    Fit,
    Flip,
    OpBatch,
    OpParams,
    Policy,
    Shift,
    VerticalFlip,
)
from firstlight.pipeline.data.images import decode_class_map
from firstlight.pipeline.data.images.class_maps import VOID_VALUE

NEAREST = Image.Resampling.NEAREST
# No real limit: prepare has compared the size of every mask with that of its image.
MAX_MASK_PIXELS = 2**30
# Share of an object's box that must remain in the view, or the object does not count as visible there.
MIN_VISIBLE_SHARE = 0.3


@dataclass(frozen=True)
class Targets:
    """The kind of target that a task learns from instead of labels. `max_boxes`: the most boxes of an image.

    `canvas`: for masks that are scored pixel by pixel, the largest width and height of a mask; None if they move with
    the view.
    """

    kind: Literal["present", "mask", "boxes"]
    max_boxes: int = 0
    canvas: tuple[int, int] | None = None

    def build_arrays(
        self, annotations: Sequence[Annotation], ops: Sequence[OpBatch], size: int
    ) -> dict[str, np.ndarray]:
        """Returns the targets of B images whose view has `size` x `size` pixels and was made by `ops`.

        present: `present` (B, C) int8. mask: `mask` (B, size, size) uint8. boxes: `boxes` (B, max_boxes, 4) float32,
        `box_classes` (B, max_boxes) int64 and `difficult` (B, max_boxes) bool; unused rows have class -1. mask and
        boxes: `region` (B, 4) float32 of `locate_image`. Whole masks are those of `build_whole_masks` instead.
        """
        if self.kind == "present":
            return {"present": np.stack([_require_value(found.present) for found in annotations])}
        params = list(zip(*(op.params_per_image() for op in ops), strict=True))
        region = {"region": np.stack([locate_image(own, size) for own in params])}
        if self.kind == "mask":
            masks = [decode_class_map(_require_value(found.mask), MAX_MASK_PIXELS) for found in annotations]
            moved = [move_mask(mask, own, size) for mask, own in zip(masks, params, strict=True)]
            return {"mask": np.stack(moved), **region}
        return {**self._build_boxes(annotations, params, size), **region}

    def build_whole_masks(
        self, annotations: Sequence[Annotation], views: Sequence[Sequence[OpBatch]]
    ) -> dict[str, np.ndarray]:
        """Returns the masks of B images as they are, and where each of V views lies.

        `whole_mask` (B, height, width) uint8 of `canvas`, VOID_VALUE to the right of the masks and below them;
        `whole_size` (B, 2) int64: width and height of each mask; `windows` (B, V, 4) float64: left, top, width and
        height of the part of the image that is in a view, each of which is made by one crop.
        """
        assert self.canvas is not None
        assert all(len(ops) == 1 and ops[0].kind is CropBox for ops in views), "a window is one crop"
        masks = [decode_class_map(_require_value(found.mask), MAX_MASK_PIXELS) for found in annotations]
        whole = np.full((len(masks), *self.canvas[::-1]), VOID_VALUE, np.uint8)
        for k, mask in enumerate(masks):
            whole[k, : mask.shape[0], : mask.shape[1]] = mask
        sizes = np.array([mask.shape[::-1] for mask in masks], np.int64)
        return {"whole_mask": whole, "whole_size": sizes, "windows": np.stack([ops[0].rows for ops in views], 1)}

    def _build_boxes(
        self, annotations: Sequence[Annotation], params: Sequence[Sequence[OpParams]], size: int
    ) -> dict[str, np.ndarray]:
        boxes = np.zeros((len(params), self.max_boxes, 4), np.float32)
        classes, difficult = np.full(boxes.shape[:2], -1, np.int64), np.zeros(boxes.shape[:2], bool)
        for k, (found, own) in enumerate(zip(annotations, params, strict=True)):
            moved, visible = move_boxes(_require_value(found.boxes), own, size)
            n = int(visible.sum())
            boxes[k, :n] = moved[visible]
            classes[k, :n] = _require_value(found.box_classes)[visible]
            difficult[k, :n] = _require_value(found.difficult)[visible]
        return {"boxes": boxes, "box_classes": classes, "difficult": difficult}


def _require_value(value: Any) -> Any:
    assert value is not None, "the checks before a run ensure that the store has these annotations"
    return value


def locate_image(params: Sequence[OpParams], size: int) -> np.ndarray:
    """Returns the box of a view that shows the image, (4,) float32: left, top, right, bottom; the rest is padding.

    A turned image has the box around it.
    """
    crop = params[0]
    if isinstance(crop, Fit):
        shown = (0.0, 0.0, crop.across, crop.down)
    elif isinstance(crop, Shift):
        shown = (crop.left, crop.top, crop.left + crop.side, crop.top + crop.side)
    else:
        assert isinstance(crop, CropBox), "a pipeline starts with a crop"
        shown = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    region: np.ndarray = move_boxes(np.array([shown]), params, size)[0][0]
    return region


def find_view_map(params: Sequence[OpParams], image_size: tuple[int, int], size: int) -> np.ndarray:
    """Returns how the ops move the points of an image, (2, 3) float64: (x, y) is at `map @ (x, y, 1)` of the view.

    Args:
        params: those of the ops that make the view, in their order.
        image_size: width and height of the image.
        size: the side of the view in pixels.
    """
    width, height = image_size
    # A point is a box without an extent.
    points = np.array([(0, 0) * 2, (width, 0) * 2, (0, height) * 2], np.float64)
    for op in params:
        for move in _list_box_moves(op):
            points = BOX_MOVERS[type(move)](points, move, size)
    origin, right, down = points[:, :2]
    return np.stack(((right - origin) / width, (down - origin) / height, origin), 1)


def move_mask(mask: np.ndarray, params: Sequence[OpParams], size: int) -> np.ndarray:
    """Moves an image's (H, W) uint8 classes. Returns (size, size) uint8; VOID_VALUE fills what comes from outside."""
    moved = Image.fromarray(mask)
    for op in params:
        for step in op.steps if isinstance(op, Policy) else (op,):
            if type(step) in MASK_MOVERS:
                moved = MASK_MOVERS[type(step)](moved, step, size)
    return np.asarray(moved, np.uint8)


def move_boxes(boxes: np.ndarray, params: Sequence[OpParams], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Moves boxes (k, 4): left, top, right, bottom in pixels of the image.

    Returns the boxes in the view, (k, 4) float32, cut at its edges, and (k,) bool: True if the box is visible there.
    """
    whole = cut = boxes.astype(np.float64)
    for op in params:
        for move in _list_box_moves(op):
            mover = BOX_MOVERS[type(move)]
            whole, cut = mover(whole, move, size), mover(cut, move, size).clip(0, size)
    sides, before = cut[:, 2:] - cut[:, :2], whole[:, 2:] - whole[:, :2]
    visible = (sides >= 1).all(1) & (sides.prod(1) >= MIN_VISIBLE_SHARE * before.prod(1))
    return cut.astype(np.float32), visible


def _list_box_moves(op: OpParams) -> list[Any]:
    """Returns the moves of boxes that `op` consists of, in order.

    A shift first cuts out a square, so that black moves in instead of the pixels next to the square.
    """
    if isinstance(op, Shift):
        return [CropBox(op.left, op.top, op.side, op.side), (op.right, op.down)]
    if isinstance(op, Policy):
        return [step for step in op.steps if type(step) in BOX_MOVERS]
    return [op] if type(op) in BOX_MOVERS else []


def _crop_mask(mask: Image.Image, op: CropBox, size: int) -> Image.Image:
    box = (
        max(op.left, 0.0),
        max(op.top, 0.0),
        min(op.left + op.width, mask.width),
        min(op.top + op.height, mask.height),
    )
    return mask.resize((size, size), NEAREST, box=box)


def _shift_mask(mask: Image.Image, op: Shift, size: int) -> Image.Image:
    square = _crop_mask(mask, CropBox(op.left, op.top, op.side, op.side), size)
    return _paste_on_void(square, (int(op.right), int(op.down)), size)


def _fit_mask(mask: Image.Image, op: Fit, size: int) -> Image.Image:
    resized = mask.resize((int(op.width), int(op.height)), NEAREST)
    return _paste_on_void(resized, (int(op.left), int(op.top)), size)


def _paste_on_void(mask: Image.Image, corner: tuple[int, int], size: int) -> Image.Image:
    canvas = Image.new("L", (size, size), VOID_VALUE)
    canvas.paste(mask, corner)
    return canvas


def _affine_mask(mask: Image.Image, op: Affine, size: int) -> Image.Image:
    return mask.transform((size, size), Image.Transform.AFFINE, tuple(op), NEAREST, fillcolor=VOID_VALUE)


def _flip_mask(mask: Image.Image, op: Flip, size: int) -> Image.Image:
    return mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if op.flipped else mask


def _flip_mask_vertically(mask: Image.Image, op: VerticalFlip, size: int) -> Image.Image:
    return mask.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if op.flipped else mask


def _crop_boxes(boxes: np.ndarray, op: CropBox, size: int) -> np.ndarray:
    return _scale_boxes(boxes, (op.left, op.top), (size / op.width, size / op.height), (0.0, 0.0))


def _shift_boxes(boxes: np.ndarray, offset: tuple[float, float], size: int) -> np.ndarray:
    return _scale_boxes(boxes, (0.0, 0.0), (1.0, 1.0), offset)


def _fit_boxes(boxes: np.ndarray, op: Fit, size: int) -> np.ndarray:
    return _scale_boxes(boxes, (0.0, 0.0), (op.width / op.across, op.height / op.down), (op.left, op.top))


def _scale_boxes(
    boxes: np.ndarray, origin: tuple[float, float], factor: tuple[float, float], offset: tuple[float, float]
) -> np.ndarray:
    scaled: np.ndarray = (boxes - np.tile(origin, 2)) * np.tile(factor, 2) + np.tile(offset, 2)
    return scaled


def _flip_boxes(boxes: np.ndarray, op: Flip, size: int) -> np.ndarray:
    left, top, right, bottom = boxes.T
    return np.stack((size - right, top, size - left, bottom), 1) if op.flipped else boxes


def _flip_boxes_vertically(boxes: np.ndarray, op: VerticalFlip, size: int) -> np.ndarray:
    left, top, right, bottom = boxes.T
    return np.stack((left, size - bottom, right, size - top), 1) if op.flipped else boxes


def _affine_boxes(boxes: np.ndarray, op: Affine, size: int) -> np.ndarray:
    """Returns the boxes around the moved corners. `op` maps output to input pixels, so the corners are solved for."""
    corners = boxes[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 2)
    back = np.array([[op.a, op.b], [op.d, op.e]])
    moved = np.linalg.solve(back, (corners - (op.c, op.f)).T).T.reshape(-1, 4, 2)
    return np.hstack((moved.min(1), moved.max(1)))


MASK_MOVERS: dict[type[Any], Callable[[Image.Image, Any, int], Image.Image]] = {
    CropBox: _crop_mask,
    Shift: _shift_mask,
    Fit: _fit_mask,
    Affine: _affine_mask,
    Flip: _flip_mask,
    VerticalFlip: _flip_mask_vertically,
}
# The offset of a shift is a plain tuple.
BOX_MOVERS: dict[type[Any], Callable[[np.ndarray, Any, int], np.ndarray]] = {
    CropBox: _crop_boxes,
    tuple: _shift_boxes,
    Fit: _fit_boxes,
    Affine: _affine_boxes,
    Flip: _flip_boxes,
    VerticalFlip: _flip_boxes_vertically,
}
